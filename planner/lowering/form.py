"""The form of a plan's chunks: which ops they have and which waits, and not what those cost.

Recording templates is the dearest part of lowering. Another n, micro-batch size or sequence length
changes no op, so templates are recorded by form, with :class:`Key` and :class:`Size` where numbers
will stand; :mod:`mhcplan.planner.lowering.numbers` fills those in for a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from mhcplan.sim.build import COMPUTE, HIGH

if TYPE_CHECKING:
    from mhcplan.planner.schedules.phase_orders import OverlapOrder
    from mhcplan.profiles.specs import ResidualKind


class Key(NamedTuple):
    """The cost key of an op; a plan's sizes decide its axes.

    Attributes:
        kind, pass_: of the vocabulary; for a transfer, its pattern and nothing.
        sites: of a recompute block.
        part: of the model, where its kind stands for more than one.
    """

    kind: str
    pass_: str = ""
    sites: int = 0
    part: Literal["", "mtp_project"] = ""


class Size(NamedTuple):
    """Bytes of a buffer: a tensor of the model, or what the op of ``key`` keeps."""

    of: Literal["hidden", "state", "routed", "received", "coefficients", "saved", "deferred"]
    key: Key | None = None


MESSAGE, EXCHANGE = Key("send_recv"), Key("all_to_all")  # between stages, and among experts

# of a site, by the residual's kind: F_pre, and F_post,res
_SITE_KINDS: dict[ResidualKind, tuple[str, str]] = {
    "mhc": ("mhc_pre", "mhc_post"),
    "hc": ("hc_pre", "hc_post"),
    "identity": ("identity_pre", "identity_post"),
    "mhc-lite": ("lite_pre", "mhc_post"),
    "mhc-single-pass": ("single_pre", "mhc_post"),
    "plain": ("", ""),
}


@dataclass(frozen=True)
class Form:
    """All that decides the ops of a chunk beside its stage's shape.

    Attributes:
        residual: its kind, ``plain`` also where n is 1.
        attention: kind of the attention.
        shared_experts: whether MoE blocks have some.
        mtp_moe: whether the block of the MTP head is a MoE block, None without a head.
        exchanges: whether experts are spread over ranks (ep > 1).
        recompute_block: L_r in sites, or None for no recompute.
        priority, overlap_recompute, overlap_order, recompute_layers: as in the plan.
    """

    residual: ResidualKind
    attention: str
    shared_experts: bool
    mtp_moe: bool | None
    exchanges: bool
    priority: str
    recompute_block: int | None
    overlap_recompute: bool
    overlap_order: OverlapOrder
    recompute_layers: str

    @property
    def is_plain(self) -> bool:
        """Whether the state is one row."""
        return self.residual == "plain"

    @property
    def pre_kind(self) -> str:
        """Kind of the coefficients and F_pre."""
        return _SITE_KINDS[self.residual][0]

    @property
    def post_kind(self) -> str:
        """Kind of F_post,res."""
        return _SITE_KINDS[self.residual][1]

    def post_stream(self, *, is_ffn: bool) -> int:
        """Stream of F_post,res (and of the plain residual's sum, which stands in its place)."""
        high = self.priority == "all" or (is_ffn and self.priority != "none")
        return HIGH if high else COMPUTE

    @property
    def pre_stream(self) -> int:
        """Stream of the coefficients and F_pre."""
        return HIGH if self.priority == "all" and not self.is_plain else COMPUTE

    @property
    def recompute_stream(self) -> int:
        """Stream of the mHC recompute."""
        return HIGH if self.priority in ("recompute", "all") else COMPUTE
