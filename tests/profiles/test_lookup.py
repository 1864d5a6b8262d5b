"""Look-up of ops: verbatim, interpolated, extrapolated, refused; and no constant of its own."""

from __future__ import annotations

import random
import re
import shlex
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.profiles.capture.options import parser
from mhcplan.profiles.costs import CostMissing
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.op_fit import Roofline
from mhcplan.profiles.schema import Profile, ProfileError
from mhcplan.profiles.vocabulary import (
    NO_COST,
    TRANSFER_PATTERNS,
    VOCABULARY,
    OpKey,
    TransferKey,
    op_key,
    parse_key,
)
from tests.support.scaling import scaled
from tests.support.synthetic_profile import LAUNCH_NS, synthetic_ns, synthetic_profile, timing

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.profiles.schema import OpTiming

COSTS = CostModel(synthetic_profile())
MLA = {"hidden": 2560, "heads": 32, "nope": 128, "rope": 64, "v": 128, "kv_rank": 512}


def post(**shape: int) -> OpKey:
    return op_key("mhc_post", "F", **{"n": 4, "hidden": 2560, "tokens": 4096, **shape})


def without(profile: Profile, unwanted: Callable[[OpTiming], bool]) -> CostModel:
    kept = tuple(row for row in profile.ops if not unwanted(row))
    return CostModel(profile.model_copy(update={"ops": kept}))


def test_measured_shapes_cost_what_was_measured(profile: Profile, costs: CostModel) -> None:
    for row in profile.ops:
        cost = costs.op(row.key)
        assert cost.duration_ns == row.duration_ns
        assert cost.host_ns == row.host_ns
        assert cost.spread_percent == row.spread_percent
        assert cost.segments == row.segments
        assert cost.workspace_bytes == row.workspace_bytes
        assert cost.source == "measured"


def test_every_kind_and_pass_is_covered_by_the_synthetic_profile(profile: Profile) -> None:
    """The other tests speak for the whole vocabulary only if this holds."""
    assert {(row.kind, row.pass_) for row in profile.ops} == {
        (kind, pass_) for kind, op in VOCABULARY.items() for pass_ in op.passes
    }


@given(
    kind=st.sampled_from(["mhc_post", "mhc_expand", "hc_post"]),
    n=st.integers(2, 8),
    hidden=st.integers(20, 40).map(lambda i: 64 * i),
    tokens=st.integers(1024, 8192),
)
def test_roofline_data_is_reproduced_between_measured_shapes(
    kind: str, n: int, hidden: int, tokens: int
) -> None:
    key = op_key(kind, "F", n=n, hidden=hidden, tokens=tokens)
    cost = COSTS.op(key)
    assert cost.duration_ns == pytest.approx(synthetic_ns(key), rel=1e-3)
    assert cost.source in ("interpolated", "measured")


@given(tokens=st.lists(st.integers(300, 30_000), min_size=2, max_size=6))
def test_more_tokens_never_cost_less(tokens: list[int]) -> None:
    for pass_ in "FIW":
        keys = [
            op_key("dense_ffn", pass_, tokens=t, hidden=2560, ffn=12288) for t in sorted(tokens)
        ]
        times = [COSTS.op(key).duration_ns for key in keys]
        assert times == sorted(times)


def power_law(row: OpTiming) -> OpTiming:
    """A slowdown that grows with tokens and falls with hidden, by powers."""
    slower = (row.shape["tokens"] / 1024) ** 0.3 * (row.shape["hidden"] / 1280) ** -0.5
    return row.model_copy(update={"duration_ns": round(row.duration_ns * slower)})


def test_power_law_slowdown_is_followed_where_a_grid_point_is_missing(profile: Profile) -> None:
    rows = tuple(power_law(row) for row in profile.ops if row.kind == "mhc_post")
    held_out = next(r for r in rows if r.key == post(hidden=1920, tokens=2048))
    bent = profile.model_copy(update={"ops": tuple(r for r in rows if r is not held_out)})
    cost = CostModel(bent).op(held_out.key)
    assert cost.source == "interpolated"
    assert cost.duration_ns == pytest.approx(held_out.duration_ns, rel=0.02)


