"""Time candidate tiles of every mHC and HC kernel and print the table of ``kernels/tuning.py``.

    PYTHONPATH=src python benchmarks/kernels_tune.py [--kernels post,project] [--n 4]
        [--hidden 2560,4096,7168] [--tokens 16384,4096] [--dtype bf16] [--out table.json]

Candidates are compiled first, in parallel processes, then timed one by one with a cold L2. The
winner of a width is the candidate with the least sum of times over ``--tokens``, each relative to
the best. ``%`` is the kernel's least traffic at the speed of a copy in the same run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from kernels_timing import Timer

from mhcplan.kernels import (
    hc_kernels,
    mhc_backward,
    mhc_forward,
    mhc_recompute,
    mhc_wide,
    tuning,
)
from mhcplan.kernels.reference import num_coefficients
from mhcplan.kernels.triton_support import padded, padded_coefficients, residual_parts
from mhcplan.kernels.tuning import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SITES = 8  # of the recompute block
NARROW = {"project", "post_project", "pre_backward", "pre_backward_input", "weight",
          "hc_pre_backward", "hc_pre_backward_input"}  # fmt: skip
WIDE = {"wide_project", "wide_input", "wide_weight", "hc_wide_input"}  # from LEAST_ROWS on
SAME_TILES = {"hc_project": "project", "hc_weight": "weight", "hc_wide_input": "wide_input"}


def _tiles(fields: str, rows: Iterable[tuple[int, ...]], **same: int) -> list[Config]:
    """A configuration a row, whose numbers are those of ``fields``."""
    return [Config(**dict(zip(fields.split(), row, strict=True)), **same) for row in rows]


def _crossed(rows: Iterable[tuple[int, ...]], *choices: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Every row with every choice of the numbers that follow."""
    for row in rows:
        for chosen in itertools.product(*choices):
            yield (*row, *chosen)


_WIDE_LOADS = ((4, 256, 4), (2, 512, 4), (4, 512, 8), (1, 1024, 4), (8, 256, 8))
_PRODUCTS = "BT BC warps stages per_sm"
_PRE_BACKWARD = (
    (16, 128, 8, 3, 1), (16, 128, 8, 4, 1), (16, 64, 4, 3, 2), (16, 64, 4, 4, 2),
    (32, 64, 8, 3, 1), (64, 64, 8, 3, 1),
)  # fmt: skip
_HC_PRE_BACKWARD = _tiles(_PRODUCTS, (  # little to hold in registers but the state
    (16, 128, 8, 3, 1), (16, 64, 4, 3, 2), (16, 64, 4, 4, 2), (16, 64, 4, 3, 3),
    (32, 64, 8, 3, 1), (32, 64, 4, 2, 2), (16, 128, 4, 3, 2), (16, 256, 8, 2, 1),
))  # fmt: skip

