"""From what a capture logged to the rows of a profile: overlapped kernels, pairs, latencies."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from mhcplan.profiles.contention import PHASES
from mhcplan.profiles.contention_fit import (
    CTA_BYTES_PER_NS,
    FIXED_NS,
    HBM_FACTOR,
    Pairs,
    Trait,
    kernels_of,
)
from mhcplan.profiles.schema import (
    ContentionModel,
    ContentionOp,
    ContentionPair,
    CtasBySize,
    KernelTrait,
    PriorityLatency,
    Segment,
    TrafficTrait,
)
from mhcplan.profiles.transfer_costs import REDUCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mhcplan.profiles.contention import Parameters

Row = dict[str, Any]

_ATTENTION = "sdpa"  # in the names of its kernels
_FEW_CTAS, _LARGE_BYTES = (2, 4), 8 * 1024**2


def contention_ops(source: Pairs) -> list[ContentionOp]:
    """Every kernel that was overlapped, as it is alone."""
    found: list[ContentionOp] = []
    for row in source.rows.values():
        if row["traffic"] is not None:
            continue
        kernels = kernels_of(row, {}, source.num_sms)
        names = [k["name"] for k in row["kernels"] if k["duration_ns"] in
                 {kernel.duration_ns for kernel in kernels}]  # fmt: skip
        segments: list[Segment] = []
        for kernel, name in zip(kernels, names, strict=False):
            waves = -(-kernel.ctas // (kernel.ctas_per_sm * source.num_sms))
            segments.append(
                Segment(
                    name=name, duration_ns=round(kernel.duration_ns), ctas=kernel.ctas,
                    ctas_per_sm=kernel.ctas_per_sm, persistent=kernel.persistent,
                    cta_ns=max(1, round(kernel.duration_ns / waves)), hbm_bytes=kernel.hbm_bytes,
                )
            )  # fmt: skip
        found.append(
            ContentionOp(
                source="measured", name=row["compute"], family=row["family"],
                duration_ns=round(statistics.mean(source.op_ns(row["compute"]))),
                segments=tuple(segments),
            )
        )  # fmt: skip
    return found


def contention_pairs(source: Pairs) -> list[ContentionPair]:
    """Every pair that was measured as planned, both runs and ranks together."""
    found: list[ContentionPair] = []
    for row in source.rows.values():
        if row["compute"] == "-" or row["traffic"] is None:
            continue
        measured = source.measured(row)
        if measured is None:
            continue
        runs = (row[name] for name in PHASES if name in row)
        sides = [s for run in runs for s in run["traffic"] if s["ops"]]
        messages = sum(s["ops"] for s in sides)
        queue, kernel = (
            sum(s[key] * s["ops"] for s in sides) / messages for key in ("queue_ns", "kernel_ns")
        )
        traffic = row["traffic"]
        found.append(
            ContentionPair(
                source="measured", op=row["compute"], pattern=traffic["pattern"],
                bytes=traffic["num_bytes"], high_priority=traffic["high_priority"],
                ctas=row["traffic_launch"][0] if row["traffic_launch"] else 0,
                both_busy=traffic["busy"] == "all",
                compute_slowdown=round(measured[0], 4), traffic_slowdown=round(measured[1], 4),
                alone_ns=round(source.message_ns(traffic)), queue_ns=max(0, round(queue)),
                kernel_ns=round(kernel), samples=messages,
            )
        )  # fmt: skip
    return found


def contention_model(
    parameters: Parameters,
    traits: Mapping[str, Trait],
    traffic: Iterable[TrafficTrait],
    held_out: Iterable[tuple[float, float]],
    preemptible: Mapping[str, float] | None = None,
) -> ContentionModel:
    """The fitted model with its errors (compute, traffic) on pairs it was not fitted on.

    ``preemptible``: see :func:`preemptible_times`.
    """
    errors = list(held_out)
    preemptible = preemptible or {}
    means = [100 * statistics.mean(values) for values in zip(*errors, strict=True)] or [0.0, 0.0]
    return ContentionModel(
        source="measured", parameters={k: float(v) for k, v in vars(parameters).items()},
        traits=tuple(
            KernelTrait(
                name=name, **vars(trait), is_attention=_ATTENTION in name,
                preemptible_times=round(preemptible.get(name, 1.0), 3),
            )
            for name, trait in traits.items()
        ),
        traffic=tuple(traffic), held_out_pairs=len(errors),
        compute_error_percent=round(means[0], 2), traffic_error_percent=round(means[1], 2),
    )  # fmt: skip


def preemptible_times(source: Pairs, traits: Iterable[str]) -> dict[str, float]:
    """How many times the persistent attention kernel's time the same work takes with kernels whose
    CTAs end one by one, and with what these need before and after, by trait of the former."""
    found: dict[str, float] = {}
    for pass_ in "FI":
        persistent, preemptible = f"attention_cudnn_{pass_}", f"attention_flash_{pass_}"
        if not {f"{persistent}|-", f"{preemptible}|-"} <= source.rows.keys():
            continue
        longest = max(source.rows[f"{persistent}|-"]["kernels"], key=lambda k: k["duration_ns"])
        more_ns = statistics.mean(source.op_ns(preemptible)) - statistics.mean(
            source.op_ns(persistent)
        )
        for name in traits:
            if name in longest["name"]:
                found[name] = 1 + more_ns / longest["duration_ns"]
    return found


def traffic_traits(source: Pairs) -> list[TrafficTrait]:
    """Rows of all patterns: those that were overlapped, and what is assumed of the others."""
    found: dict[str, TrafficTrait] = {}
    for pattern, rate in CTA_BYTES_PER_NS.items():
        sent, received = HBM_FACTOR[pattern]
        found[pattern] = TrafficTrait(
            source="measured", pattern=pattern,  # type: ignore[arg-type]
            ctas=_ctas_by_size(source, pattern), limited=_limited(source, pattern),
            cta_bytes_per_ns=rate, fixed_ns=FIXED_NS,
            sent_hbm_factor=sent, received_hbm_factor=received,
        )  # fmt: skip
    rows = list(found.values())
    rows += [_reduction(source, pattern, found["all_to_all"]) for pattern in REDUCTIONS]
    citation = (
        "a message between nodes is taken to use 2 SMs: NCCL src/graph/paths.cc,"
        " ncclTopoGetNchannels, two channels for each network card"
    )
    network = {"medium": "inter_node", "ctas": ((0, 2),), "limited": ()}
    return [*rows, _assumed(found["send_recv"], citation, **network)]


def _reduction(source: Pairs, pattern: str, like: TrafficTrait) -> TrafficTrait:
    """The row of a pattern that was timed alone at most."""
    rate = _cta_bytes_per_ns(source, pattern)
    if rate is None:
        citation = f"{pattern} is taken to use SMs and memory as {like.pattern} was measured to"
        return _assumed(like, citation, pattern=pattern)
    citation = f"{pattern} is taken to use memory as {like.pattern} was measured to"
    return _assumed(
        like, citation, pattern=pattern, ctas=_ctas_by_size(source, pattern),
        limited=_limited(source, pattern), cta_bytes_per_ns=rate,
    )  # fmt: skip


def _cta_bytes_per_ns(source: Pairs, pattern: str) -> float | None:
    """Of the buffer, that one CTA moves where the library had few and large messages: nothing else
    limits them."""
    rates: list[float] = []
    for row in source.rows.values():
        traffic = row["traffic"]
        if row["compute"] == "-" and traffic and traffic["pattern"] == pattern:
            ctas, size = traffic["ctas"], traffic["num_bytes"]
            if ctas in _FEW_CTAS and size >= _LARGE_BYTES:
                rates.append(size / (ctas * (source.message_ns(traffic) - FIXED_NS)))
    return round(statistics.median(rates), 1) if rates else None


def _assumed(row: TrafficTrait, citation: str, **changes: object) -> TrafficTrait:
    return row.model_copy(update={"source": "assumed", "citation": citation, **changes})


def _limited(source: Pairs, pattern: str) -> tuple[tuple[int, CtasBySize], ...]:
    """By limit: pairs of least bytes and CTAs that the library took under it."""
    limits = {row["traffic"]["ctas"] for row in source.rows.values() if row["traffic"]}
    found = ((limit, _ctas_by_size(source, pattern, limit)) for limit in sorted(limits - {0}))
    return tuple((limit, steps) for limit, steps in found if steps)


def _ctas_by_size(source: Pairs, pattern: str, limit: int = 0) -> CtasBySize:
    """Pairs of least bytes and CTAs that the library took; limit 0: where nothing bounded them."""
    sizes: dict[int, int] = {}
    for row in source.rows.values():
        traffic, launch = row["traffic"], row.get("traffic_launch")
        if traffic and launch and (traffic["pattern"], traffic["ctas"]) == (pattern, limit):
            sizes[traffic["num_bytes"]] = launch[0]
    steps: list[tuple[int, int]] = []
    for size in sorted(sizes):
        if not steps or steps[-1][1] != sizes[size]:
            steps.append((size if steps else 0, sizes[size]))
    return tuple(steps)


def priority_latencies(lines: Iterable[Row]) -> list[PriorityLatency]:
    """Medians of the trials of each case; ``lines`` of a priority log."""
    groups: dict[tuple[int, str, str, str], list[Row]] = {}
    for line in lines:
        row = line["priority"]
        if row != "done" and row["case"] == "latency":
            key = (line["connections"], row["resident"], row["level"], row["probe"])
            groups.setdefault(key, []).append(row)
    found: list[PriorityLatency] = []
    for (connections, resident, level, probe), rows in groups.items():
        starts = sorted(row["start_ns"] for row in rows)
        middle = statistics.median(starts)
        low, high = starts[len(starts) // 10], starts[-1 - len(starts) // 10]
        found.append(
            PriorityLatency(
                source="measured", resident=resident, level=level,  # type: ignore[arg-type]
                ctas=PROBE_CTAS[probe], connections=connections, start_ns=max(0, round(middle)),
                end_ns=max(0, round(statistics.median(row["end_ns"] for row in rows))),
                spread_percent=round(50 * (high - low) / max(1.0, middle), 2), samples=len(rows),
            )
        )  # fmt: skip
    return found


PROBE_CTAS = {"small": 16, "full": 264}  # of the capture's probes
