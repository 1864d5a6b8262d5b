"""What a stream program of a training step must hold beyond :mod:`mhcplan.sim.check`.

The simulator's checker knows ops and streams; these rules know training and CUDA:

* pool: torch has 32 streams a priority and device, the 33rd is the first again;
* losses: every rank that makes losses makes them in ascending order of microbatches;
* reduction: a stage's gradients are reduced once, after its last backward;
* queues: with few hardware queues (CUDA_DEVICE_MAX_CONNECTIONS) streams share one, and an op waits
  until all that was issued into its queue before it has started. With 1, 8 and 32 queues the
  program must still come to an end; with 1, all communicators of a rank start in issue order.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.sim.check import Finding, check
from mhcplan.sim.order import describe, order_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from mhcplan.sim.program import Program

STREAMS_A_PRIORITY = 32
CONNECTIONS = (1, 8, 32)
_LOSS, _REDUCES = "head", "grad_reduce"  # kinds of op
_BACKWARD = "IWB"


def check_step(program: Program) -> list[Finding]:
    """Find what is wrong with the program of a training step; an empty list proves it sound.

    These rules rely on those of :func:`mhcplan.sim.check.check`, which come first.
    """
    findings = check(program)
    for rule, faults in _RULES.items():
        if findings:
            break
        findings = [Finding(rule, message, op) for op, message in faults(program)]
    return findings


def _pool_faults(program: Program) -> Iterator[tuple[int, str]]:
    counts = Counter((stream.rank, stream.priority) for stream in program.streams)
    for (rank, priority), count in counts.items():
        if count > STREAMS_A_PRIORITY:
            yield (
                -1,
                f"rank {rank} has {count} streams of priority {priority}: torch has"
                f" {STREAMS_A_PRIORITY}, the others alias them",
            )


def _loss_faults(program: Program) -> Iterator[tuple[int, str]]:
    makes_loss = _is_kind(program, _LOSS) & (program.pass_ == ord("F"))
    newest: dict[int, int] = {}
    for op in np.flatnonzero(makes_loss).tolist():
        rank, microbatch = int(program.rank[op]), int(program.microbatch[op])
        if microbatch < newest.get(rank, -1):
            yield op, f"{describe(program, op)} comes after microbatch {newest[rank]}"
        newest[rank] = max(microbatch, newest.get(rank, -1))


def _reduction_faults(program: Program) -> Iterator[tuple[int, str]]:
    reduces = _is_kind(program, _REDUCES)
    backward = np.isin(program.pass_, [ord(letter) for letter in _BACKWARD])
    backward &= (program.group < 0) & ~_is_kind(program, "release") & ~_is_kind(program, "await")
    last: dict[tuple[int, int], int] = {}
    for op in np.flatnonzero(backward & (program.stage >= 0)).tolist():
        last[int(program.rank[op]), int(program.stage[op])] = op
    seen: dict[tuple[int, int], Counter[int]] = {}
    for op in np.flatnonzero(reduces).tolist():
        place = int(program.rank[op]), int(program.stage[op])
        groups = seen.setdefault(place, Counter())
        groups[int(program.group[op])] += 1
        if groups[int(program.group[op])] > 1:
            yield op, f"{describe(program, op)} reduces stage {place[1]} again"
        if op < last.get(place, -1):
            yield op, f"{describe(program, op)} comes before {describe(program, last[place])}"
    # dense weights are shared by all replicas: where one stage is reduced, all are
    for place in sorted(set(last) - set(seen)) if seen else ():
        yield last[place], f"rank {place[0]} never reduces the gradients of stage {place[1]}"


def _is_kind(program: Program, name: str) -> NDArray[np.bool_]:
    return np.array([kind == name for kind in program.kinds], np.bool_)[program.kind]


def _queue_faults(program: Program) -> Iterator[tuple[int, str]]:
    for connections in CONNECTIONS:
        stuck = _play(program, connections)
        if stuck:
            names = ", ".join(describe(program, op) for op in stuck[:4])
            yield stuck[0], f"with {connections} hardware queues these wait for ever: {names}"
            return


def _play(program: Program, connections: int) -> list[int]:
    """The next op of each queue that never starts; none if the program ends.

    An op starts when the one before it on its stream, what it waits for and the last host sync have
    ended and the one before it in its queue has started. A transfer ends when all its members have
    started, the ops of a batch when all of the batch have ended, others at once.
    """
    order = order_of(program)
    first, previous = order.first.tolist(), order.previous.tolist()
    sync, meeting = order.sync.tolist(), order.meeting.tolist()
    offsets, waited = order.waited.offsets.tolist(), order.waited.values.tolist()
    batch: list[int] = np.bincount(order.first, minlength=program.num_ops).tolist()
    absent = Counter(number for number in meeting if number >= 0)
    members: dict[int, list[int]] = {}
    for op, number in enumerate(meeting):
        members.setdefault(number, []).append(op)
    queues = _queues(program, connections)
    position = [0] * len(queues)
    home = {op: q for q, queue in enumerate(queues) for op in queue}
    left = list(batch)  # of the batch that begins here, how many have not ended
    sleepers: dict[int, set[int]] = {}
    active = set(range(len(queues)))

    def missing(op: int) -> int:
        """The kernel, by its first op, that keeps ``op`` from starting, or -1."""
        for other in (previous[op], sync[op], *waited[offsets[op] : offsets[op + 1]]):
            if other >= 0 and left[first[other]]:
                return first[other]
        return -1

    def end(op: int) -> None:
        left[first[op]] -= 1
        if not left[first[op]]:
            active.update(sleepers.pop(first[op], ()))

    while active:
        q = active.pop()
        while position[q] < len(queues[q]):
            op = queues[q][position[q]]
            blocker = missing(op)
            if blocker >= 0:
                sleepers.setdefault(blocker, set()).add(home[op])
                break
            position[q] += 1
            if meeting[op] < 0:
                end(op)
            else:
                absent[meeting[op]] -= 1
                if not absent[meeting[op]]:
                    for member in members[meeting[op]]:
                        end(member)
    rest = zip(queues, position, strict=True)
    return sorted(queue[k] for queue, k in rest if k < len(queue))


def _queues(program: Program, connections: int) -> list[list[int]]:
    """Ops of every hardware queue in issue order; a rank's streams take queues in turn."""
    counts: Counter[int] = Counter()
    number: dict[tuple[int, int], int] = {}
    queue_of: list[int] = []
    for stream in program.streams:
        key = stream.rank, counts[stream.rank] % connections
        counts[stream.rank] += 1
        queue_of.append(number.setdefault(key, len(number)))
    queues: list[list[int]] = [[] for _ in number]
    for op, stream in enumerate(program.stream.tolist()):
        queues[queue_of[int(stream)]].append(op)
    return queues


_RULES: dict[str, Callable[[Program], Iterator[tuple[int, str]]]] = {
    "pool": _pool_faults,
    "losses": _loss_faults,
    "reduction": _reduction_faults,
    "queues": _queue_faults,
}
