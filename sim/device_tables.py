"""From what ops put on a GPU to the integers that :mod:`mhcplan.sim.device_sms` reckons with."""

from __future__ import annotations

from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.device import FULL_RATE
from mhcplan.sim.device_kernels import hbm_share, units
from mhcplan.sim.device_sms import waves_of
from mhcplan.sim.device_state import SHARE, Gpu
from mhcplan.sim.jit import ints
from mhcplan.sim.order import order_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mhcplan.sim.device_kernels import Kernel, Parameters, Traffic
    from mhcplan.sim.program import CostTable, Program

    Array = NDArray[np.int64]

_NUM_COLUMNS = 17  # of a kernel: ``end`` .. ``drain_ns`` of Gpu
_SCALED = [0, 1, 2, 16]  # of these ``end``, ``life``, ``tail`` and ``drain_ns``
_PAIR = 2  # CTAs of a cluster that all SMs have places for
_TRANSFER_SMS = 8  # that a transfer takes; NCCL's take 1 to 32


def gpu_of(program: Program, costs: CostTable) -> Gpu:
    """The tables of a Program's ops; empty where the costs know no loads."""
    if costs.loads is None:
        return Gpu(*(ints([]) for _ in Gpu._fields))
    priority = np.array([stream.priority for stream in program.streams], np.int64)
    ops = np.flatnonzero(program.group >= 0)
    of_transfers = np.full((4, program.num_ops), -1, np.int64)
    of_transfers[:, ops] = transfer_columns(program, costs, ops)
    by_op = (
        np.arange(program.num_ops), priority[program.stream], program.cost,
        np.diff(program.waits.offsets) > 0, *of_transfers,
    )  # fmt: skip
    return Gpu(*map(ints, by_op), *tables_of(costs))


def tables_of(costs: CostTable) -> tuple[Array, ...]:
    """Columns ``begin`` .. ``machine`` of :class:`Gpu`, those of cost keys and kernels; empty where
    the costs know no loads."""
    loads = costs.loads
    if loads is None:
        return tuple(ints([]) for _ in Gpu._fields[Gpu._fields.index("begin") :])
    p, limit = loads.parameters, loads.compute_sms
    # ranks that differ in their clock only have keys with the same kernels: look at each once
    number: dict[int, int] = {}
    likeness = np.array([number.setdefault(id(k), len(number)) for k in loads.kernels], np.int64)
    first_key = np.unique(likeness, return_index=True)[1]
    demands = [_demand(kernels, p, limit) for kernels in {id(k): k for k in loads.kernels}.values()]
    counts = np.array([len(demand.rows) for demand in demands], np.int64)
    begin = _offsets(counts[likeness])
    # from every row to the first key's, and to its place among the demands' rows
    to_like = begin[:-1] - begin[first_key][likeness]
    to_demand = begin[:-1] - _offsets(counts)[:-1][likeness]
    numbers = np.arange(int(begin[-1]))
    durations = np.repeat(costs.duration_ns, counts[likeness])
    columns = _columns(demands, numbers - np.repeat(to_demand, counts[likeness]), durations)
    beside = np.array([demand.beside for demand in demands], np.int64).reshape(-1, 2)[likeness]
    machine = [
        p.num_sms, min(limit or p.num_sms, p.num_sms), _share(p.compute_delay),
        _share(p.crowding), _share(p.least_life), _share(p.together), _share(p.latency_delay),
    ]  # fmt: skip
    tables = (
        begin, numbers - np.repeat(to_like, counts[likeness]), *columns, beside[:, 0],
        *_transfer_keys(loads.traffic, costs.duration_ns), beside[:, 1],
        np.array(machine, np.int64),
    )  # fmt: skip
    return tuple(map(ints, tables))


