"""From what ops put on a GPU to the integers that :mod:`mhcplan.sim.device_sms` reckons with."""

from __future__ import annotations

from functools import cache, lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.sim.device import FULL_RATE
from mhcplan.sim.device_kernels import hbm_share, units
from mhcplan.sim.device_sms import SHARE, Gpu, waves_of
from mhcplan.sim.jit import ints
from mhcplan.sim.order import order_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mhcplan.sim.device_kernels import Kernel, Parameters, Traffic
    from mhcplan.sim.program import CostTable, Program

    Array = NDArray[np.int64]

_NUM_COLUMNS = 15  # of a kernel: ``end`` .. ``drain_ns`` of Gpu


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
    durations: list[int] = costs.duration_ns.tolist()
    # ranks that differ in their clock only have keys with the same kernels: look at each once
    first: dict[int, tuple[int, int, int]] = {}
    for kernels in loads.kernels:
        if id(kernels) not in first:
            first[id(kernels)] = (*_beside(kernels, p), _memory(kernels, p))
    beside = np.array([first[id(kernels)] for kernels in loads.kernels], np.int64).reshape(-1, 3)
    known: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    rows: list[list[tuple[int, ...]]] = []
    for kernels, duration in zip(loads.kernels, durations, strict=True):
        found = known.get((id(kernels), duration))
        if found is None:
            found = known[id(kernels), duration] = _rows(kernels, duration, p, limit)
        rows.append(found)
    columns = np.fromiter(
        chain.from_iterable(chain.from_iterable(rows)), np.int64
    ).reshape(-1, _NUM_COLUMNS).T  # fmt: skip
    counts = [len(of_key) for of_key in rows]
    begin = ints(np.cumsum([0, *counts]))
    first_begin: dict[int, int] = {}
    for kernels, at in zip(loads.kernels, begin.tolist(), strict=False):
        first_begin.setdefault(id(kernels), at)
    first_begins = [first_begin[id(kernels)] for kernels in loads.kernels]
    earlier = begin[:-1] - np.array(first_begins, np.int64)
    like = np.arange(len(columns[0])) - np.repeat(earlier, counts)
    machine = [
        p.num_sms, min(limit or p.num_sms, p.num_sms), _share(p.compute_delay),
        _share(p.crowding), _share(p.least_life), _share(p.together),
    ]  # fmt: skip
    tables = (
        begin, like, *columns, beside[:, 0], beside[:, 1],
        *_transfer_keys(loads.traffic, durations), beside[:, 2], np.array(machine, np.int64),
    )  # fmt: skip
    return tuple(map(ints, tables))


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


@lru_cache(maxsize=4096)
def _rows(
    kernels: tuple[Kernel, ...], duration_ns: int, p: Parameters, limit: int | None
) -> list[tuple[int, ...]]:
    """Columns ``end`` .. ``drain_ns`` of :class:`Gpu` for the kernels of one op.

    They are stretched to fill the op's duration: gaps between kernels belong to the kernels.
    """
    if not kernels:
        return [
            (duration_ns * FULL_RATE, 1, 0, 0, p.num_sms, 0, 1, 1, SHARE, SHARE, SHARE, 0, 0, 1, 0)
        ]
    stretch = duration_ns / sum(kernel.duration_ns for kernel in kernels)
    rows: list[tuple[int, ...]] = []
    done = 0.0
    for i, kernel in enumerate(kernels):
        done += kernel.duration_ns * stretch
        end = duration_ns if i == len(kernels) - 1 else min(round(done), duration_ns)
        row = _row(kernel, kernel.duration_ns * stretch, p, min(limit or p.num_sms, p.num_sms))
        rows.append((end * FULL_RATE, *row))
    return rows


