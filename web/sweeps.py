"""Small sweeps around a what-if, for the page's plots: its n, its L_r, and time against memory.

A sweep goes on a point a call, so that the server can show what there is, let someone else in
between, and stop when nobody looks any more. Every point is predicted as the page's own answer is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mhcplan.planner.figures.sweep import Point, axis_figure, pareto_figure
from mhcplan.planner.figures.timeline_page import figure_json
from mhcplan.planner.plan.spec import ScheduleName
from mhcplan.profiles.specs import SITES_PER_BLOCK
from mhcplan.web.answers import predicted
from mhcplan.web.controls import LABELS
from mhcplan.web.whatif import Refused, WhatIf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from mhcplan.planner.plan.spec import PlanSpec

SweepKind = Literal["n", "recompute_block", "pareto"]

_N, _BLOCK, _SCHEDULE = "residual.expansion_rate", "residual.recompute_block", "schedule"
_RATES = ("1", "2", "4", "8", "16")
_BLOCKS_AT_MOST = 12  # blocks between none and stage
_PARETO_BLOCKS = ("none", "2", "auto", "stage")


@dataclass(frozen=True)
class _Candidate:
    label: str
    group: str
    changes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        total: points in all.
        points: those that were predicted.
        refused: those that cannot be run, a line each.
    """

    total: int
    points: tuple[Point, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """Points that were tried."""
        return len(self.points) + len(self.refused)


def advance(whatif: WhatIf, kind: SweepKind, progress: Progress | None) -> tuple[Progress, Any]:
    """Predict the next point; gives how far it is and the figure so far, as plotly.js takes it.

    Raises:
        Refused: the what-if itself cannot be predicted.
    """
    prediction, report = predicted(whatif)
    candidates = tuple(_candidates(prediction.plan, kind))
    progress = progress or Progress(len(candidates))
    if progress.done < progress.total:
        progress = _with_next(progress, whatif, prediction.plan, candidates[progress.done])
    limit = report.memory_limit_bytes
    if kind == "pareto":
        return progress, figure_json(pareto_figure(progress.points, limit))
    labels = [candidate.label for candidate in candidates]
    return progress, figure_json(axis_figure(progress.points, LABELS[kind], labels, limit))


def _with_next(
    progress: Progress, whatif: WhatIf, chosen: PlanSpec, candidate: _Candidate
) -> Progress:
    there = whatif.changed(candidate.changes)
    try:
        prediction, report = predicted(there)
    except Refused as error:
        line = f"{candidate.label}: {error.message}"
        return Progress(progress.total, progress.points, (*progress.refused, line))
    point = Point(
        label=candidate.label,
        group=candidate.group,
        step_ns=report.step_time_ns,
        overhead_percent=report.overhead_percent,
        device_bytes=report.device_memory_bytes,
        measured_percent=report.sources_percent.measured,
        fits=report.fits,
        chosen=prediction.plan == chosen,
        key=there.query(),
    )
    return Progress(progress.total, (*progress.points, point), progress.refused)


def _candidates(plan: PlanSpec, kind: SweepKind) -> Iterator[_Candidate]:
    match kind:
        case "n":
            for rate in _RATES:
                yield _Candidate(rate, "", ((_N, rate),))
        case "recompute_block":
            for block in _blocks(plan):
                yield _Candidate(block, "", ((_BLOCK, block),))
        case "pareto":
            for schedule in get_args(ScheduleName):
                for block in _PARETO_BLOCKS:
                    label = f"{schedule}, recompute block {block}"
                    yield _Candidate(label, schedule, ((_SCHEDULE, schedule), (_BLOCK, block)))


def _blocks(plan: PlanSpec) -> Iterator[str]:
    """Recompute blocks up to the largest stage, all of them or evenly spread."""
    most = SITES_PER_BLOCK * max(len(stage) for stage in plan.stages)
    step = -(-most // _BLOCKS_AT_MOST)
    yield "none"
    yield from map(str, range(1 if step == 1 else step, most + 1, step))
    yield "auto"
