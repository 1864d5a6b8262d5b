"""A made-up profile for tests: every op at a fixed share of its roofline, no device needed.

Durations follow the vocabulary's own flops and bytes, so that a test can work out by hand what a
look-up must return. It says nothing about any real machine.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import TYPE_CHECKING

from mhcplan.profiles.presets import HARDWARE, MODELS
from mhcplan.profiles.schema import (
    OpTiming,
    Overheads,
    Pattern,
    Profile,
    Provenance,
    Rate,
    Segment,
    TransferTiming,
)
from mhcplan.profiles.specs import Gqa, Mla, ModelSpec
from mhcplan.profiles.vocabulary import VOCABULARY, OpKey, op_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

EFFICIENCY_PERCENT = 80
COPY_BYTES_PER_SECOND = 3_000_000_000_000
GEMM_FLOPS_PER_SECOND = 700_000_000_000_000
LINK_BYTES_PER_SECOND = 360_000_000_000
LINK_LATENCY_NS = 12_000
LAUNCH_NS = 4_000
HOST_NS = 6_000
SECOND_NS = 1_000_000_000

MODEL_NAMES = ("mhc-3b", "mhc-9b", "mhc-27b")
TOKENS = (1024, 2048, 4096, 8192)
EXPANSION_RATES = (2, 4, 8)
EXPERTS_A_RANK = (1, 4, 8, 16, 64)
PARAMETERS = (10**6, 10**7, 10**8, 10**9, 10**10)
PATTERNS: tuple[Pattern, ...] = (
    "send_recv", "send_recv_both", "all_to_all", "all_reduce", "reduce_scatter", "all_gather",
)  # fmt: skip


@cache
def synthetic_profile() -> Profile:
    """Every kind and pass at the shapes of mhc-3b, mhc-9b and mhc-27b, 1024 to 8192 tokens."""
    return make_synthetic_profile(MODEL_NAMES, TOKENS)


def make_synthetic_profile(models: Sequence[str], tokens: Sequence[int]) -> Profile:
    """As :func:`synthetic_profile` for other presets and token counts."""
    keys = dict.fromkeys(
        key for name in models for count in tokens for key in model_keys(MODELS[name], count)
    )
    return Profile(
        name="synthetic",
        hardware=HARDWARE["h100-sxm"],
        provenance=(_provenance(),),
        rates=(
            Rate(name="copy_bytes", per_second=COPY_BYTES_PER_SECOND, source="measured"),
            Rate(name="gemm_bf16_flops", per_second=GEMM_FLOPS_PER_SECOND, source="measured"),
        ),
        overheads=Overheads(
            launch_ns=LAUNCH_NS,
            event_record_ns=800,
            event_wait_ns=900,
            context_bytes=500_000_000,
            communicator_bytes=200_000_000,
            allocator_margin_percent=5.0,
            source="measured",
        ),
        ops=tuple(timing(key) for key in keys),
        transfers=tuple(_transfers()),
    )


def timing(key: OpKey) -> OpTiming:
    """The synthetic row of ``key``: launch floor plus roofline at the fixed efficiency."""
    duration_ns = synthetic_ns(key)
    hbm_bytes = VOCABULARY[key.kind].bytes(dict(key.shape), key.pass_)
    waves = 4
    segment = Segment(
        name=f"{key.kind}_{key.pass_}",
        duration_ns=duration_ns,
        ctas=132 * waves,
        ctas_per_sm=1,
        cta_ns=max(1, duration_ns // waves),
        persistent=False,
        hbm_bytes=hbm_bytes,
    )
    return OpTiming.model_validate(
        {
            "kind": key.kind,
            "pass": key.pass_,
            "shape": dict(key.shape),
            "duration_ns": duration_ns,
            "spread_percent": 2.0,
            "samples": 100,
            "host_ns": HOST_NS,
            "segments": (segment,),
            "workspace_bytes": hbm_bytes // 10,
            "source": "measured",
        }
    )


def synthetic_ns(key: OpKey) -> int:
    """Nanoseconds of ``key`` in this made-up world."""
    kind, shape = VOCABULARY[key.kind], dict(key.shape)
    compute_ns = kind.flops(shape, key.pass_) * SECOND_NS / GEMM_FLOPS_PER_SECOND
    memory_ns = kind.bytes(shape, key.pass_) * SECOND_NS / COPY_BYTES_PER_SECOND
    return round((LAUNCH_NS + max(compute_ns, memory_ns)) * 100 / EFFICIENCY_PERCENT)


def model_keys(model: ModelSpec, tokens: int) -> Iterator[OpKey]:
    """Keys of every op of ``model``, at several expansion rates, experts a rank and so on."""
    for kind, axes in _shapes(model, tokens):
        for pass_ in VOCABULARY[kind].passes:
            yield op_key(kind, pass_, **axes)


def _shapes(model: ModelSpec, tokens: int) -> Iterator[tuple[str, dict[str, int]]]:
    hidden, vocab = model.hidden_size, model.vocab_size
    flat = {"hidden": hidden, "tokens": tokens}
    for n in EXPANSION_RATES:
        state = {"n": n, **flat}
        yield "mhc_pre", {**state, "steps": 20}
        for kind in ("mhc_post", "hc_pre", "hc_post", "mhc_expand", "mhc_collapse"):
            yield kind, state
        for sites in (1, 2, 4, 8, 16):
            yield "mhc_recompute", {**state, "sites": sites}
    yield "residual", flat
    yield "norm", flat
    attention = model.attention
    if isinstance(attention, Mla):
        yield "attention_mla", _mla(attention, flat)
    heads, kv_heads = (
        (attention.num_heads, attention.num_kv_heads)
        if isinstance(attention, Gqa)
        else (hidden // 128, 8)
    )
    yield "attention_gqa", {
        **flat, "seq": min(tokens, 4096), "heads": heads, "kv_heads": kv_heads, "head_dim": 128,
    }  # fmt: skip
    yield "embedding", {**flat, "vocab": vocab}
    yield "head", {**flat, "vocab": vocab}
    yield from _ffn_shapes(model, tokens)
    for parameters in PARAMETERS:
        yield "adamw", {"parameters": parameters}
        yield "zero_gradients", {"parameters": parameters}


def _mla(attention: Mla, flat: dict[str, int]) -> dict[str, int]:
    return {
        **flat,
        "seq": min(flat["tokens"], 4096),
        "heads": attention.num_heads,
        "nope": attention.qk_nope_head_dim,
        "rope": attention.qk_rope_head_dim,
        "v": attention.v_head_dim,
        "kv_rank": attention.kv_lora_rank,
        "q_rank": attention.q_lora_rank or 0,
    }


def _ffn_shapes(model: ModelSpec, tokens: int) -> Iterator[tuple[str, dict[str, int]]]:
    flat, moe = {"hidden": model.hidden_size, "tokens": tokens}, model.moe
    if model.dense_ffn_dim:
        yield "dense_ffn", {**flat, "ffn": model.dense_ffn_dim}
    if moe is None:
        return
    rows = tokens * moe.top_k
    if moe.num_shared_experts:
        yield "shared_experts", {**flat, "ffn": moe.num_shared_experts * moe.ffn_dim}
    yield "router", {**flat, "experts": moe.num_experts, "top_k": moe.top_k}
    yield "regroup", {"rows": rows, "hidden": model.hidden_size}
    yield "unpermute", {**flat, "top_k": moe.top_k}
    for experts in EXPERTS_A_RANK:
        yield "experts", {
            "rows": rows, "hidden": model.hidden_size, "ffn": moe.ffn_dim, "experts": experts,
        }  # fmt: skip


def _transfers() -> Iterator[TransferTiming]:
    for pattern, power in itertools.product(PATTERNS, range(10, 31)):
        size = 2**power
        factor = 1.0 if pattern == "all_reduce" or pattern.startswith("send") else 0.5
        moving_ns = size * factor * SECOND_NS / LINK_BYTES_PER_SECOND
        yield TransferTiming(
            pattern=pattern,
            group_size=2,
            bytes=size,
            duration_ns=round(LINK_LATENCY_NS + moving_ns),
            spread_percent=3.0,
            samples=50,
            host_ns=20_000,
            ctas=16,
            source="measured",
        )


def _provenance() -> Provenance:
    return Provenance(
        device="synthetic",
        num_devices=2,
        driver="none",
        sm_clock_mhz=0,
        power_watts=0.0,
        versions={},
        environment={},
        measured_on="2026-01-01",
        command="tests/support/synthetic_profile.py",
        code_sha256="0" * 64,
    )
