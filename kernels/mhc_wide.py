"""Kernels of a site with many rows, n = 8 and 16, where phi is too large to hold on chip.

The M = 2n + n^2 coefficients are two tiles whose widths are powers of two, 2n (H_pre and H_post)
and n^2 (H_res), so nothing is padded. phi is read from L2 for every block of tokens, in the
residual's dtype. HC, whose theta is small, needs of this only that dx is made row after row.

T tokens of n rows of C channels, K = n C. Formulas: :mod:`mhcplan.kernels.reference`.
"""

# ruff: noqa: ANN001, ANN202  (Triton: no types for tensors)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mhcplan.kernels import tuning
from mhcplan.kernels.mhc_partition import channel_splits, shares, sum_partials
from mhcplan.kernels.reference import num_coefficients
from mhcplan.kernels.triton_support import (
    columns,
    dot,
    load_rows,
    padded,
    padded_coefficients,
    residual_parts,
    settled,
    split_phi,
)

if TYPE_CHECKING:
    from torch import Tensor

LEAST_ROWS = 8  # n from which these kernels are taken


@triton.jit(do_not_specialize=["T", "split_steps"])
def _wide_project_kernel(
    x_ptr, phi_ptr, partial_ptr, T, split_steps,
    N: tl.constexpr, K: tl.constexpr, MP: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    piece = tl.program_id(1)
    k_first = piece * split_steps * BK
    token = t < T
    kk = tl.arange(0, BK)
    gates = tl.arange(0, 2 * N)
    cells = 2 * N + tl.arange(0, N * N)
    of_gates = tl.zeros((BT, 2 * N), tl.float32)
    of_cells = tl.zeros((BT, N * N), tl.float32)
    square = tl.zeros((BT,), tl.float32)
    for k in tl.range(k_first, min(k_first + split_steps * BK, K), BK, num_stages=STAGES):
        x = tl.load(x_ptr + t[:, None] * K + (k + kk)[None, :], mask=token[:, None], other=0.0)
        for part in tl.static_range(PARTS):
            phi = phi_ptr + part * (M * K) + (k + kk)[None, :]
            of_gates = dot(x, tl.trans(tl.load(phi + gates[:, None] * K)), of_gates)
            of_cells = dot(x, tl.trans(tl.load(phi + cells[:, None] * K)), of_cells)
        of_gates = settled(of_gates)
        of_cells = settled(of_cells)
        wide = x.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    out = partial_ptr + (piece * T + t) * MP
    tl.store(out[:, None] + gates[None, :], of_gates, mask=token[:, None])
    tl.store(out[:, None] + cells[None, :], of_cells, mask=token[:, None])
    tl.store(out + M, square, mask=token)


@triton.jit(do_not_specialize=["T", "tiles"])
def _wide_input_kernel(
    dy_ptr, x_ptr, du_ptr, coefficients_ptr, dp_ptr, s_ptr, phi_ptr, dx_ptr, T, tiles,
    N: tl.constexpr, C: tl.constexpr, OUTPUTS: tl.constexpr, MP: tl.constexpr,
    PARTS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # dY of all rows stays in registers while row after row of dx is made. Neighbouring programs
    # have neighbouring tokens, so that their slice of phi is read from memory once. dx is written
    # in the residual's dtype: the remainders of dp and phi would be rounded away.
    M: tl.constexpr = N * N + 2 * N
    BY_ROW: tl.constexpr = OUTPUTS != M  # HC: a projection of each row alike, by the one theta
    pid = tl.program_id(0)
    t = ((pid % tiles) * BT + tl.arange(0, BT)).to(tl.int64)
    c = (pid // tiles) * BC + tl.arange(0, BC)
    token = t < T
    mask = token[:, None] & (c < C)[None, :]
    offsets = t[:, None] * (N * C) + c[None, :]
    if BY_ROW:
        column = tl.arange(0, MP)
        fits = (column < OUTPUTS)[:, None] & (c < C)[None, :]
        theta = tl.load(phi_ptr + column[:, None] * C + c[None, :], mask=fits, other=0.0)
    else:
        gates = tl.arange(0, 2 * N)
        cells = 2 * N + tl.arange(0, N * N)
        dp = dp_ptr + t[:, None] * (PARTS * MP)
        dp_gates = tl.load(dp + gates[None, :], mask=token[:, None], other=0.0)
        dp_cells = tl.load(dp + cells[None, :], mask=token[:, None], other=0.0)
        s = tl.load(s_ptr + t, mask=token, other=0.0)
    du = tl.load(du_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    dy = load_rows(dy_ptr, offsets, mask, N, C)
    for i in tl.range(0, N, num_stages=STAGES):  # unrolled, n^2 terms compile for minutes
        if BY_ROW:
            line = t * N + i
            of_row = dp_ptr + line[:, None] * (PARTS * MP) + column[None, :]
            dp_row = tl.load(of_row, mask=token[:, None], other=0.0)
            dx = dot(dp_row, theta, tl.zeros((BT, BC), tl.float32))
            s = tl.load(s_ptr + line, mask=token, other=0.0)
        else:
            phi = phi_ptr + i * C + c[None, :]
            inside = (c < C)[None, :]
            of_gates = tl.load(phi + gates[:, None] * (N * C), mask=inside, other=0.0)
            of_cells = tl.load(phi + cells[:, None] * (N * C), mask=inside, other=0.0)
            dx = dot(dp_gates, of_gates, tl.zeros((BT, BC), tl.float32))
            dx = dot(dp_cells, of_cells, dx)
        x = tl.load(x_ptr + i * C + offsets, mask=mask, other=0.0).to(tl.float32)
        mix = coefficients_ptr + t * M + i
        dx += s[:, None] * x + tl.load(mix, mask=token, other=0.0)[:, None] * du
        to_row = mix[:, None] + (2 * N + tl.arange(0, N) * N)[None, :]
        res = columns(tl.load(to_row, mask=token[:, None], other=0.0))
        for o in tl.static_range(N):
            dx += res[o][:, None] * dy[o].to(tl.float32)
        tl.store(dx_ptr + i * C + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "tiles", "share"])
def _wide_weight_kernel(
    x_ptr, dp_ptr, partial_ptr, T, tiles, share,
    N: tl.constexpr, K: tl.constexpr, MP: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    gates = tl.arange(0, 2 * N)
    cells = 2 * N + tl.arange(0, N * N)
    begin = tl.program_id(0) * share
    end = min(begin + share, (K + BK - 1) // BK * tiles)
    while begin < end:
        piece = begin // tiles
        stop = min(end, (piece + 1) * tiles)
        k = piece * BK + tl.arange(0, BK)
        of_gates = tl.zeros((BK, 2 * N), tl.float32)
        of_cells = tl.zeros((BK, N * N), tl.float32)
        for tile in tl.range(begin - piece * tiles, stop - piece * tiles, num_stages=STAGES):
            t = (tile * BT + tl.arange(0, BT)).to(tl.int64)
            token = (t < T)[:, None]
            x = tl.load(x_ptr + t[:, None] * K + k[None, :], mask=token, other=0.0)
            for part in tl.static_range(PARTS):
                dp = dp_ptr + t[:, None] * (PARTS * MP) + part * MP
                dp_gates = tl.load(dp + gates[None, :], mask=token, other=0.0)
                dp_cells = tl.load(dp + cells[None, :], mask=token, other=0.0)
                of_gates = dot(tl.trans(x), dp_gates, of_gates)
                of_cells = dot(tl.trans(x), dp_cells, of_cells)
        slot = tl.program_id(0) - piece * tiles // share
        base = partial_ptr + slot * (M * K) + k[:, None]
        tl.store(base + gates[None, :] * K, of_gates)
        tl.store(base + cells[None, :] * K, of_cells)
        begin = stop


# -- launchers: K = n C is a multiple of 512 here, and so of every block of it --------------------


def project(x: Tensor, phi: Tensor) -> Tensor:
    """As :func:`mhcplan.kernels.mhc_forward.project`."""
    tokens, n, channels = x.shape
    width = n * channels
    line = padded_coefficients(n)
    cfg = tuning.config("wide_project", n, channels, x.dtype)
    blocks = triton.cdiv(tokens, cfg.BT)
    splits, split_steps = channel_splits(blocks, width, cfg.BK, x.device, cfg.per_sm, least_steps=4)
    partial = x.new_empty((splits, tokens, line), dtype=torch.float32)
    _wide_project_kernel[(blocks, splits)](
        x, split_phi(phi, x.dtype), partial, tokens, split_steps, N=n, K=width, MP=line,
        PARTS=residual_parts(x.dtype),
        BT=cfg.BT, BK=cfg.BK, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return partial


def input_gradient(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, dp: Tensor, s: Tensor, phi: Tensor,
    dx: Tensor,
) -> None:  # fmt: skip
    """Write dx, as :func:`mhcplan.kernels.mhc_backward.pre_backward` without dphi."""
    tokens, n, channels = x.shape
    outputs = phi.shape[0]
    kernel = "wide_input" if outputs == num_coefficients(n) else "hc_wide_input"
    cfg = tuning.config(kernel, n, channels, x.dtype)
    tiles = triton.cdiv(tokens, cfg.BT)
    _wide_input_kernel[(tiles * triton.cdiv(channels, cfg.BC),)](
        dy, x, du, coefficients, dp, s, phi.to(x.dtype), dx, tokens, max(tiles, 1),
        N=n, C=channels, OUTPUTS=outputs, MP=padded(outputs), PARTS=residual_parts(x.dtype),
        BT=cfg.BT, BC=cfg.BC, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip


def weight_gradient(x: Tensor, dp: Tensor) -> Tensor:
    """As :func:`mhcplan.kernels.mhc_backward.weight_backward`."""
    tokens, n, channels = x.shape
    width, m = n * channels, num_coefficients(n)
    cfg = tuning.config("wide_weight", n, channels, x.dtype)
    shared = shares(triton.cdiv(width, cfg.BK), tokens, cfg, x.device)
    partial = x.new_empty((shared.slots, m, width), dtype=torch.float32)
    _wide_weight_kernel[(shared.programs,)](
        x, dp, partial, tokens, shared.tiles, shared.share, N=n, K=width,
        MP=padded_coefficients(n), PARTS=residual_parts(x.dtype),
        BT=cfg.BT, BK=cfg.BK, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return sum_partials(partial, shared, width, cfg.BK)