def _row(kernel: Kernel, duration_ns: float, p: Parameters, sms: int) -> tuple[int, ...]:
    """Columns ``life`` .. ``drain_ns`` of a kernel that runs on ``sms`` SMs."""
    share = hbm_share(kernel, p)
    bound = _share(_bound(kernel, p))
    work = duration_ns * FULL_RATE
    if not kernel.ctas:
        return (1, 0, 0, sms, 0, 1, 1, SHARE, SHARE, SHARE, 0, bound, 1, 0)
    count, fit = units(kernel), kernel.ctas_per_sm
    usual = min(fit, -(-kernel.ctas // p.num_sms))
    is_fluid = not kernel.dealt and not kernel.pieces  # pieces of unknown number
    fluid = SHARE if is_fluid else 0
    if kernel.tail_share and not is_fluid:  # pieces are unequal, SMs fall idle one after another
        fluid = SHARE - _share(kernel.tail_share / 2)
    waves = -(-count // (usual * sms))
    # a CTA that finds an SM when all others have ended waits for memory no more
    lone = max(SHARE - _share(share), 1)
    wave = work / waves
    tail, idle = _tail(kernel, usual, sms, wave, work, p)
    stays = kernel.persistent or waves == 1
    loose = not stays and (kernel.tail_share > 0 or share > p.bound_from)
    drain = 0.0 if stays or usual == 1 else p.drain_lives * wave / FULL_RATE
    return (
        0 if stays else max(round(wave), 1), round(tail), idle,
        min(sms, -(-min(kernel.ctas, count) // usual)), 0 if is_fluid else count, usual, fit,
        waves_of(count, usual * p.num_sms, lone), fluid, lone, _own(kernel), bound, int(loose),
        round(drain),
    )  # fmt: skip


def _own(kernel: Kernel) -> int:
    """CTAs whose first piece no other does, of a kernel that hands the others out one by one.
    Attention's CTAs, whose pieces are unequal, were not seen to have any."""
    return 0 if kernel.dealt or kernel.tail_share or kernel.pieces <= kernel.ctas else kernel.ctas


def _bound(kernel: Kernel, p: Parameters) -> float:
    """How far a kernel is bound by memory."""
    share = hbm_share(kernel, p)
    return min(max(1.5 * (share - p.bound_from) / (1 - p.bound_from), 0.0), 1.0)


@lru_cache(maxsize=4096)
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


@lru_cache(maxsize=4096)
def _beside(kernels: tuple[Kernel, ...], p: Parameters) -> tuple[int, int]:
    """Columns ``delay`` and ``squeeze``: harmonic means, as transfers pass beside all kernels."""
    if not kernels:
        return _share(1 + p.busy_delay), SHARE
    total = sum(kernel.duration_ns for kernel in kernels)
    passed = narrow = 0.0
    for kernel in kernels:
        squeezed = hbm_share(kernel, p) ** p.memory_power
        passed += kernel.duration_ns / (1 + p.busy_delay + p.memory_delay * squeezed)
        narrow += kernel.duration_ns / (1 + p.link_delay * squeezed)
    return _share(total / passed), _share(total / narrow)


def transfer_columns(program: Program, costs: CostTable, ops: Array) -> tuple[Array, ...]:
    """Columns ``ctas`` .. ``in_link`` of :class:`Gpu` for ops of transfers; CTAs of a batch are
    shared by its ops. Empty where the costs know no loads."""
    loads = costs.loads
    if loads is None:
        return tuple(ints([]) for _ in range(4))
    ctas, sent, received = np.full((3, len(loads.traffic)), -1, np.int64)
    rate = SHARE / loads.parameters.hbm_bytes_per_ns
    for key, (traffic, duration) in enumerate(zip(loads.traffic, costs.duration_ns, strict=True)):
        if traffic is not None:
            per_ns = rate / max(int(duration), 1)
            ctas[key] = traffic.ctas
            sent[key] = min(round(traffic.sent_hbm_bytes * per_ns), SHARE)
            received[key] = min(round(traffic.received_hbm_bytes * per_ns), SHARE)
    cost, is_send, collective = program.cost[ops], program.is_send[ops], program.peer[ops] < 0
    first = order_of(program).first[ops]
    batch = np.bincount(first, minlength=1)[first]
    media = {medium: i for i, medium in enumerate(dict.fromkeys(g.medium for g in program.groups))}
    medium = np.array([media[group.medium] for group in program.groups], np.int64)
    medium = medium[program.group[ops]]
    columns = (
        -(-np.maximum(ctas[cost], 0) // batch),
        np.where(is_send, sent[cost], received[cost]),
        np.where(is_send | collective, medium, -1),
        np.where(~is_send | collective, medium, -1),
    )
    return tuple(map(ints, columns))


def _transfer_keys(traffic: tuple[Traffic | None, ...], durations: list[int]) -> tuple[Array, ...]:
    """Columns ``alone`` .. ``link`` of :class:`Gpu`."""
    columns = np.zeros((4, len(traffic)), np.int64)
    for key, (one, alone) in enumerate(zip(traffic, durations, strict=True)):
        if one is not None:
            fixed = min(one.fixed_ns, alone)
            chain = min(one.chain_ns, alone - fixed)
            columns[:, key] = alone, fixed, chain, _share(one.link_share)
    return tuple(columns)
