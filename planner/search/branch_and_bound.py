"""The best plan for given GPUs, found and proven by branch and bound.

A search goes from what is cheap to what is dear, and only as far as it must: what the members of a
family have in common (the busiest rank's work, memory without mHC's), then each member's longest
path and exact memory, then the engine. What has the least bound goes first, so that

* once the least bound left is no better than the best plan played, that plan is the best;
* from then on the search completes the front of time against memory, for plans up to
  ``BAND_PERCENT`` slower, leaving out what a played plan beats in both.

When time is over the rest is unknown, and the least bound left says how much better it could be.
"""

from __future__ import annotations

import heapq
import itertools
import time
from bisect import insort
from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from mhcplan.planner.search.points import (
    Bound,
    FamilyBounds,
    MemberBounds,
    Play,
    Unpriced,
    answer,
)
from mhcplan.planner.sweep.points import Simulated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.search.points import Answer
    from mhcplan.planner.search.space import Family, Member, Space
    from mhcplan.planner.sweep.farm import Farm
    from mhcplan.planner.sweep.points import ProfileName

BAND_PERCENT = 10.0  # how much slower than the best a plan of the front may be

_ROUND = 6  # questions a worker, between two looks at what was answered


@dataclass(frozen=True)
class Candidate:
    """A plan that was played and fits."""

    member: Member
    found: Simulated

    @property
    def merit(self) -> tuple[int, int]:
        """Less is better: time, then memory."""
        return self.found.step_time_ns, self.found.device_memory_bytes


