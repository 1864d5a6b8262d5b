"""Which measured shapes speak for a shape that was not measured, and with what weight.

Shapes are points on logarithmic axes. Neighbours are chosen among the rows that differ from the
target in the fewest axes: those that bracket it on every such axis vote, multilinearly; several
such groups are averaged, tight brackets counting more. What is asked of the rows is a slowdown
against a physical form (:mod:`mhcplan.profiles.op_fit`), which varies slowly: work itself is not
interpolated. Everything here is deterministic and independent of the order of rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_EXTRAPOLATION = 4  # times outside the measured range of an axis; design: "What a cost is"

_NEAREST = 4  # rows that vote where no group of rows brackets the target
_LOG_ZERO = -50.0  # 0 on an axis means "without": far from every size


class Outside(NamedTuple):
    """A value outside what was measured on its axis; ``factor`` > 1 says how far."""

    axis: str
    value: int
    low: int
    high: int
    factor: float


class _Box(NamedTuple):
    """Rows around a target, their weights (sum 1) and the log size of the bracket."""

    rows: list[int]
    weights: list[float]
    span: float


class Grid:
    """The measured shapes of one kind and pass."""

    def __init__(self, axes: Sequence[str], points: Sequence[Sequence[int]]) -> None:
        """Index the shapes.

        Args:
            axes: names of the columns.
            points: one row a measured shape, integers >= 0; no two are equal.
        """
        self.axes = tuple(axes)
        self._points = [tuple(point) for point in points]
        self._array = np.array(points, np.int64).reshape(len(points), len(self.axes))
        self._bits = 1 << np.arange(len(self.axes))
        self._values = [sorted(set(column)) for column in zip(*points, strict=True)]

    def outside(self, target: Sequence[int]) -> list[Outside]:
        """Axes on which ``target`` lies outside the measured range, and by what factor.

        0 stands for "without" (no query compression, say): asked for where only sizes were
        measured, or the other way round, it is outside, by a factor of 1 that never refuses: the
        form counts the work that is there or not.
        """
        found: list[Outside] = []
        for axis, value, values in zip(self.axes, target, self._values, strict=True):
            sizes = [v for v in values if v > 0] if value > 0 else values
            if not sizes or (value == 0 and values[0] > 0):
                found.append(Outside(axis, value, values[0], values[-1], 1.0))
            elif value < sizes[0]:
                found.append(Outside(axis, value, sizes[0], sizes[-1], sizes[0] / value))
            elif value > sizes[-1]:
                found.append(Outside(axis, value, sizes[0], sizes[-1], value / sizes[-1]))
        return found

    def neighbours(self, target: Sequence[int]) -> list[tuple[int, float]]:
        """Rows that speak for ``target`` and their weights (sum 1), heaviest first."""
        masks: list[int] = ((self._array != np.array(target, np.int64)) @ self._bits).tolist()
        groups: dict[int, list[int]] = {}
        for row, mask in enumerate(masks):
            groups.setdefault(mask, []).append(row)
        boxes: list[_Box] = []
        differing = 0
        for mask in sorted(groups, key=lambda m: (m.bit_count(), m)):
            if boxes and mask.bit_count() > differing:
                break
            box = self._bracket(groups[mask], mask, target)
            if box is not None:
                boxes.append(box)
                differing = mask.bit_count()
        if not boxes:
            return self._nearest(target)
        votes: dict[int, float] = {}
        total = sum(1 / box.span for box in boxes)
        for box in boxes:
            for row, weight in zip(box.rows, box.weights, strict=True):
                votes[row] = weight / (box.span * total)
        return self._ranked(votes)

    def _bracket(self, rows: list[int], mask: int, target: Sequence[int]) -> _Box | None:
        """The rows at the corners around ``target`` among ``rows``, which all differ from it in
        exactly the axes of ``mask``; None if they do not surround it.

        Where the whole grid ends before the target, the row at the edge speaks alone.
        """
        span, bounds = 0.0, list[tuple[int, int, int, float]]()
        for axis in (a for a in range(len(self.axes)) if mask >> a & 1):
            values = [self._points[row][axis] for row in rows]
            low = max((v for v in values if v < target[axis]), default=None)
            high = min((v for v in values if v > target[axis]), default=None)
            edge = self._values[axis]
            if low is not None and high is not None:
                width = _log(high) - _log(low)
                bounds.append((axis, low, high, (_log(target[axis]) - _log(low)) / width))
                span += width
            elif target[axis] > edge[-1] and low is not None:
                bounds.append((axis, low, low, 0.0))
                span += _log(target[axis]) - _log(low)
            elif target[axis] < edge[0] and high is not None:
                bounds.append((axis, high, high, 0.0))
                span += _log(high) - _log(target[axis])
            else:
                return None
        return self._corners(rows, bounds, span)

    def _corners(
        self, rows: list[int], bounds: list[tuple[int, int, int, float]], span: float
    ) -> _Box | None:
        """Multilinear weights of the corners that were measured, if they lie on all sides."""
        corners: list[int] = []
        weights: list[float] = []
        for row in rows:
            point = self._points[row]
            weight = 1.0
            for axis, low, high, fraction in bounds:
                value = point[axis]
                if value not in (low, high):
                    break
                weight *= fraction if low != high and value == high else 1.0 - fraction
            else:
                corners.append(row)
                weights.append(weight)
        for axis, low, high, _ in bounds:
            if not {low, high} <= {self._points[row][axis] for row in corners}:
                return None
        total = sum(weights)
        return _Box(corners, [weight / total for weight in weights], span)

    def _nearest(self, target: Sequence[int]) -> list[tuple[int, float]]:
        """The nearest rows by inverse squared distance; those that differ in fewest axes first."""
        logs = [_log(v) for v in target]

        def distance(row: int) -> tuple[int, float, tuple[int, ...]]:
            point = self._points[row]
            square = differing = 0
            for value, wanted, log in zip(point, target, logs, strict=True):
                if value != wanted:
                    differing += 1
                    square += (_log(value) - log) ** 2
            return differing, square, point

        near = sorted((*distance(row), row) for row in range(len(self._points)))[:_NEAREST]
        total = sum(1 / square for _, square, _, _ in near)
        return self._ranked({row: 1 / square / total for _, square, _, row in near})

    def _ranked(self, votes: dict[int, float]) -> list[tuple[int, float]]:
        def rank(vote: tuple[int, float]) -> tuple[float, tuple[int, ...]]:
            return -vote[1], self._points[vote[0]]

        return sorted(((row, weight) for row, weight in votes.items() if weight > 0), key=rank)


def _log(value: int) -> float:
    return math.log(value) if value > 0 else _LOG_ZERO
