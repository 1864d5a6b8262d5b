"""Comparisons: differences add up, what is not known is not claimed, bad sides are one line."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest

from mhcplan.planner.cli.compare import plan_of_words
from mhcplan.planner.compare.comparison import Comparison, compare_sides
from mhcplan.planner.compare.sides import Side, read_side
from mhcplan.planner.compare.text import headline, remarks, sections
from mhcplan.planner.report.schema import json_schema
from mhcplan.sim.files import Trace, read_trace, write_trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.commands import Run

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "schemas" / "comparison.schema.json"
SMALL = "mhc-3b --pp 2 --microbatches 4"


@pytest.fixture(scope="module")
def small(profile: str) -> str:
    """A plan in words, priced by a made-up profile."""
    return f"{SMALL} --profile {profile}"


@pytest.fixture(scope="module")
def sides(small: str) -> tuple[Side, Side]:
    """Four rows against two, and another schedule."""
    return (
        read_side(small, plan_of_words),
        read_side(f"{small} --n 2 --schedule zb1p", plan_of_words),
    )


def test_fields_are_those_that_were_changed(sides: tuple[Side, Side]) -> None:
    changed = compare_sides(*sides).fields
    assert changed is not None
    assert {change.field: (change.a, change.b) for change in changed} == {
        "residual.expansion_rate": (4, 2),
        "schedule": ("dualpipe", "zb1p"),
    }


def test_classes_explain_the_whole_difference_and_the_largest_is_first(
    sides: tuple[Side, Side],
) -> None:
    found = compare_sides(*sides)
    difference = found.b.step_time_ns - found.a.step_time_ns
    assert sum(change.difference_ns for change in found.classes) == difference != 0
    effects = [abs(change.difference_ns) for change in found.classes]
    assert effects == sorted(effects, reverse=True)
    assert found.step_percent == pytest.approx(100 * difference / found.a.step_time_ns)


def test_ops_are_counted_as_one_would_by_hand(sides: tuple[Side, Side]) -> None:
    found = compare_sides(*sides)
    assert found.ops is not None
    for side, letter in zip(sides, "ab", strict=True):
        assert side.step is not None
        program, timeline = side.step.program, side.step.timeline
        count: defaultdict[tuple[str, str], int] = defaultdict(int)
        time: defaultdict[tuple[str, str], int] = defaultdict(int)
        for op in program:
            count[op.kind, op.pass_] += 1
            time[op.kind, op.pass_] += int(timeline.end_ns[op.index] - timeline.start_ns[op.index])
        shown = {(change.kind, change.pass_): getattr(change, letter) for change in found.ops}
        for key, ns in time.items():
            if not ns:
                assert shown.get(key) is None
                continue
            assert shown[key].count * program.num_ranks == pytest.approx(count[key])
            assert shown[key].time_ns == ns // program.num_ranks
            assert shown[key].share_percent == pytest.approx(100 * ns / sum(time.values()))
        present = [times for times in shown.values() if times is not None]
        assert sum(times.share_percent for times in present) == pytest.approx(100)


def test_ops_are_matched_only_where_the_program_is_the_same(sides: tuple[Side, Side]) -> None:
    assert compare_sides(*sides).matched is None
    same = compare_sides(sides[1], sides[1]).matched
    assert same is not None
    assert (same.low_ratio, same.median_ratio, same.high_ratio) == (1, 1, 1)


def test_the_other_way_round_is_the_other_sign(sides: tuple[Side, Side]) -> None:
    there, back = compare_sides(*sides), compare_sides(*sides[::-1])
    assert there.ops is not None
    assert back.ops is not None
    assert {(c.kind, c.pass_): c.difference_ns for c in there.ops} == {
        (c.kind, c.pass_): -c.difference_ns for c in back.ops
    }


def test_a_plan_is_like_itself(sides: tuple[Side, Side]) -> None:
    found = compare_sides(sides[0], sides[0])
    assert found.step_percent == 0
    assert found.ops is not None
    assert {change.difference_ns for change in (*found.classes, *found.ops)} == {0}
    assert "as long as A's" in headline(found)
    assert "both have the same plan" in list(remarks(found))


def test_trace_and_report_stand_for_their_plan(run: Run, small: str, tmp_path: Path) -> None:
    words = small.split()
    run("export", *words, "--to", "stream-json", "-o", str(tmp_path))
    report = tmp_path / "report.json"
    report.write_text(run("predict", *words, "--json")[1], encoding="utf-8")
    trace = str(tmp_path / "predicted.json")
    found = Comparison.model_validate_json(run("compare", small, trace, "--json")[1])
    assert (found.a.kind, found.b.kind) == ("plan", "predicted trace")
    assert found.step_percent == 0
    assert found.fields == ()
    assert found.ops is not None
    assert {change.difference_ns for change in (*found.classes, *found.ops)} == {0}
    assert (found.b.overhead_percent, found.b.device_memory_bytes) == (None, None)
    against = Comparison.model_validate_json(run("compare", str(report), trace, "--json")[1])
    assert (against.ops, against.fields, against.step_percent) == (None, (), 0)
    assert any("a report holds no ops" in remark for remark in remarks(against))


def test_measured_trace_is_compared_op_by_op(run: Run, small: str, tmp_path: Path) -> None:
    run("export", *small.split(), "--to", "stream-json", "-o", str(tmp_path))
    trace = read_trace(tmp_path / "predicted.json")
    slow = tmp_path / "measured.json"
    timeline = trace.timeline
    doubled = type(timeline)(
        timeline.issue_ns * 2, timeline.start_ns * 2, timeline.end_ns * 2, timeline.cause,
        timeline.reason,
    )  # fmt: skip
    write_trace(Trace(trace.program, doubled, "measured", {}), slow)
    code, out, _ = run("compare", str(tmp_path / "predicted.json"), str(slow), "--json")
    found = Comparison.model_validate_json(out)
    assert (code, found.b.kind, found.fields) == (0, "measured trace", None)
    assert found.step_percent == pytest.approx(100)
    assert found.ops is not None
    for change in found.ops:
        assert change.a is not None
        assert change.b is not None
        assert change.b.time_ns == pytest.approx(2 * change.a.time_ns, abs=1)
    assert any("slows a step down" in remark for remark in remarks(found))
    assert found.matched is not None
    ratios = found.matched.low_ratio, found.matched.median_ratio, found.matched.high_ratio
    assert ratios == pytest.approx((2, 2, 2))
    took_time = (timeline.end_ns > timeline.start_ns).sum()
    assert found.matched.num_ops == took_time
    assert any("2.000 times as long as A's at the median" in text for text in remarks(found))


def test_text_says_the_same(run: Run, small: str, sides: tuple[Side, Side]) -> None:
    code, out, err = run("compare", small, f"{small} --n 2 --schedule zb1p")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == headline(compare_sides(*sides))
    titles = [section.title for section in sections(compare_sides(*sides))]
    assert all(any(line.startswith(title) for line in lines) for title in titles)
    assert lines[-1].startswith("Again: mhcplan compare 'mhc-3b --pp 2")


def test_out_holds_the_comparison_and_both_timelines(run: Run, small: str, tmp_path: Path) -> None:
    code, out, err = run("compare", small, f"{small} --n 2", "--json", "--out", str(tmp_path))
    assert code == 0
    assert f"wrote {tmp_path}" in err
    assert (tmp_path / "comparison.json").read_text(encoding="utf-8") == out
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    data = json.loads(page.split('id="page-data">')[1].split("</script>")[0])
    steps = [side["ops"]["step_ns"] for side in data["sides"]]
    found = Comparison.model_validate_json(out)
    assert steps == [found.a.step_time_ns, found.b.step_time_ns]
    longest = max(steps) / 1e6
    for side in data["sides"]:
        assert side["timeline"]["layout"]["xaxis"]["range"] == [0, longest]


def test_page_needs_ops_on_both_sides(run: Run, small: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(run("predict", *small.split(), "--json")[1], encoding="utf-8")
    code, out, err = run("compare", small, str(report), "--out", str(tmp_path / "out"))
    assert code == 2
    assert out.startswith("B's step is as long as A's")
    assert "a report holds no timeline" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.json", "missing.json: cannot be read (No such file or directory)"),
        ("missing.toml", "missing.toml: cannot be read"),
        ("mhc-28b", "did you mean mhc-27b"),
        ("mhc-3b --pp 3", "pp=3 must be even"),
        ("mhc-3b --tp 3", "--tp"),
        ('mhc-3b "', "no closing quotation"),
        ("", "SOURCE requires an argument"),
    ],
)
def test_bad_side_is_one_line(run: Run, small: str, text: str, message: str) -> None:
    code, out, err = run("compare", small, text)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[1]", "format=None must be"),
        ('{"format": "mhcplan.plan"}', "format='mhcplan.plan' must be"),
        ('{"format": "mhcplan.report"}', "mhcplan_version"),
        ('{"format": "mhcplan.trace", "format_version": 9}', "newer"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["empty", "list", "plan", "report", "newer", "deep"],
)
def test_file_that_is_no_side_is_one_line(
    run: Run, small: str, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "side.json"
    file.write_text(content)
    code, out, err = run("compare", str(file), small)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_published_schema_is_current_and_holds(
    sides: tuple[Side, Side], published: Callable[[str, str], None]
) -> None:
    text = json_schema(Comparison, "mhcplan comparison, version 1")
    published("comparison", text)
    data = json.loads(compare_sides(*sides).to_json())
    jsonschema.Draft202012Validator(json.loads(text)).validate(data)
