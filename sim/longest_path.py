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

from mhcplan.sim.jit import Ints, compiled, ints
from mhcplan.sim.order import NO_OP, order_of
from mhcplan.sim.program import Csr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mhcplan.sim.order import Order
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


def _pass_of(program: Program) -> _Pass:
    order = order_of(program)
    if (order.waited.values == NO_OP).any():
        raise CycleError("an op waits for an event that no op records")
    n, first = program.num_ops, order.first
    is_transfer = order.meeting >= 0
    last = np.arange(n)
    np.maximum.at(last, first, np.arange(n))
    kernels = np.flatnonzero(first == np.arange(n))
    # node f is kernel f (ready, or for compute its end), node n + f the end of its transfers
    nodes = np.concatenate([kernels, n + kernels[is_transfer[kernels]]])
    end_of = first + np.where(is_transfer[first], n, 0)
    sources, targets, transfer = _edges(order, kernels, end_of, n)
    sync = order.sync[last[kernels]]
    synced = sync != NO_OP
    place = _topological(
        nodes,
        np.concatenate([sources, end_of[sync[synced]]]),
        np.concatenate([targets, kernels[synced]]),
        2 * n,
    )
    into = Csr.grouped(place[targets], len(nodes))
    node, is_compute, sync_op, sync_node = (np.full(len(nodes), -1, np.int64) for _ in range(4))
    node[place[kernels]] = last[kernels]
    is_compute[place[kernels]] = ~is_transfer[kernels]
    sync_op[place[kernels]] = sync
    sync_node[place[kernels[synced]]] = place[end_of[sync[synced]]]
    opens_rank = np.zeros(n, np.int64)
    opens_rank[program.rank_offsets[:-1][np.diff(program.rank_offsets) > 0]] = 1
    return _Pass(
        ints(order.meeting), ints(opens_rank), ints(node), ints(is_compute), ints(sync_op),
        ints(sync_node), ints(into.offsets), ints(place[sources[into.values]]),
        ints(transfer[into.values]),
    )  # fmt: skip


def _edges(order: Order, kernels: Array, end_of: Array, n: int) -> tuple[Array, Array, Array]:
    """Source, target and transfer of every edge: streams, events, and members of transfers."""
    first = order.first
    opens = kernels[order.previous[kernels] != NO_OP]
    ops = np.flatnonzero(order.meeting >= 0)
    members = Csr.grouped(order.meeting, int(order.meeting.max(initial=-1)) + 1)
    counts = np.diff(members.offsets)[order.meeting[ops]]
    whose = np.repeat(ops, counts)
    nth = np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)
    member = members.values[members.offsets[order.meeting[whose]] + nth]
    waits = order.waited
    sources = [end_of[order.previous[opens]], end_of[waits.values], first[member]]
    targets = [opens, first[waits.owners], n + first[whose]]
    timeless = np.full(len(opens) + len(waits.values), _NO_TRANSFER, np.int64)
    transfer = np.concatenate([timeless, order.meeting[whose]])
    return np.concatenate(sources), np.concatenate(targets), transfer


def _topological(nodes: Array, sources: Array, targets: Array, num_names: int) -> Array:
    """For every node its place in an order in which edges lead forwards; -1 for other names."""
    from_ = Csr.grouped(sources, num_names)
    missing = np.bincount(targets, minlength=num_names)
    place = np.full(num_names, -1, np.int64)
    queue = np.empty(len(nodes), np.int64)
    reached = _sort(ints(nodes), from_.offsets, ints(targets[from_.values]), ints(missing), queue)
    if reached < len(nodes):
        raise CycleError(f"{len(nodes) - reached} kernels wait for each other")
    place[queue] = np.arange(len(nodes))
    return place


@compiled
def _sort(nodes: Array, begin: Array, targets: Array, missing: Array, queue: Array) -> int:
    """Fill ``queue`` with nodes whose edges all come from nodes before them; returns how many."""
    count = 0
    for node in nodes:
        if missing[node] == 0:
            queue[count] = node
            count += 1
    done = 0
    while done < count:
        node = queue[done]
        done += 1
        for i in range(begin[node], begin[node + 1]):
            missing[targets[i]] -= 1
            if missing[targets[i]] == 0:
                queue[count] = targets[i]
                count += 1
    return count


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
