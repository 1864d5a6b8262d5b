"""Attention sublayers as ops: MLA (DeepSeek-V2/V3) and GQA, with a pinned attention kernel.

Projections are plain GEMMs; the scores run in one of three named backends:

- ``cudnn``: cuDNN's fused attention; takes q, k of 192 and v of 128 as they are;
- ``flash``: the flash-attention 2 kernels that torch carries; head dims must be equal, so v (and
  the output's gradient) is padded with zeros to q's head dim, and the padding is paid for;
- ``math``: explicit causal softmax in plain torch, for CPUs and tests (any floating dtype).

T = tokens of a microbatch = sequences x seq, in sequence-major order; H heads; C hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from mhcplan.kernels.layers_base import (
    Env,
    Gradients,
    Op,
    Tensors,
    Weight,
    add_weight_gradient,
    fused,
    linear,
    wide,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

NORM_EPS = 1e-20  # the mHC paper's, table 5
ROPE_THETA = 10_000.0
DEFAULT_BACKEND = "cudnn"
_ATEN = torch.ops.aten


def rope_tables(seq: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [seq, dim / 2] in fp32 of the angles position x theta^(-2 i / dim)."""
    power = torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim
    angle = torch.outer(torch.arange(seq, device=device, dtype=torch.float64), ROPE_THETA**-power)
    return angle.cos().float(), angle.sin().float()


# -- scores: q [B, S, H, D], k [B, S, G, D], v [B, S, G, V], causal --------------------------------