def test_power_law_slowdown_is_followed_off_the_grid(profile: Profile) -> None:
    rows = tuple(power_law(row) for row in profile.ops if row.kind == "mhc_post")
    bent = CostModel(profile.model_copy(update={"ops": rows}))
    key = post(hidden=2240, tokens=3000)
    expected = power_law(timing(key)).duration_ns
    assert bent.op(key).duration_ns == pytest.approx(expected, rel=0.02)


@given(
    n=st.sampled_from([2, 4, 8]),
    hidden=st.integers(20, 40).map(lambda i: 64 * i),
    tokens=st.integers(1024, 8192),
)
def test_launch_arithmetic_and_bytes_of_each_n_are_found(n: int, hidden: int, tokens: int) -> None:
    """Kernels that pay 9 us a launch and miss the copy rate by a factor of their own."""
    profile = synthetic_profile()
    roofline = Roofline(profile)

    def time_ns(key: OpKey) -> int:
        return round(9_000 + dict(key.shape)["n"] * roofline.work_ns(key)[1])

    rows = tuple(
        row.model_copy(update={"duration_ns": time_ns(row.key)})
        for row in profile.ops
        if row.kind == "mhc_post"
    )
    key = post(n=n, hidden=hidden, tokens=tokens)
    cost = CostModel(profile.model_copy(update={"ops": rows})).op(key)
    assert cost.duration_ns == pytest.approx(time_ns(key), rel=1e-3)


def test_one_missing_corner_falls_back_on_its_nearest_rows(profile: Profile) -> None:
    corner = post(n=2, hidden=1280, tokens=1024)
    model = without(profile, lambda row: row.key == corner)
    cost = model.op(corner)
    assert cost.source == "interpolated"
    assert cost.duration_ns == pytest.approx(synthetic_ns(corner), rel=1e-3)


def test_answers_do_not_depend_on_the_order_of_rows(profile: Profile, costs: CostModel) -> None:
    rows = list(profile.ops)
    random.Random(1).shuffle(rows)
    shuffled = CostModel(profile.model_copy(update={"ops": tuple(rows)}))
    for key in (post(tokens=3000), post(hidden=2240, tokens=5000), post(n=3, hidden=1600)):
        assert shuffled.op(key) == costs.op(key)


@pytest.mark.parametrize(
    ("shape", "source"),
    [
        ({"tokens": 8192}, "measured"),
        ({"tokens": 8191}, "interpolated"),
        ({"tokens": 8193}, "extrapolated"),
        ({"tokens": 4 * 8192}, "extrapolated"),
        ({"tokens": 256}, "extrapolated"),
        ({"hidden": 7168}, "extrapolated"),
        ({"n": 16}, "extrapolated"),
        ({"n": 3}, "interpolated"),
    ],
)
def test_source_says_how_far_the_shape_is(
    costs: CostModel, shape: dict[str, int], source: str
) -> None:
    cost = costs.op(post(**shape))
    assert cost.source == source
    assert cost.duration_ns == pytest.approx(synthetic_ns(post(**shape)), rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "axis", "measured"),
    [
        ({"tokens": 4 * 8192 + 1}, "tokens", "1024 to 8192"),
        ({"tokens": 255}, "tokens", "1024 to 8192"),
        ({"hidden": 64}, "hidden", "1280 to 2560"),
    ],
)
def test_beyond_four_times_is_refused_with_the_command_to_measure(
    costs: CostModel, shape: dict[str, int], axis: str, measured: str
) -> None:
    key = post(**shape)
    with pytest.raises(CostMissing) as refusal:
        costs.op(key)
    line = str(refusal.value)
    assert "\n" not in line
    assert f"mhc_post.F was measured for {axis} {measured}; {axis}={shape[axis]} is more" in line
    assert line.endswith(f"mhcplan profile measure --op '{key}'")


def test_sinkhorn_steps_and_head_sizes_are_extrapolated_within_four_times(costs: CostModel) -> None:
    pre = {"n": 4, "hidden": 2560, "tokens": 4096}
    assert costs.op(op_key("mhc_pre", "F", steps=10, **pre)).source == "extrapolated"
    with pytest.raises(CostMissing, match=r"measured for steps 20; steps=100 is more than 4x"):
        costs.op(op_key("mhc_pre", "F", steps=100, **pre))
    key = op_key("attention_mla", "F", tokens=4096, seq=4096, q_rank=0, **{**MLA, "v": 256})
    cost = costs.op(key)
    assert cost.source == "extrapolated"
    assert "v=256, measured 128 to 128" in cost.explanation
    assert cost.duration_ns == pytest.approx(synthetic_ns(key), rel=1e-3)


