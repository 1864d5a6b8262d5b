"""Playing measured pairs with the engine: what its model of contention is worth.

A pair is a kernel and traffic that ran beside each other on two GPUs, both streams kept full. Here
the same two streams are a Program of two ranks, played with the physics that every prediction uses
(:mod:`mhcplan.sim.device_sms`), so that the error found is that of predictions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.profiles.contention import PHASES
from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.device_kernels import Loads, Traffic
from mhcplan.sim.program import (
    COMPONENTS,
    HIGH_PRIORITY,
    NORMAL_PRIORITY,
    CostTable,
    Csr,
    Group,
    Program,
    Stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mhcplan.profiles.contention import Message
    from mhcplan.sim.device_kernels import Kernel, Parameters
    from mhcplan.sim.timeline import Timeline

    Ints = NDArray[np.int64]

_SKEW = 1.01  # the second rank is that much slower: no two GPUs are equal
_MESSAGES, _FEWEST_MESSAGES = 14, 6
_MOST_MESSAGES = 2_000
_FEWEST_OPS, _MOST_OPS = 8, 60_000
# cost keys: the op on either rank, a message, the gap after it, and what makes the second rank late
_FIRST, _SECOND, _MESSAGE, _GAP, _LAG = range(5)


class Played(NamedTuple):
    """What an op and traffic do to each other while both streams are kept full; means.

    Attributes:
        compute: time of an op over its time alone, mean over the ranks that compute.
        traffic: period of a message over its period alone.
        queue_ns: from the end of a message, and its gap, until the next one has SMs on both ranks.
        kernel_ns: from there to its end.
    """

    compute: float
    traffic: float
    queue_ns: float
    kernel_ns: float


def replay(
    kernels: tuple[Kernel, ...], message: Message, parameters: Parameters, op_ns: float
) -> tuple[float, float]:
    """Slowdowns of an op and of traffic; arguments and errors as :func:`play`."""
    return play(kernels, message, parameters, op_ns)[:2]


def play(
    kernels: tuple[Kernel, ...], message: Message, parameters: Parameters, op_ns: float,
    engine: Callable[[Program, CostTable], Timeline] = simulate_compiled,
) -> Played:  # fmt: skip
    """An op and traffic that run beside each other all the time.

    Args:
        kernels: of the op, in order; it follows itself on its stream.
        message: the traffic; a message follows the one before.
        parameters: of the machine.
        op_ns: period of the op alone, with the gaps between kernels.
        engine: what plays it; all engines agree.

    Raises:
        ValueError: there is no kernel, a message takes more SMs than there are, or so much longer
            than ops that playing them is hopeless.
    """
    if not kernels:
        raise ValueError("kernels: an op needs at least one kernel")
    if not 0 <= message.ctas <= parameters.num_sms:
        raise ValueError(f"ctas={message.ctas} must be 0 .. {parameters.num_sms}, the SMs")
    pair = _Pair(kernels, message, parameters, op_ns)
    found = [_play_from(pair, round(phase * op_ns), engine) for phase in PHASES.values()]
    return Played(*(sum(values) / len(found) for values in zip(*found, strict=True)))


class _Pair(NamedTuple):
    kernels: tuple[Kernel, ...]
    message: Message
    parameters: Parameters
    op_ns: float

    @property
    def period_ns(self) -> float:
        """From message to message, alone."""
        return self.message.alone_ns + self.message.gap_ns


def _play_from(
    pair: _Pair, lag_ns: int, engine: Callable[[Program, CostTable], Timeline]
) -> Played:
    """Play with the second rank behind by ``lag_ns``; longer until enough was done."""
    # short messages are as many as it takes to be there for all the ops that count
    messages = max(_MESSAGES, -(-_FEWEST_OPS * pair.op_ns // pair.period_ns))
    messages = min(int(messages), _MOST_MESSAGES)
    ops = max(_FEWEST_OPS, round(3 * messages * pair.period_ns / pair.op_ns))
    while ops <= _MOST_OPS:
        program = _two_ranks(pair.message, ops, messages)
        found = _means(program, engine(program, _costs(pair, lag_ns)), pair)
        if found is not None:
            return found
        ops *= 3
    raise ValueError(f"messages of {pair.message.alone_ns} ns never end beside the op")


def _means(program: Program, timeline: Timeline, pair: _Pair) -> Played | None:
    """While both sides were busy; None if that was too short."""
    key, start = program.cost, timeline.start_ns
    busy = {_FIRST: 1.0, _SECOND: _SKEW} if pair.message.both_busy else {_FIRST: 1.0}
    until = min(int(start[key == which].max()) for which in busy)
    # ends that meet have one time; of ends that do not, those beside an op count
    ends = range(len(busy)) if pair.message.eager else (0,)
    traffic = [_of_messages(program, timeline, rank, until) for rank in ends]
    if min(done for *_, done in traffic) < 0:
        return None
    period_ns, kernel_ns, last = (
        sum(values) / len(traffic) for values in zip(*traffic, strict=True)
    )
    compute: list[float] = []
    for which, skew in busy.items():
        begun = np.sort(start[key == which])
        begun = begun[begun <= max(last, begun[1])]
        compute.append(_mean_step(begun) / (pair.op_ns * skew))
    queue_ns = max(period_ns - kernel_ns - pair.message.gap_ns, 0.0)
    return Played(sum(compute) / len(compute), period_ns / pair.period_ns, queue_ns, kernel_ns)


def _of_messages(
    program: Program, timeline: Timeline, rank: int, until: int
) -> tuple[float, float, int]:
    """Of a rank's messages until then: mean period, mean time in the kernel, end of the last; its
    end is -1 where there were too few."""
    is_message = (program.cost == _MESSAGE) & (program.rank == rank)
    sent = np.sort(timeline.end_ns[is_message])
    done = sent[sent <= until]
    if len(done) < _FEWEST_MESSAGES:
        return 0.0, 0.0, -1
    kernel_ns = float((sent - np.sort(timeline.start_ns[is_message]))[1 : len(done)].mean())
    return _mean_step(done), kernel_ns, int(done[-1])


def _mean_step(times: Ints) -> float:
    return int(times[-1] - times[0]) / (len(times) - 1)


def _costs(pair: _Pair, lag_ns: int) -> CostTable:
    message = pair.message
    durations = (pair.op_ns, pair.op_ns * _SKEW, message.alone_ns, message.gap_ns, 0)
    traffic = Traffic(
        message.ctas, round(message.fixed_ns), round(message.chain_ns), *message.hbm_bytes
    )
    host_ns = np.zeros(len(durations), np.int64)
    host_ns[_LAG] = lag_ns
    return CostTable(
        np.array([round(ns) for ns in durations], np.int64),
        host_ns,
        np.zeros(len(durations), np.int64),
        loads=Loads(
            kernels=(pair.kernels, pair.kernels, (), (), ()),
            traffic=(None, None, traffic, Traffic(0, link_share=0.0), None),
            parameters=pair.parameters,
        ),
    )


def _two_ranks(message: Message, ops: int, count: int) -> Program:
    """A step of two ranks; the second one computes only where both did. Between two messages comes
    a transfer of no SMs that takes as long as the gap. The ends of an eager message do not meet:
    each is a transfer of its own."""
    messages = [_MESSAGE, _GAP] * count
    rows = [(0, 0, _FIRST)] * ops + [(0, 1, key) for key in messages]  # rank, stream, cost
    rows += [(1, 2, _LAG)] + [(1, 2, _SECOND)] * (ops if message.both_busy else 0)
    rows += [(1, 3, key) for key in messages]
    rank, stream, cost = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    n = len(rows)
    meeting = 3 + rank if message.eager else 0
    group = np.where(cost == _MESSAGE, meeting, np.where(cost == _GAP, 1 + rank, -1))
    group = group.astype(np.int32)
    peer = np.where((group == 0) & message.one_way, 1 - rank, -1).astype(np.int32)
    urgent = HIGH_PRIORITY if message.high_priority else NORMAL_PRIORITY
    none, zero = np.full(n, -1, np.int32), np.zeros(n, np.int32)
    empty = Csr(np.zeros(n + 1, np.int64), np.zeros(0, np.int64))
    return Program(
        num_ranks=2,
        streams=tuple(
            Stream(r, name, priority)
            for r in (0, 1)
            for name, priority in (("compute", NORMAL_PRIORITY), ("comm", urgent))
        ),
        groups=(
            Group("pair", (0, 1), 2, "intra_node"),
            Group("gap0", (0,), 2, "gap"),
            Group("gap1", (1,), 2, "gap"),
            Group("send", (0,), 2, "intra_node"),
            Group("receive", (1,), 2, "intra_node"),
        ),
        kinds=("work",), categories=("compute",), cells=("",), cost_keys=tuple("01234"),
        buffer_bytes=np.zeros(0, np.int64), buffer_component=np.zeros(0, np.int8),
        static_bytes=np.zeros((2, len(COMPONENTS)), np.int64), num_events=0,
        rank=rank, stream=stream, kind=zero, category=zero, pass_=zero.astype(np.uint8), cell=zero,
        cost=cost, stage=none, site=none, microbatch=none, record=none.astype(np.int64),
        host_sync=np.zeros(n, np.bool_), group=group, peer=peer,
        is_send=(peer >= 0) & (rank == 0), payload_bytes=np.zeros(n, np.int64), batch=none,
        waits=empty, reads=empty, writes=empty, allocs=empty, frees=empty,
    )  # fmt: skip
