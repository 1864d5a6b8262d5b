"""Parameter counts add up: by component, by block, by stage."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.profiles.parameters import (
    ParameterCounts,
    active_parameters,
    block_parameters,
    model_parameters,
    stage_parameters,
)
from mhcplan.profiles.presets import MODELS
from mhcplan.profiles.specs import Gqa, ModelSpec, ResidualSpec

MHC = ResidualSpec()
SMALL = ModelSpec(
    name="small",
    num_blocks=3,
    hidden_size=64,
    vocab_size=100,
    attention=Gqa(num_heads=4, num_kv_heads=2, head_dim=16),
    dense_ffn_dim=128,
)


def test_counts_of_a_small_dense_model_by_hand() -> None:
    counts = model_parameters(SMALL, ResidualSpec(expansion_rate=2))
    assert counts == ParameterCounts(
        embedding=6400,
        head=6400,
        attention=3 * 64 * 16 * (2 * 4 + 2 * 2),
        norms=(2 * 3 + 1) * 64,
        dense_ffn=3 * 3 * 64 * 128,
        mhc=3 * 2 * (2 * 64 * 8 + 8 + 3),
        collapse=2 * 2 * 64 + 2 + 1,
    )
    assert counts.total == counts.replicated
    assert active_parameters(SMALL, ResidualSpec(expansion_rate=2)) == counts.total - 6400


def test_phi_of_the_27b_model() -> None:
    """nC (n^2 + 2n) a site: 245,760 weights, 14.7 M in all (reference: paper section 1)."""
    counts = model_parameters(MODELS["mhc-27b"], MHC)
    assert counts.mhc == 60 * (4 * 2560 * 24 + 24 + 3)


@pytest.mark.parametrize("residual", [ResidualSpec(kind="plain"), ResidualSpec(expansion_rate=1)])
def test_plain_residual_has_no_parameters(residual: ResidualSpec) -> None:
    counts = model_parameters(MODELS["mhc-9b"], residual)
    assert counts.mhc == counts.collapse == 0


def test_hc_has_one_theta_row_per_output() -> None:
    """Equation 5: theta_pre and theta_post 1 x C, theta_res n x C."""
    block = block_parameters(SMALL, ResidualSpec(kind="hc", expansion_rate=2), 0)
    assert block.mhc == 2 * (64 * 4 + 8 + 3)


@given(
    name=st.sampled_from(sorted(MODELS)),
    cuts=st.lists(st.integers(1, 60), max_size=8, unique=True),
)
def test_stages_add_up_to_the_model(name: str, cuts: list[int]) -> None:
    model = MODELS[name]
    bounds = [0, *sorted(c for c in cuts if c < model.num_blocks), model.num_blocks]
    stages = [stage_parameters(model, MHC, range(a, b)) for a, b in pairwise(bounds)]
    assert sum(stages, ParameterCounts()) == model_parameters(model, MHC)


def test_tied_embeddings_are_held_once_by_one_stage_and_twice_by_two() -> None:
    tied = SMALL.model_copy(update={"tied_embeddings": True})
    assert model_parameters(tied, MHC).vocab == 6400
    both = stage_parameters(tied, MHC, [0]) + stage_parameters(tied, MHC, [1, 2])
    assert both.vocab == 2 * 6400


def test_tied_model_uses_its_one_vocabulary_matrix() -> None:
    tied = SMALL.model_copy(update={"tied_embeddings": True})
    assert active_parameters(tied, MHC) == model_parameters(tied, MHC).total
    assert active_parameters(tied, MHC) == active_parameters(SMALL, MHC)


def test_block_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block=3 is not in 0\.\.2 of small"):
        block_parameters(SMALL, MHC, 3)
