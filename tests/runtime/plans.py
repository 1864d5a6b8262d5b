"""Small plans of every kind that the runtime must get right."""

from __future__ import annotations

from typing import Any

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.spec import make_plan
from tests.runtime.worker import Case

TINY = {
    "name": "tiny",
    "num_blocks": 4,
    "hidden_size": 64,
    "vocab_size": 320,
    "attention": {
        "kind": "mla", "num_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "kv_lora_rank": 24,
    },
    "num_dense_blocks": 1,
    "dense_ffn_dim": 96,
    "moe": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1, "ffn_dim": 32},
}  # fmt: skip
FORCED, LEARNED = "forced", "learned"


def make_case(
    name: str,
    *,
    routing: str = LEARNED,
    shuffle: int | None = None,
    model: dict[str, Any] | None = None,
    n: int = 4,
    kind: str = "mhc",
    recompute: object = "none",
    pp: int = 2,
    ep: int = 1,
    dp: int = 1,
    microbatches: int = 4,
    **fields: object,
) -> Case:
    """Lower a plan of the tiny model."""
    residual = {
        "kind": kind,
        "expansion_rate": n,
        "recompute_block": recompute,
        "sinkhorn_steps": 5,
    }
    plan = make_plan(
        {
            "model": TINY | (model or {}), "residual": residual,
            "layout": {"pp": pp, "ep": ep, "dp": dp}, "microbatches": microbatches, "seq_len": 64,
        }
        | fields
    )  # fmt: skip
    program = lower(plan, resolve_recompute_block(plan))
    choices = {"routing": FORCED if ep > 1 else routing}
    return Case(name, program, plan.model_dump(mode="json"), choices, shuffle)
