"""The mHC kernels beside other ways to run a site, as ratios to a copy measured in the same run.

    PYTHONPATH=src python benchmarks/kernels.py [--hidden 2560,4096,7168] [--tokens 4096,16384]
        [--n 4] [--residual mhc|hc] [--peers eager,compile,liger] [--peers-at 4096x2560,...]
        [--json out.json]
    PYTHONPATH=src ncu ... python benchmarks/kernels.py --hidden 4096 --tokens 16384 --once

Needs a GPU. ``%`` is the time that a copy would need for the least traffic of the line, over the
time measured: the forward moves (4n+2)C elements a token as three kernels (18C at n = 4), forward
and backward (10n+6)C (46C), and HC's the same. L2 is flushed by reading before every call; calls
run as CUDA graphs behind a GPU sleep, so no launch is seen; the host's own time is printed
beside. Errors are |out - ref| / |ref| against the float64 reference on the same bf16 inputs. The
sublayer is left out: its output f and the gradient du are random tensors.
``benchmarks/kernels_page.py`` makes the tables of ``docs/kernels.md`` of what ``--json`` writes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from kernels_timing import Timer

from mhcplan.kernels import (
    hc,
    hc_kernels,
    mhc,
    mhc_backward,
    mhc_forward,
    mhc_recompute,
    reference,
)
from mhcplan.kernels.reference import num_coefficients

SITES = 8
REPETITIONS = 100  # that results must be equal in; a race was seen in one of eight pairs of runs
Call = Callable[[], object]


class Site:
    """Inputs of one site and the calls on them that are timed."""

    reference_pre: Callable[..., tuple[torch.Tensor, torch.Tensor]] = staticmethod(
        reference.mhc_pre
    )
    weight = "dphi"

    def __init__(self, tokens: int, n: int, channels: int) -> None:
        m = num_coefficients(n)
        self.n, self.tokens, self.channels = n, tokens, channels
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        self.x = torch.randn(tokens, n, channels, **bf16)
        self.dy = torch.randn(tokens, n, channels, **bf16)
        self.f = torch.randn(tokens, channels, **bf16)
        self.du = torch.randn(tokens, channels, **bf16)
        bias = torch.randn(m, device="cuda")
        self.parameters = (self.projection(), bias, torch.full((3,), 0.5, device="cuda"))

    def projection(self) -> torch.Tensor:
        """phi."""
        n, width = self.n, self.n * self.channels
        return torch.randn(num_coefficients(n), width, device="cuda") / width**0.5

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Both halves of the forward."""
        u, mix, projection = mhc.mhc_pre_forward(self.x, *self.parameters)
        return u, mix, projection, mhc.mhc_post_forward(self.x, self.f, mix)

    def forward_backward(self, deferred: bool = False) -> tuple[torch.Tensor, ...]:
        """u, y, dx, df, dphi, dbias, dalpha."""
        u, mix, projection, y = self.forward()
        df, dmix = mhc.mhc_post_backward(self.dy, self.x, self.f, mix)
        given = (self.dy, self.x, self.du, mix, projection, dmix, *self.parameters)
        if deferred:
            dx, dp, dbias, dalpha = mhc.mhc_pre_backward_input(*given)
            return u, y, dx, df, mhc.mhc_pre_backward_weight(self.x, dp), dbias, dalpha
        dx, dphi, dbias, dalpha = mhc.mhc_pre_backward(*given)
        return u, y, dx, df, dphi, dbias, dalpha

    def kernels(self) -> dict[str, tuple[Call, float]]:
        """{kernel: (call, C elements a token that it has to move)}."""
        n, x, f, dy, du = self.n, self.x, self.f, self.dy, self.du
        phi, bias, alpha = self.parameters
        partial = mhc_forward.project(x, phi)
        _, mix, projection = mhc_forward.coefficients_and_pre(x, partial, bias, alpha, 20, 1e-6)
        _, dmix = mhc_backward.post_backward(dy, x, f, mix)
        dp, s, *_ = mhc_backward.coefficient_gradients(
            x, du, mix, projection, dmix, bias, alpha, 20
        )
        fs = [torch.randn_like(f) for _ in range(SITES - 1)]
        return {
            "project": (lambda: mhc_forward.project(x, phi), n),
            "coefficients + pre": (
                lambda: mhc_forward.coefficients_and_pre(x, partial, bias, alpha, 20, 1e-6),
                n + 1,
            ),
            "post_res": (lambda: mhc_forward.post_res(x, f, mix), 2 * n + 1),
            "post_res + project": (lambda: mhc_forward.post_project(x, f, mix, phi), 2 * n + 1),
            "post backward": (lambda: mhc_backward.post_backward(dy, x, f, mix), 2 * n + 2),
            "coefficients backward": (
                lambda: mhc_backward.coefficient_gradients(
                    x, du, mix, projection, dmix, bias, alpha, 20
                ),
                n + 1,
            ),
            "pre backward (I + W)": (
                lambda: mhc_backward.pre_backward(dy, x, du, mix, dp, s, phi, True), 3 * n + 1
            ),
            "pre backward (I)": (
                lambda: mhc_backward.pre_backward(dy, x, du, mix, dp, s, phi, False), 3 * n + 1
            ),
            "dphi (W)": (lambda: mhc_backward.weight_backward(x, dp), n),
            f"recompute {SITES} sites": (
                lambda: mhc_recompute.recompute_block(x, fs, [mix] * SITES),
                n + (SITES - 1) + SITES + n * (SITES - 1),
            ),
        }  # fmt: skip


