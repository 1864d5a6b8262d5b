"""The HTML page of a comparison: both timelines, one above the other, on one time axis."""

from __future__ import annotations

from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from mhcplan.planner.compare.text import headline, remarks, sections
from mhcplan.planner.figures.step import timeline_figure
from mhcplan.planner.figures.timeline_data import timeline_data
from mhcplan.planner.figures.timeline_page import (
    figure_json,
    plotly_js,
    script_json,
    static_text,
    tables_html,
)
from mhcplan.planner.plan.spec import SpecError

if TYPE_CHECKING:
    from mhcplan.planner.compare.comparison import Comparison
    from mhcplan.planner.compare.sides import Side


def compare_page(comparison: Comparison, a: Side, b: Side) -> str:
    """The page: one file, no server, nothing fetched.

    Raises:
        SpecError: a side is a report, which holds no timeline.
    """
    longest_ms = max(a.figures.step_time_ns, b.figures.step_time_ns) / 1e6
    data = {"sides": [_timeline(side, longest_ms) for side in (a, b)]}
    said = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(comparison))
    return Template(static_text("compare.html")).substitute(
        title=escape(f"{a.figures.name} against {b.figures.name}"),
        style=static_text("page.css"),
        answer=escape(headline(comparison)),
        a=escape(f"{a.figures.name} ({a.figures.kind})"),
        b=escape(f"{b.figures.name} ({b.figures.kind})"),
        tables=tables_html(sections(comparison)),
        remarks=f"<section><h2>To be said</h2><ul>{said}</ul></section>" if said else "",
        command=escape(comparison.command),
        version=escape(comparison.mhcplan_version),
        plotly=plotly_js(),
        data=script_json(data),
        script="\n".join(map(static_text, ("timeline.js", "toolbar.js", "compare.js"))),
    )


def _timeline(side: Side, longest_ms: float) -> dict[str, Any]:
    if side.step is None:
        raise SpecError(f"{side.figures.name}: a report holds no timeline; give its plan")
    ops = timeline_data(side.step)
    figure = timeline_figure(ops, side.figures.memory_limit_bytes)
    figure.layout.xaxis.range = [0, longest_ms]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    return {"ops": ops, "timeline": figure_json(figure)}
