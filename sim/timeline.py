"""When every op of a step ran and why.

A :class:`Timeline` belongs to a Program, op by op, and is predicted or measured. Times are integer
nanoseconds since the hosts began to issue the step; the step lasts until its last op ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.order import NO_OP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

# Why an op did not start earlier. The int8 codes of ``Timeline.reason`` index this tuple.
REASONS = ("start", "host", "stream", "event", "peer", "link", "priority", "sms")


@dataclass(frozen=True)
class Timeline:
    """Times of all ops of a Program.

    Attributes:
        issue_ns: the host had issued the op.
        start_ns: the op began: a kernel its first work, a transfer its first byte (all its members
            were there). Ops of one batched call may start at different times.
        end_ns: the op ended, for its stream and for those that wait for it.
        cause: the op whose end let it start, or -1: nothing did but the host, from the beginning.
        reason: why it did not start earlier, an index into :data:`REASONS`.
    """

    issue_ns: Ints
    start_ns: Ints
    end_ns: Ints
    cause: Ints
    reason: NDArray[np.int8]

    @cached_property
    def step_ns(self) -> int:
        """Length of the step."""
        return int(self.end_ns.max(initial=0))


class PathStep(NamedTuple):
    """A piece of the critical path: ``op`` from ``start_ns`` to ``end_ns``; -1 is a host thread.

    ``reason`` says why the piece did not start earlier.
    """

    op: int
    reason: str
    start_ns: int
    end_ns: int


def critical_path(timeline: Timeline) -> list[PathStep]:
    """The chain of causes that ends with the step, first piece first, without a gap.

    A piece lasts until the next one starts, which may be before the op's own end (a batch goes on
    after a transfer in it has freed its links). It contains times in which the op was pre-empted.
    """
    if not len(timeline.end_ns):
        return []
    op, until = int(np.argmax(timeline.end_ns)), timeline.step_ns
    path: list[PathStep] = []
    while op != NO_OP:
        start, cause = int(timeline.start_ns[op]), int(timeline.cause[op])
        path.append(PathStep(op, REASONS[timeline.reason[op]], start, until))
        caused = int(timeline.end_ns[cause]) if cause != NO_OP else 0
        if caused < start:
            path.append(PathStep(NO_OP, "host" if caused else "start", caused, start))
        op, until = cause, min(caused, start)
    return path[::-1]
