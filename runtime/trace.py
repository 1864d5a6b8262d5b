"""From measured times to a Timeline: what let every op start, as far as the times tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mhcplan.sim.order import NO_OP, order_of
from mhcplan.sim.timeline import REASONS, Timeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.program import Program

    Ints = NDArray[np.int64]

_START, _HOST, _STREAM, _EVENT, _PEER = (
    REASONS.index(name) for name in ("start", "host", "stream", "event", "peer")
)


def measured_timeline(program: Program, issue_ns: Ints, start_ns: Ints, end_ns: Ints) -> Timeline:
    """A Timeline of measured times.

    The start of a transfer is moved to when its last member was there, as a predicted one has it.
    The cause of an op is the latest of: the op before it on its stream, the ops that it waited for,
    the host, and for a transfer whatever its last member waited for.

    Args:
        program: what ran.
        issue_ns, start_ns, end_ns: of every op, since the hosts began; ``start_ns`` is when the
            op's stream had come to it.
    """
    order = order_of(program)
    ready = issue_ns.copy()
    cause = np.full(program.num_ops, NO_OP, np.int64)
    reason = np.full(program.num_ops, _HOST, np.int8)
    cause[:] = order.sync
    waiting, waited = order.waited.owners, order.waited.values
    for code, ops, by in (
        (_EVENT, waiting, waited),
        (_STREAM, np.flatnonzero(order.previous != NO_OP), None),
    ):
        others = order.previous[ops] if by is None else by
        for op, other in zip(ops.tolist(), others.tolist(), strict=True):
            if other != NO_OP and end_ns[other] >= ready[op]:
                ready[op], cause[op], reason[op] = end_ns[other], other, code
    start = start_ns.copy()
    _meet(order.meeting, start, cause, reason)
    at_start = start <= 0
    cause[at_start], reason[at_start] = NO_OP, _START
    end = np.maximum(end_ns, start)
    return Timeline(issue_ns, start, end, cause, reason)


def _meet(meeting: Ints, start: Ints, cause: Ints, reason: NDArray[np.int8]) -> None:
    """Let every transfer start when its last member was there, for that member's reason."""
    transfers = np.flatnonzero(meeting >= 0)
    if not len(transfers):
        return
    latest = np.zeros(int(meeting.max()) + 1, np.int64)
    np.maximum.at(latest, meeting[transfers], start[transfers])
    last = np.full(len(latest), NO_OP, np.int64)
    is_last = start[transfers] == latest[meeting[transfers]]
    last[meeting[transfers[is_last]]] = transfers[is_last]
    waits = transfers[~is_last]
    by = last[meeting[waits]]
    cause[waits], reason[waits] = cause[by], _PEER
    start[waits] = start[by]
