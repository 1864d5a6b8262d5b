"""In which order the phases of chunks are issued: alone, and an F beside a B.

A phase is a box of figure 4 of the mHC paper (arXiv 2512.24880). What is in it is told by whoever
emits it: :class:`mhcplan.planner.lowering.chunks.Chunk` for plans,
:mod:`mhcplan.planner.measured.replay` for a published trace. Both so follow one order.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Literal, Protocol

OverlapOrder = Literal["mhc", "v3"]


class Phases(Protocol):
    """A chunk of some blocks; a method emits a phase of one block. ``A`` attention, ``M`` FFN."""

    def attention_forward(self, block: int) -> None:
        """F_pre^A, ATTN, F_post,res^A."""

    def ffn_enter_forward(self, block: int) -> None:
        """F_pre^M and the router."""

    def dispatch_forward(self, block: int) -> None:
        """DISPATCH(F)."""

    def ffn_forward(self, block: int) -> None:
        """MLP(F)."""

    def combine_forward(self, block: int) -> None:
        """COMBINE(F)."""

    def ffn_leave_forward(self, block: int) -> None:
        """F_post,res^M."""

    def recompute(self, block: int, *, of_ffn: bool) -> None:
        """Recompute before the backward of this sublayer, if it needs one."""

    def ffn_leave_backward(self, block: int) -> None:
        """F_post,res^M(B)."""

    def combine_backward(self, block: int) -> None:
        """COMBINE(B)."""

    def ffn_backward(self, block: int) -> None:
        """MLP(B)."""

    def dispatch_backward(self, block: int) -> None:
        """DISPATCH(B)."""

    def ffn_weights(self, block: int) -> None:
        """MLP(W)."""

    def ffn_enter_backward(self, block: int) -> None:
        """F_pre^M(B)."""

    def attention_backward(self, block: int) -> None:
        """F_post,res^A(B), ATTN(B), F_pre^A(B)."""

    def attention_weights(self, block: int) -> None:
        """ATTN(W)."""


def forward_layer(c: Phases, k: int) -> None:
    """F of block ``k``."""
    c.attention_forward(k)
    c.ffn_enter_forward(k)
    c.dispatch_forward(k)
    c.ffn_forward(k)
    c.combine_forward(k)
    c.ffn_leave_forward(k)


def backward_layer(c: Phases, k: int, *, weights: bool) -> None:
    """B of block ``k`` after its recompute, or with ``weights`` False its I. DISPATCH(B) runs
    beside MLP(W)."""
    c.ffn_leave_backward(k)
    c.combine_backward(k)
    c.ffn_backward(k)
    c.dispatch_backward(k)
    if weights:
        c.ffn_weights(k)
    c.ffn_enter_backward(k)
    c.recompute(k, of_ffn=False)
    c.attention_backward(k)
    if weights:
        c.attention_weights(k)


def overlapped_layers(
    f: Phases, num_forward: int, b: Phases, num_backward: int, order: OverlapOrder
) -> None:
    """All blocks of F, first to last, beside those of B, last to first."""
    for k, m in zip_longest(range(num_forward), reversed(range(num_backward))):
        _overlapped_layer(f, k, b, m, order)


def _overlapped_layer(
    f: Phases, k: int | None, b: Phases, m: int | None, order: OverlapOrder
) -> None:
    """Block k of the forward beside block m of the backward; a chunk that has no block left (None)
    sits out.

    One period of figure 4, from the recompute at its right end to ATTN(W): on the compute stream
    Recompute(B) F_pre^A(F) ATTN(F) F_post^A(F) F_pre^M(F) MLP(B) MLP(W) MLP(F) F_pre^M(B)
    F_post^A(B) ATTN(B) F_pre^A(B) ATTN(W); on the expert stream COMBINE(B) DISPATCH(F) DISPATCH(B)
    COMBINE(F); F_post^M(B) and F_post^M(F) on the high-priority stream, each between two of these.

    ``v3`` is figure 4 of DeepSeek-V3 (arXiv 2412.19437): the same lanes (its barriers follow from
    what the boxes read), but F has no box between COMBINE(F) and its next ATTN(F), so F_post^M(F)
    is issued with that ATTN(F), behind ATTN(W).
    """
    if m is not None:
        b.recompute(m, of_ffn=True)
        b.ffn_leave_backward(m)
        b.combine_backward(m)
    if k is not None:
        f.attention_forward(k)
        f.ffn_enter_forward(k)
        f.dispatch_forward(k)
    if m is not None:
        b.ffn_backward(m)
        b.dispatch_backward(m)
        b.ffn_weights(m)
    if k is not None:
        f.ffn_forward(k)
        f.combine_forward(k)
    if m is not None:
        b.ffn_enter_backward(m)
        b.recompute(m, of_ffn=False)
        b.attention_backward(m)
    if m is not None and order == "v3":
        b.attention_weights(m)
    if k is not None:
        f.ffn_leave_forward(k)
    if m is not None and order == "mhc":
        b.attention_weights(m)
