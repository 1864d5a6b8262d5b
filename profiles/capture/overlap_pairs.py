"""Which kernel is measured beside which traffic, and what a pair's runs say.

A pair is run three times, both sides enqueued before either may start: in run ``A`` there is so
much traffic that it outlives the compute, in run ``B`` the other way round, in ``C`` both last
about as long. From run to run the second rank falls behind by another third of an op: a message
waits for SMs on both ranks, so that how their kernels lie to each other decides how long, and
nothing in a step fixes that. Only what lies wholly inside the time in which both streams had work
counts, without the first op of each side. What the compute takes alone is taken in the same runs,
from its ops before the traffic.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from mhcplan.profiles.transfer_costs import REDUCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mhcplan.profiles.capture.overlap_trace import Run

MIB = 1024**2
Busy = Literal["all", "first"]
PATTERNS = ("send_recv", "send_recv_both", "all_to_all")
COPY = "copy_engine"
CTAS = (0, 8, 16, 4, 2)  # 0: what the library takes by itself
SIZES = (8 * MIB, 64 * MIB, MIB)


@dataclass(frozen=True, order=True)
class Traffic:
    """One class of traffic at one message size.

    Attributes:
        pattern: as in the profile schema, or ``copy_engine`` (the first rank writes to the second).
        num_bytes: buffer on each rank.
        ctas: most and fewest CTAs that the communicator may use; 0 leaves it to the library.
        high_priority: of the communicator's stream.
        busy: whether ``all`` ranks compute meanwhile, or only the ``first``.
    """

    pattern: str
    num_bytes: int
    ctas: int = 0
    high_priority: bool = False
    busy: Busy = "all"

    @property
    def alone(self) -> Traffic:
        """The same where it does not matter who computes."""
        return Traffic(self.pattern, self.num_bytes, self.ctas, self.high_priority)

    @property
    def group(self) -> tuple[int, bool]:
        """Traffic of one communicator."""
        return self.ctas, self.high_priority


def pair_key(compute: str, traffic: Traffic | None) -> str:
    """Name of a pair in logs; either side may be absent (``-``)."""
    if traffic is None:
        return f"{compute}|-"
    level = "high" if traffic.high_priority else "equal"
    return (
        f"{compute}|{traffic.pattern} {traffic.num_bytes} ctas={traffic.ctas} {level}"
        f" busy={traffic.busy}"
    )


def _shuffled(pairs: Iterable[tuple[str, Traffic]]) -> list[tuple[str, Traffic]]:
    """In the order of a hash: wherever time runs out, what is measured is a fair sample."""
    return sorted(pairs, key=lambda p: hashlib.sha256(pair_key(*p).encode()).digest())


def all_traffic(sizes: Sequence[int] = SIZES, ctas: Sequence[int] = CTAS) -> list[Traffic]:
    """Every class of NCCL traffic, every rank computing."""
    return [
        Traffic(pattern, size, count, high)
        for high, count, size, pattern in itertools.product((False, True), ctas, sizes, PATTERNS)
    ]


def all_reductions(sizes: Sequence[int] = SIZES, ctas: Sequence[int] = CTAS) -> list[Traffic]:
    """Gradient traffic, of which only the time alone is wanted, by CTAs."""
    return [Traffic(*item) for item in itertools.product(REDUCTIONS, sizes, ctas)]


def pairs(
    names: Sequence[str], traffic: Sequence[Traffic], copies: Sequence[int]
) -> list[tuple[str, Traffic]]:
    """All pairs, the most telling first.

    First every kernel beside the library's own choice and 8 CTAs at equal priority from 8 MiB on;
    then the rest, with copies of ``copies`` bytes by the copy engine, and with traffic whose other
    end has nothing else to do (which shows what waiting for a busy peer costs).
    """
    first, rest = [], []
    for item in traffic:
        leads = not item.high_priority and item.ctas in (0, 8) and item.num_bytes >= 8 * MIB
        (first if leads else rest).append(item)
    lonely = [
        Traffic(t.pattern, t.num_bytes, t.ctas, t.high_priority, "first")
        for t in traffic if t.ctas in (0, 8) and not (t.high_priority and t.ctas)
    ]  # fmt: skip
    engine = [Traffic(COPY, size, 0, False, "first") for size in copies]
    return _shuffled((n, t) for n in names for t in first) + _shuffled(
        (n, t) for n in names for t in [*rest, *lonely, *engine]
    )


def side(spans: Sequence[Sequence[int]], per_op: int, window: tuple[int, int]) -> dict[str, Any]:
    """Mean times of one side's ops inside ``window``, ns.

    ``period_ns`` from the start of an op to the start of the next, ``kernel_ns`` the time in its
    kernels, ``queue_ns`` the rest: from the end of one kernel to the start of the next.
    """
    ops = [spans[i : i + per_op] for i in range(0, len(spans) - per_op + 1, per_op)]
    found = []
    for op, following in itertools.pairwise(ops):
        if op[0][0] >= window[0] and following[0][0] <= window[1]:
            found.append((following[0][0] - op[0][0], sum(length for _, length in op)))
    if not found:
        return {"ops": 0}
    periods, kernels = [p for p, _ in found], [k for _, k in found]
    return {
        "ops": len(found),
        "period_ns": round(statistics.mean(periods)),
        "kernel_ns": round(statistics.mean(kernels)),
        "queue_ns": round(statistics.mean(periods) - statistics.mean(kernels)),
        "median_ns": round(statistics.median(periods)),
        "spread_ns": round(statistics.pstdev(periods)),
    }


def traffic_side(run: Run, per_op: int, window: tuple[int, int]) -> dict[str, Any]:
    """The traffic side of a run inside ``window``, as :func:`side` has it.

    Of messages that are shorter than ops, those of whole ops count: several pass between two
    kernels, and none until the next two.
    """
    found = side(run.traffic, 1, window)
    starts = [op for op, _ in run.compute[::per_op] if window[0] <= op <= window[1]]
    if not found["ops"] or len(starts) < 3 or found["period_ns"] > starts[2] - starts[1]:
        return found
    sent = [length for start, length in run.traffic if starts[0] <= start < starts[-1]]
    if not sent:
        return found
    period, kernel = (starts[-1] - starts[0]) / len(sent), statistics.mean(sent)
    return found | {
        "ops": len(sent), "period_ns": round(period), "kernel_ns": round(kernel),
        "queue_ns": round(period - kernel),
    }  # fmt: skip


def window_of(run: Run, per_op: int) -> tuple[int, int]:
    """When both sides had work, from their second op on; of one side where the other is empty."""
    starts, ends = [], []
    for spans, skip in ((run.compute, per_op), (run.traffic, 1)):
        if len(spans) > skip:
            starts.append(spans[skip][0])
            ends.append(sum(spans[-1]))
    return (max(starts), min(ends)) if starts else (0, 0)


def before_traffic(run: Run, per_op: int) -> dict[str, Any]:
    """The compute side of a run before its traffic, as :func:`side` has it."""
    if not run.traffic or len(run.compute) <= per_op:
        return {"ops": 0}
    return side(run.compute, per_op, (run.compute[per_op][0], run.traffic[0][0]))


def meetings(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How long each of two ranks waited inside its kernel for the other to start, mean ns.

    The clocks of the traces are brought together by the median difference of the ends.
    """
    count = min(len(first), len(second))
    if count < 3:
        return {}
    offset = statistics.median(sum(b) - sum(a) for a, b in zip(first, second, strict=False))
    gaps = [
        b[0] - offset - a[0] for a, b in itertools.islice(zip(first, second, strict=False), 1, None)
    ]
    both = [
        min(sum(a), sum(b) - offset) - max(a[0], b[0] - offset)
        for a, b in itertools.islice(zip(first, second, strict=False), 1, None)
    ]
    return {
        "clock_offset_ns": round(offset),
        "peer_wait_ns": [
            round(statistics.mean(max(0, g) for g in gaps)),
            round(statistics.mean(max(0, -g) for g in gaps)),
        ],
        "together_ns": round(statistics.mean(both)),
    }


