"""Plain torch versions of the kernels in :mod:`mhcplan.kernels.layers_triton`.

They are the reference that those kernels are tested against and what a CPU runs. Same names, same
arguments, same results; any floating dtype. Sums are taken in float64 for float64 inputs, else in
float32. T = tokens, C = hidden size, k = experts a token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

FORCED_BIAS = 2.0  # scores are below 1; more would cost digits of their order


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- RMSNorm ---------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, C] (rows may be strided), weight [C]: x / rms(x) * weight [T, C] and 1 / rms(x) [T]."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[:, None] * _wide(weight)).to(x.dtype)
    return (y, rstd) if out is None else (out[0].copy_(y), out[1].copy_(rstd))


def rms_norm_again(x: Tensor, weight: Tensor, rstd: Tensor, out: Tensor | None = None) -> Tensor:
    """The first result of :func:`rms_norm`, from its second."""
    y = (_wide(x) * rstd[:, None] * _wide(weight)).to(x.dtype)
    return y if out is None else out.copy_(y)


def rms_norm_grad(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, main_grad: Tensor, dx: Tensor
) -> None:
    """Write the gradient of x into dx [T, C] (rows may be strided); main_grad [C] += its part."""
    xhat = _wide(x) * rstd[:, None]
    g = _wide(dy) * _wide(weight)
    dx.copy_((g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[:, None])
    main_grad += (_wide(dy) * xhat).sum(0)


# -- rows of the residual's state ------------------------------------------------------------------


def expand_rows(h: Tensor, n: int) -> Tensor:
    """h [T, C] copied to n rows: [T, n, C]."""
    return h[:, None].expand(-1, n, -1).contiguous()


def sum_rows(x: Tensor) -> Tensor:
    """x [T, n, C]: the sum of a token's rows [T, C]."""
    return _wide(x).sum(1).to(x.dtype)


