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

from mhcplan.planner.compare.comparison import compare_sides
from mhcplan.planner.compare.sides import side_of
from mhcplan.planner.compare.text import sections as difference_sections
from mhcplan.planner.export.files import TRACE_NAME, export
from mhcplan.planner.export.formats import ExportFormat
from mhcplan.planner.figures.step import breakdown_figure, memory_figure, timeline_figure
from mhcplan.planner.figures.timeline_data import timeline_data
from mhcplan.planner.figures.timeline_page import figure_json, table_html, timeline_page
from mhcplan.planner.plan.file import parse_plan, plan_text
from mhcplan.planner.plan.spec import SpecError
from mhcplan.planner.predict import predict
from mhcplan.planner.report.make import make_report
from mhcplan.planner.report.schema import COMPONENT_FIELDS
from mhcplan.planner.report.text import CLASS_NAMES, certainty, headline, remarks, sections
from mhcplan.planner.report.uncertainty import intervals
from mhcplan.profiles.schema import ProfileError
from mhcplan.profiles.store import find_profile
from mhcplan.sim.jit import NumbaError
from mhcplan.web.facts import facts
from mhcplan.web.whatif import Refused, WhatIf, refused, whatif_of

if TYPE_CHECKING:
    from mhcplan.planner.predict import Prediction
    from mhcplan.planner.report.schema import PlanReport
    from mhcplan.profiles.schema import Profile

_KEPT = 4  # predictions: of the page, of the plan pinned beside it, and of where it came from
_LANES_PIXELS = 520  # of a timeline in the page


class File(NamedTuple):
    """Something to download."""

    name: str
    content: bytes


def warm_up() -> None:
    """Compile and load what every answer needs."""
    predicted(WhatIf())


def warm_up_all() -> None:
    """The same, and what is needed once an answer rests."""
    how_sure(WhatIf())


def answer(whatif: WhatIf, pinned: WhatIf | None) -> bytes:
    """The answer, its figures and tables; with a plan pinned beside it, what differs.

    Raises:
        Refused: see :func:`predicted`.
    """
    _, report = predicted(whatif)
    try:
        beside = predicted(pinned)[1] if pinned else None
    except Refused as error:
        raise error.of_pinned() from None
    return _json(
        {
            "report": report.model_dump(mode="json"),
            "query": whatif.query(),
            "headline": headline(report),
            "facts": [fact._asdict() for fact in facts(report, beside)],
            "figures": {
                "breakdown": figure_json(breakdown_figure(report, beside)),
                "memory": figure_json(memory_figure(report, beside)),
            },
            "tables": _tables(report),
            "names": [pinned.name(), whatif.name()] if pinned else [],
            "differences": _differences(whatif, pinned) if pinned else [],
        }
    )


@lru_cache(maxsize=_KEPT)
def timeline(whatif: WhatIf) -> bytes:
    """The timeline: its ops as packed arrays, and its axes; the last few are kept.

    Raises:
        Refused: see :func:`predicted`.
    """
    prediction, report = predicted(whatif)
    ops = timeline_data(prediction.step)
    figure = timeline_figure(ops, report.memory_limit_bytes, lanes_pixels=_LANES_PIXELS)
    return _json({"ops": ops, "timeline": figure_json(figure)})


def how_sure(whatif: WhatIf) -> bytes:
    """How sure the answer is, in one line, and all that has to be said beside it.

    Raises:
        Refused: see :func:`predicted`.
    """
    report = _with_intervals(whatif)
    return _json({"line": certainty(report), "remarks": remarks(report)})


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
    except (SpecError, ProfileError, NumbaError) as error:
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
    a, b = (side_of(shown.name(), *predicted(shown)) for shown in (pinned, whatif))
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


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
