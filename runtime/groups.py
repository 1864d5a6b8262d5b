"""Process groups of a Program, for every replica, and the transfers that run in them.

A Program holds the ranks of one replica; ``ep * dp`` processes stand for each. Process numbers are
those of the planner's GPUs: ep fastest, then dp, then the pipeline rank. A Program's group becomes
a process group for each replica (pipeline), each ep group, or each set of weight holders; the part
of its name before the colon says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from mhcplan.runtime.spec import RunError
from mhcplan.sim.program import HIGH_PRIORITY, NORMAL_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mhcplan.runtime.streams import StreamPool
    from mhcplan.sim.program import Group, Op, Program


# torch 2.13 renamed both
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
ALL_GATHER: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
PART_OF_GROUP = {"dp": "dense", "dp_experts": "experts"}  # by the part of a group's name before ":"
_OPENING_ELEMENTS = 1 << 16  # fp32 for each member: enough for every channel to be used


class Place(NamedTuple):
    """Which of the processes this is: a rank of the Program in one of its replicas."""

    process: int
    ep: int
    dp: int

    @property
    def replicas(self) -> int:
        """Processes for each rank."""
        return self.ep * self.dp

    @property
    def rank(self) -> int:
        """Rank in the Program."""
        return self.process // self.replicas

    @property
    def replica(self) -> int:
        """Number of the replica, 0 .. ep x dp - 1."""
        return self.process % self.replicas

    @property
    def expert_index(self) -> int:
        """Which share of the experts it holds."""
        return self.replica % self.ep

    def process_of(self, rank: int) -> int:
        """The process that runs ``rank`` of the same replica."""
        return rank * self.replicas + self.replica


def instances(group: Group, ep: int, dp: int) -> list[list[int]]:
    """Processes of every process group that a Program's group stands for.

    Raises:
        RunError: the group's size fits none of the layouts that its name may mean.
    """
    replicas, kind = ep * dp, group.name.partition(":")[0]
    if kind == "ep":
        base = group.members[0] * replicas
        found = [[base + d * ep + e for e in range(ep)] for d in range(dp)]
    elif kind == "dp":
        found = [[m * replicas + i for m in group.members for i in range(replicas)]]
    elif kind == "dp_experts":
        found = [
            [m * replicas + i for m in group.members for i in range(e, replicas, ep)]
            for e in range(ep)
        ]
    else:
        found = [[m * replicas + i for m in group.members] for i in range(replicas)]
    if len(found[0]) != group.size:
        raise RunError(
            f"group {group.name} has {group.size} members, but ep={ep} dp={dp} gives"
            f" {len(found[0])}"
        )
    return found


@dataclass(frozen=True)
class Handle:
    """A process group that this process is in, with the processes that belong to it."""

    group: Any
    processes: tuple[int, ...]

    @property
    def index(self) -> int:
        """This process's place in the group."""
        return self.processes.index(dist.get_rank())


class Call(NamedTuple):
    """A kind of NCCL call in a process group: what it needs must be there before a step.

    Attributes:
        kind: ``all_to_all``, ``reduce``, ``batch`` or ``send``.
        pairs: processes (from, to) that a batch or a send connects, ascending.
    """

    kind: str
    pairs: tuple[tuple[int, int], ...] = ()


def calls_of(program: Program, number: int, processes: Sequence[int]) -> list[Call]:
    """The kinds of call that a Program makes in its group ``number``, for one of its instances."""
    group = program.groups[number]
    kind = group.name.partition(":")[0]
    if kind == "ep":
        return [Call("all_to_all")]
    if kind in PART_OF_GROUP:
        return [Call("reduce")]
    process = dict(zip(group.members, processes, strict=True))
    pairs: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for i in np.flatnonzero((program.group == number) & program.is_send):
        ends = process[int(program.rank[i])], process[int(program.peer[i])]
        pairs[bool(program.batch[i] >= 0)].add(ends)
    batch = [Call("batch", tuple(sorted(pairs[True])))] if pairs[True] else []
    return batch + [Call("send", (pair,)) for pair in sorted(pairs[False])]


