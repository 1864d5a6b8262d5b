"""What a run is made of: model, residual and machine, as frozen pydantic models.

Letters used here and in the paper (arXiv 2512.24880): C = ``hidden_size``, n = ``expansion_rate``,
t_max = ``sinkhorn_steps``. A *block* is a transformer block (attention, then FFN); a *site* is one
sublayer with its mHC wrap, so a block has two sites and L = 2 x ``num_blocks``.

Only descriptions live here; the presets are in :mod:`mhcplan.profiles.presets`, what an op costs
in :mod:`mhcplan.profiles.costs`.
"""

from __future__ import annotations

from math import factorial
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

SITES_PER_BLOCK = 2


class Spec(BaseModel):
    """Base of every description: immutable, and an unknown field is an error, not a surprise."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )


class Mla(Spec):
    """Multi-head latent attention (DeepSeek-V2/V3).

    ``q_lora_rank`` None means that queries are not compressed.
    """

    kind: Literal["mla"] = "mla"
    num_heads: PositiveInt
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 128
    kv_lora_rank: PositiveInt = 512
    q_lora_rank: PositiveInt | None = None

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of one attention sublayer, its latent norms included, its pre-norm not."""
        qk_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        queries = (
            hidden_size * self.num_heads * qk_dim
            if self.q_lora_rank is None
            else hidden_size * self.q_lora_rank
            + self.q_lora_rank
            + self.q_lora_rank * self.num_heads * qk_dim
        )
        down = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        up = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + down + up + self.num_heads * self.v_head_dim * hidden_size