# -- SwiGLU ----------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] = (gate | up): silu(gate) * up [T, F]."""
    gate, up = _wide(gate_up).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def swiglu_grad(gate_up: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of gate_up [T, 2F], and silu(gate) * up [T, F] made again."""
    gate, up = _wide(gate_up).chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    da_wide = _wide(da)
    dgate = da_wide * up * (sigmoid + silu * (1 - sigmoid))
    grad = torch.cat([dgate, da_wide * silu], -1).to(gate_up.dtype)
    return grad, (silu * up).to(gate_up.dtype)


# -- rotary embedding ------------------------------------------------------------------------------


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x [T, H, 2h] with halves (a, b): (a cos - sign b sin, b cos + sign a sin)."""
    a, b = _wide(x).chunk(2, -1)
    seq = cos.shape[0]
    repeat = x.shape[0] // seq
    c, s = (t.repeat(repeat, 1)[:, None, :].to(a.dtype) for t in (cos, sin))
    return torch.cat([a * c - sign * b * s, b * c + sign * a * s], -1).to(x.dtype)


def rope_(
    x: Tensor, heads: int, head_dim: int, offset: int, cos: Tensor, sin: Tensor, sign: float
) -> None:
    """Rotate in place dims [offset, offset + 2h) of each of the first ``heads`` heads of x [T, *].

    cos, sin: [seq, h]; row t of x is position t mod seq. sign -1 is the inverse rotation.
    """
    view = x[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    part = view[:, :, offset : offset + 2 * cos.shape[1]]
    part.copy_(_rotate(part, cos, sin, sign))


def mla_key(k_nope: Tensor, k_rope: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """k_nope [T, H nope], shared k_rope [T, rope] (strided rows): keys [T, H, nope + rope]."""
    rotated = _rotate(k_rope[:, None, :], cos, sin, 1.0).expand(-1, heads, -1)
    return torch.cat([k_nope.unflatten(1, (heads, -1)), rotated], -1).contiguous()


def mla_key_grad(dk: Tensor, dk_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dk [T, H, nope + rope]: returns the gradient of k_nope [T, H nope] and writes dk_rope."""
    nope = dk.shape[2] - dk_rope.shape[1]
    total = _wide(dk[:, :, nope:]).sum(1, keepdim=True)
    dk_rope.copy_(_rotate(total, cos, sin, -1.0)[:, 0])
    return dk[:, :, :nope].reshape(dk.shape[0], -1).contiguous()


# -- routing ---------------------------------------------------------------------------------------


def _scores(logits: Tensor, scoring: str) -> Tensor:
    return torch.softmax(logits, -1) if scoring == "softmax" else torch.sigmoid(logits)


def _forced_bias(logits: Tensor, top_k: int) -> Tensor:
    """Above any score on experts t k .. t k + k - 1 (mod E), whose turn token t is."""
    tokens, experts = logits.shape
    token = torch.arange(tokens, device=logits.device)[:, None]
    expert = torch.arange(experts, device=logits.device)[None]
    return ((expert - token * top_k) % experts < top_k) * FORCED_BIAS


def route(
    logits: Tensor, top_k: int, scoring: str, renormalise: bool, forced: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose experts from logits [T, E].

    Returns weights [T, k], expert [T, k] int32, slot [T, k] int32 (the copy's row in expert order,
    tokens ascending within an expert) and ends [E] int32 (running sum of copies an expert).
    """
    scores = _scores(logits, scoring)
    choice = scores + _forced_bias(logits, top_k) if forced else scores
    expert = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, expert)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    flat = expert.reshape(-1)
    order = torch.argsort(flat, stable=True)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(flat.numel(), device=flat.device)
    ends = torch.bincount(flat, minlength=logits.shape[1]).cumsum(0)
    return weights, expert.int(), slot.view_as(expert).int(), ends.int()


def route_grad(
    dweights: Tensor, logits: Tensor, expert: Tensor, scoring: str, renormalise: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gradient of logits [T, E] in ``dtype`` from that of the weights [T, k]."""
    scores = _scores(logits, scoring)
    index = expert.long()
    picked = scores.gather(1, index)
    dpicked = dweights
    if renormalise:
        total = picked.sum(-1, keepdim=True)
        dpicked = (dweights - (dweights * picked / total).sum(-1, keepdim=True)) / total
    dscores = torch.zeros_like(scores).scatter_(1, index, dpicked)
    if scoring == "softmax":
        dlogits = scores * (dscores - (dscores * scores).sum(-1, keepdim=True))
    else:
        dlogits = dscores * scores * (1 - scores)
    return dlogits.to(dtype)


def permute(x: Tensor, slot: Tensor) -> Tensor:
    """Copy token t of x [T, C] to rows slot[t]: [T k, C]."""
    rows = torch.empty(slot.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    rows[slot.reshape(-1).long()] = x.repeat_interleave(slot.shape[1], 0)
    return rows


def permute_grad(drows: Tensor, slot: Tensor, other: Tensor | None) -> Tensor:
    """Sum of the gradients of a token's copies, and of ``other`` [T, C] if given: [T, C]."""
    total = _wide(drows[slot.long()]).sum(1)
    return (total if other is None else total + _wide(other)).to(drows.dtype)


def unpermute(
    rows: Tensor, weights: Tensor, slot: Tensor, shared: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Weighted sum of a token's expert outputs, plus ``shared`` [T, C] if given: [T, C]."""
    total = (_wide(rows[slot.long()]) * weights[..., None]).sum(1)
    y = (total if shared is None else total + _wide(shared)).to(rows.dtype)
    return y if out is None else out.copy_(y)


def unpermute_grad(
    dy: Tensor, rows: Tensor, weights: Tensor, slot: Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of rows [T k, C] and of weights [T, k]."""
    index = slot.long()
    drows = torch.empty_like(rows) if out is None else out[0]
    drows[index.reshape(-1)] = (
        (weights[..., None] * _wide(dy)[:, None]).to(rows.dtype).reshape(-1, rows.shape[1])
    )
    dweights = (_wide(rows[index]) * _wide(dy)[:, None]).sum(-1)
    return drows, dweights if out is None else out[1].copy_(dweights)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row i of the result is x[index[i]]."""
    return x[index.long()]


def scatter_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row index[i] of the result is x[i]; index is a permutation."""
    y = torch.empty_like(x)
    y[index.long()] = x
    return y


# -- grouped GEMM: rows of expert e are [ends[e-1], ends[e]) ---------------------------------------


def _groups(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(a, b) for a, b in pairwise(bounds)]


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [R, in], weight [E, out, in]: [R, out], expert by expert."""
    y = torch.zeros(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    for e, rows in enumerate(_groups(ends)):
        y[rows] = x[rows] @ weight[e].t()
    return y


def grouped_linear_grad(dy: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Gradient of x [R, in] from dy [R, out]."""
    dx = torch.zeros(dy.shape[0], weight.shape[2], dtype=dy.dtype, device=dy.device)
    for e, rows in enumerate(_groups(ends)):
        dx[rows] = dy[rows] @ weight[e]
    return dx


def add_grouped_weight_gradient(main_grad: Tensor, dy: Tensor, x: Tensor, ends: Tensor) -> None:
    """main_grad [E, out, in] += dy^T x of each expert's rows."""
    for e, rows in enumerate(_groups(ends)):
        main_grad[e] += dy[rows].t().to(main_grad.dtype) @ x[rows].to(main_grad.dtype)


# -- embedding, loss, optimizer --------------------------------------------------------------------


def add_embedding_gradient(main_grad: Tensor, dy: Tensor, ids: Tensor) -> None:
    """main_grad [vocab, C] row ids[t] += dy[t]."""
    main_grad.index_add_(0, ids, dy.to(main_grad.dtype))


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Loss of each token [T]; logits [T, V] become scale x its gradient, in place."""
    wide = _wide(logits)
    lse = torch.logsumexp(wide, -1)
    loss = lse - wide.gather(1, targets[:, None])[:, 0]
    grad = torch.exp(wide - lse[:, None])
    grad[torch.arange(len(targets), device=targets.device), targets] -= 1
    logits.copy_(grad * scale)
    return loss


def adamw_(
    weight: Tensor, master: Tensor, grad: Tensor, first: Tensor, second: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    """One AdamW step (decoupled decay, bias-corrected) on flat tensors, in place."""
    first.lerp_(grad, 1 - beta1)
    second.lerp_(grad.square(), 1 - beta2)
    mean = first / (1 - beta1**step)
    root = (second / (1 - beta2**step)).sqrt()
    master.mul_(1 - lr * decay).sub_(lr * mean / (root + eps))
    weight.copy_(master)
