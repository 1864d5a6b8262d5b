"""Which op keys a capture measures, in tiers: a lower tier is measured first.

Tier 1 is what predicting the mHC paper's 9B and 27B models needs, tier 2 brackets it (more token
counts, the 3B model, and the residual for n 2, 4, 8, widths 1280 to 7168, 1024 to 16384 tokens),
tier 3 adds the layers of the other presets, uneven experts and single matrix products. Where the
look-up's form interpolates well there are few rows: every row costs about 0.3 s on a GPU, and one
GPU should be done in nine minutes. ``TINY`` is a shape of every kind that a CPU runs in no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.profiles.presets import MODELS
from mhcplan.profiles.specs import Attention, Mla, ModelSpec
from mhcplan.profiles.vocabulary import MEASURABLE, OpKey, op_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SINKHORN_STEPS = 20
SINKHORN_SWEEP = (1, 5, 10, 40)  # at one shape: what t_max costs, and what a site costs without it
EXPANSION_RATES = (4, 2, 8)
RECOMPUTE_SITES = (1, 2, 4, 8)
FEW_SITES = (1, 8)  # and between them, where tokens are not SEQ
EXPERT_PARALLEL = (8, 4, 2, 1)
LARGE_EXPERT_PARALLEL = (64, 32, 8)  # all experts on one GPU do not fit with their gradients
SEQ = 4096
WIDTHS = (1280, 1920, 2560, 4096, 7168)
HC_WIDTHS = (1280, 2560, 7168)
ENDS = (1024, SEQ, 16384)  # tokens
OPTIMIZER_SIZES = tuple(2**power for power in (20, 22, 24, 27, 30))  # parameters of a shard
GEMMS = tuple(  # m, n, k: linears of the 27B model and of DeepSeek-V3, and a square
    (m, n, k)
    for n, k in ((6144, 2560), (2560, 3072), (36864, 7168), (7168, 18432), (8192, 8192))
    for m in (SEQ, 1024)
)
SKEWED_EXPERTS = (  # of a rank of the 27B model: how many, and percent of the rows that one has
    (9, (15, 25, 50, 75)),
    (18, (10, 50)),
    (36, (5, 25)),
    (72, (5, 15, 25, 50)),
)
TIERS = (1, 2, 3)

TINY: dict[str, dict[str, int]] = {
    "mhc_pre": {"n": 2, "hidden": 64, "tokens": 5, "steps": 3},
    "mhc_post": {"n": 4, "hidden": 64, "tokens": 5},
    "mhc_recompute": {"n": 2, "hidden": 64, "tokens": 5, "sites": 3},
    "hc_pre": {"n": 2, "hidden": 64, "tokens": 5},
    "hc_post": {"n": 2, "hidden": 64, "tokens": 5},
    "mhc_expand": {"n": 2, "hidden": 64, "tokens": 5},
    "mhc_collapse": {"n": 2, "hidden": 64, "tokens": 5},
    "residual": {"tokens": 5, "hidden": 48},
    "norm": {"tokens": 5, "hidden": 48},
    "attention_mla": {
        "tokens": 14, "seq": 7, "hidden": 32, "heads": 3, "nope": 8, "rope": 4, "v": 6,
        "kv_rank": 16, "q_rank": 0,
    },
    "attention_gqa": {
        "tokens": 14, "seq": 7, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8,
    },
    "dense_ffn": {"tokens": 5, "hidden": 32, "ffn": 24},
    "shared_experts": {"tokens": 5, "hidden": 32, "ffn": 16},
    "router": {"tokens": 37, "hidden": 32, "experts": 6, "top_k": 2},
    "regroup": {"rows": 64, "hidden": 48},
    "experts": {"rows": 21, "hidden": 32, "ffn": 16, "experts": 3},
    "unpermute": {"tokens": 9, "hidden": 48, "top_k": 3},
    "embedding": {"tokens": 9, "hidden": 32, "vocab": 11},
    "head": {"tokens": 9, "hidden": 32, "vocab": 50},
    "adamw": {"parameters": 1500},
    "zero_gradients": {"parameters": 1500},
    "gemm": {"m": 32, "n": 48, "k": 64},
    "gemm_fp8": {"m": 32, "n": 48, "k": 64},
    "experts_skewed": {"rows": 21, "hidden": 32, "ffn": 16, "experts": 3, "largest": 60},
}  # fmt: skip


def tiny_keys() -> list[OpKey]:
    """Every pass of every kind at its tiny shape."""
    return [op_key(k, p, **TINY[k]) for k, op in MEASURABLE.items() for p in op.passes]


def _all_passes(kind: str, **shape: int) -> Iterator[OpKey]:
    yield from (op_key(kind, p, **shape) for p in MEASURABLE[kind].passes)


def residual_keys(n: int, hidden: int, tokens: int) -> Iterator[OpKey]:
    """The mHC ops of one expansion rate, width and token count.

    Recompute of some numbers of sites, and the ends of a model, are left to interpolation where
    tokens are no end of the grid.
    """
    state = {"n": n, "hidden": hidden, "tokens": tokens}
    yield from _all_passes("mhc_pre", **state, steps=SINKHORN_STEPS)
    yield from _all_passes("mhc_post", **state)
    for sites in RECOMPUTE_SITES if tokens == SEQ else FEW_SITES:
        yield from _all_passes("mhc_recompute", **state, sites=sites)
    if tokens in ENDS:
        yield from _all_passes("mhc_expand", **state)
        yield from _all_passes("mhc_collapse", **state)


def block_keys(model: ModelSpec, tokens: int, seq: int) -> Iterator[OpKey]:
    """Layer ops of a model's blocks, whatever its expert parallelism."""
    hidden, moe = model.hidden_size, model.moe
    here = {"tokens": tokens, "hidden": hidden}
    yield from _attention_keys(model.attention, seq=seq, **here)
    yield from _all_passes("norm", **here)
    yield from _all_passes("residual", **here)
    if moe is not None:
        yield from _all_passes("router", **here, experts=moe.num_experts, top_k=moe.top_k)
        yield from _all_passes("unpermute", **here, top_k=moe.top_k)
        if moe.num_shared_experts:
            ffn = moe.num_shared_experts * moe.ffn_dim
            yield from _all_passes("shared_experts", **here, ffn=ffn)
    if model.dense_ffn_dim:
        yield from _all_passes("dense_ffn", **here, ffn=model.dense_ffn_dim)


