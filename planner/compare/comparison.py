"""Two steps side by side: what changed, and what it did, ranked by effect.

Nothing is simulated here: both sides are read or predicted by :mod:`mhcplan.planner.compare.sides`,
so a measured trace is compared with a predicted one as two plans are. Times of an op class are sums
over a rank's ops, the mean of all ranks, so that they stand beside a step's time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

import mhcplan
from mhcplan.planner.compare.sides import SideFigures
from mhcplan.planner.report.schema import BreakdownNs, Percent
from mhcplan.profiles.specs import Spec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mhcplan.planner.compare.sides import Side
    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.predict import Step

COMPARISON_FORMAT = "mhcplan.comparison"

Plain = str | int | float | bool | None


class FieldChange(Spec):
    """A field of the plan that differs; a list is shown as text."""

    field: Annotated[str, Field(description="its dotted path")]
    a: Plain
    b: Plain


class ClassChange(Spec):
    """A class of the breakdown on both sides, each of its own busiest rank."""

    name: Annotated[str, Field(description="a key of breakdown_ns")]
    a_ns: NonNegativeInt
    b_ns: NonNegativeInt
    difference_ns: Annotated[int, Field(description="b less a")]


class OpClassTimes(Spec):
    """All ops of a class on one side, a rank's share of them (the mean of all ranks)."""

    count: Annotated[float, Field(ge=0, description="ops a rank")]
    time_ns: Annotated[NonNegativeInt, Field(description="summed over a rank's ops")]
    share_percent: Annotated[Percent, Field(description="of the time of all ops")]


class OpClassChange(Spec):
    """Ops of one kind and pass on both sides; null: there are none."""

    kind: str
    pass_: Annotated[str, Field(alias="pass", description="F, I, W, B, R or O; of a transfer too")]
    a: OpClassTimes | None
    b: OpClassTimes | None
    difference_ns: Annotated[int, Field(description="b's time less a's")]


class MatchedOps(Spec):
    """Op by op, where both sides ran the very same program: b's times over a's."""

    num_ops: Annotated[PositiveInt, Field(description="that take time on both sides")]
    median_ratio: float
    low_ratio: Annotated[float, Field(description="a tenth of the ops is below")]
    high_ratio: Annotated[float, Field(description="a tenth of the ops is above")]


class Comparison(Spec):
    """What changed from A to B and what it did; lists are ranked by effect."""

    format: Literal["mhcplan.comparison"] = COMPARISON_FORMAT
    format_version: Literal[1] = 1
    mhcplan_version: str
    command: Annotated[str, Field(description="what to type to get this comparison again")]
    a: SideFigures
    b: SideFigures
    step_percent: Annotated[float, Field(description="b's step over a's, minus 1")]
    fields: Annotated[
        tuple[FieldChange, ...] | None,
        Field(description="fields of the plan that differ; null: a side does not say its plan"),
    ]
    classes: Annotated[tuple[ClassChange, ...], Field(description="all classes of the breakdown")]
    ops: Annotated[
        tuple[OpClassChange, ...] | None,
        Field(description="by kind and pass; null: a side is a report, which holds no ops"),
    ]
    matched: Annotated[
        MatchedOps | None,
        Field(description="null: the sides ran different programs, or hold no ops"),
    ]

    def to_json(self) -> str:
        """The comparison as one JSON object."""
        return self.model_dump_json(indent=2, by_alias=True)


def compare_sides(a: Side, b: Side, command: str = "") -> Comparison:
    """Lay B beside A; ``command`` is what a person types to get it again."""
    return Comparison(
        mhcplan_version=mhcplan.__version__,
        command=command,
        a=a.figures,
        b=b.figures,
        step_percent=100 * (b.figures.step_time_ns / a.figures.step_time_ns - 1),
        fields=_fields(a.plan, b.plan) if a.plan and b.plan else None,
        classes=_classes(a.figures.breakdown_ns, b.figures.breakdown_ns),
        ops=_ops(a.step, b.step) if a.step and b.step else None,
        matched=_matched(a.step, b.step) if a.step and b.step else None,
    )


def _fields(a: PlanSpec, b: PlanSpec) -> tuple[FieldChange, ...]:
    both = [dict(_flat(plan.model_dump(mode="json"))) for plan in (a, b)]
    paths = dict.fromkeys([*both[0], *both[1]])
    return tuple(
        FieldChange(field=path, a=both[0].get(path), b=both[1].get(path))
        for path in paths
        if both[0].get(path) != both[1].get(path)
    )


def _flat(data: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Plain]]:
    """Values by dotted path; a list is one value."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        elif value is None or isinstance(value, str | int | float | bool):
            yield prefix + name, value
        else:
            yield prefix + name, str(value)


def _classes(a: BreakdownNs, b: BreakdownNs) -> tuple[ClassChange, ...]:
    parts = [(name, getattr(a, name), getattr(b, name)) for name in BreakdownNs.model_fields]
    changes = (
        ClassChange(name=name, a_ns=before, b_ns=after, difference_ns=after - before)
        for name, before, after in parts
    )
    return tuple(sorted(changes, key=lambda change: -abs(change.difference_ns)))


def _ops(a: Step, b: Step) -> tuple[OpClassChange, ...]:
    before, after = _op_classes(a), _op_classes(b)
    changes = [
        _op_change(key, before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])
    ]
    return tuple(sorted(changes, key=lambda change: -abs(change.difference_ns)))


def _op_change(
    key: tuple[str, str], a: OpClassTimes | None, b: OpClassTimes | None
) -> OpClassChange:
    difference = (b.time_ns if b else 0) - (a.time_ns if a else 0)
    return OpClassChange(kind=key[0], **{"pass": key[1]}, a=a, b=b, difference_ns=difference)


def _op_classes(step: Step) -> dict[tuple[str, str], OpClassTimes]:
    """Ops by (kind, pass); those that take no time (bookkeeping) are left out."""
    program, timeline = step.program, step.timeline
    time_ns = timeline.end_ns - timeline.start_ns
    keys = program.kind.astype(np.int64) * 256 + program.pass_
    found, class_ = np.unique(keys, return_inverse=True)
    counts, times = np.bincount(class_), np.zeros(len(found), np.int64)
    np.add.at(times, class_, time_ns)
    total = max(int(times.sum()), 1)
    return {
        (program.kinds[key // 256], chr(key % 256)): OpClassTimes(
            count=count / program.num_ranks,
            time_ns=time // program.num_ranks,
            share_percent=100 * time / total,
        )
        for key, count, time in zip(found.tolist(), counts.tolist(), times.tolist(), strict=True)
        if time
    }


_SAME_OPS = ("rank", "stream", "kind", "cell", "cost", "pass_", "microbatch", "site", "record")


def _matched(a: Step, b: Step) -> MatchedOps | None:
    programs = a.program, b.program
    if programs[0].num_ops != programs[1].num_ops or programs[0].kinds != programs[1].kinds:
        return None
    for name in _SAME_OPS:
        first, second = (getattr(program, name) for program in programs)
        if not np.array_equal(first, second):
            return None
    before, after = (step.timeline.end_ns - step.timeline.start_ns for step in (a, b))
    both = (before > 0) & (after > 0)
    if not both.any():
        return None
    low, median, high = np.percentile(after[both] / before[both], (10, 50, 90))
    return MatchedOps(
        num_ops=int(both.sum()),
        median_ratio=float(median),
        low_ratio=float(low),
        high_ratio=float(high),
    )
