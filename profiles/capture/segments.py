"""The kernels of an op as the SMs see them, from the profiler's kernel records.

Passes of an op are run under the profiler with a one-cycle marker kernel between them; what lies
between two markers is one pass. How many CTAs of a kernel fit on an SM follows from its registers,
shared memory and threads, with the limits and granularities of compute capability 9.0 (CUDA C
programming guide, "Compute Capabilities"; registers are given out to warps in units of 256).
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mhcplan.profiles.schema import Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MARKER = "spin_kernel"  # torch.cuda._sleep
_REGISTER_UNIT = 256
_RESERVED_SHARED_BYTES = 1024  # of each CTA, by the system
_MAX_CTAS_PER_SM = 32
_LONG_CTA_NS = 20_000  # a grid of one wave with CTAs this long holds its SMs as persistent ones do


class Kernel(NamedTuple):
    """One kernel record: median duration over the repetitions, and its launch."""

    name: str
    duration_ns: int
    grid: int
    threads: int
    registers: int
    shared_bytes: int


class Chip(NamedTuple):
    """What an SM holds."""

    num_sms: int
    registers: int
    shared_bytes: int
    threads: int


def chip_of(device: torch.device) -> Chip:
    """Limits of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    return Chip(
        found.multi_processor_count,
        found.regs_per_multiprocessor,
        found.shared_memory_per_multiprocessor,
        found.max_threads_per_multi_processor,
    )


def ctas_per_sm(kernel: Kernel, chip: Chip) -> int:
    """CTAs of ``kernel`` that one SM holds at once, at least 1."""
    warps = -(-kernel.threads // 32)
    per_warp = -(-kernel.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    fits = [
        _MAX_CTAS_PER_SM,
        chip.threads // max(1, warps * 32),
        chip.registers // max(1, per_warp * warps),
        chip.shared_bytes // (kernel.shared_bytes + _RESERVED_SHARED_BYTES),
    ]
    return max(1, min(fits))


def record_kernels(calls: Sequence[Callable[[], object]], repeats: int = 3) -> list[list[Kernel]]:
    """Run each call ``repeats`` times under the profiler: the kernels of each, in stream order.

    A call whose repetitions launched different kernels gets those of its last one.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as records:
        for call in calls:
            for _ in range(repeats):
                torch.cuda._sleep(1)
                call()
        torch.cuda._sleep(1)
        torch.cuda.synchronize()
    runs = _split(_device_events(records))
    if len(runs) != repeats * len(calls):
        return [[] for _ in calls]  # the profiler dropped records: rather none than wrong ones
    return [_median(runs[i : i + repeats]) for i in range(0, len(runs), repeats)]


def _device_events(records: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - torch's profiler
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        records.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    finally:
        os.unlink(path)
    kinds = ("kernel", "gpu_memset", "gpu_memcpy")
    found = [e for e in events if e.get("ph") == "X" and e.get("cat") in kinds]
    return sorted(found, key=lambda e: e["ts"])


def _split(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    runs: list[list[dict[str, Any]]] = []
    for event in events:
        if _MARKER in event["name"]:
            runs.append([])
        elif runs:
            runs[-1].append(event)
    return runs[:-1]


def _median(runs: list[list[dict[str, Any]]]) -> list[Kernel]:
    names = [[e["name"] for e in run] for run in runs]
    if any(n != names[-1] for n in names):
        runs = runs[-1:]
    return [_kernel([run[i] for run in runs]) for i in range(len(runs[-1]))]


def _kernel(events: list[dict[str, Any]]) -> Kernel:
    args = events[-1].get("args", {})
    grid, block = args.get("grid", [0]), args.get("block", [0])
    product = 1
    for extent in grid:
        product *= int(extent)
    threads = 1
    for extent in block:
        threads *= int(extent)
    return Kernel(
        name=events[-1]["name"][:120],
        duration_ns=max(1, round(1000 * statistics.median(float(e["dur"]) for e in events))),
        grid=product,
        threads=threads,
        registers=int(args.get("registers per thread", 0)),
        shared_bytes=int(args.get("shared memory", 0)),
    )


def make_segments(
    kernels: Sequence[Kernel], chip: Chip, duration_ns: int, hbm_bytes: int
) -> tuple[Segment, ...]:
    """Segments of an op that takes ``duration_ns`` and moves ``hbm_bytes``.

    The bytes are shared out by duration. Where the records add up to more than the op takes back
    to back (the profiler adds a little to each kernel), they are scaled down to it. A fill or copy
    of the driver has no grid in its record: it counts as one CTA on every SM.
    """
    total = sum(k.duration_ns for k in kernels)
    if not total:
        return ()
    scale = min(1.0, duration_ns / total)
    segments = []
    for kernel in kernels:
        share = kernel.duration_ns / total
        length = max(1, int(kernel.duration_ns * scale))
        ctas = kernel.grid or chip.num_sms
        fit = ctas_per_sm(kernel, chip) if kernel.grid else 1
        waves = -(-ctas // (fit * chip.num_sms))
        segments.append(
            Segment(
                name=kernel.name,
                duration_ns=length,
                ctas=ctas,
                ctas_per_sm=fit,
                cta_ns=max(1, length // waves),
                persistent=waves == 1 and length >= _LONG_CTA_NS,
                hbm_bytes=int(hbm_bytes * share),
            )
        )
    return tuple(segments)
