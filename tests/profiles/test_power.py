"""The power limit: a made-up machine is found again, and a step slows as its loads say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import play
from mhcplan.profiles.lookup import CostModel, cost_model_of
from mhcplan.profiles.power import (
    Row,
    fit_power,
    read_rows,
    slowdown,
    slowed,
    steady_ns,
    steady_stretch,
)
from mhcplan.profiles.schema import PowerModel
from mhcplan.profiles.store import find_profile
from mhcplan.sim.timeline import Timeline
from tests.support.programs import Maker

LOGS = Path(__file__).parents[2] / "profiles" / "data" / "raw"
RAW = LOGS / "h100-sxm-power.jsonl"
MACHINE = PowerModel(
    source="measured", limit_watts=700, idle_watts=100, active_watts=500, joules_per_tflop=0.5,
    free_watts=600, stretch=0.3, tflops=800,
)  # fmt: skip
PLAN = make_plan({"model": "mhc-3b", "microbatches": 8, "layout": {"pp": 2, "ep": 1}})


def load(name: str, rate: float, rest: float = 0.0, machine: PowerModel = MACHINE) -> Row:
    """A load of ``rate`` TFLOP/s on a machine that is just as its model says."""
    cold = 1_000_000
    row = Row(name, 0, cold, 0.0, 0.0, 50.0, round(rate * cold * 1e3), 0, rest)
    busy = 0.0 if name == "idle" else 1 / (1 + rest)
    watts = machine.idle_watts + busy * (
        machine.active_watts - machine.idle_watts + machine.joules_per_tflop * rate
    )
    is_free = watts <= machine.free_watts
    period = cold * (1 + rest) * (1.0 if is_free else steady_stretch(row, machine))
    return row._replace(
        period_ns=round(period), watts=min(watts, machine.free_watts),
        clock_mhz=2000.0 if is_free else 1500.0,
    )  # fmt: skip


def test_a_machine_is_found_again_from_its_loads() -> None:
    rows = [load("idle", 0), *(load(f"gemm rest {r}", 800, r) for r in (4.0, 3.0, 1.0, 0.2, 0.0))]
    rows += [load(f"op {rate}", rate) for rate in (10, 450, 600, 700)]
    found = fit_power(rows, 700)
    assert found.free_watts == pytest.approx(MACHINE.free_watts, rel=1e-3)
    assert found.stretch == pytest.approx(MACHINE.stretch, rel=1e-3)
    assert found.active_watts == pytest.approx(MACHINE.active_watts, rel=0.01)
    assert found.joules_per_tflop == pytest.approx(MACHINE.joules_per_tflop, rel=0.01)
    assert found.error_percent < 0.1


@pytest.mark.parametrize("missing", ["idle", "gemm"])
def test_too_few_loads_are_refused(missing: str) -> None:
    rows = [load("idle", 0), load("gemm rest 4.0", 800, 4.0), load("gemm rest 0.0", 800)]
    with pytest.raises(ValueError, match="matrix products below and beyond"):
        fit_power([row for row in rows if not row.name.startswith(missing)], 700)


@pytest.mark.parametrize("profile", ["h100-sxm", "h200"])
def test_the_shipped_model_is_the_fit_of_the_shipped_rows(profile: str) -> None:
    rows = [row for row, _ in read_rows(LOGS / f"{profile}-power.jsonl")]
    model = find_profile(profile).power_model
    assert model is not None
    assert model == fit_power(rows, model.limit_watts)
    assert model.error_percent < 2.5
    for row in rows:
        assert steady_stretch(row, model) == pytest.approx(row.slowdown, abs=0.05), row.name


def test_a_log_becomes_the_model_of_a_profile_of_its_device(tmp_path: Path) -> None:
    power = pytest.importorskip("mhcplan.profiles.capture.power")
    shipped = find_profile("h100-sxm")
    bare = shipped.model_copy(update={"power_model": None})
    assert power.with_power(bare, RAW).power_model == shipped.power_model
    assert power.with_power(bare, tmp_path / "none").power_model is None
    cut = tmp_path / "cut.jsonl"
    text = RAW.read_text()
    cut.write_text(text[:-20])
    assert len(read_rows(cut)) == len(read_rows(RAW)) - 1
    cut.write_text(text.replace("H100", "H200"))
    assert power.with_power(bare, cut).power_model is None
    cut.write_text(text.splitlines()[0])  # idle alone says nothing
    assert power.with_power(bare, cut).power_model is None
    with pytest.raises(ValueError, match="the part power needs a CUDA device"):
        power.measure_power_part(cut, "cpu", 1.0)


@pytest.fixture(scope="module")
def shipped() -> PowerModel:
    model = find_profile("h100-sxm").power_model
    assert model is not None
    return model


@given(factor=st.floats(0.2, 4.0))
def test_more_work_in_the_same_time_is_slowed_more(shipped: PowerModel, factor: float) -> None:
    model = shipped
    keys = ["attention_mla.F heads=24 hidden=1920 kv_rank=512 nope=128 q_rank=0 rope=64 seq=4096"
            " tokens=4096 v=128"]  # fmt: skip
    fast, slow = steady_ns(keys, [500_000], model), steady_ns(keys, [round(5e5 * factor)], model)
    assert (slow / factor <= fast + 1) == (factor >= 1) or factor == pytest.approx(1, abs=1e-3)
    assert slow >= round(5e5 * factor) - 1


def test_the_clock_is_the_mean_over_the_arithmetic_of_its_windows() -> None:
    """Two windows of 50 ms, worked out by hand: one busy at 800 TFLOP/s, one at 600 for half of its
    time. The first would draw 500 + 0.5 x 800 W, the second 100 + 400 / 2 + 0.5 x 300 W."""
    maker = Maker()
    maker.op(0, 50_000_000)
    maker.op(0, 25_000_000)
    program, costs = maker.build()
    keys = "gemm.F k=50000 m=20000 n=20000", "gemm.F k=25000 m=15000 n=20000"
    program = program.renumbered(cost_keys=keys)
    begin, end = (np.array(ms) * 1_000_000 for ms in ([0, 75], [50, 100]))
    none = np.full(2, -1)
    line = Timeline(begin, begin, end, none, none.astype(np.int8))
    machine = MACHINE.model_copy(update={"free_watts": 400.0})
    factor, _ = slowdown(program, costs, line, machine)
    first, second = 1 + 0.3 * (900 / 400 - 1), 1 + 0.3 * (450 / 400 - 1)
    assert factor == pytest.approx([(first * 40 + second * 15) / 55])


def test_a_step_is_played_at_the_clock_that_its_load_leaves() -> None:
    profile = find_profile("h100-sxm")
    model = cost_model_of(profile)
    cold = play(PLAN.model_copy(update={"power": "unlimited"}), model, None)
    step = play(PLAN, model, None)
    assert profile.power_model is not None
    factor, arithmetic = slowdown(cold.program, cold.table, cold.timeline, profile.power_model)
    assert step.clock == pytest.approx(factor.max())
    assert step.clock > 1.01
    assert cold.clock == 1
    cost = cold.program.cost
    longer = step.table.duration_ns[step.played.cost] / np.maximum(cold.table.duration_ns[cost], 1)
    for rank in range(2):  # each by the clock of its own GPU
        own = cold.program.rank == rank
        assert longer[own].max() == pytest.approx(factor[rank], rel=1e-3)
    moves = (arithmetic.flops[cost] == 0) & (cold.table.duration_ns[cost] > 0)
    assert longer[moves] == pytest.approx(1)
    assert 1 < step.timeline.step_ns / cold.timeline.step_ns < factor.max() + 1e-3


def test_a_cooler_machine_is_not_slowed() -> None:
    profile = find_profile("h100-sxm")
    assert profile.power_model is not None
    generous = profile.power_model.model_copy(update={"free_watts": 2000.0})
    model = CostModel(profile.model_copy(update={"power_model": generous}))
    assert play(PLAN, model, None).clock == 1.0


def test_the_baseline_is_slowed_more_than_mhc() -> None:
    """mHC's kernels wait for memory: its overhead is less than at the full clock."""
    model = cost_model_of(find_profile("h100-sxm"))
    assert play(PLAN.baseline(), model, None).clock > play(PLAN, model, 2).clock


