"""Figures of docs/profiling.md, drawn from the shipped profile and the logs that it was fitted to.

    PYTHONPATH=src python benchmarks/profile_plots.py            # writes docs/images/profile-*.png
    PYTHONPATH=src python benchmarks/profile_plots.py --numbers  # the tables of the page, as text

Needs ``pip install 'mhcplan[docs]'``.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import matplotlib.ticker as mticker
import numpy as np

from mhcplan.profiles.contention_fit import TRAITS, Pairs, predict
from mhcplan.profiles.holdout import holdout
from mhcplan.profiles.logs import read_log
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.overlap import parameters_of, rows_of
from mhcplan.profiles.priority import errors_ns
from mhcplan.profiles.store import contention_log, find_profile
from mhcplan.profiles.vocabulary import OP_KINDS, TransferKey, op_key
from mhcplan.sim.device_kernels import Parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mhcplan.profiles.schema import Profile

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
NAME = "h100-sxm"
PRIORITY_LOG = ROOT / "profiles" / "data" / "raw" / f"{NAME}-priority.jsonl.xz"
COLORS = ("#3b6ea8", "#c2543d", "#4f8f5b", "#8a63a8")
WIDTH = 8.6  # inches

# what kept the chip busy, in words, by the capture's name of it
RESIDENTS = {
    "attention_flash_F": "flash attention, F", "attention_flash_I": "flash attention, I",
    "attention_cudnn_F": "cuDNN attention, F (persistent)",
    "attention_cudnn_I": "cuDNN attention, I (persistent)",
    "gemm_tiles_long": "GEMM, 6 waves of tiles", "gemm_library": "cuBLAS GEMM (persistent)",
    "gemm_library_big": "large cuBLAS GEMM (persistent)",
    "mhc_post_F": "F_post,res", "elementwise_big": "elementwise, long",
    "clock_short_ctas": "many CTAs of 20 us", "clock_long_ctas": "few CTAs of 400 us",
}  # fmt: skip


def transfers(profile: Profile, ax: Axes) -> None:
    """Time against bytes: measured points, and what a look-up says between them."""
    costs = CostModel(profile)
    for color, pattern in zip(COLORS, ("send_recv", "all_to_all", "all_reduce"), strict=False):
        rows = sorted(
            (r for r in profile.transfers if r.pattern == pattern), key=lambda row: row.bytes
        )
        sizes = np.geomspace(rows[0].bytes / 2, rows[-1].bytes * 2, 200)
        prices = [
            costs.transfer(TransferKey(pattern, 2, 2, int(size))).duration_ns / 1e3
            for size in sizes
        ]
        ax.plot(sizes, prices, color=color, lw=1)
        ax.plot(
            [row.bytes for row in rows], [row.duration_ns / 1e3 for row in rows], "o",
            color=color, ms=3.5, label=pattern,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="bytes a rank", ylabel="us",
           title="transfers between two GPUs")  # fmt: skip
    ax.legend(frameon=False)


def ops(profile: Profile, ax: Axes) -> None:
    """Time of F_post,res against the bytes that it moves at least."""
    costs = CostModel(profile)
    hidden = 2560
    for color, n in zip(COLORS, (2, 4, 8), strict=False):
        rows = [
            row for row in profile.ops
            if (row.kind, row.pass_, row.shape.get("n")) == ("mhc_post", "F", n)
        ]  # fmt: skip
        moved = [OP_KINDS["mhc_post"].bytes(row.shape, "F") for row in rows]
        tokens = np.geomspace(1024, 16384, 40).astype(int)
        keys = [op_key("mhc_post", "F", n=n, hidden=hidden, tokens=int(t)) for t in tokens]
        line = [OP_KINDS["mhc_post"].bytes(dict(key.shape), "F") for key in keys]
        ax.plot(line, [costs.op(key).duration_ns / 1e3 for key in keys], color=color, lw=1)
        ax.plot(moved, [row.duration_ns / 1e3 for row in rows], "o", color=color, ms=3.5,
                label=f"n = {n}, all widths")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="bytes at least", ylabel="us",
           title=f"F_post,res (line: look-up, C = {hidden})")  # fmt: skip
    ax.legend(frameon=False)


def draw_times(profile: Profile) -> Figure:
    """Duration against bytes, with what a look-up says."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), layout="constrained")
    transfers(profile, axes[0])
    ops(profile, axes[1])
    return figure


