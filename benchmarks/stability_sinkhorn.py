"""What the constraint costs and keeps: Sinkhorn steps against column error, gain and time.

    PYTHONPATH=src python -m benchmarks.stability_sinkhorn [--logits OUT/mhc.logits.npy ...]
        [--time] [--json FILE]

Errors and gains are worked out in float64 on the CPU, from random logits (normal, of several sizes,
each site and token by itself, 60 sites as the mHC paper's 27B model) and from logits of trained
models, which ``benchmarks.stability`` keeps. ``column error`` is the largest |column sum - 1| of
one map, ``gain`` the largest absolute column sum of the product over all sites (backward; rows sum
to 1, so the forward gain is 1): mean over tokens, and most. ``--time`` also times F_pre and its
backward of one site on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mhcplan.kernels import mhc
from mhcplan.kernels.diagnostics_maps import backward_gain, composites
from mhcplan.kernels.reference import DEFAULT_SINKHORN_STEPS, num_coefficients, sinkhorn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40)
SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)  # standard deviations of random logits
SITES, TOKENS = 60, 256
ROUNDS = 5
Row = dict[str, Any]
Key = tuple[int, str]  # t_max, and what is timed
_TITLE = "\n steps  column error: mean      most  above 0.1   gain: mean   most"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--logits", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--sites", type=int, default=SITES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--time", action="store_true", help="needs a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    rows: list[Row] = []
    for size in SIZES:
        generator = torch.Generator().manual_seed(0)
        shape = options.sites, options.tokens, options.n, options.n
        logits = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        rows += price(f"normal, deviation {size:g}", logits, options.steps)
    for path in options.logits:
        rows += price(path.name, torch.from_numpy(np.load(path)).double(), options.steps)
    show(rows)
    times = time_site(options.n, options.steps) if options.time else []
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "times": times}, indent=1) + "\n")


def price(source: str, logits: torch.Tensor, steps: Sequence[int]) -> list[Row]:
    """Column error and composite backward gain of maps ``[L, S, n, n]`` after each t_max."""
    found: list[Row] = []
    for t in steps:
        maps = sinkhorn(logits, t)
        errors = (maps.sum(-2) - 1).abs().amax(-1)
        gains = backward_gain(composites(maps)[1]).amax(0)
        found.append(
            {
                "source": source, "steps": t,
                "column_error_mean": float(errors.mean()), "column_error_most": float(errors.max()),
                "share_above_0.1": float((errors > 0.1).double().mean()),
                "gain_mean": float(gains.mean()), "gain_most": float(gains.max()),
            }
        )  # fmt: skip
    return found


def show(rows: Sequence[Row]) -> None:
    source = ""
    for row in rows:
        if row["source"] != source:
            source = row["source"]
            print(f"\n{source}{_TITLE}")
        print(
            f"{row['steps']:6d}  {row['column_error_mean']:18.2e}  {row['column_error_most']:8.2e}"
            f"  {100 * row['share_above_0.1']:7.2f} %  {row['gain_mean']:11.3f}"
            f"  {row['gain_most']:5.3f}"
        )


def median_of_rounds(
    calls: Mapping[Key, Callable[[], object]], measure: Callable[[Callable[[], object]], float]
) -> dict[Key, float]:
    """Median of what ``measure`` says of each call, every round in another order.

    A round before them is not counted: it compiles, and a chip that rested takes a while to reach
    its clock.
    """
    found: dict[Key, list[float]] = {key: [] for key in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for turn in range(1 + ROUNDS):
        shuffle(order)
        for key in order:
            value = measure(calls[key])
            if turn:
                found[key].append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def time_site(n: int, steps: Sequence[int], tokens: int = 4096, hidden: int = 2560) -> list[Row]:
    """Microseconds of F_pre and of its backward for each t_max, beside those of a site's rest."""
    from benchmarks.kernels_timing import Timer

    timer, m = Timer(), num_coefficients(n)
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    x, dy = torch.randn(tokens, n, hidden, **bf16), torch.randn(tokens, n, hidden, **bf16)
    f, du = torch.randn(tokens, hidden, **bf16), torch.randn(tokens, hidden, **bf16)
    phi = torch.randn(m, n * hidden, device="cuda") / (n * hidden) ** 0.5
    parameters = phi, torch.randn(m, device="cuda"), torch.full((3,), 0.5, device="cuda")
    calls: dict[Key, Callable[[], object]] = {}
    for t in steps:
        _, mix, projection = mhc.mhc_pre_forward(x, *parameters, steps=t)
        _, dmix = mhc.mhc_post_backward(dy, x, f, mix)
        given = dy, x, du, mix, projection, dmix, *parameters
        calls[t, "forward_us"] = partial(mhc.mhc_pre_forward, x, *parameters, steps=t)
        calls[t, "backward_us"] = partial(mhc.mhc_pre_backward, *given, steps=t)
    times = median_of_rounds(calls, timer.us)
    found = [{"steps": t, **{d: times[t, d] for d in ("forward_us", "backward_us")}} for t in steps]
    usual = {row["steps"]: row for row in found}.get(DEFAULT_SINKHORN_STEPS, found[-1])
    print(
        f"\nF_pre of one site, T = {tokens}, C = {hidden}, n = {n}; ratio to t_max {usual['steps']}"
    )
    for row in found:
        both, whole = (r["forward_us"] + r["backward_us"] for r in (row, usual))
        print(
            f"{row['steps']:6d}  F {row['forward_us']:7.1f} us  B {row['backward_us']:7.1f} us"
            f"  {both / whole:6.3f}"
        )
    return found


if __name__ == "__main__":
    main()
