"""Plotly figures, built once, in Python: the HTML page, the web page and notebooks draw these.

Every figure is transparent and without a colour of its own for text and grid: the page gives it
those, light or dark. :func:`timeline_figure` has the axes, lanes and lines of the timeline; what is
drawn on them depends on the zoom and is cut by ``static/timeline.js`` from the arrays of
:mod:`mhcplan.planner.figures.timeline_data`.
"""

# plotly's methods are generated and their arguments untyped
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from mhcplan.planner.figures.timeline_data import PAINTS
from mhcplan.planner.report.schema import COMPONENT_FIELDS, BreakdownNs
from mhcplan.planner.report.text import CLASS_NAMES, residual_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhcplan.planner.report.schema import PlanReport

_CLASS_COLORS = {
    "compute": PAINTS["F"].color,
    "mhc": PAINTS["mhc"].color,
    "recompute": PAINTS["recompute"].color,
    "optimizer": PAINTS["optimizer"].color,
    "exposed_ep": PAINTS["ep"].color,
    "exposed_pp": PAINTS["pp"].color,
    "exposed_dp": PAINTS["dp"].color,
    "host": "#6F6F6F",
    "bubble": "rgba(128,128,128,0.35)",
}
_COMPONENT_COLORS = {
    "parameters": PAINTS["I"].color,
    "gradients": PAINTS["W"].color,
    "optimizer": PAINTS["optimizer"].color,
    "activations": PAINTS["F"].color,
    "recompute": PAINTS["recompute"].color,
    "communication": PAINTS["pp"].color,
    "logits": PAINTS["mhc"].color,
    "workspace": PAINTS["ep"].color,
}
_RANKS_NAMED = 20  # ranks at most that all have their number on an axis
_TICK_PIXELS = 9  # a lane's least height for a name of its own
_MARK = "#808080"  # told from light and dark alike
_LANE_PIXELS = (4.5, 9)  # least and most pixels of a lane of height 1
_LANES_PIXELS = 900  # what all lanes together should take
_MEMORY_PIXELS = 180
_GAP_PIXELS = 28
LIMIT_MARGIN = 56  # right of the axes, where the limit is named: no bar or curve lies there
_MARGIN = {"l": 120, "r": LIMIT_MARGIN, "t": 16, "b": 44}
THOUSANDS: dict[str, Any] = {"exponentformat": "none", "separatethousands": True}  # 10,000, not 10k