def draw_holdout(profile: Profile) -> Figure:
    """Median and 90th percentile of the error of rows left out, by family."""
    rows = [row for row in holdout(profile) if not row.family.startswith("pairs")][::-1]
    figure, ax = plt.subplots(figsize=(WIDTH, 5.4), layout="constrained")
    places = range(len(rows))
    ax.barh(places, [row.p90_percent for row in rows], color="#c9d6e6", label="90th percentile")
    ax.barh(places, [row.median_percent for row in rows], color=COLORS[0], label="median")
    for bar, style in ((5, "--"), (12, ":")):
        ax.axvline(bar, color="black", lw=0.8, ls=style)
    ax.set_yticks(places, [f"{row.family} ({row.held_out} of {row.shapes})" for row in rows],
                  fontsize=8)  # fmt: skip
    ax.set(xlabel="error of shapes left out, % (bars: 5 and 12)", xlim=(0, 16))
    ax.legend(frameon=False, loc="lower right")
    return figure


def draw_pairs(profile: Profile) -> Figure:
    """Slowdowns of held-out pairs, predicted against measured."""
    parameters = parameters_of(profile)
    pairs = Pairs(rows_of(contention_log(NAME)), parameters.num_sms).pairs(TRAITS)
    held = [pair for pair in pairs if pair.held_out and not pair.message.eager]
    found = [(pair, predict(pair, parameters)) for pair in held]
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4), layout="constrained")
    for side, (ax, name) in enumerate(zip(axes, ("compute", "traffic"), strict=True)):
        for color, urgent in zip(COLORS, (False, True), strict=False):
            chosen = [(p.measured[side], said[side]) for p, said in found
                      if p.message.high_priority == urgent]  # fmt: skip
            ax.plot(*zip(*chosen, strict=True), "o", color=color, ms=3, alpha=0.7, lw=0,
                    label="high priority" if urgent else "equal priority")  # fmt: skip
        most = max(pair.measured[side] for pair in held) * 1.1
        ax.plot([1, most], [1, most], color="black", lw=0.8)
        ax.set(xscale="log", yscale="log", xlabel="measured slowdown",
               ylabel="predicted slowdown", title=f"{name}, {len(held)} pairs")  # fmt: skip
        ticks = [1, 1.5, 2, 3] if side == 0 else [1, 2, 5, 10, 20]
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(mticker.FixedLocator(ticks))
            axis.set_minor_locator(mticker.NullLocator())
            axis.set_major_formatter(mticker.FormatStrFormatter("%g"))
    axes[0].legend(frameon=False)
    return figure


