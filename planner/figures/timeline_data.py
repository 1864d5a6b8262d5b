"""A simulated step as the arrays that the timeline draws: a lane for each rank and stream.

Ops are sorted by lane and, in a lane, by start, so that a browser finds what is visible or under
the pointer by binary search. Arrays travel once, as base64 of zlib-compressed little-endian typed
arrays, and as differences where neighbours are alike (``gap``, ``behind``, memory), which shrinks
them tenfold; tables of words travel as JSON. Ops that take no time (bookkeeping) are left out.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mhcplan.sim.memory import memory_times_ns
from mhcplan.sim.timeline import REASONS, critical_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mhcplan.planner.predict import Step
    from mhcplan.profiles.costs import Cost
    from mhcplan.sim.program import Program, Stream

    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Paint:
    """A class of ops that share a colour; ``pattern`` hatches it, as plotly names hatches."""

    name: str
    color: str
    pattern: str = ""


# Okabe and Ito's palette, which is told apart with any colour vision, and two greys.
PAINTS = {
    "F": Paint("forward", "#56B4E9"),
    "I": Paint("backward", "#0072B2"),
    "W": Paint("weight gradient", "#009E73"),
    "mhc": Paint("mHC", "#D55E00"),
    "recompute": Paint("recompute", "#E69F00", "/"),
    "optimizer": Paint("optimizer", "#CC79A7"),
    "ep": Paint("expert traffic", "#8C8C8C"),
    "pp": Paint("pipeline traffic", "#F0E442"),
    "dp": Paint("gradient traffic", "#BFBFBF"),
}
_PAINT_NAMES = tuple(PAINTS)
# What a stream is for, by the beginning of its name, in drawing order, with its lane's height.
# Whole numbers: the raster of many ops has equal rows, which browsers draw at once.
_LANE_HEIGHTS = {"compute": 3, "high": 2, "comm": 2, "ep": 2, "pp": 1, "dp": 1}
_RANK_GAP = 1
_COMPRESSION = 6


@dataclass(frozen=True)
class _Shown:
    """Which ops are drawn, in drawing order, and where.

    Attributes:
        op: op of the Program, by position.
        lane: lane, by position.
        position: position, by op of the Program; -1 where it is not drawn.
        lanes: the stream of each lane.
    """

    op: Ints
    lane: Ints
    position: Ints
    lanes: tuple[Stream, ...]


def timeline_data(step: Step) -> dict[str, Any]:
    """Everything that ``timeline.js`` draws, as JSON values."""
    program, timeline = step.program, step.timeline
    shown = _shown(step)
    start, end = timeline.start_ns[shown.op], timeline.end_ns[shown.op]
    opens = np.diff(shown.lane, prepend=-1) != 0  # the first op of a lane
    labels, label = _labels(program, step.costs, shown.op)
    cells, cell = np.unique(program.cell[shown.op], return_inverse=True)
    return {
        "step_ns": timeline.step_ns,
        "paints": [vars(paint) for paint in PAINTS.values()],
        "reasons": list(REASONS),
        "lanes": _lanes(shown.lanes),
        "labels": labels,
        "cells": [program.cells[i] for i in cells.tolist()],
        "offsets": _packed(np.searchsorted(shown.lane, np.arange(len(shown.lanes) + 1))),
        # from the end of the op before in the lane, or from 0
        "gap": _packed(start - np.where(opens, 0, np.roll(end, 1))),
        "duration": _packed(end - start),
        "label": _packed(label),
        "cell": _packed(cell.reshape(-1)),
        "site": _packed(program.site[shown.op]),
        "reason": _packed(timeline.reason[shown.op]),
        # by how many positions the op that it waited for is before it; 0: none
        "behind": _packed(_behind(step, shown)),
        "path": _path(step, shown),
        "memory": _memory(step),
    }


def _shown(step: Step) -> _Shown:
    program, timeline = step.program, step.timeline
    takes_time = np.flatnonzero(timeline.end_ns > timeline.start_ns)
    numbers: list[int] = np.unique(program.stream[takes_time]).tolist()
    used = sorted(numbers, key=lambda number: _lane_order(program.streams[number], number))
    lane_of = np.full(len(program.streams), -1, np.int64)
    lane_of[used] = np.arange(len(used))
    lane = lane_of[program.stream[takes_time]]
    order = np.lexsort((timeline.start_ns[takes_time], lane))
    op = takes_time[order]
    position = np.full(program.num_ops, -1, np.int64)
    position[op] = np.arange(len(op))
    return _Shown(op, lane[order], position, tuple(program.streams[i] for i in used))


def _purpose(stream: Stream) -> str:
    return next((name for name in _LANE_HEIGHTS if stream.name.startswith(name)), "other")


def _lane_order(stream: Stream, number: int) -> tuple[int, int, int]:
    """By rank, then what a stream is for, then as the Program has them."""
    purposes = [*_LANE_HEIGHTS, "other"]
    return stream.rank, purposes.index(_purpose(stream)), number


def _lanes(streams: Sequence[Stream]) -> list[dict[str, object]]:
    """Lanes from the top down: where each begins and ends on the axis, and what it is for."""
    lanes: list[dict[str, object]] = []
    top, rank = 0, None
    for stream in streams:
        purpose = _purpose(stream)
        if rank not in (None, stream.rank):
            top += _RANK_GAP
        bottom = top + _LANE_HEIGHTS.get(purpose, 1)
        name = f"rank {stream.rank} {stream.name}"
        lanes.append(
            {"rank": stream.rank, "name": name, "purpose": purpose, "top": top, "bottom": bottom}
        )
        top, rank = bottom, stream.rank
    return lanes


def _labels(
    program: Program, costs: Sequence[Cost], op: Ints
) -> tuple[list[dict[str, object]], Ints]:
    """The table of what ops are, and each op's row in it."""
    columns = [
        column[op] for column in (program.kind, program.pass_, program.category, program.cost)
    ]
    sizes = [int(column.max(initial=0)) + 1 for column in columns]
    # as one number each: sorting rows would take most of the time
    rows, label = np.unique(np.ravel_multi_index(columns, sizes), return_inverse=True)
    labels: list[dict[str, object]] = []
    table: list[list[int]] = np.stack(np.unravel_index(rows, sizes), axis=1).tolist()
    for kind, pass_, category, cost in table:
        letter = chr(pass_)
        labels.append(
            {
                "name": f"{program.kinds[kind]} {letter}",
                "paint": _paint(program.categories[category], letter),
                # of a trace nothing is known but what was measured
                "source": costs[cost].source if costs else "not priced",
                "alone_ns": costs[cost].duration_ns if costs else None,
                "cost": program.cost_keys[cost],
            }
        )
    return labels, label.reshape(-1)


