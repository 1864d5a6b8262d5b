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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.intervals import Union, fresh_lengths
from mhcplan.sim.jit import Ints, compiled, ints, usable_in_compiled
from mhcplan.sim.order import NO_OP, order_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.program import Program
    from mhcplan.sim.timeline import Timeline

    Array = NDArray[np.int64]

CATEGORIES = ("compute", "mhc", "recompute", "optimizer")
TRAFFIC = ("ep", "pp", "dp")
CLASSES = (*CATEGORIES, *(f"exposed_{traffic}" for traffic in TRAFFIC), "host", "bubble")
_NUM_CLASSES = len(CLASSES)
_OTHER_TRAFFIC = len(TRAFFIC)
_PP = TRAFFIC.index("pp")


@dataclass(frozen=True)
class Breakdown:
    """Nanoseconds by rank and class; each row sums to the step.

    Attributes:
        ns: [rank, class], classes as in :data:`CLASSES`.
        rank: the rank to report: the one that computes longest, the lowest on a tie.
    """

    ns: Array
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

    compute_ns: Array
    traffic_ns: Array
    hidden_ns: Array


def breakdown(program: Program, timeline: Timeline) -> Breakdown:
    """Say what each rank's time was spent on.

    Raises:
        ValueError: a compute op that takes time has a category not in CATEGORIES.
    """
    ns, gaps = _swept(program, timeline)
    rank = int(np.argmax(ns.sum(axis=1)))
    claims = _claims(program, timeline, gaps)
    first_exposed = len(CATEGORIES)
    for class_ in range(first_exposed, len(CLASSES) - 1):
        # what this class and those before it explain, less what is taken already
        explained = claims.explained_ns(class_, program.num_ranks)
        ns[:, class_] = explained - ns[:, first_exposed:class_].sum(axis=1)
    ns[:, -1] = timeline.step_ns - ns.sum(axis=1)
    return Breakdown(ns, rank)


