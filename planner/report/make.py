"""From a prediction to its report: sums, shares and what has to be said beside the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import mhcplan
from mhcplan.planner.report.schema import (
    BreakdownNs,
    PlanReport,
    RankMemory,
    SourcesPercent,
    tokens_per_second,
)
from mhcplan.profiles.costs import sources_percent
from mhcplan.profiles.loads import assumptions
from mhcplan.profiles.presets import MTP_OFF
from mhcplan.sim import device, device_sms
from mhcplan.sim.memory import memory_report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mhcplan.planner.predict import Prediction, Step
    from mhcplan.planner.report.schema import Intervals
    from mhcplan.profiles.costs import Source

_UNSPLIT = "tensor and context parallelism are 1: a GPU has its layers whole"
_MTP = (
    "the multi-token-prediction head is one block like the model's last, with embedding and output"
    " head shared and its projection priced as a SwiGLU of as many weights"
)
_BALANCED = "routing is balanced, every expert gets the same number of tokens"


def make_report(
    prediction: Prediction, command: str, intervals: Intervals | None = None
) -> PlanReport:
    """Report a prediction; ``command`` is what a person types to get it again.

    ``intervals`` are those of :mod:`mhcplan.planner.report.uncertainty`, which take about as long
    as the prediction; None for those who do not need them.
    """
    plan, profile, step = prediction.plan, prediction.profile, prediction.step
    limit = plan.memory_limit_bytes or profile.hardware.memory_bytes
    memory = _memory(step)
    return PlanReport(
        mhcplan_version=mhcplan.__version__,
        plan=plan,
        plan_digest=plan.digest(),
        profile_digest=profile.digest,
        command=command,
        gpus=plan.layout.gpus,
        step_time_ns=step.timeline.step_ns,
        baseline_step_time_ns=prediction.baseline.timeline.step_ns,
        overhead_percent=prediction.overhead_percent,
        power_slowdown_percent=_power_slowdown_percent(prediction, step),
        baseline_power_slowdown_percent=_power_slowdown_percent(prediction, prediction.baseline),
        tokens_per_second=tokens_per_second(plan.tokens_per_step, step.timeline.step_ns),
        bubble_percent=step.breakdown.bubble_percent,
        reported_rank=step.breakdown.rank,
        breakdown_ns=BreakdownNs(**step.breakdown.reported),
        baseline_breakdown_ns=BreakdownNs(**prediction.baseline.breakdown.reported),
        recompute_block=prediction.recompute_block,
        fits=max(rank.device_bytes for rank in memory) <= limit,
        memory_limit_bytes=limit,
        peak_memory_bytes=max(rank.peak_bytes for rank in memory),
        baseline_peak_memory_bytes=max(rank.peak_bytes for rank in _memory(prediction.baseline)),
        memory=memory,
        sources_percent=SourcesPercent(**sources_percent(_shares(step))),
        intervals=intervals,
        num_ops=step.program.num_ops,
        engine=plan.engine,
        warnings=tuple(dict.fromkeys(_warnings(prediction))),
    )


def _memory(step: Step) -> tuple[RankMemory, ...]:
    rows = memory_report(step.program, step.table, step.memory)
    return tuple(RankMemory(**row) for row in rows)


def _shares(step: Step) -> Iterator[tuple[Source, int]]:
    """Summed duration of the ops of each cost key, all ranks, with its source."""
    times = np.bincount(step.program.cost, minlength=len(step.costs))
    for count, cost in zip(times.tolist(), step.costs, strict=True):
        yield cost.source, count * cost.duration_ns


def _warnings(prediction: Prediction) -> Iterator[str]:
    plan = prediction.plan
    for text in plan.model.assumed:
        if not (plan.mtp and text == MTP_OFF):
            yield f"{plan.model.name}: {text}"
    if plan.mtp:
        yield f"assumed: {_MTP}"
    for text in _assumed_costs(prediction.step):
        yield f"assumed cost: {text}"
    if plan.model.moe is not None:
        yield f"simplified: {_BALANCED}"
    yield f"simplified: {_UNSPLIT}"
    if not _has_power_limit(prediction):
        why = (
            "as the plan says"
            if plan.power == "unlimited"
            else f"as profile {plan.profile} does not say how the power limit slows arithmetic"
        )
        yield f"simplified: GPUs run at their full clock, {why}"
    elif (power := prediction.profile.power_model) and power.source == "assumed":
        yield f"assumed: what a GPU draws and how its clock follows: {power.citation}"
    has_contention = prediction.step.table.loads is not None
    if plan.gpu is not None:
        media = {group.medium for group in prediction.step.program.groups}
        for text in together(assumptions(prediction.profile, plan.gpu, media)):
            yield f"{'assumed' if has_contention else 'simplified'}: {text}"
    for text in (device_sms if has_contention else device).NOT_MODELLED:
        yield f"simplified: {text}"


def together(sentences: Iterable[str]) -> Iterator[str]:
    """Sentences in order; those that say the same, each of its first word, as one.

    >>> list(together(["send is free", "x is not", "recv is free"]))
    ['each of send, recv is free', 'x is not']
    """
    subjects: dict[str, list[str]] = {}
    for sentence in sentences:
        subject, _, said = sentence.partition(" ")
        subjects.setdefault(said, []).append(subject)
    for said, words in subjects.items():
        yield f"{words[0]} {said}" if len(words) == 1 else f"each of {', '.join(words)} {said}"


def _has_power_limit(prediction: Prediction) -> bool:
    return prediction.plan.power == "limited" and prediction.profile.power_model is not None


def _power_slowdown_percent(prediction: Prediction, step: Step) -> float | None:
    return 100 * (step.clock - 1) if _has_power_limit(prediction) else None


def _assumed_costs(step: Step) -> list[str]:
    """Explanations of assumed costs; of those that begin alike, the shortest."""
    kept: list[str] = []
    found = {cost.explanation for cost in step.costs if cost.source == "assumed"}
    for text in sorted(found, key=lambda text: (len(text), text)):
        if not any(text.startswith(shorter) for shorter in kept):
            kept.append(text)
    return kept