def _paint(category: str, pass_: str) -> int:
    if category == "compute":
        category = {"B": "I", "R": "recompute", "O": "optimizer"}.get(pass_, pass_)
    return _PAINT_NAMES.index(category)


def _behind(step: Step, shown: _Shown) -> Ints:
    """From each op to the op that it waited for, seen through ops that take no time; 0: none."""
    cause = step.timeline.cause
    found = cause[shown.op]
    while (hidden := (found >= 0) & (shown.position[found] < 0)).any():
        found = np.where(hidden, cause[found], found)
    own = np.arange(len(found))
    return np.where(found >= 0, own - shown.position[found], 0)


def _path(step: Step, shown: _Shown) -> dict[str, object]:
    """The critical path: lane, start and end of its pieces; host threads are left out."""
    pieces = critical_path(step.timeline)
    op = np.array([piece.op for piece in pieces], np.int64)
    start = np.array([piece.start_ns for piece in pieces], np.int64)
    end = np.array([piece.end_ns for piece in pieces], np.int64)
    is_drawn = (op >= 0) & (shown.position[op] >= 0)
    return {
        "lane": _packed(shown.lane[shown.position[op[is_drawn]]]),
        "start": _packed(np.diff(start[is_drawn], prepend=0)),
        "end": _packed(np.diff(end[is_drawn], prepend=0)),
    }


def _memory(step: Step) -> dict[str, object]:
    """Allocated bytes of every rank over time: a step curve, the most of each instant."""
    program = step.program
    times = memory_times_ns(program, step.timeline)
    held = step.memory.held_bytes.sum(axis=1)
    first = np.ones(program.num_ops, np.bool_)
    first[1:] = (times[1:] != times[:-1]) | (program.rank[1:] != program.rank[:-1])
    at = np.flatnonzero(first)
    most = np.maximum.reduceat(held, at) if len(at) else held
    return {
        "offsets": _packed(np.searchsorted(program.rank[at], np.arange(program.num_ranks + 1))),
        "time": _packed(np.diff(times[at], prepend=0)),
        "bytes": _packed(np.diff(most, prepend=0)),
    }


def _packed(values: NDArray[Any]) -> dict[str, str]:
    """Whole numbers, compressed, in the smallest type that holds them."""
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    dtype = np.dtype(_smallest(least, most))
    data = zlib.compress(values.astype(dtype.newbyteorder("<")).tobytes(), _COMPRESSION)
    return {"dtype": dtype.name, "data": base64.b64encode(data).decode("ascii")}


def _smallest(least: int, most: int) -> type[np.generic]:
    """The smallest of the integer types that browsers have, else float64 (exact to 2^53)."""
    for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32):
        if np.iinfo(dtype).min <= least and most <= np.iinfo(dtype).max:
            return dtype
    return np.float64
