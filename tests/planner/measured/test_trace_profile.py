"""A profile from somebody's own trace: written by torch on a CPU, and made up for a GPU."""

from __future__ import annotations

import gzip
import json
import statistics
from typing import TYPE_CHECKING, Any

import pytest

from mhcplan.planner.cli import main
from mhcplan.planner.measured.trace_profile import profile_of
from mhcplan.planner.plan.file import plan_text
from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.predict import predict
from mhcplan.profiles.cell_times import Cell, read_cell_times
from mhcplan.profiles.schema import ProfileError, profile_text, read_profile
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAGES, MICROBATCHES = 2, 4


def plan_of(n: int = 1) -> PlanSpec:
    return make_plan(
        {
            "model": "mhc-3b", "residual": {"expansion_rate": n}, "schedule": "1f1b",
            "layout": {"pp": STAGES, "ep": 1}, "microbatches": MICROBATCHES, "seq_len": 2048,
        }
    )  # fmt: skip


class MadeUp:
    """A GPU trace: ranges on the host's thread, launches, and kernels that run much later."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._now, self._correlation = 100.0, 0

    def cell(self, name: str, *kernels: tuple[str, float], thread: int = 1) -> None:
        begin = self._now
        for kernel, dur in kernels:
            self._now += 5
            self._correlation += 1
            args = {"correlation": self._correlation}
            self.events += [
                {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": thread,
                 "ts": self._now, "dur": 2, "args": args},
                {"ph": "X", "cat": "kernel", "name": kernel, "tid": 7, "ts": self._now + 1e6,
                 "dur": dur, "args": args},
            ]  # fmt: skip
        self._now += 5
        range_ = {"ph": "X", "cat": "user_annotation", "tid": 1, "ts": begin}
        self.events.append(range_ | {"name": f"PP:{name}", "dur": self._now - begin})
        self._now += 5

    def write(self, path: Path) -> Path:
        document = {"traceEvents": self.events, "deviceProperties": [{"id": 0, "name": "GPU X"}]}
        path.write_bytes(gzip.compress(json.dumps(document).encode()))
        return path


def made_up(path: Path, slower: dict[str, float]) -> Path:
    """A run of the plan in which each pass takes ``slower`` times what the profile says."""
    program = predict(plan_of(), synthetic_profile()).step
    trace = MadeUp()
    for b in range(MICROBATCHES):
        for stage in range(STAGES):
            for letter, passes in (("F", "F"), ("B", "IW")):
                ops = [int(program.table.duration_ns[op]) for op in ops_of(program, stage, passes)]
                us = slower[letter] * sum(ops) / 1000
                trace.cell(f"{stage}{letter}{b}", ("gemm", us / 2), ("elementwise", us / 2),
                           ("ncclDevKernel_SendRecv", 1e4), thread=2)  # fmt: skip
    trace.cell("(0F9;1B9)OVERLAP_F_B", ("gemm", 1.0))
    trace.cell("0SEND_F0", ("ncclDevKernel_SendRecv", 1e4))
    return trace.write(path)


def ops_of(step: Any, stage: int, passes: str) -> list[int]:  # noqa: ANN401
    program = step.program
    return [
        int(program.cost[op.index])
        for op in program
        if op.stage == stage and op.microbatch == 0 and op.group < 0 and op.pass_ in passes
    ]


def test_kernels_are_found_by_what_launched_them(tmp_path: Path) -> None:
    trace = MadeUp()
    trace.cell("0F0", ("gemm", 30.0), ("ncclDevKernel_AllReduce", 500.0), ("softmax", 12.5))
    trace.cell("0F1", ("gemm", 33.0))
    trace.cell("0B0", ("gemm", 60.0), thread=9)  # autograd launches from a thread of its own
    trace.cell("(1F0;0B1)OVERLAP_F_B", ("gemm", 99.0))
    times = read_cell_times([trace.write(tmp_path / "t.json.gz")])
    assert times.samples_ns == {Cell(0, "F"): [42_500, 33_000], Cell(0, "B"): [60_000]}
    assert (times.device, times.num_files, times.num_pairs) == ("GPU X", 1, 1)


def test_a_slower_run_makes_a_profile_in_which_it_is_slower(tmp_path: Path) -> None:
    slower = {"F": 1.5, "B": 2.0}
    times = read_cell_times([made_up(tmp_path / "t.json.gz", slower)])
    found = profile_of(plan_of(), times, synthetic_profile(), "mine")
    assert found.factors == pytest.approx(slower, rel=1e-6)
    assert all(abs(percent) < 0.01 for percent in found.left_percent.values())
    before, after = (predict(plan_of(), p).step for p in (synthetic_profile(), found.profile))
    for stage in range(STAGES):
        for letter, passes in (("F", "F"), ("B", "IW")):
            sums = [
                sum(int(step.table.duration_ns[op]) for op in ops_of(step, stage, passes))
                for step in (before, after)
            ]
            assert sums[1] / sums[0] == pytest.approx(slower[letter], rel=1e-4)
    measured = [row for row in found.profile.ops if "trace" in row.citation]
    assert measured
    assert all(row.source == "measured" and row.samples > 0 for row in measured)
    assert not [row for row in measured if row.kind.startswith("mhc_")]
    assert found.profile.provenance[-1].device == "GPU X"


def test_the_command_answers_what_mhc_adds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = made_up(tmp_path / "t.json.gz", {"F": 3.0, "B": 3.0})
    base, plan, out = (tmp_path / name for name in ("base.json", "plan.toml", "mine.json"))
    base.write_text(profile_text(synthetic_profile()), encoding="utf-8")
    plan.write_text(plan_text(plan_of()), encoding="utf-8")

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(list(map(str, words)))
        captured = capsys.readouterr()
        assert exit_.value.code == 0, captured.err
        return captured.out

    said = run("profile", "measure", "--from-trace", trace, "--plan", plan, "--base", base,
               "--out", out)  # fmt: skip
    assert "F: 3.000 times as long" in said
    assert "1 overlapped pairs were left out" in said
    assert read_profile(out).name == "mine"
    overhead = {
        profile: json.loads(run("predict", plan, "--n", 4, "--profile", profile, "--json"))[
            "overhead_percent"
        ]
        for profile in (base, out)
    }
    # the same mHC kernels beside layers three times as long
    assert overhead[out] < 0.5 * overhead[base]


def test_a_trace_that_torch_writes_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.randn(256, 256)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for b in range(MICROBATCHES):
            for name, repeats in (("0F", 20), ("0B", 60)):
                with torch.profiler.record_function(f"PP:{name}{b}"):
                    for _ in range(repeats):
                        torch.mm(weight, weight)
    profiler.export_chrome_trace(str(tmp_path / "t.json"))
    times = read_cell_times([tmp_path / "t.json"])
    assert {cell: len(ns) for cell, ns in times.samples_ns.items()} == {
        Cell(0, "F"): MICROBATCHES, Cell(0, "B"): MICROBATCHES,
    }  # fmt: skip
    assert times.device is None
    forward, backward = (statistics.median(times.samples_ns[Cell(0, c)]) for c in "FB")
    assert 0 < forward < backward


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("nonsense", "not valid JSON"),
        ('{"events": []}', "no traceEvents"),
        ('{"traceEvents": []}', "no range is named PP:<cell>"),
        ('{"traceEvents": [1]}', "not as a torch profiler writes them"),
        (
            '{"traceEvents": [{"ph": "X", "cat": "user_annotation", "name": "PP:0F0", "dur": 1}]}',
            "not as a torch profiler writes them",
        ),
    ],
)
def test_what_is_no_such_trace_is_refused(document: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(document)
    with pytest.raises(ProfileError, match=said):
        read_cell_times([tmp_path / "t.json"])


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:40] + b"?" * 40])
def test_a_damaged_archive_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    trace = MadeUp()
    trace.cell("0F0", ("gemm", 30.0))
    path = trace.write(tmp_path / "t.json.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ProfileError, match=r"t\.json\.gz: not valid JSON, or cut short"):
        read_cell_times([path])


def test_a_cell_that_runs_nothing_is_refused(tmp_path: Path) -> None:
    trace = MadeUp()
    trace.cell("0F0", ("gemm", 30.0))
    trace.cell("0B0")
    times = read_cell_times([trace.write(tmp_path / "t.json")])
    with pytest.raises(ProfileError, match="cell 0B: no kernel was launched in most of its ranges"):
        profile_of(plan_of(), times, synthetic_profile(), "mine")


def test_a_run_that_does_not_fit_the_plan_is_refused(tmp_path: Path) -> None:
    trace = MadeUp()
    trace.cell("5F0", ("gemm", 30.0))
    times = read_cell_times([trace.write(tmp_path / "far.json")])
    with pytest.raises(ProfileError, match="cell 5F: the plan has 2 stages"):
        profile_of(plan_of(), times, synthetic_profile(), "mine")
    trace = MadeUp()
    trace.cell("0F0", ("gemm", 30.0))
    times = read_cell_times([trace.write(tmp_path / "forward.json")])
    with pytest.raises(ProfileError, match="needs cells of a forward"):
        profile_of(plan_of(), times, synthetic_profile(), "mine")
