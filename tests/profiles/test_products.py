"""Products of ops, against the grids that were launched."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from mhcplan.profiles.products import cluster_of, products_of
from mhcplan.profiles.store import find_profile
from mhcplan.profiles.vocabulary import OP_KINDS, op_key
from mhcplan.sim.device_kernels import Parameters

NUM_SMS = 132


def test_a_grid_smaller_than_the_chip_has_a_cta_a_tile() -> None:
    """But for a few whose CTAs do two."""
    found: Counter[bool] = Counter()
    for row in find_profile("h100-sxm").ops:
        for i, product in products_of(row.key, row.segments).items():
            ctas = row.segments[i].ctas
            if product.tiles and ctas < NUM_SMS:
                found[product.tiles == ctas] += 1
                assert product.tiles in (ctas, 2 * ctas), row.key
    assert found[True] > 50
    assert found[True] / found.total() > 0.95


def test_products_have_the_operands_that_their_arithmetic_needs() -> None:
    """An op that only multiplies matrices: F makes as many features of others as I of them."""
    rows = find_profile("h100-sxm").ops
    for kind in ("shared_experts", "dense_ffn"):
        for row in (r for r in rows if r.kind == kind and r.pass_ == "F"):
            shape = dict(row.shape)
            products = products_of(row.key, row.segments).values()
            tokens, hidden, ffn = shape["tokens"], shape["hidden"], shape["ffn"]
            assert [p.operand_bytes for p in products] == [
                2 * (tokens * (2 * ffn + hidden) + 2 * ffn * hidden),
                2 * (tokens * (ffn + hidden) + ffn * hidden),
            ]
            assert OP_KINDS[kind].flops(shape, "F") == 2 * tokens * 3 * ffn * hidden


def test_kernels_that_do_not_tell_their_products_have_none() -> None:
    rows = find_profile("h100-sxm").ops
    row = next(r for r in rows if r.kind == "shared_experts" and r.pass_ == "F")
    assert products_of(row.key, row.segments)
    assert not products_of(row.key, row.segments[1:])
    assert not products_of(op_key("norm", "F", hidden=64, tokens=64), row.segments)
    unknown = [s.model_copy(update={"name": "gemm"}) for s in row.segments]
    assert not products_of(row.key, unknown)


@pytest.mark.parametrize("name", ["h100-sxm", "h200"])
def test_the_library_launches_no_more_clusters_than_are_taken_to_fit(name: str) -> None:
    """Pairs of CTAs fill the chip, clusters of four or eight leave the same SMs over."""
    largest: defaultdict[int, int] = defaultdict(int)
    for row in find_profile(name).ops:
        for segment in row.segments:
            cluster = cluster_of(segment.name)
            largest[cluster] = max(largest[cluster], segment.ctas if cluster > 1 else 0)
    fit = round(NUM_SMS * Parameters().clustered)
    assert {cluster: ctas for cluster, ctas in largest.items() if cluster > 1} == {
        2: NUM_SMS, 4: fit, 8: fit,
    }  # fmt: skip
