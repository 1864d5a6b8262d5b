"""What an op costs at a shape that was measured, or near one.

An op that was measured at this shape costs what was measured, verbatim. Any other shape costs

    time = form(shape) x slowdown(shape),

with launch, arithmetic and bytes as fitted to the kind and pass (:mod:`mhcplan.profiles.op_fit`)
and a slowdown against that form, interpolated in log space between measured shapes
(:mod:`mhcplan.profiles.interpolation`). Outside the measured range the slowdown of the edge is
held, up to 4x on each axis; beyond that the look-up refuses and says what to measure.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

from mhcplan.profiles.costs import Cost, CostMissing, Source, worst
from mhcplan.profiles.interpolation import MAX_EXTRAPOLATION, Grid, Outside
from mhcplan.profiles.op_fit import FittedTime
from mhcplan.profiles.vocabulary import OP_KINDS, OpKey

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.profiles.op_fit import Roofline
    from mhcplan.profiles.schema import OpTiming, Segment

    Rows = list[tuple[OpKey, OpTiming]]

# Elementwise ops over one long array: a longer one is a train of measured ones, a shorter one takes
# no longer than the shortest measured. So no length of these is too far.
_TRAIN_AXES = frozenset({"parameters"})


def measure_command(key: OpKey) -> str:
    """How to get the missing measurement, as the end of an error line."""
    return f"measure it: mhcplan profile measure --op '{key}'"


class OpCosts:
    """The measured rows of one kind and pass.

    The host's time goes with the kernels that an op launches and not with its sizes. How busy the
    host was when a row was measured moves it two- or threefold, so it is taken from all rows: the
    median of a kernel's.
    """

    def __init__(self, rows: Rows, alike: Rows, roofline: Roofline, profile_name: str) -> None:
        """Keep ``rows``, all of one kind and pass; errors name the profile.

        The form is fitted to ``alike``: those rows and, if there are any, those of kinds that run
        the same kernels (:data:`mhcplan.profiles.op_fit.ALIKE`).
        """
        self._name = profile_name
        self._alike = alike
        self._exact = dict(rows)
        self._keys = [key for key, _ in rows]
        self._rows = [row for _, row in rows]
        self._launch_ns = median(row.host_ns / _launches(row) for row in self._rows)
        self._roofline = roofline
        self._form: FittedTime | None = None
        self._grid: Grid | None = None
        self._log_slowdowns: dict[int, float] = {}

    def price(self, key: OpKey) -> Cost:
        """Cost of ``key``; raises CostMissing."""
        row = self._exact.get(key)
        if row is not None:
            return _as_measured(key, row, self._host_ns(row))
        if self._grid is None or self._form is None:
            times_ns = [row.duration_ns for _, row in self._alike]
            self._form = FittedTime([k for k, _ in self._alike], times_ns, self._roofline)
            axes = [axis for axis, _ in key.shape]
            self._grid = Grid(axes, [[v for _, v in k.shape] for k in self._keys])
        target = [value for _, value in key.shape]
        outside = self._grid.outside(target)
        self._refuse_beyond_reach(key, outside)
        return self._interpolate(key, self._form, self._grid.neighbours(target), outside)

    def _host_ns(self, row: OpTiming) -> int:
        return round(self._launch_ns * _launches(row))

    def _log_slowdown(self, i: int, form: FittedTime) -> float:
        if i not in self._log_slowdowns:
            expected_ns = form(self._keys[i])
            self._log_slowdowns[i] = math.log(self._rows[i].duration_ns / expected_ns)
        return self._log_slowdowns[i]

    def _refuse_beyond_reach(self, key: OpKey, outside: list[Outside]) -> None:
        for axis, value, low, high, factor in outside:
            if factor > MAX_EXTRAPOLATION and axis not in _TRAIN_AXES:
                measured = str(low) if low == high else f"{low} to {high}"
                raise CostMissing(
                    f"profile {self._name}: {key.kind}.{key.pass_} was measured for"
                    f" {axis} {measured}; {axis}={value} is more than {MAX_EXTRAPOLATION}x outside;"
                    f" {measure_command(key)}"
                )

    def _interpolate(
        self,
        key: OpKey,
        form: FittedTime,
        votes: list[tuple[int, float]],
        outside: list[Outside],
    ) -> Cost:
        rows = [self._rows[i] for i, _ in votes]
        slowdown = math.exp(sum(weight * self._log_slowdown(i, form) for i, weight in votes))
        duration_ns = max(round(form(key) * slowdown), 1)
        nearest_key, nearest = self._keys[votes[0][0]], rows[0]
        how: Source = "extrapolated" if outside else "interpolated"
        work = _bytes_ratio(key, nearest_key)
        return Cost(
            duration_ns=duration_ns,
            host_ns=self._host_ns(nearest),
            source=worst([how, *(row.source for row in rows)]),
            explanation=_explain(how, [self._keys[i] for i, _ in votes], outside, rows),
            spread_percent=max(row.spread_percent for row in rows),
            segments=scale_segments(nearest.segments, duration_ns / nearest.duration_ns, work),
            workspace_bytes=round((nearest.workspace_bytes or 0) * work),
            saved_bytes=_scaled_kept(saved_bytes, nearest.saved_bytes, key, nearest_key, work),
            deferred_bytes=_scaled_kept(
                deferred_bytes, nearest.deferred_bytes, key, nearest_key, work
            ),
        )


def _launches(row: OpTiming) -> int:
    return max(len(row.segments), 1)


def _as_measured(key: OpKey, row: OpTiming, host_ns: int) -> Cost:
    """The row itself: nothing of it is touched but the host's time."""
    return Cost(
        duration_ns=row.duration_ns,
        host_ns=host_ns,
        source=row.source,
        explanation=row.citation or f"median of {row.samples} samples of {key}",
        spread_percent=row.spread_percent,
        segments=row.segments,
        workspace_bytes=row.workspace_bytes or 0,
        saved_bytes=saved_bytes(key) if row.saved_bytes is None else row.saved_bytes,
        deferred_bytes=deferred_bytes(key) if row.deferred_bytes is None else row.deferred_bytes,
    )


