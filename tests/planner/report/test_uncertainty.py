"""Intervals: as wide as the spread makes them, the same twice, honest about what is missing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import Prediction, Step, predict
from mhcplan.planner.report import uncertainty
from mhcplan.planner.report.make import make_report
from mhcplan.planner.report.text import certainty, remarks
from mhcplan.planner.report.uncertainty import (
    ModelErrors,
    intervals,
    measured_errors,
    rows_that_judge,
    step_ratios,
)
from mhcplan.profiles.accuracy import shipped_rows
from mhcplan.profiles.costs import Cost
from tests.support.programs import Maker
from tests.support.synthetic_profile import synthetic_profile

PLAN = {"model": "mhc-3b", "layout": {"pp": 2}, "microbatches": 4}


@cache
def small() -> Prediction:
    return predict(make_plan(PLAN), synthetic_profile())


def spread(step: Step, percent: float) -> Step:
    """The step with this spread of every op."""
    return replace(step, costs=tuple(replace(c, spread_percent=percent) for c in step.costs))


def varied(percent: float) -> Prediction:
    both = small()
    return replace(both, step=spread(both.step, percent), baseline=spread(both.baseline, percent))


def test_ops_that_do_not_vary_make_no_interval() -> None:
    found = intervals(varied(0), ModelErrors())
    assert found.step_time_ns == (small().step.timeline.step_ns,) * 2
    assert found.overhead_percent == pytest.approx((small().overhead_percent,) * 2)
    assert "100.0 % of op time has no recorded spread" in found.notes


def test_equal_input_gives_equal_intervals_around_the_answer() -> None:
    found = intervals(varied(5), ModelErrors())
    assert found == intervals(varied(5), ModelErrors())
    low, high = found.step_time_ns
    assert low < small().step.timeline.step_ns < high


def test_twice_the_spread_is_twice_the_interval() -> None:
    (low, high), (lower, higher) = (
        intervals(varied(p), ModelErrors()).step_time_ns for p in (1, 2)
    )
    assert higher - lower == pytest.approx(2 * (high - low), rel=0.2)


def test_a_factor_of_the_whole_run_scales_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "COMMON_SHARE", 1.0)
    sigmas = np.array([-2.0, 0.0, 1.0, 3.0])
    found = step_ratios(
        spread(small().step, 1.2816), np.stack([sigmas, sigmas], axis=1), np.random.default_rng(1)
    )
    # the host's time, which does not vary, is hidden but for the first ops of the step
    assert found == pytest.approx(1 + sigmas / 100, rel=2e-4)


def test_jitter_of_a_chain_adds_up_as_variances_do() -> None:
    """One rank, one stream: the step is the sum of its ops, so its variance is the sum of theirs.

    Half of it, as the other half is common to the run, and here switched off.
    """
    plan = make_plan(
        {"model": "mhc-3b", "layout": {"pp": 1, "ep": 1}, "microbatches": 1, "schedule": "1f1b",
         "residual": {"kind": "plain"}}
    )  # fmt: skip
    step = spread(predict(plan, synthetic_profile()).step, 10 * 1.2816)
    ns = step.table.duration_ns[step.played.cost].astype(float)
    expected = 0.1 * np.sqrt(0.5 * (ns**2).sum()) / ns.sum()
    found = step_ratios(step, np.zeros((300, 2)), np.random.default_rng(1))
    assert found.std() == pytest.approx(expected, rel=0.2)
    assert found.mean() == pytest.approx(1, abs=5 * expected / np.sqrt(300))


def test_members_of_a_transfer_see_one_jitter() -> None:
    """One all-to-all of 16 ranks: with a jitter each, the step would be the longest of 16."""
    maker = Maker(16)
    group = maker.group("ep", *range(16))
    for rank in range(16):
        maker.transfer(rank, group, 1_000_000)
    program, table = maker.build()
    cost = Cost(1_000_000, 0, "measured", "", spread_percent=10 * 1.2816)
    costs = (cost,) * len(program.cost_keys)
    step = replace(small().step, program=program, played=program, table=table, costs=costs)
    found = step_ratios(step, np.zeros((300, 2)), np.random.default_rng(1))
    assert found.mean() == pytest.approx(1, abs=0.02)
    assert found.std() == pytest.approx(0.1 * np.sqrt(0.5), rel=0.2)


def test_the_models_own_error_comes_on_top() -> None:
    prediction = varied(0)
    step_ns = prediction.step.timeline.step_ns
    errors = ModelErrors(step=(1.1,), overhead_points=(2.0,), memory=(1.5,))
    found = intervals(prediction, errors)
    assert found.num_measured_runs == 1
    assert found.step_time_ns == pytest.approx((1.1 * step_ns,) * 2)
    assert found.overhead_percent == pytest.approx((prediction.overhead_percent + 2,) * 2)
    device_bytes = make_report(prediction, "").device_memory_bytes
    assert found.device_memory_bytes == pytest.approx((1.5 * device_bytes,) * 2)
    assert found.out_of_memory_percent == 0
    assert not any("own error" in note for note in found.notes)


def test_risk_of_running_out_is_the_share_of_draws_beyond_the_limit() -> None:
    need = make_report(small(), "").device_memory_bytes
    plan = make_plan(PLAN | {"memory_limit_bytes": round(1.2 * need)})
    prediction = predict(plan, synthetic_profile())
    errors = ModelErrors(memory=(0.9, 1.0, 1.1, 1.3))
    risk = intervals(prediction, errors).out_of_memory_percent
    assert risk is not None
    assert 5 < risk < 50  # one in four, of 32 draws
    assert intervals(prediction, ModelErrors(memory=(1.3,))).out_of_memory_percent == 100


def test_memory_that_runs_always_exceeded_is_said_as_its_interval_leaves_the_answer_out() -> None:
    def notes(*memory: float) -> str:
        return "\n".join(intervals(small(), ModelErrors(memory=memory)).notes)

    assert "memory: every measured run needed more than predicted, 0.5 to 2.1 %" in notes(
        1.005, 1.01, 1.021
    )
    assert "every measured run needed less than predicted, 1.0 to 20.0 %" in notes(0.8, 0.99)
    assert "every measured run" not in notes(0.99, 1.01)
    assert "every measured run" not in notes()


def test_what_is_missing_is_said() -> None:
    report = make_report(small(), "", intervals(varied(1), ModelErrors()))
    line = certainty(report)
    assert line.startswith("90 % interval: step ")
    assert "the model's own error is not measured yet" in line
    assert "GB" not in line
    assert any("assumed: 50% of the variance" in remark for remark in remarks(report))
    sure = make_report(small(), "", intervals(varied(1), ModelErrors((1.0,), (0.0,), (1.0,))))
    assert "GB, 0 % risk of running out of memory" in certainty(sure)
    assert "measured in 1 run)" in certainty(sure)


def test_nobody_asked() -> None:
    report = make_report(small(), "")
    assert report.intervals is None
    assert certainty(report) == ""
    assert remarks(report) == report.warnings


@dataclass(frozen=True)
class MadeUpRow:
    """Errors of a measured run: predicted against measured."""

    step: float
    memory: float
    overhead: float | None
    machine_factor: float = 1.0
    machine: str = "the first"

    def step_error_percent(self) -> float:
        return self.step

    def memory_error_percent(self, kind: str) -> float:
        assert kind == "reserved"
        return self.memory

    def overhead_error_points(self) -> float | None:
        return self.overhead


def test_errors_of_measured_runs_correct_the_prediction() -> None:
    """A run that took 1 / 0.9 of what was predicted makes the next prediction that much longer."""
    found = measured_errors([MadeUpRow(-10, 25, 2), MadeUpRow(0, 0, None)])
    assert found.step == pytest.approx((1 / 0.9, 1))
    assert found.memory == pytest.approx((0.8, 1))
    assert found.overhead_points == (-2,)
    assert found.machines == (1, 1)
    assert measured_errors([]) == ModelErrors()


def test_a_machine_counts_once_however_many_rows_it_ran() -> None:
    """The profile's own is the first; a fast machine's rows do not push the answer out."""
    first = [MadeUpRow(1, 0, None, factor) for factor in (0.97, 0.98, 0.99)]
    found = measured_errors([*first, MadeUpRow(-1, 0, None, 1.05, "the second")])
    assert found.machines == (1, 0.98, 1.05)
    prediction = small()
    low, high = intervals(
        prediction, ModelErrors((1.0,), (0.0,), (1.0,), found.machines)
    ).step_time_ns
    answer = prediction.step.timeline.step_ns
    assert low == pytest.approx(0.98 * answer, rel=0.01)
    assert high == pytest.approx(1.05 * answer, rel=0.01)


def test_only_the_newest_measurement_of_a_row_is_the_models_own_error() -> None:
    """And no row that tries a setting which hardly any plan has."""
    rows = shipped_rows()
    judging = rows_that_judge(rows)
    names = [row.claim.row for row in judging]
    assert len(set(names)) == len(names) < len(rows)
    for row in judging:
        of_row = [each.measured.measured for each in rows if each.claim.row == row.claim.row]
        assert row.measured.measured == max(of_row)
    assert not any(name.startswith("ablation-") for name in names)
    assert intervals(small()).num_measured_runs == len(judging)
