"""The HTML page of a prediction: one file, no server, nothing fetched.

plotly.js comes out of the installed plotly package and is inlined, so that the page works from a
USB stick; its content security policy forbids every request. Texts that come from plans and
profiles are escaped.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any, cast

from mhcplan.planner.figures.step import breakdown_figure, memory_figure, timeline_figure
from mhcplan.planner.figures.timeline_data import timeline_data
from mhcplan.planner.report.text import certainty, headline, remarks, residual_name, sections

if TYPE_CHECKING:
    from collections.abc import Iterable

    import plotly.graph_objects as go  # pyright: ignore[reportMissingTypeStubs]

    from mhcplan.planner.predict import Prediction
    from mhcplan.planner.report.schema import PlanReport
    from mhcplan.planner.report.text import Section


def timeline_page(prediction: Prediction, report: PlanReport) -> str:
    """The page of a prediction: the answer, the timeline, time and memory, the tables."""
    ops = timeline_data(prediction.step)
    data = {
        "ops": ops,
        "timeline": figure_json(timeline_figure(ops, report.memory_limit_bytes)),
        "breakdown": figure_json(breakdown_figure(report)),
        "memory": figure_json(memory_figure(report)),
    }
    return Template(static_text("page.html")).substitute(
        title=escape(f"{report.plan.model.name}, {residual_name(report.plan)}: a predicted step"),
        style=static_text("page.css"),
        verdict="fits" if report.fits else "over",
        answer=escape(headline(report)),
        certainty=escape(certainty(report)),
        tables=tables_html(sections(report)),
        warnings=_warnings(report),
        command=escape(report.command),
        version=escape(report.mhcplan_version),
        plan_digest=report.plan_digest[:12],
        profile_digest=report.profile_digest[:12],
        plotly=plotly_js(),
        data=script_json(data),
        script="\n".join(map(static_text, ("timeline.js", "toolbar.js", "page.js"))),
    )


def static_text(name: str) -> str:
    """A file of ``static``, which becomes part of a page."""
    return files("mhcplan.planner.figures").joinpath("static", name).read_text(encoding="utf-8")


def plotly_js() -> str:
    """plotly.js of the installed plotly package."""
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def figure_json(figure: go.Figure) -> dict[str, Any]:
    """A figure as plotly.js takes it."""
    return cast("dict[str, Any]", figure.to_plotly_json())  # pyright: ignore[reportUnknownMemberType]


def script_json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def tables_html(sections: Iterable[Section]) -> str:
    """Sections as HTML tables, each in a box of its own."""
    return "\n".join(f"<div>{table_html(section)}</div>" for section in sections)


def table_html(section: Section) -> str:
    """A section as an HTML table; it also stands in notebooks."""
    words = "" if any(section.columns) else ' class="words"'
    head = "".join(f"<th>{escape(name)}</th>" if name else "<td></td>" for name in section.columns)
    lines = [f"<table{words}><caption>{escape(section.title)}</caption>"]
    if any(section.columns):
        lines.append(f"<thead><tr>{head}</tr></thead>")
    for row in section.rows:
        total = ' class="total"' if row[0] == "step" else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{total}>{cells}</tr>")
    return "".join([*lines, "</table>"])


def _warnings(report: PlanReport) -> str:
    said = remarks(report)
    if not said:
        return ""
    items = "".join(f"<li>{escape(remark)}</li>" for remark in said)
    return f"<section><h2>Assumed and simplified</h2><ul>{items}</ul></section>"
