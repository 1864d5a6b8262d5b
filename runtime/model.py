"""The mHC paper's transformer as modules of explicit ops, one stage at a time, at any size.

A stage holds its blocks' parameters (:mod:`mhcplan.runtime.parameters`) and, bound to them, the
ops of :mod:`mhcplan.kernels.layers` that its Program names. Sites are numbered as in the Program:
2 b is the attention of block b, 2 b + 1 its FFN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mhcplan.kernels.layers import (
    AttentionGqa,
    AttentionMla,
    Collapse,
    DenseFfn,
    Embedding,
    Expand,
    Experts,
    HcPost,
    HcPre,
    Head,
    MhcPost,
    MhcPre,
    MhcRecompute,
    Norm,
    Op,
    Regroup,
    Residual,
    Router,
    SharedExperts,
    Unpermute,
    Weight,
)
from mhcplan.profiles.specs import SITES_PER_BLOCK, Mla
from mhcplan.runtime.parameters import Parameter, StageParameters, build_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from mhcplan.runtime.spec import RunSpec

INIT_STD = 0.02
ALPHA_INIT = 0.01  # the mHC paper's, table 5


@dataclass
class Stage:
    """One stage on one rank.

    Attributes:
        blocks: transformer blocks it holds.
        parameters: their weights and gradients.
        ops: by (kind, site); site -1 for those of the model's ends and those without weights.
    """

    blocks: range
    parameters: StageParameters
    ops: dict[tuple[str, int], Op] = field(default_factory=dict)

    def op(self, kind: str, site: int) -> Op:
        """The op of a kind at a site; those without weights are the same at every site."""
        return self.ops.get((kind, site)) or self.ops[kind, -1]


def build_stage(
    spec: RunSpec,
    blocks: range,
    *,
    expert_index: int,
    shares: Mapping[str, tuple[int, int]],
    device: torch.device,
    loss_scale: float,
    optimizer: Mapping[str, Any],
) -> Stage:
    """Build a stage with its deterministic initial weights.

    Args:
        spec: the run.
        blocks: its blocks; the first block brings the embedding, the last the head.
        expert_index: this process among the ``ep`` that split the experts.
        shares: (index, number) of the optimizer's share in each part.
        device: where it lives.
        loss_scale: factor of each token's loss in the gradient.
        optimizer: options, see :func:`~mhcplan.runtime.parameters.build_parameters`.
    """
    parts = {"dense": dense_parameters(spec, blocks)}
    experts = expert_parameters(spec, blocks, expert_index)
    if experts:
        parts["experts"] = experts
    parameters = build_parameters(parts, shares, device, spec.dtype, spec.seed, optimizer)
    stage = Stage(blocks, parameters)
    _bind_ops(spec, stage, loss_scale)
    return stage


# -- parameters ------------------------------------------------------------------------------------


def dense_parameters(spec: RunSpec, blocks: range) -> list[Parameter]:
    """All parameters of a stage but the routed experts."""
    model, found = spec.model, list[Parameter]()
    hidden = model.hidden_size
    if 0 in blocks:
        found.append(Parameter("embedding.table", (model.vocab_size, hidden), INIT_STD))
    for block in blocks:
        for sublayer in range(SITES_PER_BLOCK):
            prefix = f"blocks.{block}.sites.{sublayer}"
            found += _site_parameters(spec, prefix, SITES_PER_BLOCK * block + sublayer)
            found.append(Parameter(f"{prefix}.norm", (hidden,), 0, 1.0))
        found += _attention_parameters(spec, f"blocks.{block}.attention")
        found += _ffn_parameters(spec, block)
    if model.num_blocks - 1 in blocks:
        found += _exit_parameters(spec)
    return found


def _site_parameters(spec: RunSpec, prefix: str, site: int) -> list[Parameter]:
    """phi (theta for HC), b and alpha of a site; fp32."""
    residual, hidden = spec.residual, spec.model.hidden_size
    if residual.is_plain:
        return []
    n, m = residual.expansion_rate, residual.num_coefficients
    if residual.kind == "hc":
        projection = Parameter(f"{prefix}.theta", (n + 2, hidden), hidden**-0.5, wide=True)
        bias = _hc_bias(n, site)
    else:
        width = n * hidden
        projection = Parameter(f"{prefix}.phi", (m, width), width**-0.5, wide=True)
        bias = 0.0
    return [
        projection,
        Parameter(f"{prefix}.bias", (m,), 0, bias, wide=True),
        Parameter(f"{prefix}.alpha", (3,), 0, ALPHA_INIT, wide=True),
    ]


def _hc_bias(n: int, site: int) -> tuple[float, ...]:
    """HC's own start (arXiv 2409.19606): read row ``site`` mod n, write to all, mix none."""
    pre = [float(i == site % n) for i in range(n)]
    res = [float(o == i) for o in range(n) for i in range(n)]
    return *pre, *[1.0] * n, *res


