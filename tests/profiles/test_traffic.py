"""The paper's byte counts for any n, and that the vocabulary prices the fused kernels by them."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.profiles import traffic
from mhcplan.profiles.vocabulary import BF16, VOCABULARY

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


def test_examples() -> None:
    assert doctest.testmod(traffic).failed == 0
