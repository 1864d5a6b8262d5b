"""``mhcplan run`` on two gloo processes: a plan, an exported program, and what it refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.closed_loop_rows import tiny
from mhcplan.planner.cli import main
from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.file import plan_text
from mhcplan.planner.plan.spec import make_plan
from mhcplan.sim.files import read_trace, write_program

if TYPE_CHECKING:
    from pathlib import Path


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["run", *map(str, words)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(plan_text(make_plan(tiny("zb1p", 2, microbatches=3))), encoding="utf-8")
    return path


def test_a_plan_runs_beside_its_baseline(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(plan_file, "--steps", 2, "--warm-up", 0, "--out", out) == 0
    said = capsys.readouterr().out
    assert "plain residual, issued" in said
    assert " 0.00 " not in said  # memory that a CPU does not count
    assert "on a CPU times mean nothing" in said
    found = json.loads((out / "run.json").read_text())
    assert found["claim"] is None
    for name, file in (("mhc", "trace.json"), ("baseline", "baseline_trace.json")):
        program = found["programs"][name]
        assert program["losses"][1] < program["losses"][0]
        trace = read_trace(out / file)
        assert trace.timeline.step_ns == program["traced_step_ns"]
        assert trace.meta["plan"]["schedule"] == "zb1p"
    assert trace.meta["plan"]["residual"]["kind"] == "plain"


def test_an_exported_program_runs(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tiny("1f1b", 2, pp=1, microbatches=2))
    program = lower(plan, resolve_recompute_block(plan))
    program.meta["plan"] = plan.model_dump(mode="json")
    write_program(program, tmp_path / "program.json")
    words = ("--steps", 2, "--warm-up", 0, "--no-baseline", "--json")
    assert run(tmp_path / "program.json", *words) == 0
    assert list(json.loads(capsys.readouterr().out)["programs"]) == ["mhc"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mhc-3b", "--pp", "4", "--device", "cuda"], "GPUs, this machine has"),
        (["mhc-3b", "--device", "cpu"], "a CPU runs at most 16"),
        (["plan.toml", "--steps", "1"], "steps=1 must be at least 2"),
        (["nothing.json"], "nothing.json: cannot be read"),
        (["bare.json"], "says not which plan it is of"),
        (["bare.json", "--n", "2"], "flags change plans, not .json files"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    words: list[str], said: str, plan_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(plan_file.parent)
    plan = make_plan(tiny("1f1b", 1, microbatches=2))
    write_program(lower(plan, None), plan_file.parent / "bare.json")
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
