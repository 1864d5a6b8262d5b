"""HC's own two kernels: coefficients with pre-apply, and the gradients of the coefficients.

The rest of an HC site runs mHC's kernels. post_res and its backward do not ask where H_res comes
from; the projection is that of n T rows of C channels by theta, and dtheta its transpose; dx and,
up to n = 4, dtheta in the same pass over the state come from ``mhc_backward.pre_backward``, which
takes theta for phi. So a site moves what mHC's moves: (4n+2)C forward, (6n+4)C backward.

T tokens of n rows of C channels. Row i of a token is projected to K = n + 2 numbers; number k of
row i is coefficient k n + i of the M = n K; see :mod:`mhcplan.kernels.reference`. No atomics, and
sums in a fixed order: results repeat bit by bit.
"""

# ruff: noqa: ANN001, ANN202  (Triton: no types for tensors)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhcplan.kernels import mhc_forward, tuning
from mhcplan.kernels.mhc_backward import pre_gradients, sum_small
from mhcplan.kernels.mhc_forward import sum_splits, write_input
from mhcplan.kernels.mhc_partition import num_multiprocessors
from mhcplan.kernels.reference import num_coefficients
from mhcplan.kernels.triton_support import (
    columns,
    padded,
    padded_coefficients,
    residual_parts,
    split,
)


@triton.jit
def _tanh(z):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * z))


@triton.jit
def _gates(alpha_ptr, k, N: tl.constexpr):
    """alpha of number k of a row: pre, post, then res; 0 of the padding."""
    return tl.load(alpha_ptr + tl.minimum(k, 2), mask=k < N + 2, other=0.0)


