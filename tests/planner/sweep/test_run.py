"""Sweeps: equal to single predictions, kept when stopped, never worked out twice, told to all."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import predict
from mhcplan.planner.report.make import make_report
from mhcplan.planner.report.schema import json_schema
from mhcplan.planner.sweep import run as sweep_module
from mhcplan.planner.sweep.axes import axes_of
from mhcplan.planner.sweep.farm import Farm
from mhcplan.planner.sweep.row import SweepRow
from mhcplan.planner.sweep.run import SweepOptions, batched, ranked, sweep

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.commands import Run

ROOT = Path(__file__).parents[3]
SCHEMA = ROOT / "docs" / "schemas" / "sweep.schema.json"


@pytest.fixture
def run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process, its store in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return run


def small(profile: str, **more: str) -> dict[str, str]:
    return {"profile": profile, "layout.pp": "2", "microbatches": "4"} | more


@given(st.lists(st.integers(0, 3), max_size=30).map(sorted), st.integers(1, 8))
def test_batches_take_apart_only_what_is_larger_than_a_batch(groups: list[int], size: int) -> None:
    items = list(enumerate(groups))
    batches = batched(items, lambda item: item[1], size)
    assert [item for batch in batches for item in batch] == items
    assert all(0 < len(batch) <= size for batch in batches)
    for group in set(groups):
        holders = [batch for batch in batches if any(item[1] == group for item in batch)]
        assert len(holders) == -(-groups.count(group) // size)


# -- figures ---------------------------------------------------------------------------------------


def test_row_has_the_figures_of_a_prediction_of_the_same_plan(profile: str) -> None:
    axes = axes_of(
        small(profile, **{"residual.expansion_rate": "1,2,4", "layout.pp": "2,3", "schedule":
                          "dualpipe,1f1b"}), [])  # fmt: skip
    rows = sweep("mhc-3b", axes).rows
    assert [row.status for row in rows].count("illegal") == 3  # dualpipe of three ranks
    for row in rows:
        if row.figures is None:
            assert "pp=3 must be even" in str(row.reason)
            continue
        data: dict[str, Any] = {"model": "mhc-3b", "microbatches": 4, "profile": profile}
        data["residual"] = {"expansion_rate": row.values["residual.expansion_rate"]}
        data["layout"] = {"pp": row.values["layout.pp"]}
        plan = make_plan(data | {"schedule": row.values["schedule"]})
        report = make_report(predict(plan), "")
        assert row.plan_digest == report.plan_digest
        assert row.profile_digest == report.profile_digest
        assert row.gpus == report.gpus
        figures = row.figures.model_dump()
        assert figures.pop("device_memory_bytes") == report.device_memory_bytes
        assert figures.pop("overhead_percent") == pytest.approx(report.overhead_percent)
        assert figures == {name: getattr(report, name) for name in figures}


def test_estimate_is_a_lower_bound_and_the_best_are_played_by_the_engine(profile: str) -> None:
    axes = axes_of(
        small(profile, **{"residual.expansion_rate": "1,2,4", "microbatches": "4,6,8"}), []
    )
    exact = {row.plan_digest: row for row in sweep("mhc-3b", axes).rows}
    fast = sweep("mhc-3b", axes, SweepOptions(method="estimate"))
    assert len(fast.rows) == 9
    for row in fast.rows:
        played = exact[row.plan_digest].figures
        assert row.figures is not None
        assert played is not None
        assert row.method == "estimate"
        assert row.figures.step_time_ns <= played.step_time_ns
        assert row.figures.device_memory_bytes == played.device_memory_bytes
    assert len(fast.confirmed) == sweep_module.WINNERS
    assert fast.confirmed[0] == ranked(list(exact.values()))[0]
    worst = 0.0
    for row in fast.confirmed:
        assert row == exact[row.plan_digest]
        guess = next(r.figures for r in fast.rows if r.plan_digest == row.plan_digest)
        assert row.figures is not None
        assert guess is not None
        worst = max(worst, 100 * (row.figures.step_time_ns / guess.step_time_ns - 1))
    assert fast.worst_deviation_percent == pytest.approx(worst)


def test_point_that_the_profile_cannot_price_is_a_row_with_the_reason(profile: str) -> None:
    rows = sweep("mhc-3b", axes_of(small(profile, seq_len="4096,65536"), [])).rows
    assert [row.status for row in rows] == ["predicted", "unpriced"]
    assert "mhcplan profile measure" in str(rows[1].reason)


# -- never twice -----------------------------------------------------------------------------------


def test_second_sweep_works_out_only_what_is_new(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SweepOptions(store=tmp_path / "store")
    first = sweep("mhc-3b", axes_of(small(profile, microbatches="4,6"), []), options)
    worked: list[int] = []
    really = sweep_module.work_out

    def counted(plans: Any, *rest: Any) -> Any:  # noqa: ANN401
        worked.append(len(plans))
        return really(plans, *rest)

    monkeypatch.setattr(sweep_module, "work_out", counted)
    wider = sweep("mhc-3b", axes_of(small(profile, microbatches="4,6,8"), []), options)
    assert (first.stored, wider.stored, sum(worked)) == (0, 2, 1)
    assert wider.rows[:2] == first.rows
    again = sweep(
        "mhc-3b",
        axes_of(small(profile, microbatches="4,6,8"), []),
        SweepOptions(store=tmp_path / "store", fresh=True),
    )
    assert (again.stored, sum(worked), again.rows) == (0, 4, wider.rows)


MANY = ["mhc-3b", "--pp", "2", "--microbatches", "4..48..2", "--n", "1,2,4", "--jobs", "1"]


def _started(profile: str, store: Path) -> subprocess.Popen[str]:
    """A sweep in a process of its own, which has stored something but is not done."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    code = "from mhcplan.planner.cli import main; main()"
    words = ["sweep", *MANY, "--profile", profile, "--store", str(store), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None and not _stored(store):
        time.sleep(0.005)
    return process


def _stored(store: Path) -> dict[str, int]:
    """Row numbers of the points stored, by the digest of the plan."""
    try:
        with sqlite3.connect(store) as file:
            return dict(file.execute("SELECT plan_digest, rowid FROM outcomes"))
    except sqlite3.Error:
        return {}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_sweep_that_was_stopped_goes_on_without_repeating_a_point(
    how: signal.Signals, profile: str, tmp_path: Path, run: Run
) -> None:
    store = tmp_path / "store"
    process = _started(profile, store)
    process.send_signal(how)
    said, complained = process.communicate(timeout=120)
    kept = _stored(store)
    if len(kept) == 69:
        pytest.skip("the sweep was done before it could be stopped: this machine is too fast")
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert complained.endswith("mhcplan: interrupted\n")
        shown = {json.loads(line)["plan_digest"] for line in said.splitlines()}
        assert shown == set(kept)
    words = ["sweep", *MANY, "--profile", profile, "--store", str(store)]
    code, out, _ = run(*words)
    assert code == 0
    assert f"{len(kept)} known from before" in out
    everything = _stored(store)
    assert len(everything) == 69
    assert kept.items() <= everything.items()  # a point that was worked out again has a new number


# -- all cores and clusters ------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["local", "dask"])
def test_two_workers_give_the_rows_of_one(backend: str, profile: str) -> None:
    pytest.importorskip("distributed")
    axes = axes_of(small(profile, microbatches="4..14..2"), [])
    seen: list[int] = []
    options = SweepOptions(jobs=2, backend=backend)  # pyright: ignore[reportArgumentType]
    rows = sweep("mhc-3b", axes, options, lambda at: seen.append(at.done)).rows
    assert rows == sweep("mhc-3b", axes).rows
    assert seen[0] == 0
    assert seen[-1] == 6
    assert seen == sorted(seen)
    assert Farm(jobs=2).jobs == 2


# -- the command -----------------------------------------------------------------------------------


def words(profile: str, *more: str) -> tuple[str, ...]:
    return ("sweep", "mhc-3b", "--pp", "2,3", "--microbatches", "4", "--profile", profile, *more)


def test_json_is_an_object_a_line_that_satisfies_the_schema(run: Run, profile: str) -> None:
    code, out, err = run(*words(profile, "--n", "1,4", "--json"))
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["status"] for line in lines] == ["predicted", "illegal"] * 2
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for line in lines:
        jsonschema.validate(line, schema)
        assert list(line)[:2] == ["format", "format_version"]