def test_costs_are_stretched_by_their_arithmetic() -> None:
    model = cost_model_of(find_profile("h100-sxm"))
    step = play(PLAN.model_copy(update={"power": "unlimited"}), model, None)
    assert model.profile.power_model is not None
    program, cold = step.program, step.table
    _, found = slowdown(program, cold, step.timeline, model.profile.power_model)
    played, table = slowed(program, cold, found, np.array([1.5, 1.0]))
    longer = np.where(program.rank == 0, 1 + 0.5 * found.share[program.cost], 1)
    expected = cold.duration_ns[program.cost] * longer
    assert table.duration_ns[played.cost] == pytest.approx(expected, abs=1)
    assert [played.cost_keys[k] for k in played.cost] == [
        program.cost_keys[k] for k in program.cost
    ]
    assert cold.loads is not None
    assert table.loads is not None
    assert len(table.loads.kernels) == len(table.loads.traffic) == len(played.cost_keys)


def test_ranks_of_equal_clocks_share_their_costs() -> None:
    model = cost_model_of(find_profile("h100-sxm"))
    step = play(PLAN.model_copy(update={"power": "unlimited"}), model, None)
    assert model.profile.power_model is not None
    _, found = slowdown(step.program, step.table, step.timeline, model.profile.power_model)
    played, _ = slowed(step.program, step.table, found, np.array([1.1, 1.1 + 1e-9]))
    assert played.cost_keys == step.program.cost_keys


@pytest.mark.parametrize(
    "wrong", [{"window_ms": 1e-9}, {"window_ms": 1e12}, {"free_watts": 1e-300}, {"stretch": 1e6}]
)
def test_a_machine_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    """Windows of a femtosecond would not fit in memory, and a clock near none overflows."""
    (name,) = wrong
    with pytest.raises(ValidationError, match=name):
        PowerModel.model_validate(MACHINE.model_dump() | wrong)
