"""Plotly figures of many what-ifs: one field varied, and time against memory.

A point that a person may go to carries its ``key`` as customdata; what does not fit in memory is
drawn hollow.
"""

# plotly's methods are generated and their arguments untyped
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from mhcplan.planner.figures.step import (
    LIMIT_MARGIN,
    THOUSANDS,
    limit_line,
    limit_text,
    plain_layout,
)
from mhcplan.planner.figures.timeline_data import PAINTS

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIME_COLOR, _MEMORY_COLOR = PAINTS["mhc"].color, PAINTS["I"].color
_GROUPS = tuple((PAINTS[name].color, symbol) for name, symbol in (
    ("I", "circle"), ("mhc", "square"), ("W", "diamond"), ("optimizer", "triangle-up"),
    ("recompute", "triangle-down"), ("F", "star"),
))  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A what-if of a sweep.

    Attributes:
        label: what was varied, as the axis or the hover names it.
        group: what shares a colour.
        device_bytes: memory that the fullest GPU needs.
        measured_percent: share of op time that was measured at its shape on this device.
        chosen: it is the what-if that the sweep started from.
        key: what the page takes to go there.
    """

    label: str
    group: str
    step_ns: int
    overhead_percent: float
    device_bytes: int
    measured_percent: float
    fits: bool
    chosen: bool
    key: str


def axis_figure(
    points: Sequence[Point], field: str, labels: Sequence[str], limit_bytes: int
) -> go.Figure:
    """Overhead above, memory beneath, over all ``labels`` of one field."""
    figure = go.Figure()
    for name, axis, color, values in (
        ("overhead, %", "y", _TIME_COLOR, [point.overhead_percent for point in points]),
        ("memory, GB", "y2", _MEMORY_COLOR, [point.device_bytes / 1e9 for point in points]),
    ):
        figure.add_scatter(
            name=name,
            x=[point.label for point in points],
            y=values,
            yaxis=axis,
            mode="lines+markers",
            cliponaxis=False,
            line={"color": color, "width": 2},
            marker=_markers(points, color, "circle"),
            customdata=[point.key for point in points],
            text=[_source(point) for point in points],
            hovertemplate="%{x}: %{y:,.2f}<br>%{text}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        plain_layout(height=320),
        showlegend=False,
        margin={"l": 56, "r": LIMIT_MARGIN, "t": 16, "b": 44},
        xaxis={
            "title": {"text": field, "standoff": 4},
            "type": "category",
            "categoryorder": "array",
            "categoryarray": list(labels),
            "range": [-0.5, len(labels) - 0.5],
            "anchor": "y2",
        },
        yaxis={"domain": [0.54, 1], "title": "overhead, %", "rangemode": "tozero"},
        yaxis2={"domain": [0, 0.46], "title": "GB a GPU", "rangemode": "tozero"},
        shapes=[limit_line(limit_bytes, "y2")],
        annotations=[limit_text(limit_bytes, "y2")],
    )
    return figure


def pareto_figure(points: Sequence[Point], limit_bytes: int) -> go.Figure:
    """Step time against memory, a colour a group, and the front that nothing beats in both."""
    figure = go.Figure()
    front = pareto_front(points)
    figure.add_scatter(
        name="no other is better in both",
        x=[point.device_bytes / 1e9 for point in front],
        y=[point.step_ns / 1e6 for point in front],
        mode="lines",
        line={"shape": "hv", "width": 1.5, "dash": "dot", "color": "#808080"},
        hoverinfo="skip",
    )
    groups = dict.fromkeys(point.group for point in points)
    for group, (color, symbol) in zip(groups, _GROUPS, strict=False):
        members = [point for point in points if point.group == group]
        figure.add_scatter(
            name=group,
            x=[point.device_bytes / 1e9 for point in members],
            y=[point.step_ns / 1e6 for point in members],
            mode="markers",
            marker=_markers(members, color, symbol),
            customdata=[point.key for point in members],
            text=[f"{point.label}<br>{_source(point)}" for point in members],
            hovertemplate="%{y:,.2f} ms, %{x:,.2f} GB<br>%{text}<extra></extra>",
        )
    line = limit_line(limit_bytes, "y")
    upright = {"x0": line["y0"], "x1": line["y1"], "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    above = {"x": line["y0"], "y": 1, "xref": "x", "yref": "paper", "yanchor": "top"}
    figure.update_layout(
        plain_layout(height=380),
        margin={"l": 72, "r": 16, "t": 16, "b": 44},
        shapes=[line | upright],
        annotations=[limit_text(limit_bytes, "y") | above],
        xaxis={"title": "memory of the fullest GPU, GB"},
        yaxis={"title": "ms of a step", **THOUSANDS},
    )
    return figure


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in time and memory, from the least memory up."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.device_bytes, point.step_ns)):
        if not front or point.step_ns < front[-1].step_ns:
            front.append(point)
    return front


def _source(point: Point) -> str:
    return f"{point.measured_percent:.0f} % of op time measured at its shape"


def _markers(points: Sequence[Point], color: str, symbol: str) -> dict[str, Any]:
    """Hollow where it does not fit, larger where it is the chosen one."""
    return {
        "color": color,
        "symbol": [symbol if point.fits else f"{symbol}-open" for point in points],
        "size": [13 if point.chosen else 8 for point in points],
        "line": {"width": 1.5, "color": color},
    }
