"""The rows of the closed loop: what is predicted, then run, by set.

Every set runs on one number of GPUs (``GPUS``).
"""

from __future__ import annotations

from typing import Any

from mhcplan.profiles.accuracy import ABLATIONS

Fields = dict[str, Any]


def model(hidden: int, blocks: int = 8) -> Fields:
    """Blocks of the paper's 9B (C = 1920) and 27B (C = 2560) models with 16 routed experts: small
    enough for two copies beside their optimizers."""
    return {
        "name": f"closed-loop-{hidden}", "num_blocks": blocks, "hidden_size": hidden,
        "vocab_size": 32_768, "attention": {"kind": "mla", "num_heads": hidden // 80},
        "moe": {
            "num_experts": 16, "top_k": 6, "num_shared_experts": 2,
            "ffn_dim": {1920: 1280, 2560: 1536}[hidden],
        },
    }  # fmt: skip


def row(
    schedule: str, n: int, recompute: object, *, hidden: int = 1920, tokens: int = 2048,
    pp: int = 2, ep: int = 1, microbatches: int = 8, blocks: int = 8, **fields: object,
) -> Fields:  # fmt: skip
    """A plan as ``make_plan`` takes it."""
    if schedule.startswith("dualpipe"):
        fields.setdefault("p2p", "grouped" if pp > 1 else "eager")
    fields.setdefault("contention", "on")
    fields.setdefault("max_connections", 32)  # as the runtime sets it
    return {
        "model": model(hidden, blocks),
        "residual": {"expansion_rate": n, "recompute_block": recompute},
        "layout": {"pp": pp, "ep": ep}, "microbatches": microbatches, "seq_len": tokens,
        "schedule": schedule,
    } | fields  # fmt: skip


PP2 = {
    "1f1b-n1": row("1f1b", 1, "none", tokens=4096),
    "1f1b-n4-L2": row("1f1b", 4, 2, tokens=4096),
    "1f1b-n4-L2-none": row("1f1b", 4, 2, tokens=4096, priority="none"),
    "zb1p-n2-L4": row("zb1p", 2, 4),
    "zb1p-n4-Lstage-2560": row("zb1p", 4, "stage", hidden=2560),
    "dualpipe-n4-L2": row("dualpipe", 4, 2, tokens=4096),
    "dualpipe-n2-L1-eager": row("dualpipe", 2, 1, p2p="eager"),
    "dualpipev-n1": row("dualpipev", 1, "none"),
    "dualpipev-n4-L2": row("dualpipev", 4, 2),
    "dualpipev-n4-L4-2560-none": row("dualpipev", 4, 4, hidden=2560, priority="none"),
}
EP2 = {
    f"ep2-n{n}-{priority}-{comm}": row(
        "dualpipev", n, 2 if n > 1 else "none", pp=1, ep=2, priority=priority, comm_priority=comm
    )
    for n, priority, comm in (
        (1, "none", "normal"), (1, "none", "high"),
        (4, "none", "normal"), (4, "post", "normal"), (4, "none", "high"), (4, "post", "high"),
    )
}  # fmt: skip
ABLATION = {
    f"ablation-{name}": row("dualpipev", 4, 2, pp=1, ep=2, **fields)
    for name, fields in {
        "base": {},
        "all": {"priority": "all"},
        "recompute": {"priority": "recompute"},
        "coupled": {"priority": "recompute", "overlap_recompute": False},
        "preemptible": {"attention": "preemptible"},
        "none-preemptible": {"attention": "preemptible", "priority": "none"},
        "ctas8": {"comm_ctas": 8},
        "ctas4": {"comm_ctas": 4},
        "sms112": {"compute_sms": 112, "priority": "none"},
    }.items()
}
CTAS = {  # communication with fewer SMs, which messages of a pipeline take too
    f"ctas-{name}": {
        f"ctas-{name}-{limit or 'base'}": row(
            schedule, 4, 2, **fields, **({"comm_ctas": limit} if limit else {})
        )
        for limit in limits
    }
    for name, schedule, limits, fields in (
        ("1f1b", "1f1b", (None, 8, 4), {}),
        ("dualpipe", "dualpipe", (None, 8, 4), {}),
        ("eager", "dualpipe", (None, 8, 4), {"p2p": "eager"}),
    )
}
PP4 = {
    f"{schedule}-n{n}-L{block}-M{m}": row(schedule, n, block, pp=4, microbatches=m)
    for schedule, n, block, m in (
        ("1f1b", 1, "none", 8), ("1f1b", 4, 2, 8), ("1f1b", 4, "stage", 16),
        ("dualpipe", 1, "none", 16), ("dualpipe", 4, 1, 8), ("dualpipe", 4, "stage", 16),
        ("dualpipev", 1, "none", 8), ("dualpipev", 4, 2, 8), ("dualpipev", 4, 1, 16),
    )
} | {
    f"pp2-ep2-dualpipe-n{n}-{priority}": row(
        "dualpipe", n, 2 if n > 1 else "none", ep=2, priority=priority
    )
    for n, priority in ((1, "none"), (4, "none"), (4, "post"))
}  # fmt: skip
PP8 = {
    f"{schedule}-n{n}-L{block}-M{m}-P8": row(schedule, n, block, pp=8, microbatches=m, blocks=16)
    for schedule, n, block, m in (
        ("dualpipe", 1, "none", 16), ("dualpipe", 4, 1, 16), ("dualpipe", 4, "stage", 24),
        ("dualpipev", 1, "none", 16), ("dualpipev", 4, 1, 24), ("dualpipev", 4, "stage", 16),
    )
} | {
    f"pp4-ep2-dualpipe-n{n}": row(
        "dualpipe", n, 2 if n > 1 else "none", pp=4, ep=2, microbatches=16
    )
    for n in (1, 4)
}  # fmt: skip

TINY_MODEL: Fields = {
    "name": "tiny", "num_blocks": 4, "hidden_size": 64, "vocab_size": 320,
    "attention": {
        "kind": "mla", "num_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "kv_lora_rank": 24,
    },
    "moe": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1, "ffn_dim": 32},
}  # fmt: skip


