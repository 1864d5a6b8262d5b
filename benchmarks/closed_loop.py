"""Run the rows of the closed loop on GPUs and put what was measured beside what was predicted.

    python benchmarks/closed_loop.py ROWS --out OUT --gpus 2 --minutes 7.5

ROWS is what ``closed_loop_predict.py`` wrote. Anchors come first (copy, GEMM, one F and one B block
of a shape in no row). Then every row, in one set of processes: peak memory of its Program alone,
un-instrumented step times with its plain baseline in turns, a traced step of both. Each finished
row is a line of ``OUT/results.jsonl`` with its traces in ``OUT/ROW.*.trace.json``; a row that is
there is not run again. A row that fails or outlasts ``--row-seconds`` ends the processes; the
script starts new ones for the rows after it. ``--device cpu`` runs tiny rows on gloo (a dry run).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from mhcplan.runtime.launch import ProcessFailed, launch
from mhcplan.runtime.measure import peak_memory, time_steps, trace_step
from mhcplan.runtime.spec import RunSpec
from mhcplan.runtime.train import Session, Trainer
from mhcplan.sim.files import read_program, read_trace, write_trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhcplan.sim.files import Trace

COPY_BYTES, GEMM = 1 << 30, 8192
LEAST_S = 20.0  # a row is not begun with less time left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--row-seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="rows to run; default: all of rows.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    options.until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    rows = options.only or json.loads((options.rows / "rows.json").read_text())
    if not (options.out / "anchors.json").exists():
        with contextlib.suppress(ProcessFailed):
            launch(run_anchors, 1, options, device=options.device)
    failed: set[str] = set()
    while pending := [r for r in rows if r not in failed and not is_done(options.out, r)]:
        if time.monotonic() + LEAST_S > options.until:
            break
        try:
            launch(run_rows, options.gpus, options, pending, device=options.device)
        except ProcessFailed as error:
            name = (options.out / "running").read_text()
            failed.add(name)
            keep(options.out, {"row": name, "failed": str(error)[-2000:]})
            print(f"{name}: failed: {str(error)[-500:]}", flush=True)
    left = [r for r in rows if not is_done(options.out, r)]
    print(f"{len(rows) - len(left)} of {len(rows)} rows done; left: {left}")


def is_done(out: Path, name: str) -> bool:
    """Whether a row has its line of results."""
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return any(r["row"] == name and "failed" not in r for r in map(json.loads, lines))


def keep(out: Path, result: dict[str, Any]) -> None:
    """Append a row's line."""
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End this process, and so all, if the block takes longer."""

    def end() -> None:
        print(f"{what} took more than {seconds:.0f} s", flush=True)
        os._exit(4)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


# -- rows ------------------------------------------------------------------------------------------


def run_rows(process: int, world: int, options: argparse.Namespace, names: list[str]) -> None:
    """One process of the set."""
    device = torch.device(options.device, process if options.device == "cuda" else None)
    session = Session(device, timeout_s=options.row_seconds)
    for name in names:
        go_on = torch.tensor(int(time.monotonic() + LEAST_S < options.until), device=device)
        dist.all_reduce(go_on, dist.ReduceOp.MIN)
        if not go_on:
            break
        if process == 0:
            (options.out / "running").write_text(name)
        with time_limit(options.row_seconds, name):
            result = run_row(options.rows / name, session, options)
        if process == 0:
            keep(options.out, {"row": name} | result)
            print(f"{name}: {summary(result)}", flush=True)


def run_row(folder: Path, session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one row; the result is process 0's."""
    begin = time.monotonic()
    plan = json.loads((folder / "plan.json").read_text())
    plain = plan["residual"] | {"kind": "plain", "expansion_rate": 1, "recompute_block": "none"}
    plans = {"mhc": plan, "plain": plan | {"residual": plain}}
    files = {"mhc": "program.json", "plain": "baseline.json"}
    if plan["residual"]["expansion_rate"] == 1:
        del plans["plain"]
    trainers: dict[str, Trainer] = {}
    memory: dict[str, Any] = {}
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    for name, its_plan in plans.items():
        program = read_program(folder / files[name])
        spec = RunSpec.from_plan(its_plan, dtype=dtype)
        held = allocated(session)
        trainers[name] = Trainer(program, spec, session)
        memory[name] = all_memory(trainers[name], held)
    seconds = {"build": time.monotonic() - begin}
    times = time_steps(trainers, options.steps, options.warm_up)
    seconds["steps"] = time.monotonic() - begin
    traces = {name: trace_step(trainer, 0) for name, trainer in trainers.items()}
    seconds["traces"] = time.monotonic() - begin
    losses = {name: mean_loss(trainer) for name, trainer in trainers.items()}
    trainers.clear()
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
    if session.process != 0:
        return {}
    measured = {
        name: {
            "step_ns": t.median_ns, "spread_percent": round(t.spread_percent, 2),
            "all_step_ns": t.step_ns, "issue_ns": int(statistics.median(t.issue_ns)),
        }
        for name, t in times.items()
    }  # fmt: skip
    result: dict[str, Any] = {
        "measured": measured, "memory": memory, "losses": losses, "seconds": seconds,
        "device": torch.cuda.get_device_name() if session.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }  # fmt: skip
    for name, trace in traces.items():
        assert trace is not None
        write_trace(trace, options.out / f"{folder.name}.{name}.trace.json")
        measured[name]["traced_step_ns"] = trace.timeline.step_ns
        result.setdefault("ops", {})[name] = by_kind(trace)
    result |= compare(folder, measured, traces)
    return result


