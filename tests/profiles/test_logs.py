"""Logs of captures: what is read back, plain and packed, and what rests on the shipped ones."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from mhcplan.profiles.contention_fit import TRAITS
from mhcplan.profiles.contention_rows import priority_latencies
from mhcplan.profiles.logs import read_log
from mhcplan.profiles.priority import idle_start_ns, tail_shares
from mhcplan.profiles.store import contention_log, find_profile

RAW = Path(__file__).parents[2] / "profiles" / "data" / "raw"
ENTRIES = [{"code": "a", "x": 1}, {"code": "b", "x": 2}]
TEXT = "".join(json.dumps(entry) + "\n" for entry in ENTRIES)


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(TEXT + TEXT[:8] + "\n" + TEXT[:5], encoding="utf-8")
    assert read_log(log) == ENTRIES


def test_a_stamp_picks_entries(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(TEXT, encoding="utf-8")
    assert read_log(log, {"code": "b"}) == ENTRIES[1:]
    assert read_log(log, {"code": "b", "device": "none"}) == []


def test_a_packed_log_is_read_as_a_plain_one(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl.xz"
    log.write_bytes(lzma.compress(TEXT.encode()))
    assert read_log(log) == ENTRIES


def test_without_a_file_there_are_no_entries(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []
    assert contention_log(str(tmp_path / "mine.json")) == []


@pytest.mark.parametrize("name", ["h100-sxm", "h200"])
def test_a_profile_comes_with_the_pairs_it_was_fitted_to(name: str) -> None:
    device = find_profile(name).provenance[0].device
    assert len(contention_log(name)) > 1000
    assert {entry["device"] for entry in contention_log(name)} == {device}


@pytest.mark.parametrize("name", ["h100-sxm", "h200"])
def test_latencies_of_a_profile_are_those_of_its_log(name: str) -> None:
    log = read_log(RAW / f"{name}-priority.jsonl.xz")
    assert tuple(priority_latencies(log)) == find_profile(name).priorities


def test_tail_shares_are_those_of_the_log() -> None:
    rows = [(entry["connections"], entry["priority"])
            for entry in read_log(RAW / "h100-sxm-priority.jsonl.xz")]  # fmt: skip
    trials = [row for connections, row in rows
              if connections > 1 and row != "done" and row["case"] == "latency"]  # fmt: skip
    measured = tail_shares(trials, idle_start_ns(trials))
    stored = {part: trait.tail_share for part, trait in TRAITS.items() if trait.tail_share}
    assert len(stored) == 4
    for part, share in stored.items():
        (found,) = (value for name, value in measured.items() if part in name)
        assert share == pytest.approx(found, abs=0.001), part
