"""The fast estimate of many plans, to rank them by; :mod:`mhcplan.planner.predict` confirms them.

A plan's step time is estimated by the longest path through its Program
(:mod:`mhcplan.sim.longest_path`): every op waits for what it must wait for, but nothing competes
for links or SMs, nor does the power limit slow anything, so it is at most the engine's step time.
Of 60 plans of mhc-27b the engine's step was up to 31 % longer, its overhead up to 6.1 points away
(``benchmarks/sim.py --only sweep``), so plans nearer to each other than that are for the engine to
order. Memory needs no estimate: it is counted as in a prediction, in host issue order, whatever the
streams do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import as_played, resolve_recompute_block
from mhcplan.planner.plan.spec import SpecError
from mhcplan.planner.sweep.steady_state import Played, families_of, growth_ns
from mhcplan.profiles.lookup import cost_model_of
from mhcplan.profiles.schema import ProfileError
from mhcplan.sim.kept import Kept
from mhcplan.sim.longest_path import StepGraph
from mhcplan.sim.memory import memory_of, memory_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.sweep.steady_state import Family
    from mhcplan.profiles.schema import Profile


@dataclass(frozen=True)
class Estimate:
    """What a plan is ranked by.

    Attributes:
        recompute_block: L_r in sites as ``auto`` or ``stage`` was resolved, None for no recompute.
        step_time_ns: at most what the engine finds.
        baseline_step_time_ns: the same of the same plan with the plain residual.
        peak_memory_bytes, device_bytes: of the rank that needs most, exact.
        memory_limit_bytes: of one GPU.
    """

    plan: PlanSpec
    recompute_block: int | None
    step_time_ns: int
    baseline_step_time_ns: int
    peak_memory_bytes: int
    device_bytes: int
    memory_limit_bytes: int

    @property
    def overhead_percent(self) -> float:
        """Step time over the baseline's, minus 1, in percent; an estimate, no bound."""
        return 100 * (self.step_time_ns / self.baseline_step_time_ns - 1)

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory it needs."""
        return self.device_bytes <= self.memory_limit_bytes


@dataclass(frozen=True)
class Refusal:
    """A plan that cannot be estimated, and why in one line."""

    plan: PlanSpec
    reason: str


def estimate(plans: Sequence[PlanSpec], profile: Profile) -> list[Estimate | Refusal]:
    """Estimate plans under one profile, whatever profile they name, in the order given.

    A plan that the profile cannot price is a :class:`Refusal`; the others go on. What plans have in
    common is worked out once, here and from one call to the next: the order of all ops if they
    differ only in costs and sizes, the baseline if they differ only in the residual, all of a step
    if it is the same: ``auto`` may be the block that another plan names.
    """
    estimator = _estimators.find(profile.digest, lambda: _Estimator(profile))
    found: dict[int, Estimate | Refusal] = {}
    for i in sorted(range(len(plans)), key=lambda i: likeness(plans[i])):
        try:
            found[i] = estimator.estimate(plans[i])
        except (SpecError, ProfileError) as error:
            found[i] = Refusal(plans[i], str(error))
    return [found[i] for i in range(len(plans))]


def shared_templates(plan: PlanSpec) -> tuple[object, ...]:
    """Plans of which this is equal share most templates, which are dearest to make."""
    layout, residual = plan.layout, plan.residual
    return (
        plan.model.name, layout.pp, layout.ep, layout.dp, plan.micro_batch_size,
        *(("plain", "") if residual.is_plain else (residual.kind, str(residual.recompute_block))),
    )  # fmt: skip


def likeness(plan: PlanSpec) -> tuple[object, ...]:
    """Plans next to each other in this order share the order of all their ops, then templates; a
    process can keep all templates of a layout. Many microbatches, for which few are played, come
    before those few."""
    residual = plan.residual
    return (
        plan.model.name, plan.layout.pp, plan.schedule, -plan.microbatches, residual.kind,
        str(residual.recompute_block), plan.digest(),
    )  # fmt: skip


class _Figures(NamedTuple):
    """Longest path, and memory of the ranks that need most."""

    step_ns: int
    peak_bytes: int
    device_bytes: int

    @property
    def memory(self) -> tuple[int, int]:
        """What does not grow with the number of microbatches."""
        return self.peak_bytes, self.device_bytes


class _Estimator:
    """Estimates under one profile; keeps its prices, steps, and those with few microbatches."""

    def __init__(self, profile: Profile) -> None:
        self._model = cost_model_of(profile)
        self._limit_bytes = profile.hardware.memory_bytes
        self._steps: dict[str, _Figures] = {}
        self._families: dict[str, tuple[_Figures, int] | None] = {}

    def estimate(self, plan: PlanSpec) -> Estimate:
        block = resolve_recompute_block(plan)
        found = self._step(as_played(plan, block), block)
        return Estimate(
            plan, block, found.step_ns, self._step(plan.baseline(), None).step_ns,
            peak_memory_bytes=found.peak_bytes,
            device_bytes=found.device_bytes,
            memory_limit_bytes=plan.memory_limit_bytes or self._limit_bytes,
        )  # fmt: skip

    def _step(self, plan: PlanSpec, block: int | None) -> _Figures:
        digest = plan.digest()
        if digest not in self._steps:
            self._steps[digest] = self._figures(plan, block)
        return self._steps[digest]

    def _figures(self, plan: PlanSpec, block: int | None) -> _Figures:
        for family in families_of(plan):
            key = family.short.digest()
            if key not in self._families:
                self._families[key] = self._grown(family, block)
            grown = self._families[key]
            if grown is not None:
                few, grows_ns = grown
                return few._replace(step_ns=few.step_ns + family.repeats * grows_ns)
        return self._played(plan, block)[0]

    def _grown(self, family: Family, block: int | None) -> tuple[_Figures, int] | None:
        """Figures of the family's short plan, and its growth; None if it is not that simple."""
        few, short = self._played(family.short, block)
        more, longer = self._played(family.longer, block)
        self._steps |= {family.short.digest(): few, family.longer.digest(): more}
        grows_ns = growth_ns(short, longer)
        if grows_ns is None or more.memory != few.memory:
            return None
        return few, grows_ns

    def _played(self, plan: PlanSpec, block: int | None) -> tuple[_Figures, Played]:
        """Work a step out op by op."""
        program = lower(plan, block)
        table = self._model.with_network(plan.network_speed).table(program.cost_keys)
        ranks = memory_report(program, table, memory_of(program, table))
        played = Played(program, *StepGraph(program).path_ns(table))
        peak, device = (
            max(rank[name] for rank in ranks) for name in ("peak_bytes", "device_bytes")
        )
        return _Figures(played.step_ns, peak, device), played


_estimators: Kept[_Estimator] = Kept(4)