# Configurations worth a try at n = 4; others start from these.
CANDIDATES: dict[str, list[Config]] = {
    "project": _tiles("BT BK warps stages per_sm", (
        (64, 128, 4, 3, 2), (64, 128, 4, 4, 2), (64, 64, 4, 5, 2), (128, 128, 8, 3, 1),
        (128, 128, 4, 4, 1), (128, 64, 4, 4, 2), (32, 128, 4, 3, 2),
    )),
    "pre": _tiles("BT BC warps stages BS", _crossed(_WIDE_LOADS, (1, 3), (16, 64))),
    "post": _tiles("BT BC warps steps_c", _crossed(
        ((4, 256, 4), (2, 512, 4), (2, 256, 4), (1, 1024, 4), (8, 256, 8), (1, 512, 2)), (1, 2)
    )),
    "post_project": _tiles(_PRODUCTS, (
        (64, 64, 8, 3, 1), (64, 64, 8, 2, 1), (32, 64, 8, 3, 1), (32, 64, 8, 2, 2),
        (32, 64, 4, 3, 1), (32, 64, 4, 2, 2), (64, 32, 4, 3, 2),
    )),
    "post_backward": _tiles("BT BC warps V stages", _crossed(
        ((4, 128, 4, 1), (4, 256, 4, 8), (4, 256, 4, 4), (2, 256, 4, 1), (8, 128, 8, 1),
         (2, 512, 4, 8), (1, 512, 4, 1), (4, 512, 8, 8)), (1, 2, 3),
    )),
    "pre_reduce": _tiles("BT BC warps V BS", _crossed(
        ((4, 256, 4, 8), (2, 512, 4, 1), (2, 512, 4, 8), (8, 256, 8, 8), (4, 256, 4, 1)),
        (16, 32, 64),
    )),
    "pre_backward": _tiles(_PRODUCTS, _PRE_BACKWARD),
    "pre_backward_input": _tiles(_PRODUCTS, (  # no dphi to hold in registers
        *_PRE_BACKWARD, (32, 64, 4, 2, 2), (32, 128, 8, 3, 1), (16, 128, 4, 3, 2),
    )),
    "hc_pre_backward": _HC_PRE_BACKWARD,
    "hc_pre_backward_input": _HC_PRE_BACKWARD,
    "hc_pre": _tiles("BT BC warps stages", _crossed(_WIDE_LOADS, (1, 3))),
    "hc_reduce": _tiles("BT BC warps per_sm", _crossed(
        ((8, 256, 8), (4, 256, 4), (4, 512, 8), (8, 512, 8), (16, 256, 8)), (4, 8)
    ), V=8),
    "weight": _tiles(_PRODUCTS, itertools.product((64, 128), (64, 128), (4,), (3, 4), (2, 4))),
    "wide_project": _tiles("BT BK stages per_sm", itertools.product(
        (64, 128), (32, 64), (3, 4), (1, 2)
    ), warps=8),
    "wide_input": _tiles("BT BC warps stages", _crossed(
        ((32, 64, 4), (64, 64, 8), (64, 32, 4), (32, 128, 8), (64, 64, 4)), (2, 3)
    )),
    "wide_weight": _tiles("BT BK stages per_sm", itertools.product(
        (32, 64), (64, 128), (2, 3), (1, 2)
    ), warps=8),
    "recompute": _tiles("BT BC warps", (
        (4, 256, 4), (2, 512, 4), (2, 256, 4), (1, 512, 4), (8, 128, 4), (1, 512, 2), (2, 256, 2),
    )),
}  # fmt: skip


def candidates(kernel: str) -> list[Config]:
    """Configurations worth a try for ``kernel``; none if it has no choice."""
    return CANDIDATES.get(SAME_TILES.get(kernel, kernel), [])


def calls(tokens: int, n: int, channels: int, dtype: torch.dtype) -> dict[str, tuple]:
    """{kernel: (call, C elements that it has to move a token)} on fresh random data."""
    m = num_coefficients(n)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    x, dy = random(tokens, n, channels, dtype=dtype), random(tokens, n, channels, dtype=dtype)
    f, du = random(tokens, channels, dtype=dtype), random(tokens, channels, dtype=dtype)
    phi = random(m, n * channels) / (n * channels) ** 0.5
    bias, alpha = random(m), torch.ones(3, device="cuda")
    partial = mhc_forward.project(x, phi)
    _, mix, projection = mhc_forward.coefficients_and_pre(x, partial, bias, alpha, 20, 1e-6)
    dp = random(tokens, residual_parts(dtype) * padded_coefficients(n), dtype=dtype)
    s = random(tokens)
    fs = [random(tokens, channels, dtype=dtype) for _ in range(SITES - 1)]

    theta = random(n + 2, channels) / channels**0.5
    by_row = hc_kernels.project(x, theta)
    _, hc_mix, hc_projection = hc_kernels.coefficients_and_pre(x, by_row, bias, alpha, 1e-6)
    hc_dp = random(tokens, n, residual_parts(dtype) * padded(n + 2), dtype=dtype)
    hc_s = random(tokens, n)

    def pre_backward(with_weight: bool) -> Callable[[], object]:
        return lambda: mhc_backward.pre_backward(dy, x, du, mix, dp, s, phi, with_weight)

    def hc_pre_backward(with_weight: bool) -> Callable[[], object]:
        given = (dy, x, du, hc_mix, hc_dp, hc_s, theta)
        return lambda: mhc_backward.pre_backward(*given, with_weight)

    return {
        "hc_project": (lambda: hc_kernels.project(x, theta), n),
        "hc_pre": (
            lambda: hc_kernels.coefficients_and_pre(x, by_row, bias, alpha, 1e-6), n + 1
        ),
        "hc_reduce": (
            lambda: hc_kernels.coefficient_gradients(x, du, hc_projection, hc_mix, bias, alpha),
            n + 1,
        ),
        "hc_pre_backward": (hc_pre_backward(True), 3 * n + 1),
        "hc_pre_backward_input": (hc_pre_backward(False), 3 * n + 1),
        "hc_wide_input": (hc_pre_backward(False), 3 * n + 1),
        "hc_weight": (lambda: mhc_backward.weight_backward(x, hc_dp), n),
        "project": (lambda: mhc_forward.project(x, phi), n),
        "pre": (
            lambda: mhc_forward.coefficients_and_pre(x, partial, bias, alpha, 20, 1e-6), n + 1
        ),
        "post": (lambda: mhc_forward.post_res(x, f, mix), 2 * n + 1),
        "post_project": (lambda: mhc_forward.post_project(x, f, mix, phi), 2 * n + 1),
        "post_backward": (lambda: mhc_backward.post_backward(dy, x, f, mix), 2 * n + 2),
        "pre_reduce": (
            lambda: mhc_backward.coefficient_gradients(
                x, du, mix, projection, mix, bias, alpha, 20
            ),
            n + 1,
        ),
        "pre_backward": (pre_backward(True), 3 * n + 1),
        "pre_backward_input": (pre_backward(False), 3 * n + 1),
        "weight": (lambda: mhc_backward.weight_backward(x, dp), n),
        "wide_project": (lambda: mhc_forward.project(x, phi), n),
        "wide_input": (pre_backward(False), 3 * n + 1),
        "wide_weight": (lambda: mhc_backward.weight_backward(x, dp), n),
        "recompute": (
            lambda: mhc_recompute.recompute_block(x, fs, [mix] * SITES),
            n + 2 * SITES - 1 + n * (SITES - 1),
        ),
    }  # fmt: skip


