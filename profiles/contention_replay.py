"""Playing measured pairs with the engine: what its model of contention is worth.

A pair is a kernel and traffic that ran beside each other on two GPUs, both streams kept full. Here
the same two streams are a Program of two ranks, played with the physics that every prediction uses
(:mod:`mhcplan.sim.device_sms`), so that the error found is that of predictions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.device_kernels import Loads, Traffic
from mhcplan.sim.program import COMPONENTS, CostTable, Csr, Group, Program, Stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.profiles.contention_fit import Pair
    from mhcplan.sim.device_kernels import Parameters
    from mhcplan.sim.timeline import Timeline

    Ints = NDArray[np.int64]

_STARTS = (0.23, 0.61)  # the second rank's lag, as a share of an op: no phase is special
_SKEW = 1.01  # the second rank is that much slower: no two GPUs are equal
_MESSAGES = 14
_FEWEST_OPS = 8
_MOST_OPS = 20_000
# cost keys, one each
_FIRST, _SECOND, _MESSAGE, _GAP = range(4)


def replay(pair: Pair, parameters: Parameters) -> tuple[float, float]:
    """Slowdowns of compute (mean over the ranks that compute) and of traffic in a pair."""
    found = [_replay_from(pair, parameters, lag) for lag in _STARTS]
    compute, traffic = (sum(values) / len(found) for values in zip(*found, strict=True))
    return compute, traffic


def _replay_from(pair: Pair, parameters: Parameters, lag: float) -> tuple[float, float]:
    message, op_ns = pair.message, pair.op_ns
    ops = max(_FEWEST_OPS, round(3 * _MESSAGES * (message.alone_ns + message.gap_ns) / op_ns))
    while True:
        ops = min(ops, _MOST_OPS)
        program = _two_ranks(pair, ops)
        timeline = simulate_compiled(program, _costs(pair, parameters, lag))
        result = _slowdowns(program, timeline, pair)
        if result is not None or ops == _MOST_OPS:
            return result or (float("nan"), float("nan"))
        ops *= 3


def _slowdowns(program: Program, timeline: Timeline, pair: Pair) -> tuple[float, float] | None:
    """While both sides were busy; None if that was too short."""
    keys, start = program.cost, timeline.start_ns
    periods: list[float] = []
    until = int(timeline.end_ns[program.group < 0].max())
    computing = (_FIRST, _SECOND) if pair.message.both_busy else (_FIRST,)
    until = min(int(start[keys == key].max()) for key in computing)
    sent = np.flatnonzero((keys == _MESSAGE) & (program.rank == 0))
    messages = np.sort(timeline.end_ns[sent])
    done = messages[messages <= until]
    if len(done) < 6 and len(done) < len(messages):
        return None
    last = int(done[-1]) if len(done) else until
    for key, skew in zip(computing, (1.0, _SKEW), strict=False):
        begun = np.sort(start[keys == key])
        begun = begun[begun <= max(last, begun[min(_FEWEST_OPS, len(begun) - 1)])]
        periods.append((begun[-1] - begun[0]) / (len(begun) - 1) / (pair.op_ns * skew))
    alone = pair.message.alone_ns + pair.message.gap_ns
    traffic = (done[-1] - done[0]) / (len(done) - 1) / alone
    return sum(periods) / len(periods), traffic


def _costs(pair: Pair, parameters: Parameters, lag: float) -> CostTable:
    message, op_ns = pair.message, pair.op_ns
    durations = [round(op_ns), round(op_ns * _SKEW), round(message.alone_ns),
                 round(message.gap_ns)]  # fmt: skip
    sends = Traffic(
        message.ctas, round(message.fixed_ns), round(message.chain_ns), *message.hbm_bytes,
    )  # fmt: skip
    loads = Loads(
        kernels=(pair.kernels, pair.kernels, (), ()),
        traffic=(None, None, sends, Traffic(0, link_share=0.0)),
        parameters=parameters,
    )
    host = np.zeros(5, np.int64)
    host[4] = round(lag * op_ns)
    return CostTable(
        np.array([*durations, 0], np.int64), host, np.zeros(5, np.int64),
        loads=Loads((*loads.kernels, ()), (*loads.traffic, None), parameters),
    )  # fmt: skip


def _two_ranks(pair: Pair, ops: int) -> Program:
    """A step of two ranks; the second one computes only where both did."""
    both = pair.message.both_busy
    is_collective = pair.name.split("|")[1].startswith(("all_to_all", "send_recv_both"))
    messages = [_MESSAGE, _GAP] * _MESSAGES
    rows: list[tuple[int, int, int]] = []  # rank, stream, cost
    rows += [(0, 0, _FIRST)] * ops + [(0, 1, key) for key in messages]
    rows += [(1, 2, 4)] + [(1, 2, _SECOND)] * (ops if both else 0)
    rows += [(1, 3, key) for key in messages]
    rank, stream, cost = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    n = len(rows)
    group = np.where(cost == _MESSAGE, 0, np.where(cost == _GAP, 1 + rank, -1)).astype(np.int32)
    peer = np.where((group == 0) & (not is_collective), 1 - rank, -1).astype(np.int32)
    none = np.full(n, -1, np.int32)
    empty = Csr(np.zeros(n + 1, np.int64), np.zeros(0, np.int64))
    zero = np.zeros(n, np.int32)
    urgent = -1 if pair.message.high_priority else 0
    return Program(
        num_ranks=2,
        streams=(Stream(0, "compute", 0), Stream(0, "comm", urgent),
                 Stream(1, "compute", 0), Stream(1, "comm", urgent)),
        groups=(Group("pair", (0, 1), 2, "intra_node"), Group("gap0", (0,), 2, "gap"),
                Group("gap1", (1,), 2, "gap")),
        kinds=("work",), categories=("compute",), cells=("",), cost_keys=("0", "1", "2", "3", "4"),
        buffer_bytes=np.zeros(0, np.int64), buffer_component=np.zeros(0, np.int8),
        static_bytes=np.zeros((2, len(COMPONENTS)), np.int64), num_events=0,
        rank=rank, stream=stream, kind=zero, category=zero, pass_=zero.astype(np.uint8), cell=zero,
        cost=cost, stage=none, site=none, microbatch=none, record=none.astype(np.int64),
        host_sync=np.zeros(n, np.bool_), group=group, peer=peer,
        is_send=(peer >= 0) & (rank == 0), payload_bytes=np.zeros(n, np.int64), batch=none,
        waits=empty, reads=empty, writes=empty, allocs=empty, frees=empty,
    )  # fmt: skip