def _attention_parameters(spec: RunSpec, prefix: str) -> list[Parameter]:
    a, hidden = spec.model.attention, spec.model.hidden_size

    def matrix(name: str, *shape: int) -> Parameter:
        return Parameter(f"{prefix}.{name}", shape, INIT_STD)

    if not isinstance(a, Mla):
        width = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        return [matrix("qkv", width, hidden), matrix("out", hidden, a.num_heads * a.head_dim)]
    heads, qk, q_rank = a.num_heads, a.qk_nope_head_dim + a.qk_rope_head_dim, a.q_lora_rank
    found = [
        matrix("query", heads * qk, q_rank or hidden),
        matrix("latent", a.kv_lora_rank + a.qk_rope_head_dim, hidden),
        Parameter(f"{prefix}.latent_norm", (a.kv_lora_rank,), 0, 1.0),
        matrix("key", heads * a.qk_nope_head_dim, a.kv_lora_rank),
        matrix("value", heads * a.v_head_dim, a.kv_lora_rank),
        matrix("out", hidden, heads * a.v_head_dim),
    ]
    if q_rank:
        found.append(matrix("query_down", q_rank, hidden))
        found.append(Parameter(f"{prefix}.query_norm", (q_rank,), 0, 1.0))
    return found


def _ffn_parameters(spec: RunSpec, block: int) -> list[Parameter]:
    model, hidden = spec.model, spec.model.hidden_size
    if model.moe is None or not model.is_moe_block(block):
        return _swiglu(f"blocks.{block}.dense_ffn", hidden, model.dense_ffn_dim or 0)
    moe = model.moe
    found = [Parameter(f"blocks.{block}.router.gate", (moe.num_experts, hidden), INIT_STD)]
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.ffn_dim
        found += _swiglu(f"blocks.{block}.shared_experts", hidden, width)
    return found


def _swiglu(prefix: str, hidden: int, width: int) -> list[Parameter]:
    return [
        Parameter(f"{prefix}.gate_up", (2 * width, hidden), INIT_STD),
        Parameter(f"{prefix}.down", (hidden, width), INIT_STD),
    ]


def _exit_parameters(spec: RunSpec) -> list[Parameter]:
    model, n = spec.model, spec.residual.num_rows
    hidden = model.hidden_size
    found = [
        Parameter("head.norm", (hidden,), 0, 1.0),
        Parameter("head.weight", (model.vocab_size, hidden), INIT_STD),
    ]
    if not spec.residual.is_plain:
        found += [
            Parameter("collapse.phi", (n, n * hidden), (n * hidden) ** -0.5, wide=True),
            Parameter("collapse.bias", (n,), 0, wide=True),
            Parameter("collapse.alpha", (1,), 0, ALPHA_INIT, wide=True),
        ]
    return found


