"""Priority: what is taken from a trace, what is predicted for a trial."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mhcplan.profiles.capture.priority import _add_blocked, _add_latency, summary
from mhcplan.profiles.contention import Parameters
from mhcplan.profiles.contention_fit import Trait
from mhcplan.profiles.logs import read_log
from mhcplan.profiles.priority import (
    errors_ns,
    fits_beside,
    idle_start_ns,
    predict_start_ns,
    tail_shares,
)

if TYPE_CHECKING:
    from pathlib import Path

P = Parameters()
LIBRARY = [132, 384, 168, 213188]  # as measured on an H100
TILES = [768, 256, 200, 196608]
IDLE = {"resident": "idle", "level": "high", "probe": "small", "start_ns": 10_000, "residents": []}


def _event(name: str, start_us: float, length_us: float, correlation: int) -> dict[str, Any]:
    args = {"correlation": correlation, "grid": [132, 1, 1], "block": [384, 1, 1]}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start_us, "dur": length_us,
            "args": args}  # fmt: skip


def _trial(launch: list[int], level: str, age_us: float, length_us: float) -> dict[str, Any]:
    span = [round(10_000 - 1000 * age_us), round(1000 * length_us), launch, "kernel"]
    return {**IDLE, "resident": "busy", "level": level, "residents": [span]}


def test_a_trial_counts_from_the_launch_call_of_the_kernel_launched_last() -> None:
    row: dict[str, Any] = {}
    events = [_event("gone", 50, 20, 1), _event("gemm", 80, 100, 2), _event("probe", 180, 5, 3)]
    _add_latency(row, events, {3: 100_000}, 0)
    assert (row["start_ns"], row["end_ns"], row["queued"]) == (80_000, 85_000, 1)
    assert row["residents"] == [[-20_000, 100_000, [132, 384, 0, 0], "gemm"]]


def test_blocked_probes_are_the_last_eight() -> None:
    events = [_event("holder", 0, 1000, 0), _event("waits", 1000, 1, 1)]
    events += [_event("probe", 20 + i, 1, 10 + i) for i in range(8)]
    row: dict[str, Any] = {}
    _add_blocked(row, events, {10 + i: 10_000 + 1000 * i for i in range(8)}, 0)
    assert row["latencies_ns"] == [10_000] * 8
    assert row["holder_left_ns"] == 990_000


def test_room_beside_a_kernel_is_counted_in_threads_registers_and_shared_memory() -> None:
    probe = (128, 32, 0)
    assert not fits_beside(LIBRARY, probe, 132)  # 384 x 168 registers are all there are
    assert fits_beside(TILES, probe, 132)
    assert not fits_beside(TILES, (640, 96, 103808), 132)  # a communication CTA
    assert not fits_beside([1000, 1024, 16, 0], probe, 132)  # two fill the threads
    assert fits_beside([132, 1024, 16, 0], probe, 132)  # but a single wave leaves one slot


def test_an_idle_chip_costs_the_launch() -> None:
    assert idle_start_ns([IDLE]) == 10_000
    assert predict_start_ns(IDLE, 10_000, {}, P) == 10_000


@pytest.mark.parametrize("level", ["high", "equal"])
def test_a_persistent_kernel_is_waited_for_to_its_end_at_any_priority(level: str) -> None:
    trial = _trial(LIBRARY, level, 30, 170)
    assert predict_start_ns(trial, 10_000, {}, P) == 150_000
    # its last round of tiles leaves 16 SMs idle
    traits = {"kern": Trait(512, dealt=False)}
    assert predict_start_ns(trial, 10_000, traits, P) == pytest.approx(10_000 + 0.75 * 170e3 - 30e3)


def test_urgency_buys_the_queue_of_a_kernel_of_many_ctas() -> None:
    assert predict_start_ns(_trial(TILES, "high", 30, 300), 10_000, {}, P) == 10_000
    # six waves: beside the last there is room for the probe, before it others wait
    assert predict_start_ns(_trial(TILES, "equal", 30, 300), 10_000, {}, P) == 230_000


def test_errors_are_medians_by_case() -> None:
    trials = [{**_trial(LIBRARY, "high", 30, 170), "start_ns": 150_000 + e} for e in (1, 5, 900)]
    found = errors_ns([IDLE, *trials], {}, P)
    assert found["busy", "high", "small"] == (150_005, 5)


def test_tail_shares_are_what_was_left_when_a_probe_got_in() -> None:
    trials = [{**_trial(LIBRARY, "equal", 30, 200), "start_ns": 130_000} for _ in range(3)]
    assert tail_shares(trials, 10_000) == {"kernel": pytest.approx(0.25)}
    assert tail_shares(trials[:2], 10_000) == {}
    assert tail_shares([{**t, "level": "high"} for t in trials], 10_000) == {}


def test_a_log_is_read_back_by_its_stamp(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    row = {"case": "latency", "resident": "gemm", "level": "high", "probe": "small",
           "start_ns": 5000, "end_ns": 9000}  # fmt: skip
    line = json.dumps({"code": "a", "connections": 8, "priority": row})
    other = json.dumps({"code": "b", "connections": 8, "priority": row})
    log.write_text(f"{line}\n{other}\n{line[:30]}")
    (found,) = read_log(log, {"code": "a"})
    assert found["priority"] == row
    assert summary([found]) == [f"  8 {'gemm high small':48s} start      5.0 end      9.0 us"]
