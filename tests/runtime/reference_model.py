"""The shipped transformer written a second time: whole, in one process, under torch's autograd.

Shares nothing with the runtime but names and initial values of the weights, and with the kernels
but the equations of mHC (:mod:`mhcplan.kernels.reference`, tested against the paper elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor

from mhcplan.kernels import reference
from mhcplan.profiles.specs import Mla

if TYPE_CHECKING:
    from mhcplan.runtime.spec import RunSpec

EPS = 1e-20


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.t()).chunk(2, -1)
    return (functional.silu(gate) * up) @ down.t()


def rotate(x: Tensor, seq: int) -> Tensor:
    """Rotary positions over the last axis of x [B, S, H, D], halves (a, b)."""
    half = x.shape[-1] // 2
    where = {"dtype": torch.float64, "device": x.device}
    power = torch.arange(half, **where) / half
    angle = torch.outer(torch.arange(seq, **where), 10_000.0**-power).to(x.dtype)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, S, H, D]; returns [T, H V]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass
class ReferenceModel:
    """``weights`` by the runtime's names, with all experts."""

    spec: RunSpec
    weights: dict[str, Tensor]

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a microbatch [T]."""
        residual, model, w = self.spec.residual, self.spec.model, self.weights
        x = functional.embedding(ids, w["embedding.table"])
        if not residual.is_plain:
            x = reference.expand(x, residual.expansion_rate)
        for block in range(model.num_blocks):
            x = self.site(x, block, 0)
            x = self.site(x, block, 1)
        if not residual.is_plain:
            phi, bias, alpha = (w[f"collapse.{p}"] for p in ("phi", "bias", "alpha"))
            x = reference.collapse(x, phi, bias, alpha)
        logits = rms_norm(x, w["head.norm"]) @ w["head.weight"].t()
        return functional.cross_entropy(logits, targets)

    def site(self, x: Tensor, block: int, sublayer: int) -> Tensor:
        prefix, residual, w = f"blocks.{block}.sites.{sublayer}", self.spec.residual, self.weights
        run = self.attention if sublayer == 0 else self.ffn
        if residual.is_plain:
            return x + run(rms_norm(x, w[f"{prefix}.norm"]), block)
        if residual.kind == "hc":
            u, mix = reference.hc_pre(
                x, w[f"{prefix}.theta"], w[f"{prefix}.bias"], w[f"{prefix}.alpha"]
            )
        else:
            u, mix = reference.mhc_pre(
                x, w[f"{prefix}.phi"], w[f"{prefix}.bias"], w[f"{prefix}.alpha"],
                residual.sinkhorn_steps,
            )  # fmt: skip
        return reference.post_res(x, run(rms_norm(u, w[f"{prefix}.norm"]), block), mix)

    def attention(self, x: Tensor, block: int) -> Tensor:
        a, w, seq = self.spec.model.attention, self.weights, self.spec.seq_len
        prefix = f"blocks.{block}.attention"

        def heads(y: Tensor, number: int) -> Tensor:
            return y.view(-1, seq, number, y.shape[1] // number)

        if not isinstance(a, Mla):
            sizes = [n * a.head_dim for n in (a.num_heads, a.num_kv_heads, a.num_kv_heads)]
            q, k, v = (x @ w[f"{prefix}.qkv"].t()).split(sizes, -1)
            q, k = rotate(heads(q, a.num_heads), seq), rotate(heads(k, a.num_kv_heads), seq)
            group = a.num_heads // a.num_kv_heads
            k, v = (t.repeat_interleave(group, 2) for t in (k, heads(v, a.num_kv_heads)))
            return attend(q, k, v) @ w[f"{prefix}.out"].t()
        query = x
        if a.q_lora_rank:
            query = rms_norm(x @ w[f"{prefix}.query_down"].t(), w[f"{prefix}.query_norm"])
        nope = a.qk_nope_head_dim
        q = heads(query @ w[f"{prefix}.query"].t(), a.num_heads)
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], seq)], -1)
        latent = x @ w[f"{prefix}.latent"].t()
        rope = rotate(heads(latent[:, a.kv_lora_rank :], 1), seq).expand(-1, -1, a.num_heads, -1)
        normed = rms_norm(latent[:, : a.kv_lora_rank], w[f"{prefix}.latent_norm"])
        k = torch.cat([heads(normed @ w[f"{prefix}.key"].t(), a.num_heads), rope], -1)
        v = heads(normed @ w[f"{prefix}.value"].t(), a.num_heads)
        return attend(q, k, v) @ w[f"{prefix}.out"].t()

    def ffn(self, x: Tensor, block: int) -> Tensor:
        model, w, moe = self.spec.model, self.weights, self.spec.model.moe
        if moe is None or not model.is_moe_block(block):
            prefix = f"blocks.{block}.dense_ffn"
            return swiglu(x, w[f"{prefix}.gate_up"], w[f"{prefix}.down"])
        scores = torch.sigmoid(x @ w[f"blocks.{block}.router.gate"].t())
        if self.spec.routing == "forced":
            token = torch.arange(len(x), device=x.device)[:, None] * moe.top_k
            turn = (token + torch.arange(moe.top_k, device=x.device)) % moe.num_experts
            chosen = turn.gather(1, scores.gather(1, turn).argsort(-1, descending=True))
        else:
            chosen = scores.topk(moe.top_k).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        gate_up, down = (w[f"blocks.{block}.experts.{name}"] for name in ("gate_up", "down"))
        y = torch.zeros_like(x)
        for e in range(moe.num_experts):
            token, copy = (chosen == e).nonzero(as_tuple=True)
            part = swiglu(x[token], gate_up[e], down[e]) * weights[token, copy, None]
            y = y.index_add(0, token, part)
        if moe.num_shared_experts:
            prefix = f"blocks.{block}.shared_experts"
            y = y + swiglu(x, w[f"{prefix}.gate_up"], w[f"{prefix}.down"])
        return y
