"""A report of a real prediction: every figure against the simulation that it comes from."""

from __future__ import annotations

from functools import cache

import mhcplan
from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import Prediction, predict
from mhcplan.planner.report.make import make_report
from mhcplan.profiles.schema import PowerModel
from mhcplan.sim.device import NOT_MODELLED
from tests.support.synthetic_profile import synthetic_profile

PLAN = {"model": "mhc-3b", "layout": {"pp": 2, "ep": 8}, "microbatches": 4}


@cache
def small() -> Prediction:
    return predict(make_plan(PLAN), synthetic_profile())


def test_times_are_those_of_the_two_simulations() -> None:
    report = make_report(small(), "mhcplan predict x")
    step, baseline = small().step.timeline.step_ns, small().baseline.timeline.step_ns
    assert (report.step_time_ns, report.baseline_step_time_ns) == (step, baseline)
    assert report.overhead_percent == 100 * (step / baseline - 1)
    assert report.command == "mhcplan predict x"
    assert report.mhcplan_version == mhcplan.__version__


def test_tokens_are_those_of_all_replicas() -> None:
    report = make_report(small(), "")
    tokens = 4 * 4096 * 8
    assert report.gpus == 16
    assert report.tokens_per_second == round(tokens * 1e9 / report.step_time_ns)


def test_digests_name_plan_and_profile() -> None:
    report = make_report(small(), "")
    assert report.plan_digest == small().plan.digest()
    assert report.profile_digest == synthetic_profile().digest


def test_memory_has_every_rank_and_the_limit_is_the_gpus_or_the_plans() -> None:
    report = make_report(small(), "")
    assert len(report.memory) == 2
    assert report.memory_limit_bytes == synthetic_profile().hardware.memory_bytes
    least = report.device_memory_bytes - 1
    tight = make_plan(PLAN | {"memory_limit_bytes": least})
    over = make_report(predict(tight, synthetic_profile()), "")
    assert report.fits
    assert not over.fits
    assert over.memory_limit_bytes == least
    assert over.memory == report.memory


def test_sources_are_weighed_by_time() -> None:
    report, step = make_report(small(), ""), small().step
    total = assumed = 0
    for op in step.program:
        cost = step.costs[step.program.cost_keys.index(op.cost_key)]
        total += cost.duration_ns
        assumed += cost.duration_ns * (cost.source == "assumed")
    assert assumed > 0
    assert abs(report.sources_percent.assumed - 100 * assumed / total) < 0.1


def test_warnings_say_what_is_assumed_and_what_is_simplified() -> None:
    warnings = make_report(small(), "").warnings
    assert any(w.startswith("mhc-3b: queries are not compressed") for w in warnings)
    assert any(w.startswith("assumed cost: ") for w in warnings)
    assert {f"simplified: {text}" for text in NOT_MODELLED} <= set(warnings)
    assert len(set(warnings)) == len(warnings)


def test_power_limit_is_in_the_figures_and_what_is_not_known_of_it_in_the_warnings() -> None:
    unknown = make_report(small(), "")
    assert unknown.power_slowdown_percent is unknown.baseline_power_slowdown_percent is None
    assert "profile h100-sxm does not say how the power limit" in "".join(unknown.warnings)

    limited = limited_prediction()
    report = make_report(limited, "")
    assert report.power_slowdown_percent == 100 * (limited.step.clock - 1) > 0
    assert report.baseline_power_slowdown_percent == 100 * (limited.baseline.clock - 1) > 0
    assert "assumed: what a GPU draws and how its clock follows: made up" in report.warnings
    assert not any("full clock" in w for w in report.warnings)

    report = make_report(limited_prediction(power="unlimited"), "")
    assert report.power_slowdown_percent is report.baseline_power_slowdown_percent is None
    assert report.step_time_ns == unknown.step_time_ns
    assert "simplified: GPUs run at their full clock, as the plan says" in report.warnings


def limited_prediction(**changes: str) -> Prediction:
    """On a made-up GPU whose limit any arithmetic passes."""
    power = PowerModel(
        source="assumed", citation="made up", limit_watts=300, idle_watts=100, active_watts=200,
        joules_per_tflop=0.5, free_watts=150, stretch=0.3, tflops=800,
    )  # fmt: skip
    profile = synthetic_profile().model_copy(update={"power_model": power})
    return predict(make_plan(PLAN | changes), profile)


def test_plain_plan_is_its_own_baseline() -> None:
    plain = make_plan(PLAN | {"residual": {"kind": "plain"}})
    report = make_report(predict(plain, synthetic_profile()), "")
    assert report.overhead_percent == 0
    assert report.recompute_block is None
    assert report.breakdown_ns == report.baseline_breakdown_ns
    assert report.breakdown_ns.mhc == report.breakdown_ns.recompute == 0
