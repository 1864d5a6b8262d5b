"""Which GPUs work together, and the streams and process groups that each rank has for it.

GPU numbers: ep fastest, then dp, then pp (design: "Definitions"). All of it depends on the layout
and on which rank holds which stage only, so it is kept from one what-if to the next.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.planner.plan.spec import schedule_of
from mhcplan.sim.build import COMPUTE, DATA, DATA_EXPERTS, EXPERT, HIGH, NUM_ROLES
from mhcplan.sim.program import HIGH_PRIORITY, NORMAL_PRIORITY, Group, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mhcplan.planner.plan.spec import CommStreams, PlanSpec
    from mhcplan.planner.schedules.p2p import P2P

Pipeline = tuple[tuple[int, ...], ...]  # rank of every stage, a row for each copy of the model
_KEPT = 64


class Team(NamedTuple):
    """GPUs that share traffic: how many, and the most of them that stand in one node."""

    gpus: int
    per_node: int

    @property
    def medium(self) -> str:
        """The link that their traffic takes."""
        return "intra_node" if self.per_node == self.gpus else "inter_node"


class RankTeams(NamedTuple):
    """The teams of one rank; of all replicas', which a step waits for, the one that is most spread.

    Attributes:
        experts: GPUs that split its experts among them.
        dense: GPUs that hold the same dense weights.
        expert_copies: GPUs that hold the same experts.
        holders: ranks that hold its stages: with two copies of the model, rank P-1-r as well.
    """

    experts: Team
    dense: Team
    expert_copies: Team
    holders: tuple[int, ...]


class Placement(NamedTuple):
    """Teams of every rank; pipe is the one of two neighbours, of whatever pair is apart."""

    ranks: tuple[RankTeams, ...]
    pipe: Team


def placement_of(plan: PlanSpec) -> Placement:
    """Where the ranks of a plan stand."""
    return _placement(schedule_of(plan).placement, _sizes_of(plan))


def tables_of(plan: PlanSpec) -> Tables:
    """Streams and process groups of a plan."""
    pipeline = schedule_of(plan).placement
    urgent = plan.comm_priority == "high"
    return _tables(pipeline, _sizes_of(plan), plan.p2p, plan.comm_streams, urgent)


class _Sizes(NamedTuple):
    """What of a layout decides."""

    pp: int
    ep: int
    replicas: int
    gpus_per_node: int


def _sizes_of(plan: PlanSpec) -> _Sizes:
    layout = plan.layout
    return _Sizes(layout.pp, layout.ep, layout.replicas, layout.gpus_per_node)


@lru_cache(maxsize=_KEPT)
def _placement(pipeline: Pipeline, layout: _Sizes) -> Placement:
    replicas, ep, nodes = layout.replicas, layout.ep, layout.gpus_per_node

    def team(gpus: Iterable[int]) -> Team:
        in_node = Counter(gpu // nodes for gpu in gpus)
        return Team(in_node.total(), max(in_node.values()))

    def most_spread(teams: Iterable[Team]) -> Team:
        return min(teams, key=lambda team: team.per_node)

    def teams(rank: int) -> RankTeams:
        holders = sorted({rank, layout.pp - 1 - rank} if len(pipeline) > 1 else {rank})
        held_by = [range(r * replicas, (r + 1) * replicas) for r in holders]
        own = range(rank * replicas, (rank + 1) * replicas)
        return RankTeams(
            most_spread(team(own[i : i + ep]) for i in range(0, replicas, ep)),
            team(chain(*held_by)),
            most_spread(team(chain(*(gpus[i::ep] for gpus in held_by))) for i in range(ep)),
            tuple(holders),
        )

    below = range((layout.pp - 1) * replicas)
    same = all(gpu // nodes == (gpu + replicas) // nodes for gpu in below)
    return Placement(tuple(map(teams, range(layout.pp))), Team(2, 2 if same else 1))


@lru_cache(maxsize=_KEPT)
def _tables(
    pipeline: Pipeline, layout: _Sizes, p2p: P2P, comm_streams: CommStreams, urgent: bool
) -> Tables:
    return Tables(pipeline, _placement(pipeline, layout), p2p, comm_streams, urgent=urgent)


class Tables:
    """Streams and process groups of every rank; the arrays are those of sim.tiling.Places."""

    def __init__(
        self,
        pipeline: Pipeline,
        placement: Placement,
        p2p: P2P,
        comm_streams: CommStreams,
        *,
        urgent: bool = False,
    ) -> None:
        """Number them; ``urgent``: communication has the high-priority streams' priority."""
        self._priority = HIGH_PRIORITY if urgent else NORMAL_PRIORITY
        self.streams: list[Stream] = []
        self.groups: list[Group] = []
        ranks = range(len(placement.ranks))
        self.role_stream = np.full((len(ranks), NUM_ROLES), -1, np.int64)
        self.role_group = np.full((len(ranks), NUM_ROLES), -1, np.int64)
        self.pipe_stream = np.full((2, len(ranks), len(ranks), 2), -1, np.int64)
        self.pipe_group = np.full((2, len(ranks), len(ranks)), -1, np.int64)
        for rank in ranks:
            self.role_stream[rank, COMPUTE] = self._stream(rank, "compute", NORMAL_PRIORITY)
            self.role_stream[rank, HIGH] = self._stream(rank, "high", HIGH_PRIORITY)
        medium = placement.pipe.medium
        if comm_streams == "one":
            self._one_communication_stream(placement, medium)
        else:
            for rank in ranks:
                self._role(EXPERT, "ep", (rank,), placement.ranks[rank].experts)
            if p2p == "grouped":
                self._one_pipe_group(ranks, medium)
            else:
                self._flows(pipeline, medium)
        for rank in ranks:
            teams = placement.ranks[rank]
            if rank == teams.holders[0]:
                self._role(DATA, "dp", teams.holders, teams.dense)
                self._role(DATA_EXPERTS, "dp_experts", teams.holders, teams.expert_copies)

    def _stream(self, rank: int, name: str, priority: int, group: int = -1) -> int:
        self.streams.append(Stream(rank, name, priority, group))
        return len(self.streams) - 1

    def _group(self, name: str, members: tuple[int, ...], size: int, medium: str) -> int:
        self.groups.append(Group(name, members, size, medium))
        return len(self.groups) - 1

    def _role(self, role: int, name: str, members: tuple[int, ...], team: Team) -> None:
        """A group, and its internal stream on each member, where more than one GPU is in it."""
        if team.gpus < 2:
            return
        full_name = f"{name}:{'-'.join(map(str, members))}"
        number = self._group(full_name, members, team.gpus, team.medium)
        for rank in members:
            self.role_group[rank, role] = number
            self.role_stream[rank, role] = self._stream(rank, name, self._priority, number)

    def _flows(self, pipeline: Pipeline, medium: str) -> None:
        """A group and its two streams for every flow that the pipeline has.

        Two ranks that mirror each other in a DualPipe number their streams alike: streams that
        share a hardware queue on one do so on the other.
        """
        for pairs in zip(*map(pairwise, pipeline), strict=True):
            # ends on the rank below, then those on the rank above
            for forward, end in ((1, 0), (0, 1), (1, 1), (0, 0)):
                for below, above in pairs:
                    ends = (below, above) if forward else (above, below)
                    if below == above or self.pipe_stream[forward, *ends, end] >= 0:
                        continue
                    name = f"pp_{'f' if forward else 'b'}:{ends[0]}>{ends[1]}"
                    if self.pipe_group[forward, *ends] < 0:
                        self.pipe_group[forward, *ends] = self._group(name, ends, 2, medium)
                    number = int(self.pipe_group[forward, *ends])
                    stream = self._stream(ends[end], name, self._priority, number)
                    self.pipe_stream[forward, *ends, end] = stream

    def _one_pipe_group(self, ranks: range, medium: str) -> None:
        """One group over all ranks, as DeepSeek's DualPipe has it; messages go in batches."""
        self.pipe_group[:] = number = self._group("pp", tuple(ranks), len(ranks), medium)
        for rank in ranks:
            self._pipe_on(rank, self._stream(rank, "pp", self._priority, number))

    def _one_communication_stream(self, placement: Placement, medium: str) -> None:
        """Expert and pipeline traffic on one CUDA stream: each group's calls are made on it
        (``async_op=False``), so it is no group's internal stream."""
        ranks = range(len(placement.ranks))
        self.pipe_group[:] = self._group("pp", tuple(ranks), len(ranks), medium)
        for rank, teams in enumerate(placement.ranks):
            stream = self._stream(rank, "comm", self._priority)
            self._pipe_on(rank, stream)
            team = teams.experts
            if team.gpus > 1:
                group = self._group(f"ep:{rank}", (rank,), team.gpus, team.medium)
                self.role_group[rank, EXPERT] = group
                self.role_stream[rank, EXPERT] = stream

    def _pipe_on(self, rank: int, stream: int) -> None:
        self.pipe_stream[:, rank, :, 0] = stream
        self.pipe_stream[:, :, rank, 1] = stream
