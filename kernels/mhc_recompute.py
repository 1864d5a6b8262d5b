"""Recompute of a block of sites in one launch.

Given the block's stored input, the stored outputs of its sublayers and the stored coefficients,
the kernel rebuilds what the block's backward needs: the input u_l of every sublayer and the state
x_l of every site. A program keeps its tile of the state in registers from site to site: mixing
rows is local to a channel, and the coefficients, which are not, are stored. It reads (n + L - 1)C
elements and writes (L + n(L - 1))C for L sites, and its results equal the forward's bit by bit.
"""

# ruff: noqa: ANN001, ANN202, RUF005  (Triton: no types for tensors, no starred tuples)

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from mhcplan.kernels import tuning
from mhcplan.kernels.mhc_forward import mixed_row, weighted_rows
from mhcplan.kernels.triton_support import load_mix, load_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MOST_SITES = 16  # a launch: each passes two pointers, and the kernel picks among them


@triton.jit
def _pick(pointers, index):
    """``pointers[index]`` with an index that is known only at run time."""
    chosen = pointers[0]
    for k in tl.static_range(1, len(pointers)):
        chosen = tl.where(index == k, pointers[k], chosen)
    return chosen


@triton.jit(do_not_specialize=["T"])
def _recompute_kernel(
    x_ptr, f_ptrs, coefficients_ptrs, u_ptrs, y_ptrs, T,
    N: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    POSTS: tl.constexpr = len(f_ptrs)
    DT: tl.constexpr = x_ptr.dtype.element_ty
    blocks_c: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    t = ((pid // blocks_c) * BT + tl.arange(0, BT)).to(tl.int64)
    c = (pid % blocks_c) * BC + tl.arange(0, BC)
    token = t < T
    mask = token[:, None] & (c < C)[None, :]
    row = t[:, None] * C + c[None, :]
    offsets = t[:, None] * (N * C) + c[None, :]
    x = load_rows(x_ptr, offsets, mask, N, C)
    if POSTS > 0:  # else there is no pointer to pick from
        # A loop, not unrolled: n^2 terms for every site of a block compile for minutes at n = 8.
        for site in tl.range(0, POSTS):
            mix = _pick(coefficients_ptrs, site)
            f = tl.load(_pick(f_ptrs, site) + row, mask=mask, other=0.0).to(tl.float32)
            u = weighted_rows(x, load_mix(mix, t, token, 0, N, M), N)
            tl.store(_pick(u_ptrs, site) + row, u.to(DT), mask=mask)
            post = load_mix(mix, t, token, N, N, M)
            res = load_mix(mix, t, token, 2 * N, N * N, M)
            y = ()
            for o in tl.static_range(N):
                y = y + (mixed_row(x, f, post, res, o, N).to(DT),)
                tl.store(_pick(y_ptrs, site) + o * C + offsets, y[o], mask=mask)
            x = y
    if len(coefficients_ptrs) > POSTS:
        u = weighted_rows(x, load_mix(coefficients_ptrs[POSTS], t, token, 0, N, M), N)
        tl.store(u_ptrs[POSTS] + row, u.to(DT), mask=mask)


def recompute_block(
    x: Tensor, fs: Sequence[Tensor], coefficients: Sequence[Tensor],
    out: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Rebuild u of every site and the state after every site whose f is given.

    Args:
        x: input of the block ``[T, n, C]``.
        fs: sublayer outputs ``[T, C]``, one a site; the last site's may be left out.
        coefficients: ``[T, M]`` fp32, one a site.
        out: memory for what is returned, us then xs.

    Returns:
        ``(us, xs)``: u of every site ``[T, C]``; xs[l] ``[T, n, C]`` is the state after site l.
    """
    tokens, n, channels = x.shape
    cfg = tuning.config("recompute", n, channels, x.dtype)
    given = list(out or ())
    us = given[: len(coefficients)] or [x.new_empty((tokens, channels)) for _ in coefficients]
    xs = given[len(coefficients) :] or [x.new_empty(x.shape) for _ in fs]
    for first in range(0, len(coefficients), MOST_SITES):
        block = tuple(coefficients[first : first + MOST_SITES])
        posts = tuple(fs[first : first + MOST_SITES])
        u = tuple(us[first : first + MOST_SITES])
        y = tuple(xs[first : first + MOST_SITES])
        blocks = triton.cdiv(tokens, cfg.BT) * triton.cdiv(channels, cfg.BC)
        _recompute_kernel[(blocks,)](
            x, posts, block, u, y, tokens, N=n, C=channels, BT=cfg.BT, BC=cfg.BC,
            num_warps=cfg.warps,
        )  # fmt: skip
        x = y[-1] if y else x
    return us, xs
