"""Models and machines by name, each with its source and what that source leaves open.

Where a public source is silent, the preset says so in ``assumed``, and predictions repeat it.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from mhcplan.profiles.specs import Gqa, HardwareSpec, Link, Mla, ModelSpec, Moe

if TYPE_CHECKING:
    from collections.abc import Mapping

MHC_PAPER = "arXiv 2512.24880v2 (mHC), appendix A.1, table 5"
V3_REPORT = "arXiv 2412.19437 (DeepSeek-V3)"
V4_REPORT = "arXiv 2606.19348 (DeepSeek-V4)"
VOCAB_SIZE = 129_280  # the tokenizer of DeepSeek-V3, the mHC paper and V4


class UnknownPresetError(ValueError):
    """No preset has this name; the message lists close matches, or all names."""


MTP_OFF = "the multi-token-prediction module is off"

# -- models ---------------------------------------------------------------------------------------

_MHC_ASSUMED = (
    "queries are not compressed, value heads are 128 wide, the dense FFN is 8 x the expert FFN wide"
    " and embeddings are untied: not stated in the paper, but with these its total and active"
    " parameter counts come out to three digits",
)


def _mhc(name: str, *, blocks: int, hidden: int, heads: int, experts: int, ffn: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        num_blocks=blocks,
        hidden_size=hidden,
        vocab_size=VOCAB_SIZE,
        attention=Mla(num_heads=heads),
        num_dense_blocks=1,
        dense_ffn_dim=8 * ffn,
        moe=Moe(num_experts=experts, top_k=6, num_shared_experts=2, ffn_dim=ffn),
        source=MHC_PAPER,
        assumed=_MHC_ASSUMED,
    )


_DEEPSEEK_V3 = ModelSpec(
    name="deepseek-v3",
    num_blocks=61,
    hidden_size=7168,
    vocab_size=VOCAB_SIZE,
    attention=Mla(num_heads=128, q_lora_rank=1536),
    num_dense_blocks=3,
    dense_ffn_dim=18432,
    moe=Moe(num_experts=256, top_k=8, num_shared_experts=1, ffn_dim=2048),
    source=f"{V3_REPORT}, section 4.2; inference/configs/config_671B.json of its repository",
    assumed=(MTP_OFF, "bf16 GEMMs, where V3 trained in FP8"),
)


def _v4(
    name: str, *, blocks: int, hidden: int, q_rank: int, heads: int, published_heads: int, moe: Moe
) -> ModelSpec:
    attention = (
        f"attention: V4's hybrid compressed sparse attention ({published_heads} heads of 512, one"
        f" shared key-value head, grouped low-rank output) is priced as causal MLA with"
        f" DeepSeek-V3's head sizes (128 + 64, values 128) and {heads} heads, the number that gives"
        " V4's attention weights; its scores thus cost more than V4's sparse ones"
    )
    return ModelSpec(
        name=name,
        num_blocks=blocks,
        hidden_size=hidden,
        vocab_size=VOCAB_SIZE,
        attention=Mla(num_heads=heads, q_lora_rank=q_rank),
        moe=moe,
        source=f"{V4_REPORT}; attention widths: config.json of its checkpoints",
        assumed=(
            attention,
            "the first three blocks are routed by hash in V4: priced like the others",
            MTP_OFF,
        ),
    )


_LLAMA_3_8B = ModelSpec(
    name="llama-3-8b",
    num_blocks=32,
    hidden_size=4096,
    vocab_size=128_256,
    attention=Gqa(num_heads=32, num_kv_heads=8),
    dense_ffn_dim=14_336,
    source="arXiv 2407.21783 (Llama 3), table 3; vocabulary: config.json of its checkpoint",
)

_QWEN3_30B_A3B = ModelSpec(
    name="qwen3-30b-a3b",
    num_blocks=48,
    hidden_size=2048,
    vocab_size=151_936,
    attention=Gqa(num_heads=32, num_kv_heads=4),
    moe=Moe(num_experts=128, top_k=8, ffn_dim=768),
    source="arXiv 2505.09388 (Qwen3), table 2; widths and vocabulary: config.json of its"
    " checkpoint",
    assumed=("norms of queries and keys a head are left out: 256 weights a block",),
)

MODELS: Mapping[str, ModelSpec] = {
    model.name: model
    for model in (
        _mhc("mhc-3b", blocks=12, hidden=1280, heads=16, experts=64, ffn=896),
        _mhc("mhc-9b", blocks=18, hidden=1920, heads=24, experts=64, ffn=1280),
        _mhc("mhc-27b", blocks=30, hidden=2560, heads=32, experts=72, ffn=1536),
        _DEEPSEEK_V3,
        _v4(
            "deepseek-v4-flash",
            blocks=43,
            hidden=4096,
            q_rank=1024,
            heads=128,
            published_heads=64,
            moe=Moe(num_experts=256, top_k=6, num_shared_experts=1, ffn_dim=2048),
        ),
        _v4(
            "deepseek-v4-pro",
            blocks=61,
            hidden=7168,
            q_rank=1536,
            heads=224,
            published_heads=128,
            moe=Moe(num_experts=384, top_k=6, num_shared_experts=1, ffn_dim=3072),
        ),
        _LLAMA_3_8B,
        _QWEN3_30B_A3B,
    )
}

# -- machines -------------------------------------------------------------------------------------

# One 400 Gbit/s InfiniBand port a GPU. The V3 report states the bandwidth, not a latency; that one
# is the constant of NCCL's own tuner for one network step.
_LATENCY_SOURCE = (
    "latency: NCCL src/graph/tuning.cc, hwLat, network, ring, Simple protocol: 14 us a step"
)
_INFINIBAND_400G = Link(
    bytes_per_second=50_000_000_000,
    latency_ns=14_000,
    source=f"{V3_REPORT}, section 3.2.2: InfiniBand, 50 GB/s; {_LATENCY_SOURCE}",
)
_DGX_INFINIBAND_400G = Link(
    bytes_per_second=50_000_000_000,
    latency_ns=14_000,
    source="NVIDIA DGX B200 user guide: eight ConnectX-7 ports of 400 Gbit/s for eight GPUs;"
    f" {_LATENCY_SOURCE}",
)

HARDWARE: Mapping[str, HardwareSpec] = {
    machine.name: machine
    for machine in (
        HardwareSpec(
            name="h100-sxm",
            num_sms=132,
            memory_bytes=80_000_000_000,
            memory_bytes_per_second=3_350_000_000_000,
            bf16_flops_per_second=989_000_000_000_000,
            inter_node=_INFINIBAND_400G,
            source="NVIDIA H100 datasheet, SXM (dense bf16 is half of the sparse 1,979 TFLOP/s);"
            " SMs: NVIDIA H100 architecture whitepaper",
        ),
        HardwareSpec(
            name="h200",
            num_sms=132,
            memory_bytes=141_000_000_000,
            memory_bytes_per_second=4_800_000_000_000,
            bf16_flops_per_second=989_000_000_000_000,
            inter_node=_INFINIBAND_400G,
            source="NVIDIA H200 datasheet, SXM; SMs: the same GH100 chip as H100",
        ),
        HardwareSpec(
            name="h800",
            num_sms=132,
            memory_bytes=80_000_000_000,
            memory_bytes_per_second=3_350_000_000_000,
            bf16_flops_per_second=989_000_000_000_000,
            inter_node=_INFINIBAND_400G,
            source="as NVIDIA H100 SXM, whose chip and memory it has: what differs is NVLink"
            " (400 instead of 900 GB/s, arXiv 2505.09343) and FP64",
        ),
        HardwareSpec(
            name="b200",
            num_sms=148,
            memory_bytes=180_000_000_000,
            memory_bytes_per_second=8_000_000_000_000,
            bf16_flops_per_second=2_250_000_000_000_000,
            inter_node=_DGX_INFINIBAND_400G,
            source="NVIDIA DGX B200 user guide and HGX B200 datasheet, an eighth of the system;"
            " SMs as a device reports them: pytorch/ao pull request 4002 (which also finds"
            " 7.67 TB/s from bus width and clock)",
        ),
    )
}


def find_model(name: str) -> ModelSpec:
    """The model preset ``name``.

    Raises:
        UnknownPresetError: no such preset; the message names close matches.
    """
    try:
        return MODELS[name]
    except KeyError:
        raise UnknownPresetError(unknown_name("model", name, MODELS)) from None


def unknown_name(what: str, name: str, known: Mapping[str, object]) -> str:
    """One line that says that ``name`` is unknown and what was probably meant."""
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    if close:
        return f"{what}={name!r} is unknown; did you mean {' or '.join(close)}?"
    return f"{what}={name!r} is unknown; known: {', '.join(known)}"
