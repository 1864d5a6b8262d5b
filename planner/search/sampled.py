"""A search through a space that is too large to be bounded: Optuna chooses which plans to look at.

Its tree-structured Parzen estimator learns from the plans that were played which layouts,
schedules, blocks and priorities go with short steps. What it finds is good, not proven: all that it
did not look at is unknown.
"""

from __future__ import annotations

import itertools
import time
from bisect import insort
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhcplan.planner.search.branch_and_bound import Candidate, Found, Tally
from mhcplan.planner.search.points import MemberBounds, Play, Unpriced, answer
from mhcplan.planner.sweep.points import Simulated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mhcplan.planner.search.space import Member, Space
    from mhcplan.planner.sweep.farm import Farm
    from mhcplan.planner.sweep.points import ProfileName

_ROUND = 4  # plans a worker, between two looks at what was answered
_SEED = 0
_TRIES = 50  # of Optuna at a plan that is not known yet, before it is done


class SampledSearch:
    """A search on its way; used as :class:`mhcplan.planner.search.branch_and_bound.Search` is."""

    def __init__(self, space: Space, profile: ProfileName, memory_limit_bytes: int) -> None:
        """Nothing is known of any plan yet.

        Raises:
            ImportError: Optuna is not installed.
        """
        optuna: Any = import_module("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._failed = optuna.trial.TrialState.FAIL
        sampler = optuna.samplers.TPESampler(seed=_SEED, n_startup_trials=32)
        self._study = optuna.create_study(sampler=sampler)
        self._profile, self._limit = profile, memory_limit_bytes
        members = [member for family in space.families for member in family.members]
        self._left = {_coordinates(member): member for member in members}
        keys = self._left.keys()
        self._axes = [sorted(set(values)) for values in zip(*keys, strict=True)]
        self._tally, self._candidates, self._seconds = Tally(), list[Candidate](), 0.0

    def run(
        self, farm: Farm, seconds: float, report: Callable[[Found], None] = lambda _: None
    ) -> None:
        """Go on until ``seconds`` are over or nothing new is found; see :meth:`Search.run`."""
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            trials = self._ask(_ROUND * farm.jobs)
            if not trials:
                break
            self._look_at(trials, farm)
            self._seconds = time.monotonic() - begin
            report(self.found())

    def found(self) -> Found:
        """What is known by now."""
        self._tally.unknown = len(self._left)
        return Found(tuple(self._candidates), self._tally, 0 if self._left else None, self._seconds)

    def _ask(self, count: int) -> list[tuple[Any, Member]]:
        """Up to ``count`` trials of plans that were not looked at yet."""
        trials: list[tuple[Any, Member]] = []
        for _ in range(_TRIES * count):
            if len(trials) == count or not self._left:
                break
            trial = self._study.ask()
            where = tuple(
                trial.suggest_categorical(str(i), axis) for i, axis in enumerate(self._axes)
            )
            member = self._left.pop(where, None)
            if member is None:  # no plan, or known
                self._study.tell(trial, state=self._failed)
            else:
                trials.append((trial, member))
        return trials

    def _look_at(self, trials: Iterable[tuple[Any, Member]], farm: Farm) -> None:
        """Memory and longest path first; the engine plays what fits."""
        questions = [MemberBounds((member,), self._profile, self._limit) for _, member in trials]
        fitting: list[tuple[Any, Member]] = []
        asked = list(trials)
        for number, found in farm.map(answer, questions):
            assert not isinstance(found, Simulated)
            bound = found[0]
            if isinstance(bound, Unpriced):
                self._tally.unpriced[bound.reason] += 1
            elif bound.device_memory_bytes > self._limit:
                self._tally.too_large += 1
            else:
                fitting.append(asked[number])
                continue
            self._study.tell(asked[number][0], state=self._failed)
        plays = [Play(member, self._profile) for _, member in fitting]
        for number, step in farm.map(answer, plays):
            assert isinstance(step, Simulated)
            trial, member = fitting[number]
            self._tally.played += 1
            self._study.tell(trial, step.step_time_ns)
            insort(self._candidates, Candidate(member, step), key=lambda one: one.merit)


def _coordinates(member: Member) -> tuple[str, ...]:
    """What Optuna chooses, one after the other; all fields of plans of one search that differ."""
    plan = member.plan
    layout = plan.layout
    rest = plan.model_dump(
        mode="json",
        exclude={"layout", "micro_batch_size", "microbatches", "schedule", "priority", "residual"},
    )
    settings = itertools.chain.from_iterable(sorted(rest.items()))
    return (
        f"{layout.pp} {layout.ep} {layout.dp}", str(plan.micro_batch_size), plan.schedule,
        str(member.recompute_block), plan.priority, str(list(settings)),
    )  # fmt: skip
