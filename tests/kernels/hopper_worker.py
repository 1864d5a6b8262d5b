"""Compile a site's kernels for an H100, on a machine without one; print what the compiler made.

Launches are turned into compilations for compute capability 9.0, with the launchers' own grids,
tiles and specialisations. One JSON line a kernel: name, bytes of shared memory, bytes spilled,
products whose rows are fewer than their warps cover, and factors loaded over while a product runs.

    python tests/kernels/hopper_worker.py N bf16|fp32 C [products|hc]

``products`` compiles those kernels only that multiply by phi or for it, ``hc`` those that HC does
not share with mHC, or in other tiles.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mhcplan.kernels import hc_kernels, mhc_backward, mhc_forward, mhc_recompute
from mhcplan.kernels.triton_support import padded_coefficients, residual_parts

TOKENS = 4096
STEPS = 20


class NoDevice:
    """What the compiler asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def spilled_bytes(ptx: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr))


def short_products(ttgir: str) -> list[str]:
    """Warpgroup products in which some warps repeat the rows of others.

    ptxas makes such a product in tf32, with a factor in registers, read outside shared memory.
    """
    layout = r"(#mma\d*) = #ttg.nvidia_mma<{versionMajor = 3.*?warpsPerCTA = \[(\d+), \d+\]"
    warps = {name: int(count) for name, count in re.findall(layout, ttgir)}
    results = re.findall(r"warp_group_dot .*-> (tensor<(\d+)x\d+xf32, (#mma\d*)>)", ttgir)
    return [product for product, rows, name in results if int(rows) < 16 * warps[name]]


def overwritten_factors(ttgir: str) -> list[str]:
    """Warpgroup products that run on into the next iteration, while a factor is loaded over.

    A factor that is also read into registers has one buffer for each load ahead and none more: the
    load that this iteration starts goes where the product still reads.
    """
    source = dict(re.findall(r"(%\w+) = ttg.memdesc_trans (%\w+)", ttgir))
    read = set(re.findall(r"ttg.local_load (%\w+) token", ttgir))
    found: list[str] = []
    running: list[str] = []
    for line in ttgir.splitlines():
        if product := re.search(r"ttng.warp_group_dot (%\w+), (%\w+)", line):
            running += [name for name in product.groups() if source.get(name, name) in read]
        elif "warp_group_dot_wait" in line and "pendings = 0" in line:
            running = []
        elif "scf.yield" in line:
            found += running
            running = []
    return found


def report_instead_of_launching() -> None:
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ANN401
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        made = {
            "name": self.__name__.strip("_"),
            "shared_bytes": kernel.metadata.shared,
            "spilled_bytes": spilled_bytes(kernel.asm["ptx"]),
            "short_products": short_products(kernel.asm["ttgir"]),
            "overwritten_factors": overwritten_factors(kernel.asm["ttgir"]),
        }
        print(json.dumps(made), flush=True)
        return kernel

    JITFunction.run = run


def site(n: int, channels: int, dtype: torch.dtype) -> None:
    """Everything that is launched for a site: forward, backward, weights apart, recompute."""
    m = n * n + 2 * n
    x = torch.empty(TOKENS, n, channels, dtype=dtype)
    f = torch.empty(TOKENS, channels, dtype=dtype)
    phi, bias, alpha = torch.empty(m, n * channels), torch.empty(m), torch.empty(3)
    partial = mhc_forward.project(x, phi)
    u, mix, projection = mhc_forward.coefficients_and_pre(
        x, partial, bias, alpha, STEPS, norm_eps=1e-6
    )
    mhc_forward.post_res(x, f, mix)
    mhc_forward.post_project(x, f, mix, phi)
    df, dmix = mhc_backward.post_backward(x, x, f, mix)
    dp, s, *_ = mhc_backward.coefficient_gradients(x, df, mix, projection, dmix, bias, alpha, STEPS)
    mhc_backward.pre_backward(x, x, u, mix, dp, s, phi, with_weight=True)
    mhc_backward.pre_backward(x, x, u, mix, dp, s, phi, with_weight=False)
    mhc_backward.weight_backward(x, dp)
    for sites, outputs in ((1, 0), (1, 1), (8, 7), (8, 8)):
        mhc_recompute.recompute_block(x, [f] * outputs, [mix] * sites)


def products(n: int, channels: int, dtype: torch.dtype) -> None:
    """The projection, dx and dphi."""
    m = n * n + 2 * n
    x = torch.empty(TOKENS, n, channels, dtype=dtype)
    du, phi, s = torch.empty_like(x[:, 0]), torch.empty(m, n * channels), torch.empty(TOKENS)
    dp = torch.empty(TOKENS, residual_parts(dtype) * padded_coefficients(n), dtype=dtype)
    mhc_forward.project(x, phi)
    for with_weight in (True, False):
        mhc_backward.pre_backward(x, x, du, torch.empty(TOKENS, m), dp, s, phi, with_weight)


def hc_site(n: int, channels: int, dtype: torch.dtype) -> None:
    """HC's coefficients, their gradients, dx and dtheta."""
    m = n * n + 2 * n
    x = torch.empty(TOKENS, n, channels, dtype=dtype)
    theta, bias, alpha = torch.empty(n + 2, channels), torch.empty(m), torch.empty(3)
    partial = hc_kernels.project(x, theta)
    u, mix, projection = hc_kernels.coefficients_and_pre(x, partial, bias, alpha, norm_eps=1e-6)
    dp, s, *_ = hc_kernels.coefficient_gradients(x, u, projection, mix, bias, alpha)
    mhc_backward.pre_backward(x, x, u, mix, dp, s, theta, with_weight=True)
    mhc_backward.pre_backward(x, x, u, mix, dp, s, theta, with_weight=False)
    mhc_backward.weight_backward(x, dp)


if __name__ == "__main__":
    driver.set_active(NoDevice())
    report_instead_of_launching()
    rows, kind, width, *only = sys.argv[1:]
    compile_all = {"": site, "products": products, "hc": hc_site}["".join(only)]
    compile_all(int(rows), int(width), {"bf16": torch.bfloat16, "fp32": torch.float32}[kind])
