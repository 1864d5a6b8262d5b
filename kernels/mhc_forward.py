"""Forward kernels of an mHC site, and the launchers that pick their grids.

Three kernels a site, 18C elements moved at n = 4 (the paper's (4n+2)C): ``project``, after a small
launch that splits phi, reads the state once for the projection and the sum of squares (eq. 14-15);
``coefficients_and_pre`` turns those into coefficients (eq. 16-19) and applies H_pre; ``post_res``
mixes the rows. ``post_project`` is the form across two sites, post_res of site l with the
projection of site l + 1: the state is projected while it is written, which saves one read of it,
(3n+2)C = 14C.

T tokens of n rows of C channels; M = n^2 + 2n coefficients; see :mod:`mhcplan.kernels.reference`
for the formulas. Partial sums over channels are written per split and added by their consumer in
ascending order: no atomics, so results repeat bit by bit.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005  (Triton: no types for tensors, no starred tuples)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhcplan.kernels import mhc_wide, tuning
from mhcplan.kernels.mhc_partition import channel_splits
from mhcplan.kernels.reference import num_coefficients
from mhcplan.kernels.triton_support import (
    columns,
    dot,
    fold,
    load_mix,
    load_rows,
    padded,
    padded_coefficients,
    parts_and_columns,
    residual_parts,
    settled,
    split_phi,
    sum_parts,
)

# Token counts and the like are not specialised on: a new batch shape must not compile anything (but
# once coefficients and pre, where tuning.py has other tiles for few tokens).
# A sum that is smaller is not divided by; reference.SINKHORN_TINY, as a constant of the kernels.
_TINY = tl.constexpr(1e-30)


@triton.jit
def normalise(m, axis: tl.constexpr):
    """One half step of Sinkhorn on ``[tokens, o, i]``: the result and the sums it divided by."""
    total = tl.sum(m, axis=axis)
    total = tl.where(total < _TINY, 1.0, total)
    return m * tl.expand_dims(1.0 / total, axis), total


@triton.jit
def first_sinkhorn_step(logits):
    """Column then row normalisation of exp(logits), on logarithms.

    Returns the doubly normalised matrix and the column-normalised one, which backward needs.
    """
    shifted = logits - tl.expand_dims(tl.max(logits, axis=1), 1)
    column = tl.sum(tl.exp(shifted), axis=1)
    log_column = shifted - tl.expand_dims(tl.log(column), 1)
    row_max = tl.max(log_column, axis=2)
    e = tl.exp(log_column - tl.expand_dims(row_max, 2))
    m = e * tl.expand_dims(1.0 / tl.sum(e, axis=2), 2)
    return m, tl.exp(log_column)


@triton.jit(do_not_specialize=["T", "split_steps"])
def _project_kernel(
    x_ptr, phi_ptr, partial_ptr, T, split_steps,
    K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(K % BK == 0, "no mask over channels")
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    piece = tl.program_id(1)
    k_first = piece * split_steps * BK
    part, column = parts_and_columns(MP, PARTS)
    kk = tl.arange(0, BK)
    token = t < T
    x_base = x_ptr + t.to(tl.int64)[:, None] * K + kk[None, :]
    phi_base = phi_ptr + (part * M + column)[:, None] * K + kk[None, :]
    acc = tl.zeros((BT, PARTS * MP), tl.float32)
    square = tl.zeros((BT, BK // 8), tl.float32)
    for k in tl.range(k_first, min(k_first + split_steps * BK, K), BK, num_stages=STAGES):
        x = tl.load(x_base + k, mask=token[:, None], other=0.0)
        phi = tl.load(phi_base + k, mask=(column < M)[:, None], other=0.0)
        acc = settled(dot(x, tl.trans(phi), acc))
        wide = x.to(tl.float32)
        square += fold(wide * wide, 8)
    _write_partial(partial_ptr, piece * T + t, token, sum_parts(acc, PARTS), square, M, MP)


@triton.jit
def _write_partial(ptr, rows, mask, products, square, M: tl.constexpr, MP: tl.constexpr):
    """A split's products and sum of squares of BT tokens; the padding is left unwritten."""
    column = tl.arange(0, MP)[None, :]
    out = tl.where(column == M, tl.sum(square, axis=1)[:, None], products)
    out_ptr = ptr + rows.to(tl.int64)[:, None] * MP + column
    tl.store(out_ptr, out, mask=mask[:, None] & (column <= M))


