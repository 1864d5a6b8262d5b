"""DeepSeek's published F&B pair replayed, and mHC put into it with and without each measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.results.tables import Section, ms, percent
from mhcplan.planner.measured.replay import (
    Measures,
    MhcTimes,
    Phase,
    exposed_ns,
    period_ns,
    read_phases,
    replay,
)
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.vocabulary import BF16, VOCABULARY, TransferKey, op_key

if TYPE_CHECKING:
    from mhcplan.profiles.schema import Profile

TRACE = Path(__file__).with_name("deepseek_v3_pair.csv")
PUBLISHED_PERCENT = 6.7  # arXiv 2512.24880 and 2606.19348, n = 4, on an unnamed cluster and model
N, HIDDEN, TOKENS, LAYERS = 4, 7168, 4096, 4  # DeepSeek-V3, the trace's README
SITES = 2 * LAYERS
SECOND_NS = 1e9
# The whole trace, kernel by kernel: communication under way and no compute kernel.
KERNELS_EXPOSED_NS = 4_200_000

# Plain PyTorch, one site, 4096 tokens, C = 7168, n = 4, from the side-by-side run of public mHC
# code on one H100 80GB HBM3 (torch 2.11.0+cu130): F, and F with backward, in ns. How they split
# into coefficients, pre and post was measured at 16384 tokens.
_EAGER_FORWARD_NS, _EAGER_BOTH_NS = 5_613_504, 14_473_216
_EAGER_FORWARD = {"coefficients": 4413.2, "pre": 3962.5, "post": 12757.7}
_EAGER_BACKWARD = {"coefficients": 11823.7, "pre": 4979.0, "post": 13620.5}


class Kernels(NamedTuple):
    """A set of mHC kernels and where their times come from."""

    name: str
    source: str
    times: MhcTimes


def validation() -> Section:
    """The trace's own figures beside the replay's."""
    phases = read_phases(TRACE)
    wall_ns = max(phase.end_ns for phase in phases)
    rows: list[tuple[str, ...]] = []
    for name, busy, trace_exposed in (
        ("spans of phases", False, exposed_ns(phases)),
        ("busy time of phases", True, KERNELS_EXPOSED_NS),
    ):
        done = replay(phases, busy=busy)
        step_ns, exposed = done.timeline.step_ns, done.breakdown_ns["exposed_ep"]
        off = percent(100 * (step_ns / wall_ns - 1))
        rows.append((name, ms(wall_ns), ms(step_ns), off, ms(trace_exposed), ms(exposed)))
    about = (
        "One overlapped F&B pair of DeepSeek-V3, four MoE layers, EP64 on H800 (the chip of an"
        " H100, with slower NVLink), as DeepSeek published it (deepseek-ai/profile-data): every"
        " phase takes the time it took there, the planner's order and the engine do the rest."
        " Contention is off, since the trace's times contain it; so this tests order and engine,"
        " not times. Busy times leave out the gaps between small kernels; what the trace exposes is"
        " then counted between kernels instead of phases."
    )
    columns = (
        "a phase takes", "trace ms", "replay ms", "difference %", "trace exposes ms",
        "replay exposes ms",
    )  # fmt: skip
    return Section("Replay of DeepSeek's overlapped pair", about, columns, tuple(rows))


def measures(profile: Profile) -> Section:
    """Overhead of n = 4 mHC on the pair, measure by measure."""
    phases, model = read_phases(TRACE), CostModel(profile)
    fused = fused_kernels(model)
    steps = (
        (eager_kernels(), Measures(priority=False, decoupled=False), "none"),
        (unfused_kernels(profile), Measures(priority=False, decoupled=False), "none"),
        (fused, Measures(priority=False, decoupled=False), "fused kernels"),
        (fused, Measures(priority=True, decoupled=False), "+ priority stream"),
        (fused, Measures(), "+ decoupled recompute"),
        (floor_kernels(profile), Measures(), "the same, better kernels"),
    )
    rows = [_row(phases, model, *step) for step in steps]
    paper = ("published", "the paper's", *[""] * 5, f"+{PUBLISHED_PERCENT}", "")
    columns = (
        "measures", "kernels", "pair ms", "mHC ms", "recompute ms", "exposed EP ms",
        "exposed PP ms", "overhead %", "without messages %",
    )  # fmt: skip
    return Section(
        "What the paper's measures buy on that pair", _about_measures(model, profile), columns,
        (*rows, paper), _reading(phases, model, fused),
    )  # fmt: skip


def fused_kernels(model: CostModel) -> Kernels:
    """This repository's kernels, as measured at this shape."""
    shape = {"n": N, "hidden": HIDDEN, "tokens": TOKENS}
    costs = [
        model.op(op_key(kind, pass_, **shape, **more))
        for kind, pass_, more in (
            ("mhc_pre", "F", {"steps": 20}), ("mhc_post", "F", {}), ("mhc_post", "I", {}),
            ("mhc_pre", "B", {"steps": 20}), ("mhc_recompute", "R", {"sites": SITES}),
        )
    ]  # fmt: skip
    sources = "/".join(dict.fromkeys(cost.source for cost in costs))
    return Kernels("fused, ours", sources, MhcTimes(*(cost.duration_ns for cost in costs)))


def floor_kernels(profile: Profile) -> Kernels:
    """The least bytes of the same kernels at the speed of a copy."""
    shape = {"n": N, "hidden": HIDDEN, "tokens": TOKENS, "steps": 20, "sites": SITES}

    def least(kind: str, pass_: str) -> int:
        return VOCABULARY[kind].bytes(shape, pass_)

    parts = (("mhc_pre", "F"), ("mhc_post", "F"), ("mhc_post", "I"), ("mhc_pre", "B"))
    return Kernels(
        "fused, floor", "assumed",
        _at_copy_speed(profile, *(least(*p) for p in (*parts, ("mhc_recompute", "R")))),
    )  # fmt: skip


