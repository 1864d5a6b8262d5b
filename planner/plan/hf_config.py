"""A model's sizes from the ``config.json`` of its Hugging Face checkpoint.

Read are the families that :class:`~mhcplan.profiles.specs.ModelSpec` can express: DeepSeek-V2 and
V3, Llama, Qwen 2 and 3, dense or MoE, and Mixtral. What changes the work of a step and cannot be
expressed (a sliding window, MoE blocks in every other block, another activation) is refused by its
key; what changes it by less than a hundredth (biases, norms of heads) is left out and said in
``assumed``. Everything else in such a file (tokens, dropout, rotary bases) costs nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

from pydantic import ValidationError

from mhcplan.planner.plan.errors import short
from mhcplan.planner.plan.spec import SpecError
from mhcplan.profiles.specs import Gqa, Mla, ModelSpec, Moe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_MAX_FILE_BYTES = 1 << 20
_NO_MTP = "the multi-token-prediction module is off"
_NO_BIASES = "biases of projections are left out"
_NO_HEAD_NORMS = "norms of queries and keys a head are left out"
_BF16 = "bf16 GEMMs, whatever the checkpoint is quantized to"


def model_of_config(path: Path) -> ModelSpec:
    """Read a model from a Hugging Face ``config.json``.

    Raises:
        SpecError: unreadable file, unknown family, or a key that cannot be expressed; one line.
    """
    config = _Config(_read(path), str(path))
    if config.get("format") is not None:  # a program, a report or a trace of ours
        raise config.error("format", "is neither a plan file nor a model's config.json")
    family = config.text("model_type")
    if family not in _FAMILIES:
        raise config.error("model_type", f"must be one of {', '.join(_FAMILIES)}")
    config.must_be("hidden_act", ("silu", "swish"), "silu", "FFNs are SwiGLU")
    assumed = [_BF16] if config.get("quantization_config") else []
    try:
        return _FAMILIES[family](config, assumed)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        text = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{path}: {field}: {text}" if field else f"{path}: {text}") from None


class _Config:
    """A config file's values; errors name file and key."""

    def __init__(self, values: dict[str, object], origin: str) -> None:
        self._values, self.origin = values, origin

    def get(self, key: str) -> object:
        return self._values.get(key)

    def error(self, key: str, valid: str) -> SpecError:
        return SpecError(f"{self.origin}: {key}={short(self.get(key))} {valid}")

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(key, "must be a text")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; ``default`` where the key is not there, or null."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise self.error(key, "must be a whole number of at least 1")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value not in (None, True, False):
            raise self.error(key, "must be true or false")
        return bool(value)

    def must_be(self, key: str, valid: Iterable[object], default: object, why: str) -> None:
        """Refuse a value that cannot be expressed."""
        value = self._values.get(key, default)
        if value not in valid:
            raise self.error(key, f"cannot be expressed: {why}")


def _llama(config: _Config, assumed: list[str]) -> ModelSpec:
    if config.flag("attention_bias") or config.flag("mlp_bias"):
        assumed.append(_NO_BIASES)
    return _model(config, assumed, attention=_gqa(config))


def _qwen2(config: _Config, assumed: list[str]) -> ModelSpec:
    _full_attention(config)
    assumed.append(_NO_BIASES)
    return _model(config, assumed, attention=_gqa(config))


def _qwen3(config: _Config, assumed: list[str]) -> ModelSpec:
    _full_attention(config)
    assumed.append(_NO_HEAD_NORMS)
    return _model(config, assumed, attention=_gqa(config, head_dim=128))


