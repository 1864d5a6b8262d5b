"""Which recompute block L_r takes least memory: the paper's equation 20 on a pipeline's ranks.

A rank stores the input of every recompute block (n C a token) once for each live chunk, and while
one block is rebuilt holds its transient states ((n + 2) C a token and site). The paper minimises
n C ceil(L / L_r) + (n + 2) C L_r over one model with one microbatch (arXiv 2512.24880, eq. 20);
a rank has L sites a stage, several live chunks, and blocks that end where the stage ends.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, sqrt
from typing import TYPE_CHECKING

from mhcplan.planner.schedules.catalogue import build_schedule
from mhcplan.profiles.specs import SITES_PER_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.schedules.catalogue import Schedule


def paper_recompute_block(expansion_rate: int, num_sites: int) -> float:
    """L_r* = sqrt(n L / (n + 2)), the closed form of equation 20.

    >>> round(paper_recompute_block(4, 60), 2)
    6.32
    """
    n = expansion_rate
    return sqrt(n * num_sites / (n + 2))


def stored_elements(expansion_rate: int, block: int, stages: Iterable[tuple[int, int]]) -> int:
    """Elements a token, in units of C, that a rank holds because of L_r: stored block inputs of all
    live chunks and one transient block (equation 20; sublayer outputs, C a site, come on top
    whatever L_r is).

    Args:
        expansion_rate: n.
        block: L_r in sites.
        stages: sites and live chunks of each of the rank's stages.

    >>> [stored_elements(4, r, [(60, 1)]) + 60 for r in (1, 4, 6, 10, 60)]
    [306, 144, 136, 144, 424]
    """
    resident = transient = 0
    for num_sites, live_chunks in stages:
        resident += live_chunks * ceil(num_sites / block)
        transient = max(transient, min(block, num_sites))
    return expansion_rate * resident + (expansion_rate + 2) * transient


def resolve_recompute_block(plan: PlanSpec) -> int | None:
    """L_r in sites of a plan, None for no recompute (or nothing to recompute).

    ``auto`` is the block with the least :func:`stored_elements` on the rank that needs most, the
    smaller block on a tie.
    """
    wish = plan.residual.recompute_block
    if plan.residual.is_plain or wish == "none":
        return None
    sites = [SITES_PER_BLOCK * len(blocks) for blocks in plan.stages]
    if wish == "stage":
        return max(sites)
    if wish != "auto":
        return min(wish, max(sites))
    live_peaks = _live_peaks(plan.schedule, plan.layout.pp, _until_steady(plan))
    ranks = [[(sites[stage], live) for stage, live in rank] for rank in live_peaks]

    def worst(block: int) -> int:
        return max(stored_elements(plan.residual.expansion_rate, block, rank) for rank in ranks)

    return min(range(1, max(sites) + 1), key=worst)


def as_played(plan: PlanSpec, recompute_block: int | None) -> PlanSpec:
    """The plan with its residual as resolved: plans of which this is equal have the same step."""
    if plan.residual.is_plain:
        return plan.baseline()
    block = "none" if recompute_block is None else recompute_block
    residual = plan.residual.model_copy(update={"recompute_block": block})
    return plan.model_copy(update={"residual": residual})


def recomputes(plan: PlanSpec, recompute_block: int | None) -> bool:
    """Whether a backward runs any part of the forward again, mHC's or the sublayers' own."""
    return recompute_block is not None or plan.recompute_layers != "none"


def _until_steady(plan: PlanSpec) -> int:
    """Microbatches beyond which no more chunks live at once, however many follow: three a rank;
    all of them where rounds of interleaved 1F1B are larger than P."""
    if plan.schedule == "interleaved-1f1b" and plan.microbatches % plan.layout.pp:
        return plan.microbatches
    return min(plan.microbatches, 3 * plan.layout.pp)


@lru_cache(maxsize=64)
def _live_peaks(
    schedule: str, num_ranks: int, num_microbatches: int
) -> frozenset[tuple[tuple[int, int], ...]]:
    """The different :func:`live_peak` of a schedule's ranks."""
    table = build_schedule(schedule, num_ranks, num_microbatches)
    return frozenset(tuple(live_peak(table, rank).items()) for rank in range(num_ranks))


def live_peak(schedule: Schedule, rank: int) -> dict[int, int]:
    """Live chunks by stage when the rank holds most of them: F has run, its I or B has not ended.

    An overlapped pair allocates its F before its B frees, so DualPipe holds P + 1.
    """
    live = dict.fromkeys(schedule.stages_of(rank), 0)
    peak = dict(live)
    for action in schedule.actions[rank]:
        for part in action.parts:
            if part.kind == "F":
                live[part.stage] += 1
                if sum(live.values()) > sum(peak.values()):
                    peak = dict(live)
        for part in action.parts:
            if part.kind in ("I", "B"):
                live[part.stage] -= 1
    return peak
