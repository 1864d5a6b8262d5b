"""What the time of a step was spent on.

:func:`breakdown` gives every nanosecond of a rank to the first class that holds:

1. a compute op runs: its category (``compute``, ``mhc``, ``recompute``, ``optimizer``; that of the
   least urgent stream when several run);
2. the next compute op waits for expert traffic (``exposed_ep``), for a pipeline message whose
   sender has its data ready (``exposed_pp``), for gradient reduction (``exposed_dp``);
3. the host has not issued the next compute op (``host``);
4. ``bubble``.

The first two letters of a group's name say which traffic it carries. Compute ops are those that are
no transfers. The "next" one is that of the rank which begins next; after the last one it is the end
of the step, which waits for all transfers of the rank.

To treat all ranks at once, times are shifted so that the ranks lie one behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.intervals import Union, fresh_lengths
from mhcplan.sim.order import NO_OP, order_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.program import Program
    from mhcplan.sim.timeline import Timeline

    Ints = NDArray[np.int64]

CATEGORIES = ("compute", "mhc", "recompute", "optimizer")
TRAFFIC = ("ep", "pp", "dp")
CLASSES = (*CATEGORIES, *(f"exposed_{traffic}" for traffic in TRAFFIC), "host", "bubble")
_OTHER_TRAFFIC = len(TRAFFIC)
_PP = TRAFFIC.index("pp")


@dataclass(frozen=True)
class Breakdown:
    """Nanoseconds by rank and class; each row sums to the step.

    Attributes:
        ns: [rank, class], classes as in :data:`CLASSES`.
        rank: the rank to report: the one that computes longest, the lowest on a tie.
    """

    ns: Ints
    rank: int

    @property
    def reported(self) -> dict[str, int]:
        """The reported rank's nanoseconds by class."""
        return dict(zip(CLASSES, self.ns[self.rank].tolist(), strict=True))

    @property
    def bubble_percent(self) -> float:
        """Share of the step that is bubble on the reported rank."""
        row = self.ns[self.rank]
        return 100.0 * int(row[-1]) / max(int(row.sum()), 1)


@dataclass(frozen=True)
class Overlap:
    """How much of each rank's traffic hides behind its compute.

    Attributes:
        compute_ns: [rank], time in which a compute op runs.
        traffic_ns: [rank, traffic], time in which a transfer of ep, pp, dp or other groups runs.
        hidden_ns: [rank, traffic], the part of it in which compute runs too.
    """

    compute_ns: Ints
    traffic_ns: Ints
    hidden_ns: Ints


def breakdown(program: Program, timeline: Timeline) -> Breakdown:
    """Say what each rank's time was spent on.

    Raises:
        ValueError: a compute op that takes time has a category not in CATEGORIES.
    """
    axis = _Axis(program, timeline)
    ns = np.zeros((program.num_ranks, len(CLASSES)), np.int64)
    _add_busy(axis, ns)
    rank = int(np.argmax(ns.sum(axis=1)))
    gaps = _gaps(axis)
    claims = _claims(axis, gaps)
    first_exposed = len(CATEGORIES)
    for class_ in range(first_exposed, len(CLASSES) - 1):
        # what this class and those before it explain, less what is taken already
        explained = claims.explained_ns(class_, program.num_ranks)
        ns[:, class_] = explained - ns[:, first_exposed:class_].sum(axis=1)
    ns[:, -1] = timeline.step_ns - ns.sum(axis=1)
    return Breakdown(ns, rank)