def expert_parameters(spec: RunSpec, blocks: range, index: int) -> list[Parameter]:
    """Routed experts of a stage that process ``index`` of the expert group holds."""
    model, moe = spec.model, spec.model.moe
    if moe is None:
        return []
    held = moe.num_experts // spec.ep
    experts = range(index * held, (index + 1) * held)
    found: list[Parameter] = []
    for block in blocks:
        if not model.is_moe_block(block):
            continue
        for name, shape in (
            ("gate_up", (2 * moe.ffn_dim, model.hidden_size)),
            ("down", (model.hidden_size, moe.ffn_dim)),
        ):
            copies = tuple(f"blocks.{block}.experts.{e}.{name}" for e in experts)
            whole = f"blocks.{block}.experts.{name}"
            found.append(Parameter(whole, (held, *shape), INIT_STD, copies=copies))
    return found


# -- ops -------------------------------------------------------------------------------------------


def _bind_ops(spec: RunSpec, stage: Stage, loss_scale: float) -> None:
    ops, weights, residual = stage.ops, stage.parameters.weights, spec.residual
    for op in (Residual(), MhcPost(), HcPost(), MhcRecompute(), Regroup(), Unpermute()):
        ops[op.kind, -1] = op
    for block in stage.blocks:
        for sublayer in range(SITES_PER_BLOCK):
            site = SITES_PER_BLOCK * block + sublayer
            prefix = f"blocks.{block}.sites.{sublayer}"
            ops["norm", site] = Norm(weights[f"{prefix}.norm"])
            own = _named(weights, prefix)
            own.pop("norm")
            if residual.is_plain:
                continue
            if residual.kind == "hc":
                ops["hc_pre", site] = HcPre(**own)
            else:
                ops["mhc_pre", site] = MhcPre(**own, steps=residual.sinkhorn_steps)
        _bind_attention(spec, stage, block)
        _bind_ffn(spec, stage, block)
    if 0 in stage.blocks:
        ops["embedding", -1] = Embedding(weights["embedding.table"])
        ops["mhc_expand", -1] = Expand(residual.num_rows)
    if spec.model.num_blocks - 1 in stage.blocks:
        ops["norm", -1] = Norm(weights["head.norm"])
        ops["head", -1] = Head(weights["head.weight"], scale=loss_scale)
        if not residual.is_plain:
            ops["mhc_collapse", -1] = Collapse(**_named(weights, "collapse"))


def _named(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """Weights below ``prefix``, by the rest of their names."""
    start = f"{prefix}."
    return {name[len(start) :]: w for name, w in weights.items() if name.startswith(start)}


def _bind_attention(spec: RunSpec, stage: Stage, block: int) -> None:
    a, site = spec.model.attention, SITES_PER_BLOCK * block
    weights = _named(stage.parameters.weights, f"blocks.{block}.attention")
    backend = spec.attention if weights["out"].data.is_cuda else None
    common = {"seq": spec.seq_len, "heads": a.num_heads, "backend": backend}
    if isinstance(a, Mla):
        op: Op = AttentionMla(**common, rope=a.qk_rope_head_dim, **weights)  # type: ignore[arg-type]
    else:
        op = AttentionGqa(**common, kv_heads=a.num_kv_heads, **weights)  # type: ignore[arg-type]
    stage.ops[op.kind, site] = op


def _bind_ffn(spec: RunSpec, stage: Stage, block: int) -> None:
    weights, moe, site = stage.parameters.weights, spec.model.moe, SITES_PER_BLOCK * block + 1
    prefix = f"blocks.{block}"
    if moe is None or not spec.model.is_moe_block(block):
        stage.ops["dense_ffn", site] = DenseFfn(**_named(weights, f"{prefix}.dense_ffn"))
        return
    forced = spec.routing == "forced"
    gate = weights[f"{prefix}.router.gate"]
    stage.ops["router", site] = Router(gate, top_k=moe.top_k, forced=forced)
    stage.ops["experts", site] = Experts(**_named(weights, f"{prefix}.experts"))
    if moe.num_shared_experts:
        shared = _named(weights, f"{prefix}.shared_experts")
        stage.ops["shared_experts", site] = SharedExperts(**shared)
