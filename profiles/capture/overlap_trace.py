"""What two streams did, from the profiler's records: start and length of every kernel.

A *run* begins with a marker kernel and ends with another; in between, what NCCL or a copy engine
did is *traffic* and all else is *compute*. Times of one trace are ns on the host's clock, so traces
of two processes can be laid side by side. A kernel's recorded start is the start of its first CTA
(within 0.2 us of the CTAs' own readings of the GPU's timer, on an H100, with a full chip or not).
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

MARKER = "spin_kernel"  # torch.cuda._sleep
_TRAFFIC_KERNEL = "ncclDevKernel"
_DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Run:
    """Kernels of one run, each [start ns, length ns], in order of their start.

    ``names`` and ``launch`` ({name: [grid, threads, registers, shared bytes]}) are of compute
    kernels; ``traffic_launch`` is that of the traffic's kernel.
    """

    compute: list[list[int]] = field(default_factory=list)
    traffic: list[list[int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    launch: dict[str, list[int]] = field(default_factory=dict)
    traffic_launch: list[int] = field(default_factory=list)


def trace_events(records: Any) -> tuple[list[dict[str, Any]], int]:  # noqa: ANN401 - torch's
    """All events of a finished ``torch.profiler.profile``, and the ns that their ts count from."""
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        records.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            trace = json.load(file)
    finally:
        os.unlink(path)
    return trace["traceEvents"], int(trace.get("baseTimeNanoseconds", 0))


def span_ns(event: dict[str, Any], base_ns: int) -> list[int]:
    """[start, length] of an event in ns."""
    return [base_ns + round(1000 * float(event["ts"])), round(1000 * float(event["dur"]))]


def launch_of(event: dict[str, Any]) -> list[int]:
    """[grid, threads, registers, shared bytes] of a kernel record; zeros for a copy."""
    args = event.get("args", {})
    counts = []
    for key in ("grid", "block"):
        product = 1
        for extent in args.get(key, [0]):
            product *= int(extent)
        counts.append(product)
    return [*counts, int(args.get("registers per thread", 0)), int(args.get("shared memory", 0))]


def is_traffic(event: dict[str, Any]) -> bool:
    """Whether a device event is NCCL's kernel or a copy between devices."""
    if event.get("cat") == "gpu_memcpy":
        return "PtoP" in event["name"] or "Peer" in event["name"]
    return _TRAFFIC_KERNEL in event["name"]


def split_runs(events: list[dict[str, Any]], base_ns: int) -> list[Run]:
    """The runs of a trace, in order; what lies between the end of one and the next is left out."""
    device = [e for e in events if e.get("ph") == "X" and e.get("cat") in _DEVICE_KINDS]
    device.sort(key=lambda e: float(e["ts"]))
    runs: list[Run] = []
    inside = False
    for event in device:
        if MARKER in event["name"]:
            inside = not inside
            if inside:
                runs.append(Run())
        elif inside:
            _add(runs[-1], event, base_ns)
    return runs


def _add(run: Run, event: dict[str, Any], base_ns: int) -> None:
    if is_traffic(event):
        run.traffic.append(span_ns(event, base_ns))
        run.traffic_launch = launch_of(event)
        return
    name = event["name"][:100]
    run.compute.append(span_ns(event, base_ns))
    run.names.append(name)
    run.launch[name] = launch_of(event)