def breakdown_figure(report: PlanReport, pinned: PlanReport | None = None) -> go.Figure:
    """Where the step's time goes: the plan above its baseline, one bar each, ms.

    A plan that is pinned beside it stands first, as A, and the plan is B.
    """
    bars = _bars(report, "")
    if pinned is not None:
        a, b = _bars(pinned, "A: "), _bars(report, "B: ")
        same = report.baseline_breakdown_ns == pinned.baseline_breakdown_ns
        bars = dict([*a.items()][:1] if same else a) | b
    figure = go.Figure()
    for name in BreakdownNs.model_fields:
        figure.add_bar(
            name=CLASS_NAMES[name],
            y=list(bars),
            x=[getattr(parts, name) / 1e6 for parts in bars.values()],
            orientation="h",
            marker=_marker(_CLASS_COLORS[name], hatched=name == "recompute"),
            hovertemplate="%{x:,.2f} ms<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(plain_layout(height=90 + 60 * len(bars)), barmode="stack")
    figure.update_xaxes(title={"text": "ms of a step", "standoff": 4}, **THOUSANDS)
    figure.update_yaxes(autorange="reversed")
    return figure


def memory_figure(report: PlanReport, pinned: PlanReport | None = None) -> go.Figure:
    """Memory of every rank at its peak by component, GB, under the limit; marks are ``pinned``."""
    ranks = list(range(len(report.memory)))
    figure = go.Figure()
    for field in COMPONENT_FIELDS:
        name = field.removesuffix("_bytes")
        figure.add_bar(
            name=name,
            x=ranks,
            y=[getattr(rank, field) / 1e9 for rank in report.memory],
            marker=_marker(_COMPONENT_COLORS[name], hatched=name == "recompute"),
            hovertemplate="rank %{x}: %{y:,.2f} GB<extra>%{fullData.name}</extra>",
        )
    figure.add_bar(
        name="margin, NCCL and context",
        x=ranks,
        y=[(rank.device_bytes - rank.peak_bytes) / 1e9 for rank in report.memory],
        marker=_marker("rgba(128,128,128,0.35)"),
        hovertemplate="rank %{x}: %{y:,.2f} GB<extra>%{fullData.name}</extra>",
    )
    if pinned is not None:
        figure.add_scatter(
            name="A in all",
            x=list(range(len(pinned.memory))),
            y=[rank.device_bytes / 1e9 for rank in pinned.memory],
            mode="markers",
            marker={"symbol": "line-ew", "size": 26, "line": {"width": 2.5, "color": _MARK}},
            hovertemplate="rank %{x}: %{y:,.2f} GB<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        plain_layout(height=320),
        margin={"l": 56, "r": LIMIT_MARGIN, "t": 16, "b": 44},
        barmode="stack",
        shapes=[limit_line(report.memory_limit_bytes, "y")],
        annotations=[limit_text(report.memory_limit_bytes, "y")],
    )
    most = max(len(ranks), len(pinned.memory) if pinned else 0)
    figure.update_xaxes(
        title={"text": "rank", "standoff": 4},
        range=[-0.5, most - 0.5],
        dtick=1 if most <= _RANKS_NAMED else None,
    )
    figure.update_yaxes(title="GB", rangemode="tozero")
    return figure


def timeline_figure(
    data: Mapping[str, Any], limit_bytes: int | None, lanes_pixels: int = _LANES_PIXELS
) -> go.Figure:
    """Axes of the timeline: a lane for each rank and stream, memory beneath on the same time axis.

    Args:
        data: of :func:`mhcplan.planner.figures.timeline_data.timeline_data`.
        limit_bytes: the memory limit, None where it is not known.
        lanes_pixels: height that all lanes together should take.
    """
    lanes: list[dict[str, Any]] = data["lanes"]
    height = lanes[-1]["bottom"] if lanes else 1
    lane = min(max(lanes_pixels / height, _LANE_PIXELS[0]), _LANE_PIXELS[1])
    drawn = round(lane * height) + _GAP_PIXELS + _MEMORY_PIXELS
    ticks = _lane_ticks(lanes, lane)
    limits = [] if limit_bytes is None else [limit_bytes]
    figure = go.Figure()
    figure.update_layout(
        plain_layout(height=drawn + _MARGIN["t"] + _MARGIN["b"]),
        barmode="overlay",
        hovermode="closest",
        dragmode="pan",
        showlegend=False,
        margin=_MARGIN,
        shapes=[*_rank_borders(lanes), *(limit_line(limit, "y2") for limit in limits)],
        annotations=[limit_text(limit, "y2") for limit in limits],
        xaxis={
            "range": [0, data["step_ns"] / 1e6],
            "title": "ms since the step began",
            **THOUSANDS,
            "anchor": "y2",
            "showspikes": True,
            "spikemode": "across",
            "spikethickness": 1,
            "spikedash": "solid",
        },
        yaxis={
            "range": [height, 0],
            "domain": [(_MEMORY_PIXELS + _GAP_PIXELS) / drawn, 1],
            "tickvals": list(ticks),
            "ticktext": list(ticks.values()),
            "tickfont": {"size": 9},
            "showgrid": False,
            "zeroline": False,
            "showspikes": False,
            "fixedrange": True,
        },
        yaxis2={
            "domain": [0, _MEMORY_PIXELS / drawn],
            "title": "allocated, GB",
            "rangemode": "tozero",
            "showspikes": False,
            "fixedrange": True,
        },
    )
    return figure


def plain_layout(height: int) -> dict[str, Any]:
    """What all figures share: transparent, the legend above."""
    return {
        "template": go.layout.Template(),
        "height": height,
        "margin": {"l": 120, "r": 16, "t": 16, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    }


def _bars(report: PlanReport, name: str) -> dict[str, BreakdownNs]:
    """A plan's bar and its baseline's, which the plain residual does not have."""
    bars = {f"{name}{residual_name(report.plan)}": report.breakdown_ns}
    if not report.plan.residual.is_plain:
        bars[f"{name}plain residual"] = report.baseline_breakdown_ns
    return bars


def _marker(color: str, *, hatched: bool = False) -> dict[str, Any]:
    marker: dict[str, Any] = {"color": color, "line": {"width": 0}}
    if hatched:
        marker["pattern"] = {"shape": "/", "fillmode": "overlay", "size": 6}
    return marker


def limit_line(limit_bytes: int, axis: str) -> dict[str, Any]:
    """The memory limit as a line across, on an axis in GB."""
    limit = limit_bytes / 1e9
    return {
        "type": "line",
        "xref": "paper",
        "yref": axis,
        "x0": 0,
        "x1": 1,
        "y0": limit,
        "y1": limit,
        "line": {"dash": "dash", "width": 1.5, "color": PAINTS["mhc"].color},
    }


def limit_text(limit_bytes: int, axis: str) -> dict[str, Any]:
    """What stands at that line's end, in a margin of ``LIMIT_MARGIN`` pixels."""
    limit = limit_bytes / 1e9
    return {
        "text": f"limit<br>{limit:,.1f} GB",
        "xref": "paper",
        "yref": axis,
        "x": 1,
        "y": limit,
        "xanchor": "left",
        "align": "left",
        "showarrow": False,
        "font": {"size": 11},
    }


def _lane_ticks(lanes: list[dict[str, Any]], lane_pixels: float) -> dict[float, str]:
    """Where names stand: a rank's first lane has the rank's, lanes of one purpose share one."""
    ticks: dict[float, str] = {}
    named = None
    for (rank, purpose), group in groupby(lanes, key=lambda lane: (lane["rank"], lane["purpose"])):
        same = list(group)
        top, bottom = same[0]["top"], same[-1]["bottom"]
        if rank != named:
            ticks[(top + bottom) / 2] = f"rank {rank} {purpose}"
        elif (bottom - top) * lane_pixels >= _TICK_PIXELS:
            ticks[(top + bottom) / 2] = purpose
        named = rank
    return ticks


def _rank_borders(lanes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "type": "line",
            "xref": "paper",
            "yref": "y",
            "x0": 0,
            "x1": 1,
            "y0": (above["bottom"] + lane["top"]) / 2,
            "y1": (above["bottom"] + lane["top"]) / 2,
            "line": {"width": 1, "color": "rgba(128,128,128,0.5)"},
        }
        for above, lane in pairwise(lanes)
        if lane["rank"] != above["rank"]
    ]
