"""What a search answers, as data: the JSON of ``mhcplan plan --json`` and what its text is made of.

Times are integer nanoseconds, sizes integer bytes. The JSON Schema made of :class:`SearchReport` is
``docs/schemas/search.schema.json``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, WithJsonSchema

import mhcplan
from mhcplan.planner.plan.spec import PlanSpec
from mhcplan.planner.predict import predict
from mhcplan.planner.report.make import make_report
from mhcplan.planner.report.schema import BreakdownNs
from mhcplan.planner.report.text import CLASS_NAMES, gb, ms
from mhcplan.planner.sweep.points import cost_model, memory_limit_bytes, work_out
from mhcplan.planner.sweep.row import Figures
from mhcplan.profiles.specs import Spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mhcplan.planner.report.schema import PlanReport
    from mhcplan.planner.search.branch_and_bound import Candidate, Found
    from mhcplan.planner.search.space import Space
    from mhcplan.planner.sweep.points import ProfileName

SEARCH_FORMAT = "mhcplan.search"
SEARCH_VERSION = 1
BEST_SHOWN = 5

_CAUSES = 3  # of a runner-up's loss, the largest


class Choice(Spec):
    """A plan that was played and fits."""

    plan: Annotated[
        PlanSpec, WithJsonSchema({"type": "object", "description": "as plan.schema.json has it"})
    ]
    plan_digest: str
    figures: Figures


class SpaceCount(Spec):
    """What became of all plans that were to choose from; the numbers sum to ``plans``."""

    plans: NonNegativeInt
    played: Annotated[NonNegativeInt, Field(description="by the engine")]
    bounded: Annotated[
        NonNegativeInt, Field(description="proven worse than plans that were played")
    ]
    too_large: Annotated[NonNegativeInt, Field(description="do not fit in a GPU's memory")]
    unpriced: Annotated[NonNegativeInt, Field(description="the profile lacks a measurement")]
    unknown: Annotated[NonNegativeInt, Field(description="not reached in time")]
    illegal: Annotated[
        dict[str, PositiveInt],
        Field(description="combinations that are no plan, by the reason without its numbers"),
    ]
    unpriced_reasons: dict[str, PositiveInt]


class SearchReport(Spec):
    """The best plans for given GPUs, and how far that is proven."""

    format: Literal["mhcplan.search"] = SEARCH_FORMAT
    format_version: Literal[1] = SEARCH_VERSION
    mhcplan_version: str
    command: str
    method: Annotated[
        Literal["exact", "sampled"],
        Field(description="exact: branch and bound; sampled: Optuna chose what to play"),
    ]
    gpus: PositiveInt
    global_batch: Annotated[PositiveInt, Field(description="sequences a step of every plan")]
    tokens_per_step: PositiveInt
    memory_limit_bytes: PositiveInt
    profile_digest: str
    best: Annotated[
        tuple[Choice, ...],
        Field(description="the best plans of different layouts or schedules, the best first"),
    ]
    front: Annotated[
        tuple[Choice, ...],
        Field(description="no plan that was played beats these in both time and memory"),
    ]
    proven: Annotated[bool, Field(description="no plan of the space is faster than the first")]
    possible_gain_percent: Annotated[
        float | None,
        Field(description="how much less time an unknown plan could take; null if proven"),
    ]
    runner_up: Annotated[str | None, Field(description="why the second lost, in words")]
    space: SpaceCount
    seconds: float
    notes: tuple[str, ...] = ()


def make_search_report(
    found: Found,
    space: Space,
    plan: PlanSpec,
    profile: ProfileName,
    *,
    gpus: int,
    global_batch: int,
    command: str,
    method: Literal["exact", "sampled"] = "exact",
) -> SearchReport:
    """Report a search that began from ``plan``: figures of the best, with their baselines."""
    best, front = _best_of_families(found.candidates), found.front
    choices = _choices([*best, *front], profile)
    limit = memory_limit_bytes(plan, cost_model(profile).profile)
    tally, first = found.tally, found.candidates[:1]
    runners_up = best[1:] or found.candidates[1:]  # of another family, if one was worth playing
    gain = None
    if first and not found.proven and found.least_bound_ns is not None:
        gain = 100 * (1 - found.least_bound_ns / first[0].merit[0])
    return SearchReport(
        mhcplan_version=mhcplan.__version__,
        command=command,
        method=method,
        gpus=gpus,
        global_batch=global_batch,
        tokens_per_step=global_batch * plan.seq_len,
        memory_limit_bytes=limit,
        profile_digest=profile.digest,
        best=tuple(choices[: len(best)]),
        front=tuple(choices[len(best) :]),
        proven=bool(first) and found.proven,
        possible_gain_percent=gain,
        runner_up=_why_lost(best[0], runners_up[0], profile) if runners_up else None,
        space=SpaceCount(
            plans=tally.total, played=tally.played, bounded=tally.bounded,
            too_large=tally.too_large, unpriced=tally.unpriced.total(), unknown=tally.unknown,
            illegal=dict(space.illegal.most_common()),
            unpriced_reasons=dict(tally.unpriced.most_common()),
        ),
        seconds=round(found.seconds, 2),
        notes=tuple(_notes(limit, profile)),
    )  # fmt: skip


def plan_words(plan: PlanSpec, recompute_block: int | None) -> str:
    """What was chosen, in a line."""
    layout = plan.layout
    block = f"recompute block {recompute_block}" if recompute_block else "no recompute"
    return (
        f"pp {layout.pp} x ep {layout.ep} x dp {layout.dp}, {plan.schedule}, {plan.microbatches}"
        f" microbatches of {plan.micro_batch_size}, {block}, priority {plan.priority}"
    )


def loss_words(best: PlanReport, other: PlanReport) -> str:
    """Why ``other`` is slower than ``best``: the classes of the step that differ most."""
    more_ns = other.step_time_ns - best.step_time_ns
    more_bytes = other.device_memory_bytes - best.device_memory_bytes
    if more_ns == 0:
        return f"takes as long, and {gb(more_bytes)} GB more memory"
    differences = {
        name: getattr(other.breakdown_ns, name) - getattr(best.breakdown_ns, name)
        for name in BreakdownNs.model_fields
    }
    largest = sorted(differences, key=lambda name: -abs(differences[name]))[:_CAUSES]
    causes = [
        f"{ms(abs(ns))} ms {'more' if ns > 0 else 'less'} {CLASS_NAMES[name]}"
        for name in largest
        if (ns := differences[name])
    ]
    return (
        f"takes {100 * more_ns / best.step_time_ns:.2f} % ({ms(more_ns)} ms) longer:"
        f" {', '.join(causes)} on its busiest rank"
    )


def _why_lost(best: Candidate, other: Candidate, profile: ProfileName) -> str:
    known = cost_model(profile).profile
    reports = [make_report(predict(one.member.plan, known), "") for one in (best, other)]
    words = plan_words(other.member.plan, other.member.recompute_block)
    return f"{words}: {loss_words(*reports)}"


def _best_of_families(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The best plan of each layout and schedule, for the best few of these."""
    best: dict[PlanSpec, Candidate] = {}
    for candidate in candidates:
        plan = candidate.member.plan
        alike = plan.model_copy(update={"priority": "none", "residual": plan.baseline().residual})
        best.setdefault(alike, candidate)
    return list(best.values())[:BEST_SHOWN]


def _choices(candidates: Sequence[Candidate], profile: ProfileName) -> list[Choice]:
    plans = [candidate.member.plan for candidate in candidates]
    figures = [outcome.figures for outcome in work_out(plans, profile, "engine")]
    return [
        Choice(plan=plan, plan_digest=plan.digest(), figures=figure)
        for plan, figure in zip(plans, figures, strict=True)
        if figure is not None
    ]


def _notes(limit: int, profile: ProfileName) -> Iterable[str]:
    hardware = cost_model(profile).profile.hardware
    if limit > hardware.memory_bytes:
        yield (
            f"a limit of {gb(limit)} GB is more than the {gb(hardware.memory_bytes)} GB of"
            f" {hardware.name}, on which times were measured"
        )