class Gqa(Spec):
    """Grouped-query attention (Llama, Qwen); ``num_kv_heads`` = ``num_heads`` is plain MHA."""

    kind: Literal["gqa"] = "gqa"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt = 128

    @model_validator(mode="after")
    def _heads_divide(self) -> Gqa:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        return self

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of one attention sublayer, its pre-norm not included."""
        return hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)


Attention = Annotated[Mla | Gqa, Field(discriminator="kind")]


class Moe(Spec):
    """A mixture of SwiGLU experts: routed ones, of which ``top_k`` see a token, and shared ones."""

    num_experts: PositiveInt
    top_k: PositiveInt
    num_shared_experts: Annotated[int, Field(ge=0)] = 0
    ffn_dim: PositiveInt

    @model_validator(mode="after")
    def _top_k_fits(self) -> Moe:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be at most num_experts={self.num_experts}")
        return self


class ModelSpec(Spec):
    """A decoder-only transformer.

    The first ``num_dense_blocks`` blocks have a dense SwiGLU of width ``dense_ffn_dim``; the others
    are MoE blocks. A model without ``moe`` is dense throughout. ``assumed`` lists, in words, what
    its public sources do not state; predictions repeat them as warnings.
    """

    name: str
    num_blocks: PositiveInt
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    attention: Attention
    num_dense_blocks: Annotated[int, Field(ge=0)] = 0
    dense_ffn_dim: PositiveInt | None = None
    moe: Moe | None = None
    tied_embeddings: bool = False
    source: str = ""
    assumed: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _ffn_is_defined(self) -> ModelSpec:
        if self.hidden_size % 64:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 64")
        if self.moe is None and self.num_dense_blocks not in (0, self.num_blocks):
            raise ValueError("num_dense_blocks needs moe: without experts every block is dense")
        if self.num_dense_blocks > self.num_blocks:
            raise ValueError(
                f"num_dense_blocks={self.num_dense_blocks} exceeds num_blocks={self.num_blocks}"
            )
        if self.dense_ffn_dim is None and (self.moe is None or self.num_dense_blocks):
            raise ValueError("dense_ffn_dim is needed: this model has dense blocks")
        return self

    @property
    def num_sites(self) -> int:
        """L of the paper: sublayers, two a block."""
        return SITES_PER_BLOCK * self.num_blocks

    def is_moe_block(self, block: int) -> bool:
        """Whether the FFN of ``block`` (counted from 0) is a mixture of experts."""
        return self.moe is not None and block >= self.num_dense_blocks


ResidualKind = Literal["mhc", "hc", "plain", "identity", "mhc-lite", "mhc-single-pass"]
EXECUTABLE: tuple[ResidualKind, ...] = ("mhc", "hc", "plain")
MAX_LITE_RATE = 4  # of mHC-lite: 8! permutations would be the largest matrix of the model


class ResidualSpec(Spec):
    """How sublayers are joined: the kind, its rate n, Sinkhorn steps, and the recompute block."""

    kind: Annotated[
        ResidualKind,
        Field(
            description="how sublayers are joined: mhc, hc and plain are what the kernels run;"
            " identity (H_res = I), mhc-lite and mhc-single-pass are priced by their bytes"
        ),
    ] = "mhc"
    expansion_rate: Annotated[
        Literal[1, 2, 4, 8, 16], Field(description="n, the rows of the residual state")
    ] = 4
    sinkhorn_steps: Annotated[
        int, Field(ge=1, strict=True, description="t_max, Sinkhorn iterations of mHC")
    ] = 20
    recompute_block: Annotated[
        Literal["auto", "none", "stage"] | Annotated[int, Field(ge=1, strict=True)],
        Field(
            description="L_r in sites; auto takes the one of least peak memory, stage one block a"
            " stage, none stores every intermediate"
        ),
    ] = "auto"

    @model_validator(mode="after")
    def _permutations_are_few(self) -> ResidualSpec:
        if self.kind == "mhc-lite" and self.expansion_rate > MAX_LITE_RATE:
            raise ValueError(
                f"expansion_rate={self.expansion_rate} must be at most {MAX_LITE_RATE} with"
                " kind=mhc-lite, which weighs all n! permutations"
            )
        return self

    @property
    def is_plain(self) -> bool:
        """n = 1 is the plain residual by definition: the Sinkhorn of a 1 x 1 matrix is 1."""
        return self.kind == "plain" or self.expansion_rate == 1

    @property
    def num_rows(self) -> int:
        """Rows of the residual state: n, or 1 for the plain residual."""
        return 1 if self.is_plain else self.expansion_rate

    @property
    def num_coefficients(self) -> int:
        """Mixing coefficients a token and site: n (H_pre) + n (H_post) + n^2 (H_res, unless I)."""
        n = self.expansion_rate
        if self.is_plain:
            return 0
        return 2 * n if self.kind == "identity" else n * n + 2 * n

    @property
    def num_logits(self) -> int:
        """Numbers a token and site that the coefficients are made of; mHC-lite has n! for H_res."""
        if self.kind == "mhc-lite" and not self.is_plain:
            return 2 * self.expansion_rate + factorial(self.expansion_rate)
        return self.num_coefficients

    @property
    def num_norms(self) -> int:
        """Norms a token and site: one of the whole state, or HC's, one of every row."""
        return 0 if self.is_plain else self.expansion_rate if self.kind == "hc" else 1

    def num_parameters(self, hidden_size: int) -> int:
        """phi, b and the alphas, one a map, of one site (paper, equations 14-16; HC's: 5)."""
        if self.is_plain:
            return 0
        n = self.expansion_rate
        alphas = 2 if self.kind == "identity" else 3
        if self.kind == "hc":
            return hidden_size * (n + 2) + self.num_coefficients + alphas
        return n * hidden_size * self.num_logits + self.num_logits + alphas


class Link(Spec):
    """One direction of one GPU's connection; ``source`` says where the figures come from."""

    bytes_per_second: PositiveInt
    latency_ns: Annotated[int, Field(ge=0)]
    source: str


class HardwareSpec(Spec):
    """A machine as its datasheet has it. What runs on it costs what its profile says.

    ``inter_node`` is the network per GPU and direction; it enters as *assumed*, with its source.
    """

    name: str
    num_sms: Annotated[int, Field(ge=1, le=10_000)]
    memory_bytes: PositiveInt
    memory_bytes_per_second: PositiveInt
    bf16_flops_per_second: PositiveInt
    gpus_per_node: PositiveInt = 8
    inter_node: Link
    source: str