def tiny(schedule: str, n: int, *, blocks: int = 4, **options: Any) -> Fields:  # noqa: ANN401
    """A row that CPUs run in no time: is the script sound?"""
    small = {"model": TINY_MODEL | {"num_blocks": blocks}, "contention": "off"}
    return row(schedule, n, 2 if n > 1 else "none", tokens=64, **options) | small


DRY2 = {"dry-zb1p": tiny("zb1p", 2, microbatches=4)}
DRY4 = {
    "dry-1f1b": tiny("1f1b", 2, pp=4, microbatches=4),
    "dry-pp2-ep2": tiny("dualpipe", 2, ep=2, microbatches=4),
}
DRY8 = {
    "dry-dualpipe": tiny("dualpipe", 2, pp=8, microbatches=16, blocks=8),
    "dry-dualpipev": tiny("dualpipev", 1, pp=8, microbatches=16, blocks=16),
    "dry-pp4-ep2": tiny("dualpipe", 2, pp=4, ep=2, microbatches=8),
}

SETS: dict[str, dict[str, Fields]] = {
    "pp2": PP2, "ep2": EP2, "ablation": ABLATION, **CTAS, "four": PP4, "eight": PP8,
    "dry2": DRY2, "dry4": DRY4, "dry8": DRY8,
}  # fmt: skip
GPUS = {
    "pp2": 2, "ep2": 2, "ablation": 2, **dict.fromkeys(CTAS, 2), "four": 4, "eight": 8,
    "dry2": 2, "dry4": 4, "dry8": 8,
}  # fmt: skip
ALONE = (*ABLATIONS, "dry2")  # their rows are compared with each other and not with a baseline
HUNG = ("zb1p-n2-L4", "dualpipe-n2-L1-eager")  # once: on streams that NCCL ran on
BLIND = ("pp2", "ep2", "four", "eight")  # sets whose rows judge the model
