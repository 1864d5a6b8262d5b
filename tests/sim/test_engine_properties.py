"""What holds for every sound program, whatever its times."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.sim.breakdown import breakdown, busy_ns
from mhcplan.sim.engine import simulate
from mhcplan.sim.order import NO_OP, order_of
from mhcplan.sim.timeline import REASONS, critical_path
from tests.support.programs import makers

if TYPE_CHECKING:
    from mhcplan.sim.program import CostTable, Program
    from mhcplan.sim.timeline import Timeline
    from tests.support.programs import Maker

EXAMPLES = settings(max_examples=60, deadline=None)


def played(maker: Maker, scale: int = 1) -> tuple[Program, CostTable, Timeline]:
    program, costs = maker.build(scale=scale)
    return program, costs, simulate(program, costs)


@EXAMPLES
@given(makers())
def test_no_op_starts_before_what_it_waits_for(maker: Maker) -> None:
    program, costs, timeline = played(maker)
    order = order_of(program)
    start, end = timeline.start_ns, timeline.end_ns
    assert (start >= timeline.issue_ns).all()
    assert (start[order.waited.owners] >= end[order.waited.values]).all()
    has_previous = order.previous != NO_OP
    assert (start[has_previous] >= end[order.previous[has_previous]]).all()
    has_sync = order.sync != NO_OP
    host_ns = costs.host_ns[program.cost]
    issue_began = timeline.issue_ns - host_ns
    assert (issue_began[has_sync] >= end[order.sync[has_sync]]).all()
    for rank in range(program.num_ranks):
        own = slice(*program.rank_offsets[rank : rank + 2])
        assert (issue_began[own][1:] >= timeline.issue_ns[own][:-1]).all()
    for number in range(order.meeting.max(initial=-1) + 1):
        members = np.flatnonzero(order.meeting == number)
        assert len(set(start[members].tolist())) == 1
        assert (end[members] >= start[members] + costs.duration_ns[program.cost[members]]).all()


@EXAMPLES
@given(makers())
def test_no_two_kernels_of_a_stream_overlap(maker: Maker) -> None:
    program, _, timeline = played(maker)
    first = order_of(program).first
    for stream in range(len(program.streams)):
        ops = np.flatnonzero(program.stream == stream)
        kernels = list(dict.fromkeys(first[ops].tolist()))
        begin = [timeline.start_ns[ops[first[ops] == kernel]].min() for kernel in kernels]
        ends = [set(timeline.end_ns[ops[first[ops] == kernel]].tolist()) for kernel in kernels]
        assert all(len(times) == 1 for times in ends), "a batch ends at once"
        end = [times.pop() for times in ends]
        assert all(b >= e for e, b in zip(end, begin[1:], strict=False))


@EXAMPLES
@given(makers())
def test_only_one_compute_op_of_a_rank_makes_progress(maker: Maker) -> None:
    """A rank's compute ops together take as long as the SMs work, pre-empted or not."""
    program, costs, timeline = played(maker)
    computes = program.group < 0
    for rank in range(program.num_ranks):
        ops = np.flatnonzero(computes & (program.rank == rank))
        work = int(costs.duration_ns[program.cost[ops]].sum())
        reported = breakdown(program, timeline).ns[rank, :4].sum()
        assert reported == work


@EXAMPLES
@given(makers())
def test_links_carry_one_transfer_at_a_time(maker: Maker) -> None:
    program, costs, timeline = played(maker)
    on_link: dict[tuple[int, str, str], list[tuple[int, int]]] = {}
    for op in np.flatnonzero(program.group >= 0).tolist():
        start = int(timeline.start_ns[op])
        span = (start, start + int(costs.duration_ns[program.cost[op]]))
        medium = program.groups[program.group[op]].medium
        for way, taken in (("out", program.is_send[op]), ("in", not program.is_send[op])):
            if taken or program.peer[op] < 0:
                on_link.setdefault((int(program.rank[op]), medium, way), []).append(span)
    for spans in on_link.values():
        busy = sorted(span for span in spans if span[0] < span[1])
        assert all(end <= begin for (_, end), (begin, _) in pairwise(busy))


def dependency_graph(program: Program, costs: CostTable) -> nx.DiGraph:
    """Edges "end of a before start of b" with what must pass between; links and SMs left out."""
    order = order_of(program)
    graph = nx.DiGraph()
    duration, host = costs.duration_ns[program.cost], costs.host_ns[program.cost]
    for op in range(program.num_ops):
        kernel = int(order.first[op])
        meets = int(order.meeting[op])
        graph.add_edge(("issued", op), ("here", kernel), weight=0)
        graph.add_edge(("here", kernel), ("met", meets) if meets >= 0 else ("end", op),
                       weight=0 if meets >= 0 else int(duration[op]))  # fmt: skip
        if meets >= 0:
            for other in np.flatnonzero(order.first == kernel).tolist():
                graph.add_edge(("met", meets), ("end", other), weight=int(duration[op]))
        for before in [*order.waited[op].tolist(), int(order.previous[op])]:
            if before != NO_OP:
                graph.add_edge(("end", before), ("here", kernel), weight=0)
        if order.sync[op] != NO_OP:
            graph.add_edge(("end", int(order.sync[op])), ("issued", op), weight=int(host[op]))
        if op and program.rank[op] == program.rank[op - 1]:
            graph.add_edge(("issued", op - 1), ("issued", op), weight=int(host[op]))
        else:
            graph.add_edge("begin", ("issued", op), weight=int(host[op]))
    return graph


@EXAMPLES
@given(makers())
def test_a_step_is_no_shorter_than_its_critical_path_and_its_busiest_stream(maker: Maker) -> None:
    program, costs, timeline = played(maker)
    longest = nx.dag_longest_path_length(dependency_graph(program, costs))
    assert timeline.step_ns >= longest
    assert timeline.step_ns >= busy_ns(program, timeline).max()


@EXAMPLES
@given(makers(), st.integers(2, 1000))
def test_times_scale_exactly(maker: Maker, scale: int) -> None:
    _, _, once = played(maker)
    _, _, scaled = played(maker, scale)
    assert np.array_equal(once.start_ns * scale, scaled.start_ns)
    assert np.array_equal(once.end_ns * scale, scaled.end_ns)
    assert np.array_equal(once.cause, scaled.cause)


@EXAMPLES
@given(makers())
def test_the_critical_path_has_no_gap_and_is_the_step(maker: Maker) -> None:
    program, _, timeline = played(maker)
    path = critical_path(timeline)
    assert path[0].start_ns == 0
    assert path[-1].end_ns == timeline.step_ns
    assert all(a.end_ns == b.start_ns for a, b in pairwise(path))
    for before, piece in zip([None, *path], path, strict=False):
        if piece.op == NO_OP:
            assert piece.reason in {"start", "host"}
            continue
        assert timeline.start_ns[piece.op] == piece.start_ns
        assert timeline.end_ns[piece.op] >= piece.end_ns
        if before is not None and before.op == NO_OP:
            assert piece.reason in {"host", "peer"}, "only the host leaves nothing running"
        if piece.reason == "priority":
            assert before is not None
            assert program.rank[before.op] == program.rank[piece.op]


@EXAMPLES
@given(makers())
def test_breakdowns_sum_to_the_step(maker: Maker) -> None:
    program, _, timeline = played(maker)
    ns = breakdown(program, timeline).ns
    assert (ns >= 0).all()
    assert (ns.sum(axis=1) == timeline.step_ns).all()


def test_reasons_are_int8_codes() -> None:
    assert len(REASONS) == len(set(REASONS)) < 128