def latencies() -> dict[str, dict[str, tuple[float, float]]]:
    """Median and 90th percentile, us, from launch call to the first CTA of a short kernel, over
    both probes and 8 and 32 connections: by what kept the chip busy, and by priority."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in read_log(PRIORITY_LOG):
        row = entry["priority"]
        if row != "done" and row["case"] == "latency" and entry["connections"] > 1:
            found[row["resident"]][row["level"]].append(row["start_ns"] / 1e3)
    return {
        resident: {
            level: (statistics.median(times), float(np.quantile(times, 0.9)))
            for level, times in by_level.items()
        }
        for resident, by_level in found.items()
    }


def draw_priority(_profile: Profile) -> Figure:
    """How long a short kernel waits for a busy chip, at equal and at high priority."""
    found = latencies()
    figure, ax = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    names = list(RESIDENTS)[::-1]
    places = range(len(names))
    times = {level: [found[name][level][0] for name in names] for level in ("equal", "high")}
    ax.hlines(places, times["equal"], times["high"], color="#b9b9b9", lw=2, zorder=1)
    for color, (level, values) in zip(COLORS, times.items(), strict=False):
        ax.scatter(values, places, color=color, s=28, label=f"{level} priority", zorder=2)
    ax.axvline(found["idle"]["equal"][0], color="black", lw=0.8, ls="--", label="idle chip")
    ax.set_yticks(places, [RESIDENTS[name] for name in names], fontsize=8)
    ax.set(xscale="log", xlabel="from launch call to first CTA, median us")
    ax.legend(frameon=False)
    return figure


def within_bar() -> tuple[int, int]:
    """Cases whose predicted latency is off by at most the larger of 20 % and 10 us (median over
    trials), and all cases."""
    trials: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in read_log(PRIORITY_LOG):
        if entry["priority"] != "done" and entry["priority"]["case"] == "latency":
            trials[entry["connections"]].append(entry["priority"])
    moved: dict[str, int] = {}  # by the kernels that were overlapped, too
    for row in rows_of(contention_log(NAME)).values():
        if row["traffic"] is None:
            longest = max(row["kernels"], key=lambda kernel: kernel["duration_ns"])
            moved[longest["name"]] = row["hbm_bytes"]
    found = [
        missed <= max(0.2 * measured, 10_000)
        for connections, rows in trials.items()
        if connections > 1
        for measured, missed in errors_ns(rows, TRAITS, Parameters(), moved).values()
    ]
    return sum(found), len(found)


def fp8_gains(profile: Profile) -> list[float]:
    """How many times as fast a product of FP8 operands is as one of bf16, shape by shape."""
    times = {(row.kind, row.key.shape): row.duration_ns for row in profile.ops}
    return [
        time_ns / times["gemm_fp8", shape]
        for (kind, shape), time_ns in times.items()
        if kind == "gemm" and ("gemm_fp8", shape) in times
    ]


def uneven_losses(profile: Profile) -> dict[tuple[int, int], dict[str, float]]:
    """How many times as long experts take where one of so many has so many percent of the rows: F,
    I, W and all of them, against an even share."""
    costs = CostModel(profile)
    times: dict[tuple[int, int], dict[str, tuple[int, int]]] = defaultdict(dict)
    for row in profile.ops:
        if row.kind == "experts_skewed":
            shape = dict(row.shape)
            uneven = shape.pop("experts"), shape.pop("largest")
            even = costs.op(op_key("experts", row.pass_, **shape, experts=uneven[0])).duration_ns
            times[uneven][row.pass_] = row.duration_ns, even
    found: dict[tuple[int, int], dict[str, float]] = {}
    for uneven, by_pass in sorted(times.items()):
        sums = [sum(column) for column in zip(*by_pass.values(), strict=True)]
        found[uneven] = {p: long / even for p, (long, even) in by_pass.items()}
        found[uneven]["all"] = sums[0] / sums[1]
    return found


FIGURES = {
    "times": draw_times, "holdout": draw_holdout, "pairs": draw_pairs, "priority": draw_priority
}  # fmt: skip


def numbers(profile: Profile) -> None:
    """Print the tables of the page."""
    for row in holdout(profile, contention_log(NAME)):
        print(f"| {row.family} | {row.held_out} of {row.shapes} | {row.median_percent:.1f} |"
              f" {row.p90_percent:.1f} | {row.mean_percent:.1f} |"
              f" {'; '.join(row.misses) or 'pass'} |")  # fmt: skip
    for name, levels in latencies().items():
        said = (f"{levels[level][0]:.0f} ({levels[level][1]:.0f})" for level in ("equal", "high"))
        print(f"| {RESIDENTS.get(name, name)} | {' | '.join(said)} |")
    gains = fp8_gains(profile)
    print(f"FP8 against bf16 products: {min(gains):.2f} to {max(gains):.2f} times as fast,"
          f" median {statistics.median(gains):.2f}, {len(gains)} shapes")  # fmt: skip
    for (experts, largest), times in uneven_losses(profile).items():
        said = " ".join(f"{p} {ratio:.2f}" for p, ratio in sorted(times.items()))
        print(f"{experts} experts, {largest} % of the rows for one: {said} times as long")
    print("latencies within the larger of 20 % and 10 us: {} of {} cases".format(*within_bar()))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--numbers", action="store_true", help="print tables, draw nothing")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the images")
    args = parser.parse_args()
    profile = find_profile(NAME)
    if args.numbers:
        numbers(profile)
        return
    mpl.use("agg")
    for name, draw in FIGURES.items():
        path = args.out / f"profile-{name}.png"
        draw(profile).savefig(path, dpi=100)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
