"""The stability benchmark end to end at a tiny size: train, stop, go on, judge."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks import stability, stability_report, stability_sinkhorn
from benchmarks.stability_run import (
    MODELS,
    SEVEN,
    Training,
    learning_rate,
    pinned_bias,
    recording_cost,
)
from mhcplan.kernels import mhc, reference
from mhcplan.planner.diagnose.judge import judge
from mhcplan.planner.diagnose.recording import Recording, read_recording
from mhcplan.planner.plan.spec import make_plan
from mhcplan.runtime.spec import RunError, RunSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small_and_plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mhc, "INTERPRETED", False)  # kernel tests of the same worker ask for it
    monkeypatch.setitem(MODELS, "tiny", MODELS["tiny"] | {"num_blocks": 2})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    yield
    torch.set_num_threads(threads)


def run(out: Path, *words: str) -> dict[str, Recording]:
    given = ["--out", str(out), "--model", "tiny", "--device", "cpu", "--every", "2", "--seq-len",
             "64", "--tokens", "64", "--text-mb", "0.1", "--steps", "4", *words]  # fmt: skip
    stability.main(given)
    return {path.stem: read_recording(path) for path in sorted(out.glob("*.recording"))}


def test_all_seven_runs_are_recorded_with_equal_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path)
    assert set(found) == set(SEVEN)
    for name, recording in found.items():
        assert recording.steps.tolist() == [1, 3]
        assert recording.about["scheme"] == name
        assert np.isfinite(recording.records["gradient_rms"]).all()
        assert (recording.curve("gradient_norm")[1] > 0).all()
        judge(recording)
    assert len({r.about["text_sha256"] for r in found.values()}) == 1
    # equal weights and text, and heads that start small: the first losses hardly differ
    first = [recording.curve("loss")[1][0] for recording in found.values()]
    assert first == pytest.approx([np.log(512)] * 7, rel=0.02)
    eye = np.broadcast_to(np.eye(4), (4, 4, 4))
    for name in ("identity", "hc-no-res"):
        assert found[name].last("res_map") == pytest.approx(eye, abs=1e-9)
    assert found["mhc-no-pre"].last("pre_map") == pytest.approx(np.full((4, 4), 0.25))
    assert found["mhc-no-post"].last("post_map") == pytest.approx(np.ones((4, 4)))
    assert np.load(tmp_path / "mhc.logits.npy").shape == (4, 64, 4, 4)
    capsys.readouterr()
    stability_report.main([str(tmp_path), "--curves", str(tmp_path / "curves.csv")])
    text = capsys.readouterr().out
    for name, recording in found.items():
        assert f"\n| {name} | {recording.curve('loss')[1].mean():.4f} |" in text
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 7 * 2


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", "--runs", "hc")["hc"]
    for _ in range(2):  # no time at all: each call trains until the next record
        found = run(tmp_path / "b", "--runs", "hc", "--minutes", "0")["hc"]
    for name in ("step", "loss", "gradient_norm", "res_map"):
        assert np.array_equal(found.records[name], whole.records[name]), name


def test_mhc_can_start_as_hc_does(tmp_path: Path) -> None:
    found = run(tmp_path, "--runs", "mhc-from-hc", "--steps", "2")["mhc-from-hc"]
    pre, res = found.last("pre_map"), found.last("res_map")
    assert pre == pytest.approx(np.where(np.eye(4) > 0, 0.982, 0.018), abs=0.01)
    assert res == pytest.approx(np.where(np.eye(4) > 0, 0.948, 0.017)[None].repeat(4, 0), abs=0.01)


def test_hc_without_decay_loses_nothing_but_the_decay(tmp_path: Path) -> None:
    """Steps are otherwise nearly the same; rounding of a float near 1 is a few % of the loss."""
    run(tmp_path, "--runs", "hc", "hc-no-decay", "--steps", "2")
    decayed, kept = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"]["blocks.1.sites.0.bias"]
        for name in ("hc", "hc-no-decay")
    )
    rates = [learning_rate(step, 2, 1e-3) for step in range(2)]
    start = 1 - np.prod([1 - 0.1 * rate for rate in rates])  # of what started as 1
    assert torch.allclose((kept - decayed)[kept > 0.5].double(), torch.tensor(start), rtol=0.3)
    assert (kept > 0.5).sum() == 1 + 4 + 4


@pytest.mark.parametrize("n", [2, 4])
def test_pinned_maps_are_what_they_should_be(n: int) -> None:
    bias = {part: pinned_bias("mhc", part, n) for part in ("pre", "post", "res")}
    assert torch.allclose(torch.sigmoid(bias["pre"]), torch.full((n,), 1 / n))
    assert torch.allclose(2 * torch.sigmoid(bias["post"]), torch.ones(n))
    assert torch.allclose(reference.sinkhorn(bias["res"]), torch.eye(n), atol=1e-9)


def test_residuals_that_are_only_priced_are_not_run() -> None:
    plan = make_plan({"model": "mhc-3b", "residual": {"kind": "mhc-lite"}, "schedule": "1f1b"})
    with pytest.raises(RunError, match="kind=mhc-lite: the runtime has mhc, hc, plain"):
        RunSpec.from_plan(plan.model_dump(mode="json"))


def test_price_of_the_constraint_by_another_sinkhorn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5, 4, 4))
    np.save(tmp_path / "some.logits.npy", logits)
    answers = tmp_path / "out.json"
    stability_sinkhorn.main(
        ["--logits", str(tmp_path / "some.logits.npy"), "--steps", "1", "4", "--sites", "2",
         "--tokens", "2", "--json", str(answers)]
    )  # fmt: skip
    rows = json.loads(answers.read_text())["rows"]
    found = {row["steps"]: row for row in rows if row["source"] == "some.logits.npy"}
    for steps, row in found.items():
        maps = np.exp(logits)
        for _ in range(steps):
            maps = maps / maps.sum(-2, keepdims=True)
            maps = maps / maps.sum(-1, keepdims=True)
        errors = np.abs(maps.sum(-2) - 1).max(-1)
        gains = np.abs((maps[2] @ maps[1] @ maps[0]).sum(-2)).max(-1)
        shorter = [np.abs(m.sum(-2)).max(-1) for m in (maps[2] @ maps[1], maps[2])]
        assert row["column_error_most"] == pytest.approx(errors.max())
        assert row["column_error_mean"] == pytest.approx(errors.mean())
        assert row["gain_mean"] == pytest.approx(np.max([gains, *shorter], axis=0).mean())
    assert found[4]["column_error_most"] < found[1]["column_error_most"]
    assert "some.logits.npy" in capsys.readouterr().out


def test_no_timing_is_a_cold_one_and_each_round_has_an_order_of_its_own() -> None:
    order: list[tuple[int, str]] = []
    calls = {(t, "forward_us"): partial(order.append, (t, "forward_us")) for t in range(8)}

    def measure(call: Callable[[], object]) -> float:
        """The first eight are cold; the others take t, and longer by when they come in a round."""
        call()
        return 1000.0 if len(order) <= 8 else order[-1][0] + 0.01 * (len(order) % 8)

    found = stability_sinkhorn.median_of_rounds(calls, measure)
    assert all(value == pytest.approx(t, abs=0.1) for (t, _), value in found.items())
    rounds = [tuple(order[i : i + 8]) for i in range(0, len(order), 8)]
    assert len(set(rounds)) == len(rounds) == 1 + stability_sinkhorn.ROUNDS


def test_the_cost_of_recording_is_that_of_a_record_and_of_the_steps_between(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(training: Training, rounds: int) -> tuple[np.ndarray, np.ndarray]:
        """What is measured is sound; what is printed of it is worked out from round numbers."""
        seconds, host = recording_cost(training, rounds)
        assert seconds.shape == host.shape == (rounds, 3)
        assert (host < seconds).all()
        assert (host[:, 0] == 0).all()
        assert (host[:, 1] < host[:, 2]).all()
        return np.tile([1.0, 1.01, 1.11], (rounds, 1)), np.tile([0.0, 0.002, 0.05], (rounds, 1))

    monkeypatch.setattr(stability, "COST_ROUNDS", 2)
    monkeypatch.setattr(stability, "recording_cost", measured)
    run(tmp_path, "--runs", "mhc", "--cost", "--every", "10", "--steps", "10")
    text = capsys.readouterr().out
    assert "costs +2.00 +- 0.00 % of a step (1000.0 ms without)" in text  # (9 x 1 + 11) / 10
    assert "in the recorder is 0.68 %: 50.00 ms a record, 2.00 ms a step between" in text


@pytest.mark.parametrize("name", ["100m-h100", "deep-cpu"])
def test_the_page_says_what_the_kept_curves_say(name: str) -> None:
    """Losses, gradient norms and gains of docs/stability.md, from one record in ten steps."""
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    page = page.split(f"{name}.csv")[0].rsplit("\n## ", 1)[-1]
    runs: dict[str, list[dict[str, str]]] = {}
    with (ROOT / "benchmarks" / "stability_curves" / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            runs.setdefault(row["run"], []).append(row)
    for run, rows in runs.items():
        figures = {
            key: np.array([float(row[key]) for row in rows]) for key in rows[0] if key != "run"
        }
        (line,) = [x for x in page.splitlines() if x.startswith(f"| {run} |")]
        cells = [cell.strip() for cell in line.split("|")[2:]]
        assert float(cells[0]) == pytest.approx(figures["loss"][-5:].mean(), abs=1e-4)
        assert float(cells[1]) == pytest.approx(figures["gradient_norm"][-5:].mean(), abs=1e-3)
        for cell, key in zip(cells[2:4], ("forward_gain", "backward_gain"), strict=True):
            last, _, peak = (float(part) for part in cell.split("/"))
            assert last == pytest.approx(figures[key][-1], rel=5e-3)
            assert peak == pytest.approx(figures[key].max(), rel=5e-3)
        assert float(cells[5]) == pytest.approx(figures["row_similarity"][-1], abs=1e-4)
