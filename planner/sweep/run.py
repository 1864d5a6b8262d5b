"""Sweeps: every combination of some fields' values, predicted, none of them twice.

:func:`sweep` lists the combinations, takes from the store what is known, works out the rest on all
cores or a cluster, and keeps every batch as it comes. Combinations that no plan can have are rows
too, with the reason. With the fast method the best are played by the engine at the end, and how far
the estimate was off is part of the result.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mhcplan.planner.plan.file import source_fields
from mhcplan.planner.plan.spec import SpecError
from mhcplan.planner.sweep.axes import Axis, points
from mhcplan.planner.sweep.farm import Farm
from mhcplan.planner.sweep.points import ProfileName, work_out
from mhcplan.planner.sweep.ranking import likeness, shared_templates
from mhcplan.planner.sweep.row import SweepRow
from mhcplan.planner.sweep.store import PointKey, SweepStore
from mhcplan.profiles.store import find_profile, profile_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.sweep.axes import Point
    from mhcplan.planner.sweep.farm import Backend
    from mhcplan.planner.sweep.row import Figures, Method, Outcome

Item = TypeVar("Item")

WINNERS = 5  # confirmed by the engine after a fast sweep

_FEW = 24  # points that are done sooner than more processes could start
_BATCH = 40  # points a task: they share templates, and a killed task loses little
_KEPT_BATCHES = 8  # tasks a worker at least, so that none waits long for the last one


@dataclass(frozen=True)
class Progress:
    """How far a sweep is; ``stored`` of the ``done`` points were known before."""

    done: int
    total: int
    stored: int


@dataclass
class Sweep:
    """A sweep's rows in the order of its combinations, and what was noted on the way.

    Attributes:
        rows: of the points that are finished.
        total: combinations, finished or not.
        stored: points that the store knew already.
        confirmed: after a fast sweep, the best rows again, by the engine.
        notes: what a person should know, one line each.
    """

    axes: tuple[Axis, ...]
    total: int = 0
    stored: int = 0
    rows: list[SweepRow] = field(default_factory=list[SweepRow])
    confirmed: list[SweepRow] = field(default_factory=list[SweepRow])
    notes: list[str] = field(default_factory=list[str])

    @property
    def feasible(self) -> bool:
        """Whether any plan can run on its GPUs."""
        return any(row.fits for row in self.rows)

    @property
    def worst_deviation_percent(self) -> float | None:
        """How far the estimate was below the engine, at worst, of the confirmed rows."""
        estimated = {row.plan_digest: row.figures for row in self.rows}
        off = [
            100 * (played.step_time_ns / guess.step_time_ns - 1)
            for row in self.confirmed
            if (played := row.figures) and (guess := estimated[row.plan_digest])
        ]
        return max(off, default=None)


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is worked out; none of it changes a figure but ``method``.

    Attributes:
        jobs: tasks at once; None is one a core, or all that the cluster has.
        store: file of finished points, None keeps none.
        fresh: work out also what the store knows.
    """

    method: Method = "engine"
    backend: Backend = "local"
    jobs: int | None = None
    store: Path | None = None
    fresh: bool = False


def sweep(
    source: str | PlanSpec,
    axes: Sequence[Axis],
    options: SweepOptions = SweepOptions(),
    report: Callable[[Progress], None] = lambda _: None,
) -> Sweep:
    """Predict every combination of the axes' values.

    Ctrl-C leaves what is finished in the store.

    Args:
        source: a model preset, a plan file, or a plan, that the values change.
        axes: fields and their values.
        options: how to work it out.
        report: called whenever points were finished.

    Raises:
        SpecError, ProfileError: ``source``, an axis, or a profile cannot be used at all.
        StoreError: the store cannot be opened.
        FarmError: workers cannot be had, or die again and again.
    """
    run = SweepRun(source, axes, options)
    run.work(report)
    return run.result()


