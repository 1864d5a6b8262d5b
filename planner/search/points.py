"""What a search asks of plans, from cheap to dear: what a family's members have in common, bounds
of each member, and the engine's answer for one plan. Asked in whatever process there is.

Bounds leave out contention, 3 to 19 % of the step of 38 plans of mhc-27b, and the power limit, 2 to
5 %. What the limit does is learned from the step at the full clock: the longer that one, the less,
and nothing says how long it is at most. Expert traffic, spread over the kernels that mind it least,
costs a rank 4 to 6 % of the step in compute (12 plans): that would add to a rank's work, but to no
longest path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.sweep.points import ProfileName, Simulated, cost_model, simulated
from mhcplan.profiles.schema import ProfileError
from mhcplan.sim.longest_path import StepGraph
from mhcplan.sim.memory import memory_of, memory_report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.search.space import Family, Member
    from mhcplan.profiles.lookup import CostModel
    from mhcplan.sim.program import CostTable, Program


class Bound(NamedTuple):
    """What a plan takes at least."""

    step_time_ns: int
    device_memory_bytes: int


@dataclass(frozen=True)
class Unpriced:
    """The profile lacks a measurement that a plan needs."""

    reason: str


@dataclass(frozen=True)
class FamilyBounds:
    """Asks for the bounds of families; those that differ in ep and dp only share most of what it
    takes to lower them."""

    families: tuple[Family, ...]
    profile: ProfileName

    def answer(self) -> list[Bound | Unpriced]:
        """What no member of a family stays below."""
        model = cost_model(self.profile)
        return [self._bound(family.common, model) for family in self.families]

    def _bound(self, plan: PlanSpec, model: CostModel) -> Bound | Unpriced:
        program = lower(plan, None)
        try:
            table = model.with_network(plan.network_speed).table(program.cost_keys, plan.gpu)
        except ProfileError as error:
            return Unpriced(str(error))
        return Bound(_busy_ns(plan, program, table), _kept_bytes(program, table))


@dataclass(frozen=True)
class MemberBounds:
    """Asks for the bounds of members. Those that differ in ep and dp only and follow each other
    share most of what it takes to lower them. Memory is exact."""

    members: tuple[Member, ...]
    profile: ProfileName
    memory_limit_bytes: int

    def answer(self) -> list[Bound | Unpriced]:
        """The longest path of every member; of one that does not fit, only its memory."""
        model = cost_model(self.profile)
        return [self._bound(member, model) for member in self.members]

    def _bound(self, member: Member, model: CostModel) -> Bound | Unpriced:
        program = lower(member.plan, member.recompute_block)
        try:
            network = model.with_network(member.plan.network_speed)
            table = network.table(program.cost_keys, member.plan.gpu)
        except ProfileError as error:
            return Unpriced(str(error))
        device_bytes = _device_bytes(program, table)
        if device_bytes > self.memory_limit_bytes:
            return Bound(0, device_bytes)
        longest_ns = int(StepGraph(program).step_ns([table])[0])
        return Bound(max(longest_ns, _busy_ns(member.plan, program, table)), device_bytes)


@dataclass(frozen=True)
class Play:
    """Asks the engine for the step of one plan."""

    member: Member
    profile: ProfileName

    def answer(self) -> Simulated:
        """The step as played."""
        return simulated(self.member.plan, self.member.recompute_block, cost_model(self.profile))


Question = FamilyBounds | MemberBounds | Play
Answer = list[Bound | Unpriced] | Simulated


def answer(question: Question) -> Answer:
    """The answer to any question: what a worker runs."""
    return question.answer()


def _busy_ns(plan: PlanSpec, program: Program, table: CostTable) -> int:
    """Summed durations, in ns, of what has to run one after the other on the rank with most of it.

    Without contention that is every compute op (:mod:`mhcplan.sim.device`). With it, streams of
    different priority may share a GPU, and there is a member that moves every mHC op to another.
    """
    counts = np.array([stream.group < 0 for stream in program.streams])[program.stream]
    if plan.gpu is not None:
        counts &= ~_is_mhc(program)
    durations = table.duration_ns[program.cost[counts]]
    return int(np.bincount(program.rank[counts], durations, program.num_ranks).max(initial=0))


def _kept_bytes(program: Program, table: CostTable) -> int:
    """Device bytes of the rank that needs most, were nothing kept of what mHC ops make.

    Recompute drops some of that; nothing else is freed any sooner for it.
    """
    made_by = np.full(len(program.buffer_bytes), -1)
    made_by[program.allocs.values] = program.allocs.owners
    dropped = _is_mhc(program)[made_by] & (made_by >= 0)
    kept = replace(program, buffer_bytes=np.where(dropped, 0, program.buffer_bytes))
    return _device_bytes(kept, table)


def _device_bytes(program: Program, table: CostTable) -> int:
    ranks = memory_report(program, table, memory_of(program, table))
    return max(rank["device_bytes"] for rank in ranks)


def _is_mhc(program: Program) -> NDArray[np.bool_]:
    return np.array([name == "mhc" for name in program.categories])[program.category]
