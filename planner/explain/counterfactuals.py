"""What would help: the same step with one thing otherwise, each simulated, none estimated.

Two kinds. *Free* and *faster*: the plan's own program with some ops at another cost, such as all
mHC kernels at no time; it bounds what work on these ops could buy. What is free puts nothing on a
GPU either, so what it did to others by contention goes with it. *Plan*: another plan, one field
away, as ``predict --set`` would play it. A plan that is not legal, or that the profile cannot
price, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.file import changed_plan
from mhcplan.planner.plan.spec import PlanSpec, SpecError
from mhcplan.planner.predict import play, settle
from mhcplan.profiles.costs import CostMissing
from mhcplan.profiles.lookup import cost_model_of
from mhcplan.profiles.vocabulary import NO_COST
from mhcplan.sim.memory import memory_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mhcplan.planner.predict import Prediction, Step
    from mhcplan.sim.device_kernels import Loads, Traffic
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


@dataclass(frozen=True)
class Change:
    """What some ops cost instead, as a factor of what they cost: on the stream, and to the host."""

    time: float = 1.0
    host: float = 1.0


FREE = Change(time=0, host=0)
TWICE_AS_FAST = Change(time=0.5)
ISSUED_AT_ONCE = Change(host=0)


def _other_costs(prediction: Prediction) -> Iterator[Counterfactual]:
    plan, step = prediction.plan, prediction.step
    program = step.program
    transfers = program.group >= 0
    everything = np.ones(program.num_ops, np.bool_)
    # what is otherwise also decides which clock the power limit leaves
    model = cost_model_of(prediction.profile)
    full_clock = model.with_network(plan.network_speed).table(program.cost_keys, plan.gpu)
    cases: tuple[tuple[str, Kind, Mask, Change], ...] = (
        ("mHC kernels free", "free", _of_category(program, "mhc"), FREE),
        ("recompute free", "free", _of_category(program, "recompute"), FREE),
        ("expert traffic free", "free", _of_traffic(program, "ep"), FREE),
        ("pipeline messages free", "free", _of_traffic(program, "pp"), FREE),
        ("gradient traffic free", "free", _of_traffic(program, "dp"), FREE),
        ("optimizer free", "free", _of_category(program, "optimizer"), FREE),
        ("network twice as fast", "faster", transfers, TWICE_AS_FAST),
        ("host free", "free", everything, ISSUED_AT_ONCE),
    )
    for name, kind, ops, change in cases:
        if ops.any():
            changed = changed_costs(program, full_clock, ops, change)
            timeline = settle(plan, *changed, prediction.profile)[2]
            yield Counterfactual(
                name, kind, timeline.step_ns, plan.tokens_per_step, device_bytes(step)
            )
    if step.clock > 1:
        cold = plan.model_copy(update={"power": "unlimited"})
        cool = play(cold, model, prediction.recompute_block)
        yield Counterfactual(
            "no power limit", "free", cool.timeline.step_ns, plan.tokens_per_step,
            device_bytes(step),
        )  # fmt: skip


def changed_costs(
    program: Program, table: CostTable, ops: Mask, change: Change
) -> tuple[Program, CostTable]:
    """The program and its costs with ``change`` made to the cost of ``ops`` and of no others.

    Ops of different classes may share a cost, so those in ``ops`` get costs of their own; what is
    free computes nothing, which its key says.
    """
    affected = np.unique(program.cost[ops])
    renumbered = np.arange(len(program.cost_keys))
    renumbered[affected] = len(program.cost_keys) + np.arange(len(affected))
    cost = np.where(ops, renumbered[program.cost], program.cost).astype(program.cost.dtype)
    numbers: list[int] = affected.tolist()
    same = (program.cost_keys[i] if change.time else NO_COST for i in numbers)
    keys = (*program.cost_keys, *same)
    duration, host = table.duration_ns, table.host_ns
    more = replace(
        table,
        duration_ns=np.append(duration, _scaled(duration[affected], change.time)),
        host_ns=np.append(host, _scaled(host[affected], change.host)),
        workspace_bytes=np.append(table.workspace_bytes, table.workspace_bytes[affected]),
        loads=table.loads and _with_changed_loads(table.loads, numbers, change.time),
    )
    return program.renumbered(cost=cost, cost_keys=keys), more


def _scaled(ns: NDArray[np.int64], factor: float) -> NDArray[np.int64]:
    return np.ceil(ns * factor).astype(np.int64)


def _with_changed_loads(loads: Loads, affected: Sequence[int], time: float) -> Loads:
    """What ops that take ``time`` as long put on a GPU: nothing, if they take none."""
    kernels = (loads.kernels[i] if time else () for i in affected)
    traffic = (loads.traffic[i] for i in affected)
    faster = (load and _faster(load, time) for load in traffic)
    return replace(loads, kernels=(*loads.kernels, *kernels), traffic=(*loads.traffic, *faster))


def _faster(load: Traffic, time: float) -> Traffic:
    if not time:
        return replace(load, ctas=0, fixed_ns=0, chain_ns=0, sent_hbm_bytes=0,
                       received_hbm_bytes=0, link_share=0.0)  # fmt: skip
    return replace(load, fixed_ns=round(load.fixed_ns * time), chain_ns=round(load.chain_ns * time))


def _of_category(program: Program, name: str) -> Mask:
    chosen = np.array([category == name for category in program.categories], np.bool_)
    return chosen[program.category] & (program.group < 0)


def _of_traffic(program: Program, name: str) -> Mask:
    chosen = np.array([group.name.startswith(name) for group in program.groups] + [False], np.bool_)
    return chosen[program.group]  # the last entry is for compute ops: their group is -1


# -- other plans ----------------------------------------------------------------------------------

# fields with a few values each, all of which a trainer may choose
_CHOICES = (
    "schedule", "priority", "overlap_order", "p2p", "recompute_layers", "comm_priority",
    "attention",
)  # fmt: skip
_OF_MHC = ("priority",)


def _other_plans(prediction: Prediction) -> Iterator[Counterfactual]:
    model = cost_model_of(prediction.profile)
    for path, value in _one_field_away(prediction):
        try:
            plan = changed_plan(prediction.plan.model_dump(mode="json"), {path: value})
            step = play(plan, model, resolve_recompute_block(plan))
        except (SpecError, CostMissing):
            continue
        yield Counterfactual(
            f"{path}={value}", "plan", step.timeline.step_ns, plan.tokens_per_step,
            device_bytes(step),
        )  # fmt: skip


def _one_field_away(prediction: Prediction) -> Iterator[tuple[str, object]]:
    plan = prediction.plan
    if prediction.recompute_block:
        yield "residual.recompute_block", "none"
    for name in _CHOICES:
        if name in _OF_MHC and plan.residual.is_plain:
            continue
        for value in get_args(PlanSpec.model_fields[name].annotation):
            if value != getattr(plan, name):
                yield name, value
    yield "microbatches", 2 * plan.microbatches


def device_bytes(step: Step) -> int:
    """Memory that the fullest rank needs, all included."""
    rows = memory_report(step.program, step.table, step.memory)
    return max(row["device_bytes"] for row in rows)
