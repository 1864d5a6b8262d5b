"""Whether a Program can come to an end, whatever its times.

Links and SMs are given back by whoever holds them, so only waits can lock up: those for streams,
events, meetings, batches and host syncs. Each of them, once possible, stays possible; so playing
the ops in any order that the waits allow either ends all of them or leaves a cycle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mhcplan.sim.order import NO_OP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.order import Order
    from mhcplan.sim.program import Program

    Ints = NDArray[np.int64]


def find_cycle(program: Program, order: Order) -> list[int]:
    """Ops that wait for each other in a ring, or an empty list if every op ends."""
    play = _Play(program, order)
    play.run()
    return play.cycle()


class _Play:
    """Lists are by op; what belongs to a kernel stands at its first op."""

    def __init__(self, program: Program, order: Order) -> None:
        self._awaited, self._waiting = _waits(order)
        self._first: list[int] = order.first.tolist()
        self._meeting: list[int] = order.meeting.tolist()
        self._needs: list[int] = np.bincount(self._waiting, minlength=program.num_ops).tolist()
        by_awaited = np.argsort(self._awaited, kind="stable")
        self._wakes: list[int] = self._waiting[by_awaited].tolist()
        bounds = np.searchsorted(self._awaited[by_awaited], np.arange(program.num_ops + 1))
        self._wakes_begin: list[int] = bounds.tolist()
        self._kernel: list[list[int]] = [[] for _ in self._first]
        self._members: list[list[int]] = [[] for _ in range(max(self._meeting, default=-1) + 1)]
        for op, first in enumerate(self._first):
            self._kernel[first].append(op)
            if self._meeting[op] >= 0:
                self._members[self._meeting[op]].append(op)
        self._absent = [len(members) for members in self._members]
        self._under_way = [
            len(ops) if ops and self._meeting[ops[0]] >= 0 else 0 for ops in self._kernel
        ]
        self._reached = [False] * program.num_ops
        self._ended = [False] * program.num_ops

    def run(self) -> None:
        ready = [op for op, first in enumerate(self._first) if op == first and not self._needs[op]]
        while ready:
            kernel = ready.pop()
            self._reached[kernel] = True
            if self._meeting[kernel] < 0:
                ready += self._end(kernel)
            for op in self._kernel[kernel] if self._meeting[kernel] >= 0 else ():
                meeting = self._meeting[op]
                self._absent[meeting] -= 1
                for member in self._members[meeting] if not self._absent[meeting] else ():
                    first = self._first[member]
                    self._under_way[first] -= 1
                    if not self._under_way[first]:
                        ready += self._end(first)

    def _end(self, kernel: int) -> list[int]:
        """End a kernel; returns those that waited for it last."""
        woken: list[int] = []
        for op in self._kernel[kernel]:
            self._ended[op] = True
            for waiting in self._wakes[self._wakes_begin[op] : self._wakes_begin[op + 1]]:
                self._needs[waiting] -= 1
                if not self._needs[waiting]:
                    woken.append(waiting)
        return woken

    def cycle(self) -> list[int]:
        """Follow what unfinished kernels wait for until one comes up again."""
        if all(self._ended):
            return []
        path: list[int] = []
        place: dict[int, int] = {}
        op = self._ended.index(False)
        while self._first[op] not in place:
            kernel = self._first[op]
            place[kernel] = len(path)
            path.append(op)
            op = self._obstacle(kernel)
        return path[place[self._first[op]] :]

    def _obstacle(self, kernel: int) -> int:
        """An op that a stuck kernel waits for."""
        if not self._reached[kernel]:
            awaited = self._awaited[self._waiting == kernel].tolist()
            return next(op for op in awaited if not self._ended[op])
        others = (m for op in self._kernel[kernel] for m in self._members[self._meeting[op]])
        return next(m for m in others if not self._reached[self._first[m]])


def _waits(order: Order) -> tuple[Ints, Ints]:
    """Pairs (op, first op of a kernel that starts after the op's end)."""
    ops = np.arange(len(order.first))
    pairs = (
        (order.previous, order.first, order.first == ops),
        (order.waited.values, order.first[order.waited.owners], None),
        (order.sync, order.first, None),
    )
    awaited: list[Ints] = []
    waiting: list[Ints] = []
    for before, after, counts in pairs:
        real = before != NO_OP if counts is None else counts & (before != NO_OP)
        awaited.append(before[real])
        waiting.append(after[real])
    return np.concatenate(awaited), np.concatenate(waiting)