def _math_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal scores [B, H, S, S] in the wide dtype; k has as many heads as q."""
    dtype = wide(q.dtype)
    scores = torch.einsum("bshd,bthd->bhst", q.to(dtype), k.to(dtype)) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf"))


def _math_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensors]:
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = _math_scores(q, k, scale)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None])
    out = torch.einsum("bhst,bthv->bshv", weights, v.to(weights.dtype))
    return out.to(q.dtype).contiguous(), (lse,)


def _math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensors, scale: float
) -> Tensors:
    group = q.shape[2] // k.shape[2]
    every_k, every_v = (t.repeat_interleave(group, 2).to(stats[0].dtype) for t in (k, v))
    weights = torch.exp(_math_scores(q, every_k, scale) - stats[0][..., None])
    dout = dout.to(weights.dtype)
    dweights = torch.einsum("bshv,bthv->bhst", dout, every_v)
    delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
    dscores = weights * (dweights - delta) * scale
    dq = torch.einsum("bhst,bthd->bshd", dscores, every_k)
    dk = torch.einsum("bhst,bshd->bthd", dscores, q.to(dscores.dtype))
    dv = torch.einsum("bhst,bshv->bthv", weights, dout)
    dk, dv = (t.unflatten(2, (-1, group)).sum(3) for t in (dk, dv))
    return tuple(t.to(q.dtype).contiguous() for t in (dq, dk, dv))


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensors]:
    out = _ATEN._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, True,
        scale=scale,
    )  # fmt: skip
    # the seed and offset of a dropout that is off: kept only because the backward asks for them
    return out[0].transpose(1, 2), (out[1], out[6], out[7])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensors, scale: float
) -> Tensors:
    lse, seed, offset = stats
    seq = q.shape[1]
    grads = _ATEN._scaled_dot_product_cudnn_attention_backward(
        dout.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        out.transpose(1, 2), lse, seed, offset, None, None, None, seq, seq, 0.0, True,
        scale=scale,
    )  # fmt: skip
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


def _pad_to(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else functional.pad(x, (0, dim - x.shape[-1]))


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensors]:
    seq, dim = q.shape[1], q.shape[3]
    out, lse, seed, offset, _ = _ATEN._flash_attention_forward(
        q, k, _pad_to(v, dim), None, None, seq, seq, 0.0, True, False, scale=scale
    )
    return out[..., : v.shape[3]].contiguous(), (lse, seed, offset)


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensors, scale: float
) -> Tensors:
    lse, seed, offset = stats
    seq, dim, width = q.shape[1], q.shape[3], v.shape[3]
    dq, dk, dv = _ATEN._flash_attention_backward(
        _pad_to(dout, dim), q, k, _pad_to(v, dim), _pad_to(out, dim), lse, None, None, seq, seq,
        0.0, True, seed, offset, scale=scale,
    )  # fmt: skip
    return dq, dk, dv[..., :width].contiguous()


BACKENDS: dict[str, tuple[Any, Any]] = {
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "flash": (_flash_forward, _flash_backward),
    "math": (_math_forward, _math_backward),
}


class _Attention(Op):
    """What both kinds share: the backend, the rotary tables and the shape of the batch."""

    def __init__(self, seq: int, rope_dim: int, backend: str | None, **weights: Weight) -> None:
        """Bind weights; ``seq`` tokens are a sequence, ``backend`` None is the device's default."""
        super().__init__(**weights)
        out = weights["out"].data
        self.seq = seq
        name = (DEFAULT_BACKEND if out.is_cuda else "math") if backend is None else backend
        if name not in BACKENDS:
            raise ValueError(f"backend={name!r} must be one of {sorted(BACKENDS)}")
        self.backend = name
        self.attend, self.attend_grad = BACKENDS[name]
        self.cos, self.sin = rope_tables(seq, rope_dim, out.device)

    def batch(self, x: Tensor, heads: int) -> Tensor:
        """x [T, H D]: [sequences, seq, H, D], a view."""
        return x.view(-1, self.seq, heads, x.shape[1] // heads)


class AttentionMla(_Attention):
    """Multi-head latent attention; input the normed hidden [T, C], output [T, C].

    Weights [out, in]: ``query`` [H (nope + rope), C] (or ``query_down`` [q_rank, C],
    ``query_norm`` [q_rank], ``query`` [.., q_rank]), ``latent`` [kv_rank + rope, C],
    ``latent_norm`` [kv_rank], ``key`` [H nope, kv_rank], ``value`` [H v, kv_rank], ``out``
    [C, H v]. Key and value have a matrix each (kv_b_proj's rows, sorted), so that the values need
    no copy and the nope part of the keys is freed in F.
    """

    kind = "attention_mla"

    def __init__(
        self, *, seq: int, heads: int, rope: int, backend: str | None = None, **weights: Weight
    ) -> None:
        """Bind weights; ``rope`` of a head's query dims are rotated."""
        super().__init__(seq, rope, backend, **weights)
        self.heads, self.rope = heads, rope
        self.rank = weights["latent_norm"].data.shape[0]
        self.qk = weights["query"].data.shape[0] // heads
        self.scale = self.qk**-0.5
        self.compressed = "query_down" in weights

    def forward(self, x: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """x [T, C]: the sublayer's output [T, C]."""
        w, k = self.weights, fused(x)
        query_saved: Tensors = ()
        query_input = x
        if self.compressed:
            down = linear(x, w["query_down"].data)
            query_input, rstd = k.rms_norm(down, w["query_norm"].data, NORM_EPS)
            query_saved = (down, query_input, rstd)
        q = linear(query_input, w["query"].data)
        k.rope_(q, self.heads, self.qk, self.qk - self.rope, self.cos, self.sin, 1.0)
        latent = linear(x, w["latent"].data)
        normed, rstd = k.rms_norm(latent[:, : self.rank], w["latent_norm"].data, NORM_EPS)
        nope = linear(normed, w["key"].data)
        key = k.mla_key(nope, latent[:, self.rank :], self.heads, self.cos, self.sin)
        del nope
        value = linear(normed, w["value"].data)
        out, stats = self.attend(
            self.batch(q, self.heads), key.view(-1, self.seq, self.heads, self.qk),
            self.batch(value, self.heads), self.scale,
        )  # fmt: skip
        y = linear(out.reshape(x.shape[0], -1), w["out"].data)
        return (y,), (x, q, latent, normed, rstd, key, value, out, *stats, *query_saved)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy [T, C]: the gradient of x."""
        x, q, latent, normed, rstd, key, value, out, *rest = saved
        stats = tuple(rest[:-3] if self.compressed else rest)
        w, k = self.weights, fused(dy)
        tokens = dy.shape[0]
        dout = torch.mm(dy, w["out"].data)
        dq, dkey, dvalue = self.attend_grad(
            self.batch(dout, self.heads), self.batch(q, self.heads),
            key.view(-1, self.seq, self.heads, self.qk), self.batch(value, self.heads), out,
            stats, self.scale,
        )  # fmt: skip
        del dout
        dq, dvalue = dq.view(tokens, -1), dvalue.view(tokens, -1)
        k.rope_(dq, self.heads, self.qk, self.qk - self.rope, self.cos, self.sin, -1.0)
        dlatent = torch.empty_like(latent)
        dnope = k.mla_key_grad(
            dkey.view(tokens, self.heads, self.qk), dlatent[:, self.rank :], self.cos, self.sin
        )
        del dkey
        dnormed = torch.mm(dnope, w["key"].data)
        torch.addmm(dnormed, dvalue, w["value"].data, out=dnormed)
        norm = w["latent_norm"]
        k.rms_norm_grad(
            dnormed, latent[:, : self.rank], norm.data, rstd, norm.main_grad,
            dlatent[:, : self.rank],
        )  # fmt: skip
        dx = torch.mm(dlatent, w["latent"].data)
        query_deferred: Tensors = ()
        if self.compressed:
            down, query_input, query_rstd = rest[-3:]
            norm = w["query_norm"]
            dinput = torch.mm(dq, w["query"].data)
            ddown = torch.empty_like(down)
            k.rms_norm_grad(dinput, down, norm.data, query_rstd, norm.main_grad, ddown)
            torch.addmm(dx, ddown, w["query_down"].data, out=dx)
            query_deferred = (query_input, ddown)
        else:
            torch.addmm(dx, dq, w["query"].data, out=dx)
        out = out.reshape(tokens, -1)
        return (dx,), (x, normed, out, dy, dq, dlatent, dnope, dvalue, *query_deferred)

    def backward_weight(self, deferred: Tensors) -> None:
        """Six linears (seven with compressed queries)."""
        x, normed, out, dy, dq, dlatent, dnope, dvalue, *query = deferred
        w = self.weights
        add_weight_gradient(w["out"].main_grad, dy, out)
        add_weight_gradient(w["key"].main_grad, dnope, normed)
        add_weight_gradient(w["value"].main_grad, dvalue, normed)
        add_weight_gradient(w["latent"].main_grad, dlatent, x)
        if self.compressed:
            query_input, ddown = query
            add_weight_gradient(w["query"].main_grad, dq, query_input)
            add_weight_gradient(w["query_down"].main_grad, ddown, x)
        else:
            add_weight_gradient(w["query"].main_grad, dq, x)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env, backend: str | None = None) -> AttentionMla:
        """An op of the vocabulary's shape with random weights."""
        hidden, heads, rank = shape["hidden"], shape["heads"], shape["kv_rank"]
        qk, q_rank = shape["nope"] + shape["rope"], shape["q_rank"]
        weights = {
            "query": env.weight(heads * qk, q_rank or hidden, salt=1),
            "latent": env.weight(rank + shape["rope"], hidden, salt=2),
            "latent_norm": env.ones(rank),
            "key": env.weight(heads * shape["nope"], rank, salt=3),
            "value": env.weight(heads * shape["v"], rank, salt=4),
            "out": env.weight(hidden, heads * shape["v"], salt=5),
        }
        if q_rank:
            weights["query_down"] = env.weight(q_rank, hidden, salt=6)
            weights["query_norm"] = env.ones(q_rank)
        return cls(seq=shape["seq"], heads=heads, rope=shape["rope"], backend=backend, **weights)

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random normed hidden [T, C]."""
        return (env.normal(shape["tokens"], shape["hidden"]),)


class AttentionGqa(_Attention):
    """Grouped-query attention with rotary positions over the whole head.

    Weights: ``qkv`` [(H + 2 G) D, C] (queries, then keys, then values) and ``out`` [C, H D].
    """

    kind = "attention_gqa"

    def __init__(
        self, *, seq: int, heads: int, kv_heads: int, backend: str | None = None,
        **weights: Weight,
    ) -> None:  # fmt: skip
        """Bind weights; key and value groups are the last 2 ``kv_heads`` heads of ``qkv``."""
        dim = weights["qkv"].data.shape[0] // (heads + 2 * kv_heads)
        super().__init__(seq, dim, backend, **weights)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.scale = dim**-0.5

    def _split(self, qkv: Tensor) -> Tensors:
        every = self.batch(qkv, self.heads + 2 * self.kv_heads)
        return every.split([self.heads, self.kv_heads, self.kv_heads], 2)

    def forward(self, x: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """x [T, C]: the sublayer's output [T, C]."""
        qkv = linear(x, self.weights["qkv"].data)
        turned = self.heads + self.kv_heads
        fused(x).rope_(qkv, turned, self.dim, 0, self.cos, self.sin, 1.0)
        out, stats = self.attend(*self._split(qkv), self.scale)
        y = linear(out.reshape(x.shape[0], -1), self.weights["out"].data)
        return (y,), (x, qkv, out, *stats)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy [T, C]: the gradient of x."""
        x, qkv, out, *stats = saved
        dout = torch.mm(dy, self.weights["out"].data)
        parts = self.attend_grad(
            self.batch(dout, self.heads), *self._split(qkv), out, tuple(stats), self.scale
        )
        del dout
        dqkv = torch.cat(parts, 2).view(dy.shape[0], -1)
        turned = self.heads + self.kv_heads
        fused(dy).rope_(dqkv, turned, self.dim, 0, self.cos, self.sin, -1.0)
        dx = torch.mm(dqkv, self.weights["qkv"].data)
        return (dx,), (x, dqkv, out.reshape(dy.shape[0], -1), dy)

    def backward_weight(self, deferred: Tensors) -> None:
        """The two linears."""
        x, dqkv, out, dy = deferred
        add_weight_gradient(self.weights["out"].main_grad, dy, out)
        add_weight_gradient(self.weights["qkv"].main_grad, dqkv, x)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env, backend: str | None = None) -> AttentionGqa:
        """An op of the vocabulary's shape with random weights."""
        hidden, dim = shape["hidden"], shape["head_dim"]
        heads, kv_heads = shape["heads"], shape["kv_heads"]
        return cls(
            seq=shape["seq"], heads=heads, kv_heads=kv_heads, backend=backend,
            qkv=env.weight((heads + 2 * kv_heads) * dim, hidden, salt=1),
            out=env.weight(hidden, heads * dim, salt=2),
        )  # fmt: skip

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random normed hidden [T, C]."""
        return (env.normal(shape["tokens"], shape["hidden"]),)
