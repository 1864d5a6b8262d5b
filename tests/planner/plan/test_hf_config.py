"""Hugging Face configs: the presets come out of theirs; what cannot be expressed is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mhcplan.planner.cli import main
from mhcplan.planner.plan.file import read_plan
from mhcplan.planner.plan.hf_config import model_of_config
from mhcplan.planner.plan.spec import SpecError
from mhcplan.profiles.presets import find_model
from mhcplan.profiles.specs import Gqa, Mla, ModelSpec, Moe

if TYPE_CHECKING:
    from pathlib import Path

# The fields that decide a step's work, as the checkpoints of these names publish them.
LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 2048, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "use_sliding_window": False, "sliding_window": None, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
    "vocab_size": 129280, "quantization_config": {"quant_method": "fp8"},
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2", "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "vocab_size": 102400,
}  # fmt: skip
QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "use_sliding_window": False, "sliding_window": 131072, "vocab_size": 152064,
}  # fmt: skip
QWEN3_8B: dict[str, Any] = QWEN2_7B | {
    "model_type": "qwen3", "hidden_size": 4096, "head_dim": 128, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 151936,
}  # fmt: skip
QWEN2_57B_A14B: dict[str, Any] = QWEN2_7B | {
    "model_type": "qwen2_moe", "moe_intermediate_size": 2560, "num_experts": 64,
    "num_experts_per_tok": 8, "shared_expert_intermediate_size": 20480, "decoder_sparse_step": 1,
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
    "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip


def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
    file = folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return model_of_config(file)


def sizes(model: ModelSpec) -> dict[str, object]:
    """All that decides the work: without the texts."""
    return model.model_dump(exclude={"name", "source", "assumed"})


@pytest.mark.parametrize(
    ("preset", "config"),
    [("deepseek-v3", DEEPSEEK_V3), ("llama-3-8b", LLAMA_3_8B), ("qwen3-30b-a3b", QWEN3_30B_A3B)],
)
def test_presets_come_out_of_their_configs(
    tmp_path: Path, preset: str, config: dict[str, Any]
) -> None:
    assert sizes(read(tmp_path, config)) == sizes(find_model(preset))


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    said = " ".join(read(tmp_path, DEEPSEEK_V3).assumed)
    assert "multi-token-prediction" in said
    assert "bf16" in said
    assert any("norms of queries" in text for text in read(tmp_path, QWEN3_30B_A3B).assumed)
    assert read(tmp_path, LLAMA_3_8B).assumed == ()
    assert read(tmp_path, LLAMA_3_8B | {"attention_bias": True}).assumed


def test_families_differ_where_their_configs_do(tmp_path: Path) -> None:
    lite = read(tmp_path, DEEPSEEK_V2_LITE)
    assert lite.attention == Mla(num_heads=16, q_lora_rank=None)
    assert (lite.num_dense_blocks, lite.dense_ffn_dim) == (1, 10944)
    assert lite.moe == Moe(num_experts=64, top_k=6, num_shared_experts=2, ffn_dim=1408)
    dense = read(tmp_path, QWEN2_7B)
    assert (dense.moe, dense.dense_ffn_dim) == (None, 18944)
    assert dense.attention == Gqa(num_heads=28, num_kv_heads=4, head_dim=128)
    assert read(tmp_path, QWEN3_8B).attention == Gqa(num_heads=32, num_kv_heads=8, head_dim=128)
    shared = read(tmp_path, QWEN2_57B_A14B)
    assert shared.moe == Moe(num_experts=64, top_k=8, num_shared_experts=8, ffn_dim=2560)
    mixtral = read(tmp_path, MIXTRAL_8X7B)
    assert mixtral.moe == Moe(num_experts=8, top_k=2, ffn_dim=14336)
    assert mixtral.dense_ffn_dim is None
    first = read(tmp_path, QWEN3_30B_A3B | {"mlp_only_layers": [0, 1]})
    assert (first.num_dense_blocks, first.dense_ffn_dim) == (2, 6144)
    assert read(tmp_path, DEEPSEEK_V2_LITE | {"n_routed_experts": None}).moe is None


def test_defaults_are_those_of_the_family(tmp_path: Path) -> None:
    short = {k: v for k, v in LLAMA_3_8B.items() if k != "num_key_value_heads"}
    assert read(tmp_path, short).attention == Gqa(num_heads=32, num_kv_heads=32, head_dim=128)
    wide = QWEN3_8B | {"hidden_size": 5120, "head_dim": None}
    assert read(tmp_path, wide).attention == Gqa(num_heads=32, num_kv_heads=8, head_dim=128)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA_3_8B | {"model_type": "gpt2"}, "model_type='gpt2' must be one of deepseek_v2"),
        ({}, "model_type=None must be a text"),
        ({"format": "mhcplan.report"}, "format='mhcplan.report' is neither a plan file nor"),
        (LLAMA_3_8B | {"hidden_act": "gelu"}, "hidden_act='gelu' cannot be expressed"),
        (LLAMA_3_8B | {"hidden_size": None}, "hidden_size=None must be a whole number"),
        (LLAMA_3_8B | {"vocab_size": "many"}, "vocab_size='many' must be a whole number"),
        (LLAMA_3_8B | {"num_hidden_layers": True}, "num_hidden_layers=True must be a whole"),
        (LLAMA_3_8B | {"num_attention_heads": 48}, "num_attention_heads=48 must divide"),
        (LLAMA_3_8B | {"num_key_value_heads": 7}, "num_heads=32 must be a multiple of"),
        (LLAMA_3_8B | {"hidden_size": 4064}, "hidden_size=4064 must be a multiple of 64"),
        (LLAMA_3_8B | {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or"),
        (QWEN2_7B | {"use_sliding_window": True}, "use_sliding_window=True cannot be expressed"),
        (QWEN3_8B | {"layer_types": ["sliding_attention"] * 36}, "layer_types=['sliding_attention"),
        (MIXTRAL_8X7B | {"sliding_window": 4096}, "sliding_window=4096 cannot be expressed"),
        (QWEN3_30B_A3B | {"decoder_sparse_step": 2}, "decoder_sparse_step=2 cannot be"),
        (QWEN3_30B_A3B | {"mlp_only_layers": [5]}, "mlp_only_layers=[5] cannot be expressed"),
        (QWEN2_57B_A14B | {"shared_expert_intermediate_size": 5000}, "must be a multiple of"),
        (DEEPSEEK_V3 | {"moe_layer_freq": 2}, "moe_layer_freq=2 cannot be expressed"),
        (DEEPSEEK_V3 | {"num_experts_per_tok": 300}, "top_k=300 must be at most num_experts=256"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_its_key(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        read(tmp_path, config)
    assert message in str(refusal.value)
    assert "config.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpecError, match=r"config\.json: not"):
        model_of_config(file)


def test_init_writes_a_plan_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = tmp_path / "config.json", tmp_path / "plan.toml"
    config.write_text(json.dumps(DEEPSEEK_V2_LITE), encoding="utf-8")
    words = ["init", "--from", str(config), "--pp", "4", "--ep", "4", "-o", str(plan)]
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 0
    found = read_plan(plan)
    assert (found.layout.pp, found.layout.ep) == (4, 4)
    assert sizes(found.model) == sizes(model_of_config(config))
    for wrong, message in (
        (["init", "mhc-3b", "--from", str(config)], "exclude each other"),
        (["init", "--from", str(plan)], "must be a model's config.json"),
        (["init", "--from", "missing.json"], "missing.json: cannot be read"),
        (["init", "--from", str(config), "--tp", "2"], "tensor parallelism is not modelled"),
        (["init", "--from", str(config), "--set", "layout.cp=2"], "context parallelism is not"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(wrong)
        said = capsys.readouterr().err
        assert (exit_.value.code, said.count("\n")) == (2, 1)
        assert message in said