def test_query_compression_that_was_not_measured_is_extrapolated(costs: CostModel) -> None:
    key = op_key("attention_mla", "F", tokens=4096, seq=4096, q_rank=1536, **MLA)
    cost = costs.op(key)
    assert cost.source == "extrapolated"
    assert "q_rank=1536, measured 0 to 0" in cost.explanation
    assert cost.duration_ns == pytest.approx(synthetic_ns(key), rel=1e-3)


@pytest.mark.parametrize(
    "key",
    [
        op_key("norm", "F", tokens=10**7, hidden=2560),
        TransferKey("all_to_all", 64, 64, 2**20),
    ],
)
def test_the_command_that_an_error_names_exists(costs: CostModel, key: OpKey | TransferKey) -> None:
    with pytest.raises(CostMissing) as refusal:
        costs.op(key) if isinstance(key, OpKey) else costs.transfer(key)
    program = "mhcplan profile measure"
    _, _, words = str(refusal.value).partition(program)
    args = parser(program).parse_args(shlex.split(words))
    assert args.part == ["comm"] or parse_key(args.op[0]) == key


def test_unmeasured_kind_is_refused(profile: Profile) -> None:
    model = without(profile, lambda row: row.kind == "norm" and row.pass_ == "R")
    key = op_key("norm", "R", tokens=4096, hidden=2560)
    with pytest.raises(CostMissing, match=re.escape("norm.R was not measured; measure it:")):
        model.op(key)


def test_unmeasured_hc_is_assumed_from_mhc(profile: Profile) -> None:
    model = without(profile, lambda row: row.kind.startswith("hc_"))
    shape = {"n": 4, "hidden": 2560, "tokens": 4096}
    cost = model.op(op_key("hc_pre", "F", **shape))
    assert cost.source == "assumed"
    assert "priced as mhc_pre (measured, 20 Sinkhorn steps)" in cost.explanation
    assert cost.duration_ns == synthetic_ns(op_key("mhc_pre", "F", steps=20, **shape))


def test_hc_post_costs_what_mhc_post_does_whose_kernels_it_runs(profile: Profile) -> None:
    model = without(profile, lambda row: row.kind.startswith("hc_"))
    shape = {"n": 4, "hidden": 2560, "tokens": 4096}
    cost = model.op(op_key("hc_post", "I", **shape))
    assert (cost.source, cost.duration_ns) == (
        "measured",
        model.op(op_key("mhc_post", "I", **shape)).duration_ns,
    )
    assert cost.explanation.startswith("hc_post runs mhc_post: median of")


@pytest.mark.parametrize("pass_", ["F", "B"])
def test_unmeasured_collapse_is_assumed_from_a_site_by_roofline(
    profile: Profile, pass_: str
) -> None:
    """(n + 1) C bytes forward against a site's (2n + 1) C."""
    model = without(profile, lambda row: row.kind == "mhc_collapse")
    key = op_key("mhc_collapse", pass_, n=4, hidden=2560, tokens=4096)
    cost = model.op(key)
    assert cost.source == "assumed"
    assert "priced as mhc_pre" in cost.explanation
    assert cost.duration_ns == pytest.approx(synthetic_ns(key), rel=1e-3)
    assert cost.segments[0].duration_ns <= cost.duration_ns


@pytest.mark.parametrize("parameters", [1, 100, 10**12])
def test_any_length_of_an_optimizer_step_has_a_cost(costs: CostModel, parameters: int) -> None:
    key = op_key("adamw", "O", parameters=parameters)
    cost = costs.op(key)
    assert cost.source == "extrapolated"
    assert cost.duration_ns == pytest.approx(synthetic_ns(key), rel=1e-3)


def test_hc_without_mhc_is_refused(profile: Profile) -> None:
    model = without(profile, lambda row: row.kind in ("hc_post", "mhc_post"))
    with pytest.raises(CostMissing, match=r"mhc_post\.F was not measured"):
        model.op(op_key("hc_post", "F", n=4, hidden=2560, tokens=4096))


