"""One what-if from plan to prediction: lower, price, play, and the same for the plain residual.

Every arrow is a pure function::

    PlanSpec -> Program -> CostTable -> Timeline -> breakdown and memory

The baseline is the same plan with the plain residual, lowered and played like any other plan; the
overhead is the difference of two simulations, never an assumed figure. The two are played side by
side on two cores; the baselines that were played last are kept, since another n or another
recompute block has the same.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.spec import SpecError
from mhcplan.profiles.lookup import cost_model_of
from mhcplan.profiles.power import slowdown, slowed
from mhcplan.profiles.store import find_profile
from mhcplan.sim.breakdown import breakdown
from mhcplan.sim.jit import MISSING_NUMBA, has_numba
from mhcplan.sim.kept import Kept
from mhcplan.sim.memory import memory_of

if TYPE_CHECKING:
    from mhcplan.planner.plan.spec import Engine, PlanSpec
    from mhcplan.profiles.costs import Cost
    from mhcplan.profiles.lookup import CostModel
    from mhcplan.profiles.schema import Profile
    from mhcplan.sim.breakdown import Breakdown
    from mhcplan.sim.memory import Memory
    from mhcplan.sim.program import CostTable, Program
    from mhcplan.sim.timeline import Timeline


@dataclass(frozen=True)
class Step:
    """A simulated training step.

    Attributes:
        costs: what each of the program's cost keys costs, with source and spread.
        played, table: the program and its costs as the engine played them. Because of the power
            limit arithmetic takes longer than in ``costs``, on each rank by its own clock: ranks
            have cost keys of their own. Up to ``clock`` times, on the slowest.
    """

    program: Program
    costs: tuple[Cost, ...]
    played: Program
    table: CostTable
    timeline: Timeline
    memory: Memory
    breakdown: Breakdown
    clock: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """A plan's step beside its baseline's.

    Attributes:
        recompute_block: L_r in sites as ``auto`` or ``stage`` was resolved, None for no recompute.
    """

    plan: PlanSpec
    profile: Profile
    recompute_block: int | None
    step: Step
    baseline: Step

    @property
    def overhead_percent(self) -> float:
        """Step time over the baseline's, minus 1, in percent."""
        return 100 * (self.step.timeline.step_ns / self.baseline.timeline.step_ns - 1)


def predict(plan: PlanSpec, profile: Profile | None = None) -> Prediction:
    """Predict a plan's step and its baseline's.

    Args:
        plan: what to run.
        profile: what ops cost; None finds the one that the plan names.

    Raises:
        SpecError: the plan's engine cannot run here.
        ProfileError: the profile cannot be read, or prices an op neither by measurement nor near
            one (:class:`mhcplan.profiles.costs.CostMissing`).
    """
    profile = profile or find_profile(plan.profile)
    model = cost_model_of(profile)
    block = resolve_recompute_block(plan)
    if plan.residual.is_plain:
        step = play(plan, model, block)
        return Prediction(plan, profile, block, step, step)
    with ThreadPoolExecutor(1) as other_core:  # machine code runs without the GIL
        baseline = other_core.submit(_baseline_step, plan.baseline(), model)
        step = play(plan, model, block)
        return Prediction(plan, profile, block, step, baseline.result())


def _baseline_step(baseline: PlanSpec, model: CostModel) -> Step:
    key = baseline.digest(), model.profile.digest
    return _baselines.find(key, lambda: play(baseline, model, None))


def forget_baselines() -> None:
    """Keep no baseline."""
    _baselines.forget()


_baselines: Kept[Step] = Kept(1 << 17, lambda step: step.program.num_ops)


def play(plan: PlanSpec, model: CostModel, recompute_block: int | None) -> Step:
    """Lower, price and simulate one plan."""
    program = lower(plan, recompute_block)
    model = model.with_network(plan.network_speed)
    costs, table = (
        model.costs(program.cost_keys, plan.gpu), model.table(program.cost_keys, plan.gpu)
    )  # fmt: skip
    played, table, timeline, clock = settle(plan, program, table, model.profile)
    return Step(
        program, costs, played, table, timeline, memory_of(program, table),
        breakdown(program, timeline), clock,
    )  # fmt: skip


def settle(
    plan: PlanSpec, program: Program, table: CostTable, profile: Profile
) -> tuple[Program, CostTable, Timeline, float]:
    """Play a step at the clocks that the power limit leaves its GPUs.

    The step is played at the full clock first, which says what it would draw. That takes as long
    as the second play, and nothing cheaper was near enough. Over presets and schedules the clock of
    the slowest rank would be off by up to 0.0028 if learned from 4 P microbatches whose middle
    third stands for the rest, by 0.0020 from 8 P, by 0.0038 from the first half of the step, by
    0.026 from two fifths of it and the longest path beyond, by 0.013 from the longest path whose
    ops take as much longer as those of equal cost in 2 P microbatches (0.008 in 3 P); 0.0015 is
    0.1 % of a step. The step's length alone, carried on from 3 P and 4 P microbatches, is within
    0.1 %, but at M = 8 P those are as many as the whole step has, nearly.

    Returns:
        The program and the table that were played, their Timeline, and how many times as long
        arithmetic takes on the rank that is slowed most.
    """
    timeline = simulate(program, table, plan.engine)
    if plan.power == "unlimited" or profile.power_model is None:
        return program, table, timeline, 1.0
    factor, arithmetic = slowdown(program, table, timeline, profile.power_model)
    clock = float(factor.max(initial=1.0))
    if clock > 1.0:
        program, table = slowed(program, table, arithmetic, factor)
        timeline = simulate(program, table, plan.engine)
    return program, table, timeline, clock


def simulate(program: Program, costs: CostTable, engine: Engine) -> Timeline:
    """Play a Program with one of the two engines, which give the same Timeline.

    Raises:
        SpecError: the compiled engine needs numba, which is missing.
    """
    if engine == "simpy":
        from mhcplan.sim.engine import simulate as simulate_simpy  # slow to import

        return simulate_simpy(program, costs)
    if not has_numba():
        raise SpecError(f"engine=compiled cannot run, engine=simpy can: {MISSING_NUMBA}")
    from mhcplan.sim.compiled import simulate_compiled

    return simulate_compiled(program, costs)