def unfused_kernels(profile: Profile) -> Kernels:
    """Every operation of the paper's table 2 a kernel of its own, each at the speed of a copy.

    The table has F only; the backward counts the same way: every operation reads its gradient and
    its inputs and writes theirs, and the three gradients of the state are added up in two kernels.
    Recompute runs F_pre and F_post,res from stored coefficients, the last F_post,res not.
    """
    element = HIDDEN * TOKENS * BF16
    pre_forward = N + (N + 1)
    post_forward = (1 + N) + 2 * N + 3 * N
    post_backward = (N + 2) + 3 * N
    pre_backward = (2 * N + 1) + 2 * N + 6 * N
    recompute = SITES * (N + 1) + (SITES - 1) * post_forward
    parts = (pre_forward, post_forward, post_backward, pre_backward, recompute)
    return Kernels(
        "unfused, table 2", "assumed", _at_copy_speed(profile, *(p * element for p in parts))
    )


def eager_kernels() -> Kernels:
    """Plain PyTorch as measured; see the constants above."""
    forward, backward = sum(_EAGER_FORWARD.values()), sum(_EAGER_BACKWARD.values())
    f = {name: _EAGER_FORWARD_NS * part / forward for name, part in _EAGER_FORWARD.items()}
    back_ns = _EAGER_BOTH_NS - _EAGER_FORWARD_NS
    b = {name: back_ns * part / backward for name, part in _EAGER_BACKWARD.items()}
    recompute = SITES * f["pre"] + (SITES - 1) * f["post"]
    parts = (f["coefficients"] + f["pre"], f["post"], b["post"], b["coefficients"] + b["pre"])
    return Kernels("plain PyTorch", "measured", MhcTimes(*map(round, (*parts, recompute))))


def _at_copy_speed(profile: Profile, *sizes: float) -> MhcTimes:
    rate = next(r.per_second for r in profile.rates if r.name == "copy_bytes")
    return MhcTimes(*(round(size / rate * SECOND_NS) for size in sizes))


def message_ns(model: CostModel, rows: int) -> int:
    """A pipeline message of the state between nodes."""
    size = rows * HIDDEN * TOKENS * BF16
    return model.transfer(TransferKey("send_recv", 2, 1, size)).duration_ns


def _overhead(
    phases: tuple[Phase, ...], model: CostModel, times: MhcTimes, taken: Measures, messages: bool
) -> tuple[int, dict[str, int], float, dict[str, int]]:
    """Pair, its breakdown, overhead in percent, and the plain pair's breakdown."""
    sizes = [message_ns(model, rows) if messages else 0 for rows in (1, N)]
    base_ns, base = period_ns(phases, None, taken, sizes[0])
    pair_ns, spent = period_ns(phases, times, taken, sizes[1])
    return pair_ns, spent, 100 * (pair_ns / base_ns - 1), base


def _row(
    phases: tuple[Phase, ...], model: CostModel, kernels: Kernels, taken: Measures, name: str
) -> tuple[str, ...]:
    pair_ns, spent, overhead, _ = _overhead(phases, model, kernels.times, taken, messages=True)
    alone = _overhead(phases, model, kernels.times, taken, messages=False)[2]
    parts = (spent[c] for c in ("mhc", "recompute", "exposed_ep", "exposed_pp"))
    kernel = f"{kernels.name} ({kernels.source})"
    return name, kernel, ms(pair_ns), *map(ms, parts), percent(overhead), percent(alone)


def _about_measures(model: CostModel, profile: Profile) -> str:
    key = TransferKey("send_recv", 2, 1, N * HIDDEN * TOKENS * BF16)
    link = model.transfer(key)
    return (
        f"n = {N} on the pair above, C = {HIDDEN}, {TOKENS} tokens, a stage of {LAYERS} layers"
        f" whose {SITES} sites are recomputed at once; kernel times from profile {profile.name}."
        f" A pair waits for the two messages that were sent after the pair before it, on the"
        f" experts' stream as in figure 4: {ms(message_ns(model, 1))} ms each with the plain"
        f" residual, {ms(link.duration_ns)} ms with mHC ({link.source}: 50 GB/s between nodes)."
        " The last column leaves messages out, as the trace does. Table 2's unfused kernels and"
        " the floor run at the measured speed of a copy. F's own recompute is in the trace."
    )


def _reading(phases: tuple[Phase, ...], model: CostModel, fused: Kernels) -> str:
    pair_ns, spent, overhead, base = _overhead(
        phases, model, fused.times, Measures(), messages=True
    )
    base_ns = pair_ns / (1 + overhead / 100)
    points = {name: 100 * (spent[name] - base[name]) / base_ns for name in spent}
    alone = _overhead(phases, model, fused.times, Measures(), messages=False)[2]
    sums = sum(
        model.op(op_key("residual", pass_, hidden=HIDDEN, tokens=TOKENS)).duration_ns
        for pass_ in "FI"
    )
    return (
        f"With every measure the overhead is {overhead:.1f} % where {PUBLISHED_PERCENT} % are"
        f" published, and the difference is the network: mHC's kernels account for"
        f" {points['mhc'] + points['compute']:.1f} points (with the compute that the urgent ones"
        f" push aside), the recompute for {points['recompute']:.1f}, and waiting"
        f" for traffic, whose lane the {N}-fold messages fill, for"
        f" {points['exposed_ep'] + points['exposed_pp']:.1f}; where messages cost nothing it is"
        f" {alone:.1f} %, of which up to {100 * SITES * sums / base_ns:.1f} points are the plain"
        " residual's own sums, which the trace contains and mHC replaces."
    )
