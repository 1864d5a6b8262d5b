"""Triton kernels of a mixture of experts: routing, permutation and grouped weight gradients.

Same names, arguments and results as :mod:`mhcplan.kernels.layers_eager`, which documents them.
Routing needs no host synchronisation: a block of tokens counts its copies per expert, a second
launch turns the counts of all blocks into rows in expert order. Grouped GEMMs of F and I are
torch's (CUTLASS); the weight gradient is ours, because it must add to fp32 in place.
"""

# ruff: noqa: ANN001, ANN202  (Triton's own parameter convention has no types for tensors)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhcplan.kernels.layers_eager import FORCED_BIAS

_FORCED_BIAS = tl.constexpr(FORCED_BIAS)


@triton.jit
def _expert_scores(logits, token, expert, inside, experts, SOFTMAX: tl.constexpr):
    value = tl.load(logits + token[:, None] * experts + expert[None, :], inside, float("-inf"))
    if SOFTMAX:
        # rows past the last token are all -inf: keep nan out
        top = tl.max(value, 1)
        weight = tl.exp(value - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(weight, 1)
        score = weight / tl.where(total == 0.0, 1.0, total)[:, None]
    else:
        score = tl.sigmoid(value)
    return score


@triton.jit
def _choose(
    logits, weights, chosen, counts, tokens, experts,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, FORCED: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    score = _expert_scores(logits, token, expert, inside, experts, SOFTMAX)
    choice = score
    if FORCED:
        ahead = expert[None, :] - ((token * K) % experts)[:, None]
        turn = tl.where(ahead < 0, ahead + experts, ahead) < K
        choice = score + tl.where(turn, _FORCED_BIAS, 0.0)
    choice = tl.where(inside, choice, float("-inf"))
    taken = tl.zeros([TOKENS, EXPERTS], tl.int32)
    slots = tl.arange(0, KS)
    picked = tl.zeros([TOKENS, KS], tl.float32)
    index = tl.zeros([TOKENS, KS], tl.int32)
    for k in tl.static_range(K):
        best = tl.argmax(choice, 1, tie_break_left=True)
        hit = expert[None, :] == best[:, None]
        value = tl.sum(tl.where(hit, score, 0.0), 1)
        picked = tl.where(slots[None, :] == k, value[:, None], picked)
        index = tl.where(slots[None, :] == k, best[:, None], index)
        taken += hit.to(tl.int32)
        choice = tl.where(hit, float("-inf"), choice)
    if RENORMALISE:
        total = tl.sum(picked, 1)
        picked = picked / tl.where(total == 0.0, 1.0, total)[:, None]
    to = token[:, None] * K + slots[None, :]
    fits = (token < tokens)[:, None] & (slots < K)[None, :]
    tl.store(weights + to, picked, fits)
    tl.store(chosen + to, index, fits)
    count = tl.sum(tl.where(inside, taken, 0), 0)
    tl.store(counts + block * experts + expert, count, expert < experts)


@triton.jit
def _place(
    chosen, counts, slot, ends, tokens, experts, blocks,
    K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, KS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, blocks, STEP):
        other = first + tl.arange(0, STEP)
        mask = (other < blocks)[:, None] & (expert < experts)[None, :]
        count = tl.load(counts + other[:, None] * experts + expert[None, :], mask, 0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((other < block)[:, None], count, 0), 0)
    last = tl.cumsum(total, 0)
    base = last - total + before
    if block == 0:
        tl.store(ends + expert, last, expert < experts)
    token = block * TOKENS + tl.arange(0, TOKENS)
    slots = tl.arange(0, KS)
    at = token[:, None] * K + slots[None, :]
    fits = (token < tokens)[:, None] & (slots < K)[None, :]
    taken = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for k in tl.static_range(K):
        mine = tl.load(chosen + token * K + k, token < tokens, -1)
        taken += (mine[:, None] == expert[None, :]).to(tl.int32)
    rank = tl.cumsum(taken, 0) - taken + base[None, :]
    row = tl.zeros([TOKENS, KS], tl.int32)
    for k in tl.static_range(K):
        mine = tl.load(chosen + token * K + k, token < tokens, -1)
        here = tl.sum(tl.where(mine[:, None] == expert[None, :], rank, 0), 1)
        row = tl.where(slots[None, :] == k, here[:, None], row)
    tl.store(slot + at, row, fits)


def route(
    logits: Tensor, top_k: int, scoring: str, renormalise: bool, forced: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mhcplan.kernels.layers_eager.route`."""
    tokens, experts = logits.shape
    padded = triton.next_power_of_2(experts)
    block, warps = (32, 4 if padded <= 64 else 8) if padded <= 128 else (16, 8)
    blocks = triton.cdiv(tokens, block)
    new = {"dtype": torch.int32, "device": logits.device}
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    chosen, slot = torch.empty((tokens, top_k), **new), torch.empty((tokens, top_k), **new)
    counts, ends = torch.empty((blocks, experts), **new), torch.empty(experts, **new)
    shape = {
        "K": top_k, "TOKENS": block, "EXPERTS": padded,
        "KS": triton.next_power_of_2(top_k), "num_warps": warps,
    }  # fmt: skip
    _choose[(blocks,)](
        logits, weights, chosen, counts, tokens, experts,
        SOFTMAX=scoring == "softmax", RENORMALISE=renormalise, FORCED=forced, **shape,
    )  # fmt: skip
    _place[(blocks,)](chosen, counts, slot, ends, tokens, experts, blocks, STEP=32, **shape)
    return weights, chosen, slot, ends


@triton.jit
def _route_grad(
    dweights, logits, chosen, dlogits, tokens, experts,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    score = _expert_scores(logits, token, expert, inside, experts, SOFTMAX)
    taken = tl.zeros([TOKENS, EXPERTS], tl.float32)
    grad = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for k in tl.static_range(K):
        mine = tl.load(chosen + token * K + k, token < tokens, -1)
        hit = mine[:, None] == expert[None, :]
        d = tl.load(dweights + token * K + k, token < tokens, 0.0)
        taken += tl.where(hit, 1.0, 0.0)
        grad += tl.where(hit, d[:, None], 0.0)
    if RENORMALISE:
        total = tl.sum(score * taken, 1)
        total = tl.where(total == 0.0, 1.0, total)
        mean = tl.sum(grad * score, 1) / total
        grad = (grad - mean[:, None]) * taken / total[:, None]
    if SOFTMAX:
        out = score * (grad - tl.sum(grad * score, 1)[:, None])
    else:
        out = grad * score * (1.0 - score)
    to = dlogits + token[:, None] * experts + expert[None, :]
    tl.store(to, out.to(dlogits.dtype.element_ty), inside)


def route_grad(
    dweights: Tensor, logits: Tensor, expert: Tensor, scoring: str, renormalise: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See :func:`mhcplan.kernels.layers_eager.route_grad`."""
    tokens, experts = logits.shape
    top_k = expert.shape[1]
    dlogits = torch.empty((tokens, experts), dtype=dtype, device=logits.device)
    _route_grad[(triton.cdiv(tokens, 16),)](
        dweights, logits, expert, dlogits, tokens, experts,
        K=top_k, SOFTMAX=scoring == "softmax", RENORMALISE=renormalise, TOKENS=16,
        EXPERTS=triton.next_power_of_2(experts), KS=triton.next_power_of_2(top_k), num_warps=4,
    )  # fmt: skip
    return dlogits


# -- permutation: one program a token and block of columns -----------------------------------------


def _columns(width: int) -> tuple[int, int, int]:
    """(blocks, block, warps): 8 elements a thread."""
    block = min(1024, triton.next_power_of_2(width))
    return triton.cdiv(width, block), block, max(1, block // 256)


@triton.jit
def _permute(x, rows, slot, width, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, inside)
    for k in tl.static_range(K):
        row = tl.load(slot + token * K + k).to(tl.int64)
        tl.store(rows + row * width + column, value, inside)


def permute(x: Tensor, slot: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.permute`."""
    (tokens, width), top_k = x.shape, slot.shape[1]
    rows = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
    blocks, block, warps = _columns(width)
    _permute[(tokens, blocks)](x, rows, slot, width, K=top_k, BLOCK=block, num_warps=warps)
    return rows


@triton.jit
def _sum_copies(
    rows, weights, slot, other, y, width,
    K: tl.constexpr, WEIGHTED: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    if OTHER:
        total += tl.load(other + token * width + column, inside, 0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot + token * K + k).to(tl.int64)
        value = tl.load(rows + row * width + column, inside, 0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + k)
        total += value
    tl.store(y + token * width + column, total.to(y.dtype.element_ty), inside)


def _launch_sum(
    rows: Tensor, weights: Tensor | None, slot: Tensor, other: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (tokens, top_k), width = slot.shape, rows.shape[1]
    y = out
    if y is None:
        y = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)
    blocks, block, warps = _columns(width)
    _sum_copies[(tokens, blocks)](
        rows, rows if weights is None else weights, slot, rows if other is None else other, y,
        width, K=top_k, WEIGHTED=weights is not None, OTHER=other is not None, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return y


def permute_grad(drows: Tensor, slot: Tensor, other: Tensor | None) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.permute_grad`."""
    return _launch_sum(drows, None, slot, other)


def unpermute(
    rows: Tensor, weights: Tensor, slot: Tensor, shared: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.unpermute`."""
    return _launch_sum(rows, weights, slot, shared, out)


@triton.jit
def _unpermute_grad(
    dy, rows, weights, slot, drows, dweights, width, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(dy + token * width + column, inside, 0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot + token * K + k).to(tl.int64)
        weight = tl.load(weights + token * K + k)
        value = tl.load(rows + row * width + column, inside, 0.0).to(tl.float32)
        tl.store(drows + row * width + column, (grad * weight).to(drows.dtype.element_ty), inside)
        tl.store(dweights + token * K + k, tl.sum(grad * value, 0))


def unpermute_grad(
    dy: Tensor, rows: Tensor, weights: Tensor, slot: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`mhcplan.kernels.layers_eager.unpermute_grad`."""
    tokens, width = dy.shape
    drows, dweights = out or (torch.empty_like(rows), torch.empty_like(weights))
    block = triton.next_power_of_2(width)
    _unpermute_grad[(tokens,)](
        dy, rows, weights, slot, drows, dweights, width,
        K=slot.shape[1], BLOCK=block, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return drows, dweights


@triton.jit
def _move_rows(x, index, y, width, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    other = tl.load(index + row).to(tl.int64)
    source, target = (other, row) if GATHER else (row, other)
    tl.store(y + target * width + column, tl.load(x + source * width + column, inside), inside)


def _move(x: Tensor, index: Tensor, gather: bool) -> Tensor:
    y = torch.empty((index.numel(), x.shape[1]), dtype=x.dtype, device=x.device)
    blocks, block, warps = _columns(x.shape[1])
    _move_rows[(index.numel(), blocks)](
        x, index, y, x.shape[1], GATHER=gather, BLOCK=block, num_warps=warps
    )
    return y


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.gather_rows`."""
    return _move(x, index, gather=True)


def scatter_rows(x: Tensor, index: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.scatter_rows`."""
    return _move(x, index, gather=False)


# -- grouped GEMMs ---------------------------------------------------------------------------------


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.grouped_linear`; bf16 on a GPU only."""
    return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)


def grouped_linear_grad(dy: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See :func:`mhcplan.kernels.layers_eager.grouped_linear_grad`; bf16 on a GPU only."""
    return torch._grouped_mm(dy, weight, offs=ends)


@triton.jit
def _grouped_weight_gradient(
    main_grad, dy, x, ends, out_dim, in_dim, tiles_in,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    tile = tl.program_id(0)
    first = tl.load(ends + expert - 1, expert > 0, 0)
    last = tl.load(ends + expert)
    out = (tile // tiles_in) * OUT + tl.arange(0, OUT)
    inner = (tile % tiles_in) * IN + tl.arange(0, IN)
    out_fits, in_fits = out < out_dim, inner < in_dim
    row = tl.arange(0, ROWS)
    # wgmma reads dy transposed from shared memory: load it as it lies and transpose the tile
    dy_at = dy + (first + row).to(tl.int64)[:, None] * out_dim + out[None, :]
    x_at = x + (first + row).to(tl.int64)[:, None] * in_dim + inner[None, :]
    total = tl.zeros([OUT, IN], tl.float32)
    for start in range(first, last, ROWS):
        fits = (start + row < last)[:, None]
        d = tl.load(dy_at, fits & out_fits[None, :], 0.0)
        v = tl.load(x_at, fits & in_fits[None, :], 0.0)
        total = tl.dot(tl.trans(d), v, total)
        dy_at += ROWS * out_dim
        x_at += ROWS * in_dim
    to = main_grad + expert.to(tl.int64) * out_dim * in_dim
    to += out[:, None] * in_dim + inner[None, :]
    mask = out_fits[:, None] & in_fits[None, :]
    tl.store(to, tl.load(to, mask, 0.0) + total, mask)


def add_grouped_weight_gradient(main_grad: Tensor, dy: Tensor, x: Tensor, ends: Tensor) -> None:
    """See :func:`mhcplan.kernels.layers_eager.add_grouped_weight_gradient`."""
    experts, out_dim, in_dim = main_grad.shape
    if out_dim < 128 or in_dim < 128:  # as in tests
        out, inner, warps, stages = 16, 16, 4, 3
    elif x.shape[0] < 1024 * experts:  # few rows an expert: reading and writing the gradient rules
        out, inner, warps, stages = 256, 128, 8, 3
    else:
        out, inner, warps, stages = 128, 256, 8, 4
    rows = 16 if out == 16 else 64
    tiles_out, tiles_in = triton.cdiv(out_dim, out), triton.cdiv(in_dim, inner)
    _grouped_weight_gradient[(tiles_out * tiles_in, experts)](
        main_grad, dy, x, ends, out_dim, in_dim, tiles_in,
        OUT=out, IN=inner, ROWS=rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip
