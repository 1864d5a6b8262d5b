"""What the page asks for, worked out: plain functions that run in a worker process.

All take what-ifs and give what is sent: JSON as bytes, or a file. The figures are those of the HTML
export, the words those of the terminal, the files those of ``predict --out`` and ``export``.
"""

from __future__ import annotations

import io
import json
import zipfile
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast, get_args

from mhcplan.planner.compare import compare_sides
from mhcplan.planner.compare_text import sections as difference_sections
from mhcplan.planner.export import TRACE_NAME, export
from mhcplan.planner.export_formats import ExportFormat
from mhcplan.planner.figures import (
    breakdown_figure,
    memory_figure,
    timeline_figure,
)
from mhcplan.planner.plan_file import parse_plan, plan_text
from mhcplan.planner.predict import predict
from mhcplan.planner.report import COMPONENT_FIELDS
from mhcplan.planner.report_make import make_report
from mhcplan.planner.report_text import (
    CLASS_NAMES,
    gb,
    headline,
    ms,
    remarks,
    residual_name,
    sections,
)
from mhcplan.planner.report_text import certainty as certainty_line
from mhcplan.planner.sides import side_of
from mhcplan.planner.spec import SpecError
from mhcplan.planner.timeline_data import timeline_data
from mhcplan.planner.timeline_page import figure_json, table_html, timeline_page
from mhcplan.planner.uncertainty import intervals
from mhcplan.profiles.schema import ProfileError
from mhcplan.profiles.store import find_profile
from mhcplan.web.whatif import Refused, WhatIf, refused, whatif_of

if TYPE_CHECKING:
    from mhcplan.planner.predict import Prediction
    from mhcplan.planner.report import PlanReport
    from mhcplan.profiles.schema import Profile

_KEPT = 4  # predictions: of the page, of the plan pinned beside it, and of where it came from
_LANES_PIXELS = 520  # of a timeline in the page


class File(NamedTuple):
    """Something to download."""

    name: str
    content: bytes


class Fact(NamedTuple):
    """A figure of the answer in words; ``pinned`` and ``change`` where a plan is pinned."""

    label: str
    value: str
    note: str = ""
    pinned: str = ""
    change: str = ""


def warm_up() -> None:
    """Compile and load what every answer needs."""
    predicted(WhatIf())


def answer(whatif: WhatIf, pinned: WhatIf | None) -> bytes:
    """The answer, its figures and tables; with a plan pinned beside it, what differs.

    Raises:
        Refused: see :func:`predicted`.
    """
    _, report = predicted(whatif)
    beside = predicted(pinned)[1] if pinned else None
    return _json(
        {
            "report": report.model_dump(mode="json"),
            "query": whatif.query(),
            "headline": headline(report),
            "facts": [fact._asdict() for fact in _facts(report, beside)],
            "figures": {
                "breakdown": figure_json(breakdown_figure(report, beside)),
                "memory": figure_json(memory_figure(report, beside)),
            },
            "tables": _tables(report),
            "differences": _differences(whatif, pinned) if pinned else [],
        }
    )


def timeline(whatif: WhatIf) -> bytes:
    """The timeline: its ops as packed arrays, and its axes.

    Raises:
        Refused: see :func:`predicted`.
    """
    prediction, report = predicted(whatif)
    ops = timeline_data(prediction.step)
    figure = timeline_figure(ops, report.memory_limit_bytes, lanes_pixels=_LANES_PIXELS)
    return _json({"ops": ops, "timeline": figure_json(figure)})


def certainty(whatif: WhatIf) -> bytes:
    """How sure the answer is, in one line, and all that has to be said beside it.

    Raises:
        Refused: see :func:`predicted`.
    """
    report = _with_intervals(whatif)
    return _json({"line": certainty_line(report), "remarks": remarks(report)})


def download(whatif: WhatIf, kind: str) -> File:
    """A file of ``predict --out``, or of ``export`` (several in a zip archive).

    Raises:
        Refused: no such kind, or a format that cannot hold this plan.
    """
    prediction, _ = predicted(whatif)
    plan = prediction.plan
    stem = f"{plan.model.name}-{plan.schedule}-n{plan.residual.num_rows}"
    match kind:
        case "html":
            return File(f"{stem}.html", timeline_page(prediction, _with_intervals(whatif)).encode())
        case "plan":
            return File(f"{stem}.toml", plan_text(plan).encode())
        case "report":
            return File(f"{stem}.json", _with_intervals(whatif).to_json().encode() + b"\n")
        case "perfetto":
            trace = export(prediction, "perfetto").files[TRACE_NAME]
            return File(f"{stem}.{TRACE_NAME}", cast("bytes", trace))
        case _ if kind in get_args(ExportFormat):
            return _archive(prediction, cast("ExportFormat", kind), f"{stem}-{kind}")
        case _:
            raise Refused(f"there is no download {kind!r}")