def overlap(program: Program, timeline: Timeline) -> Overlap:
    """Measure how much traffic hides behind compute."""
    axis = _Axis(program, timeline)
    compute = Union.of(axis.begin[axis.is_compute], axis.end[axis.is_compute])
    shape = (program.num_ranks, len(TRAFFIC) + 1)
    traffic_ns, hidden_ns = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for traffic in range(shape[1]):
        ops = (program.group >= 0) & (axis.traffic == traffic)
        runs = Union.of(axis.begin[ops], axis.end[ops])
        rank = runs.begin // axis.span
        np.add.at(traffic_ns[:, traffic], rank, runs.end - runs.begin)
        np.add.at(hidden_ns[:, traffic], rank, compute.common(runs.begin, runs.end))
    compute_ns = np.zeros(program.num_ranks, np.int64)
    np.add.at(compute_ns, compute.begin // axis.span, compute.end - compute.begin)
    return Overlap(compute_ns, traffic_ns, hidden_ns)


def busy_ns(program: Program, timeline: Timeline) -> Ints:
    """Per stream, the time in which one of its ops runs."""
    span = timeline.step_ns + 1
    shift = program.stream.astype(np.int64) * span
    runs = Union.of(timeline.start_ns + shift, timeline.end_ns + shift)
    busy = np.zeros(len(program.streams), np.int64)
    np.add.at(busy, runs.begin // span, runs.end - runs.begin)
    return busy


class _Axis:
    """A timeline with its ranks laid one behind the other, ``span`` ns apart."""

    def __init__(self, program: Program, timeline: Timeline) -> None:
        self.program = program
        self.step_ns = timeline.step_ns
        self.span = timeline.step_ns + 1
        self.shift = program.rank.astype(np.int64) * self.span
        self.begin = timeline.start_ns + self.shift
        self.end = timeline.end_ns + self.shift
        self.issue = timeline.issue_ns + self.shift
        self.end_ns = timeline.end_ns
        self.is_compute = program.group < 0
        traffic = [
            TRAFFIC.index(group.name[:2]) if group.name[:2] in TRAFFIC else _OTHER_TRAFFIC
            for group in program.groups
        ]
        # the last entry is for compute ops: their group is -1
        self.traffic = np.array([*traffic, _OTHER_TRAFFIC], np.int64)[program.group]


def _add_busy(axis: _Axis, ns: Ints) -> None:
    program = axis.program
    classes = [CATEGORIES.index(c) if c in CATEGORIES else -1 for c in program.categories]
    class_ = np.array(classes, np.int64)[program.category]
    ran = axis.is_compute & (axis.end > axis.begin)
    unknown = np.flatnonzero(ran & (class_ < 0))
    if len(unknown):
        category = program.categories[program.category[unknown[0]]]
        raise ValueError(f"category {category!r} of a compute op is not one of {CATEGORIES}")
    urgency = _urgency(program)[program.stream]
    spent = axis.end - axis.begin
    seen: list[NDArray[np.intp]] = []  # ops of less urgent streams
    for level in range(int(urgency[ran].max(initial=-1)) + 1):
        ops = np.flatnonzero(ran & (urgency == level))
        if seen:
            before = np.concatenate(seen)
            less_urgent = Union.of(axis.begin[before], axis.end[before])
            spent[ops] -= less_urgent.common(axis.begin[ops], axis.end[ops])
        seen.append(ops)
    place = program.rank * len(CLASSES) + class_
    ns += _sums(place[ran], spent[ran], ns.size).reshape(ns.shape)


def _sums(place: NDArray[np.integer], ns: Ints, size: int) -> Ints:
    """Sum by place; floats are exact here, below 100 days."""
    return np.bincount(place, ns, size).astype(np.int64)


def _urgency(program: Program) -> Ints:
    """Per stream, its place among its rank's streams, least urgent first."""
    place = np.zeros(len(program.streams), np.int64)
    count = [0] * program.num_ranks
    for i in sorted(range(len(program.streams)), key=lambda i: -program.streams[i].priority):
        stream = program.streams[i]
        if stream.group < 0:  # the stream of a process group runs no compute
            place[i] = count[stream.rank]
            count[stream.rank] += 1
    return place


class _Gaps(NamedTuple):
    """Times without compute, each with the compute op that ends it, or NO_OP: the step's end."""

    rank: Ints
    op: Ints
    begin: Ints
    end: Ints


def _gaps(axis: _Axis) -> _Gaps:
    ranks = np.arange(axis.program.num_ranks, dtype=np.int64)
    ops = np.flatnonzero(axis.is_compute)
    # a mark at the beginning and at the end of each rank's part of the axis
    opens, closes = ranks * axis.span, ranks * axis.span + axis.step_ns
    op = np.concatenate([np.full(len(ranks), NO_OP), ops, np.full(len(ranks), NO_OP)])
    begin = np.concatenate([opens, axis.begin[ops], closes])
    in_order = np.argsort(begin, kind="stable")
    op, begin = op[in_order], begin[in_order]
    end = np.concatenate([opens, axis.end[ops], closes])[in_order]
    rank = begin // axis.span
    reached = np.maximum.accumulate(end)[:-1]
    gap = np.flatnonzero((begin[1:] > reached) & (rank[1:] == rank[:-1]))
    return _Gaps(rank[gap + 1], op[gap + 1], reached[gap], begin[gap + 1])


class _Claims(NamedTuple):
    """Parts of gaps that a class explains; parts may overlap."""

    rank: Ints
    class_: Ints
    begin: Ints
    end: Ints

    def explained_ns(self, up_to_class: int, num_ranks: int) -> Ints:
        """Per rank, the time that the classes up to the given one explain."""
        mine = np.flatnonzero((self.class_ <= up_to_class) & (self.end > self.begin))
        mine = mine[np.argsort(self.begin[mine], kind="stable")]
        explained = np.zeros(num_ranks, np.int64)
        if len(mine):
            lengths = fresh_lengths(self.begin[mine], self.end[mine])
            np.add.at(explained, self.rank[mine], lengths)
        return explained


def _claims(axis: _Axis, gaps: _Gaps) -> _Claims:
    gap, awaited = _awaited_transfers(axis, gaps)
    traffic = axis.traffic[awaited]
    known = traffic != _OTHER_TRAFFIC
    gap, awaited, traffic = gap[known], awaited[known], traffic[known]
    begin = gaps.begin[gap]
    pp = traffic == _PP
    if pp.any():
        sender_ready = _data_ready_ns(axis)[awaited[pp]] + gaps.rank[gap[pp]] * axis.span
        begin[pp] = np.maximum(begin[pp], sender_ready)
    next_is_op = np.flatnonzero(gaps.op != NO_OP)
    host_end = np.minimum(axis.issue[gaps.op[next_is_op]], gaps.end[next_is_op])
    host = np.full(len(next_is_op), CLASSES.index("host"))
    # in a measured step an op may begin before the recorded end of what it waits for
    exposed_end = np.minimum(axis.end[awaited], gaps.end[gap])
    return _Claims(
        np.concatenate([gaps.rank[gap], gaps.rank[next_is_op]]),
        np.concatenate([traffic + len(CATEGORIES), host]),
        np.concatenate([begin, gaps.begin[next_is_op]]),
        np.concatenate([exposed_end, host_end]),
    )


def _awaited_transfers(axis: _Axis, gaps: _Gaps) -> tuple[Ints, Ints]:
    """Pairs of a gap and a transfer op that the gap's op, or the end of the step, waits for."""
    program = axis.program
    pairs: list[tuple[Ints, Ints]] = []
    starts = program.waits.offsets[gaps.op]
    counts = np.where(gaps.op == NO_OP, 0, program.waits.offsets[gaps.op + 1] - starts)
    gap = np.repeat(np.arange(len(gaps.op)), counts)
    nth = np.arange(len(gap)) - np.repeat(np.cumsum(counts) - counts, counts)
    events = program.waits.values[starts[gap] + nth]
    pairs.append((gap, program.recorder[events] if program.num_events else events))
    for tail in np.flatnonzero(gaps.op == NO_OP).tolist():
        begin, end = program.rank_offsets[gaps.rank[tail] : gaps.rank[tail] + 2]
        ops = np.flatnonzero(program.group[begin:end] >= 0) + begin
        pairs.append((np.full(len(ops), tail), ops))
    gap, op = (np.concatenate(part) for part in zip(*pairs, strict=True))
    is_transfer = program.group[op] >= 0
    return gap[is_transfer], op[is_transfer]


def _data_ready_ns(axis: _Axis) -> Ints:
    """For every transfer op, when the ops that its senders wait for had ended."""
    program = axis.program
    order = order_of(program)
    first, meeting = order.first, order.meeting
    ready = np.zeros(program.num_ops, np.int64)
    np.maximum.at(ready, first[program.waits.owners], axis.end_ns[order.waited.values])
    senders = np.flatnonzero((meeting >= 0) & (program.is_send | (program.peer < 0)))
    by_meeting = np.zeros(int(meeting.max(initial=-1)) + 1, np.int64)
    np.maximum.at(by_meeting, meeting[senders], ready[first[senders]])
    return np.where(meeting >= 0, by_meeting[meeting], 0)
