"""Logs of overlapped kernels become the contention model and the latencies of a profile."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from mhcplan.profiles.capture import overlap_parts
from mhcplan.profiles.contention_fit import fit
from mhcplan.profiles.logs import read_log
from mhcplan.profiles.store import find_profile

RAW = Path(__file__).parents[2] / "profiles" / "data" / "raw"
CONTENTION, PRIORITY = (RAW / f"h100-sxm-{part}.jsonl.xz" for part in ("contention", "priority"))
BARE = find_profile("h100-sxm").model_copy(update={"contention_model": None, "priorities": ()})


def test_a_profile_without_logs_stays_as_it_is(tmp_path: Path) -> None:
    assert overlap_parts.with_overlap(BARE, tmp_path / "a", tmp_path / "b") == BARE


def test_a_model_is_fitted_and_latencies_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap_parts, "fit", partial(fit, most=60, rounds=1))
    monkeypatch.setattr(overlap_parts, "choices_of", lambda _: {"busy_delay": (0.0, 0.35, 0.9)})
    model = overlap_parts.with_overlap(BARE, CONTENTION, PRIORITY)
    found = model.contention_model
    assert found is not None
    assert found.parameters["busy_delay"] == 0.35
    assert found.parameters["hbm_bytes_per_ns"] == pytest.approx(3000, rel=0.01)  # its copy
    assert found.held_out_pairs == 336
    assert 0 < found.compute_error_percent < 15
    assert {(row.pattern, row.medium) for row in found.traffic} > {("send_recv", "inter_node")}
    shipped = find_profile("h100-sxm").contention_model
    assert shipped is not None
    assert found.traits == shipped.traits
    assert {row.level for row in model.priorities} == {"equal", "high"}


def test_logs_of_another_device_are_not_of_this_profile(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(json.dumps({**read_log(CONTENTION)[0], "device": "another"}), encoding="utf-8")
    assert overlap_parts.with_overlap(BARE, log, tmp_path / "none").contention_model is None


def test_latencies_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        overlap_parts.measure_priority_part(tmp_path / "log", "cpu", 1.0)


def test_without_numba_the_log_is_kept_for_a_later_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(overlap_parts, "has_numba", lambda: False)
    assert overlap_parts.with_overlap(BARE, CONTENTION, tmp_path / "none") == BARE
    assert "--merge" in capsys.readouterr().err
