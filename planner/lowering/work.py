"""What decides the ops of every chunk: its stage's shape, and the layout of model and residual."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from mhcplan.planner.lowering.form import Form
from mhcplan.profiles.specs import SITES_PER_BLOCK, ModelSpec, ResidualSpec
from mhcplan.profiles.vocabulary import BF16, TransferKey

if TYPE_CHECKING:
    from mhcplan.planner.schedules.phase_orders import OverlapOrder


class StageShape(NamedTuple):
    """What a stage looks like; stages of one shape share their templates.

    Attributes:
        moe: for each of its blocks, whether the FFN is a mixture of experts.
        first, last: whether it holds the embedding, or the head and the loss.
        input_local, output_local: its neighbour stage is on the same rank.
    """

    moe: tuple[bool, ...]
    first: bool
    last: bool
    input_local: bool
    output_local: bool

    @property
    def num_sites(self) -> int:
        """L of this stage."""
        return SITES_PER_BLOCK * len(self.moe)


@dataclass(frozen=True)
class Work:
    """What decides the ops of every chunk: model, residual and how they are laid out.

    ``recompute_block`` is L_r in sites, or None for no recompute. ``pipe`` prices a message between
    neighbours (bytes -> key), ``expert_ranks_per_node`` how the expert group is placed.
    """

    model: ModelSpec
    residual: ResidualSpec
    tokens: int
    seq_len: int
    ep: int
    expert_ranks_per_node: int
    priority: str
    recompute_block: int | None
    overlap_recompute: bool
    pipe_ranks_per_node: int
    overlap_order: OverlapOrder
    recompute_layers: str
    receive_buffers: str
    mtp: bool

    @cached_property
    def state_bytes(self) -> int:
        """The residual state of a microbatch: [tokens, n, C] in bf16; a pipeline message."""
        return self.residual.num_rows * self.hidden_bytes

    @property
    def received_bytes(self) -> int:
        """What a receive allocates: nothing where its buffer is there from the start."""
        return self.state_bytes if self.receive_buffers == "pooled" else 0

    @cached_property
    def hidden_bytes(self) -> int:
        """[tokens, C] in bf16."""
        return self.tokens * self.model.hidden_size * BF16

    @cached_property
    def routed_bytes(self) -> int:
        """The token copies that go to experts and come back, [tokens x top_k, C] in bf16."""
        return (self.model.moe.top_k if self.model.moe else 0) * self.hidden_bytes

    @property
    def pipe_key(self) -> TransferKey:
        """Cost of one pipeline message."""
        return TransferKey("send_recv", 2, self.pipe_ranks_per_node, self.state_bytes)

    @property
    def expert_key(self) -> TransferKey:
        """Cost of one dispatch or combine; routing is balanced, so every rank sends as much."""
        ranks = self.expert_ranks_per_node
        return TransferKey("all_to_all", self.ep, ranks, self.routed_bytes)

    @cached_property
    def form(self) -> Form:
        """What of it decides more than numbers."""
        model, moe = self.model, self.model.moe
        return Form(
            residual="plain" if self.residual.is_plain else self.residual.kind,
            attention=model.attention.kind,
            shared_experts=moe is not None and moe.num_shared_experts > 0,
            mtp_moe=model.is_moe_block(model.num_blocks - 1) if self.mtp else None,
            exchanges=self.ep > 1,
            priority=self.priority, recompute_block=self.recompute_block,
            overlap_recompute=self.overlap_recompute, overlap_order=self.overlap_order,
            recompute_layers=self.recompute_layers,
        )  # fmt: skip
