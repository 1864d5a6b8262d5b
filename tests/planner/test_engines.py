"""Both engines on lowered plans: the same times, causes and reports."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

import mhcplan.planner.predict as predict_module
from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan
from mhcplan.planner.predict import predict, simulate
from mhcplan.planner.report.make import make_report
from mhcplan.planner.schedules.catalogue import SCHEDULES
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.presets import MODELS
from mhcplan.profiles.store import find_profile
from mhcplan.sim.mirror import half_of
from tests.support.synthetic_profile import TOKENS, make_synthetic_profile, synthetic_profile

if TYPE_CHECKING:
    from mhcplan.sim.program import CostTable, Program

COLUMNS = ("issue_ns", "start_ns", "end_ns", "cause", "reason")


@cache
def costs_of(model: str) -> CostModel:
    if model.startswith("mhc"):
        return CostModel(synthetic_profile())
    return CostModel(make_synthetic_profile([model], TOKENS))


def lowered(plan: PlanSpec) -> tuple[Program, CostTable]:
    program = lower(plan, resolve_recompute_block(plan))
    return program, costs_of(plan.model.name).table(program.cost_keys)


def assert_equal(program: Program, costs: CostTable) -> None:
    expected, found = (simulate(program, costs, name) for name in ("simpy", "compiled"))
    for name in COLUMNS:
        assert np.array_equal(getattr(expected, name), getattr(found, name)), name
    assert expected.step_ns > 0


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_equal_on_every_preset_and_schedule(model: str, schedule: str) -> None:
    plan = make_plan({"model": model, "layout": {"pp": 4}, "schedule": schedule, "microbatches": 8})
    assert_equal(*lowered(plan))
    assert_equal(*lowered(plan.baseline()))


@pytest.mark.parametrize(
    "changes",
    [
        {"priority": "none"},
        {"priority": "recompute"},
        {"priority": "all"},
        {"p2p": "grouped"},
        {"p2p": "grouped", "comm_streams": "one"},
        {"overlap_recompute": False},
        {"layout": {"pp": 4, "ep": 4, "dp": 4}},
        {"layout": {"pp": 4, "ep": 8, "gpus_per_node": 4}},
        {"residual": {"kind": "hc", "expansion_rate": 2}},
    ],
    ids=str,
)
def test_equal_on_every_way_to_lay_a_plan_out(changes: dict[str, object]) -> None:
    base = {"model": "mhc-9b", "layout": {"pp": 4, "ep": 8}, "microbatches": 12}
    assert_equal(*lowered(make_plan(base | changes)))


@cache
def measured_costs() -> CostModel:
    return CostModel(find_profile("h100-sxm"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"schedule": schedule} for schedule in sorted(SCHEDULES)),
        {"p2p": "grouped", "priority": "all"},
        {"p2p": "grouped", "comm_streams": "one"},
        {"layout": {"pp": 8, "ep": 1, "dp": 2}, "microbatches": 16},
        {"comm_priority": "high", "attention": "preemptible"},
        {"compute_sms": 112, "comm_ctas": 20},
        {"max_connections": 1},
    ],
    ids=str,
)
def test_equal_with_contention(changes: dict[str, object]) -> None:
    base = {"model": "mhc-9b", "layout": {"pp": 4, "ep": 8}, "microbatches": 8}
    plan = make_plan(base | changes)
    program = lower(plan, resolve_recompute_block(plan))
    costs = measured_costs().table(program.cost_keys, plan.gpu)
    assert costs.loads is not None
    assert (half_of(program, costs) is not None) == (plan.schedule == "dualpipe")
    assert_equal(program, costs)
    alone = measured_costs().table(program.cost_keys)
    assert simulate(program, costs, "compiled").step_ns > simulate(
        program, alone, "compiled"
    ).step_ns  # fmt: skip


def test_equal_where_hosts_wait() -> None:
    program, costs = lowered(make_plan({"model": "mhc-3b", "layout": {"pp": 2}, "microbatches": 8}))
    program.host_sync[::97] = True
    assert_equal(program, costs)


def test_reports_differ_in_the_engine_only() -> None:
    base = {"model": "mhc-3b", "layout": {"pp": 2, "ep": 8}, "microbatches": 8}
    reports = [
        make_report(predict(make_plan(base | {"engine": name}), synthetic_profile()), "command")
        for name in ("simpy", "compiled")
    ]
    fields = [report.model_dump(exclude={"plan", "plan_digest", "engine"}) for report in reports]
    assert fields[0] == fields[1]
    assert [report.engine for report in reports] == ["simpy", "compiled"]


def test_without_numba_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_module, "has_numba", lambda: False)
    plan = make_plan({"model": "mhc-3b", "layout": {"pp": 2}, "microbatches": 8})
    with pytest.raises(SpecError, match=r"engine=simpy can: .* pip install numba"):
        predict(plan, synthetic_profile())
    slow = predict(plan.model_copy(update={"engine": "simpy"}), synthetic_profile())
    assert slow.step.timeline.step_ns > 0
