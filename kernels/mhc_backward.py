"""Backward kernels of an mHC site, and the launchers that pick their grids.

At n = 4 a site's backward moves 28C elements, (6n+4)C, in three heavy kernels:

* ``post_backward`` (before the sublayer's backward): reads dY, x and f once; writes df and the
  gradients of H_post and H_res.
* ``coefficient_gradients`` (after it): reads x and du for the gradient of H_pre, and meanwhile, in
  other programs, goes back through Sinkhorn, whose steps are run again on chip; then a small
  kernel turns all of it into dp, the gradient of the projection.
* ``pre_backward``: reads dY, x and du once and writes dx once, with every contribution:
  dx_i = sum_o H_res[o,i] dY_o + H_pre[i] du + dp phi_i + s x_i, where s x is the gradient through
  the norm. At n <= 4 it also accumulates dphi = dp^T x, holding its tile of dphi in registers
  while it walks over the tokens; the sums per split of the tokens are added in order at the end.
  Where they are large they stay in memory that dx is written to afterwards.

``weight_backward`` is dphi alone, for a schedule that defers weight gradients, and where dphi does
not fit beside the rest. From n = 8 on other kernels do this part: :mod:`mhcplan.kernels.mhc_wide`.
No atomics: results repeat bit by bit. T tokens, n rows, C channels, M = n^2 + 2n coefficients.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005  (Triton: no types for tensors, no starred tuples)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhcplan.kernels import mhc_wide, tuning
from mhcplan.kernels.mhc_forward import first_sinkhorn_step, normalise
from mhcplan.kernels.mhc_partition import Shares, shares, sum_partials
from mhcplan.kernels.reference import expansion_rate, num_coefficients
from mhcplan.kernels.triton_support import (
    columns,
    dot,
    fold,
    load_mix,
    load_rows,
    padded,
    padded_coefficients,
    parts_and_columns,
    replaced,
    residual_parts,
    settled,
    split,
    sum_parts,
)

# Most slices of phi (n; HC's: one) whose dphi fits in registers beside the rest, by bytes an
# element.
FUSED_MOST_SLICES = {2: 4, 4: 2}
# Partial sums of dphi of so many bytes or more, in a dx at least so many times as large, lie in
# dx's own memory until they are added up; what of dx belongs there is then written last.
LEAST_LENT_BYTES = 4 * 2**20
LEAST_TIMES_LENT = 8


@triton.jit(do_not_specialize=["T"])
def _post_backward_kernel(
    dy_ptr, x_ptr, f_ptr, coefficients_ptr, df_ptr, dmix_ptr, T,
    N: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program holds the gradients of GROUP rows o of H_res (all n rows up to n = 8) and walks
    # over all channels of its tokens, so nothing is left to add up afterwards.
    M: tl.constexpr = N * N + 2 * N
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    first = tl.program_id(1) * GROUP
    token = t < T
    post = load_mix(coefficients_ptr, t, token, N, N, M)
    cc = tl.arange(0, BC)
    dpost = ()
    dres = ()
    for _o in tl.static_range(GROUP):
        dpost = dpost + (tl.zeros((BT, BC // V), tl.float32),)
        for _i in tl.static_range(N):
            dres = dres + (tl.zeros((BT, BC // V), tl.float32),)
    for c0 in tl.range(0, C, BC, num_stages=STAGES):
        c = c0 + cc
        mask = token[:, None] & (c < C)[None, :]
        offsets = t[:, None] * (N * C) + c[None, :]
        out = t[:, None] * C + c[None, :]
        f = tl.load(f_ptr + out, mask=mask, other=0.0).to(tl.float32)
        x = load_rows(x_ptr, offsets, mask, N, C)
        df = tl.zeros((BT, BC), tl.float32)
        if GROUP != N and first == 0:
            for o in tl.static_range(N):
                row = tl.load(dy_ptr + o * C + offsets, mask=mask, other=0.0)
                df += post[o][:, None] * row.to(tl.float32)
        new_dpost = ()
        new_dres = ()
        dy_rows = load_rows(dy_ptr + first * C, offsets, mask, GROUP, C)
        for o in tl.static_range(GROUP):
            dy = dy_rows[o].to(tl.float32)
            if GROUP == N:
                df += post[o][:, None] * dy
            new_dpost = new_dpost + (dpost[o] + fold(dy * f, V),)
            for i in tl.static_range(N):
                gradient = dres[o * N + i] + fold(dy * x[i].to(tl.float32), V)
                new_dres = new_dres + (gradient,)
        dpost = new_dpost
        dres = new_dres
        tl.store(df_ptr + out, df.to(df_ptr.dtype.element_ty), mask=mask & (first == 0))
    base = dmix_ptr + t * M
    for o in tl.static_range(GROUP):
        tl.store(base + first + o, tl.zeros((BT,), tl.float32), mask=token)  # H_pre: none here
        tl.store(base + N + first + o, tl.sum(dpost[o], axis=1), mask=token)
        for i in tl.static_range(N):
            cell = 2 * N + (first + o) * N + i
            tl.store(base + cell, tl.sum(dres[o * N + i], axis=1), mask=token)


@triton.jit
def _sinkhorn_backward(
    pid, projection_ptr, dmix_ptr, coefficients_ptr, bias_ptr, alpha_ptr, history_ptr,
    dlogits_ptr, T, N: tl.constexpr, STEPS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of H_post and H_res for BS tokens, in columns n and up."""
    M: tl.constexpr = N * N + 2 * N
    t = (pid * BS + tl.arange(0, BS)).to(tl.int64)
    token = t < T
    j = tl.arange(0, N)
    mask2 = token[:, None] & (j[None, :] < N)
    h = tl.load(coefficients_ptr + t[:, None] * M + N + j[None, :], mask=mask2, other=0.0)
    d = tl.load(dmix_ptr + t[:, None] * M + N + j[None, :], mask=mask2, other=0.0)
    tl.store(dlogits_ptr + t[:, None] * M + N + j[None, :], d * h * (1.0 - 0.5 * h), mask=mask2)

    cell = 2 * N + j[:, None] * N + j[None, :]
    mask3 = token[:, None, None] & (cell < M)[None, :, :]
    inverse_rms = tl.load(projection_ptr + t * (M + 1) + M, mask=token, other=0.0)
    p = tl.load(
        projection_ptr + t[:, None, None] * (M + 1) + cell[None, :, :], mask=mask3, other=0.0
    )
    logits = p * inverse_rms[:, None, None] * tl.load(alpha_ptr + 2)
    logits += tl.load(bias_ptr + cell)[None, :, :]
    m, column = first_sinkhorn_step(logits)
    # The sums of every step go to scratch memory that stays in L2; the matrices are rebuilt from
    # the last one on the way back.
    slot = history_ptr + (t[:, None] * ((STEPS - 1) * 2 * N) + j[None, :])
    for step in tl.range(0, STEPS - 1):
        m, column_sum = normalise(m, 1)
        m, row_sum = normalise(m, 2)
        tl.store(slot + step * (2 * N), column_sum, mask=mask2)
        tl.store(slot + step * (2 * N) + N, row_sum, mask=mask2)
    tl.debug_barrier()
    dm = tl.load(dmix_ptr + t[:, None, None] * M + cell[None, :, :], mask=mask3, other=0.0)
    for back in tl.range(0, STEPS - 1):
        step = STEPS - 2 - back
        column_sum = tl.load(slot + step * (2 * N), mask=mask2, other=1.0)
        row_sum = tl.load(slot + step * (2 * N) + N, mask=mask2, other=1.0)
        dm = (dm - tl.sum(dm * m, axis=2)[:, :, None]) * (1.0 / row_sum)[:, :, None]
        m = m * row_sum[:, :, None]
        dm = (dm - tl.sum(dm * m, axis=1)[:, None, :]) * (1.0 / column_sum)[:, None, :]
        m = m * column_sum[:, None, :]
    dlog = m * (dm - tl.sum(dm * m, axis=2)[:, :, None])
    dlogits = dlog - column * tl.sum(dlog, axis=1)[:, None, :]
    tl.store(dlogits_ptr + t[:, None, None] * M + cell[None, :, :], dlogits, mask=mask3)


