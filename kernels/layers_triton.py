"""Triton kernels of the pointwise, norm, rotary, loss and optimizer parts of a block.

Same names, arguments and results as :mod:`mhcplan.kernels.layers_eager`, which documents them.
bf16 or fp32 tensors, sums in fp32. Everything is deterministic but the embedding's gradient (its
rows are added with atomics). Blocks are chosen by width; there is no autotuning, so that the first
step costs no more than compiling.
"""

# ruff: noqa: ANN001, ANN202  (Triton's own parameter convention has no types for tensors)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhcplan.kernels.layers_triton_moe import (
    add_grouped_weight_gradient,
    gather_rows,
    grouped_linear,
    grouped_linear_grad,
    permute,
    permute_grad,
    route,
    route_grad,
    scatter_rows,
    unpermute,
    unpermute_grad,
)

__all__ = [
    "adamw_",
    "add_embedding_gradient",
    "add_grouped_weight_gradient",
    "cross_entropy_",
    "expand_rows",
    "gather_rows",
    "grouped_linear",
    "grouped_linear_grad",
    "mla_key",
    "mla_key_grad",
    "permute",
    "permute_grad",
    "rms_norm",
    "rms_norm_again",
    "rms_norm_grad",
    "rope_",
    "route",
    "route_grad",
    "scatter_rows",
    "sum_rows",
    "swiglu",
    "swiglu_grad",
    "unpermute",
    "unpermute_grad",
]

# CTAs that share the reduction of a norm's weight gradient: three on each SM of an H100
_NORM_PROGRAMS = 396