def _explain(how: str, keys: list[OpKey], outside: list[Outside], rows: list[OpTiming]) -> str:
    shapes = " and ".join(str(key) for key in keys[:2])
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    beyond = "".join(
        f"; {axis}={value}, measured {low} to {high}" for axis, value, low, high, _ in outside
    )
    cited = "".join(f"; {text}" for text in dict.fromkeys(r.citation for r in rows) if text)
    return f"{how} from {shapes}{more} by launch, arithmetic and bytes{beyond}{cited}"


def saved_bytes(key: OpKey) -> int:
    """What F keeps for I, by the vocabulary's formula; 0 in other passes."""
    return OP_KINDS[key.kind].saved(dict(key.shape)) if key.pass_ == "F" else 0


def deferred_bytes(key: OpKey) -> int:
    """What I leaves for W, by the vocabulary's formula; 0 in other passes."""
    return OP_KINDS[key.kind].deferred(dict(key.shape)) if key.pass_ == "I" else 0


def _scaled_kept(
    formula: Callable[[OpKey], int], measured: int | None, key: OpKey, row_key: OpKey, work: float
) -> int:
    """What is kept at ``key`` by the formula, corrected by what was measured at ``row_key``."""
    if measured is None:
        return formula(key)
    counted = formula(row_key)
    return round(measured * (formula(key) / counted if counted else work))


def _bytes_ratio(key: OpKey, row_key: OpKey) -> float:
    least = OP_KINDS[key.kind].bytes
    there = least(dict(row_key.shape), row_key.pass_)
    return least(dict(key.shape), key.pass_) / there if there else 1.0


def scale_segments(
    segments: tuple[Segment, ...], longer: float, work: float
) -> tuple[Segment, ...]:
    """Kernels of an op as they look when it takes ``longer`` times as long for ``work`` times the
    work: a persistent kernel keeps its CTAs and runs longer, another has more of them.
    """
    return tuple(_scale_segment(segment, longer, work) for segment in segments)


def _scale_segment(segment: Segment, longer: float, work: float) -> Segment:
    ctas = segment.ctas if segment.persistent else max(round(segment.ctas * work), 1)
    return segment.model_copy(
        update={
            # rounded down, so that the segments never outlast the op
            "duration_ns": max(int(segment.duration_ns * longer), 1),
            "ctas": ctas,
            "cta_ns": max(round(segment.cta_ns * longer * segment.ctas / ctas), 1),
            "hbm_bytes": round(segment.hbm_bytes * work),
        }
    )