@triton.jit
def pre_gradients(
    x_ptr, du_ptr, t, token, N: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of H_pre, du x_i, of BT tokens: a tuple of tiles whose lines are left to sum."""
    cc = tl.arange(0, BC)
    dpre = ()
    for _i in tl.static_range(N):
        dpre = dpre + (tl.zeros((BT, BC // V), tl.float32),)
    for c0 in tl.range(0, C, BC, num_stages=STAGES):
        c = c0 + cc
        mask = token[:, None] & (c < C)[None, :]
        du = tl.load(du_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0)
        du = du.to(tl.float32)
        x = load_rows(x_ptr, t[:, None] * (N * C) + c[None, :], mask, N, C)
        new_dpre = ()
        for i in tl.static_range(N):
            new_dpre = new_dpre + (dpre[i] + fold(du * x[i].to(tl.float32), V),)
        dpre = new_dpre
    return dpre


@triton.jit(do_not_specialize=["T", "sinkhorn_programs"])
def _coefficient_gradients_kernel(
    x_ptr, du_ptr, projection_ptr, dmix_ptr, coefficients_ptr, bias_ptr, alpha_ptr,
    history_ptr, dlogits_ptr, T, sinkhorn_programs,
    N: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
    BS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    pid = tl.program_id(0)
    if pid < sinkhorn_programs:
        _sinkhorn_backward(
            pid, projection_ptr, dmix_ptr, coefficients_ptr, bias_ptr, alpha_ptr, history_ptr,
            dlogits_ptr, T, N, STEPS, BS,
        )  # fmt: skip
    else:
        t = ((pid - sinkhorn_programs) * BT + tl.arange(0, BT)).to(tl.int64)
        token = t < T
        dpre = pre_gradients(x_ptr, du_ptr, t, token, N, C, BT, BC, V, STAGES)
        for i in tl.static_range(N):
            h = tl.load(coefficients_ptr + t * M + i, mask=token, other=0.0)
            d = tl.load(dmix_ptr + t * M + i, mask=token, other=0.0) + tl.sum(dpre[i], axis=1)
            dlogit = d * h * (1.0 - h)
            tl.store(dlogits_ptr + t * M + i, dlogit, mask=token)


@triton.jit(do_not_specialize=["T"])
def _small_kernel(
    projection_ptr, alpha_ptr, dlogits_ptr, dp_ptr, s_ptr, partial_ptr, T,
    N: tl.constexpr, C: tl.constexpr, MP: tl.constexpr, PARTS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Logit gradients to dp and s, and this program's sums for db and dalpha."""
    M: tl.constexpr = N * N + 2 * N
    DT: tl.constexpr = dp_ptr.dtype.element_ty
    pid = tl.program_id(0)
    t = (pid * BS + tl.arange(0, BS)).to(tl.int64)
    token = t < T
    columns = tl.arange(0, MP)
    mask = token[:, None] & (columns < M)[None, :]
    part = tl.where(columns < N, 0, tl.where(columns < 2 * N, 1, 2))
    alpha = tl.load(alpha_ptr + part, mask=columns < M, other=0.0)
    inverse_rms = tl.load(projection_ptr + t * (M + 1) + M, mask=token, other=0.0)
    p = tl.load(projection_ptr + t[:, None] * (M + 1) + columns[None, :], mask=mask, other=0.0)
    dlogits = tl.load(dlogits_ptr + t[:, None] * M + columns[None, :], mask=mask, other=0.0)
    dp = dlogits * alpha[None, :] * inverse_rms[:, None]
    # 1/r depends on x: s = -(sum_j dp_j p_j) / (r^2 nC) multiplies x in dx (eq. 15)
    s = -tl.sum(dp * p, axis=1) * inverse_rms * inverse_rms / (N * C)
    tl.store(s_ptr + t, s, mask=token)
    high, low = split(dp, DT)
    base = dp_ptr + t[:, None] * (PARTS * MP) + columns[None, :]
    tl.store(base, high, mask=token[:, None])
    if PARTS == 2:
        tl.store(base + MP, low, mask=token[:, None])
    row = partial_ptr + pid * (2 * MP) + columns
    tl.store(row, tl.sum(dlogits, axis=0))
    tl.store(row + MP, tl.sum(dlogits * p * inverse_rms[:, None], axis=0))


@triton.jit(do_not_specialize=["programs"])
def _sum_small_kernel(
    partial_ptr, dbias_ptr, dalpha_ptr, programs,
    N: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """db and dalpha from the sums of :func:`_small_kernel`, in a fixed order."""
    M: tl.constexpr = N * N + 2 * N
    columns = tl.arange(0, MP)
    rows = tl.arange(0, BLOCK)
    bias = tl.zeros((BLOCK, MP), tl.float32)
    alpha = tl.zeros((BLOCK, MP), tl.float32)
    for start in tl.range(0, programs, BLOCK):
        mask = ((start + rows) < programs)[:, None] & (columns < M)[None, :]
        base = partial_ptr + (start + rows)[:, None] * (2 * MP) + columns[None, :]
        bias += tl.load(base, mask=mask, other=0.0)
        alpha += tl.load(base + MP, mask=mask, other=0.0)
    tl.store(dbias_ptr + columns, tl.sum(bias, axis=0), mask=columns < M)
    by_column = tl.sum(alpha, axis=0)
    tl.store(dalpha_ptr, tl.sum(tl.where(columns < N, by_column, 0.0)))
    is_post = (columns >= N) & (columns < 2 * N)
    tl.store(dalpha_ptr + 1, tl.sum(tl.where(is_post, by_column, 0.0)))
    is_res = (columns >= 2 * N) & (columns < M)
    tl.store(dalpha_ptr + 2, tl.sum(tl.where(is_res, by_column, 0.0)))


@triton.jit(do_not_specialize=["T", "T_DX", "tiles", "share"])
def _pre_backward_kernel(
    dy_ptr, x_ptr, du_ptr, coefficients_ptr, dp_ptr, s_ptr, phi_ptr, dx_ptr, partial_ptr,
    T, T_DX, tiles, share,
    N: tl.constexpr, C: tl.constexpr, OUTPUTS: tl.constexpr, PHIS: tl.constexpr,
    MP: tl.constexpr, PARTS: tl.constexpr,
    WITH_W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The work is a line of slices of BC channels, each of ``tiles`` tiles of BT tokens; a program
    # takes the next ``share`` tiles of the line, whether or not a slice ends among them, so that
    # every multiprocessor has the same to do for any C and T. phi is loaded once a slice.
    # dp comes as [rounded | remainder] for bf16 (PARTS = 2): dphi takes both, one after the other
    # into the same registers. dx, written in bf16 itself, takes the rounded dp and phi.
    # mHC projects all rows of a token at once: phi is PHIS = n slices and dp one line a token. HC
    # projects each row by itself and all alike: one slice, n lines.
    # dx is written of the first T_DX tokens; dphi is of all T.
    M: tl.constexpr = N * N + 2 * N
    LINES: tl.constexpr = N // PHIS
    DT: tl.constexpr = x_ptr.dtype.element_ty
    slices: tl.constexpr = (C + BC - 1) // BC
    column = tl.arange(0, MP)
    gates = tl.arange(0, N)
    cells = 2 * N + tl.arange(0, N * N)
    begin = tl.program_id(0) * share
    end = min(begin + share, slices * tiles)
    while begin < end:
        piece = begin // tiles
        stop = min(end, (piece + 1) * tiles)
        c = piece * BC + tl.arange(0, BC)
        inside = (column < OUTPUTS)[:, None] & (c < C)[None, :]
        dphi = ()
        phi = ()
        for i in tl.static_range(PHIS):
            phi_ptrs = phi_ptr + column[:, None] * (PHIS * C) + i * C + c[None, :]
            phi = phi + (tl.load(phi_ptrs, mask=inside, other=0.0).to(DT),)
            if WITH_W:
                dphi = dphi + (tl.zeros((BC, MP), tl.float32),)
        for tile in tl.range(begin - piece * tiles, stop - piece * tiles, num_stages=STAGES):
            t = (tile * BT + tl.arange(0, BT)).to(tl.int64)
            token = (t < T)[:, None]
            offsets = t[:, None] * (N * C) + c[None, :]
            of_dx = (t < T_DX)[:, None] & (c < C)[None, :]
            du = tl.load(du_ptr + t[:, None] * C + c[None, :], mask=of_dx, other=0.0)
            if LINES == 1:
                s = (tl.load(s_ptr + t, mask=t < T, other=0.0),)
            else:
                s = columns(tl.load(s_ptr + t[:, None] * N + gates[None, :], mask=token, other=0.0))
            dp = ()
            remainder = ()
            for line in tl.static_range(LINES):
                dp_ptrs = dp_ptr + (t * LINES + line)[:, None] * (PARTS * MP) + column[None, :]
                dp = dp + (tl.load(dp_ptrs, mask=token, other=0.0),)
                if WITH_W and PARTS == 2:
                    remainder = remainder + (tl.load(dp_ptrs + MP, mask=token, other=0.0),)
            dy = load_rows(dy_ptr, offsets, of_dx, N, C)
            x = load_rows(x_ptr, offsets, token & (c < C)[None, :], N, C)
            mix_ptrs = coefficients_ptr + t[:, None] * M
            pre = columns(tl.load(mix_ptrs + gates[None, :], mask=token, other=0.0))
            res = columns(tl.load(mix_ptrs + cells[None, :], mask=token, other=0.0))
            for i in tl.static_range(N):
                if WITH_W:
                    gradient = dot(tl.trans(x[i]), dp[i % LINES], dphi[i % PHIS])
                    if PARTS == 2:
                        gradient = dot(tl.trans(x[i]), remainder[i % LINES], gradient)
                    dphi = replaced(dphi, i % PHIS, gradient)
                dx = dot(dp[i % LINES], phi[i % PHIS], tl.zeros((BT, BC), tl.float32))
                of_norm = s[i % LINES][:, None] * x[i].to(tl.float32)
                dx += of_norm + pre[i][:, None] * du.to(tl.float32)
                for o in tl.static_range(N):
                    dx += res[o * N + i][:, None] * dy[o].to(tl.float32)
                tl.store(dx_ptr + i * C + offsets, dx.to(DT), mask=of_dx)
            if WITH_W:  # those of other rows are done when the first of the next is
                last: tl.constexpr = (N - 1) % PHIS
                dphi = replaced(dphi, last, settled(dphi[last]))
        if WITH_W:
            slot = tl.program_id(0) - piece * tiles // share
            line = column[:, None] * (PHIS * C) + c[None, :]
            base = partial_ptr + slot * (OUTPUTS * PHIS * C) + line
            for i in tl.static_range(PHIS):
                tl.store(base + i * C, tl.trans(dphi[i]), mask=inside)
        begin = stop


@triton.jit(do_not_specialize=["T", "tiles", "share"])
def _weight_kernel(
    x_ptr, dp_ptr, partial_ptr, T, tiles, share,
    K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Shared out as in _pre_backward_kernel; the rows of the state make one width K = n C here.
    part, column = parts_and_columns(MP, PARTS)
    rows = tl.arange(0, MP)
    begin = tl.program_id(0) * share
    end = min(begin + share, (K + BK - 1) // BK * tiles)
    while begin < end:
        piece = begin // tiles
        stop = min(end, (piece + 1) * tiles)
        k = piece * BK + tl.arange(0, BK)
        acc = tl.zeros((BK, PARTS * MP), tl.float32)
        for tile in tl.range(begin - piece * tiles, stop - piece * tiles, num_stages=STAGES):
            t = (tile * BT + tl.arange(0, BT)).to(tl.int64)
            token = (t < T)[:, None]
            inside = token & (k < K)[None, :]
            x = tl.load(x_ptr + t[:, None] * K + k[None, :], mask=inside, other=0.0)
            dp_row = dp_ptr + t[:, None] * (PARTS * MP)
            dp = tl.load(dp_row + (part * MP + column)[None, :], mask=token, other=0.0)
            acc = dot(tl.trans(x), dp, acc)
        slot = tl.program_id(0) - piece * tiles // share
        base = partial_ptr + slot * (M * K) + rows[None, :] * K + k[:, None]
        tl.store(base, sum_parts(acc, PARTS), mask=(rows < M)[None, :] & (k < K)[:, None])
        begin = stop


# -- launchers -----------------------------------------------------------------------------------


def post_backward(
    dy: Tensor, x: Tensor, f: Tensor, coefficients: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of f and of the coefficients H_post and H_res.

    Returns:
        df ``[T, C]``, and dmix ``[T, M]`` fp32 whose first n columns (H_pre) are zero.
    """
    tokens, n, channels = x.shape
    cfg = tuning.config("post_backward", n, channels, x.dtype)
    group = min(n, 8) if n <= 8 else 4
    df, dmix = out or (torch.empty_like(f), torch.empty_like(coefficients))
    _post_backward_kernel[(triton.cdiv(tokens, cfg.BT), n // group)](
        dy, x, f, coefficients, df, dmix, tokens, N=n, C=channels, GROUP=group,
        BT=cfg.BT, BC=cfg.BC, V=cfg.V, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return df, dmix


def coefficient_gradients(
    x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    bias: Tensor, alpha: Tensor, steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Back through pre-apply, Sinkhorn, the sigmoids and the norm: ``(dp, s, dbias, dalpha)``.

    dp is ``[T, parts * MP]`` in the residual's dtype: the gradient of the projection, rounded,
    and for bf16 the remainder beside it. s is ``[T]`` fp32: dx has s x from the norm.
    """
    tokens, n, channels = x.shape
    width = padded_coefficients(n)
    parts = residual_parts(x.dtype)
    cfg = tuning.config("pre_reduce", n, channels, x.dtype)
    dlogits = torch.empty_like(dmix)
    history = x.new_empty((tokens, max(steps - 1, 1), 2 * n), dtype=torch.float32)
    sinkhorn_programs = triton.cdiv(tokens, cfg.BS)
    _coefficient_gradients_kernel[(sinkhorn_programs + triton.cdiv(tokens, cfg.BT),)](
        x, du, projection, dmix, coefficients, bias, alpha, history, dlogits, tokens,
        sinkhorn_programs, N=n, C=channels, STEPS=steps,
        BS=cfg.BS, BT=cfg.BT, BC=cfg.BC, V=cfg.V, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    small = tuning.config("small", n, channels, x.dtype)
    programs = triton.cdiv(tokens, small.BS)
    dp = x.new_empty((tokens, parts * width))
    s = x.new_empty((tokens,), dtype=torch.float32)
    partial = x.new_empty((programs, 2, width), dtype=torch.float32)
    _small_kernel[(programs,)](
        projection, alpha, dlogits, dp, s, partial, tokens, N=n, C=channels, MP=width,
        PARTS=parts, BS=small.BS, num_warps=small.warps,
    )  # fmt: skip
    return dp, s, *sum_small(partial, bias, alpha)


def sum_small(partial: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """``(dbias, dalpha)`` from what programs left: ``[programs, 2, padded_coefficients(n)]``."""
    programs, _, width = partial.shape
    dbias, dalpha = torch.empty_like(bias), torch.empty_like(alpha)
    _sum_small_kernel[(1,)](
        partial, dbias, dalpha, programs, N=expansion_rate(bias.numel()), MP=width,
        BLOCK=max(1, 4096 // width), num_warps=8,
    )  # fmt: skip
    return dbias, dalpha


def pre_backward(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, dp: Tensor, s: Tensor, phi: Tensor,
    with_weight: bool, out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx ``[T, n, C]``, and dphi if asked for, in the same pass over the state where that fits.

    phi is ``[M, n C]`` and dp ``[T, parts * padded(M)]``, or HC's: theta ``[n + 2, C]`` and
    ``[T, n, parts * padded(n + 2)]``. ``out``: memory for dx, which no other argument may lie in.
    """
    tokens, n, channels = x.shape
    given = (dy, x, du, coefficients, dp, s)
    dx = torch.empty_like(x) if out is None else out
    if n >= mhc_wide.LEAST_ROWS:
        mhc_wide.input_gradient(*given, phi, dx)
        return dx, weight_backward(x, dp) if with_weight else None
    # of HC's dphi there is one slice, not n
    if not (with_weight and phi.shape[1] // channels <= FUSED_MOST_SLICES[x.dtype.itemsize]):
        _input_gradient(*given, phi, dx)
        return dx, weight_backward(x, dp) if with_weight else None
    cfg = tuning.config(f"{_family(x, phi)}pre_backward", n, channels, x.dtype)
    shared = shares(triton.cdiv(channels, cfg.BC), tokens, cfg, x.device)
    shape = (shared.slots, *phi.shape)
    lent = _lent_tokens(dx, math.prod(shape), cfg.BT)
    if not lent:
        partial = x.new_empty(shape, dtype=torch.float32)
        _launch_pre_backward(*given, phi, dx, tokens, partial, cfg, shared)
        return dx, sum_partials(partial, shared, channels, cfg.BC)
    first = tokens - lent
    partial = dx[first:].view(-1).view(torch.float32)[: math.prod(shape)].view(shape)
    _launch_pre_backward(*given, phi, dx, first, partial, cfg, shared)
    dphi = sum_partials(partial, shared, channels, cfg.BC)
    _input_gradient(*(tensor[first:] for tensor in given), phi, dx[first:])
    return dx, dphi


def _family(x: Tensor, phi: Tensor) -> str:
    """What HC's tiles are called: its phi is one slice."""
    return "hc_" if phi.shape[1] == x.shape[2] else ""


def _lent_tokens(dx: Tensor, numbers: int, block: int) -> int:
    """Tokens at the end of dx, from a multiple of ``block`` on, whose memory holds fp32 numbers.

    None where the numbers are too few to be worth the second launch that dx then takes, or so many
    that it would have much to do.
    """
    size, (tokens, n, channels) = 4 * numbers, dx.shape
    if size < LEAST_LENT_BYTES or size > dx.nbytes // LEAST_TIMES_LENT:
        return 0
    lent = triton.cdiv(size, n * channels * dx.itemsize)
    return tokens - (tokens - lent) // block * block


def _input_gradient(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, dp: Tensor, s: Tensor, phi: Tensor,
    dx: Tensor,
) -> None:  # fmt: skip
    """Write dx."""
    tokens, n, channels = x.shape
    cfg = tuning.config(f"{_family(x, phi)}pre_backward_input", n, channels, x.dtype)
    shared = shares(triton.cdiv(channels, cfg.BC), tokens, cfg, x.device)
    _launch_pre_backward(
        dy, x, du, coefficients, dp, s, phi, dx, tokens, None, cfg, shared
    )  # fmt: skip


def _launch_pre_backward(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, dp: Tensor, s: Tensor, phi: Tensor,
    dx: Tensor, dx_tokens: int, partial: Tensor | None, cfg: tuning.Config, shared: Shares,
) -> None:  # fmt: skip
    """Write dx of the first ``dx_tokens`` tokens and, into ``partial`` if given, dphi of all."""
    tokens, n, channels = x.shape
    outputs, width = phi.shape
    _pre_backward_kernel[(shared.programs,)](
        dy, x, du, coefficients, dp, s, phi, dx, partial, tokens, dx_tokens, shared.tiles,
        shared.share, N=n, C=channels, OUTPUTS=outputs, PHIS=width // channels, MP=padded(outputs),
        PARTS=residual_parts(x.dtype), WITH_W=partial is not None,
        BT=cfg.BT, BC=cfg.BC, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip


def weight_backward(x: Tensor, dp: Tensor) -> Tensor:
    """dphi = dp^T x fp32: ``[M, n C]``, or HC's ``[n + 2, C]`` if dp has a line for every row."""
    _, n, channels = x.shape
    if dp.ndim == 3:
        cfg = tuning.config("hc_weight", n, channels, x.dtype)
        return _product(x.flatten(0, 1), dp.flatten(0, 1), n + 2, cfg)
    if n >= mhc_wide.LEAST_ROWS:
        return mhc_wide.weight_gradient(x, dp)
    cfg = tuning.config("weight", n, channels, x.dtype)
    return _product(x.flatten(1), dp, num_coefficients(n), cfg)


def _product(x: Tensor, dp: Tensor, outputs: int, cfg: tuning.Config) -> Tensor:
    """dp^T x ``[outputs, K]`` of x ``[R, K]`` and dp ``[R, parts * padded(outputs)]``."""
    rows, width = x.shape
    shared = shares(triton.cdiv(width, cfg.BC), rows, cfg, x.device)
    partial = x.new_empty((shared.slots, outputs, width), dtype=torch.float32)
    _weight_kernel[(shared.programs,)](
        x, dp, partial, rows, shared.tiles, shared.share, K=width, M=outputs,
        MP=padded(outputs), PARTS=residual_parts(x.dtype),
        BT=cfg.BT, BK=cfg.BC, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return sum_partials(partial, shared, width, cfg.BC)