def _attention_keys(attention: Attention, **shape: int) -> Iterator[OpKey]:
    if isinstance(attention, Mla):
        yield from _all_passes(
            "attention_mla", **shape, heads=attention.num_heads, nope=attention.qk_nope_head_dim,
            rope=attention.qk_rope_head_dim, v=attention.v_head_dim,
            kv_rank=attention.kv_lora_rank, q_rank=attention.q_lora_rank or 0,
        )  # fmt: skip
    else:
        yield from _all_passes(
            "attention_gqa", **shape, heads=attention.num_heads,
            kv_heads=attention.num_kv_heads, head_dim=attention.head_dim,
        )  # fmt: skip


def expert_keys(model: ModelSpec, tokens: int, ranks: Iterable[int]) -> Iterator[OpKey]:
    """Experts and regroup of balanced routing on each number of expert-parallel ranks."""
    if model.moe is None:
        return
    rows = tokens * model.moe.top_k
    yield from _all_passes("regroup", rows=rows, hidden=model.hidden_size)
    for ep in ranks:
        if model.moe.num_experts % ep == 0:
            yield from _all_passes(
                "experts", rows=rows, hidden=model.hidden_size, ffn=model.moe.ffn_dim,
                experts=model.moe.num_experts // ep,
            )  # fmt: skip


def end_keys(model: ModelSpec, tokens: int) -> Iterator[OpKey]:
    """Embedding and head."""
    here = {"tokens": tokens, "hidden": model.hidden_size, "vocab": model.vocab_size}
    yield from _all_passes("embedding", **here)
    yield from _all_passes("head", **here)


