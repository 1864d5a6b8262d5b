"""What every op of a Program waits for, as arrays that engines and analyses share.

An op waits for the host thread, for the op before it on its stream, for the ops that record the
events it waits for and, a transfer, for the other members. Ops of one batched call (``batch`` >= 0)
are one kernel: they wait together, and together they keep their stream until the last of them ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.sim.program import Csr, match_transfers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.program import Program

    Ints = NDArray[np.int64]

NO_OP = -1
COMPUTE_STREAM = "compute"  # owns its rank's memory


@dataclass(frozen=True)
class Order:
    """Edges of a Program, by op index.

    Attributes:
        first: first op of the batched call that the op is in; the op itself if it is in none.
        previous: op before it on its stream (before its batch), or NO_OP.
        waited: ops whose end it waits for through events; NO_OP for an event that nobody records.
        sync: the last ``host_sync`` op that the host issued before it, or NO_OP.
        meeting: number of the transfer it takes part in, or -1.
    """

    first: Ints
    previous: Ints
    waited: Csr
    sync: Ints
    meeting: Ints


def order_of(program: Program) -> Order:
    """Collect what the ops wait for.

    Raises:
        MeetError: a transfer that lacks an end or a member.
    """
    return program.shared(_order_of)


def _order_of(program: Program) -> Order:
    first = batch_first(program)
    return Order(
        first,
        program.previous_on_stream[first],
        Csr(program.waits.offsets, waited_ops(program)),
        _last_sync(program),
        match_transfers(program),
    )


def waited_ops(program: Program) -> Ints:
    """For every entry of ``waits.values``, the op that records the event, or NO_OP."""
    return program.recorder[program.waits.values] if program.num_events else program.waits.values


def batch_first(program: Program) -> Ints:
    """For every op, the first op of its batched call: ops next to each other on one stream."""
    if program.batch.max(initial=-1) < 0:
        return np.arange(program.num_ops)
    by_stream = program.by_stream.values
    stream, batch = program.stream[by_stream], program.batch[by_stream]
    opens = np.ones(program.num_ops, np.bool_)
    opens[1:] = (stream[1:] != stream[:-1]) | (batch[1:] < 0) | (batch[1:] != batch[:-1])
    first = np.empty(program.num_ops, np.int64)
    first[by_stream] = by_stream[opens][np.cumsum(opens) - 1]
    return first


def _last_sync(program: Program) -> Ints:
    if not program.host_sync.any():
        return np.full(program.num_ops, NO_OP, np.int64)
    syncs = np.where(program.host_sync, np.arange(program.num_ops), NO_OP)
    before = np.full(program.num_ops, NO_OP, np.int64)
    before[1:] = np.maximum.accumulate(syncs)[:-1]
    rank_begin = program.rank_offsets[program.rank]
    return np.where(before >= rank_begin, before, NO_OP)


def describe(program: Program, op: int) -> str:
    """Name an op for an error message: number, rank, stream, kind and cell."""
    view = program[op]
    cell = f" of {view.cell}" if view.cell else ""
    return f"op {op} (rank {view.rank}, stream {view.stream.name}, {view.kind}{cell})"