def _qwen2_moe(config: _Config, assumed: list[str]) -> ModelSpec:
    _full_attention(config)
    assumed += [_NO_BIASES, "the gate of the shared expert is left out"]
    width, shared = (
        config.count(key) for key in ("moe_intermediate_size", "shared_expert_intermediate_size")
    )
    if shared % width:
        raise config.error(
            "shared_expert_intermediate_size",
            f"must be a multiple of moe_intermediate_size={width}",
        )
    return _model(
        config, assumed, attention=_gqa(config), num_dense_blocks=_mlp_only_layers(config),
        moe=_experts(config, num_shared_experts=shared // width),
    )  # fmt: skip


def _qwen3_moe(config: _Config, assumed: list[str]) -> ModelSpec:
    _full_attention(config)
    assumed.append(_NO_HEAD_NORMS)
    return _model(
        config, assumed, attention=_gqa(config, head_dim=128),
        num_dense_blocks=_mlp_only_layers(config), moe=_experts(config),
    )  # fmt: skip


def _mixtral(config: _Config, assumed: list[str]) -> ModelSpec:
    config.must_be("sliding_window", (None,), None, "attention sees the whole sequence")
    moe = Moe(
        num_experts=config.count("num_local_experts"),
        top_k=config.count("num_experts_per_tok"),
        ffn_dim=config.count("intermediate_size"),
    )
    return _model(config, assumed, attention=_gqa(config), moe=moe)


def _deepseek(config: _Config, assumed: list[str]) -> ModelSpec:
    config.must_be("moe_layer_freq", (1,), 1, "all blocks after the dense ones have experts")
    if config.flag("attention_bias"):
        assumed.append(_NO_BIASES)
    if config.get("num_nextn_predict_layers"):
        assumed.append(_NO_MTP)
    attention = Mla(
        num_heads=config.count("num_attention_heads"),
        qk_nope_head_dim=config.count("qk_nope_head_dim"),
        qk_rope_head_dim=config.count("qk_rope_head_dim"),
        v_head_dim=config.count("v_head_dim"),
        kv_lora_rank=config.count("kv_lora_rank"),
        q_lora_rank=None if config.get("q_lora_rank") is None else config.count("q_lora_rank"),
    )
    if config.get("n_routed_experts") is None:
        return _model(config, assumed, attention=attention)
    shared = config.get("n_shared_experts")
    moe = Moe(
        num_experts=config.count("n_routed_experts"),
        top_k=config.count("num_experts_per_tok"),
        num_shared_experts=config.count("n_shared_experts") if shared else 0,
        ffn_dim=config.count("moe_intermediate_size"),
    )
    dense = config.get("first_k_dense_replace")
    return _model(
        config, assumed, attention=attention, moe=moe,
        num_dense_blocks=config.count("first_k_dense_replace") if dense else 0,
    )  # fmt: skip


_FAMILIES: dict[str, Callable[[_Config, list[str]], ModelSpec]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
}


def _model(
    config: _Config,
    assumed: list[str],
    *,
    attention: Mla | Gqa,
    num_dense_blocks: int = 0,
    moe: Moe | None = None,
) -> ModelSpec:
    has_dense = moe is None or num_dense_blocks > 0
    return ModelSpec(
        name=config.text("model_type").replace("_", "-"),
        num_blocks=config.count("num_hidden_layers"),
        hidden_size=config.count("hidden_size"),
        vocab_size=config.count("vocab_size"),
        attention=attention,
        num_dense_blocks=num_dense_blocks,
        dense_ffn_dim=config.count("intermediate_size") if has_dense else None,
        moe=moe,
        tied_embeddings=config.flag("tie_word_embeddings"),
        source=f"Hugging Face config, {config.origin}",
        assumed=tuple(assumed),
    )


def _gqa(config: _Config, head_dim: int | None = None) -> Gqa:
    """Grouped-query attention; without ``head_dim`` heads share the hidden size."""
    heads = config.count("num_attention_heads")
    hidden = config.count("hidden_size")
    if head_dim is None and config.get("head_dim") is None and hidden % heads:
        raise config.error("num_attention_heads", f"must divide hidden_size={hidden}")
    return Gqa(
        num_heads=heads,
        num_kv_heads=config.count("num_key_value_heads", default=heads),
        head_dim=config.count("head_dim", default=head_dim or hidden // heads),
    )


def _full_attention(config: _Config) -> None:
    why = "attention sees the whole sequence"
    config.must_be("use_sliding_window", (False, None), False, why)
    layers = config.get("layer_types")
    if layers is not None:
        blocks = config.count("num_hidden_layers")
        config.must_be("layer_types", (["full_attention"] * blocks,), None, why)


def _experts(config: _Config, num_shared_experts: int = 0) -> Moe:
    config.must_be("decoder_sparse_step", (1,), 1, "all blocks after the dense ones have experts")
    return Moe(
        num_experts=config.count("num_experts"),
        top_k=config.count("num_experts_per_tok"),
        num_shared_experts=num_shared_experts,
        ffn_dim=config.count("moe_intermediate_size"),
    )


def _mlp_only_layers(config: _Config) -> int:
    """How many of the first blocks are dense; elsewhere they cannot be."""
    given: object = config.get("mlp_only_layers") or []
    layers = cast("list[object]", given) if isinstance(given, list) else None
    if layers is None or layers != list(range(len(layers))):
        why = "dense blocks are the first ones"
        raise config.error("mlp_only_layers", f"cannot be expressed: {why}")
    return len(layers)


def _read(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise SpecError(f"{path}: a model's config has at most {_MAX_FILE_BYTES} bytes")
        document: object = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{path}: not JSON, or cut short") from None
    if not isinstance(document, dict):
        raise SpecError(f"{path}: not a model's config: the file is no object")
    return cast("dict[str, object]", document)