def _model_keys(
    name: str, tokens: int, seq: int, ranks: Iterable[int] = EXPERT_PARALLEL
) -> Iterator[OpKey]:
    model = MODELS[name]
    yield from block_keys(model, tokens, seq)
    yield from expert_keys(model, tokens, ranks)
    yield from end_keys(model, tokens)


def _first_tier() -> Iterator[OpKey]:
    for tokens in (4096, 2048):
        for name in ("mhc-27b", "mhc-9b"):
            for n in EXPANSION_RATES:
                yield from residual_keys(n, MODELS[name].hidden_size, tokens)
            yield from _model_keys(name, tokens, min(tokens, SEQ))
    for parameters in OPTIMIZER_SIZES:
        yield from _all_passes("adamw", parameters=parameters)
        yield from _all_passes("zero_gradients", parameters=parameters)


def _second_tier() -> Iterator[OpKey]:
    for name in ("mhc-27b", "mhc-9b"):
        for tokens in (8192, 1024):
            for n in EXPANSION_RATES:
                yield from residual_keys(n, MODELS[name].hidden_size, tokens)
            yield from _model_keys(name, tokens, min(tokens, SEQ))
    for tokens in (SEQ, 2048):
        yield from _model_keys("mhc-3b", tokens, min(tokens, SEQ))
    for n in EXPANSION_RATES:
        for hidden in WIDTHS:
            for tokens in ENDS:
                yield from residual_keys(n, hidden, tokens)
    shape = {"n": 4, "hidden": MODELS["mhc-27b"].hidden_size, "tokens": SEQ}
    for steps in SINKHORN_SWEEP:
        yield from _all_passes("mhc_pre", **shape, steps=steps)
    for n in EXPANSION_RATES:  # HC's other half is mHC's, and is priced by its rows
        for hidden in HC_WIDTHS:
            for tokens in ENDS:
                yield from _all_passes("hc_pre", n=n, hidden=hidden, tokens=tokens)


def _third_tier() -> Iterator[OpKey]:
    for name in ("llama-3-8b", "qwen3-30b-a3b"):
        yield from _model_keys(name, SEQ, SEQ)
    for name in ("deepseek-v3", "deepseek-v4-flash", "deepseek-v4-pro"):
        yield from _model_keys(name, SEQ, SEQ, LARGE_EXPERT_PARALLEL)
    yield from _uneven_keys("mhc-27b")
    for m, n, k in GEMMS:
        yield from _all_passes("gemm", m=m, n=n, k=k)
        yield from _all_passes("gemm_fp8", m=m, n=n, k=k)
    for name in ("llama-3-8b", "qwen3-30b-a3b"):
        yield from _model_keys(name, 2048, 2048)
        for tokens in (1024, 8192):
            here = {"tokens": tokens, "hidden": MODELS[name].hidden_size}
            yield from _attention_keys(MODELS[name].attention, seq=min(tokens, SEQ), **here)
        yield from end_keys(MODELS[name], 1024)
    yield from _model_keys("deepseek-v3", 2048, 2048, LARGE_EXPERT_PARALLEL)


def _uneven_keys(name: str) -> Iterator[OpKey]:
    """Experts of a rank of ``name`` where one of them is asked for more often than the others."""
    model = MODELS[name]
    assert model.moe is not None
    for experts, shares in SKEWED_EXPERTS:
        for largest in shares:
            yield from _all_passes(
                "experts_skewed", rows=SEQ * model.moe.top_k, hidden=model.hidden_size,
                ffn=model.moe.ffn_dim, experts=experts, largest=largest,
            )  # fmt: skip


def keys(tiers: Iterable[int] = TIERS) -> list[OpKey]:
    """Keys of the tiers, each once, in the order to measure them.

    Raises:
        ValueError: unknown tier.
    """
    makers = {1: _first_tier, 2: _second_tier, 3: _third_tier}
    found: dict[OpKey, None] = {}
    for tier in tiers:
        if tier not in makers:
            raise ValueError(f"tier={tier} must be one of {TIERS}")
        found.update(dict.fromkeys(makers[tier]()))
    return list(found)
