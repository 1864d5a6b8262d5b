"""Presets: what the sources publish about parameters, and what an unknown name gets."""

from __future__ import annotations

import pytest

from mhcplan.profiles.parameters import active_parameters, model_parameters
from mhcplan.profiles.presets import (
    HARDWARE,
    MODELS,
    UnknownPresetError,
    find_model,
)
from mhcplan.profiles.specs import ResidualSpec

MHC = ResidualSpec()
PLAIN = ResidualSpec(kind="plain")


def digits(count: int, significant: int) -> float:
    return float(f"{count:.{significant - 1}e}")


@pytest.mark.parametrize(
    ("name", "vocab", "active", "total"),
    [
        ("mhc-3b", 331e6, 612e6, 2.97e9),
        ("mhc-9b", 496e6, 1.66e9, 9.18e9),
        ("mhc-27b", 662e6, 4.14e9, 27.0e9),
    ],
)
def test_paper_models_have_the_published_counts(
    name: str, vocab: float, active: float, total: float
) -> None:
    """arXiv 2512.24880v2, table 5, to its three digits."""
    counts = model_parameters(MODELS[name], MHC)
    assert digits(counts.vocab, 3) == vocab
    assert digits(counts.total, 3) == total
    assert digits(active_parameters(MODELS[name], MHC), 3) == active


@pytest.mark.parametrize(
    ("name", "residual", "total", "active", "total_digits"),
    [
        # arXiv 2412.19437, abstract: 671B, 37B; its README: without the 14B of the MTP module
        ("deepseek-v3", PLAIN, 671e9, 37e9, 3),
        # arXiv 2606.19348: 284B, 13B and 1.6T, 49B; mHC with n = 4
        ("deepseek-v4-flash", MHC, 284e9, 13e9, 3),
        ("deepseek-v4-pro", MHC, 1.6e12, 49e9, 2),
        # its repository's model card: 8.03B; all of them are active, but one vocabulary matrix
        ("llama-3-8b", PLAIN, 8.03e9, 7.5e9, 3),
        # arXiv 2505.09388, section 2: 30B, 3B; its model card: 30.5B, 3.3B with both matrices
        ("qwen3-30b-a3b", PLAIN, 30.5e9, 3.0e9, 3),
    ],
)
def test_other_models_have_the_published_counts(
    name: str, residual: ResidualSpec, total: float, active: float, total_digits: int
) -> None:
    assert digits(model_parameters(MODELS[name], residual).total, total_digits) == total
    assert digits(active_parameters(MODELS[name], residual), 2) == active


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # query: C q + q heads 512; one key-value head: C 512; output: heads 512 o_rank, then
        # groups o_rank C (config.json of the checkpoints: o_lora_rank 1024, o_groups 8 and 16)
        ("deepseek-v4-flash", 4096 * 1024 + 1024 * 64 * 512 + 4096 * 512 + 64 * 512 * 1024
         + 8 * 1024 * 4096),
        ("deepseek-v4-pro", 7168 * 1536 + 1536 * 128 * 512 + 7168 * 512 + 128 * 512 * 1024
         + 16 * 1024 * 7168),
    ],
)  # fmt: skip
def test_stand_in_for_v4_attention_has_its_weights(name: str, published: int) -> None:
    """Within a tenth: compressors and indexers, which differ by block, are the rest."""
    model = MODELS[name]
    stand_in = model.attention.num_parameters(model.hidden_size)
    assert published < stand_in < 1.1 * published


def test_every_preset_names_its_source() -> None:
    for model in MODELS.values():
        assert model.source.startswith("arXiv ")
        assert model.assumed or model is MODELS["llama-3-8b"]  # whose sources say it all
    for machine in HARDWARE.values():
        assert machine.source
        assert machine.inter_node.source


def test_paper_presets_have_leading_dense_block_and_eight_fold_ffn() -> None:
    for name in ("mhc-3b", "mhc-9b", "mhc-27b"):
        model = MODELS[name]
        assert model.moe is not None
        assert model.num_dense_blocks == 1
        assert model.dense_ffn_dim == 8 * model.moe.ffn_dim


def test_unknown_model_suggests_close_names() -> None:
    with pytest.raises(UnknownPresetError, match=r"^model='mhc-27' is unknown; did you mean mhc-2"):
        find_model("mhc-27")
    with pytest.raises(UnknownPresetError, match=r"known: mhc-3b, .*qwen3-30b-a3b$"):
        find_model("gpt")