def test_assumed_neighbour_makes_the_cost_assumed_and_is_cited(profile: Profile) -> None:
    cited = {"source": "assumed", "citation": "datasheet, page 3"}
    rows = tuple(
        row.model_copy(update=cited) if row.key == post(tokens=2048) else row for row in profile.ops
    )
    cost = CostModel(profile.model_copy(update={"ops": rows})).op(post(tokens=3000))
    assert cost.source == "assumed"
    assert "datasheet, page 3" in cost.explanation


def test_stand_in_takes_the_fewest_measured_sinkhorn_steps(profile: Profile) -> None:
    shape = {"n": 4, "hidden": 2560, "tokens": 4096}
    fewer = next(r for r in profile.ops if r.key == op_key("mhc_pre", "F", steps=20, **shape))
    fewer = fewer.model_copy(
        update={"shape": {**shape, "steps": 5}, "duration_ns": fewer.duration_ns - 1000}
    )
    rows = tuple(row for row in profile.ops if row.kind != "hc_pre")
    model = CostModel(profile.model_copy(update={"ops": (*rows, fewer)}))
    assert model.op(op_key("hc_pre", "F", **shape)).duration_ns == fewer.duration_ns


def test_spread_is_the_largest_of_the_neighbours(profile: Profile) -> None:
    rows = tuple(
        row.model_copy(update={"spread_percent": 9.0}) if row.key == post(tokens=2048) else row
        for row in profile.ops
    )
    model = CostModel(profile.model_copy(update={"ops": rows}))
    assert model.op(post(tokens=3900)).spread_percent == 9.0
    assert model.op(post(tokens=5000)).spread_percent == 2.0


def test_segments_scale_with_the_op(profile: Profile, costs: CostModel) -> None:
    key = post(tokens=6000)
    cost = costs.op(key)
    row = next(row for row in profile.ops if row.key == post(tokens=8192))
    (segment,), (measured,) = cost.segments, row.segments
    assert segment.duration_ns <= cost.duration_ns
    assert segment.duration_ns == pytest.approx(cost.duration_ns, rel=1e-3)
    assert segment.hbm_bytes == pytest.approx(measured.hbm_bytes * 6000 / 8192, rel=1e-3)
    assert segment.ctas == pytest.approx(measured.ctas * 6000 / 8192, rel=1e-2)
    busy, was_busy = segment.ctas * segment.cta_ns, measured.ctas * measured.cta_ns
    assert busy / was_busy == pytest.approx(cost.duration_ns / row.duration_ns, rel=1e-2)


def test_a_busy_host_does_not_make_one_shape_dear(profile: Profile) -> None:
    """Only what an op launches counts: a shape of twice the kernels takes twice the host's time."""
    key, other = post(), post(tokens=8192)
    changed = {key: {"host_ns": 10**6}}
    (twice,) = (row.segments * 2 for row in profile.ops if row.key == other)
    changed[other] = {"segments": twice}
    rows = [row.model_copy(update=changed.get(row.key, {})) for row in profile.ops]
    model = CostModel(profile.model_copy(update={"ops": tuple(rows)}))
    usual = model.op(post(tokens=1024)).host_ns
    assert model.op(key).host_ns == usual < 10**6
    assert model.op(other).host_ns == 2 * usual


def test_kernels_of_a_graph_follow_each_other_sooner(profile: Profile) -> None:
    key = next(row.key for row in profile.ops if row.segments)
    rows = [
        row.model_copy(update={"segments": row.segments * 2}) if row.key == key else row
        for row in profile.ops
    ]
    profile = profile.model_copy(update={"ops": tuple(rows)})
    found = {"graph_gap_ns": 700, "graph_launch_ns": 2000}
    overheads = profile.overheads.model_copy(update=found)
    model = CostModel(profile.model_copy(update={"overheads": overheads}))
    send = "send_recv 2/2 1048576"
    issued = model.table([str(key), send, NO_COST])
    captured = model.table([str(key), send, NO_COST], graphs_begun=[0.25, 1, 1])
    sooner = 700 * len(model.op(key).segments)
    more = captured.duration_ns - issued.duration_ns
    assert more.tolist() == [500 - sooner, 2000 - 700, 0]
    assert issued.host_ns.all()
    assert not captured.host_ns.any()


def test_persistent_kernels_keep_their_ctas(profile: Profile) -> None:
    rows = tuple(
        row.model_copy(
            update={"segments": tuple(s.model_copy(update={"persistent": True, "ctas": 132})
                                      for s in row.segments)}
        )
        for row in profile.ops
        if row.kind == "mhc_post"
    )  # fmt: skip
    cost = CostModel(profile.model_copy(update={"ops": rows})).op(post(tokens=6000))
    assert cost.segments[0].ctas == 132


