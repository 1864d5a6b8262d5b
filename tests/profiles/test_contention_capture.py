"""Capture of contention: runs out of a trace, what a row holds, and the whole suite with gloo."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mhcplan.profiles.capture.contention import Plan, measure_contention, read_rows
from mhcplan.profiles.capture.overlap_kernels import makers
from mhcplan.profiles.capture.overlap_pairs import (
    MIB,
    Traffic,
    all_reductions,
    all_traffic,
    meetings,
    pair_key,
    pairs,
    row_of,
    side,
    traffic_side,
    window_of,
)
from mhcplan.profiles.capture.overlap_trace import Run, split_runs

if TYPE_CHECKING:
    from pathlib import Path

STAMP = {"code": "test", "device": "cpu"}


def _event(name: str, start_us: float, length_us: float, cat: str = "kernel") -> dict[str, Any]:
    args = {"grid": [4, 2, 1], "block": [128, 1, 1], "registers per thread": 32,
            "shared memory": 1024}  # fmt: skip
    return {"ph": "X", "cat": cat, "name": name, "ts": start_us, "dur": length_us, "args": args}


def test_runs_begin_at_markers_and_traffic_is_told_from_compute() -> None:
    events = [
        _event("gemm", 0, 5),  # before the first marker
        _event("void spin_kernel(long)", 10, 1),
        _event("gemm", 11, 5),
        _event("ncclDevKernel_SendRecv(x)", 12.5, 7),
        _event("void spin_kernel(long)", 20, 1),
        _event("filler", 22, 5),
        _event("void spin_kernel(long)", 30, 1),
        _event("Memcpy PtoP (Device -> Device)", 31, 2, "gpu_memcpy"),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 31, "dur": 1},
    ]
    first, second = split_runs(events, 1000)
    assert first.compute == [[12_000, 5_000]]
    assert first.traffic == [[13_500, 7_000]]
    assert first.launch == {"gemm": [8, 128, 32, 1024]}
    assert first.traffic_launch == [8, 128, 32, 1024]
    assert (second.compute, second.traffic) == ([], [[32_000, 2_000]])


def test_a_side_separates_the_queue_from_the_kernel() -> None:
    # kernels of 60 ns every 100 ns; the first op is outside the window, the last has no successor
    spans = [[100 * i, 60] for i in range(6)]
    found = side(spans, 1, (100, 500))
    assert (found["ops"], found["period_ns"], found["kernel_ns"], found["queue_ns"]) == (
        4, 100, 60, 40,
    )  # fmt: skip
    two = side([[0, 30], [40, 30], [100, 30], [140, 30], [200, 30], [240, 30]], 2, (0, 1000))
    assert (two["ops"], two["period_ns"], two["kernel_ns"]) == (2, 100, 60)
    assert side(spans, 1, (1000, 2000)) == {"ops": 0}


def test_only_the_time_in_which_both_streams_had_work_counts() -> None:
    run = Run(compute=[[0, 10], [10, 10], [20, 10]], traffic=[[5, 20], [25, 40]])
    assert window_of(run, 1) == (25, 30)
    assert window_of(Run(traffic=[[5, 20], [25, 40]]), 1) == (25, 65)
    assert window_of(Run(), 1) == (0, 0)


def test_short_messages_are_counted_over_whole_ops() -> None:
    """Three messages pass between two kernels and none beside one: 3 an op, wherever one looks."""
    compute = [[100 * i, 80] for i in range(6)]
    traffic = [[100 * i + 80 + 6 * j, 4] for i in range(6) for j in range(3)]
    run = Run(compute, traffic, ["k"] * 6)
    found = traffic_side(run, 1, (100, 492))  # three whole ops
    assert (found["ops"], found["period_ns"], found["kernel_ns"]) == (9, 33, 4)
    long = Run(compute, [[0, 150], [160, 150], [320, 150]], ["k"] * 6)
    assert traffic_side(long, 1, (0, 500)) == side(long.traffic, 1, (0, 500))
    assert traffic_side(run, 1, (0, 50)) == {"ops": 0}


def test_peers_that_start_late_are_waited_for_whatever_their_clock_says() -> None:
    mine = [[100 * i, 90] for i in range(5)]
    theirs = [[100 * i + 7000 + 30, 60] for i in range(5)]  # 30 late, ends together, clock + 7000
    found = meetings(mine, theirs)
    assert found == {"clock_offset_ns": 7000, "peer_wait_ns": [30, 0], "together_ns": 60}
    assert meetings(mine[:2], theirs[:2]) == {}


def test_the_most_telling_pairs_come_first_and_none_twice() -> None:
    names = ["a", "b"]
    traffic = all_traffic((MIB, 8 * MIB), (0, 8, 2))
    found = pairs(names, traffic, (MIB,))
    keys = [pair_key(*item) for item in found]
    assert len(keys) == len(set(keys))
    lead = [t for t in traffic if not t.high_priority and t.ctas in (0, 8) and t.num_bytes > MIB]
    assert {t for _, t in found[: 2 * len(lead)]} == set(lead)
    assert {k for k in keys if "copy_engine" in k} == {
        f"{n}|copy_engine {MIB} ctas=0 equal busy=first" for n in names
    }


def test_a_row_keeps_both_runs_of_every_rank() -> None:
    run = Run([[0, 10], [12, 10], [24, 10]], [[0, 10], [12, 10], [24, 10]], ["k"] * 3,
              {"k": [132, 128, 8, 0]}, [8, 512, 96, 0])  # fmt: skip
    row = row_of("k", Traffic("send_recv", MIB), 1, {"A": [run, run], "B": [run, run]}, [])
    assert [s["period_ns"] for s in row["A"]["compute"] + row["B"]["traffic"]] == [12] * 4
    assert row["traffic_launch"] == [8, 512, 96, 0]
    assert [s["ops"] for s in row["A"]["before"]] == [0, 0]  # the traffic was there from the start
    late = Run(run.compute, [[25, 10], [40, 10]], run.names, run.launch, run.traffic_launch)
    row = row_of("k", Traffic("send_recv", MIB), 1, {"A": [late, late]}, [])
    assert [(s["ops"], s["period_ns"]) for s in row["A"]["before"]] == [(1, 12)] * 2
    alone = row_of("k", None, 1, {"A": [run]}, [])
    assert alone["kernels"] == [{"name": "k", "launch": [132, 128, 8, 0], "duration_ns": 10}]


def test_a_kernel_of_every_family_runs_on_a_cpu() -> None:
    families = {make().family for make in makers(torch.device("cpu")).values()}
    assert families == {"gemm_library", "attention", "post_res", "elementwise"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A first capture that its budget ends early, and a second that finishes it."""
    log = tmp_path_factory.mktemp("contention") / "log.jsonl"
    names = ("gemm_library", "elementwise")
    plan = Plan(sizes=(65536,), ctas=(0,), names=names, budget_seconds=0.0)
    assert measure_contention(log, STAMP, "cpu", plan=plan, chunk=4) == {}
    plan = Plan(sizes=(65536,), ctas=(0,), names=names)
    return log, measure_contention(log, STAMP, "cpu", plan=plan, chunk=4)


