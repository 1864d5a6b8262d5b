"""What decides the ops of every chunk: its stage's shape, and the layout of model and residual."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from mhcplan.profiles.specs import SITES_PER_BLOCK, ModelSpec, ResidualSpec
from mhcplan.profiles.vocabulary import BF16, TransferKey
from mhcplan.sim.build import COMPUTE, HIGH

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

    def post_stream(self, *, is_ffn: bool) -> int:
        """Stream of F_post,res (and of the plain residual's sum, which stands in its place)."""
        high = self.priority == "all" or (is_ffn and self.priority != "none")
        return HIGH if high else COMPUTE

    @property
    def pre_stream(self) -> int:
        """Stream of the coefficients and F_pre."""
        return HIGH if self.priority == "all" and not self.residual.is_plain else COMPUTE

    @property
    def recompute_stream(self) -> int:
        """Stream of the mHC recompute."""
        return HIGH if self.priority in ("recompute", "all") else COMPUTE
