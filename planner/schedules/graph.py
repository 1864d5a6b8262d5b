"""A schedule as a graph of actions: when they end, the bubble and the chunks kept alive.

This is the arithmetic of the published formulas, one duration per kind of action and all stages
alike. It knows nothing of ops, streams or contention: steps are predicted by :mod:`mhcplan.sim`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, assert_never

import networkx as nx

from mhcplan.planner.schedules.actions import Output, input_of, output_of
from mhcplan.planner.schedules.p2p import place_messages
from mhcplan.planner.schedules.table import deadlock

if TYPE_CHECKING:
    from mhcplan.planner.schedules.actions import Action
    from mhcplan.planner.schedules.table import Schedule

Waits = Literal["eager", "buffered", "grouped"]


@dataclass(frozen=True, slots=True)
class ChunkTimes:
    """How long the actions of one chunk take, and a message between two ranks.

    Attributes:
        forward_ns: F.
        input_grad_ns: I; B takes I and W.
        weight_grad_ns: W.
        overlap_ns: An overlapped pair F&B.
        message_ns: From the end of an action to the arrival of its output on another rank.
    """

    forward_ns: int
    input_grad_ns: int
    weight_grad_ns: int
    overlap_ns: int
    message_ns: int = 0

    def of(self, action: Action) -> int:
        """Duration of an action in ns."""
        match action.kind:
            case "F":
                return self.forward_ns
            case "I":
                return self.input_grad_ns
            case "W":
                return self.weight_grad_ns
            case "B":
                return self.input_grad_ns + self.weight_grad_ns
            case "OVERLAP":
                return self.overlap_ns
        assert_never(action.kind)


def chunk_graph(schedule: Schedule, p2p: Waits = "eager") -> nx.DiGraph[Action]:
    """What must end before what starts.

    Nodes are actions, with their ``rank``. An edge's ``messages`` is 1 if a message passes between
    the end of the one action and the start of the other, else 0. With ``eager`` an action waits for
    the one before it and for its own inputs; with ``grouped`` it waits for every message posted
    before it, hence for whatever the peers do before they post the other ends. ``buffered`` is
    between the two: an action waits for every receive posted before it, but for no send.
    """
    graph: nx.DiGraph[Action] = nx.DiGraph()
    producer: dict[Output | None, tuple[Action, int]] = {}  # None: W, which nothing needs
    for rank, row in enumerate(schedule.actions):
        graph.add_nodes_from(row, rank=rank)
        graph.add_edges_from(pairwise(row), messages=0)
        producer |= {output_of(part): (action, rank) for action in row for part in action.parts}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            for need in (input_of(part, schedule.num_stages) for part in action.parts):
                if need is not None:
                    source, source_rank = producer[need]
                    graph.add_edge(source, action, messages=int(source_rank != rank))
    if p2p != "eager":
        graph.add_edges_from(_group_edges(schedule, p2p), messages=1)
    return graph


def _group_edges(schedule: Schedule, p2p: Waits) -> set[tuple[Action, Action]]:
    """From the action after which one end of a message is posted to the one that waits for it."""
    ends: dict[Output, list[tuple[Action | None, Action | None]]] = {}
    table = place_messages(schedule, "grouped")
    for row, slots in zip(schedule.actions, table, strict=True):
        # The first batch is posted at time 0, and no action waits for the last.
        for messages, (posted, waiting) in zip(slots, pairwise((None, *row, None)), strict=True):
            for message in messages:
                border = posted, waiting
                if p2p == "buffered":
                    sends = message.kind.startswith("SEND")
                    border = (posted, None) if sends else (None, waiting)
                ends.setdefault(message.carries, []).append(border)
    return {
        (posted, waiting)
        for borders in ends.values()
        for posted, _ in borders
        for _, waiting in borders
        if posted is not None and waiting is not None
    }


def end_times_ns(schedule: Schedule, times: ChunkTimes, p2p: Waits = "eager") -> dict[Action, int]:
    """When every action ends, in ns after the first one starts, if each starts as it can.

    Raises:
        ScheduleError: The schedule deadlocks: some actions wait for each other in a ring.
    """
    graph = chunk_graph(schedule, p2p)
    end_ns: dict[Action, int] = {}
    try:
        for action in nx.topological_sort(graph):
            arrivals_ns = (
                end_ns[source] + edge["messages"] * times.message_ns
                for source, edge in graph.pred[action].items()
            )
            end_ns[action] = max(arrivals_ns, default=0) + times.of(action)
    except nx.NetworkXUnfeasible:
        rest = [[action for action in row if action not in end_ns] for row in schedule.actions]
        raise deadlock(schedule, [row[0] for row in rest if row]) from None
    return end_ns


def bubbles_ns(schedule: Schedule, times: ChunkTimes, p2p: Waits = "eager") -> tuple[int, ...]:
    """Per rank, the part of the makespan in which it runs no action, in ns.

    Published (DeepSeek-V3, table 2, for F = I = W): (P-1)(F+B) for 1F1B, (P-1)(F+B-2W) for ZB1P,
    (P/2-1)(F&B+B-3W) for DualPipe. With other times only the graph is right: warm-up runs at the
    pace of F, cool-down at that of the longest of F, I and W, and ranks differ if F&B < F+B.

    Raises:
        ScheduleError: The schedule deadlocks.
    """
    step_ns = max(end_times_ns(schedule, times, p2p).values())
    return tuple(step_ns - sum(map(times.of, row)) for row in schedule.actions)


def peak_live_chunks(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most chunks at once whose F has begun and whose I or B has not ended.

    An overlapped pair allocates its F before its B frees. A chunk is one stage's layers for one
    microbatch; a queued W, which keeps some of its chunk's tensors, is not counted.
    """
    return tuple(_peak(row) for row in schedule.actions)


def _peak(row: tuple[Action, ...]) -> int:
    live = peak = 0
    for action in row:
        kinds = [part.kind for part in action.parts]
        live += "F" in kinds
        peak = max(peak, live)
        live -= "I" in kinds or "B" in kinds
    return peak