def _row_block(width: int) -> tuple[int, int]:
    """(block, warps) of a program that holds a whole row: about 16 elements a thread."""
    block = triton.next_power_of_2(width)
    return block, max(1, min(16, block // 512))


# -- RMSNorm ---------------------------------------------------------------------------------------


@triton.jit
def _rms_norm(
    x, weight, y, rstd, x_stride, width, eps, AGAIN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    if AGAIN:
        scale = tl.load(rstd + row)
    else:
        scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        tl.store(rstd + row, scale)
    gain = tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(y + row * width + column, (value * scale * gain).to(y.dtype.element_ty), inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`mhcplan.kernels.layers_eager.rms_norm`."""
    rows, width = x.shape
    y, rstd = out or (
        torch.empty((rows, width), dtype=x.dtype, device=x.device),
        torch.empty(rows, dtype=torch.float32, device=x.device),
    )
    block, warps = _row_block(width)
    _rms_norm[(rows,)](
        x, weight, y, rstd, x.stride(0), width, eps, AGAIN=False, BLOCK=block, num_warps=warps
    )
    return y, rstd


def rms_norm_again(x: Tensor, weight: Tensor, rstd: Tensor, out: Tensor | None = None) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.rms_norm_again`."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device) if out is None else out
    block, warps = _row_block(width)
    _rms_norm[(rows,)](
        x, weight, y, rstd, x.stride(0), width, 0.0, AGAIN=True, BLOCK=block, num_warps=warps
    )
    return y


@triton.jit
def _rms_norm_grad(
    dy, x, weight, rstd, dx, partial, rows, x_stride, dx_stride, width, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(weight + column, inside, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=3):
        grad = tl.load(dy + row * width + column, inside, 0.0).to(tl.float32)
        value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        xhat = value * scale
        total += grad * xhat
        g = grad * gain
        mean = tl.sum(g * xhat, 0) / width
        out = (g - xhat * mean) * scale
        tl.store(dx + row * dx_stride + column, out.to(dx.dtype.element_ty), inside)
    tl.store(partial + program * width + column, total, inside)


@triton.jit
def _add_column_sums(partial, main_grad, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partial + row[:, None] * width + column[None, :], mask, 0.0), 0)
    old = tl.load(main_grad + column, inside, 0.0)
    tl.store(main_grad + column, old + total, inside)


def rms_norm_grad(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, main_grad: Tensor, dx: Tensor
) -> None:
    """See :func:`mhcplan.kernels.layers_eager.rms_norm_grad`."""
    rows, width = x.shape
    programs = min(rows, _NORM_PROGRAMS)
    partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    block, warps = _row_block(width)
    _rms_norm_grad[(programs,)](
        dy, x, weight, rstd, dx, partial, rows, x.stride(0), dx.stride(0), width,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    _add_column_sums[(triton.cdiv(width, 32),)](
        partial, main_grad, programs, width, ROWS=64, BLOCK=32, num_warps=4
    )


# -- rows of the residual's state ------------------------------------------------------------------


@triton.jit
def _expand_rows(h, x, width, N: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(h + token * width + column, inside)
    for i in tl.static_range(N):
        tl.store(x + (token * N + i) * width + column, value, inside)


@triton.jit
def _sum_rows(x, h, width, N: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(N):
        total += tl.load(x + (token * N + i) * width + column, inside, 0.0).to(tl.float32)
    tl.store(h + token * width + column, total.to(h.dtype.element_ty), inside)


def expand_rows(h: Tensor, n: int) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.expand_rows`."""
    tokens, width = h.shape
    x = torch.empty((tokens, n, width), dtype=h.dtype, device=h.device)
    block = min(1024, triton.next_power_of_2(width))
    _expand_rows[(tokens, triton.cdiv(width, block))](h, x, width, N=n, BLOCK=block, num_warps=4)
    return x


def sum_rows(x: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.sum_rows`."""
    tokens, n, width = x.shape
    h = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(width))
    _sum_rows[(tokens, triton.cdiv(width, block))](x, h, width, N=n, BLOCK=block, num_warps=4)
    return h


# -- SwiGLU ----------------------------------------------------------------------------------------


@triton.jit
def _swiglu(gate_up, a, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(a + row * width + column, out.to(a.dtype.element_ty), inside)


@triton.jit
def _swiglu_grad(gate_up, da, grad, a, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wide_row = row * 2 * width + column
    gate = tl.load(gate_up + wide_row, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + wide_row + width, inside, 0.0).to(tl.float32)
    d = tl.load(da + row * width + column, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = d * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(grad + wide_row, dgate.to(grad.dtype.element_ty), inside)
    tl.store(grad + wide_row + width, (d * silu).to(grad.dtype.element_ty), inside)
    tl.store(a + row * width + column, (silu * up).to(a.dtype.element_ty), inside)


def _swiglu_grid(rows: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(1024, triton.next_power_of_2(width))
    return (rows, triton.cdiv(width, block)), block


def swiglu(gate_up: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.swiglu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    a = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    grid, block = _swiglu_grid(rows, width)
    _swiglu[grid](gate_up, a, width, BLOCK=block, num_warps=4)
    return a


def swiglu_grad(gate_up: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`mhcplan.kernels.layers_eager.swiglu_grad`."""
    grad, a = torch.empty_like(gate_up), torch.empty_like(da)
    grid, block = _swiglu_grid(*da.shape)
    _swiglu_grad[grid](gate_up, da, grad, a, da.shape[1], BLOCK=block, num_warps=4)
    return grad, a


# -- rotary embedding ------------------------------------------------------------------------------


@triton.jit
def _rope(
    x, cos, sin, sign, seq, heads, row_stride, head_dim, offset,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = row % seq
    h = tl.arange(0, HALF)
    c = tl.load(cos + position * HALF + h)[None, :]
    s = tl.load(sin + position * HALF + h)[None, :] * sign
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (head < heads)[:, None]
    at = x + row * row_stride + head[:, None] * head_dim + offset + h[None, :]
    a = tl.load(at, inside, 0.0).to(tl.float32)
    b = tl.load(at + HALF, inside, 0.0).to(tl.float32)
    tl.store(at, (a * c - b * s).to(x.dtype.element_ty), inside)
    tl.store(at + HALF, (b * c + a * s).to(x.dtype.element_ty), inside)


def rope_(
    x: Tensor, heads: int, head_dim: int, offset: int, cos: Tensor, sin: Tensor, sign: float
) -> None:
    """See :func:`mhcplan.kernels.layers_eager.rope_`."""
    seq, half = cos.shape
    block = min(32, triton.next_power_of_2(heads))
    _rope[(x.shape[0], triton.cdiv(heads, block))](
        x, cos, sin, sign, seq, heads, x.stride(0), head_dim, offset,
        HALF=half, HEADS=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _mla_key(
    k_nope, k_rope, k, cos, sin, seq, heads, nope, rope_stride,
    HALF: tl.constexpr, NOPE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HALF)
    position = row % seq
    c = tl.load(cos + position * HALF + h)
    s = tl.load(sin + position * HALF + h)
    a = tl.load(k_rope + row * rope_stride + h).to(tl.float32)
    b = tl.load(k_rope + row * rope_stride + HALF + h).to(tl.float32)
    low = (a * c - b * s).to(k.dtype.element_ty)[None, :]
    high = (b * c + a * s).to(k.dtype.element_ty)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (head < heads)[:, None]
    n = tl.arange(0, NOPE)
    full = inside & (n < nope)[None, :]
    qk = nope + 2 * HALF
    value = tl.load(k_nope + row * heads * nope + head[:, None] * nope + n[None, :], full, 0.0)
    to = k + row * heads * qk + head[:, None] * qk
    tl.store(to + n[None, :], value, full)
    rope_at = to + nope + h[None, :]
    rope_inside = inside & (h >= 0)[None, :]
    tl.store(rope_at, tl.broadcast_to(low, [HEADS, HALF]), rope_inside)
    tl.store(rope_at + HALF, tl.broadcast_to(high, [HEADS, HALF]), rope_inside)


def mla_key(k_nope: Tensor, k_rope: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.mla_key`."""
    rows, nope = k_nope.shape[0], k_nope.shape[1] // heads
    seq, half = cos.shape
    k = torch.empty((rows, heads, nope + 2 * half), dtype=k_nope.dtype, device=k_nope.device)
    block = min(16, triton.next_power_of_2(heads))
    _mla_key[(rows, triton.cdiv(heads, block))](
        k_nope, k_rope, k, cos, sin, seq, heads, nope, k_rope.stride(0),
        HALF=half, NOPE=triton.next_power_of_2(nope), HEADS=block, num_warps=4,
    )  # fmt: skip
    return k


@triton.jit
def _mla_key_grad(
    dk, dk_nope, dk_rope, cos, sin, seq, heads, nope, rope_stride,
    HALF: tl.constexpr, NOPE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HALF)
    n = tl.arange(0, NOPE)
    qk = nope + 2 * HALF
    a = tl.zeros([HALF], tl.float32)
    b = tl.zeros([HALF], tl.float32)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        inside = (head < heads)[:, None]
        full = inside & (n < nope)[None, :]
        at = dk + row * heads * qk + head[:, None] * qk
        value = tl.load(at + n[None, :], full, 0.0)
        tl.store(dk_nope + row * heads * nope + head[:, None] * nope + n[None, :], value, full)
        rope_at = at + nope + h[None, :]
        a += tl.sum(tl.load(rope_at, inside, 0.0).to(tl.float32), 0)
        b += tl.sum(tl.load(rope_at + HALF, inside, 0.0).to(tl.float32), 0)
    position = row % seq
    c = tl.load(cos + position * HALF + h)
    s = tl.load(sin + position * HALF + h)
    to = dk_rope + row * rope_stride + h
    tl.store(to, (a * c + b * s).to(dk_rope.dtype.element_ty))
    tl.store(to + HALF, (b * c - a * s).to(dk_rope.dtype.element_ty))


def mla_key_grad(dk: Tensor, dk_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.mla_key_grad`."""
    rows, heads, qk = dk.shape
    seq, half = cos.shape
    nope = qk - 2 * half
    dk_nope = torch.empty((rows, heads * nope), dtype=dk.dtype, device=dk.device)
    block = min(16, triton.next_power_of_2(heads))
    _mla_key_grad[(rows,)](
        dk, dk_nope, dk_rope, cos, sin, seq, heads, nope, dk_rope.stride(0),
        HALF=half, NOPE=triton.next_power_of_2(nope), HEADS=block, num_warps=4,
    )  # fmt: skip
    return dk_nope


# -- embedding, loss, optimizer --------------------------------------------------------------------


@triton.jit
def _add_embedding(main_grad, dy, ids, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(dy + row * width + column, inside, 0.0).to(tl.float32)
    token = tl.load(ids + row)
    tl.atomic_add(main_grad + token * width + column, value, inside, sem="relaxed")


def add_embedding_gradient(main_grad: Tensor, dy: Tensor, ids: Tensor) -> None:
    """See :func:`mhcplan.kernels.layers_eager.add_embedding_gradient`."""
    block, warps = _row_block(dy.shape[1])
    _add_embedding[(dy.shape[0],)](main_grad, dy, ids, dy.shape[1], BLOCK=block, num_warps=warps)


@triton.jit
def _cross_entropy(logits, targets, loss, scale, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * vocab
    column = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab, BLOCK):
        inside = first + column < vocab
        value = tl.load(
            at + first + column, inside, float("-inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        higher = tl.maximum(high, value)
        # a lane that has seen nothing yet holds -inf: keep exp(-inf + inf) out
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(high - shift) + tl.exp(value - shift)
        high = higher
    top = tl.max(high, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(high - top), 0))
    target = tl.load(targets + row)
    tl.store(loss + row, lse - tl.load(at + target).to(tl.float32))
    tl.debug_barrier()  # every warp has read the target's logit before any of them overwrites it
    for first in range(0, vocab, BLOCK):
        inside = first + column < vocab
        value = tl.load(
            at + first + column, inside, float("-inf"), eviction_policy="evict_first"
        ).to(tl.float32)
        grad = tl.exp(value - lse) - tl.where(first + column == target, 1.0, 0.0)
        tl.store(at + first + column, (grad * scale).to(logits.dtype.element_ty), inside)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.cross_entropy_`."""
    rows, vocab = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    # few rows at a time: what the first pass read should still be in the cache for the second
    block = min(16384, triton.next_power_of_2(vocab))
    _cross_entropy[(rows,)](
        logits, targets, loss, scale, vocab, BLOCK=block, num_warps=max(1, block // 1024)
    )
    return loss


@triton.jit
def _adamw(
    weight, master, grad, first, second, size, lr, beta1, beta2, eps, decay, fix1, fix2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, inside, 0.0)
    m = tl.load(first + at, inside, 0.0)
    v = tl.load(second + at, inside, 0.0)
    p = tl.load(master + at, inside, 0.0)
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    p = p * (1.0 - lr * decay) - lr * (m * fix1) / (tl.sqrt(v * fix2) + eps)
    tl.store(first + at, m, inside)
    tl.store(second + at, v, inside)
    tl.store(master + at, p, inside)
    tl.store(weight + at, p.to(weight.dtype.element_ty), inside)


def adamw_(
    weight: Tensor, master: Tensor, grad: Tensor, first: Tensor, second: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    """See :func:`mhcplan.kernels.layers_eager.adamw_`."""
    size, block = weight.numel(), 1024
    _adamw[(triton.cdiv(size, block),)](
        weight, master, grad, first, second, size, lr, beta1, beta2, eps, decay,
        1 / (1 - beta1**step), 1 / (1 - beta2**step), BLOCK=block, num_warps=4,
    )  # fmt: skip