def open_plan(text: str) -> bytes:
    """The query of a plan file, for the page to go to.

    Raises:
        Refused: no plan file, or a plan that is not valid.
    """
    try:
        return _json({"query": whatif_of(parse_plan(text, "plan file")).query()})
    except SpecError as error:
        raise refused(error) from None


def predicted(whatif: WhatIf) -> tuple[Prediction, PlanReport]:
    """The prediction and its report; the last few are kept.

    Raises:
        Refused: the plan cannot be run, or its profile does not price it.
    """
    try:
        return _predicted(whatif)
    except (SpecError, ProfileError) as error:
        raise refused(error) from None


@lru_cache(maxsize=_KEPT)
def _predicted(whatif: WhatIf) -> tuple[Prediction, PlanReport]:
    plan = whatif.plan()
    prediction = predict(plan, _profile(plan.profile))
    return prediction, make_report(prediction, whatif.command())


@lru_cache(maxsize=_KEPT)
def _with_intervals(whatif: WhatIf) -> PlanReport:
    """The report as the command line gives it, which takes about as long again."""
    prediction, _ = predicted(whatif)
    return make_report(prediction, whatif.command(), intervals(prediction))


@lru_cache(maxsize=8)
def _profile(name: str) -> Profile:
    """Read once: a profile's file is not watched while the server runs."""
    return find_profile(name)


def _tables(report: PlanReport) -> dict[str, list[str]]:
    """The report's tables as HTML: what the figures show beneath them, the others by themselves."""
    rows = {
        "breakdown": CLASS_NAMES["compute"],
        "memory": COMPONENT_FIELDS[0].removesuffix("_bytes"),
    }
    tables: dict[str, list[str]] = {"breakdown": [], "memory": [], "others": []}
    for section in sections(report):
        names = {row[0] for row in section.rows}
        place = next((place for place, row in rows.items() if row in names), "others")
        tables[place].append(table_html(section))
    return tables


def _differences(whatif: WhatIf, pinned: WhatIf) -> list[str]:
    a, b = (
        side_of(shown.command().removeprefix("mhcplan predict "), *predicted(shown))
        for shown in (pinned, whatif)
    )
    return [table_html(section) for section in difference_sections(compare_sides(a, b))]


def _archive(prediction: Prediction, to: ExportFormat, stem: str) -> File:
    try:
        files, losses = export(prediction, to)
    except SpecError as error:
        raise Refused(" ".join(str(error).split())) from None
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("LEFT-OUT.txt", "".join(f"{to} leaves out {loss}\n" for loss in losses))
    return File(f"{stem}.zip", packed.getvalue())


def _facts(report: PlanReport, beside: PlanReport | None) -> list[Fact]:
    """The answer's figures, the first ones first."""
    facts = _own_facts(report)
    if beside is None:
        return facts
    return [
        fact._replace(pinned=pinned.value, change=change)
        for fact, pinned, change in zip(
            facts, _own_facts(beside), _changes(beside, report), strict=True
        )
    ]


def _own_facts(report: PlanReport) -> list[Fact]:
    spare = report.memory_limit_bytes - report.device_memory_bytes
    limit = f"{gb(report.memory_limit_bytes)} GB"
    fits = f"fits {limit}, {gb(spare)} to spare"
    block, plan = report.recompute_block, residual_name(report.plan)
    return [
        Fact("overhead", f"{report.overhead_percent:+.2f} %", f"of {plan} over plain"),
        Fact("step", f"{ms(report.step_time_ns)} ms", f"plain {ms(report.baseline_step_time_ns)}"),
        Fact(
            "memory of a GPU",
            f"{gb(report.device_memory_bytes)} GB",
            fits if spare >= 0 else f"does NOT fit {limit}: {gb(-spare)} over",
        ),
        Fact("tokens/s", f"{report.tokens_per_second:,}", f"of all {report.gpus:,} GPUs"),
        Fact("recompute block", f"{block or 'none'}", "sites" if block else ""),
        Fact("bubble", f"{report.bubble_percent:.2f} %", f"of rank {report.reported_rank}"),
        Fact("measured", f"{report.sources_percent.measured:.1f} %", _other_sources(report)),
    ]


def _other_sources(report: PlanReport) -> str:
    """Where the rest of the durations comes from."""
    shares = report.sources_percent.model_dump(exclude={"measured"})
    return ", ".join(f"{name} {share:.1f}" for name, share in shares.items() if share)


def _changes(a: PlanReport, b: PlanReport) -> list[str]:
    """What differs from A to B, a text for each fact."""
    memory = b.device_memory_bytes - a.device_memory_bytes
    measured = b.sources_percent.measured - a.sources_percent.measured
    return [
        f"{b.overhead_percent - a.overhead_percent:+.2f} points",
        f"{100 * (b.step_time_ns / a.step_time_ns - 1):+.2f} %",
        f"{memory / 1e9:+,.2f} GB",
        f"{b.tokens_per_second - a.tokens_per_second:+,}",
        "",
        f"{b.bubble_percent - a.bubble_percent:+.2f} points",
        f"{measured:+.1f} points",
    ]


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
