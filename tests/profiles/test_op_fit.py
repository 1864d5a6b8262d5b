"""What the form knows of kernels: whole tiles, scores apart, splits, kinds that share a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.op_fit import (
    SPLIT_TOKENS,
    FittedTime,
    Roofline,
    splits,
    whole_tiles,
)
from mhcplan.profiles.store import find_profile
from mhcplan.profiles.vocabulary import OP_KINDS, OpKey, op_key
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from collections.abc import Callable

PROFILE = synthetic_profile()
ROOFLINE = Roofline(PROFILE)


def experts(rows: int, experts: int, pass_: str = "F") -> OpKey:
    return op_key("experts", pass_, rows=rows, experts=experts, hidden=2560, ffn=1536)


def skewed(rows: int, experts: int, largest: int) -> OpKey:
    shape = {"rows": rows, "experts": experts, "hidden": 2560, "ffn": 1536}
    return op_key("experts_skewed", "F", **shape, largest=largest)


def mla(pass_: str, seq: int, hidden: int, tokens: int) -> OpKey:
    return op_key(
        "attention_mla", pass_, tokens=tokens, seq=seq, hidden=hidden, heads=hidden // 80,
        nope=128, rope=64, v=128, kv_rank=512, q_rank=0,
    )  # fmt: skip


def gqa(pass_: str, seq: int, hidden: int, tokens: int) -> OpKey:
    return op_key(
        "attention_gqa", pass_, tokens=tokens, seq=seq, hidden=hidden, heads=32, kv_heads=8,
        head_dim=128,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "tiles"),
    [
        (experts(4096, 16), 16),  # 256 each
        (experts(4097, 16), 17),  # one of them 257
        (experts(24576, 72), 144),  # 341 or 342 each: two tiles
        (experts(10, 72), 10),  # most have none
        (skewed(24576, 9, 25), 24 + 8 * 9),  # 6144 of one, 2304 of each other
        (skewed(24576, 72, 25), 24 + 71 * 2),  # the others have 259 or 260
        (skewed(1000, 4, 100), 4),
    ],
)
def test_every_expert_gets_whole_tiles_of_256_rows(key: OpKey, tiles: int) -> None:
    assert whole_tiles(key) == 256 * tiles / dict(key.shape)["rows"]


def test_weight_gradients_and_other_kinds_have_no_tiles_of_rows() -> None:
    assert whole_tiles(experts(24576, 72, "W")) == 1
    assert whole_tiles(op_key("dense_ffn", "F", tokens=100, hidden=2560, ffn=12288)) == 1


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_splits_are_those_that_ran(n: int, tokens: int) -> None:
    """Measured grids: a CTA for every tile and split, where there are channels enough."""
    key = op_key("mhc_pre", "F", n=n, hidden=7168, tokens=tokens, steps=20)
    row = next(row for row in find_profile("h100-sxm").ops if row.key == key)
    (grid,) = (part.ctas for part in row.segments if "project_kernel" in part.name)
    assert splits(key, 132) * -(-tokens // SPLIT_TOKENS) == grid


def test_only_projections_are_split() -> None:
    shape = {"n": 4, "hidden": 2560, "tokens": 1024}
    assert splits(op_key("mhc_pre", "I", **shape, steps=20), 132) == 0
    assert splits(op_key("mhc_post", "F", **shape), 132) == 0


@pytest.mark.parametrize(("sites", "elements"), [(1, 4 + 1), (8, 4 + 7 + 8 + 4 * 7)])
def test_recompute_moves_no_output_of_the_last_sublayer(sites: int, elements: int) -> None:
    shape = {"n": 4, "hidden": 2560, "tokens": 4096, "sites": sites}
    assert OP_KINDS["mhc_recompute"].bytes(shape, "R") == elements * 2 * 2560 * 4096


def fitted(keys: list[OpKey], time_ns: Callable[[OpKey], float]) -> FittedTime:
    return FittedTime(keys, [round(time_ns(key)) for key in keys], ROOFLINE)


def test_time_of_splits_is_found() -> None:
    keys = [
        op_key("mhc_pre", "F", n=4, hidden=hidden, tokens=tokens, steps=20)
        for hidden in (1280, 2560, 7168)
        for tokens in (1024, 4096, 16384)
    ]

    def time_ns(key: OpKey) -> float:
        return 20_000 + 1.1 * ROOFLINE.work_ns(key)[1] + 2_000 * splits(key, 132)

    unseen = op_key("mhc_pre", "F", n=4, hidden=4096, tokens=2048, steps=20)
    assert fitted(keys, time_ns)(unseen) == pytest.approx(time_ns(unseen), rel=1e-3)


def attention_ns(key: OpKey) -> float:
    """Scores at half the products' rate."""
    kind, shape = OP_KINDS[key.kind], dict(key.shape)
    flops_ns, bytes_ns = ROOFLINE.work_ns(key)
    scores = kind.scores(shape, key.pass_) / kind.flops(shape, key.pass_)
    return 10_000 + flops_ns * (1 + scores) + 0.5 * bytes_ns


def test_kinds_of_a_family_teach_each_other() -> None:
    """Two shapes of GQA say nothing alone; MLA's kernels are the same."""
    shapes = [(seq, hidden) for seq in (1024, 2048, 4096) for hidden in (1280, 2560, 7168)]
    seen = [mla("F", seq, hidden, 4096) for seq, hidden in shapes]
    seen += [gqa("F", 2048, 4096, 2048), gqa("F", 4096, 4096, 4096)]
    row = next(row for row in PROFILE.ops if row.kind == "attention_mla" and row.pass_ == "F")
    rows = tuple(
        row.model_copy(
            update={
                "kind": key.kind, "shape": dict(key.shape), "duration_ns": round(attention_ns(key))
            }
        )
        for key in seen
    )  # fmt: skip
    costs = CostModel(PROFILE.model_copy(update={"ops": rows}))
    unseen = gqa("F", 4096, 2048, 8192)
    assert costs.op(unseen).duration_ns == pytest.approx(attention_ns(unseen), rel=2e-3)


def test_as_many_shapes_as_terms_are_left_to_the_roofline() -> None:
    keys = [op_key("norm", "F", tokens=1024 * i, hidden=2560) for i in (1, 2)]
    assert fitted(keys, lambda key: 5 * ROOFLINE(key))(keys[0]) == ROOFLINE(keys[0])


def test_what_a_product_stores_is_told_from_what_it_reads() -> None:
    keys = [
        op_key("gemm_fp8", "F", m=m, n=n, k=k)
        for m in (1024, 4096)
        for n, k in ((2560, 3072), (6144, 2560), (8192, 8192), (36864, 7168))
    ]

    def time_ns(key: OpKey) -> float:
        shape = dict(key.shape)
        flops_ns, bytes_ns = ROOFLINE.work_ns(key)
        kind = OP_KINDS[key.kind]
        stored = kind.stores(shape, key.pass_) / kind.bytes(shape, key.pass_)
        return 4_000 + 0.5 * flops_ns + 0.6 * bytes_ns * stored

    unseen = op_key("gemm_fp8", "F", m=2048, n=4096, k=1024)
    assert fitted(keys, time_ns)(unseen) == pytest.approx(time_ns(unseen), rel=1e-3)