class HcSite(Site):
    """The same of HC."""

    reference_pre = staticmethod(reference.hc_pre)
    weight = "dtheta"

    def projection(self) -> torch.Tensor:
        """theta."""
        return torch.randn(self.n + 2, self.channels, device="cuda") / self.channels**0.5

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Both halves of the forward."""
        u, mix, projection = hc.hc_pre_forward(self.x, *self.parameters)
        return u, mix, projection, mhc.mhc_post_forward(self.x, self.f, mix)

    def forward_backward(self, deferred: bool = False) -> tuple[torch.Tensor, ...]:
        """u, y, dx, df, dtheta, dbias, dalpha."""
        u, mix, projection, y = self.forward()
        df, dmix = mhc.mhc_post_backward(self.dy, self.x, self.f, mix)
        given = (self.dy, self.x, self.du, mix, projection, dmix, *self.parameters)
        if deferred:
            dx, dp, dbias, dalpha = hc.hc_pre_backward_input(*given)
            return u, y, dx, df, hc.hc_pre_backward_weight(self.x, dp), dbias, dalpha
        dx, dtheta, dbias, dalpha = hc.hc_pre_backward(*given)
        return u, y, dx, df, dtheta, dbias, dalpha

    def kernels(self) -> dict[str, tuple[Call, float]]:
        """{kernel: (call, C elements a token that it has to move)}."""
        n, x, dy, du = self.n, self.x, self.dy, self.du
        theta, bias, alpha = self.parameters
        partial = hc_kernels.project(x, theta)
        _, mix, projection = hc_kernels.coefficients_and_pre(x, partial, bias, alpha, 1e-6)
        _, dmix = mhc_backward.post_backward(dy, x, self.f, mix)
        dp, s, *_ = hc_kernels.coefficient_gradients(x, du, projection, dmix, bias, alpha)
        return {
            "project": (lambda: hc_kernels.project(x, theta), n),
            "coefficients + pre": (
                lambda: hc_kernels.coefficients_and_pre(x, partial, bias, alpha, 1e-6), n + 1
            ),
            "post_res": (lambda: mhc_forward.post_res(x, self.f, mix), 2 * n + 1),
            "post backward": (
                lambda: mhc_backward.post_backward(dy, x, self.f, mix), 2 * n + 2
            ),
            "coefficients backward": (
                lambda: hc_kernels.coefficient_gradients(x, du, projection, dmix, bias, alpha),
                n + 1,
            ),
            "pre backward (I + W)": (
                lambda: mhc_backward.pre_backward(dy, x, du, mix, dp, s, theta, True), 3 * n + 1
            ),
            "pre backward (I)": (
                lambda: mhc_backward.pre_backward(dy, x, du, mix, dp, s, theta, False), 3 * n + 1
            ),
            "dtheta (W)": (lambda: mhc_backward.weight_backward(x, dp), n),
        }  # fmt: skip


SITES_OF = {"mhc": Site, "hc": HcSite}


def graphed(call: Call) -> Call:
    """``call`` as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_us(call: Call, repeats: int = 20) -> float:
    """Microseconds that the host needs to issue ``call``."""
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - started
    torch.cuda.synchronize()
    return elapsed / repeats * 1e6


