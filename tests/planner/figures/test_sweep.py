"""Figures of sweeps: the front against brute force, what a point carries."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.planner.figures.sweep import Point, axis_figure, pareto_figure, pareto_front

GB = 10**9
POINTS = st.lists(
    st.builds(
        Point,
        label=st.text("ab", max_size=3),
        group=st.sampled_from(["1f1b", "zb1p"]),
        step_ns=st.integers(1, 6),
        overhead_percent=st.floats(-5, 50),
        device_bytes=st.integers(1, 6),
        measured_percent=st.floats(0, 100),
        fits=st.booleans(),
        chosen=st.booleans(),
        key=st.text("k", max_size=2),
    ),
    max_size=12,
)


@given(POINTS)
def test_front_is_what_no_point_beats_in_both(points: list[Point]) -> None:
    values = {(point.device_bytes, point.step_ns) for point in points}
    best = {
        (memory, time)
        for memory, time in values
        if not any(m <= memory and t <= time and (m, t) != (memory, time) for m, t in values)
    }
    front = [(point.device_bytes, point.step_ns) for point in pareto_front(points)]
    assert set(front) == best
    assert front == sorted(best)


@given(POINTS)
@settings(max_examples=25)
def test_points_carry_where_a_click_goes_and_hollow_ones_do_not_fit(points: list[Point]) -> None:
    _, *groups = pareto_figure(points, 80 * GB).to_plotly_json()["data"]
    drawn = [
        (group["name"], key, symbol.endswith("-open"))
        for group in groups
        for key, symbol in zip(group["customdata"], group["marker"]["symbol"], strict=True)
    ]
    assert sorted(drawn) == sorted((p.group, p.key, not p.fits) for p in points)


def test_axis_keeps_the_order_of_its_labels_while_points_come() -> None:
    point = Point("none", "", 2_000_000, 12.5, 60 * GB, 70.4, True, True, "n=4")
    figure = axis_figure([point], "n", ["none", "2", "auto"], 80 * GB).to_plotly_json()
    assert figure["layout"]["xaxis"]["categoryarray"] == ["none", "2", "auto"]
    overhead, memory = figure["data"]
    assert (overhead["y"], memory["y"]) == ([12.5], [60.0])
    assert figure["layout"]["shapes"][0]["y0"] == 80
    assert figure["layout"]["xaxis"]["title"]["text"] == "n"


def test_hover_says_how_much_of_a_point_was_measured() -> None:
    point = Point("16", "zbv", 2_000_000, 84.7, 60 * GB, 33.3, True, False, "n=16")
    said = "33 % of op time measured at its shape"
    for trace in axis_figure([point], "n", ["16"], 80 * GB).to_plotly_json()["data"]:
        assert trace["text"] == [said]
        assert "%{text}" in trace["hovertemplate"]
    _, group = pareto_figure([point], 80 * GB).to_plotly_json()["data"]
    assert group["text"] == [f"16<br>{said}"]