def test_kept_bytes_are_the_formula_unless_measured(profile: Profile, costs: CostModel) -> None:
    key = op_key("attention_mla", "F", tokens=4096, seq=4096, q_rank=0, **MLA)
    formula = VOCABULARY["attention_mla"].saved(dict(key.shape))
    assert costs.op(key).saved_bytes == formula
    assert costs.op(key).deferred_bytes == 0
    backward = op_key("attention_mla", "I", **dict(key.shape))
    deferred = VOCABULARY["attention_mla"].deferred(dict(key.shape))
    assert (costs.op(backward).saved_bytes, costs.op(backward).deferred_bytes) == (0, deferred)

    rows = tuple(
        row.model_copy(update={"saved_bytes": 3 * formula}) if row.key == key else row
        for row in profile.ops
    )
    model = CostModel(profile.model_copy(update={"ops": rows}))
    assert model.op(key).saved_bytes == 3 * formula
    nearby = op_key("attention_mla", "F", tokens=3900, seq=4096, q_rank=0, **MLA)
    expected = 3 * VOCABULARY["attention_mla"].saved(dict(nearby.shape))
    assert model.op(nearby).saved_bytes == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [2, 10])
def test_slower_machine_costs_more_by_its_factor(profile: Profile, factor: int) -> None:
    """Every time times f and every rate over f: every cost times f. No constant hides here."""
    slow, fast = CostModel(scaled(profile, factor)), CostModel(profile)
    texts = [str(key) for key in awkward_keys(profile)]
    texts += [str(TransferKey(pattern, 2, 2, 1 << 20)) for pattern in TRANSFER_PATTERNS.values()]
    texts += ["all_to_all 8/8 3000000", "reduce_scatter 64/8 90000000", "send_recv 2/1 84000000"]
    texts += ["all_to_all 16/8 3000000", "none"]
    for text, a, b in zip(texts, fast.costs(texts), slow.costs(texts), strict=True):
        assert b.duration_ns == pytest.approx(factor * a.duration_ns, abs=2 * factor), text
        assert b.host_ns == pytest.approx(factor * a.host_ns, abs=factor), text
        for before, after in zip(a.segments, b.segments, strict=True):
            near = factor * before.duration_ns
            assert after.duration_ns == pytest.approx(near, abs=2 * factor), text


def awkward_keys(profile: Profile) -> list[OpKey]:
    """One off-grid shape for each kind and pass."""
    last = {(row.kind, row.pass_): row.key for row in profile.ops}
    return [
        OpKey(key.kind, key.pass_, tuple((axis, _nudged(axis, v)) for axis, v in key.shape))
        for key in last.values()
    ]


def _nudged(axis: str, value: int) -> int:
    return value * 9 // 10 if axis in ("tokens", "rows", "parameters") else value


def test_launch_floor_is_part_of_the_roofline(costs: CostModel) -> None:
    """An op of almost no work still costs a launch, not nothing."""
    tiny = costs.op(op_key("zero_gradients", "O", parameters=250_000))
    assert tiny.duration_ns > LAUNCH_NS


def test_missing_rate_is_named(profile: Profile) -> None:
    rates = tuple(rate for rate in profile.rates if rate.name != "copy_bytes")
    with pytest.raises(ProfileError, match=r"^profile synthetic: rates: copy_bytes is missing$"):
        CostModel(profile.model_copy(update={"rates": rates}))


def test_text_that_is_no_key_is_refused(costs: CostModel) -> None:
    with pytest.raises(ValueError, match=r"'mhc_post\.Q n=4' is no cost key"):
        costs.costs(["mhc_post.Q n=4"])


def test_two_hundred_new_shapes_take_little_time(profile: Profile) -> None:
    """The budget is 20 ms; four times that is allowed here, for a loaded machine."""
    keys = [post(hidden=1920 + 64 * (i % 10), tokens=1025 + 31 * i) for i in range(200)]
    best = float("inf")
    for _ in range(3):
        model = CostModel(profile)
        start = time.process_time()
        for key in keys:
            model.op(key)
        best = min(best, time.process_time() - start)
    assert best < 0.08