def row_of(
    compute: str, traffic: Traffic | None, per_op: int, runs: dict[str, list[Run]], late: list[str]
) -> dict[str, Any]:
    """The row of a pair from its runs {run of ``PHASES``: one of each rank}."""
    row: dict[str, Any] = {
        "pair": pair_key(compute, traffic), "compute": compute,
        "traffic": None if traffic is None else asdict(traffic), "late": late,
    }  # fmt: skip
    for name, ranks in runs.items():
        windows = [window_of(run, per_op) for run in ranks]
        row[name] = {
            "compute": [side(r.compute, per_op, w) for r, w in zip(ranks, windows, strict=True)],
            "traffic": [traffic_side(r, per_op, w) for r, w in zip(ranks, windows, strict=True)],
        }
        if traffic is not None and compute != "-":
            row[name]["before"] = [before_traffic(run, per_op) for run in ranks]
        if len(ranks) > 1 and ranks[0].traffic and ranks[1].traffic:
            row[name]["meeting"] = meetings(ranks[0].traffic, ranks[1].traffic)
    every = [run for ranks in runs.values() for run in ranks]
    row["traffic_launch"] = next((r.traffic_launch for r in every if r.traffic_launch), [])
    if traffic is None:
        first = runs["A"][0]
        row["kernels"] = _kernels(first, per_op)
    return row


def _kernels(run: Run, per_op: int) -> list[dict[str, Any]]:
    """Name, launch and median length of each kernel of one op."""
    found = []
    for i in range(per_op):
        name = run.names[per_op + i] if len(run.names) > per_op + i else ""
        lengths = [span[1] for span in run.compute[per_op + i :: per_op]]
        if name:
            found.append({
                "name": name, "launch": run.launch[name],
                "duration_ns": round(statistics.median(lengths)),
            })  # fmt: skip
    return found
