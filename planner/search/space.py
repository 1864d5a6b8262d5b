"""The plans that a search may choose from: all that train the same step on the same GPUs.

A *family* is everything that decides what the ranks have to do: layout, micro-batch size, schedule
and any field that was asked for. Its *members* differ in the recompute block and in the priority of
mHC ops only, which trade memory for recompute and move work between streams: so what they all have
to do is what the member does that neither recomputes nor moves (:attr:`Family.common`).

n is the user's choice and not searched: a smaller one is always faster.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from pydantic import JsonValue

from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.file import changed_plan
from mhcplan.planner.plan.spec import PlanSpec, Priority, ScheduleName, SpecError
from mhcplan.planner.sweep.axes import GLOBAL_BATCH, Axis
from mhcplan.profiles.specs import ResidualSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mhcplan.planner.plan.file import Fields

PP, EP, DP = "layout.pp", "layout.ep", "layout.dp"
SEQUENCES, MICROBATCHES, SCHEDULE = "micro_batch_size", "microbatches", "schedule"
BLOCK, PRIORITY, RATE = "residual.recompute_block", "priority", "residual.expansion_rate"
MEMBER_FIELDS = BLOCK, PRIORITY
SINGLE_FIELDS = RATE, "residual.kind", "profile", "engine", "seq_len", GLOBAL_BATCH

_BLOCKS = "auto", "none", 2, 4, "stage"

Values = dict[str, tuple[JsonValue, ...]]
Wish = tuple[ResidualSpec, Priority]


@dataclass(frozen=True)
class Member:
    """A plan to choose, with its recompute block as resolved."""

    plan: PlanSpec
    recompute_block: int | None


@dataclass(frozen=True)
class Family:
    """Plans that differ in recompute block and priority only."""

    members: tuple[Member, ...]

    @property
    def common(self) -> PlanSpec:
        """The plan whose ops every member has to run too: without priorities or recompute."""
        plan = self.members[0].plan
        residual = plan.residual.model_copy(update={"recompute_block": "none"})
        return plan.model_copy(update={"priority": "none", "residual": residual})


@dataclass
class Space:
    """All families, and what was left out as no plan at all: how many, by reason."""

    families: list[Family] = field(default_factory=list[Family])
    illegal: Counter[str] = field(default_factory=Counter[str])

    @property
    def num_plans(self) -> int:
        """Plans to choose from."""
        return sum(len(family.members) for family in self.families)


def search_space(fields: Fields, gpus: int, global_batch: int, axes: Sequence[Axis]) -> Space:
    """List the families of plans of ``global_batch`` sequences a step on ``gpus`` GPUs.

    Args:
        fields: what all plans have in common, as a plan file has it.
        gpus: pp x ep x dp of every plan.
        global_batch: microbatches x micro_batch_size x ep x dp of every plan.
        axes: values to choose from, in place of all; and further fields to search.

    Raises:
        SpecError: a recompute block or priority that no plan can have.
    """
    allowed = {axis.path: axis.values for axis in axes}
    further = [axis for axis in axes if axis.path not in _SEARCHED]
    space, wishes = Space(), _wishes(fields, allowed)
    seen = set[PlanSpec]()
    for layout in _layouts(gpus, global_batch, allowed):
        for values in itertools.product(*(axis.values for axis in further)):
            more = dict(zip((axis.path for axis in further), values, strict=True))
            for schedule in allowed.get(SCHEDULE, get_args(ScheduleName)):
                family = _family(fields, layout | more | {SCHEDULE: schedule}, wishes, space)
                if family is not None and family.common not in seen:
                    seen.add(family.common)
                    space.families.append(family)
    return space


_SEARCHED = {PP, EP, DP, SEQUENCES, MICROBATCHES, SCHEDULE, *MEMBER_FIELDS}


def _layouts(gpus: int, global_batch: int, allowed: Values) -> Iterator[dict[str, JsonValue]]:
    """Every way to use all GPUs and to split the batch: pp, ep, dp, sequences, microbatches."""
    for pp in _divisors(gpus):
        for ep in _divisors(gpus // pp):
            replicas = gpus // pp
            for sequences in _divisors(global_batch // replicas):
                layout: dict[str, JsonValue] = {
                    PP: pp, EP: ep, DP: replicas // ep, SEQUENCES: sequences,
                    MICROBATCHES: global_batch // (replicas * sequences),
                }  # fmt: skip
                fits = global_batch % replicas == 0
                if fits and all(layout[p] in allowed[p] for p in layout if p in allowed):
                    yield layout


def _family(
    fields: Fields,
    changes: dict[str, JsonValue],
    wishes: Sequence[Wish],
    space: Space,
) -> Family | None:
    """The family of these values, or None, with the reason counted, where no plan is legal."""
    try:
        plan = changed_plan(fields, changes)
    except SpecError as error:
        space.illegal[_kind_of(str(error))] += 1
        return None
    members: dict[tuple[int | None, str], Member] = {}
    for residual, priority in wishes:  # legal for one family is legal for all
        member = plan.model_copy(update={"residual": residual, "priority": priority})
        block = resolve_recompute_block(member)
        if priority == "recompute" and block is None:
            priority = "post"  # nothing is recomputed: the same plan
            member = member.model_copy(update={"priority": priority})
        members.setdefault((block, priority), Member(member, block))
    return Family(tuple(members.values()))


def _wishes(fields: Fields, allowed: Values) -> list[Wish]:
    """What members of a family differ in: recompute blocks and priorities.

    Raises:
        SpecError: a value that no plan can have.
    """
    blocks = allowed.get(BLOCK, _BLOCKS)
    priorities = allowed.get(PRIORITY, get_args(Priority))
    plans = [
        changed_plan(fields, {BLOCK: block, PRIORITY: priority})
        for block, priority in itertools.product(blocks, priorities)
    ]
    return [(plan.residual, plan.priority) for plan in plans]


def _kind_of(reason: str) -> str:
    """A reason without its numbers, so that equal ones are counted together.

    >>> _kind_of("layout.pp=32 makes 64 stages, more than the 30 blocks of mhc-27b")
    'layout.pp=N makes N stages, more than the N blocks of mhc-27b'
    """
    return re.sub(r"(?<![\w-])\d[\d,.]*", "N", reason)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def sequences_of(plan: PlanSpec, gpus: int) -> int:
    """A global batch for ``gpus`` GPUs: as many sequences a GPU as ``plan`` has.

    Raises:
        SpecError: that is no whole number.
    """
    sequences, rest = divmod(plan.global_batch * gpus, plan.layout.gpus)
    if rest:
        raise SpecError(
            f"gpus={gpus}: {plan.global_batch} sequences on {plan.layout.gpus} GPUs do not scale to"
            " it; give --global-batch"
        )
    return sequences