def overlap(program: Program, timeline: Timeline) -> Overlap:
    """Measure how much traffic hides behind compute."""
    span = timeline.step_ns + 1  # ranks lie one behind the other, so far apart
    begin, end = (ns + program.rank * np.int64(span) for ns in (timeline.start_ns, timeline.end_ns))
    computes, carries = program.group < 0, _traffic_of_groups(program)[program.group]
    compute = Union.of(begin[computes], end[computes])
    shape = (program.num_ranks, len(TRAFFIC) + 1)
    traffic_ns, hidden_ns = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for traffic in range(shape[1]):
        ops = ~computes & (carries == traffic)
        runs = Union.of(begin[ops], end[ops])
        rank = runs.begin // span
        np.add.at(traffic_ns[:, traffic], rank, runs.end - runs.begin)
        np.add.at(hidden_ns[:, traffic], rank, compute.common(runs.begin, runs.end))
    compute_ns = np.zeros(program.num_ranks, np.int64)
    np.add.at(compute_ns, compute.begin // span, compute.end - compute.begin)
    return Overlap(compute_ns, traffic_ns, hidden_ns)


def busy_ns(program: Program, timeline: Timeline) -> Array:
    """Per stream, the time in which one of its ops runs."""
    span = timeline.step_ns + 1
    shift = program.stream.astype(np.int64) * span
    runs = Union.of(timeline.start_ns + shift, timeline.end_ns + shift)
    busy = np.zeros(len(program.streams), np.int64)
    np.add.at(busy, runs.begin // span, runs.end - runs.begin)
    return busy


def _traffic_of_groups(program: Program) -> Array:
    """Traffic of every group; the last entry is for compute ops, whose group is -1."""
    traffic = [
        TRAFFIC.index(group.name[:2]) if group.name[:2] in TRAFFIC else _OTHER_TRAFFIC
        for group in program.groups
    ]
    return np.array([*traffic, _OTHER_TRAFFIC], np.int64)


class _Gaps(NamedTuple):
    """Times without compute, each with the compute op that ends it, or NO_OP: the step's end."""

    rank: Array
    op: Array
    begin: Array
    end: Array


def _swept(program: Program, timeline: Timeline) -> tuple[Array, _Gaps]:
    """Nanoseconds by rank and class in which compute runs, and the times in which none does."""
    _refuse_unknown_categories(program, timeline)
    lanes = program.shared(_lanes_of)
    spent = np.zeros((program.num_ranks, len(CLASSES)), np.int64)
    gaps = _Gaps(
        *iter(np.empty((len(_Gaps._fields), program.num_ops + program.num_ranks), np.int64))
    )
    cursor = ints(np.asarray(lanes.begin)[:-1].copy())
    start_ns, end_ns = ints(timeline.start_ns), ints(timeline.end_ns)
    count = _sweep(lanes, cursor, start_ns, end_ns, timeline.step_ns, spent.reshape(-1), gaps)
    return spent, _Gaps(*(column[:count] for column in gaps))


def _refuse_unknown_categories(program: Program, timeline: Timeline) -> None:
    unknown = program.shared(_without_class)
    ran = unknown[timeline.end_ns[unknown] > timeline.start_ns[unknown]]
    if len(ran):
        category = program.categories[program.category[ran[0]]]
        raise ValueError(f"category {category!r} of a compute op is not one of {CATEGORIES}")


def _without_class(program: Program) -> Array:
    """Compute ops whose category has no class."""
    is_known = np.isin(program.categories, CATEGORIES)[program.category]
    return np.flatnonzero((program.group < 0) & ~is_known)


class _Lanes(NamedTuple):
    """Compute ops of a Program. Lanes of rank r are ``rank_begin[r] : rank_begin[r + 1]``, one a
    stream, least urgent first; ops of a lane are in order, and ``class_`` is what each one's time
    is called."""

    rank_begin: Ints
    begin: Ints
    ops: Ints
    class_: Ints


def _lanes_of(program: Program) -> _Lanes:
    streams = sorted(
        range(len(program.streams)),
        key=lambda i: (program.streams[i].rank, -program.streams[i].priority),
    )
    lanes = [(i, ops[program.group[ops] < 0]) for i in streams for ops in [program.by_stream[i]]]
    lanes = [(program.streams[i].rank, ops) for i, ops in lanes if len(ops)]
    ops = np.concatenate([*(ops for _, ops in lanes), np.zeros(0, np.int64)])
    classes = [CATEGORIES.index(c) if c in CATEGORIES else 0 for c in program.categories]
    return _Lanes(
        ints(np.searchsorted([rank for rank, _ in lanes], np.arange(program.num_ranks + 1))),
        ints(np.cumsum([0, *(len(ops) for _, ops in lanes)])),
        ints(ops),
        ints(np.array(classes, np.int64)[program.category[ops]]),
    )


@compiled
def _sweep(
    lanes: _Lanes, cursor: Ints, start_ns: Ints, end_ns: Ints, step_ns: int, spent: Ints,
    gaps: _Gaps,
) -> int:  # fmt: skip
    """Go through every rank's time from one border of an op to the next.

    Adds to ``spent``, [rank, class] in a row, and fills ``gaps``, of which it returns the number.
    """
    count = 0
    for rank in range(len(lanes.rank_begin) - 1):
        first, last = lanes.rank_begin[rank], lanes.rank_begin[rank + 1]
        now = 0
        while now < step_ns:
            runs, until, next_op = -1, step_ns, NO_OP
            for lane in range(first, last):
                i = cursor[lane]
                while i < lanes.begin[lane + 1] and _is_over(end_ns, start_ns, lanes.ops[i], now):
                    i += 1
                cursor[lane] = i
                if i == lanes.begin[lane + 1]:
                    continue
                op = lanes.ops[i]
                if start_ns[op] > now:
                    is_first = next_op == NO_OP or op < next_op
                    if start_ns[op] < until or (start_ns[op] == until and is_first):
                        next_op = op
                    until = min(until, start_ns[op])
                else:
                    if runs < 0:
                        runs = lanes.class_[i]
                    until = min(until, end_ns[op])
            if runs >= 0:
                spent[rank * _NUM_CLASSES + runs] += until - now
            else:
                gaps.rank[count], gaps.op[count] = rank, next_op
                gaps.begin[count], gaps.end[count] = now, until
                count += 1
            now = until
    return count


@usable_in_compiled
def _is_over(end_ns: Ints, start_ns: Ints, op: int, now: int) -> bool:
    return end_ns[op] <= now and start_ns[op] <= now


class _Claims(NamedTuple):
    """Parts of gaps that a class explains; parts may overlap."""

    rank: Array
    class_: Array
    begin: Array
    end: Array

    def explained_ns(self, up_to_class: int, num_ranks: int) -> Array:
        """Per rank, the time that the classes up to the given one explain."""
        mine = np.flatnonzero((self.class_ <= up_to_class) & (self.end > self.begin))
        mine = mine[np.argsort(self.begin[mine], kind="stable")]
        explained = np.zeros(num_ranks, np.int64)
        if len(mine):
            lengths = fresh_lengths(self.begin[mine], self.end[mine])
            np.add.at(explained, self.rank[mine], lengths)
        return explained


def _claims(program: Program, timeline: Timeline, gaps: _Gaps) -> _Claims:
    """Ranks lie one behind the other, so that what is explained is told apart by time."""
    gap, awaited = _awaited_transfers(program, gaps)
    traffic = _traffic_of_groups(program)[program.group[awaited]]
    known = traffic != _OTHER_TRAFFIC
    gap, awaited, traffic = gap[known], awaited[known], traffic[known]
    begin = gaps.begin[gap]
    pp = traffic == _PP
    if pp.any():
        begin[pp] = np.maximum(begin[pp], _data_ready_ns(program, timeline)[awaited[pp]])
    next_is_op = np.flatnonzero(gaps.op != NO_OP)
    host_end = np.minimum(timeline.issue_ns[gaps.op[next_is_op]], gaps.end[next_is_op])
    host = np.full(len(next_is_op), CLASSES.index("host"))
    # in a measured step an op may begin before the recorded end of what it waits for
    exposed_end = np.minimum(timeline.end_ns[awaited], gaps.end[gap])
    rank = np.concatenate([gaps.rank[gap], gaps.rank[next_is_op]])
    shift = rank * (timeline.step_ns + 1)
    return _Claims(
        rank,
        np.concatenate([traffic + len(CATEGORIES), host]),
        np.concatenate([begin, gaps.begin[next_is_op]]) + shift,
        np.concatenate([exposed_end, host_end]) + shift,
    )


def _awaited_transfers(program: Program, gaps: _Gaps) -> tuple[Array, Array]:
    """Pairs of a gap and a transfer op that the gap's op, or the end of the step, waits for."""
    pairs: list[tuple[Array, Array]] = []
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


def _data_ready_ns(program: Program, timeline: Timeline) -> Array:
    """For every transfer op, when the ops that its senders wait for had ended."""
    order, sent = order_of(program), program.shared(_sent_of)
    ready = np.zeros(program.num_ops, np.int64)
    np.maximum.at(ready, sent.kernel, timeline.end_ns[sent.waited])
    by_meeting = np.zeros(int(order.meeting.max(initial=-1)) + 1, np.int64)
    np.maximum.at(by_meeting, order.meeting[sent.senders], ready[order.first[sent.senders]])
    return np.where(order.meeting >= 0, by_meeting[order.meeting], 0)


class _Sent(NamedTuple):
    """Ops that send, and pairs of the first op of their kernel and an op that it waits for."""

    senders: Array
    kernel: Array
    waited: Array


def _sent_of(program: Program) -> _Sent:
    order = order_of(program)
    senders = np.flatnonzero((order.meeting >= 0) & (program.is_send | (program.peer < 0)))
    sends = np.zeros(program.num_ops, np.bool_)
    sends[order.first[senders]] = True
    kernel = order.first[program.waits.owners]
    pairs = np.flatnonzero(sends[kernel])
    return _Sent(senders, kernel[pairs], order.waited.values[pairs])
