"""Plan files and ``--set``: exact round trip, what beats what, every broken file in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.planner.plan.errors import field_paths
from mhcplan.planner.plan.file import (
    MAX_FILE_BYTES,
    commented_plan_text,
    parse_plan,
    parse_setting,
    plan_text,
    read_plan,
    resolve_plan,
)
from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan
from mhcplan.profiles.presets import MODELS

if TYPE_CHECKING:
    from pathlib import Path

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def plans(draw: st.DrawFn) -> PlanSpec:
    model = draw(st.sampled_from(sorted(MODELS)))
    schedule = draw(st.sampled_from(["1f1b", "zb1p", "dualpipe"]))
    pp = 2 * draw(st.integers(1, 4))
    limit = draw(st.none() | st.integers(10**6, 10**12))
    data = {
        "model": MODELS[model].model_dump() | {"source": draw(_TEXT), "name": draw(_TEXT)},
        "residual": {
            "kind": draw(st.sampled_from(["mhc", "hc", "plain"])),
            "expansion_rate": draw(st.sampled_from([1, 2, 4, 8])),
            "recompute_block": draw(
                st.sampled_from(["auto", "none", "stage"]) | st.integers(1, 99)
            ),
        },
        "layout": {
            "pp": pp,
            "ep": draw(st.sampled_from([1, 2, 4, 8])) if MODELS[model].moe else 1,
            "dp": draw(st.integers(1, 9)),
        },
        "microbatches": 2 * draw(st.integers(pp, 64)),
        "seq_len": 64 * draw(st.integers(1, 128)),
        "schedule": schedule,
        "overlap_recompute": draw(st.booleans()),
        "profile": draw(_TEXT.filter(bool)),
    }
    return make_plan(data if limit is None else data | {"memory_limit_bytes": limit})


@given(plans())
def test_written_and_read_back_is_the_same_plan(plan: PlanSpec) -> None:
    read = parse_plan(plan_text(plan), "plan.toml")
    assert read == plan
    assert read.digest() == plan.digest()


@given(plans())
def test_commented_file_is_the_same_plan(plan: PlanSpec) -> None:
    assert parse_plan(commented_plan_text(plan), "plan.toml") == plan


def test_commented_file_names_a_preset_and_says_what_every_field_decides() -> None:
    text = commented_plan_text(make_plan({"model": "mhc-27b"}))
    assert '\nmodel = "mhc-27b"\n' in text
    for path in field_paths(PlanSpec):
        if not path.startswith("model."):
            assert f"{path.rpartition('.')[2]} =" in text or f"[{path}]" in text
    assert "1f1b | interleaved-1f1b | zb1p | zbv | dualpipe | dualpipev" in text
    assert max(len(line) for line in text.split("\n")) <= 100


def test_file_beats_preset_flag_beats_file_and_set_reaches_any_field(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(
        'format = "mhcplan.plan"\nformat_version = 1\nmodel = "mhc-9b"\nmicrobatches = 32\n'
        "[layout]\npp = 4\n"
    )
    read = resolve_plan(str(file), {}, [])
    assert (read.model.name, read.microbatches, read.layout.pp, read.layout.ep) == (
        "mhc-9b", 32, 4, 8,
    )  # fmt: skip
    flagged = resolve_plan(str(file), {"layout.pp": 2}, [])
    assert (flagged.layout.pp, flagged.microbatches) == (2, 32)
    plan = resolve_plan(
        str(file), {"layout.pp": 2}, ["layout.pp=8", "model.moe.top_k=4", "schedule=zb1p"]
    )
    assert (plan.layout.pp, plan.schedule) == (8, "zb1p")
    assert plan.model.moe is not None
    assert plan.model.moe.top_k == 4
    assert plan.model.moe.num_experts == 64
    preset = MODELS["mhc-9b"].moe
    assert preset is not None
    assert preset.top_k == 6


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("layout.pp=16", ("layout.pp", 16)),
        ("schedule=zbv", ("schedule", "zbv")),
        ("schedule = zbv ", ("schedule", "zbv")),
        ('profile="a=b"', ("profile", "a=b")),
        ("overlap_recompute=false", ("overlap_recompute", False)),
        ("layout.blocks_per_stage=[1, 2]", ("layout.blocks_per_stage", [1, 2])),
        ("memory_limit_bytes=80GiB", ("memory_limit_bytes", "80GiB")),
        ("profile=1\nseq_len=64", ("profile", "1\nseq_len=64")),
    ],
)
def test_setting(setting: str, expected: tuple[str, object]) -> None:
    assert parse_setting(setting) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("layout.pp", "must be field=value"),
        ("pp=4", "pp is not a field of a plan; did you mean layout.pp?"),
        ("n=4", "n is not a field of a plan; did you mean residual.expansion_rate?"),
        ("=4", "is not a field"),
    ],
)
def test_setting_that_reaches_nothing(setting: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_setting(setting)


def test_list_is_not_called_by_its_python_type() -> None:
    with pytest.raises(SpecError, match=r"blocks_per_stage=4 must be a list of blocks"):
        resolve_plan("mhc-3b", {}, ["layout.blocks_per_stage=4"])


def test_set_reaches_every_field() -> None:
    paths = list(field_paths(PlanSpec))
    assert {"layout.pp", "residual.kind", "model.attention.num_heads", "p2p"} <= set(paths)
    for path in paths:
        assert parse_setting(f"{path}=1")[0] == path


HEAD = 'format = "mhcplan.plan"\nformat_version = 1\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "format is missing: must be 'mhcplan.plan'"),
        ('format = "mhcplan.profile"\nformat_version = 1', "format='mhcplan.profile' must be"),
        ('format = "mhcplan.plan"\nformat_version = 2', "format_version=2 is newer than this"),
        ('format = "mhcplan.plan"\nformat_version = true', "format_version=True must be 1"),
        (HEAD + 'model = "mhc-27b', "not valid TOML"),
        (HEAD + "model = " + "[" * 5000, "not valid TOML"),
        (HEAD + 'model = "mhc-27b"\nlayout = 3', "layout=3 must be a table"),
        (HEAD + 'model = "mhc-27b"\n"a\\nb" = 1', "is not a field of a plan"),
        (HEAD, "model is missing"),
    ],
)
def test_broken_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(text)
    with pytest.raises(SpecError) as refusal:
        read_plan(file)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(str(file))
    assert "\n" not in str(refusal.value)


@given(st.integers(0, 2000))
def test_truncated_file_is_refused_or_a_legal_plan(length: int) -> None:
    text = plan_text(make_plan({"model": "deepseek-v3", "layout": {"ep": 64}}))
    try:
        said = plan_text(parse_plan(text[:length], "plan.toml")).partition("\n")[0]
    except SpecError as refusal:
        said = str(refusal)
    assert said.startswith(("plan.toml: ", "format = "))
    assert "\n" not in said


@pytest.mark.parametrize("name", ["missing.toml", "folder.toml", "binary.toml", "large.toml"])
def test_unreadable_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.toml").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(SpecError) as refusal:
        resolve_plan(str(tmp_path / name), {}, [])
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path: Path) -> None:
    plan = make_plan({"model": "mhc-9b", "microbatches": 32})
    file = tmp_path / "plan.toml"
    file.write_bytes(b"\xef\xbb\xbf" + plan_text(plan).replace("\n", "\r\n").encode())
    assert read_plan(file) == plan


def test_unknown_preset_names_close_ones() -> None:
    with pytest.raises(SpecError, match="did you mean mhc-27b"):
        resolve_plan("mhc27b", {}, [])


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "auto", "dualpipe", "mhc-9b", "80GB", "1e99", "-1"])
    | st.datetimes()
    | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.tuples(st.sampled_from(list(field_paths(PlanSpec))), _ANYTHING), max_size=3))
def test_any_value_in_any_field_is_refused_in_one_line_or_makes_a_plan(
    changes: list[tuple[str, object]],
) -> None:
    fields: dict[str, Any] = {"model": MODELS["mhc-9b"].model_dump(), "microbatches": 32}
    for path, value in changes:
        table: Any = fields
        *parents, last = path.split(".")
        for name in parents:
            inner = table.get(name)
            table[name] = table = dict(inner) if isinstance(inner, dict) else {}
        table[last] = value
    try:
        plan = make_plan(fields)
    except SpecError as refusal:
        said = str(refusal)
    else:
        said = plan.digest()
        assert parse_plan(plan_text(plan), "plan.toml") == plan
        assert plan.num_stages <= plan.model.num_blocks
    assert "\n" not in said
    assert len(said) < 500