def compile_one(job: tuple[str, int, int, torch.dtype, Config]) -> str | None:
    """Compile by launching at a small token count; return why it cannot run, if so."""
    kernel, n, channels, dtype, cfg = job
    tuning.override(kernel, cfg)
    try:
        calls(256, n, channels, dtype)[kernel][0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def main() -> None:
    """Tune and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kernels", default="")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--hidden", default="2560,4096,7168")
    parser.add_argument("--tokens", default="16384,4096")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    widths = [int(c) for c in args.hidden.split(",")]
    kernels = args.kernels.split(",") if args.kernels else list(tuning.KERNELS)
    others = NARROW if args.n >= mhc_wide.LEAST_ROWS else WIDE
    kernels = [k for k in kernels if k not in others and candidates(k)]
    jobs = [(k, args.n, c, dtype, cfg) for c in widths for k in kernels for cfg in candidates(k)]
    started = time.time()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        failed = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    print(f"compiled {len(jobs)} in {time.time() - started:.0f} s", flush=True)

    timer = Timer()
    copy = timer.copy_bytes_per_second()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s")
    table: dict[str, dict[int, Config]] = {}
    log = []
    for c, kernel in itertools.product(widths, kernels):
        times: dict[Config, list[float]] = {}
        for tokens in (int(t) for t in args.tokens.split(",")):
            call, elements = calls(tokens, args.n, c, dtype)[kernel]
            floor_us = elements * c * dtype.itemsize * tokens / copy * 1e6
            for cfg in candidates(kernel):
                if failed[(kernel, args.n, c, dtype, cfg)]:
                    continue
                tuning.override(kernel, cfg)
                try:
                    us = timer.us(call, repeats=9)
                except Exception as error:
                    print(f"  {kernel} {cfg}: {type(error).__name__}")
                    continue
                times.setdefault(cfg, []).append(us / floor_us)
                log.append({"kernel": kernel, "C": c, "T": tokens, "us": us,
                            "percent": 100 * floor_us / us, **cfg._asdict()})  # fmt: skip
            tuning.override(kernel, None)
        if not times:
            print(f"{kernel} C={c}: no candidate ran")
            continue
        ranked = sorted(times, key=lambda cfg: sum(times[cfg]))
        table.setdefault(kernel, {})[c] = ranked[0]
        for cfg in ranked[:3]:
            shown = {k: v for k, v in cfg._asdict().items() if v != Config._field_defaults[k]}
            percents = " ".join(f"{100 / t:.0f}%" for t in times[cfg])
            print(f"{kernel} C={c} {percents} {shown}", flush=True)
    for job, why in failed.items():
        if why and job[2] == widths[0]:
            print("failed:", job[0], dict(job[4]._asdict().items()), why)
    print(table)
    if args.out:
        args.out.write_text(json.dumps(log))


if __name__ == "__main__":
    main()