def peak_mib(call: Call) -> float:
    """MiB allocated at the peak of ``call`` above what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def errors(site: Site) -> dict[str, float]:
    """Relative errors of every output against float64."""

    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.double().requires_grad_()

    x, f, *parameters = leaves = [wide(t) for t in (site.x, site.f, *site.parameters)]
    u, mix = site.reference_pre(x, *parameters)
    y = reference.post_res(x, f, mix)
    expected = (u, y, *torch.autograd.grad(
        (u, y), leaves, (site.du.double(), site.dy.double())
    ))  # fmt: skip
    names = ("u", "y", "dx", "df", site.weight, "db", "dalpha")
    return {
        name: ((out.double() - ref).norm() / ref.norm()).item()
        for name, out, ref in zip(names, site.forward_backward(), expected, strict=True)
    }


def autograd_peer(site: Site, forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Call:
    """Forward and backward of a site written as one differentiable function."""
    leaves = [t.detach().requires_grad_() for t in (site.x, site.f, *site.parameters)]

    def run() -> object:
        u, y = forward(*leaves)
        return torch.autograd.grad((u, y), leaves, (site.du, site.dy))

    return run


def peers(site: Site, names: list[str]) -> dict[str, tuple[Call, Call]]:
    """{peer: (forward, forward and backward)}; a peer that cannot be imported is left out."""
    found: dict[str, tuple[Call, Call]] = {}

    def eager_forward(
        x: torch.Tensor, f: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        u, mix = site.reference_pre(x, *parameters)
        return u, reference.post_res(x, f, mix)

    given = (site.x, site.f, *site.parameters)
    if "eager" in names:
        found["eager"] = (lambda: eager_forward(*given), autograd_peer(site, eager_forward))
    if "compile" in names:
        compiled = torch.compile(eager_forward, dynamic=False)
        found["torch.compile"] = (lambda: compiled(*given), autograd_peer(site, compiled))
    if "liger" in names and not isinstance(site, HcSite):  # Liger has no HC
        try:
            from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
                liger_mhc_coeffs,
                liger_mhc_post_res,
                liger_mhc_pre,
            )
        except ImportError:
            print("liger_kernel is not installed: left out")
        else:

            def liger(
                x: torch.Tensor, f: torch.Tensor, phi: torch.Tensor, bias: torch.Tensor,
                alpha: torch.Tensor,
            ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
                pre, post, res = liger_mhc_coeffs(
                    x, phi.mT.contiguous().bfloat16(), bias, *alpha.unbind(), tmax=20
                )
                return liger_mhc_pre(x, pre), liger_mhc_post_res(x, f, post, res)

            found["liger"] = (lambda: liger(*given), autograd_peer(site, liger))
    return found


def measure(timer: Timer, copy: float, site: Site, names: list[str]) -> dict[str, object]:
    """Print and return all figures of one shape."""
    tokens, n, channels = site.tokens, site.n, site.channels
    row: dict[str, object] = {"T": tokens, "C": channels, "n": n, "copy_bytes_per_second": copy}

    def line(name: str, call: Call, elements: float, graph: bool = True) -> float:
        us = timer.us(graphed(call) if graph else call)
        percent = 100 * elements * channels * 2 * tokens / copy * 1e6 / us
        print(f"  {name:28s} {us:9.1f} us {percent:6.1f} %")
        row[name] = {"us": us, "percent": percent}
        return us

    print(f"T={tokens} C={channels} n={n}: copy {copy / 1e9:.0f} GB/s")
    for name, (call, elements) in site.kernels().items():
        line(name, call, elements)
    forward, both = 4 * n + 2, 10 * n + 6
    line("site forward", site.forward, forward)
    line("site forward + backward", site.forward_backward, both)
    line("site forward + I + W", lambda: site.forward_backward(True), both + n)
    if not isinstance(site, HcSite):
        _, mix, *_ = site.forward()
        line(
            "site forward, cross-site",
            lambda: mhc.mhc_post_pre_forward(site.x, site.f, mix, *site.parameters),
            3 * n + 2,
        )
    row["host_us"] = host_us(site.forward_backward)
    row["peak_mib"] = peak_mib(site.forward_backward)
    print(f"  host {row['host_us']:.0f} us, peak {row['peak_mib']:.1f} MiB (forward + backward)")
    unequal = changing_results(site)
    row["repeats"] = not unequal
    print(f"  bitwise equal in {REPETITIONS} runs: {not unequal}", *sorted(unequal))
    if tokens * channels <= 4096 * 4096:
        row["errors"] = errors(site)
        print("  errors " + " ".join(f"{k} {v:.1e}" for k, v in errors(site).items()))
    for name, (fwd, fb) in peers(site, names).items():
        line(f"{name} forward", fwd, forward, graph=False)
        line(f"{name} forward + backward", fb, both, graph=False)
        row[f"{name} host_us"] = host_us(fb, 3)
    return row


def changing_results(site: Site) -> set[str]:
    """Names of the results that came out otherwise in any of ``REPETITIONS`` runs."""
    first = site.forward_backward()
    names = ("u", "y", "dx", "df", "dphi", "db", "dalpha")
    return {
        name
        for _ in range(REPETITIONS)
        for name, one, other in zip(names, first, site.forward_backward(), strict=True)
        if not torch.equal(one, other)
    }


def call_once(site: Site) -> None:
    """Call every kernel twice, the second time with all compiled, under the profiler's eyes."""
    for call, _ in site.kernels().values():
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main() -> None:
    """Measure every shape asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--hidden", default="2560,4096,7168")
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--n", default="4")
    parser.add_argument("--residual", choices=SITES_OF, default="mhc")
    parser.add_argument("--peers", default="eager,compile,liger")
    parser.add_argument("--peers-at", default="", metavar="TxC,...", help="default: every shape")
    parser.add_argument("--once", action="store_true", help="only call each kernel, for a profiler")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs a GPU")
    shapes = [
        (int(tokens), int(n), int(channels))
        for n in args.n.split(",")
        for channels in args.hidden.split(",")
        for tokens in args.tokens.split(",")
    ]
    if args.once:
        for shape in shapes:
            call_once(SITES_OF[args.residual](*shape))
        return
    timer = Timer()
    copy = timer.copy_bytes_per_second()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows: list[dict[str, object]] = []
    for tokens, n, channels in shapes:
        everywhere = not args.peers_at
        here = everywhere or f"{tokens}x{channels}" in args.peers_at.split(",")
        names = args.peers.split(",") if here else []
        site = SITES_OF[args.residual](tokens, n, channels)
        rows.append(measure(timer, copy, site, names))
        if args.json:  # after every shape: an interrupted run keeps what it had
            measured = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "residual": args.residual,
                "copy_bytes_per_second": copy,
                "rows": rows,
            }
            args.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
