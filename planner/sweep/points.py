"""Working out many plans, in whatever process it is: by the engine, or by the fast estimate.

A worker is given plans and the name and digest of a profile, reads the profile once and keeps what
plans share: prices, and steps: baselines, which all n and all recompute blocks of one layout have
in common, and those that two plans name differently.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import as_played, resolve_recompute_block
from mhcplan.planner.predict import settle
from mhcplan.planner.report.schema import overhead_percent, tokens_per_second
from mhcplan.planner.sweep.ranking import Refusal, estimate
from mhcplan.planner.sweep.row import Figures, Outcome
from mhcplan.profiles.lookup import cost_model_of
from mhcplan.profiles.schema import ProfileError
from mhcplan.profiles.store import find_profile
from mhcplan.sim.memory import memory_of, memory_report

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.sweep.row import Method
    from mhcplan.profiles.lookup import CostModel
    from mhcplan.profiles.schema import Profile

_MODELS_KEPT, _STEPS_KEPT = 4, 4096


class ProfileName(NamedTuple):
    """A profile to be read where the work is done: by the same name, with the same content."""

    name: str
    digest: str


class Simulated(NamedTuple):
    """A plan's step as the engine plays it, without its baseline; memory of the fullest rank."""

    step_time_ns: int
    peak_memory_bytes: int
    device_memory_bytes: int


def work_out(plans: Sequence[PlanSpec], profile: ProfileName, method: Method) -> list[Outcome]:
    """Outcome of every plan, in order.

    Raises:
        SpecError: the engine cannot run here.
        ProfileError: the profile cannot be read here, or is another one.
    """
    if method == "engine":
        return [_by_engine(plan, profile) for plan in plans]
    return [
        Outcome(figures=None, reason=found.reason)
        if isinstance(found, Refusal)
        else Outcome(
            figures=_figures(
                found.plan,
                found.recompute_block,
                Simulated(found.step_time_ns, found.peak_memory_bytes, found.device_bytes),
                found.baseline_step_time_ns,
                found.memory_limit_bytes,
            )
        )
        for found in estimate(plans, cost_model(profile).profile)
    ]


def simulated(plan: PlanSpec, recompute_block: int | None, model: CostModel) -> Simulated:
    """Play one plan.

    Raises:
        CostMissing: the profile cannot price one of its ops.
    """
    program = lower(plan, recompute_block)
    table = model.with_network(plan.network_speed).table(program.cost_keys, plan.gpu)
    ranks = memory_report(program, table, memory_of(program, table))
    peak, device = (max(rank[name] for rank in ranks) for name in ("peak_bytes", "device_bytes"))
    _, _, timeline, _ = settle(plan, program, table, model.profile)
    return Simulated(timeline.step_ns, peak, device)


@lru_cache(maxsize=_MODELS_KEPT)
def cost_model(profile: ProfileName) -> CostModel:
    """Prices of a profile, read once in this process.

    Raises:
        ProfileError: it cannot be read, or is not the one that the work was planned with.
    """
    found = find_profile(profile.name)
    if found.digest != profile.digest:
        raise ProfileError(f"profile={profile.name!r} has changed, or differs between machines")
    return cost_model_of(found)


def memory_limit_bytes(plan: PlanSpec, profile: Profile) -> int:
    """Memory of one GPU: the plan's own limit, or that of the profile's GPU."""
    return plan.memory_limit_bytes or profile.hardware.memory_bytes


def _by_engine(plan: PlanSpec, profile: ProfileName) -> Outcome:
    model = cost_model(profile)
    block = resolve_recompute_block(plan)
    try:
        step = _step(cast("Hashable", as_played(plan, block)), block, profile)
        baseline = _step(cast("Hashable", plan.baseline()), None, profile)
    except ProfileError as error:
        return Outcome(figures=None, reason=str(error))
    limit = memory_limit_bytes(plan, model.profile)
    return Outcome(figures=_figures(plan, block, step, baseline.step_time_ns, limit))


@lru_cache(maxsize=_STEPS_KEPT)
def _step(plan: PlanSpec, recompute_block: int | None, profile: ProfileName) -> Simulated:
    """A step of a plan :func:`~mhcplan.planner.lowering.recompute.as_played`."""
    return simulated(plan, recompute_block, cost_model(profile))


def _figures(
    plan: PlanSpec, block: int | None, step: Simulated, baseline_ns: int, limit: int
) -> Figures:
    return Figures(
        recompute_block=block,
        step_time_ns=step.step_time_ns,
        baseline_step_time_ns=baseline_ns,
        overhead_percent=overhead_percent(step.step_time_ns, baseline_ns),
        tokens_per_second=tokens_per_second(plan.tokens_per_step, step.step_time_ns),
        peak_memory_bytes=step.peak_memory_bytes,
        device_memory_bytes=step.device_memory_bytes,
        memory_limit_bytes=limit,
        fits=step.device_memory_bytes <= limit,
    )