def test_the_suite_runs_on_a_cpu_with_gloo(
    measured: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    log, rows = measured
    names, traffic = ("gemm_library", "elementwise"), all_traffic((65536,), (0,))
    expected = {pair_key(*item) for item in pairs(names, traffic, ())}
    traffic += all_reductions((65536,), (0,))
    expected |= {pair_key(n, None) for n in names} | {pair_key("-", t) for t in traffic}
    assert set(rows) == expected
    alone = rows["gemm_library|-"]
    assert (alone["per_op"], alone["family"]) == (1, "gemm_library")
    assert all(s["ops"] == 6 and s["kernel_ns"] > 0 for s in alone["A"]["compute"])
    assert read_rows(log, STAMP) == rows
    assert read_rows(log, {**STAMP, "code": "other"}) == {}


def test_what_the_log_has_is_not_measured_again_and_a_cut_line_is(
    measured: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    log, rows = measured
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][: len(lines[-1]) // 2])
    plan = Plan(sizes=(65536,), ctas=(0,), names=("gemm_library", "elementwise"))
    again = measure_contention(log, STAMP, "cpu", plan=plan, chunk=4)
    lost = json.loads(lines[-1])["contention"]["pair"]
    assert set(again) == set(rows)
    assert {k for k in rows if again[k] != rows[k]} <= {lost}
    assert again[lost]["A"] != rows[lost]["A"]
