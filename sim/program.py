"""The stream program: one training step as the exact ops that every GPU stream runs.

A :class:`Program` is the only description of a schedule. The simulator plays it in virtual time,
the runtime executes it on CUDA streams, the timeline draws it, the exporters write it and the
checker proves it sound. It holds no durations: those are a table beside it (:class:`CostTable`), so
that one Program runs under any profile.

The Program is columnar: a numpy array per field, ops sorted by rank and, within a rank, in **host
issue order**, the order in which that rank's Python thread issues them. Lists per op (waits,
buffers) are CSR. :class:`Op` is a read-only view for people and exporters.

Rules that hold in every sound Program (:mod:`mhcplan.sim.check` proves them):

* A stream runs its ops in issue order. Across streams the only order is an event: an op records at
  most one, and others wait for it. The event of a transfer is its work handle.
* A communication stream is the internal stream of one process group.
* A transfer starts when every member that this Program holds has reached it; the k-th send of a
  (group, source, destination) meets the k-th receive, the k-th collective of a group its k-th on
  every other member.
* Buffers are allocated and freed in host issue order, as torch's caching allocator does. All memory
  belongs to the rank's compute stream: an op on that stream frees it, ordered after every use; an
  op on another stream that allocates is ordered after the last compute op issued before it that
  freed something, so that no memory is written while an earlier owner still reads it.

Kinds, categories and cost keys are opaque labels here: :mod:`mhcplan.sim` knows streams, not
models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from mhcplan.sim.jit import compiled, ints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from mhcplan.sim.device_kernels import Loads

    Ints = NDArray[np.int64]

T = TypeVar("T")

# What a buffer is for; memory reports have one figure for each. Order is the report's.
COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "recompute",
    "communication",
    "logits",
    "workspace",
)

# Stream priorities are torch's: lower is more urgent.
NORMAL_PRIORITY, HIGH_PRIORITY = 0, -1


class Stream(NamedTuple):
    """A CUDA stream of one rank. ``group`` >= 0: the internal stream of that process group."""

    rank: int
    name: str
    priority: int
    group: int = -1


class Group(NamedTuple):
    """A process group. ``members`` are the ranks of this Program in it; ``size`` counts all.

    Balanced peers outside the Program (other replicas, expert-parallel ranks in lockstep) count in
    ``size`` only. ``medium`` names the link its traffic takes.
    """

    name: str
    members: tuple[int, ...]
    size: int
    medium: str


@dataclass(frozen=True)
class Csr:
    """Lists of integers, one an op: list i is ``values[offsets[i] : offsets[i + 1]]``."""

    offsets: Ints
    values: Ints

    def __getitem__(self, i: int) -> Ints:
        """The list of op ``i``."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @cached_property
    def owners(self) -> Ints:
        """For every value, the op whose list it is in."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @staticmethod
    def from_lists(lists: Sequence[Sequence[int]]) -> Csr:
        """Pack one list of integers an op."""
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(entry) for entry in lists], out=offsets[1:])
        values = np.fromiter((v for entry in lists for v in entry), np.int64, int(offsets[-1]))
        return Csr(offsets, values)

    @staticmethod
    def grouped(keys: NDArray[np.integer], count: int) -> Csr:
        """Where ``keys`` is 0, 1, .. ``count`` - 1: places in ascending order, a list a key.

        Places with a negative key are in no list.
        """
        offsets, values = np.zeros(count + 2, np.int64), np.empty(len(keys), np.int64)
        _group(ints(keys), offsets, values)
        return Csr(offsets[:-1], values[: offsets[-2]])


@compiled
def _group(keys: Ints, offsets: Ints, values: Ints) -> None:
    """Counting sort; ``offsets`` has one entry more than it needs."""
    for key in keys:
        if key >= 0:
            offsets[key + 2] += 1
    for key in range(2, len(offsets)):
        offsets[key] += offsets[key - 1]
    for place in range(len(keys)):
        key = keys[place]
        if key >= 0:  # up to here, offsets[key + 1] is where the next one goes
            values[offsets[key + 1]] = place
            offsets[key + 1] += 1


@dataclass(frozen=True, slots=True)
class Op:
    """One op, as a person or an exporter reads it. Fields are those of :class:`Program`."""

    index: int
    rank: int
    stream: Stream
    kind: str
    category: str
    pass_: str
    cell: str
    stage: int
    site: int
    microbatch: int
    cost_key: str
    waits: tuple[int, ...]
    record: int
    host_sync: bool
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    allocs: tuple[int, ...]
    frees: tuple[int, ...]
    group: int
    peer: int
    payload_bytes: int
    batch: int


@dataclass(frozen=True)
class Program:
    """A whole step of one replica; see the module's docstring for the rules.

    Attributes:
        num_ranks, streams, groups: tables that the columns index.
        kinds, categories, cells, cost_keys: labels that ``kind``, ``category``, ``cell`` and
            ``cost`` index. A cell is the action an op belongs to, in torch's letters ("3B7").
        buffer_bytes, buffer_component: per buffer; components index :data:`COMPONENTS`.
        static_bytes: [rank, component], memory held through the whole step.
        num_events: events are 0 .. num_events - 1; each is recorded by at most one op.
        rank, stream, kind, category, cell, cost: int columns, one entry an op.
        pass_: ASCII code of the pass letter.
        stage, site, microbatch: -1 where the op has none.
        record: event recorded when the op ends, or -1.
        host_sync: the host thread waits for the op to end before it issues the next.
        waits: events that the op's stream waits for before the op.
        reads, writes, allocs, frees: buffers.
        group: process group of a transfer, or -1; peer: the other rank of a send or receive, or -1;
        is_send: True for a send, False otherwise; payload_bytes: bytes of a transfer's buffer;
        batch: sends and receives of one batched call share a number >= 0 (one kernel), else -1.
        meta: what the lowering wants to keep with it (JSON values only).
    """

    num_ranks: int
    streams: tuple[Stream, ...]
    groups: tuple[Group, ...]
    kinds: tuple[str, ...]
    categories: tuple[str, ...]
    cells: tuple[str, ...]
    cost_keys: tuple[str, ...]
    buffer_bytes: Ints
    buffer_component: NDArray[np.int8]
    static_bytes: Ints
    num_events: int
    rank: NDArray[np.int32]
    stream: NDArray[np.int32]
    kind: NDArray[np.int32]
    category: NDArray[np.int32]
    pass_: NDArray[np.uint8]
    cell: NDArray[np.int32]
    cost: NDArray[np.int32]
    stage: NDArray[np.int32]
    site: NDArray[np.int32]
    microbatch: NDArray[np.int32]
    record: Ints
    host_sync: NDArray[np.bool_]
    group: NDArray[np.int32]
    peer: NDArray[np.int32]
    is_send: NDArray[np.bool_]
    payload_bytes: Ints
    batch: NDArray[np.int32]
    waits: Csr
    reads: Csr
    writes: Csr
    allocs: Csr
    frees: Csr
    meta: dict[str, object] = field(default_factory=dict[str, object])

    @cached_property
    def _shared(self) -> dict[object, Any]:
        return {}

    def shared(self, make: Callable[[Program], T]) -> T:
        """``make(self)``, worked out once for all Programs that :meth:`renumbered` made of one.

        It must not depend on what that changes, and nobody may change it.
        """
        if make not in self._shared:
            self._shared[make] = make(self)
        return self._shared[make]

    def renumbered(self, **numbers: Any) -> Program:  # noqa: ANN401 - fields of any type
        """The same ops with other costs, sizes or labels: whatever decides no order.

        ``numbers`` are fields among cost, cost_keys, cells, payload_bytes, buffer_bytes,
        static_bytes, streams' and groups' names and sizes, and meta.
        """
        other = replace(self, **numbers)
        other.__dict__["_shared"] = self._shared
        return other

    @property
    def num_ops(self) -> int:
        """Ops on all ranks."""
        return len(self.rank)

    @property
    def num_buffers(self) -> int:
        """Buffers on all ranks."""
        return len(self.buffer_bytes)

    @property
    def rank_offsets(self) -> Ints:
        """Ops of rank r are ``rank_offsets[r] : rank_offsets[r + 1]``, in host issue order."""
        return self.shared(_rank_offsets)

    @property
    def recorder(self) -> Ints:
        """For every event, the op that records it, or -1."""
        return self.shared(_recorder)

    @property
    def by_stream(self) -> Csr:
        """Ops of each stream, in issue order."""
        return self.shared(_by_stream)

    @property
    def previous_on_stream(self) -> Ints:
        """For every op, the op before it on the same stream, or -1."""
        return self.shared(_previous_on_stream)

    def __getitem__(self, i: int) -> Op:
        """Op ``i`` as a readable view."""
        return Op(
            index=i,
            rank=int(self.rank[i]),
            stream=self.streams[int(self.stream[i])],
            kind=self.kinds[int(self.kind[i])],
            category=self.categories[int(self.category[i])],
            pass_=chr(self.pass_[i]),
            cell=self.cells[int(self.cell[i])],
            stage=int(self.stage[i]),
            site=int(self.site[i]),
            microbatch=int(self.microbatch[i]),
            cost_key=self.cost_keys[int(self.cost[i])],
            waits=tuple(self.waits[i].tolist()),
            record=int(self.record[i]),
            host_sync=bool(self.host_sync[i]),
            reads=tuple(self.reads[i].tolist()),
            writes=tuple(self.writes[i].tolist()),
            allocs=tuple(self.allocs[i].tolist()),
            frees=tuple(self.frees[i].tolist()),
            group=int(self.group[i]),
            peer=int(self.peer[i]),
            payload_bytes=int(self.payload_bytes[i]),
            batch=int(self.batch[i]),
        )

    def __iter__(self) -> Iterator[Op]:
        """All ops, rank by rank, in host issue order."""
        return (self[i] for i in range(self.num_ops))


def _rank_offsets(program: Program) -> Ints:
    return np.searchsorted(program.rank, np.arange(program.num_ranks + 1))


def _recorder(program: Program) -> Ints:
    recorder = np.full(program.num_events, -1, np.int64)
    recording = np.flatnonzero(program.record >= 0)
    recorder[program.record[recording]] = recording
    return recorder


def _by_stream(program: Program) -> Csr:
    return Csr.grouped(program.stream, len(program.streams))


def _previous_on_stream(program: Program) -> Ints:
    order = program.by_stream.values
    previous = np.full(program.num_ops, -1, np.int64)
    same = program.stream[order[1:]] == program.stream[order[:-1]]
    previous[order[1:][same]] = order[:-1][same]
    return previous


@dataclass(frozen=True)
class CostTable:
    """What every cost key of a Program costs: the only place where durations live.

    Attributes:
        duration_ns: time on the stream alone, per cost key.
        host_ns: time of the host thread to issue one op, per cost key.
        workspace_bytes: memory that the op allocates and frees again by itself, per cost key.
        margin_percent: measured reserve of the allocator beyond what is allocated.
        context_bytes, communicator_bytes: CUDA context, and NCCL for each process group.
        loads: what ops put on a GPU, for engines to play contention; None: nothing slows anything.
    """

    duration_ns: Ints
    host_ns: Ints
    workspace_bytes: Ints
    margin_percent: float = 0.0
    context_bytes: int = 0
    communicator_bytes: int = 0
    loads: Loads | None = None


class MeetError(ValueError):
    """A transfer whose other end, or another member, never calls it."""


def match_transfers(program: Program) -> Ints:
    """Number the meetings: for every op, the transfer it takes part in, or -1.

    Sends and receives pair up first-in-first-out per (group, source, destination); collectives
    per group and member. Ops with equal numbers start together.

    Raises:
        MeetError: an end without its other end, or a member that calls a collective less often.
    """
    transfers = np.flatnonzero(program.group >= 0)
    columns = (program.group, program.rank, program.peer, program.is_send)
    calls = _Calls(*(ints(column[transfers]) for column in columns))
    members = Csr.from_lists([group.members for group in program.groups])
    of_flow = [np.empty(len(transfers) + 1, np.int64) for _ in range(6)]
    counts = np.zeros(2 * len(transfers) + len(members.values), np.int64)
    flows = _Flows(
        np.full(program.num_ranks, -1, np.int64), np.full(len(program.groups), -1, np.int64),
        of_flow[0], of_flow[1], of_flow[2], of_flow[3], of_flow[4], of_flow[5], counts,
    )  # fmt: skip
    nth = np.empty(len(transfers), np.int64)
    flow = np.empty(len(transfers), np.int64)
    num_flows = _count_calls(calls, members.offsets, members.values, flows, flow, nth)
    if not _number_flows(flows, num_flows):
        raise MeetError(_who_is_missing(program))
    meeting = np.full(program.num_ops, -1, np.int64)
    meeting[transfers] = flows.first_meeting[flow] + nth
    return meeting


class _Calls(NamedTuple):
    """Columns of the transfer ops."""

    group: Ints
    rank: Ints
    peer: Ints
    is_send: Ints


class _Flows(NamedTuple):
    """Flows: (group, source, destination) or a group's collectives; their sides are their callers.

    Flows of one source are a linked list that begins at ``of_source``; ``counts`` holds, from
    ``first_side`` on, how often each side has called.
    """

    of_source: Ints
    collectives: Ints
    group: Ints
    target: Ints
    following: Ints
    first_side: Ints
    num_sides: Ints
    first_meeting: Ints
    counts: Ints


@compiled
def _count_calls(
    calls: _Calls, member_begin: Ints, members: Ints, flows: _Flows, flow_of: Ints, nth: Ints
) -> int:
    """Say of every call which flow it is in and how many its side made before; count flows."""
    num_flows = num_sides = 0
    for i in range(len(nth)):
        group, rank, peer = calls.group[i], calls.rank[i], calls.peer[i]
        source = target = -1
        sides = 2
        if peer < 0:
            flow, side, sides = flows.collectives[group], 0, 0
            for m in range(member_begin[group], member_begin[group + 1]):
                if members[m] == rank:
                    side = sides
                sides += 1
        else:
            side = 1 - calls.is_send[i]
            source, target = (peer, rank) if side else (rank, peer)
            flow = flows.of_source[source]
            while flow >= 0 and (flows.group[flow] != group or flows.target[flow] != target):
                flow = flows.following[flow]
        if flow < 0:
            flow = num_flows
            num_flows += 1
            flows.group[flow], flows.target[flow] = group, target
            flows.first_side[flow], flows.num_sides[flow] = num_sides, sides
            num_sides += sides
            if source < 0:
                flows.collectives[group] = flow
            else:
                flows.following[flow], flows.of_source[source] = flows.of_source[source], flow
        at = flows.first_side[flow] + side
        flow_of[i], nth[i] = flow, flows.counts[at]
        flows.counts[at] += 1
    return num_flows


@compiled
def _number_flows(flows: _Flows, num_flows: int) -> bool:
    """Number the meetings of each flow; False if its sides did not call equally often."""
    flows.first_meeting[0] = 0
    for flow in range(num_flows):
        begin = flows.first_side[flow]
        for side in range(begin, begin + flows.num_sides[flow]):
            if flows.counts[side] != flows.counts[begin]:
                return False
        flows.first_meeting[flow + 1] = flows.first_meeting[flow] + flows.counts[begin]
    return True


def _who_is_missing(program: Program) -> str:
    """The first flow whose sides do not call it equally often."""
    calls: dict[tuple[int, ...], dict[int, int]] = {}
    for i in np.flatnonzero(program.group >= 0).tolist():
        group, rank, peer = int(program.group[i]), int(program.rank[i]), int(program.peer[i])
        if peer >= 0:
            key = (group, rank, peer) if program.is_send[i] else (group, peer, rank)
            sides = calls.setdefault(key, dict.fromkeys(key[1:], 0))
        else:
            sides = calls.setdefault((group,), dict.fromkeys(program.groups[group].members, 0))
        sides[rank] += 1
    key, counts = next((k, c.values()) for k, c in calls.items() if len(set(c.values())) > 1)
    group, *ends = key
    name = " ".join([program.groups[group].name, *([" -> ".join(map(str, ends))] if ends else [])])
    times = " and ".join(map(str, counts))
    return f"group {name}: its members call it {times} times"
