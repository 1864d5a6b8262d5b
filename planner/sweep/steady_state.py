"""Steps with many microbatches from two with few: between warm-up and cool-down a schedule repeats.

The longest path is a max-plus recursion: an op's time is the largest of sums over ops before it. So
if one more period of the schedule moves no op of the later half of any rank by more than the step,
no further period does, and no cycle of the schedule takes longer: k more periods make the step at
most k times that longer, and exactly that in every case that was tried (tests, for all schedules).
Two equal slopes alone would not do: of two ranks with almost equal work, the busier one may decide
the step only after many microbatches. Only for ranking: an engine in which ops slow each other down
need not be affine in M.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.sim.program import Program

# Microbatches a rank in the short step. With 2, one DualPipe in thirty looks settled and is not.
_FEW = (3, 6, 12)
_TAIL_SHARE = 2  # the end of a rank is one part in so many of its ops


class Family(NamedTuple):
    """A plan with many microbatches as one of a family: those of ``short``, and ``repeats`` times
    those that ``longer`` has more."""

    short: PlanSpec
    longer: PlanSpec
    repeats: int


def families_of(plan: PlanSpec) -> Iterator[Family]:
    """Families of a plan, shortest first, while its own step is longer than both of a family.

    Two short steps may take longer than the plan's own, but plans with other M share them.
    """
    period = _period(plan)
    for few in (per_rank * plan.layout.pp for per_rank in _FEW):
        more = plan.microbatches - few
        if few % period or more % period or more <= period:
            return
        short, longer = (plan.model_copy(update={"microbatches": m}) for m in (few, few + period))
        yield Family(short, longer, more // period)


class Played(NamedTuple):
    """A step: its Program, its length and the path to each op
    (:meth:`mhcplan.sim.longest_path.StepGraph.path_ns`)."""

    program: Program
    step_ns: int
    path_ns: NDArray[np.int64]


def growth_ns(short: Played, longer: Played) -> int | None:
    """How much longer every further period makes the step; None if that is not settled yet."""
    step_growth_ns = longer.step_ns - short.step_ns
    for rank in range(short.program.num_ranks):
        begin, end = short.program.rank_offsets[rank : rank + 2].tolist()
        length = (end - begin) // _TAIL_SHARE
        a = slice(end - length, end)
        longer_end = int(longer.program.rank_offsets[rank + 1])
        b = slice(longer_end - length, longer_end)
        if not np.array_equal(short.program.kind[a], longer.program.kind[b]):
            return None
        if (longer.path_ns[b] - short.path_ns[a]).max(initial=0) > step_growth_ns:
            return None
    return step_growth_ns


def _period(plan: PlanSpec) -> int:
    """Microbatches after which a schedule repeats itself."""
    match plan.schedule:
        case "dualpipe":
            return 2  # one each way
        case "interleaved-1f1b":
            return plan.layout.pp  # a round
        case _:
            return 1
