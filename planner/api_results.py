"""What the functions of the Python API return: results that show themselves in a notebook.

A result holds the same data as the command's ``--json``; printed it is what the command says, and
in Jupyter a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mhcplan.planner.report import text as report_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mhcplan.planner.compare.comparison import Comparison
    from mhcplan.planner.compare.sides import Side
    from mhcplan.planner.explain.explanation import Explanation
    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.predict import Prediction
    from mhcplan.planner.report.schema import PlanReport
    from mhcplan.planner.search.report import SearchReport
    from mhcplan.planner.sweep.row import SweepRow
    from mhcplan.planner.sweep.run import Sweep

_WIDTH = 110  # columns of tables that are shown as text
_STYLE = """
.mhcplan table { margin: 1em 0; font-variant-numeric: tabular-nums; }
.mhcplan caption { text-align: left; font-weight: 600; }
.mhcplan th, .mhcplan td { text-align: right; padding: 1px 10px; }
.mhcplan td:first-child, .mhcplan table.words td { text-align: left; }
.mhcplan tr.total td { font-weight: 600; }
"""  # what a notebook's own style sheet may lack
_AS_HTML: Any = {"inline_styles": True, "code_format": "<pre>{code}</pre>"}


@dataclass(frozen=True, repr=False)
class Predicted:
    """A predicted plan.

    Attributes:
        report: every figure, as ``predict --json`` prints them.
        prediction: the simulated steps themselves: programs, costs, timelines, memory.
    """

    report: PlanReport
    prediction: Prediction

    def explain(self) -> Explained:
        """Why the step takes as long as it does, and what would help: simulates a dozen plans."""
        from mhcplan.planner.explain.explanation import explain

        command = self.report.command.replace(" predict ", " explain ", 1)
        return Explained(explain(self.prediction, command))

    def page(self) -> str:
        """The HTML page with the timeline, as ``predict --out`` writes it."""
        from mhcplan.planner.figures.timeline_page import timeline_page

        return timeline_page(self.prediction, self.report)

    def __repr__(self) -> str:
        """The answer in one line."""
        return report_text.headline(self.report)

    def _repr_html_(self) -> str:
        lines = (report_text.headline(self.report), report_text.certainty(self.report))
        return _html(lines, report_text.sections(self.report), report_text.remarks(self.report))


@dataclass(frozen=True, repr=False)
class Explained:
    """Why a step takes as long as it does.

    Attributes:
        explanation: every figure, as ``explain --json`` prints them.
    """

    explanation: Explanation

    def __repr__(self) -> str:
        """The answer in words, a sentence a line."""
        from mhcplan.planner.explain.text import sentences

        return "\n".join(sentences(self.explanation))

    def _repr_html_(self) -> str:
        from mhcplan.planner.explain.text import sections, sentences

        first, *others = sentences(self.explanation)
        return _html((first,), sections(self.explanation), others)


@dataclass(frozen=True, repr=False)
class Compared:
    """Two steps side by side.

    Attributes:
        comparison: every figure, as ``compare --json`` prints them.
        sides: what was compared, with its timelines where there are any.
    """

    comparison: Comparison
    sides: tuple[Side, Side]

    def page(self) -> str:
        """The HTML page with both timelines, as ``compare --out`` writes it."""
        from mhcplan.planner.compare.page import compare_page

        return compare_page(self.comparison, *self.sides)

    def __repr__(self) -> str:
        """The answer in one line."""
        from mhcplan.planner.compare.text import headline

        return headline(self.comparison)

    def _repr_html_(self) -> str:
        from mhcplan.planner.compare.text import headline, remarks, sections

        found = self.comparison
        return _html((headline(found),), sections(found), tuple(remarks(found)))


@dataclass(frozen=True, repr=False)
class Swept:
    """A sweep.

    Attributes:
        sweep: its rows in the order of its combinations, and what was noted on the way.
    """

    sweep: Sweep

    @property
    def best(self) -> list[SweepRow]:
        """Predicted rows, those that fit first, by tokens a second of a GPU."""
        from mhcplan.planner.sweep.run import ranked

        return ranked(self.sweep.rows)

    def records(self) -> list[dict[str, object]]:
        """A flat dictionary a row, as ``pandas.DataFrame`` takes them."""
        records: list[dict[str, object]] = []
        for row in self.sweep.rows:
            figures = row.figures.model_dump() if row.figures else {}
            about = {"status": row.status, "reason": row.reason, "gpus": row.gpus}
            records.append({**row.values, **about, **figures})
        return records

    def __repr__(self) -> str:
        """The table, as the command prints it."""
        return self._printed().export_text()

    def _repr_html_(self) -> str:
        return self._printed().export_html(**_AS_HTML)

    def _printed(self) -> Console:
        from mhcplan.planner.sweep.text import print_sweep

        console = _recorder()
        print_sweep(self.sweep, console)
        return console


@dataclass(frozen=True, repr=False)
class Planned:
    """The best plans for given GPUs.

    Attributes:
        reports: a search's answer for each n that was asked for.
    """

    reports: tuple[SearchReport, ...]

    @property
    def best(self) -> PlanSpec | None:
        """The plan of the fastest step of the first n, to be predicted; None if nothing fits."""
        found = self.reports[0].best
        return found[0].plan if found else None

    def __repr__(self) -> str:
        """The answer, as the command prints it."""
        return self._printed().export_text()

    def _repr_html_(self) -> str:
        return self._printed().export_html(**_AS_HTML)

    def _printed(self) -> Console:
        from mhcplan.planner.search.text import print_search

        console = _recorder()
        for report in self.reports:
            print_search(report, console)
        return console


@dataclass(frozen=True, repr=False)
class Exported:
    """A step in another tool's format.

    Attributes:
        files: content by file name.
        losses: what the format leaves out of this plan, a line each.
    """

    files: dict[str, str | bytes]
    losses: tuple[str, ...]

    def __repr__(self) -> str:
        """The names of the files, then what they leave out, a line each."""
        return "\n".join([", ".join(self.files), *(f"leaves out {loss}" for loss in self.losses)])


def _recorder() -> Console:
    """A console that keeps what is printed and shows none of it."""
    return Console(file=StringIO(), record=True, width=_WIDTH, highlight=False)


def _html(
    lines: Iterable[str], sections: Iterable[report_text.Section], remarks: Iterable[str]
) -> str:
    """What a notebook shows: lines, tables, remarks."""
    from mhcplan.planner.figures.timeline_page import table_html

    said = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
    return "".join(
        [
            f'<div class="mhcplan"><style>{_STYLE}</style>',
            *(f"<p><strong>{escape(line)}</strong></p>" for line in lines if line),
            *map(table_html, sections),
            f"<ul>{said}</ul>" if said else "",
            "</div>",
        ]
    )
