"""What would help: the same step with one thing otherwise, each simulated, none estimated.

Two kinds. *Free* and *faster*: the plan's own program with some ops at another cost, such as all
mHC kernels at no time; it bounds what work on these ops could buy. *Plan*: another plan, one field
away, as ``predict --set`` would play it. A plan that is not legal, or that the profile cannot
price, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from mhcplan.planner.plan_file import changed_plan
from mhcplan.planner.predict import play, simulate
from mhcplan.planner.recompute import resolve_recompute_block
from mhcplan.planner.spec import Priority, ScheduleName, SpecError
from mhcplan.profiles.costs import CostMissing, cost_table
from mhcplan.profiles.lookup import CostModel
from mhcplan.sim.memory import memory_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from mhcplan.planner.predict import Prediction, Step
    from mhcplan.profiles.costs import Cost
    from mhcplan.profiles.schema import Overheads
    from mhcplan.sim.program import CostTable, Program

    Mask = NDArray[np.bool_]

Kind = Literal["free", "faster", "plan"]


@dataclass(frozen=True)
class Counterfactual:
    """One thing otherwise.

    Attributes:
        name: what is otherwise, in words; of a plan ``field=value``.
        step_ns: the step, simulated.
        tokens: that the whole job trains in it.
        device_bytes: memory that the fullest rank needs.
    """

    name: str
    kind: Kind
    step_ns: int
    tokens: int
    device_bytes: int


def counterfactuals(prediction: Prediction) -> Iterator[Counterfactual]:
    """Simulate every counterfactual that changes the step at all, in no order of merit."""
    yield from _other_costs(prediction)
    yield from _other_plans(prediction)


# -- the same program, other costs ----------------------------------------------------------------


def _free(cost: Cost) -> Cost:
    return replace(cost, duration_ns=0, host_ns=0, segments=())


def _twice_as_fast(cost: Cost) -> Cost:
    return replace(cost, duration_ns=math.ceil(cost.duration_ns / 2))


def _issued_at_once(cost: Cost) -> Cost:
    return replace(cost, host_ns=0)


def _other_costs(prediction: Prediction) -> Iterator[Counterfactual]:
    plan, step = prediction.plan, prediction.step
    program = step.program
    transfers = program.group >= 0
    cases: tuple[tuple[str, Kind, Mask, Callable[[Cost], Cost]], ...] = (
        ("mHC kernels free", "free", _of_category(program, "mhc"), _free),
        ("recompute free", "free", _of_category(program, "recompute"), _free),
        ("expert traffic free", "free", _of_traffic(program, "ep"), _free),
        ("pipeline messages free", "free", _of_traffic(program, "pp"), _free),
        ("gradient traffic free", "free", _of_traffic(program, "dp"), _free),
        ("optimizer free", "free", _of_category(program, "optimizer"), _free),
        ("network twice as fast", "faster", transfers, _twice_as_fast),
        ("host free", "free", np.ones(program.num_ops, np.bool_), _issued_at_once),
    )
    for name, kind, ops, change in cases:
        if ops.any():
            changed = changed_costs(step, ops, change, prediction.profile.overheads)
            timeline = simulate(*changed, plan.engine)
            yield Counterfactual(
                name, kind, timeline.step_ns, plan.tokens_per_step, _device_bytes(step)
            )


def changed_costs(
    step: Step, ops: Mask, change: Callable[[Cost], Cost], overheads: Overheads
) -> tuple[Program, CostTable]:
    """The step's program and costs with ``change`` made to the cost of ``ops`` and no others.

    Ops of different classes may share a cost, so those in ``ops`` get cost keys of their own.
    """
    program = step.program
    affected = np.unique(program.cost[ops])
    renumbered = np.arange(len(step.costs))
    renumbered[affected] = len(step.costs) + np.arange(len(affected))
    cost = np.where(ops, renumbered[program.cost], program.cost).astype(program.cost.dtype)
    numbers: list[int] = affected.tolist()
    keys = (*program.cost_keys, *(f"{program.cost_keys[i]} changed" for i in numbers))
    costs = (*step.costs, *(change(step.costs[i]) for i in numbers))
    return replace(program, cost=cost, cost_keys=keys), cost_table(costs, overheads)


def _of_category(program: Program, name: str) -> Mask:
    chosen = np.array([category == name for category in program.categories], np.bool_)
    return chosen[program.category] & (program.group < 0)


def _of_traffic(program: Program, name: str) -> Mask:
    chosen = np.array([group.name.startswith(name) for group in program.groups] + [False], np.bool_)
    return chosen[program.group]  # the last entry is for compute ops: their group is -1


# -- other plans ----------------------------------------------------------------------------------


def _other_plans(prediction: Prediction) -> Iterator[Counterfactual]:
    model = CostModel(prediction.profile)
    for path, value in _one_field_away(prediction):
        try:
            plan = changed_plan(prediction.plan.model_dump(mode="json"), {path: value})
            step = play(plan, model, resolve_recompute_block(plan))
        except (SpecError, CostMissing):
            continue
        yield Counterfactual(
            f"{path}={value}", "plan", step.timeline.step_ns, plan.tokens_per_step,
            _device_bytes(step),
        )  # fmt: skip


def _one_field_away(prediction: Prediction) -> Iterator[tuple[str, object]]:
    plan = prediction.plan
    if not plan.residual.is_plain:
        if prediction.recompute_block:
            yield "residual.recompute_block", "none"
        for priority in get_args(Priority):
            if priority != plan.priority:
                yield "priority", priority
    for schedule in get_args(ScheduleName):
        if schedule != plan.schedule:
            yield "schedule", schedule
    yield "microbatches", 2 * plan.microbatches


def _device_bytes(step: Step) -> int:
    rows = memory_report(step.program, step.table, step.memory)
    return max(row["device_bytes"] for row in rows)