class Groups:
    """Process groups by (purpose, members); Programs in one process share equal ones.

    All processes must call :meth:`add` with the same Programs in the same order.
    """

    def __init__(self, streams: StreamPool, timeout_s: float) -> None:
        """``streams`` of this process; ``timeout_s``: when a transfer that nobody answers fails."""
        self._streams, self._timeout = streams, timedelta(seconds=timeout_s)
        self._made: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._opened: set[tuple[tuple[str, tuple[int, ...]], Call]] = set()

    def add(self, program: Program, place: Place, ctas: int | None = None) -> dict[int, Handle]:
        """Create (or find) the groups of a Program; returns those of this process by number.

        On a GPU every kind of call that the Program makes has been made when this returns.

        Args:
            program: whose groups; ``place``: which of its processes this is.
            ctas: of every NCCL kernel; None leaves it to NCCL.
        """
        urgent = {s.group for s in program.streams if s.priority <= HIGH_PRIORITY}
        own: dict[int, Handle] = {}
        closed: list[tuple[Call, Handle]] = []
        for number, group in enumerate(program.groups):
            for processes in instances(group, place.ep, place.dp):
                name = f"{group.name}{'!' if number in urgent else ''}/{ctas or ''}"
                key = name, tuple(processes)
                if key not in self._made:
                    self._made[key] = self._create(processes, ctas, urgent=number in urgent)
                if place.process not in processes:
                    continue
                own[number] = handle = Handle(self._made[key], key[1])
                for call in calls_of(program, number, processes):
                    if (key, call) not in self._opened:
                        self._opened.add((key, call))
                        closed.append((call, handle))
        if self._streams.device.type == "cuda":
            for call, handle in closed:
                open_call(call, handle, self._streams.device)
        return own

    def _create(self, processes: list[int], ctas: int | None, *, urgent: bool) -> Any:  # noqa: ANN401
        options = None
        if self._streams.device.type == "cuda":
            self._streams.count_group(HIGH_PRIORITY if urgent else NORMAL_PRIORITY)
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=urgent)
            options._timeout = self._timeout
            if ctas is not None:
                options.config.min_ctas = options.config.max_ctas = ctas
        return dist.new_group(processes, timeout=self._timeout, pg_options=options)


def open_call(call: Call, handle: Handle, device: torch.device) -> None:
    """Make a call once, on data of no meaning.

    NCCL opens communicators and connections at a first call and blocks the host until the others
    are there; left to the step, two processes could each wait for the other in a different one.
    """
    size, me = len(handle.processes), dist.get_rank()
    x = torch.zeros(size * _OPENING_ELEMENTS, device=device)
    if call.kind == "all_to_all":
        dist.all_to_all_single(torch.empty_like(x), x, group=handle.group)
    elif call.kind == "reduce":
        own = x.chunk(size)[handle.index]
        REDUCE_SCATTER(own, x, group=handle.group)
        ALL_GATHER(x, own, group=handle.group)
    elif call.kind == "batch":
        ops = [
            dist.P2POp(dist.isend if source == me else dist.irecv, x.clone(), peer, handle.group)
            for source, target in call.pairs
            if (peer := _other(me, source, target)) is not None
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    else:
        ((source, target),) = call.pairs
        if (peer := _other(me, source, target)) is not None:
            send = dist.isend if source == me else dist.irecv
            work = send(x, peer, group=handle.group)
            assert work is not None
            work.wait()
    torch.cuda.synchronize(device)


def _other(me: int, source: int, target: int) -> int | None:
    """The other end of a message, for one that is an end of it."""
    return {source: target, target: source}.get(me)


class GroupTransfers:
    """Starts the Program's sends and receives in its process groups."""

    def __init__(self, groups: dict[int, Handle], place: Place) -> None:
        """``groups`` by number, as :meth:`Groups.add` returns them."""
        self._groups, self._place = groups, place

    def start(self, ops: Sequence[Op], tensors: Sequence[Tensor]) -> list[Any]:
        """One call: a send or a receive, or a batch of them."""
        if ops[0].batch < 0:
            (op,), (tensor,) = ops, tensors
            call = dist.isend if op.reads else dist.irecv
            peer = self._place.process_of(op.peer)
            return [call(tensor, peer, group=self._groups[op.group].group)]
        return dist.batch_isend_irecv(
            [
                dist.P2POp(
                    dist.isend if op.reads else dist.irecv, tensor,
                    self._place.process_of(op.peer), self._groups[op.group].group,
                )
                for op, tensor in zip(ops, tensors, strict=True)
            ]
        )  # fmt: skip