@dataclass
class Tally:
    """What became of the plans of a space.

    Attributes:
        played: by the engine.
        bounded: proven worse: slower, or beaten in time and memory by a plan that was played.
        too_large: do not fit in a GPU's memory.
        unpriced: by reason, plans that the profile cannot price.
        unknown: not reached in time.
    """

    played: int = 0
    bounded: int = 0
    too_large: int = 0
    unpriced: Counter[str] = field(default_factory=Counter[str])
    unknown: int = 0

    @property
    def total(self) -> int:
        """All plans of the space."""
        known = self.played + self.bounded + self.too_large + self.unpriced.total()
        return known + self.unknown


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        candidates: plans that were played and fit, the best first.
        tally: what became of all plans.
        least_bound_ns: no plan that was not looked at takes less; None if none is left.
        seconds: how long it took.
    """

    candidates: tuple[Candidate, ...]
    tally: Tally
    least_bound_ns: int | None
    seconds: float

    @property
    def proven(self) -> bool:
        """Whether no plan of the space is faster than the best."""
        if self.least_bound_ns is None:
            return True
        return bool(self.candidates) and self.least_bound_ns >= self.candidates[0].merit[0]

    @property
    def front(self) -> list[Candidate]:
        """Plans that no other that was played beats in both time and memory, fastest first."""
        return _front_of(self.candidates)


class _Node(NamedTuple):
    """Plans that are known to take a bound at least; nodes order by it."""

    bound: Bound
    number: int
    question: MemberBounds | Play

    @property
    def num_plans(self) -> int:
        question = self.question
        return 1 if isinstance(question, Play) else len(question.members)


class Search:
    """A search on its way, whose result so far can be asked for at any time."""

    def __init__(self, space: Space, profile: ProfileName, memory_limit_bytes: int) -> None:
        """Nothing is known of any family yet."""
        self._profile, self._limit = profile, memory_limit_bytes
        self._tally = Tally()
        self._candidates: list[Candidate] = []
        self._front: list[Candidate] = []
        self._seconds, self._numbers = 0.0, itertools.count()
        self._unbounded = [FamilyBounds(some, profile) for some in _alike(space.families)]
        # so that a search without enough time has seen some of everything
        Random(0).shuffle(self._unbounded)
        self._to_bound: list[_Node] = []  # heaps
        self._to_play: list[_Node] = []
        self._off: dict[str, list[float]] = {}  # by schedule, engine over bound of what was played

    def run(
        self, farm: Farm, seconds: float, report: Callable[[Found], None] = lambda _: None
    ) -> None:
        """Go on until everything is known or ``seconds`` are over; ``report`` sees every round.

        No round is begun that would not be done by then if it takes as long as the last one.

        Raises:
            SpecError: the engine cannot run here.
            FarmError: workers cannot be had, or die again and again.
        """
        begin, before, round_s = time.monotonic(), self._seconds, 0.0
        while (begun := time.monotonic()) - begin + round_s < seconds and (
            asked := self._next(farm.jobs)
        ):
            questions = [item.question if isinstance(item, _Node) else item for item in asked]
            waiting = dict(enumerate(asked))
            try:
                for number, found in farm.map(answer, questions):
                    self._learn(waiting.pop(number), found)
            finally:
                self._put_back(waiting.values())  # interrupted: as unknown as before
                self._seconds = before + time.monotonic() - begin
            round_s = time.monotonic() - begun
            report(self.found())

    def found(self) -> Found:
        """What is known by now."""
        untouched = sum(len(f.members) for some in self._unbounded for f in some.families)
        tally = replace(self._tally, unknown=untouched)
        left = [0] if untouched else []
        for node in (*self._to_bound, *self._to_play):
            if self._is_worse(node.bound):
                tally.bounded += node.num_plans
            else:
                tally.unknown += node.num_plans
                left.append(node.bound.step_time_ns)
        return Found(tuple(self._candidates), tally, min(left, default=None), self._seconds)

    def _next(self, jobs: int) -> list[FamilyBounds | _Node]:
        """What to ask: a third to bound families, a third to play what should be best, so that
        there is something to prove by, and a third to prove, by the least bounds.
        """
        count = _ROUND * jobs
        third = count // 3
        asked: list[FamilyBounds | _Node] = []
        asked += self._unbounded[:third]
        del self._unbounded[:third]
        expected = heapq.nsmallest(third, self._to_play, key=self._expected_ns)
        self._to_play = [node for node in self._to_play if node not in expected]
        heapq.heapify(self._to_play)
        asked += self._pop(expected, third)
        for heap in (self._to_bound, self._to_play):
            asked += self._pop(heap, count - len(asked))
        return asked

    def _expected_ns(self, node: _Node) -> float:
        """The bound, and as much on top as plans of that schedule took so far.

        What a bound leaves out, contention, is much for a schedule that overlaps much.
        """
        assert isinstance(node.question, Play)
        off = self._off.get(node.question.member.plan.schedule, [1.0])
        return node.bound.step_time_ns * sum(off) / len(off)

    def _pop(self, heap: list[_Node], count: int) -> list[_Node]:
        """The nodes of least bound; what is proven worse by now is counted instead."""
        nodes: list[_Node] = []
        while heap and len(nodes) < count:
            node = heapq.heappop(heap)
            if self._is_worse(node.bound):
                self._tally.bounded += node.num_plans
            else:
                nodes.append(node)
        return nodes

    def _put_back(self, items: Iterable[FamilyBounds | _Node]) -> None:
        for item in items:
            if isinstance(item, FamilyBounds):
                self._unbounded.append(item)
            else:
                self._push(item.bound, item.question)

    def _push(self, bound: Bound, question: MemberBounds | Play) -> None:
        heap = self._to_play if isinstance(question, Play) else self._to_bound
        heapq.heappush(heap, _Node(bound, next(self._numbers), question))

    def _learn(self, item: FamilyBounds | _Node, found: Answer) -> None:
        if isinstance(found, Simulated):
            assert isinstance(item, _Node)
            assert isinstance(item.question, Play)
            self._tally.played += 1
            schedule = item.question.member.plan.schedule
            off = found.step_time_ns / item.bound.step_time_ns
            self._off.setdefault(schedule, []).append(off)
            insort(self._candidates, Candidate(item.question.member, found), key=_merit)
            self._front = _front_of(self._candidates)
            return
        if isinstance(item, FamilyBounds):
            known = zip(item.families, found, strict=True)
            members = [(bound, m) for family, bound in known for m in family.members]
            for bound, some in _by_block(self._promising(members)):
                self._push(bound, MemberBounds(some, self._profile, self._limit))
            return
        assert isinstance(item.question, MemberBounds)
        known = zip(found, item.question.members, strict=True)
        for bound, member in self._promising(known):
            self._push(bound, Play(member, self._profile))

    def _promising(
        self, members: Iterable[tuple[Bound | Unpriced, Member]]
    ) -> Iterator[tuple[Bound, Member]]:
        """Those that could be worth more; the others are counted."""
        for bound, member in members:
            if isinstance(bound, Unpriced):
                self._tally.unpriced[bound.reason] += 1
            elif bound.device_memory_bytes > self._limit:
                self._tally.too_large += 1
            elif self._is_worse(bound):
                self._tally.bounded += 1
            else:
                yield bound, member

    def _is_worse(self, bound: Bound) -> bool:
        """Whether plans of this bound are too slow for the front, or beaten by one that is on it.

        A plan that ties with one in both adds nothing either.
        """
        if not self._front:
            return False
        if bound.step_time_ns > self._front[0].merit[0] * (1 + BAND_PERCENT / 100):
            return True
        return any(
            step_ns <= bound.step_time_ns and num_bytes <= bound.device_memory_bytes
            for step_ns, num_bytes in map(_merit, self._front)
        )


def _alike(families: Iterable[Family]) -> Iterator[tuple[Family, ...]]:
    """Families that differ in ep and dp only: GPUs beside a pipeline's ranks, by which the order of
    its ops is the same."""
    alike: dict[PlanSpec, list[Family]] = {}
    for family in families:
        layout = family.common.layout.model_copy(update={"ep": 1, "dp": 1})
        alike.setdefault(family.common.model_copy(update={"layout": layout}), []).append(family)
    return map(tuple, alike.values())


def _by_block(
    members: Iterable[tuple[Bound, Member]],
) -> Iterator[tuple[Bound, tuple[Member, ...]]]:
    """Members in parts of one recompute block, those of one priority one after the other, with what
    none of a part stays below."""

    def alike(item: tuple[Bound, Member]) -> tuple[int, str]:
        return item[1].recompute_block or 0, item[1].plan.priority

    for _, some in itertools.groupby(sorted(members, key=alike), lambda item: alike(item)[0]):
        bounds, parts = zip(*some, strict=True)
        yield Bound(*map(min, zip(*bounds, strict=True))), parts


def _merit(candidate: Candidate) -> tuple[int, int]:
    return candidate.merit


def _front_of(best_first: Sequence[Candidate]) -> list[Candidate]:
    front: list[Candidate] = []
    for candidate in best_first:
        if not front or candidate.merit[1] < front[-1].merit[1]:
            front.append(candidate)
    return front
