"""What a cost is: how long an op takes, what it holds, and how much of that was measured.

Sources, from best to worst: ``measured`` (this shape on this device), ``interpolated`` (inside the
measured range of every axis), ``extrapolated`` (outside, by up to 4x), ``assumed`` (a published
figure, cited). A cost made of several is as good as the worst of them. What cannot be priced by one
of these is :class:`CostMissing`, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from mhcplan.profiles.schema import ProfileError
from mhcplan.sim.program import CostTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mhcplan.profiles.schema import Overheads, Segment

Source = Literal["measured", "interpolated", "extrapolated", "assumed"]
SOURCES: tuple[Source, ...] = get_args(Source)

# Shares are multiples of this, so that their binary floats add up to 100 exactly.
_SHARE_STEPS_PER_PERCENT = 16


class CostMissing(ProfileError):
    """Nothing near enough was measured; the message names the axis and the command to measure."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one op costs on one device, and why.

    Attributes:
        duration_ns: time on the stream, alone, hot.
        host_ns: time of the host thread to issue it.
        source: see the module's docstring.
        explanation: where the figures come from, in words; for an assumed one the citation.
        spread_percent: half the distance of the 10th and 90th percentile over the median; of a
            look-up between rows, the largest of theirs.
        segments: the op's kernels as the SMs see them, scaled to this shape; empty if unknown.
        workspace_bytes: peak that the op allocates and frees again; 0 where not measured.
        saved_bytes: what F keeps for I beyond inputs and outputs; deferred_bytes: what I leaves
            for W. As measured, else by the vocabulary's formula.
        link_bytes: bytes that one rank sends over the link that the transfer takes.
        ctas: CTAs of a transfer's kernel, None if unknown.
    """

    duration_ns: int
    host_ns: int
    source: Source
    explanation: str
    spread_percent: float = 0.0
    segments: tuple[Segment, ...] = ()
    workspace_bytes: int = 0
    saved_bytes: int = 0
    deferred_bytes: int = 0
    link_bytes: int = 0
    ctas: int | None = None


def worst(sources: Iterable[Source]) -> Source:
    """The least certain of ``sources``."""
    return max(sources, key=SOURCES.index)


def sources_percent(shares: Iterable[tuple[Source, int]]) -> dict[Source, float]:
    """Share of each source in summed durations, in percent.

    The four values are multiples of 1/16, add up to 100 exactly, and a source with any share at
    all is not rounded down to 0.

    Args:
        shares: pairs of source and nanoseconds, any number for each source.

    Raises:
        ValueError: no duration is above 0.
    """
    sums: dict[Source, int] = dict.fromkeys(SOURCES, 0)
    for source, duration_ns in shares:
        sums[source] += duration_ns
    total = sum(sums.values())
    if total <= 0:
        raise ValueError("sources_percent needs a duration above 0")
    steps = 100 * _SHARE_STEPS_PER_PERCENT
    count = {source: max(ns * steps // total, int(ns > 0)) for source, ns in sums.items()}
    # what rounding left over, or took too much, is the largest share's
    count[max(sums, key=lambda source: sums[source])] += steps - sum(count.values())
    return {source: count[source] / _SHARE_STEPS_PER_PERCENT for source in SOURCES}


def in_graph(cost: Cost, overheads: Overheads, begun: float) -> Cost:
    """The cost of an op or transfer in a CUDA graph: no host, kernels closer to each other.

    ``begun``: graphs that begin with it, on the average of its places in a step.
    """
    if not cost.duration_ns:
        return replace(cost, host_ns=0)
    kernels = max(len(cost.segments), 1)  # a transfer is one, which no row describes
    more_ns = round(begun * overheads.graph_launch_ns) - kernels * overheads.graph_gap_ns
    return replace(cost, duration_ns=max(cost.duration_ns + more_ns, 1), host_ns=0)


def cost_table(costs: Sequence[Cost], overheads: Overheads) -> CostTable:
    """The durations, by cost id, that an engine plays a Program with."""
    return CostTable(
        duration_ns=np.array([cost.duration_ns for cost in costs], np.int64),
        host_ns=np.array([cost.host_ns for cost in costs], np.int64),
        workspace_bytes=np.array([cost.workspace_bytes for cost in costs], np.int64),
        margin_percent=overheads.allocator_margin_percent,
        context_bytes=overheads.context_bytes,
        communicator_bytes=overheads.communicator_bytes,
    )
