"""The step as a graph without contention: its longest path, for many tables of costs at once.

Links and SMs are left out; all other waits are in the graph. So the longest path

* is a **lower bound** of the step: no engine plays a shorter one, as long as no op runs faster than
  alone;
* is the step, to the nanosecond, where nothing waits for a link or for SMs.

Known slow-downs can be folded in as factors of the durations, which makes it an estimate. A pass
takes a few nanoseconds an op, so a search ranks plans by it and lets an engine confirm the best.

Nodes are kernels, named by their first op. A compute op's node is its end; a kernel of transfers
has a node for being ready and one for its end, which comes when each of its transfers has had all
members there for as long as it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.jit import Ints, compiled, ints, usable_in_compiled
from mhcplan.sim.order import NO_OP, describe, order_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mhcplan.sim.program import CostTable, Program

    Array = NDArray[np.int64]

_NO_TRANSFER = -1


class CycleError(ValueError):
    """Ops wait for each other, or for an event that nobody records: no engine would end."""


class StepGraph:
    """The graph of a Program, passed through for any costs.

    It is made once for all Programs that differ only in costs and sizes.
    """

    def __init__(self, program: Program) -> None:
        """Make the graph.

        Raises:
            MeetError: a transfer lacks an end or a member.
            CycleError: the step would not end.
        """
        self._pass = program.shared(_pass_of)
        self._cost = ints(program.cost)
        self._node = np.asarray(self._pass.node)
        self._num_meetings = int(order_of(program).meeting.max(initial=-1)) + 1

    def step_ns(
        self, costs: Sequence[CostTable], factors: NDArray[np.float64] | None = None
    ) -> Array:
        """Length of the longest path in ns, for each table of costs.

        Args:
            costs: tables of the Program's cost keys.
            factors: [table, cost key], what durations are multiplied by; the product is rounded up.
        """
        steps = np.zeros(len(costs), np.int64)
        scratch = self._scratch()
        for i, table in enumerate(costs):
            duration = table.duration_ns
            if factors is not None:
                duration = np.ceil(duration * factors[i]).astype(np.int64)
            steps[i] = self._longest(duration, table.host_ns, scratch)
        return steps

    def path_ns(self, costs: CostTable) -> tuple[int, Array]:
        """Length of the longest path; and by op, that to its end, or to when it could begin if it
        is a transfer, or -1 if it is not the last op of its batched call.
        """
        scratch = self._scratch()
        step_ns = self._longest(costs.duration_ns, costs.host_ns, scratch)
        path = np.full(len(self._cost), -1, np.int64)
        is_kernel = self._node >= 0
        path[self._node[is_kernel]] = scratch[-1][is_kernel]
        return step_ns, path

    def _scratch(self) -> tuple[Array, Array, Array]:
        """Arrays by op, by meeting and by node."""
        sizes = len(self._cost), self._num_meetings, len(self._pass.node)
        issue, meeting, at = (ints(np.empty(size, np.int64)) for size in sizes)
        return issue, meeting, at

    def _longest(self, duration: Array, host: Array, scratch: tuple[Array, Array, Array]) -> int:
        return _longest(self._pass, self._cost, ints(duration), ints(host), *scratch)


class _Pass(NamedTuple):
    """The graph as a pass reads it; nodes are in an order in which every edge leads forwards.

    Attributes:
        meeting, opens_rank: of every op; the latter is 1 for the first op of a rank.
        node: of every node, its kernel's last op, or -1 for the end of a kernel of transfers.
        is_compute: of every node, whether an op's duration comes on top of what it waits for.
        sync_op, sync_node: of every node, the op that the host waited for before it issued the
            kernel, and that op's end; or -1.
        begin, source, transfer: edges into every node; over an edge passes no time, or that of a
            transfer.
    """

    meeting: Ints
    opens_rank: Ints
    node: Ints
    is_compute: Ints
    sync_op: Ints
    sync_node: Ints
    begin: Ints
    source: Ints
    transfer: Ints


class _Waits(NamedTuple):
    """What nodes wait for; lists are linked, and -1 ends them. Columns are by op but ``member``.

    Attributes:
        first, previous, waited_begin, waited, sync, meeting: see :class:`mhcplan.sim.order.Order`.
        following, last: the next op of a kernel; by its first op, the last.
        member: of every meeting, a member.
        next_member: another member of the same meeting.
    """

    first: Ints
    previous: Ints
    waited_begin: Ints
    waited: Ints
    sync: Ints
    meeting: Ints
    following: Ints
    last: Ints
    member: Ints
    next_member: Ints


def _pass_of(program: Program) -> _Pass:
    order = order_of(program)
    if (order.waited.values == NO_OP).any():
        raise CycleError("an op waits for an event that no op records")
    n, first = program.num_ops, order.first
    num_members = np.bincount(order.meeting[order.meeting >= 0])
    following, last, next_member = (np.full(n, NO_OP, np.int64) for _ in range(3))
    waits = _Waits(
        ints(first), ints(order.previous), ints(order.waited.offsets), ints(order.waited.values),
        ints(order.sync), ints(order.meeting), following, last,
        np.full(len(num_members), NO_OP, np.int64), next_member,
    )  # fmt: skip
    _link(waits)
    is_kernel = first == np.arange(n)
    num_nodes = np.count_nonzero(is_kernel) + np.count_nonzero(is_kernel & (order.meeting >= 0))
    num_edges = (
        np.count_nonzero(is_kernel & (order.previous != NO_OP))
        + len(waits.waited)
        + int((num_members**2).sum())
    )
    opens_rank = np.zeros(n, np.int64)
    opens_rank[program.rank_offsets[:-1][np.diff(program.rank_offsets) > 0]] = 1
    node, is_compute, sync_op, sync_node = (np.empty(num_nodes, np.int64) for _ in range(4))
    begin = np.zeros(num_nodes + 1, np.int64)
    source, transfer = (np.empty(num_edges, np.int64) for _ in range(2))
    graph = _Pass(
        waits.meeting, opens_rank, node, is_compute, sync_op, sync_node, begin, source, transfer
    )
    place, stack = np.full(2 * n, _UNSEEN, np.int64), np.empty(num_edges + n + 1, np.int64)
    found = np.empty(num_edges + 1, np.int64)
    stuck = _lay_out(waits, place, stack, found, np.empty_like(found), graph)
    if stuck >= 0:
        raise CycleError(f"{describe(program, stuck)} waits for itself, through others")
    return graph


@compiled
def _link(waits: _Waits) -> None:
    """Fill the linked lists."""
    for op in range(len(waits.first)):
        kernel, meeting = waits.first[op], waits.meeting[op]
        if kernel != op:
            waits.following[waits.last[kernel]] = op
        waits.last[kernel] = op
        if meeting >= 0:
            waits.next_member[op] = waits.member[meeting]
            waits.member[meeting] = op


# Node f is the kernel whose first op is f: ready, or for compute its end. Of n ops, node n + f is
# the end of its transfers. Nodes are found depth first: each has its place after all it waits for.

_UNSEEN, _OPEN = -1, -2


@usable_in_compiled
def _end_of(waits: _Waits, op: int) -> int:
    """The node at which an op ends."""
    kernel = waits.first[op]
    return kernel + len(waits.first) if waits.meeting[kernel] >= 0 else kernel


@usable_in_compiled
def _sources(waits: _Waits, node: int, found: Ints, via: Ints) -> int:
    """The nodes that have an edge to ``node``, and the meeting whose transfer it takes, or -1;
    returns how many. One that the host waits for has none, and stands behind them."""
    n, count = len(waits.first), 0
    if node < n:
        if waits.previous[node] >= 0:
            found[0], via[0], count = _end_of(waits, waits.previous[node]), _NO_TRANSFER, 1
        op = node
        while op >= 0:
            for i in range(waits.waited_begin[op], waits.waited_begin[op + 1]):
                found[count], via[count] = _end_of(waits, waits.waited[i]), _NO_TRANSFER
                count += 1
            op = waits.following[op]
        sync = waits.sync[waits.last[node]]
        if sync >= 0:
            found[count] = _end_of(waits, sync)
        return count
    op = node - n
    while op >= 0:
        member = waits.member[waits.meeting[op]]
        while member >= 0:
            found[count], via[count] = waits.first[member], waits.meeting[op]
            count += 1
            member = waits.next_member[member]
        op = waits.following[op]
    return count


@compiled
def _lay_out(waits: _Waits, place: Ints, stack: Ints, found: Ints, via: Ints, graph: _Pass) -> int:
    """Fill ``graph``, and ``place`` of every node in it; returns an op in a cycle, or -1."""
    n, nodes, edges = len(waits.first), 0, 0
    for start in range(n):
        stack[0], depth = _end_of(waits, start), 1
        while depth > 0:
            node = stack[depth - 1]
            if place[node] >= 0:
                depth -= 1
                continue
            op = waits.last[node] if node < n else NO_OP
            sync = waits.sync[op] if op >= 0 else NO_OP
            count, before = _sources(waits, node, found, via), depth
            for i in range(count + (1 if sync >= 0 else 0)):
                if place[found[i]] < 0:
                    stack[depth] = found[i]
                    depth += 1
            if depth > before:
                if place[node] == _OPEN:  # nothing below it is left but what waits for it
                    return node if node < n else node - n
                place[node] = _OPEN
                continue
            graph.node[nodes] = op
            graph.is_compute[nodes] = 1 if op >= 0 and waits.meeting[node] < 0 else 0
            graph.sync_op[nodes] = sync
            graph.sync_node[nodes] = place[found[count]] if sync >= 0 else -1
            for i in range(count):
                graph.source[edges], graph.transfer[edges] = place[found[i]], via[i]
                edges += 1
            place[node] = nodes
            nodes += 1
            graph.begin[nodes] = edges
            depth -= 1
    return -1


@compiled
def _longest(
    graph: _Pass, cost: Ints, duration: Ints, host: Ints, issue: Ints, meeting: Ints, at: Ints
) -> int:
    """One pass; fills the scratch arrays ``issue`` (by op), ``meeting`` and ``at`` (by node)."""
    for m in range(len(meeting)):
        meeting[m] = 0
    issued = 0
    for op in range(len(issue)):
        if graph.opens_rank[op]:
            issued = 0
        issued += host[cost[op]]
        issue[op] = issued  # if the host had waited for nothing
        if graph.meeting[op] >= 0:
            m = graph.meeting[op]
            meeting[m] = max(meeting[m], duration[cost[op]])
    step = 0
    for i in range(len(at)):
        op, now = graph.node[i], 0
        if op >= 0:
            now = issue[op]
            if graph.sync_op[i] >= 0:
                now += at[graph.sync_node[i]] - issue[graph.sync_op[i]]
        for e in range(graph.begin[i], graph.begin[i + 1]):
            before = at[graph.source[e]]
            if graph.transfer[e] >= 0:
                before += meeting[graph.transfer[e]]
            now = max(now, before)
        if graph.is_compute[i] > 0:
            now += duration[cost[op]]
        at[i] = now
        step = max(step, now)
    return step