def allocated(session: Session) -> int:
    """Bytes that tensors hold on this device."""
    return torch.cuda.memory_allocated() if session.device.type == "cuda" else 0


def all_memory(trainer: Trainer, held: int) -> list[dict[str, int]]:
    """Peak memory of every process, less what was held before the Trainer was built."""
    peak = peak_memory(trainer)
    mine = {"static": peak.static - held, "allocated": peak.allocated - held,
            "reserved": peak.reserved - held}  # fmt: skip
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def mean_loss(trainer: Trainer) -> float:
    """Over all microbatches of the last step, wherever they ended."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, list(trainer.losses().values()))
    return statistics.fmean(loss for losses in every for loss in losses)


def by_kind(trace: Trace) -> dict[str, dict[str, int]]:
    """Median duration of each cost key's ops in a trace, with their number and sum."""
    program, line = trace.program, trace.timeline
    duration = line.end_ns - line.start_ns
    found: dict[str, dict[str, int]] = {}
    for number, key in enumerate(program.cost_keys):
        ops = np.flatnonzero(program.cost == number)
        if key != "none" and len(ops):
            of = duration[ops]
            found[key] = {
                "num": len(ops), "median_ns": int(np.median(of)), "sum_ns": int(of.sum())
            }  # fmt: skip
    return found


def compare(folder: Path, measured: dict[str, Any], traces: dict[str, Any]) -> dict[str, Any]:
    """Errors against the row's prediction, if it has one."""
    path = folder / "prediction.json"
    if not path.exists():
        return {}
    claim = json.loads(path.read_text())
    step = measured["mhc"]["step_ns"]
    found: dict[str, Any] = {
        "predicted": claim,
        "step_error_percent": 100 * (claim["step_time_ns"] / step - 1),
    }
    if "plain" in measured:
        plain = measured["plain"]["step_ns"]
        found["overhead_percent"] = 100 * (step / plain - 1)
        error = claim["overhead_percent"] - found["overhead_percent"]
        found["overhead_error_points"] = error
    predicted = by_kind(read_trace(folder / "predicted.trace.json"))
    found["op_error_percent"] = {
        key: 100 * (predicted[key]["median_ns"] / row["median_ns"] - 1)
        for key, row in by_kind(traces["mhc"]).items()
        if row["median_ns"]
    }
    return found


def summary(result: dict[str, Any]) -> str:
    """A row in a line."""
    words = []
    for name, m in result["measured"].items():
        words.append(
            f"{name} {m['step_ns'] / 1e6:.2f} ms ±{m['spread_percent']:.1f} % (host"
            f" {m['issue_ns'] / 1e6:.1f}, traced {m['traced_step_ns'] / 1e6:.1f})"
        )
        peaks = [
            f"{p['allocated'] / 1e9:.2f}/{p['reserved'] / 1e9:.2f}" for p in result["memory"][name]
        ]
        words.append("GB " + " ".join(peaks))
    if "step_error_percent" in result:
        words.append(f"predicted {result['step_error_percent']:+.1f} %")
    words.append(f"loss {result['losses']['mhc']:.3f}, {result['seconds']['traces']:.0f} s")
    return ", ".join(words)


# -- anchors ---------------------------------------------------------------------------------------


def run_anchors(process: int, _world: int, options: argparse.Namespace) -> None:
    """Copy, GEMM, and F and B of one block on one GPU."""
    device = torch.device(options.device, process if options.device == "cuda" else None)
    found: dict[str, Any] = {}
    with time_limit(options.row_seconds, "anchors"):
        if options.device == "cuda":
            found |= rates(device)
        session = Session(device)
        folder = options.rows / "anchor"
        plan = json.loads((folder / "plan.json").read_text())
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        trainer = Trainer(
            read_program(folder / "program.json"), RunSpec.from_plan(plan, dtype=dtype), session
        )
        times = time_steps({"anchor": trainer}, options.steps, options.warm_up)["anchor"]
        trace = trace_step(trainer, 0)
        assert trace is not None
        write_trace(trace, options.out / "anchor.trace.json")
        found |= {"step_ns": times.median_ns, "issue_ns": statistics.median(times.issue_ns)}
        found |= {"ops": by_kind(trace), **block_times(trace)}
    (options.out / "anchors.json").write_text(json.dumps(found, indent=1))
    print({k: v for k, v in found.items() if k != "ops"}, flush=True)


def rates(device: torch.device) -> dict[str, float]:
    """Bytes read and written a second by a copy, operations a second by a bf16 GEMM."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(GEMM, GEMM, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy_s = seconds_of(lambda: target.copy_(source))
    gemm_s = seconds_of(lambda: torch.mm(a, b))
    return {
        "copy_bytes_per_second": 2 * COPY_BYTES / copy_s,
        "gemm_flops_per_second": 2 * GEMM**3 / gemm_s,
    }


def seconds_of(call: Any, repeats: int = 20) -> float:  # noqa: ANN401
    """Median time on the device."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def block_times(trace: Trace) -> dict[str, int]:
    """Summed op durations of the second microbatch's F and B."""
    program, line = trace.program, trace.timeline
    found = {}
    for name, cell in (("f_block_ns", "0F1"), ("b_block_ns", "0B1")):
        ops = program.cell == program.cells.index(cell)
        found[name] = int((line.end_ns - line.start_ns)[ops].sum())
    return found


if __name__ == "__main__":
    main()