def test_schema_on_disk_is_that_of_the_rows(published: Callable[[str, str], None]) -> None:
    published("sweep", json_schema(SweepRow, "mhcplan sweep, version 1"))


def test_csv_and_parquet_hold_the_same_rows(run: Run, profile: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    files = ["--csv", str(tmp_path / "a.csv"), "--parquet", str(tmp_path / "a.parquet")]
    code, out, _ = run(*words(profile, "--n", "1,4", "--recompute-block", "auto,2", *files))
    assert code == 0
    assert out.startswith("8 combinations: 4 fit, 4 illegal\n")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text(encoding="utf-8"))))
    typed = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in typed]
    assert as_text == rows
    assert typed[0]["format"] == "mhcplan.sweep"
    assert typed[0]["residual.expansion_rate"] == 1
    assert {row["residual.recompute_block"] for row in typed} == {"auto", "2"}
    assert isinstance(typed[0]["step_time_ns"], int)


def test_nothing_that_fits_is_exit_code_1(run: Run, profile: str) -> None:
    code, out, _ = run(*words(profile, "--set", "memory_limit_bytes=1GB"))
    assert code == 1
    assert "0 fit, 1 too large, 1 illegal" in out


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (("--pp", "3,5"), "none of 2 combinations is a plan: 1 as pp=3 must be even for dualpipe"),
        (("--n", "3", "--pp", "2,4"), "2 combinations is a plan: 2 as residual.expansion_rate=3"),
        (("--n", "3"), "mhcplan: residual.expansion_rate=3 must be 1, 2, 4, 8 or 16"),
        (("--n", "3,5", "--pp", "2,4"), ", and 2 for 1 other reason\n"),
    ],
)
def test_a_sweep_of_which_nothing_is_a_plan_is_bad_input(
    run: Run, axes: tuple[str, ...], said: str
) -> None:
    code, out, err = run("sweep", "mhc-3b", *axes)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_sweep_does_without_the_usual_store_where_it_cannot_be(
    run: Run, profile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, out, err = run(*words(profile))
    assert (code, err.count("\n")) == (0, 1)
    assert "finished points are not kept" in err
    assert out.startswith("2 combinations: 1 fit, 1 illegal\n")
    code, out, err = run(*words(profile, "--store", str(tmp_path / "file" / "store")))
    assert (code, out) == (2, "")


def test_a_fast_sweep_says_what_its_estimate_leaves_out(run: Run, profile: str) -> None:
    _, out, err = run(*words(profile, "--fast", "--no-store"))
    assert "without contention and the power limit" in out
    assert "are up to" in out
    assert err == ""
    _, out, err = run(*words(profile, "--fast", "--no-store", "--json"))
    assert "without contention and the power limit" in err
    assert {json.loads(line)["method"] for line in out.splitlines()} <= {"estimate", "engine"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pp", "4,,8"], "layout.pp='4,,8' must list values"),
        (["--set", "layout.tp=1,2"], "layout.tp is not a field"),
        (["--set", "layout.pp"], "must be field=values"),
        (["--fast", "--exact"], "--fast and --exact exclude each other"),
        (["--jobs", "0"], "--jobs"),
        (["--profile", "h100,h200"], "profile='h100' is unknown"),
        (["--store", "/proc/nowhere/store"], "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, more: list[str], message: str) -> None:
    code, out, err = run("sweep", "mhc-3b", *more)
    assert (code, out) == (2, "")
    assert err.startswith("mhcplan: ")
    assert message in err
    assert err.count("\n") == 1


def test_file_that_cannot_be_written_costs_no_result(run: Run, profile: str) -> None:
    code, out, err = run(*words(profile, "--csv", "/proc/nowhere/a.csv"))
    assert code == 2
    assert out.startswith("2 combinations: 1 fit")
    assert "/proc/nowhere" in err
