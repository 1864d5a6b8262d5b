"""What-ifs in addresses: read, written, refused."""

from __future__ import annotations

from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan
from mhcplan.profiles.presets import MODELS
from mhcplan.web.controls import controls
from mhcplan.web.whatif import MAX_QUERY_BYTES, Refused, WhatIf, parse_query, whatif_of

PROFILES = ("h100-sxm",)


def plan_of(query: str) -> PlanSpec:
    return parse_query(query, PROFILES)[0].plan()


def refusal(query: str) -> Refused:
    with pytest.raises(Refused) as caught:
        plan_of(query)
    assert "\n" not in caught.value.message
    return caught.value


def test_fields_have_the_names_of_flags_or_paths() -> None:
    plan = plan_of("model=mhc-9b&n=2&recompute_block=stage&layout.gpus_per_node=4&schedule=zbv")
    assert plan.model.name == "mhc-9b"
    assert plan.residual.expansion_rate == 2
    assert plan.residual.recompute_block == "stage"
    assert plan.layout.gpus_per_node == 4
    assert plan.schedule == "zbv"


def test_empty_query_is_the_default_plan() -> None:
    assert plan_of("") == make_plan({"model": "mhc-27b"})


def test_pinned_plan_is_read_from_its_own_query() -> None:
    whatif, pinned = parse_query("n=8&a=n%3D2%26pp%3D4", PROFILES)
    assert whatif.settings == (("residual.expansion_rate", "8"),)
    assert pinned == parse_query("n=2&pp=4", PROFILES)[0]


def test_command_gives_the_same_plan() -> None:
    whatif, _ = parse_query("model=mhc-9b&recompute_block=none&p2p=eager&pp=4", PROFILES)
    assert whatif.command() == (
        "mhcplan predict mhc-9b --recompute-block none --set p2p=eager --pp 4"
    )


PLANS = st.fixed_dictionaries(
    {"model": st.sampled_from([*MODELS, MODELS["mhc-3b"].model_copy(update={"name": "mine # 1"})])},
    optional={
        "residual": st.fixed_dictionaries(
            {}, optional={"expansion_rate": st.sampled_from([1, 2, 4, 8, 16]),
                          "recompute_block": st.sampled_from(["auto", "none", "stage", 1, 7])}
        ),
        "layout": st.fixed_dictionaries(
            {}, optional={"pp": st.sampled_from([2, 4]), "ep": st.sampled_from([1, 8]),
                          "blocks_per_stage": st.just(None)}
        ),
        "microbatches": st.sampled_from([8, 64, 100]),
        "schedule": st.sampled_from(["1f1b", "zb1p", "dualpipe"]),
        "overlap_recompute": st.booleans(),
        "memory_limit_bytes": st.sampled_from(["80GB", 10**11]),
        "profile": st.just("h100-sxm"),
    },
)  # fmt: skip


@given(PLANS)
def test_a_plan_comes_back_from_its_query(data: dict[str, object]) -> None:
    try:
        plan = make_plan(data)
    except SpecError:
        return
    whatif = whatif_of(plan)
    assert whatif.plan() == plan
    again, pinned = parse_query(whatif.query(), PROFILES)
    assert (again, pinned) == (whatif, None)


@pytest.mark.parametrize(
    ("query", "field", "said"),
    [
        ("n=5", "n", "must be 1, 2, 4, 8 or 16"),
        ("pp=0", "pp", "layout.pp"),
        ("pp=9", "pp", "must be even for dualpipe"),
        ("microbatches=63", "microbatches", "must be even"),
        ("schedule=gpipe", "schedule", "'1f1b'"),
        ("ep=7", "ep", "must divide the 72 experts"),
        ("foo=1", "foo", "is not a field of a plan"),
        ("model=../../etc/passwd", "model", "must be one of mhc-3b"),
        ("model=plan.toml", "model", "must be one of mhc-3b"),
        ("model={}", None, "model.name is missing"),
        ("profile=/etc/passwd", "profile", "must be one of h100-sxm"),
        ("n=2&n=4", "n", "stands twice"),
        ("microbatches=100000", "microbatches", "must be at most"),
        ("n=" + "4" * MAX_QUERY_BYTES, None, "at most"),
        ("&".join(f"f{i}=1" for i in range(101)), None, "at most 100"),
        ("a=profile%3D/etc/shadow", None, "A, the pinned plan: profile="),
    ],
)
def test_bad_input_is_one_line_that_names_its_field(
    query: str, field: str | None, said: str
) -> None:
    error = refusal(query)
    assert said in error.message
    assert error.field == field or field is None


NAMES = st.sampled_from(["model", "n", "pp", "layout", "model.attention", "a", "seq_len", "x"])


@given(st.lists(st.tuples(NAMES | st.text(max_size=9), st.text(max_size=30)), max_size=4))
def test_any_text_is_a_plan_or_one_line(items: list[tuple[str, str]]) -> None:
    try:
        said = str(plan_of(urlencode(items)).digest())
    except Refused as error:
        said = error.message
    assert said
    assert "\n" not in said


def test_large_steps_are_for_the_command_line() -> None:
    assert "`mhcplan predict`" in refusal("microbatches=2000").message
    WhatIf(settings=(("microbatches", "1000"),)).plan()


def test_every_field_of_a_plan_can_be_changed_in_the_page() -> None:
    all_ = controls(PROFILES)
    shown = {control["path"] for control in (*all_["main"], *all_["more"])}
    tables = {"residual", "layout"}
    assert {path.split(".")[0] for path in shown} == set(PlanSpec.model_fields)
    assert not shown & tables


def test_sliders_and_pickers_hold_their_defaults() -> None:
    for control in controls(PROFILES)["main"]:
        assert control["default"] in control["values"], control["name"]
