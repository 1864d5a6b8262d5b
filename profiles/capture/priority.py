"""Measuring stream priority: how long a short kernel waits for a chip that another keeps busy.

A *resident* fills the chip: kernels of the global timer with CTAs of known life (many short ones,
few long ones, one wave that stays), and the real ones of
:mod:`mhcplan.profiles.capture.overlap_kernels`. After a random time a *probe* is launched on a
stream of higher or of equal priority. All times are taken from one trace, on one clock: the host's
call that launches the probe, its start and end, and the resident kernel that was running then. The
probe's CTAs write their own starts, which the trace does not have.

``CUDA_DEVICE_MAX_CONNECTIONS`` counts when the driver starts, so each value gets a process.
``python -m mhcplan.profiles.capture.priority --log FILE`` runs it by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhcplan.profiles.capture.ops import append_line
from mhcplan.profiles.capture.overlap_kernels import clock_ctas, makers
from mhcplan.profiles.capture.overlap_trace import MARKER, launch_of, span_ns, trace_events
from mhcplan.profiles.logs import read_log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONNECTIONS = (8, 1, 32)  # the driver's default first
TRIALS = 12
_RESIDENT_NS = 4_000_000  # work that is queued before the probe
_PROBE_LIFE_NS = 4_000
_LEVELS = {"high": -2, "equal": 0}
_PROBES = {"small": (16, 4), "full": (264, 8)}  # CTAs, warps
_BLOCKED = (1, 7, 15, 31)
_SEED = 20261

Row = dict[str, Any]


@dataclass(frozen=True)
class Resident:
    """What keeps the chip busy: ``call`` launches it once, ``count`` times make about 4 ms."""

    name: str
    family: str
    call: Callable[[], object]
    count: int


def _say(text: str) -> None:
    print(f"[priority] {text}", file=sys.stderr, flush=True)


class Bench:
    """A device with its residents and probes."""

    def __init__(self, device: torch.device, trials: int) -> None:
        """Make the streams and buffers."""
        self.device, self.trials = device, trials
        self.chance = random.Random(_SEED)
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.background = torch.cuda.Stream(device)
        self.probing = {
            level: torch.cuda.Stream(device, priority=value) for level, value in _LEVELS.items()
        }
        self.clocks = torch.zeros(1 << 20, dtype=torch.int64, device=device)
        self.starts = torch.zeros(3 * 1024, dtype=torch.int64, device=device)
        self.begin = time.monotonic()

    def residents(self) -> list[Resident]:
        """Clock kernels of three kinds, then the real kernels that run here."""
        wave = 2 * self.num_sms
        shapes = {
            "clock_short_ctas": (40 * wave, 20_000), "clock_long_ctas": (4 * wave, 400_000),
            "clock_one_wave": (wave, 3_000_000),
        }  # fmt: skip
        found = [
            Resident(
                name, "clock", lambda c=ctas, n=life: clock_ctas(self.clocks, c, n),
                max(2, round(_RESIDENT_NS / (ctas / wave * life))),
            )
            for name, (ctas, life) in shapes.items()
        ]  # fmt: skip
        for name, make in makers(self.device).items():
            try:
                case = make()
                found.append(Resident(name, case.family, case.call, self._count(case.call)))
            except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
                _say(f"{name}: left out: {str(error).splitlines()[:1]}")
        return found

    def _count(self, call: Callable[[], object]) -> int:
        for _ in range(3):
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        for _ in range(4):
            call()
        end.record()
        end.synchronize()
        return max(2, min(120, round(_RESIDENT_NS / (start.elapsed_time(end) * 1e6 / 4))))

    def probe(self, kind: str) -> None:
        """Launch a probe on the current stream."""
        ctas, warps = _PROBES[kind]
        clock_ctas(self.starts, ctas, _PROBE_LIFE_NS, warps)

    def trial(self, resident: Resident | None, level: str, kind: str) -> Row:
        """One launch of a probe; the trace has its times but for those of its CTAs."""
        torch.cuda._sleep(1)
        torch.cuda.synchronize()
        if resident is not None:
            with torch.cuda.stream(self.background):
                for _ in range(resident.count):
                    resident.call()
            until = time.perf_counter_ns() + self.chance.randrange(200_000, 1_500_000)
            while time.perf_counter_ns() < until:
                pass
        with torch.cuda.stream(self.probing[level]):
            self.probe(kind)
        torch.cuda.synchronize()
        ctas = _PROBES[kind][0]
        starts = self.starts[: 3 * ctas].view(-1, 3).tolist()
        return {
            "case": "latency", "resident": resident.name if resident else "idle", "level": level,
            "probe": kind, "cta_starts_ns": [min(s[0] for s in starts), max(s[0] for s in starts)],
            "cta_end_ns": max(s[1] for s in starts), "sms": len({s[2] for s in starts}),
        }  # fmt: skip

    def blocked(self, count: int) -> Row:
        """``count`` streams wait for a kernel of 1 ms; probes go to streams that wait for nothing.

        Whoever shares a hardware queue with a stream that waits, waits with it.
        """
        torch.cuda._sleep(1)
        torch.cuda.synchronize()
        holder = torch.cuda.Stream(self.device)
        done = torch.cuda.Event()
        with torch.cuda.stream(holder):
            clock_ctas(self.clocks, 8, 1_000_000, 4)
            done.record()
        for _ in range(count):
            stream = torch.cuda.Stream(self.device)
            stream.wait_event(done)
            with torch.cuda.stream(stream):
                clock_ctas(self.clocks[4096:], 1, 1_000, 4)
        for _ in range(8):
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                clock_ctas(self.starts, 2, 1_000, 4)
        torch.cuda.synchronize()
        return {"case": "blocked", "blocked": count}


def _trials(bench: Bench, residents: Sequence[Resident]) -> list[Callable[[], Row]]:
    """Every case ``trials`` times, in rounds, so that a drift does not meet one case alone."""
    calls: list[Callable[[], Row]] = []
    for _ in range(bench.trials):
        calls += [
            lambda r=resident, v=level, k=kind: bench.trial(r, v, k)
            for level in _LEVELS for kind in _PROBES for resident in (None, *residents)
        ]  # fmt: skip
        calls += [lambda n=count: bench.blocked(n) for count in _BLOCKED]
    return calls


def _traced(calls: Sequence[Callable[[], Row]]) -> list[Row]:
    """Make the calls under one trace and add to each row what the trace says of it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as records:
        rows = [call() for call in calls]
        torch.cuda.synchronize()
    events, base = trace_events(records)
    launches = {
        e["args"]["correlation"]: span_ns(e, base)[0]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") == "kernel"]
    kernels.sort(key=lambda e: e["args"]["correlation"])
    groups: list[list[dict[str, Any]]] = []
    for event in kernels:
        if MARKER in event["name"]:
            groups.append([])
        elif groups:
            groups[-1].append(event)
    if len(groups) != len(rows):
        _say(f"{len(groups)} trials in the trace instead of {len(rows)}: left out")
        return []
    for row, group in zip(rows, groups, strict=True):
        (_add_latency if row["case"] == "latency" else _add_blocked)(row, group, launches, base)
    return rows


def _add_latency(
    row: Row, group: list[dict[str, Any]], launches: dict[int, int], base: int
) -> None:
    """Times relative to the probe's launch call, ns; the probe was launched last."""
    probe, others = group[-1], group[:-1]
    zero = launches.get(probe["args"]["correlation"], 0)
    start, length = span_ns(probe, base)
    row |= {"launched_ns": zero, "start_ns": start - zero, "end_ns": start + length - zero}
    left = [e for e in others if sum(span_ns(e, base)) > zero]
    around = [e for e in left if span_ns(e, base)[0] < start + length]
    row["queued"] = len(left)
    row["residents"] = [
        [span_ns(e, base)[0] - zero, span_ns(e, base)[1], launch_of(e), e["name"][:80]]
        for e in around[:4]
    ]


def _add_blocked(
    row: Row, group: list[dict[str, Any]], launches: dict[int, int], base: int
) -> None:
    """Latency of each of the eight free probes, ns, and when the holder ended."""
    holder, probes = group[0], group[-8:]
    row["latencies_ns"] = [
        span_ns(e, base)[0] - launches.get(e["args"]["correlation"], 0) for e in probes
    ]
    first = launches.get(probes[0]["args"]["correlation"], 0)
    row["holder_left_ns"] = sum(span_ns(holder, base)) - first


def green_rows(bench: Bench) -> list[Row]:
    """A resident that stays, confined to a green context: how many SMs it got, how long a probe
    outside waits. One row that says why, where green contexts cannot be had."""
    try:
        from torch.cuda.green_contexts import GreenContext
    except ImportError as error:
        return [{"case": "green", "error": str(error)}]
    rows: list[Row] = []
    for wanted in (bench.num_sms - 20, bench.num_sms // 2):
        try:
            try:
                context = GreenContext.create(num_sms=wanted, device_id=bench.device.index or 0)
            except TypeError:  # positional before torch 2.12
                create: Any = GreenContext.create
                context = create(wanted, bench.device.index or 0)
            rows += _in_green(bench, context, wanted)
        except (RuntimeError, TypeError, AttributeError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            rows.append({"case": "green", "wanted_sms": wanted, "error": text})
    return rows


def _in_green(bench: Bench, context: Any, wanted: int) -> list[Row]:  # noqa: ANN401 - torch's
    stream = context.Stream()
    wave = 2 * wanted
    rows = []
    for trial in range(bench.trials + 1):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            clock_ctas(bench.clocks, wave, 2_000_000)
        time.sleep(0.0005)
        with torch.cuda.stream(bench.probing["equal"]):
            bench.probe("small")
        torch.cuda.synchronize()
        resident = bench.clocks[: 3 * wave].view(-1, 3).tolist()
        probe = bench.starts[: 3 * _PROBES["small"][0]].view(-1, 3).tolist()
        if trial:  # the first loads the kernel into the context
            first = min(r[0] for r in resident)
            rows.append({
                "case": "green", "wanted_sms": wanted, "sms": len({r[2] for r in resident}),
                "waves": 1 + (max(r[0] for r in resident) > min(r[1] for r in resident)),
                "probe_first_ns": min(p[0] for p in probe) - first,
                "probe_last_ns": max(p[0] for p in probe) - first,
                "resident_ns": max(r[1] for r in resident) - first,
                "shared_sms": len({r[2] for r in resident} & {p[2] for p in probe}),
            })  # fmt: skip
    return rows


def survey(residents: Sequence[Resident], device: torch.device) -> list[Row]:
    """Grid, CTAs per SM and waves of every kernel of every case: which of them are persistent."""
    from mhcplan.profiles.capture.segments import chip_of, make_segments, record_kernels

    chip = chip_of(device)
    cases = [(r.name, r.call) for r in residents if r.family != "clock"]
    for size in (1024, 2048, 3072, 4096, 6144, 8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        cases.append((f"gemm_library {size}", lambda a=a, b=b: torch.mm(a, b)))
    rows = []
    for (name, _), kernels in zip(cases, record_kernels([c for _, c in cases]), strict=True):
        total = sum(k.duration_ns for k in kernels)
        found = make_segments(kernels, chip, max(1, total), 0)
        rows.append({
            "case": "survey", "name": name,
            "kernels": [s.model_dump(exclude={"hbm_bytes"}) for s in found],
        })  # fmt: skip
    return rows


def measure(log: Path, stamp: dict[str, Any], trials: int, chunk: int = 300) -> None:
    """Everything in this process, appended to ``log`` as it comes."""
    device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(device, trials)
    residents = bench.residents()
    _say(f"{len(residents)} residents ready after {time.monotonic() - bench.begin:.1f} s")
    for kind in _PROBES:  # compile
        bench.probe(kind)
    bench.blocked(1)
    torch.cuda.synchronize()
    if stamp["connections"] == CONNECTIONS[0]:
        _append(log, stamp, survey(residents, device))
        _append(log, stamp, green_rows(bench))
    calls = _trials(bench, residents)
    for first in range(0, len(calls), chunk):
        _append(log, stamp, _traced(calls[first : first + chunk]))
        done = min(first + chunk, len(calls))
        _say(f"connections={stamp['connections']}: {done}/{len(calls)}"
             f" {time.monotonic() - bench.begin:.0f} s")  # fmt: skip


def _append(log: Path, stamp: dict[str, Any], rows: Sequence[Row]) -> None:
    for row in rows:
        append_line(log, {**stamp, "priority": row})


def measure_priority(
    log: Path, stamp: dict[str, str], trials: int = TRIALS, budget_seconds: float = 200.0
) -> None:
    """Measure with each value of CUDA_DEVICE_MAX_CONNECTIONS that ``log`` does not have yet.

    Raises:
        RuntimeError: a process failed.
    """
    end = time.monotonic() + budget_seconds
    done = {line.get("connections") for line in read_log(log, stamp) if line["priority"] == "done"}
    for connections in CONNECTIONS:
        if connections in done or time.monotonic() > end:
            continue
        command = [
            sys.executable, "-m", __name__ if __name__ != "__main__" else _MODULE, "--log",
            str(log), "--trials", str(trials), "--stamp", json.dumps(stamp),
            "--connections", str(connections),
        ]  # fmt: skip
        environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": str(connections)}
        left = max(10.0, end - time.monotonic())
        try:
            failed = subprocess.run(command, env=environment, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:  # its rows so far are in the log
            _say(f"connections={connections}: out of time; run again to go on")
            break
        if failed:
            raise RuntimeError(f"measuring with {connections} connections failed")
        _append(log, {**stamp, "connections": connections}, ["done"])  # type: ignore[list-item]


_MODULE = "mhcplan.profiles.capture.priority"


def summary(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Median latencies as lines of text, us: launch call to the probe's start and to its end."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for line in lines:
        row = line["priority"]
        if row != "done" and row["case"] == "latency":
            key = (line["connections"], row["resident"], row["level"], row["probe"])
            groups.setdefault(key, []).append(row)
    found = []
    for (connections, *names), rows in sorted(groups.items(), key=str):
        start, end = (statistics.median(r[k] for r in rows) / 1000 for k in ("start_ns", "end_ns"))
        found.append(f"{connections:3d} {' '.join(names):48s} start {start:8.1f} end {end:8.1f} us")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure by itself; ``--connections`` is for the processes that it starts."""
    from mhcplan.profiles.capture.machine import code_sha256, device_name

    parser = argparse.ArgumentParser(prog="priority")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--budget-seconds", type=float, default=200.0)
    parser.add_argument("--connections", type=int)
    parser.add_argument("--stamp")
    chosen = parser.parse_args(arguments)
    if chosen.connections is not None:
        stamp = {**json.loads(chosen.stamp), "connections": chosen.connections}
        measure(chosen.log, stamp, chosen.trials)
        return
    stamp = {"code": code_sha256(), "device": device_name(torch.device("cuda"))}
    measure_priority(chosen.log, stamp, chosen.trials, chosen.budget_seconds)
    for line in summary(read_log(chosen.log, stamp)):
        print(line)


if __name__ == "__main__":
    main()
