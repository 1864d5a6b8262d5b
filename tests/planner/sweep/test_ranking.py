"""The fast estimate against the prediction that it stands for."""

from __future__ import annotations

import pytest

from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.predict import predict
from mhcplan.planner.report.make import make_report
from mhcplan.planner.schedules.catalogue import SCHEDULES
from mhcplan.planner.sweep.ranking import Estimate, Refusal, estimate
from tests.support.synthetic_profile import synthetic_profile


def plan(**changes: object) -> PlanSpec:
    base: dict[str, object] = {"model": "mhc-9b", "layout": {"pp": 4, "ep": 8}, "microbatches": 8}
    return make_plan(base | changes)


def estimated(*plans: PlanSpec) -> list[Estimate]:
    found = list(estimate(plans, synthetic_profile()))
    estimates = [entry for entry in found if isinstance(entry, Estimate)]
    assert len(estimates) == len(plans), found
    return estimates


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_time_is_bounded_from_below_and_memory_is_exact(schedule: str) -> None:
    [found] = estimated(plan(schedule=schedule))
    report = make_report(predict(found.plan, synthetic_profile()), "")
    assert 0.8 * report.step_time_ns < found.step_time_ns <= report.step_time_ns
    assert found.baseline_step_time_ns <= report.baseline_step_time_ns
    assert found.overhead_percent > 0
    assert found.recompute_block == report.recompute_block
    assert found.peak_memory_bytes == report.peak_memory_bytes
    assert found.device_bytes == max(rank.device_bytes for rank in report.memory)
    assert found.fits == report.fits


def test_a_plan_that_cannot_be_priced_is_a_value_and_stops_no_other() -> None:
    plans = [plan(), plan(seq_len=1 << 18), plan(residual={"expansion_rate": 2})]
    first, refused, last = estimate(plans, synthetic_profile())
    assert isinstance(refused, Refusal)
    assert refused.plan == plans[1]
    assert "tokens" in refused.reason
    assert isinstance(first, Estimate)
    assert isinstance(last, Estimate)
    assert last.overhead_percent < first.overhead_percent


def test_the_memory_limit_of_a_plan_beats_the_machine_s() -> None:
    wide, tight = estimated(plan(), plan(memory_limit_bytes="10GB"))
    assert wide.fits
    assert not tight.fits
    assert tight.memory_limit_bytes == 10**10
