"""The whole what-if on small plans: physics that must hold whatever the profile says."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.predict import Prediction, forget_baselines, predict
from mhcplan.planner.schedules.catalogue import SCHEDULES
from mhcplan.profiles.costs import CostMissing
from mhcplan.sim.check import check
from tests.support.programs import assert_same
from tests.support.scaling import scaled
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from mhcplan.profiles.schema import Profile


@cache
def profile() -> Profile:
    return synthetic_profile()


def plan(**changes: object) -> PlanSpec:
    """The paper's 9B model on a small pipeline."""
    base: dict[str, object] = {
        "model": "mhc-9b",
        "layout": {"pp": 4, "ep": 8},
        "microbatches": 8,
    }
    return make_plan(base | changes)


def run(**changes: object) -> Prediction:
    return predict(plan(**changes), profile())


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_runs_sound_and_returns_its_memory(schedule: str) -> None:
    prediction = run(schedule=schedule)
    for step in (prediction.step, prediction.baseline):
        assert check(step.program) == []
        assert np.array_equal(step.memory.left_bytes, step.program.static_bytes)
        assert step.breakdown.ns.sum(axis=1).tolist() == [step.timeline.step_ns] * 4
    assert prediction.overhead_percent > 0


def test_doubling_the_profile_doubles_the_step() -> None:
    """No number hides in the code: every nanosecond comes from the profile."""
    once = run()
    twice = predict(plan(), scaled(profile(), 2))
    assert twice.step.timeline.step_ns == pytest.approx(2 * once.step.timeline.step_ns, rel=1e-6)
    assert twice.overhead_percent == pytest.approx(once.overhead_percent, abs=1e-4)


def test_n_1_costs_nothing_and_keeps_nothing() -> None:
    one = run(residual={"expansion_rate": 1})
    assert one.overhead_percent == 0
    assert one.recompute_block is None
    assert np.array_equal(one.step.memory.peak_bytes, one.baseline.memory.peak_bytes)


def test_hc_needs_no_sinkhorn_and_says_that_it_is_priced_as_mhc() -> None:
    hc = run(residual={"kind": "hc", "recompute_block": "none"})
    assumed = [cost for cost in hc.step.costs if cost.source == "assumed" and cost.ctas is None]
    assert assumed
    assert hc.overhead_percent > 0


def test_a_kept_baseline_is_the_one_that_would_be_played() -> None:
    forget_baselines()
    first, second = run(residual={"expansion_rate": 2}), run(residual={"expansion_rate": 4})
    assert second.baseline is first.baseline
    forget_baselines()
    assert_same(run(residual={"expansion_rate": 4}).baseline.timeline, second.baseline.timeline)
    other = run(residual={"expansion_rate": 4}, microbatches=10).baseline
    assert other.program.num_ops > second.baseline.program.num_ops
    other = predict(plan(), scaled(profile(), 2)).baseline
    assert other.timeline.step_ns > second.baseline.timeline.step_ns


def test_overhead_grows_with_the_number_of_rows() -> None:
    overheads = [run(residual={"expansion_rate": n}).overhead_percent for n in (1, 2, 4, 8)]
    assert overheads == sorted(overheads)
    assert overheads[3] > overheads[1] > 0


def test_recompute_trades_time_for_memory() -> None:
    none = run(residual={"recompute_block": "none"})
    auto = run(residual={"recompute_block": "auto"})
    peaks = [p.step.memory.peak_bytes.sum(axis=1).max() for p in (none, auto)]
    assert peaks[1] < peaks[0]
    assert auto.step.breakdown.reported["recompute"] > 0
    assert none.step.breakdown.reported["recompute"] == 0


def test_auto_block_has_the_least_predicted_peak() -> None:
    auto = run()
    peaks = {
        block: run(residual={"recompute_block": block}).step.memory.peak_bytes.sum(axis=1).max()
        for block in range(1, 11)
    }
    chosen = auto.step.memory.peak_bytes.sum(axis=1).max()
    assert chosen <= 1.005 * min(peaks.values()), (auto.recompute_block, peaks)


def test_a_shape_far_outside_the_profile_is_refused_by_name() -> None:
    far = plan(seq_len=1 << 18)
    with pytest.raises(CostMissing, match=r"tokens"):
        predict(far, profile())


@settings(max_examples=15, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    pp=st.sampled_from([2, 4]),
    n=st.sampled_from([1, 2, 4]),
    priority=st.sampled_from(["none", "post", "recompute", "all"]),
    block=st.sampled_from(["none", "stage", 3]),
    overlap=st.booleans(),
)
def test_programs_of_legal_plans_are_sound(
    schedule: str, pp: int, n: int, priority: str, block: str | int, overlap: bool
) -> None:
    prediction = run(
        schedule=schedule,
        layout={"pp": pp, "ep": 8},
        residual={"expansion_rate": n, "recompute_block": block},
        priority=priority,
        overlap_recompute=overlap,
    )
    step = prediction.step
    assert check(step.program) == []
    assert step.timeline.step_ns >= step.breakdown.ns[:, :4].sum(axis=1).max()
