"""The closed loop end to end on four gloo processes: predict, run, report."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from benchmarks import closed_loop, closed_loop_predict
from benchmarks.closed_loop_rows import DRY4, HUNG
from mhcplan.profiles.accuracy import Claim, Measurement, joined, read_lines
from mhcplan.profiles.schema import profile_text
from mhcplan.profiles.store import find_profile
from mhcplan.sim.files import read_trace
from tests.support.synthetic_profile import synthetic_profile, timing

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def tiny_profile(path: Path, sets: list[str]) -> None:
    """A made-up profile that prices the tiny rows."""
    base = synthetic_profile()
    path.write_text(profile_text(base), encoding="utf-8")
    plans = closed_loop_predict.plans_of(sets, str(path)).values()
    keys = closed_loop_predict.unmeasured(plans, base)
    path.write_text(
        profile_text(base.model_copy(update={"ops": tuple(map(timing, keys))})), encoding="utf-8"
    )
    find_profile(str(path))


def call(module: ModuleType, *words: object) -> str:
    """What the script prints with these words."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        module.main()
    return said.getvalue()


def predict(folder: Path) -> str:
    return call(
        closed_loop_predict, "--set", "dry4", "--profile", folder / "tiny.json",
        "--out", folder / "predictions.jsonl",
    )  # fmt: skip


def run(folder: Path) -> str:
    return call(
        closed_loop, "--device", "cpu", "--gpus", 4, "--set", "dry4", "--out", folder,
        "--predictions", folder / "predictions.jsonl", "--steps", 3, "--warm-up", 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions and measured lines of the tiny rows."""
    folder = tmp_path_factory.mktemp("closed-loop")
    tiny_profile(folder / "tiny.json", ["dry4"])
    predict(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_TOPO_FILE", str(folder / "topo.xml"))
        assert "2 of 2 rows done" in run(folder)
    return folder


def test_every_row_is_measured_and_names_its_claim(dry_run: Path) -> None:
    claims = read_lines(dry_run / "predictions.jsonl", Claim)
    lines = read_lines(dry_run / "measured.jsonl", Measurement)
    assert [line.row for line in lines] == list(DRY4)
    for row in joined(lines, claims):
        assert str(dry_run) not in row.measured.command
        assert row.measured.environment["NCCL_TOPO_FILE"] == "topo.xml"
        for name, program in row.measured.programs.items():
            assert program.times["issued"].steps == 3
            assert program.losses[1] < program.losses[0]
            trace = read_trace(dry_run / f"{row.claim.row}.{name}.issued.trace.json")
            assert trace.source == "measured"
            assert trace.meta["prediction"] == row.claim.digest
            assert set(program.timeline.ops_ns) == set(row.claim.programs[name].timeline.ops_ns)
        assert row.overhead_percent is not None
        assert row.op_errors_percent()


def test_a_finished_run_is_not_repeated(dry_run: Path) -> None:
    before = (dry_run / "measured.jsonl").read_bytes()
    assert "2 of 2 rows done" in run(dry_run)
    assert (dry_run / "measured.jsonl").read_bytes() == before


def test_an_equal_prediction_is_not_written_again(dry_run: Path) -> None:
    before = (dry_run / "predictions.jsonl").read_bytes()
    assert predict(dry_run).count("as before") == 2
    assert (dry_run / "predictions.jsonl").read_bytes() == before


def test_a_prediction_of_another_program_is_refused(dry_run: Path, tmp_path: Path) -> None:
    text = (dry_run / "predictions.jsonl").read_text(encoding="utf-8")
    digest = read_lines(dry_run / "predictions.jsonl", Claim)[0].programs["mhc"].program_digest
    (tmp_path / "predictions.jsonl").write_text(text.replace(digest, "0" * 64), encoding="utf-8")
    (tmp_path / "measured.jsonl").write_bytes((dry_run / "measured.jsonl").read_bytes())
    said = run(tmp_path)
    assert "dry-1f1b: its prediction is of another program; predict it again" in said


def test_a_row_that_outlasts_its_time_is_ended_and_told_and_given_up(tmp_path: Path) -> None:
    tiny_profile(tmp_path / "tiny.json", ["dry2"])
    call(
        closed_loop_predict, "--set", "dry2", "--profile", tmp_path / "tiny.json",
        "--out", tmp_path / "predictions.jsonl",
    )  # fmt: skip
    said = call(
        closed_loop, "--device", "cpu", "--gpus", 2, "--set", "dry2", "--out", tmp_path,
        "--predictions", tmp_path / "predictions.jsonl", "--row-seconds", 0.01,
    )  # fmt: skip
    assert said.count("dry-zb1p failed while issued") == 2
    assert "0 of 1 rows done; left: dry-zb1p" in said


def test_rows_that_once_hung_run_last_and_ablations_alone() -> None:
    options = SimpleNamespace(
        set=None, only=None, gpus=2, predictions=closed_loop_predict.PREDICTIONS
    )
    rows = [claim.row for claim in closed_loop.wanted_claims(options)]
    assert len(rows) == 16
    assert rows[-2:] == list(HUNG)
    assert rows[:3] == ["1f1b-n1", "1f1b-n4-L2", "1f1b-n4-L2-none"]
    options.only = ["ep2-n4-post-high", "zb1p-n2-L4", "1f1b-n1"]
    assert [claim.row for claim in closed_loop.wanted_claims(options)] == options.only
    options.only = ["ctas-eager-4", "1f1b-n1"]  # a row of a set that does not run by itself
    assert [claim.row for claim in closed_loop.wanted_claims(options)] == options.only
    options.only = ["1f1b-n1", "1f1b-n7"]
    with pytest.raises(SystemExit, match="--only 1f1b-n7: no claim of the sets"):
        closed_loop.wanted_claims(options)
