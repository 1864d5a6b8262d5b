"""One side of a comparison: a plan, a report or a trace, read from what was typed.

A side is typed as a command line types a plan, in one word: ``mhc-27b``, ``plan.toml``,
``"mhc-27b --n 2 --schedule zb1p"``; or it is the path of a report (``predict --json``) or of a
trace, predicted (``export --to stream-json``) or measured (``run``). What a side cannot know is
None: a report has no ops, a trace has no baseline.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from mhcplan.planner.plan.spec import SpecError, make_plan
from mhcplan.planner.predict import Step, predict
from mhcplan.planner.report.make import make_report
from mhcplan.planner.report.schema import BreakdownNs, PlanReport, tokens_per_second
from mhcplan.profiles.specs import Spec
from mhcplan.sim.breakdown import breakdown
from mhcplan.sim.files import FormatError, Trace, parse_trace
from mhcplan.sim.memory import memory_of
from mhcplan.sim.program import CostTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.predict import Prediction

SideKind = Literal["plan", "report", "predicted trace", "measured trace"]


class SideFigures(Spec):
    """What is known of one side; null: this kind of side does not hold it."""

    name: Annotated[str, Field(description="as it was typed")]
    kind: SideKind
    gpus: PositiveInt | None = None
    step_time_ns: PositiveInt
    baseline_step_time_ns: PositiveInt | None = None
    overhead_percent: float | None = None
    tokens_per_second: Annotated[NonNegativeInt | None, Field(description="of the whole job")] = (
        None
    )
    breakdown_ns: Annotated[BreakdownNs, Field(description="of the rank that computes longest")]
    recompute_block: PositiveInt | None = None
    peak_memory_bytes: Annotated[
        NonNegativeInt | None, Field(description="allocated, of the fullest rank")
    ] = None
    device_memory_bytes: Annotated[
        NonNegativeInt | None,
        Field(description="with the allocator's margin, NCCL and the CUDA context"),
    ] = None
    memory_limit_bytes: PositiveInt | None = None


@dataclass(frozen=True)
class Side:
    """One of two things that are compared.

    Attributes:
        plan: the plan's fields; None where a trace does not say what it ran.
        step: its ops and when they ran; None for a report. The step of a trace has no costs.
    """

    figures: SideFigures
    plan: PlanSpec | None
    step: Step | None


def read_side(text: str, plan_of: Callable[[list[str]], PlanSpec]) -> Side:
    """Read or predict what ``text`` names.

    Args:
        text: see the module's docstring.
        plan_of: the plan of a command line's words.

    Raises:
        SpecError: no such plan, or a file that is none of these.
        ProfileError: the plan cannot be priced.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SpecError(f"{text}: {str(error).lower()}") from None
    if text.endswith(".json") and (len(words) == 1 or Path(text).is_file()):
        return _read_json(text)
    return _predicted(text, plan_of(words))


def predicted_side(name: str, plan: PlanSpec) -> Side:
    """Predict a plan and call it ``name``."""
    return _predicted(name, plan)


def side_of(name: str, prediction: Prediction, report: PlanReport) -> Side:
    """What was predicted already as a side called ``name``."""
    return Side(_figures_of_report(name, "plan", report), prediction.plan, prediction.step)


def _predicted(name: str, plan: PlanSpec) -> Side:
    prediction = predict(plan)
    return side_of(name, prediction, make_report(prediction, name))


def _read_json(name: str) -> Side:
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise SpecError(f"{name}: cannot be read ({error.strerror})") from None
    format_ = _format_of(name, data)
    if format_ == "mhcplan.report":
        return _read_report(name, data)
    if format_ == "mhcplan.trace":
        try:
            return _traced(name, parse_trace(data, name))
        except FormatError as error:
            raise SpecError(str(error)) from None
    raise SpecError(
        f"{name}: format={format_!r} must be 'mhcplan.report' or 'mhcplan.trace' (or give a plan)"
    )


def _format_of(name: str, data: bytes) -> object:
    try:
        document: object = json.loads(data)
    except (ValueError, RecursionError):
        raise SpecError(f"{name}: not JSON, or cut short") from None
    return cast("dict[str, object]", document).get("format") if isinstance(document, dict) else None


def _read_report(name: str, data: bytes) -> Side:
    try:
        report = PlanReport.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "report"
        raise SpecError(f"{name}: {where}: {first['msg']}") from None
    return Side(_figures_of_report(name, "report", report), report.plan, None)


def _figures_of_report(name: str, kind: SideKind, report: PlanReport) -> SideFigures:
    return SideFigures(
        name=name,
        kind=kind,
        gpus=report.gpus,
        step_time_ns=report.step_time_ns,
        baseline_step_time_ns=report.baseline_step_time_ns,
        overhead_percent=report.overhead_percent,
        tokens_per_second=report.tokens_per_second,
        breakdown_ns=report.breakdown_ns,
        recompute_block=report.recompute_block,
        peak_memory_bytes=report.peak_memory_bytes,
        device_memory_bytes=report.device_memory_bytes,
        memory_limit_bytes=report.memory_limit_bytes,
    )


def _traced(name: str, trace: Trace) -> Side:
    if trace.timeline.step_ns <= 0:
        raise SpecError(f"{name}: nothing in this trace takes time")
    step = _step_of(name, trace)
    plan = _plan_of_trace(name, trace.meta)
    block = trace.program.meta.get("recompute_block")
    figures = SideFigures(
        name=name,
        kind="measured trace" if trace.source == "measured" else "predicted trace",
        gpus=plan.layout.gpus if plan else None,
        step_time_ns=step.timeline.step_ns,
        tokens_per_second=(
            tokens_per_second(plan.tokens_per_step, step.timeline.step_ns) if plan else None
        ),
        breakdown_ns=BreakdownNs(**step.breakdown.reported),
        recompute_block=block if isinstance(block, int) else None,
    )
    return Side(figures, plan, step)


def _step_of(name: str, trace: Trace) -> Step:
    """A step that was not priced here: its ops' workspace is not known."""
    program = trace.program
    zeros = np.zeros(len(program.cost_keys), np.int64)
    table = CostTable(zeros, zeros, zeros)
    try:
        memory, parts = memory_of(program, table), breakdown(program, trace.timeline)
    except ValueError as error:
        raise SpecError(f"{name}: {error}") from None
    return Step(program, (), program, table, trace.timeline, memory, parts)


def _plan_of_trace(name: str, meta: dict[str, Any]) -> PlanSpec | None:
    if not isinstance(meta.get("plan"), dict):
        return None
    try:
        return make_plan(meta["plan"])
    except SpecError as error:
        raise SpecError(f"{name}: meta.plan: {error}") from None
