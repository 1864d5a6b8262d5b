"""DualPipe's bubble and what its messages cost, against the published formula."""

from __future__ import annotations

from benchmarks.results.tables import Section
from mhcplan.planner.schedules.catalogue import build_schedule
from mhcplan.planner.schedules.graph import ChunkTimes, Waits, bubbles_ns, end_times_ns

# F, I, W and F&B in tenths of a unit
TIMES = (
    (10, 10, 10, 30), (10, 10, 10, 25), (10, 10, 10, 20), (10, 14, 10, 30), (10, 20, 10, 34),
    (10, 12, 8, 26), (10, 8, 10, 24), (10, 10, 12, 26), (13, 11, 10, 29), (8, 10, 10, 25),
)  # fmt: skip
_WAITS: tuple[Waits, ...] = ("eager", "buffered", "grouped")
_SHAPES = ((4, 8), (4, 12), (6, 14), (8, 20), (8, 64), (12, 30), (16, 64))


def bubbles() -> Section:
    """P = 8, M = 20, messages for free."""
    schedule = build_schedule("dualpipe", 8, 20)
    rows: list[tuple[str, ...]] = []
    for times in TIMES:
        forward, input_grad, weight_grad, overlap = times
        published = 3 * (overlap + input_grad + weight_grad - 3 * weight_grad)
        found = (bubbles_ns(schedule, ChunkTimes(*times), p2p) for p2p in _WAITS)
        cells = (f"{min(b) / 10:.1f} .. {max(b) / 10:.1f}" for b in found)
        head = ", ".join(f"{t / 10:g}" for t in (forward, input_grad, weight_grad, overlap))
        rows.append((head, f"{published / 10:.1f}", *cells))
    about = (
        "P = 8, M = 20, all stages alike, messages for free; least and most of all ranks."
        " Published (arXiv 2412.19437, table 2): (P/2-1)(F&B + B - 3W). An action waits for its own"
        " message only, for all receives posted before it, or for the whole batch, sends included."
    )
    reading = (
        "The formula is exact for F = I = W only; else it errs to both sides. The three columns"
        " differ where DualPipe posts a receive ahead of an action that does not need it, which"
        " shows as soon as F or W takes longer than I. NCCL's grouped call is the last column."
    )
    columns = ("F, I, W, F&B", "published", "own message", "receives", "whole batch")
    return Section("DualPipe's bubble", about, columns, tuple(rows), reading)


def latency() -> Section:
    """What a unit of latency in every message costs a step."""
    rows: list[tuple[str, ...]] = []
    for ranks, microbatches in _SHAPES:
        schedule = build_schedule("dualpipe", ranks, microbatches)
        extra: list[int] = []
        for p2p in ("grouped", "eager"):
            free, slow = (
                max(end_times_ns(schedule, ChunkTimes(100, 100, 100, 300, ns), p2p).values())
                for ns in (0, 10)
            )
            extra.append((slow - free) // 10)
        law = microbatches + 2 * ranks - 4
        rows.append((f"{ranks}, {microbatches}", *map(str, (law, *extra))))
    about = (
        "Extra step time in latencies c of a message, F = I = W = 10 c, messages without bandwidth:"
        " in batches between the actions, as in DeepSeek's DualPipe, and posted each by itself."
    )
    columns = ("P, M", "M + 2P - 4", "whole batch", "own message")
    return Section("What a message's latency costs DualPipe", about, columns, tuple(rows))