def _offsets(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _columns(demands: Sequence[_Demand], rows: Array, durations_ns: Array) -> Array:
    """Columns ``end`` .. ``drain_ns`` of :class:`Gpu`, a kernel's op taking ``durations_ns``."""
    if not demands:
        return np.zeros((_NUM_COLUMNS, 0), np.int64)
    columns = np.concatenate([demand.rows for demand in demands]).T[:, rows]
    shares = np.concatenate([demand.shares for demand in demands]).T[:, rows]
    scaled = np.rint(shares * durations_ns).astype(np.int64)
    scaled[0] *= FULL_RATE  # kernels end at whole nanoseconds
    columns[_SCALED] = np.maximum(columns[_SCALED], scaled)
    return columns


def queued_behind(program: Program, costs: CostTable) -> Array:
    """For every op that opens a kernel, the op launched before it into the same hardware queue, or
    -1: the kernel cannot begin before that one has.

    Streams are dealt to the queues of their GPU in turn. A queue of one stream changes nothing.
    """
    connections = costs.loads.connections if costs.loads is not None else len(program.streams)
    return program.shared(_queues_of(connections))


@cache
def _queues_of(connections: int) -> Callable[[Program], Array]:
    return partial(_queued_behind, connections)


def _queued_behind(connections: int, program: Program) -> Array:
    behind = np.full(program.num_ops, -1, np.int64)
    queue = np.zeros(len(program.streams), np.int64)
    count = [0] * program.num_ranks
    for i, stream in enumerate(program.streams):
        queue[i] = stream.rank * connections + count[stream.rank] % connections
        count[stream.rank] += 1
    if max(count, default=0) <= connections:
        return behind
    of_op = queue[program.stream]
    by_queue = np.argsort(of_op, kind="stable")
    before, after = by_queue[:-1], by_queue[1:]
    shared = (of_op[before] == of_op[after]) & (program.stream[before] != program.stream[after])
    behind[after[shared]] = before[shared]
    behind[order_of(program).first != np.arange(program.num_ops)] = -1
    return behind


def _share(value: float) -> int:
    return round(value * SHARE)


class _Demand(NamedTuple):
    """What the kernels of an op ask of a GPU, however long the op takes.

    They are stretched to fill the op's duration: gaps between kernels belong to the kernels.

    Attributes:
        rows: by kernel, columns ``end`` .. ``drain_ns`` of :class:`Gpu`; those that grow with the
            duration, :data:`_SCALED`, hold the least that they can be.
        shares: by kernel, what these grow by with every nanosecond of the op.
        beside: columns ``delay`` and ``memory``.
    """

    rows: Array
    shares: NDArray[np.float64]
    beside: tuple[int, int]


@lru_cache(maxsize=4096)
def _demand(kernels: tuple[Kernel, ...], p: Parameters, limit: int | None) -> _Demand:
    beside = (_delay(kernels, p), _memory(kernels, p))
    if not kernels:
        row = (0, 1, 0, 0, p.num_sms, 0, 1, 1, p.num_sms, SHARE, 0, SHARE, SHARE, 0, 0, 1, 0)
        return _Demand(np.array([row]), np.array([[1.0, 0.0, 0.0, 0.0]]), beside)
    sms = min(limit or p.num_sms, p.num_sms)
    ends = np.cumsum([kernel.duration_ns for kernel in kernels], dtype=np.float64)
    rows: list[tuple[int, ...]] = []
    shares: list[tuple[float, ...]] = []
    for kernel, end in zip(kernels, (ends / ends[-1]).tolist(), strict=True):
        row, grows = _row(kernel, kernel.duration_ns / float(ends[-1]), p, sms)
        rows.append((0, *row))
        shares.append((end, *grows))
    return _Demand(np.array(rows, np.int64), np.array(shares), beside)


def _row(
    kernel: Kernel, share: float, p: Parameters, sms: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Columns ``life`` .. ``drain_ns`` of a kernel that runs on ``sms`` SMs for a share of its op's
    duration: what they are at least, and what ``life``, ``tail`` and ``drain_ns`` grow by."""
    memory = hbm_share(kernel, p)
    bound = _share(_bound(kernel, p))
    work = share * FULL_RATE
    if not kernel.ctas:
        row = (1, 0, 0, sms, 0, 1, 1, p.num_sms, SHARE, 0, SHARE, SHARE, 0, bound, 1, 0)
        return row, (0.0, 0.0, 0.0)
    count, fit = units(kernel), kernel.ctas_per_sm
    usual = min(fit, -(-kernel.ctas // p.num_sms))
    most = round(p.num_sms * p.clustered) if kernel.cluster > _PAIR else p.num_sms
    sms = min(sms, most)
    is_fluid = not kernel.dealt and not kernel.pieces  # pieces of unknown number
    fluid = SHARE if is_fluid else 0
    if kernel.tail_share and not is_fluid:  # pieces are unequal, SMs fall idle one after another
        fluid = SHARE - _share(kernel.tail_share / 2)
    waves = -(-count // (usual * sms))
    # a CTA that finds an SM when all others have ended waits for memory no more
    lone = max(SHARE - _share(memory), 1)
    wave = work / waves
    tail, idle = _tail(kernel, usual, sms, wave, work, p)
    stays = kernel.persistent or waves == 1
    loose = not stays and (kernel.tail_share > 0 or memory > p.bound_from)
    drain = 0.0 if stays or usual == 1 else _drained(usual, p) * wave / FULL_RATE
    row = (
        0 if stays else 1, 0, idle,
        min(sms, -(-min(kernel.ctas, count) // usual)), 0 if is_fluid else count, usual, fit,
        most, waves_of(count, usual * most, lone), _less(kernel), fluid, lone, _own(kernel), bound,
        int(loose), 0,
    )  # fmt: skip
    return row, (0.0 if stays else wave, tail, drain)


def _drained(usual: int, p: Parameters) -> float:
    """Share of a CTA's life after which ``_TRANSFER_SMS`` SMs are empty, of each of which ``usual``
    CTAs that are out of step have to end: the chance that all have is that share to the power of
    their number."""
    return float((_TRANSFER_SMS / p.num_sms) ** (1 / usual))


def _own(kernel: Kernel) -> int:
    """CTAs whose first piece no other does, of a kernel that hands the others out one by one.
    Attention's CTAs, whose pieces are unequal, were not seen to have any."""
    return 0 if kernel.dealt or kernel.tail_share or kernel.pieces <= kernel.ctas else kernel.ctas


def _less(kernel: Kernel) -> int:
    """Column ``less``: pieces are dealt in turn, so that the last CTAs may have one less."""
    if not kernel.dealt or kernel.pieces % kernel.ctas == 0:
        return 0
    return SHARE // (-(-kernel.pieces // kernel.ctas))


def _bound(kernel: Kernel, p: Parameters) -> float:
    """How far a kernel is bound by memory."""
    share = hbm_share(kernel, p)
    return min(max(1.5 * (share - p.bound_from) / (1 - p.bound_from), 0.0), 1.0)


def _memory(kernels: tuple[Kernel, ...], p: Parameters) -> int:
    """Column ``memory``: the mean over an op's time."""
    total = sum(kernel.duration_ns for kernel in kernels)
    return _share(sum(kernel.duration_ns * _bound(kernel, p) for kernel in kernels) / (total or 1))


def _tail(
    kernel: Kernel, usual: int, sms: int, wave: float, work: float, p: Parameters
) -> tuple[float, int]:
    """Columns ``tail`` and ``idle``: when a kernel has no CTA left that waits."""
    if kernel.tail_share:
        return kernel.tail_share * work, -1
    rounds = -(-kernel.pieces // kernel.ctas)
    if kernel.dealt and rounds > 1:  # some have a piece less
        full = sms * ((kernel.pieces - 1) % kernel.ctas + 1) // kernel.ctas
        return wave / rounds, p.num_sms - full
    last = (units(kernel) - 1) % (usual * sms) + 1
    return wave, p.num_sms - min(sms, -(-last // usual))


def _delay(kernels: tuple[Kernel, ...], p: Parameters) -> int:
    """Column ``delay``: the harmonic mean, as transfers pass beside all kernels."""
    if not kernels:
        return _share(1 + p.busy_delay)
    total = sum(kernel.duration_ns for kernel in kernels)
    passed = sum(
        kernel.duration_ns
        / (1 + p.busy_delay + p.memory_delay * hbm_share(kernel, p) ** p.memory_power)
        for kernel in kernels
    )
    return _share(total / passed)


def transfer_columns(program: Program, costs: CostTable, ops: Array) -> tuple[Array, ...]:
    """Columns ``ctas`` .. ``in_link`` of :class:`Gpu` for ops of transfers; CTAs of a batch are
    shared by its ops. Empty where the costs know no loads."""
    loads = costs.loads
    if loads is None:
        return tuple(ints([]) for _ in range(4))
    ctas, sent, received = np.full((3, len(loads.traffic)), -1, np.int64)
    rate = SHARE / loads.parameters.hbm_bytes_per_ns
    for key, traffic in enumerate(loads.traffic):
        if traffic is not None:
            per_ns = rate / max(int(costs.duration_ns[key]), 1)
            ctas[key] = traffic.ctas
            sent[key] = min(round(traffic.sent_hbm_bytes * per_ns), SHARE)
            received[key] = min(round(traffic.received_hbm_bytes * per_ns), SHARE)
    cost, call = program.cost[ops], program.shared(_calls_of)
    columns = (
        -(-np.maximum(ctas[cost], 0) // call.batch[ops]),
        np.where(program.is_send[ops], sent[cost], received[cost]),
        call.out_link[ops], call.in_link[ops],
    )  # fmt: skip
    return tuple(map(ints, columns))


class _Calls(NamedTuple):
    """Of every op, whatever it costs: how many ops its batch has, and a transfer's links."""

    batch: Array
    out_link: Array
    in_link: Array


def _calls_of(program: Program) -> _Calls:
    first = order_of(program).first
    media = {medium: i for i, medium in enumerate(dict.fromkeys(g.medium for g in program.groups))}
    of_group = np.array([*(media[group.medium] for group in program.groups), -1], np.int64)
    medium, collective = of_group[program.group], program.peer < 0
    return _Calls(
        np.bincount(first, minlength=1)[first],
        np.where(program.is_send | collective, medium, -1),
        np.where(~program.is_send | collective, medium, -1),
    )


def _transfer_keys(traffic: tuple[Traffic | None, ...], durations_ns: Array) -> Array:
    """Columns ``alone`` .. ``link`` of :class:`Gpu`."""
    columns = np.zeros((4, len(traffic)), np.int64)
    keys = [key for key, one in enumerate(traffic) if one is not None]
    known = [(one.fixed_ns, one.chain_ns, _share(one.link_share)) for one in traffic if one]
    fixed, chain, link = np.array(known, np.int64).reshape(-1, 3).T
    alone = durations_ns[keys]
    fixed = np.minimum(fixed, alone)
    columns[:, keys] = alone, fixed, np.minimum(chain, alone - fixed), link
    return columns