@triton.jit(do_not_specialize=["T", "splits"])
def _hc_pre_kernel(
    x_ptr, partial_ptr, bias_ptr, alpha_ptr, u_ptr, coefficients_ptr, projection_ptr,
    T, splits, norm_eps,
    N: tl.constexpr, C: tl.constexpr, MP: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Coefficients are a few hundred operations a token: each program makes those of its tokens.
    K: tl.constexpr = N + 2
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    token = t < T
    i = tl.arange(0, N)[None, :, None]
    k = tl.arange(0, MP)[None, None, :]
    rows = t[:, None] * N + tl.arange(0, N)[None, :]
    stride = tl.cast(T, tl.int64) * (N * MP)
    mask = token[:, None, None] & (i >= 0) & (k < K)
    square = sum_splits(partial_ptr + rows * MP + K, token[:, None], stride, splits)
    inverse_rms = 1.0 / tl.sqrt(square / C + norm_eps)
    p = sum_splits(partial_ptr + rows[:, :, None] * MP + k, mask, stride, splits)
    tl.store(projection_ptr + rows * (K + 1) + K, inverse_rms, mask=token[:, None])
    tl.store(projection_ptr + rows[:, :, None] * (K + 1) + k, p, mask=mask)
    bias = tl.load(bias_ptr + k * N + i, mask=k < K, other=0.0)
    h = _gates(alpha_ptr, k, N) * _tanh(p * inverse_rms[:, :, None]) + bias
    tl.store(coefficients_ptr + t[:, None, None] * (N * K) + k * N + i, h, mask=mask)
    pre = columns(tl.sum(tl.where(k == 0, h, 0.0), axis=2))  # the very numbers that are stored
    write_input(x_ptr, u_ptr, t, token, pre, N, C, BC, STAGES)


@triton.jit(do_not_specialize=["T", "share"])
def _hc_coefficient_gradients_kernel(
    x_ptr, du_ptr, projection_ptr, dmix_ptr, alpha_ptr, dp_ptr, s_ptr, partial_ptr, T, share,
    N: tl.constexpr, C: tl.constexpr, MP: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # A program takes ``share`` tiles of BT tokens, so that few leave sums for db and dalpha.
    K: tl.constexpr = N + 2
    DT: tl.constexpr = dp_ptr.dtype.element_ty
    rows_of_token = tl.arange(0, N)[None, :]
    i = tl.arange(0, N)[None, :, None]
    k = tl.arange(0, MP)[None, None, :]
    gates = _gates(alpha_ptr, k, N)
    dbias = tl.zeros((N, MP), tl.float32)
    dgates = tl.zeros((N, MP), tl.float32)
    begin = tl.program_id(0) * share
    for tile in tl.range(begin, begin + share):
        t = (tile * BT + tl.arange(0, BT)).to(tl.int64)
        token = t < T
        sums = pre_gradients(x_ptr, du_ptr, t, token, N, C, BT, BC, V, STAGES)
        dpre = tl.zeros((BT, N), tl.float32)
        for row in tl.static_range(N):
            total = tl.sum(sums[row], axis=1)[:, None]
            dpre = tl.where(rows_of_token == row, total, dpre)
        rows = t[:, None] * N + rows_of_token
        mask = token[:, None, None] & (i >= 0) & (k < K)
        line = projection_ptr + rows * (K + 1)
        inverse_rms = tl.load(line + K, mask=token[:, None], other=0.0)
        z = tl.load(line[:, :, None] + k, mask=mask, other=0.0) * inverse_rms[:, :, None]
        h = _tanh(z)
        given = dmix_ptr + t[:, None, None] * (N * K) + k * N + i
        dh = tl.load(given, mask=mask, other=0.0) + tl.where(k == 0, dpre[:, :, None], 0.0)
        dbias += tl.sum(dh, axis=0)
        dgates += tl.sum(dh * h, axis=0)
        dz = dh * gates * (1.0 - h * h)
        # 1/r depends on x: s = -(sum_k dz_k z_k) / (r^2 C) multiplies the row in dx
        s = -tl.sum(dz * z, axis=2) * inverse_rms * inverse_rms / C
        tl.store(s_ptr + rows, s, mask=token[:, None])
        high, low = split(dz * inverse_rms[:, :, None], DT)
        to = dp_ptr + rows[:, :, None] * (PARTS * MP) + k
        lines = token[:, None, None] & (i >= 0) & (k >= 0)
        tl.store(to, high, mask=lines)
        if PARTS == 2:
            tl.store(to + MP, low, mask=lines)
    at = tl.arange(0, MP)[None, :] * N + tl.arange(0, N)[:, None]
    inside = tl.arange(0, MP)[None, :] < K
    sums_ptr = partial_ptr + tl.program_id(0) * (2 * WIDTH) + at
    tl.store(sums_ptr, dbias, mask=inside)
    tl.store(sums_ptr + WIDTH, dgates, mask=inside)


# -- launchers -----------------------------------------------------------------------------------


def project(x: Tensor, theta: Tensor) -> Tensor:
    """Projection and sum of squares of every row: ``[splits, n T, padded(n + 2)]`` fp32."""
    _, n, channels = x.shape
    cfg = tuning.config("hc_project", n, channels, x.dtype)
    return mhc_forward.project_rows(x.flatten(0, 1), theta, cfg)


def coefficients_and_pre(
    x: Tensor, partial: Tensor, bias: Tensor, alpha: Tensor, norm_eps: float,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(u, coefficients, projection)`` from the partial sums of :func:`project` (eq. 5)."""
    tokens, n, channels = x.shape
    cfg = tuning.config("hc_pre", n, channels, x.dtype)
    u, coefficients, projection = out or (
        x.new_empty((tokens, channels)),
        x.new_empty((tokens, num_coefficients(n)), dtype=torch.float32),
        x.new_empty((tokens, n, n + 3), dtype=torch.float32),
    )
    _hc_pre_kernel[(triton.cdiv(tokens, cfg.BT),)](
        x, partial, bias, alpha, u, coefficients, projection, tokens, partial.shape[0], norm_eps,
        N=n, C=channels, MP=partial.shape[2], BT=cfg.BT, BC=cfg.BC, STAGES=cfg.stages,
        num_warps=cfg.warps,
    )  # fmt: skip
    return u, coefficients, projection


def coefficient_gradients(
    x: Tensor, du: Tensor, projection: Tensor, dmix: Tensor, bias: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through pre-apply, tanh and the norms: ``(dp, s, dbias, dalpha)``.

    dp is ``[T, n, parts * padded(n + 2)]`` in the residual's dtype: the gradient of the
    projection, rounded, and for bf16 the remainder beside it. s is ``[T, n]`` fp32: dx of a row
    has s times the row from its norm.
    """
    tokens, n, channels = x.shape
    width, parts = padded(n + 2), residual_parts(x.dtype)
    cfg = tuning.config("hc_reduce", n, channels, x.dtype)
    tiles = triton.cdiv(tokens, cfg.BT)
    share = triton.cdiv(tiles, num_multiprocessors(x.device) * cfg.per_sm)
    programs = triton.cdiv(tiles, max(share, 1))
    dp = x.new_empty((tokens, n, parts * width))
    s = x.new_empty((tokens, n), dtype=torch.float32)
    partial = x.new_empty((programs, 2, padded_coefficients(n)), dtype=torch.float32)
    _hc_coefficient_gradients_kernel[(programs,)](
        x, du, projection, dmix, alpha, dp, s, partial, tokens, share,
        N=n, C=channels, MP=width, WIDTH=partial.shape[2], PARTS=parts,
        BT=cfg.BT, BC=cfg.BC, V=cfg.V, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return dp, s, *sum_small(partial, bias, alpha)
