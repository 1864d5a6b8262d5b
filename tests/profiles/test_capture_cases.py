"""Cases that no plan runs: single products and unevenly used experts compute what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.kernels.layers import Env, Experts
from mhcplan.profiles.capture import grid
from mhcplan.profiles.capture.cases import OPS, make_case, skewed_splits
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.vocabulary import MEASURED_ONLY, op_key
from tests.support.synthetic_profile import synthetic_profile

ENV = Env(torch.device("cpu"), torch.float32)


def test_every_kind_that_no_plan_runs_has_a_case() -> None:
    assert set(OPS) == set(MEASURED_ONLY)
    for name, op in OPS.items():
        assert op.kind == name


def test_fp8_is_the_same_product_with_fewer_bits() -> None:
    wide = make_case("gemm", grid.TINY["gemm"], ENV)
    narrow = make_case("gemm_fp8", grid.TINY["gemm_fp8"], ENV)
    (y,), _ = wide.prepare("F")()
    (z,), _ = narrow.prepare("F")()
    a, b = wide.inputs
    assert torch.allclose(y, a @ b.t())
    assert z.dtype == torch.bfloat16
    error = (z.float() - y).norm() / y.norm()
    assert 0.001 < error < 0.1  # e4m3 has 3 bits of mantissa


@given(st.integers(1, 10_000), st.integers(2, 80), st.integers(0, 100))
def test_uneven_experts_share_all_rows(rows: int, experts: int, largest: int) -> None:
    if largest < 100 // experts:
        with pytest.raises(ValueError, match=f"largest={largest} must be"):
            skewed_splits(rows, experts, largest)
        return
    splits = skewed_splits(rows, experts, largest)
    assert (len(splits), sum(splits)) == (experts, rows)
    assert splits[0] == rows * largest // 100
    assert max(splits[1:]) - min(splits[1:]) <= 1


def test_uneven_experts_run_the_same_op() -> None:
    case = make_case("experts_skewed", grid.TINY["experts_skewed"], ENV)
    x, ends = case.inputs
    assert ends.tolist() == [12, 17, 21]
    (y,), _ = case.prepare("F")()
    even = Experts(*case.op.weights.values())
    assert torch.equal(y, even.forward(x, ends)[0][0])


def test_uneven_experts_cost_as_even_ones_until_they_are_measured() -> None:
    costs = CostModel(synthetic_profile())
    shape = {"rows": 24576, "hidden": 2560, "ffn": 1536, "experts": 9}
    even = costs.op(op_key("experts", "F", **shape))
    uneven = costs.op(op_key("experts_skewed", "F", **shape, largest=50))
    assert uneven.duration_ns == even.duration_ns
    assert uneven.source == "assumed"
    assert "shared evenly" in uneven.explanation


@pytest.mark.parametrize("kind", ["adamw", "zero_gradients"])
@pytest.mark.parametrize(("parameters", "elements"), [(64, 64), (65, 128), (6401, 6464)])
def test_a_shard_is_measured_padded_as_it_runs(kind: str, parameters: int, elements: int) -> None:
    """At an odd length kernels load element by element, 20 % slower on an H100; no trainer does."""
    case = make_case(kind, {"parameters": parameters}, ENV)
    assert case.op.weights["flat"].data.numel() == elements
