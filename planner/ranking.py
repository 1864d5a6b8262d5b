"""The fast estimate of many plans, to rank them by; :mod:`mhcplan.planner.predict` confirms them.

A plan's step time is estimated by the longest path through its Program
(:mod:`mhcplan.sim.longest_path`): every op waits for what it must wait for, but nothing competes
for links or SMs, so it is at most the engine's step time. Memory needs no estimate: it is counted
as in a prediction, since it is counted in host issue order, whatever the streams do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhcplan.planner.lowering import lower
from mhcplan.planner.recompute import resolve_recompute_block
from mhcplan.planner.spec import SpecError
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.schema import ProfileError
from mhcplan.sim.longest_path import StepGraph
from mhcplan.sim.memory import memory_of, memory_report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mhcplan.planner.spec import PlanSpec
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


def estimate(plans: Iterable[PlanSpec], profile: Profile) -> Iterator[Estimate | Refusal]:
    """Estimate plans under one profile, whatever profile they name, in the order given.

    What plans have in common is worked out once, so plans that share more should follow each other.
    A plan that the profile cannot price is a :class:`Refusal`; the others go on.
    """
    model = CostModel(profile)
    for plan in plans:
        try:
            yield _estimate(plan, model)
        except (SpecError, ProfileError) as error:
            yield Refusal(plan, str(error))


def _estimate(plan: PlanSpec, model: CostModel) -> Estimate:
    block = resolve_recompute_block(plan)
    step_ns, peak_bytes, device_bytes = _step(plan, block, model)
    baseline_ns = step_ns if plan.residual.is_plain else _step(plan.baseline(), None, model)[0]
    limit = plan.memory_limit_bytes or model.profile.hardware.memory_bytes
    return Estimate(plan, block, step_ns, baseline_ns, peak_bytes, device_bytes, limit)


def _step(plan: PlanSpec, recompute_block: int | None, model: CostModel) -> tuple[int, int, int]:
    """Longest path in ns, peak and device bytes of the rank that needs most."""
    program = lower(plan, recompute_block)
    table = model.table(program.cost_keys)
    report = memory_report(program, table, memory_of(program, table))
    step_ns = int(StepGraph(program).step_ns([table])[0])
    peak, device = (max(rank[name] for rank in report) for name in ("peak_bytes", "device_bytes"))
    return step_ns, peak, device
