"""How many parameters a model has, by component, block and stage.

What a component is follows the paper (arXiv 2512.24880, table 5 and equations 14-16): its total
counts every weight, its active count one of the two vocabulary matrices, phi, and the ``top_k``
routed experts that a token sees. Norm weights are counted; biases that loss-free balancing adds to
the router's scores are not, as no gradient trains them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import add, attrgetter
from typing import TYPE_CHECKING

from mhcplan.profiles.specs import SITES_PER_BLOCK
from mhcplan.profiles.vocabulary import swiglu_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mhcplan.profiles.specs import ModelSpec, ResidualSpec


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a part of a model, by component.

    Attributes:
        embedding, head: the vocabulary matrices; ``head`` is 0 where it shares the embedding's.
        attention: with the norms of its latents.
        norms: the norm before each sublayer, and the final one.
        dense_ffn, shared_experts, router: as named.
        routed_experts: all of them; the one part that expert parallelism splits.
        mhc: phi, b and the three alphas of each site.
        collapse: phi, b and alpha of the exit, which weighs n rows into one.
        mtp: the projection of a multi-token-prediction head, which is no part of the model's count.
    """

    embedding: int = 0
    head: int = 0
    attention: int = 0
    norms: int = 0
    dense_ffn: int = 0
    shared_experts: int = 0
    router: int = 0
    routed_experts: int = 0
    mhc: int = 0
    collapse: int = 0
    mtp: int = 0

    @property
    def vocab(self) -> int:
        """Both vocabulary matrices: the paper's "vocab params"."""
        return self.embedding + self.head

    @property
    def total(self) -> int:
        """All of them."""
        return sum(_values(self))

    @property
    def replicated(self) -> int:
        """What every rank of an expert-parallel group holds: all but the routed experts."""
        return self.total - self.routed_experts

    def __add__(self, other: ParameterCounts) -> ParameterCounts:
        """Component by component."""
        return ParameterCounts(*map(add, _values(self), _values(other)))


_values = attrgetter(*(field.name for field in fields(ParameterCounts)))


def block_parameters(model: ModelSpec, residual: ResidualSpec, block: int) -> ParameterCounts:
    """Parameters of transformer block ``block``, counted from 0: two sublayers and their sites.

    Raises:
        ValueError: the model has no such block.
    """
    if not 0 <= block < model.num_blocks:
        raise ValueError(f"block={block} is not in 0..{model.num_blocks - 1} of {model.name}")
    hidden, moe = model.hidden_size, model.moe
    attention = model.attention.num_parameters(hidden)
    norms = SITES_PER_BLOCK * hidden
    mhc = SITES_PER_BLOCK * residual.num_parameters(hidden)
    if moe is None or not model.is_moe_block(block):
        dense_ffn = swiglu_weights(hidden, model.dense_ffn_dim or 0)
        return ParameterCounts(attention=attention, norms=norms, dense_ffn=dense_ffn, mhc=mhc)
    expert = swiglu_weights(hidden, moe.ffn_dim)
    return ParameterCounts(
        attention=attention,
        norms=norms,
        shared_experts=moe.num_shared_experts * expert,
        router=hidden * moe.num_experts,
        routed_experts=moe.num_experts * expert,
        mhc=mhc,
    )


def entry_parameters(model: ModelSpec) -> ParameterCounts:
    """What the first stage holds besides its blocks: the embedding (expanding it has no weight)."""
    return ParameterCounts(embedding=model.vocab_size * model.hidden_size)


def exit_parameters(model: ModelSpec, residual: ResidualSpec) -> ParameterCounts:
    """What the last stage holds besides its blocks: collapse, final norm and head.

    A tied head is counted here too: a stage of its own holds its own copy of the matrix.
    """
    hidden, n = model.hidden_size, residual.num_rows
    return ParameterCounts(
        head=model.vocab_size * hidden,
        norms=hidden,
        # phi n x nC, b n, alpha: as DeepSeek-V4's checkpoints have it (hc_head_fn, _base, _scale)
        collapse=0 if residual.is_plain else n * n * hidden + n + 1,
    )


def mtp_parameters(model: ModelSpec, residual: ResidualSpec) -> ParameterCounts:
    """A multi-token-prediction head of depth 1 (arXiv 2412.19437, section 2.2): projection, one
    block of the last kind, its norms and exit; embedding and output head are the model's own."""
    end = exit_parameters(model, residual)
    own = ParameterCounts(
        norms=end.norms + 2 * model.hidden_size,
        collapse=end.collapse,
        mtp=2 * model.hidden_size * model.hidden_size,
    )
    return own + block_parameters(model, residual, model.num_blocks - 1)


def stage_parameters(
    model: ModelSpec, residual: ResidualSpec, blocks: Iterable[int]
) -> ParameterCounts:
    """Parameters of a stage that holds ``blocks``; the embedding goes with block 0, the exit with
    the last block.

    Raises:
        ValueError: the model has no such block.
    """
    held = tuple(blocks)
    counts = ParameterCounts()
    alike: dict[bool, ParameterCounts] = {}  # blocks are of two kinds only
    for block in held:
        is_moe = model.is_moe_block(block)
        if is_moe not in alike or not 0 <= block < model.num_blocks:
            alike[is_moe] = block_parameters(model, residual, block)
        counts += alike[is_moe]
    first, last = 0 in held, model.num_blocks - 1 in held
    if first:
        counts += entry_parameters(model)
    if last:
        counts += exit_parameters(model, residual)
    if first and last and model.tied_embeddings:
        counts += ParameterCounts(head=-counts.head)
    return counts


def model_parameters(model: ModelSpec, residual: ResidualSpec) -> ParameterCounts:
    """Parameters of the whole model."""
    return stage_parameters(model, residual, range(model.num_blocks))


def active_parameters(model: ModelSpec, residual: ResidualSpec) -> int:
    """Parameters that one token uses, by the paper's count (table 5): one vocabulary matrix, the
    ``top_k`` experts that its router picks, and everything else.
    """
    counts = model_parameters(model, residual)
    idle = 0
    if model.moe is not None:
        idle = counts.routed_experts * (model.moe.num_experts - model.moe.top_k)
        idle //= model.moe.num_experts
    return counts.total - counts.head - idle
