"""Axes of a sweep: lists, ranges, combinations, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.planner.plan.file import source_fields
from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan
from mhcplan.planner.sweep.axes import Axis, Point, axes_of, parse_axis, points

SMALL = source_fields("mhc-3b")


@given(st.integers(0, 500), st.integers(0, 40), st.integers(1, 60))
def test_range_has_both_ends_and_every_step(first: int, count: int, step: int) -> None:
    axis = parse_axis("microbatches", f"{first}..{first + count * step}..{step}")
    assert axis.values == tuple(first + i * step for i in range(count + 1))


def test_range_that_does_not_meet_its_end_stops_before_it() -> None:
    assert parse_axis("microbatches", "16..50..16").values == (16, 32, 48)
    assert parse_axis("microbatches", "3..5").values == (3, 4, 5)


@pytest.mark.parametrize(
    ("path", "text", "values"),
    [
        ("layout.pp", "4,8,4", (4, 8)),
        ("layout.pp", " 4 , 8..10 ", (4, 8, 9, 10)),
        ("residual.recompute_block", "auto,none,4", ("auto", "none", 4)),
        ("overlap_recompute", "true,false", (True, False)),
        ("layout.blocks_per_stage", "[5,5,2],[4,4,4]", ([5, 5, 2], [4, 4, 4])),
        ("memory_limit_bytes", "80GB,141GB", ("80GB", "141GB")),
        ("profile", '"a,b.json",c.json', ("a,b.json", "c.json")),
        ("global_batch", "256,512", (256, 512)),
        ("seq_len", "2020-01-01,nan", ("2020-01-01", "nan")),  # no numbers: refused with the plan
    ],
)
def test_values_are_read_as_in_a_plan_file(
    path: str, text: str, values: tuple[object, ...]
) -> None:
    assert parse_axis(path, text).values == values


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("layout.tp", "1,2", "layout.tp is not a field of a plan"),
        ("layout.pp", "", "must list values"),
        ("layout.pp", "1,,2", "must list values"),
        ("layout.pp", "1,2,", "must list values"),
        ("layout.pp", "8..4", "goes up"),
        ("layout.pp", "4..8..0", "goes up"),
        ("layout.pp", "1..999999999", "more than 100,000 values"),
        ("global_batch", "0", "at least 1"),
        ("global_batch", "many", "at least 1"),
    ],
)
def test_axis_that_makes_no_sense_is_refused(path: str, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_axis(path, text)


def test_axis_given_twice_is_refused() -> None:
    with pytest.raises(SpecError, match=r"layout\.pp is given twice"):
        axes_of({"layout.pp": "4"}, ["layout.pp=8"])


def test_more_combinations_than_a_sweep_takes_are_refused_before_any_is_made() -> None:
    axes = [parse_axis(name, "1..99999") for name in ("layout.pp", "layout.dp", "microbatches")]
    with pytest.raises(SpecError, match="combinations are more than"):
        points(SMALL, axes)


@given(
    st.sets(st.sampled_from([1, 2, 3, 4, 6]), min_size=1),
    st.sets(st.sampled_from([2, 4, 5, 8]), min_size=1),
)
def test_every_combination_is_there_once_legal_or_with_the_reason(
    pipeline: set[int], microbatches: set[int]
) -> None:
    axes = [Axis("layout.pp", tuple(pipeline)), Axis("microbatches", tuple(microbatches))]
    found: dict[Any, Point] = {tuple(point.values.values()): point for point in points(SMALL, axes)}
    assert set(found) == {(p, m) for p in pipeline for m in microbatches}
    for (pp, m), point in found.items():
        legal = pp % 2 == 0 and m % 2 == 0 and m >= 2 * pp  # what dualpipe can run
        assert (point.plan is not None) == legal
        assert (point.reason is None) == legal
        if point.plan is not None:
            data = {"model": "mhc-3b", "layout": {"pp": pp}, "microbatches": m}
            assert point.plan == make_plan(data)


def test_global_batch_holds_the_work_of_a_step_equal() -> None:
    axes = axes_of({"global_batch": "256", "layout.pp": "2,4", "micro_batch_size": "1,2"}, [])
    plans = [point.plan for point in points(SMALL, axes)]
    assert {plan.global_batch for plan in plans if isinstance(plan, PlanSpec)} == {256}
    assert sorted(plan.microbatches for plan in plans if plan) == [16, 16, 32, 32]


def test_global_batch_beside_microbatches_is_a_reason_at_every_point() -> None:
    axes = axes_of({"global_batch": "256", "microbatches": "16,32"}, [])
    assert all("exclude each other" in (point.reason or "") for point in points(SMALL, axes))
