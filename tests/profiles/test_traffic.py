"""The paper's byte counts for any n, and that the vocabulary prices the fused kernels by them."""

from __future__ import annotations

import doctest
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.profiles import traffic
from mhcplan.profiles.specs import ResidualKind, ResidualSpec
from mhcplan.profiles.vocabulary import BF16, OP_KINDS, PRICED_ONLY, VOCABULARY

ROWS = st.integers(2, 64)


@given(ROWS)
def test_table_2_of_the_paper(n: int) -> None:
    small = n * n + 2 * n
    assert traffic.hc_unfused(n) == (5 * n + 1, 3 * n + 1, small, small)


@given(ROWS)
def test_fusing_leaves_4n_plus_2(n: int) -> None:
    rows = traffic.hc_rows(n)
    merged = rows["apply H_post"] + rows["apply H_res"] + rows["residual merge"]
    assert merged[:2] == (3 * n + 1, 3 * n)
    assert traffic.fused_post_res(n)[:2] == (n + 1, n)
    assert sum(traffic.fused_forward(n)[:2]) == 4 * n + 2


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_the_vocabulary_prices_the_fused_forward(n: int) -> None:
    """Beside a second read of x for pre-apply, which table 2 counts too."""
    shape = {"n": n, "hidden": 64, "tokens": 1, "steps": 20}
    priced = sum(VOCABULARY[kind].bytes(shape, "F") for kind in ("mhc_pre", "mhc_post"))
    assert priced == sum(traffic.fused_forward(n)[:2]) * 64 * BF16


@given(ROWS, st.sampled_from(["mhc_pre", "hc_pre"]))
def test_a_projection_has_two_flops_for_every_weight_and_token(n: int, kind: str) -> None:
    """Equation 14 makes n^2 + 2n numbers of the n C of a token; HC's 5 makes n + 2 of each row's C.
    H_pre x is 2 n C. W is the projection's; B does what I and W do."""
    weights = {"mhc_pre": (n * n + 2 * n) * n * 64, "hc_pre": (n + 2) * n * 64}[kind]
    shape = {"n": n, "hidden": 64, "tokens": 7, "steps": 20}
    flops = {pass_: OP_KINDS[kind].flops(shape, pass_) for pass_ in "FIWB"}
    assert flops["W"] == 2 * weights * 7
    assert flops["F"] == flops["W"] + 2 * n * 64 * 7
    assert flops["B"] == flops["I"] + flops["W"]


def test_examples() -> None:
    assert doctest.testmod(traffic).failed == 0


@pytest.mark.parametrize("n", [2, 4])
def test_residuals_without_kernels_are_priced_by_their_traffic(n: int) -> None:
    shape = {"n": n, "hidden": 64, "tokens": 3, "steps": 20}
    forward = {
        ("identity_pre", "identity_post"): traffic.identity_forward(n),
        ("lite_pre", "mhc_post"): traffic.fused_forward(n),
        ("single_pre", "mhc_post"): traffic.single_pass_forward(n),
    }
    for kinds, expected in forward.items():
        priced = sum(OP_KINDS[kind].bytes(shape, "F") for kind in kinds)
        assert priced == sum(expected[:2]) * 64 * 3 * BF16
    # without gradients of H_res, the state is read once less in the backward
    for pass_, less in (("F", 0), ("I", n)):
        ours = OP_KINDS["identity_post"].bytes(shape, pass_)
        assert VOCABULARY["mhc_post"].bytes(shape, pass_) - ours == less * 64 * 3 * BF16


def test_what_is_only_priced_has_no_op() -> None:
    assert not set(PRICED_ONLY) & set(VOCABULARY)


def test_parameters_and_coefficients_of_every_residual() -> None:
    def counts(kind: str, n: int) -> tuple[int, int, int]:
        spec = ResidualSpec(kind=kind, expansion_rate=n)
        return spec.num_coefficients, spec.num_logits, spec.num_parameters(100)

    assert counts("mhc", 4) == counts("mhc-single-pass", 4) == (24, 24, 24 * 400 + 24 + 3)
    assert counts("hc", 4) == (24, 24, 6 * 100 + 24 + 3)
    assert counts("identity", 4) == (8, 8, 8 * 400 + 8 + 2)
    assert counts("mhc-lite", 4) == (24, 32, 32 * 400 + 32 + 3)  # 4! = 24 permutations
    for kind in get_args(ResidualKind):
        assert counts(kind, 1) == (0, 0, 0)
    with pytest.raises(ValueError, match="expansion_rate=8 must be at most 4"):
        ResidualSpec(kind="mhc-lite", expansion_rate=8)