@triton.jit
def sum_splits(ptr, mask, stride, splits):
    """Sum ``ptr[s * stride]`` over s = 0 .. splits - 1, in that order."""
    # Unrolled, so that loads overlap. A thread's loads of a large tile do so by themselves; for
    # more of them there are no registers, and each would wait for the sum before it.
    at_once: tl.constexpr = max(1, min(4, 4096 // ptr.numel))
    total = tl.load(ptr, mask=mask, other=0.0)
    for s in tl.range(1, splits, loop_unroll_factor=at_once):
        total += tl.load(ptr + s * stride, mask=mask, other=0.0)
    return total


@triton.jit
def _sigmoid(p, inverse_rms, alpha, bias):
    """Eq. 16-17; one function, so that u and the stored H_pre agree bit by bit."""
    return 1.0 / (1.0 + tl.exp(-(p * inverse_rms * alpha + bias)))


@triton.jit
def _write_coefficients(
    pid, partial_ptr, bias_ptr, alpha_ptr, coefficients_ptr, projection_ptr, T, splits, norm_eps,
    N: tl.constexpr, C: tl.constexpr, MP: tl.constexpr, STEPS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Coefficients and projection of BS tokens (eq. 16-19)."""
    M: tl.constexpr = N * N + 2 * N
    t = (pid * BS + tl.arange(0, BS)).to(tl.int64)
    token = t < T
    stride = tl.cast(T, tl.int64) * MP
    row = partial_ptr + t * MP
    square = sum_splits(row + M, token, stride, splits)
    inverse_rms = 1.0 / tl.sqrt(square / (N * C) + norm_eps)
    tl.store(projection_ptr + t * (M + 1) + M, inverse_rms, mask=token)
    j = tl.arange(0, N)
    for part in tl.static_range(2):  # H_pre, H_post
        mask = token[:, None] & (j[None, :] < N)
        p = sum_splits(row[:, None] + (part * N + j)[None, :], mask, stride, splits)
        tl.store(projection_ptr + t[:, None] * (M + 1) + (part * N + j)[None, :], p, mask=mask)
        bias = tl.load(bias_ptr + part * N + j)[None, :]
        h = _sigmoid(p, inverse_rms[:, None], tl.load(alpha_ptr + part), bias) * (1.0 + part)
        tl.store(coefficients_ptr + t[:, None] * M + (part * N + j)[None, :], h, mask=mask)
    cell = 2 * N + j[:, None] * N + j[None, :]  # [o, i]
    mask3 = token[:, None, None] & (cell < M)[None, :, :]
    p3 = sum_splits(row[:, None, None] + cell[None, :, :], mask3, stride, splits)
    tl.store(projection_ptr + t[:, None, None] * (M + 1) + cell[None, :, :], p3, mask=mask3)
    logits3 = p3 * inverse_rms[:, None, None] * tl.load(alpha_ptr + 2)
    logits3 += tl.load(bias_ptr + cell)[None, :, :]
    m, _ = first_sinkhorn_step(logits3)
    for _step in tl.range(1, STEPS):
        m, _c = normalise(m, 1)
        m, _r = normalise(m, 2)
    tl.store(coefficients_ptr + t[:, None, None] * M + cell[None, :, :], m, mask=mask3)


@triton.jit
def mixed_row(x, f, post, res, o: tl.constexpr, N: tl.constexpr):
    """Row o of the next state in fp32; every kernel sums in this order, so all agree bit by bit."""
    y = post[o][:, None] * f
    for i in tl.static_range(N):
        y = tl.fma(res[o * N + i][:, None], x[i].to(tl.float32), y)
    return y


@triton.jit
def weighted_rows(x, pre, N: tl.constexpr):
    """u in fp32, in the one order too; left to itself the compiler chooses what to contract."""
    u = pre[0][:, None] * x[0].to(tl.float32)
    for i in tl.static_range(1, N):
        u = tl.fma(pre[i][:, None], x[i].to(tl.float32), u)
    return u


@triton.jit
def write_input(
    x_ptr, u_ptr, t, token, pre, N: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """u of the tokens t from their H_pre, a tuple of vectors."""
    cc = tl.arange(0, BC)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        mask = token[:, None] & (c + cc < C)[None, :]
        x = load_rows(x_ptr, t[:, None] * (N * C) + (c + cc)[None, :], mask, N, C)
        u = weighted_rows(x, pre, N)
        out = u_ptr + t[:, None] * C + (c + cc)[None, :]
        tl.store(out, u.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "splits", "sinkhorn_programs"])
def _coefficients_pre_kernel(
    x_ptr, partial_ptr, bias_ptr, alpha_ptr, u_ptr, coefficients_ptr, projection_ptr,
    T, splits, sinkhorn_programs, norm_eps,
    N: tl.constexpr, C: tl.constexpr, MP: tl.constexpr, STEPS: tl.constexpr,
    BS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The first programs do the coefficients, whose chain of small sums hides under the streaming
    # of the others; these need only H_pre and work it out themselves.
    M: tl.constexpr = N * N + 2 * N
    pid = tl.program_id(0)
    if pid < sinkhorn_programs:
        _write_coefficients(
            pid, partial_ptr, bias_ptr, alpha_ptr, coefficients_ptr, projection_ptr,
            T, splits, norm_eps, N, C, MP, STEPS, BS,
        )  # fmt: skip
    else:
        t = ((pid - sinkhorn_programs) * BT + tl.arange(0, BT)).to(tl.int64)
        token = t < T
        stride = tl.cast(T, tl.int64) * MP
        square = sum_splits(partial_ptr + t * MP + M, token, stride, splits)
        inverse_rms = 1.0 / tl.sqrt(square / (N * C) + norm_eps)
        alpha = tl.load(alpha_ptr)
        row = partial_ptr + t[:, None] * MP + tl.arange(0, N)[None, :]
        p = columns(sum_splits(row, token[:, None], stride, splits))
        pre = ()
        for i in tl.static_range(N):
            pre = pre + (_sigmoid(p[i], inverse_rms, alpha, tl.load(bias_ptr + i)),)
        write_input(x_ptr, u_ptr, t, token, pre, N, C, BC, STAGES)


@triton.jit(do_not_specialize=["T"])
def _post_kernel(
    x_ptr, f_ptr, coefficients_ptr, y_ptr, T,
    N: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    STEPS_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N * N + 2 * N
    blocks_c: tl.constexpr = (C + BC * STEPS_C - 1) // (BC * STEPS_C)
    pid = tl.program_id(0)
    t = ((pid // blocks_c) * BT + tl.arange(0, BT)).to(tl.int64)
    c_first = (pid % blocks_c) * (BC * STEPS_C)
    token = t < T
    post = load_mix(coefficients_ptr, t, token, N, N, M)
    res = load_mix(coefficients_ptr, t, token, 2 * N, N * N, M)
    cc = tl.arange(0, BC)
    for step in tl.range(0, STEPS_C, num_stages=STAGES):
        c = c_first + step * BC + cc
        mask = token[:, None] & (c < C)[None, :]
        offsets = t[:, None] * (N * C) + c[None, :]
        f = tl.load(f_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = load_rows(x_ptr, offsets, mask, N, C)
        for o in tl.static_range(N):
            y = mixed_row(x, f, post, res, o, N)
            tl.store(y_ptr + o * C + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "split_steps"])
def _post_project_kernel(
    x_ptr, f_ptr, coefficients_ptr, phi_ptr, y_ptr, partial_ptr, T, split_steps,
    N: tl.constexpr, C: tl.constexpr, MP: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(C % BC == 0, "no mask over channels")
    M: tl.constexpr = N * N + 2 * N
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    piece = tl.program_id(1)
    token = t < T
    part, column = parts_and_columns(MP, PARTS)
    cc = tl.arange(0, BC)
    post = load_mix(coefficients_ptr, t, token, N, N, M)
    res = load_mix(coefficients_ptr, t, token, 2 * N, N * N, M)
    acc = ()  # one a row: of products added up one after another, all but the last are done twice
    for _o in tl.static_range(N):
        acc = acc + (tl.zeros((PARTS * MP, BT), tl.float32),)
    square = tl.zeros((BT, BC // 8), tl.float32)
    phi_base = phi_ptr + (part * M + column)[:, None] * (N * C)
    c_first = piece * split_steps * BC
    for c0 in tl.range(c_first, min(c_first + split_steps * BC, C), BC, num_stages=STAGES):
        c = c0 + cc
        offsets = t[:, None] * (N * C) + c[None, :]
        row = t[:, None] * C + c[None, :]
        f = tl.load(f_ptr + row, mask=token[:, None], other=0.0).to(tl.float32)
        x = load_rows(x_ptr, offsets, token[:, None], N, C)
        new_acc = ()
        for o in tl.static_range(N):
            # The projection reads what is stored, so the fused form equals the separate one.
            y = mixed_row(x, f, post, res, o, N).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + o * C + offsets, y, mask=token[:, None])
            phi = tl.load(phi_base + o * C + c[None, :], mask=(column < M)[:, None], other=0.0)
            # phi on the left: y then reaches the tensor cores through shared memory. As the left
            # factor it would be worked out a second time in the layout of their registers.
            new_acc = new_acc + (dot(phi, tl.trans(y), acc[o]),)
            wide = y.to(tl.float32)
            square += fold(wide * wide, 8)
        acc = new_acc
    total = acc[0]
    for o in tl.static_range(1, N):
        total += acc[o]
    products = sum_parts(tl.trans(total), PARTS)
    _write_partial(partial_ptr, piece * T + t, token, products, square, M, MP)


# -- launchers -----------------------------------------------------------------------------------


def project(x: Tensor, phi: Tensor) -> Tensor:
    """Projection and sum of squares of a state, summed per split of the channels (eq. 14-15).

    Args:
        x: state ``[T, n, C]``, bf16 or fp32.
        phi: ``[M, n C]`` fp32.

    Returns:
        ``[splits, T, MP]`` fp32: M products, the sum of squares, padding that is never read.
    """
    _, n, channels = x.shape
    if n >= mhc_wide.LEAST_ROWS:
        return mhc_wide.project(x, phi)
    return project_rows(x.flatten(1), phi, tuning.config("project", n, channels, x.dtype))


def project_rows(x: Tensor, phi: Tensor, cfg: tuning.Config) -> Tensor:
    """:func:`project` of rows ``[R, K]``, each with a sum of squares of its own.

    Args:
        x: rows; 64 divides K.
        phi: ``[M, K]`` fp32.
        cfg: tile; no more of ``BK`` is used than divides K.

    Returns:
        ``[splits, R, padded(M)]`` fp32.
    """
    (rows, width), m = x.shape, phi.shape[0]
    block = math.gcd(cfg.BK, width)
    blocks = triton.cdiv(rows, cfg.BT)
    splits, split_steps = channel_splits(blocks, width, block, x.device, cfg.per_sm, least_steps=4)
    partial = x.new_empty((splits, rows, padded(m)), dtype=torch.float32)
    _project_kernel[(blocks, splits)](
        x, split_phi(phi, x.dtype), partial, rows, split_steps,
        K=width, M=m, MP=padded(m), PARTS=residual_parts(x.dtype),
        BT=cfg.BT, BK=block, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return partial


def coefficients_and_pre(
    x: Tensor, partial: Tensor, bias: Tensor, alpha: Tensor, steps: int, norm_eps: float,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(u, coefficients, projection)`` from the partial sums of :func:`project` (eq. 16-19)."""
    tokens, n, channels = x.shape
    m = num_coefficients(n)
    cfg = tuning.config("pre", n, channels, x.dtype, tokens)
    u, coefficients, projection = out or (
        x.new_empty((tokens, channels)),
        x.new_empty((tokens, m), dtype=torch.float32),
        x.new_empty((tokens, m + 1), dtype=torch.float32),
    )
    sinkhorn_programs = triton.cdiv(tokens, cfg.BS)
    _coefficients_pre_kernel[(sinkhorn_programs + triton.cdiv(tokens, cfg.BT),)](
        x, partial, bias, alpha, u, coefficients, projection,
        tokens, partial.shape[0], sinkhorn_programs, norm_eps,
        N=n, C=channels, MP=partial.shape[2], STEPS=steps,
        BS=cfg.BS, BT=cfg.BT, BC=cfg.BC, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return u, coefficients, projection


def post_res(x: Tensor, f: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """The next state ``[T, n, C]``: H_res x + H_post f (eq. 3)."""
    tokens, n, channels = x.shape
    cfg = tuning.config("post", n, channels, x.dtype)
    y = torch.empty_like(x) if out is None else out
    blocks = triton.cdiv(tokens, cfg.BT) * triton.cdiv(channels, cfg.BC * cfg.steps_c)
    _post_kernel[(blocks,)](
        x, f, coefficients, y, tokens, N=n, C=channels, BT=cfg.BT, BC=cfg.BC,
        STEPS_C=cfg.steps_c, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return y


def post_project(
    x: Tensor, f: Tensor, coefficients: Tensor, phi_next: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`post_res` of one site and :func:`project` of the next in one pass over the state.

    From n = 8 on the projection is so wide that the two run one after the other.
    """
    tokens, n, channels = x.shape
    if n >= mhc_wide.LEAST_ROWS:
        y = post_res(x, f, coefficients)
        return y, project(y, phi_next)
    width = padded_coefficients(n)
    cfg = tuning.config("post_project", n, channels, x.dtype)
    blocks = triton.cdiv(tokens, cfg.BT)
    splits, split_steps = channel_splits(blocks, channels, cfg.BC, x.device, cfg.per_sm)
    y = torch.empty_like(x)
    partial = x.new_empty((splits, tokens, width), dtype=torch.float32)
    _post_project_kernel[(blocks, splits)](
        x, f, coefficients, split_phi(phi_next, x.dtype), y, partial, tokens, split_steps,
        N=n, C=channels, MP=width, PARTS=residual_parts(x.dtype),
        BT=cfg.BT, BC=cfg.BC, STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
    return y, partial