class SweepRun:
    """A sweep on its way, whose finished part can be asked for at any time."""

    def __init__(self, source: str | PlanSpec, axes: Sequence[Axis], options: SweepOptions) -> None:
        """List the combinations; raises as :func:`sweep`, also if none of them is a plan."""
        self._options = options
        self._points = list(points(source_fields(source), axes))
        if not any(point.plan for point in self._points):
            raise SpecError(_why_none(self._points))
        self._result = Sweep(tuple(axes), total=len(self._points))
        names = {point.plan.profile for point in self._points if point.plan is not None}
        self._profiles = {name: named_profile(name) for name in sorted(names)}
        plans = (point.plan for point in self._points if point.plan is not None)
        self._digests = {plan: plan.digest() for plan in plans}
        self._outcomes: dict[PointKey, Outcome] = {}

    def work(self, report: Callable[[Progress], None]) -> None:
        """Work out what the store does not know; raises as :func:`sweep`."""
        options = self._options
        with ExitStack() as opened:
            farm = opened.enter_context(Farm(options.backend, self._jobs()))
            store = None if options.store is None else SweepStore(options.store)
            opened.enter_context(store or nullcontext())
            self._finish(self._plans(options.method), options.method, farm, store, report)
            if options.method == "estimate":
                self._confirm(farm, store)

    def result(self) -> Sweep:
        """What is finished by now."""
        result = self._result
        result.rows = self._rows(self._options.method)
        if self._options.method == "estimate":
            played = {row.plan_digest: row for row in self._rows("engine") if row.figures}
            result.confirmed = ranked(list(played.values()))
        return result

    def _confirm(self, farm: Farm, store: SweepStore | None) -> None:
        """Let the engine play the best plans.

        How much an estimate leaves out depends most on the schedule: one that overlaps much suffers
        most from contention. So the best plan of each schedule is played first, and the others are
        ranked by what that showed.
        """
        best = _unlike([row for row in ranked(self._rows("estimate")) if row.fits])
        plans = {key.plan_digest: plan for key, plan in self._plans("engine").items()}

        def play(rows: Iterable[SweepRow]) -> None:
            chosen = (plans[row.plan_digest or ""] for row in rows)
            self._finish(
                {self._key(plan, "engine"): plan for plan in chosen},
                "engine", farm, store, lambda _: None,
            )  # fmt: skip

        firsts: dict[str, SweepRow] = {}
        for row in best:
            firsts.setdefault(plans[row.plan_digest or ""].schedule, row)
        play(firsts.values())
        played = {row.plan_digest: row for row in self._rows("engine")}
        off = {
            schedule: _step_ns(played[row.plan_digest]) / _step_ns(row)
            for schedule, row in firsts.items()
        }
        merit = {row.plan_digest: -_merit(row)[1] / off[plans[row.plan_digest or ""].schedule]
                 for row in best}  # fmt: skip
        play(sorted(best, key=lambda row: -merit[row.plan_digest])[:WINNERS])

    def _jobs(self) -> int | None:
        few = self._options.backend == "local" and len(self._points) <= _FEW
        return 1 if few and self._options.jobs is None else self._options.jobs

    def _plans(self, method: Method) -> dict[PointKey, PlanSpec]:
        """Plans to be worked out, each once, those that have most in common in a row: a worker
        that is given a few of them need not work out what others do for theirs."""
        plans = [point.plan for point in self._points if point.plan is not None]
        plans.sort(key=lambda plan: (shared_templates(plan), likeness(plan)))
        return {self._key(plan, method): plan for plan in plans}

    def _key(self, plan: PlanSpec, method: Method) -> PointKey:
        return PointKey(self._digests[plan], self._profiles[plan.profile].digest, method)

    def _finish(
        self,
        plans: Mapping[PointKey, PlanSpec],
        method: Method,
        farm: Farm,
        store: SweepStore | None,
        report: Callable[[Progress], None],
    ) -> None:
        known = store.read(plans) if store is not None and not self._options.fresh else {}
        self._outcomes |= known
        if method == self._options.method:
            self._result.stored = len(known)
        left = {key: plan for key, plan in plans.items() if key not in known}
        done = len(known)
        report(Progress(done, len(plans), len(known)))
        try:
            for keys, outcomes in self._work_out(left, method, farm):
                found = dict(zip(keys, outcomes, strict=True))
                self._outcomes |= found
                done += len(found)
                if store is not None:
                    store.write((k, left[k].model_dump_json(), found[k]) for k in keys)
                report(Progress(done, len(plans), len(known)))
        finally:
            problem = store.flush() if store is not None else None
            said = f"{problem}: results are shown, but not all are kept"
            if problem is not None and said not in self._result.notes:
                self._result.notes.append(said)

    def _work_out(
        self, plans: Mapping[PointKey, PlanSpec], method: Method, farm: Farm
    ) -> Iterator[tuple[Sequence[PointKey], Sequence[Outcome]]]:
        for name in {name.digest: name for name in self._profiles.values()}.values():
            keys = [key for key in plans if key.profile_digest == name.digest]
            size = max(1, min(_BATCH, len(keys) // (_KEPT_BATCHES * farm.jobs)))
            # no two workers record the same templates
            batches = batched(keys, lambda key: shared_templates(plans[key]), size)
            tasks = [_Task([plans[key] for key in batch], name, method) for batch in batches]
            for number, outcomes in farm.map(_worked_out, tasks):
                yield batches[number], outcomes

    def _rows(self, method: Method) -> list[SweepRow]:
        rows = (self._row(point, method) for point in self._points)
        return [row for row in rows if row is not None]

    def _row(self, point: Point, method: Method) -> SweepRow | None:
        """The row of a point, None if it is not worked out yet."""
        values = {axis.path: point.values[axis.path] for axis in self._result.axes}
        if point.plan is None:
            return SweepRow(
                values=values, status="illegal", reason=point.reason, method=method,
                plan_digest=None, profile_digest=None, gpus=None, figures=None,
            )  # fmt: skip
        key = self._key(point.plan, method)
        outcome = self._outcomes.get(key)
        if outcome is None:
            return None
        return SweepRow(
            values=values, status="predicted" if outcome.figures else "unpriced",
            reason=outcome.reason, method=method, plan_digest=key.plan_digest,
            profile_digest=key.profile_digest, gpus=point.plan.layout.gpus, figures=outcome.figures,
        )  # fmt: skip


def batched(
    items: Sequence[Item], group_of: Callable[[Item], object], size: int
) -> list[list[Item]]:
    """Items in order, at most ``size`` together; only a group larger than that is taken apart."""
    batches: list[list[Item]] = []
    for _, alike in groupby(items, key=group_of):
        group = list(alike)
        parts = [group[i : i + size] for i in range(0, len(group), size)]
        if batches and len(batches[-1]) + len(parts[0]) <= size:
            batches[-1] += parts.pop(0)
        batches += parts
    return batches


def _why_none(points: Sequence[Point]) -> str:
    """Why no combination is a plan, in a line."""
    (reason, count), *others = Counter(str(point.reason) for point in points).most_common()
    if len(points) == 1:
        return reason
    kinds = f"{len(others)} other reason{'s' * (len(others) > 1)}"
    more = f", and {len(points) - count} for {kinds}" if others else ""
    return f"none of {len(points)} combinations is a plan: {count} as {reason}{more}"


def _unlike(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The rows, of those that differ in nothing that shows the first."""
    unlike: dict[Figures | None, SweepRow] = {}
    for row in rows:
        unlike.setdefault(row.figures, row)
    return list(unlike.values())


def _step_ns(row: SweepRow) -> int:
    assert row.figures is not None
    return row.figures.step_time_ns


def ranked(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Predicted rows, those that fit first, by tokens a second of a GPU; the rest in order."""
    return sorted(rows, key=_merit)


def _merit(row: SweepRow) -> tuple[bool, float]:
    if row.figures is None or row.gpus is None:
        return True, 0.0
    return not row.figures.fits, -row.figures.tokens_per_second / row.gpus


@dataclass(frozen=True)
class _Task:
    plans: list[PlanSpec]
    profile: ProfileName
    method: Method


def _worked_out(task: _Task) -> list[Outcome]:
    return work_out(task.plans, task.profile, task.method)


def named_profile(name: str) -> ProfileName:
    """A profile by its digest, and by a name that leads to it from any folder."""
    digest = find_profile(name).digest
    return ProfileName(name if name in profile_names() else str(Path(name).resolve()), digest)
