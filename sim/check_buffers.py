"""Whether buffers are safe in every order in which the streams of a Program may run.

Op a is *before* op b if streams, events and host syncs of their rank force a to end before b
starts. That is known by vector clocks: for each op, how far it is behind on every stream of its
rank. What meetings with other ranks force is left out, so a proof never rests on another rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mhcplan.sim.order import COMPUTE_STREAM, NO_OP, describe, waited_ops

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from mhcplan.sim.program import Program

    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]


class Before:
    """The order that a Program's own ranks force, asked for many pairs at once."""

    def __init__(self, program: Program) -> None:
        """Work out the clocks; the Program's events must be sound."""
        order = np.argsort(program.stream, kind="stable")
        begin = np.searchsorted(program.stream[order], np.arange(len(program.streams)))
        self._place = np.empty(program.num_ops, np.int64)  # on its stream, from 0
        self._place[order] = np.arange(program.num_ops) - begin[program.stream[order]]
        self._stream = program.stream.astype(np.int64)
        self._local = _local_numbers(program)  # of a stream among those of its rank
        self._clocks, self._clock_of = self._run(program)

    def _run(self, program: Program) -> tuple[Ints, Ints]:
        """Clocks, and which one each op has. Without a new wait an op has its predecessor's."""
        width = int(self._local.max(initial=0)) + 1
        nothing = [NO_OP] * width
        clocks = [nothing]
        clock_of = [0] * program.num_ops
        at_stream = [0] * len(program.streams)
        place: list[int] = self._place.tolist()
        streams: list[int] = self._stream.tolist()
        local: list[int] = self._local.tolist()
        waited: list[int] = waited_ops(program).tolist()
        offsets: list[int] = program.waits.offsets.tolist()
        syncs = set(np.flatnonzero(program.host_sync).tolist())
        rank_begins = set(program.rank_offsets.tolist())
        sync = NO_OP
        host_news: set[int] = set()  # streams that do not know of the last sync yet
        for op, stream in enumerate(streams):
            if op in rank_begins:
                host_news = set()
            recorders = waited[offsets[op] : offsets[op + 1]]
            if stream in host_news:
                host_news.discard(stream)
                recorders = [*recorders, sync]
            if recorders:
                clock = clocks[at_stream[stream]]
                for recorder in recorders:
                    clock = list(map(max, clock, clocks[clock_of[recorder]]))
                    there = local[streams[recorder]]
                    clock[there] = max(clock[there], place[recorder])
                at_stream[stream] = len(clocks)
                clocks.append(clock)
            clock_of[op] = at_stream[stream]
            if op in syncs:
                sync, host_news = op, set(range(len(program.streams)))
        return np.array(clocks, np.int64), np.array(clock_of, np.int64)

    def __call__(self, a: Ints, b: Ints) -> Bools:
        """Whether each op of ``a`` is before, or is, the op of ``b`` beside it; of one rank."""
        known = self._clocks[self._clock_of[b], self._local[self._stream[a]]] >= self._place[a]
        same_stream = self._stream[a] == self._stream[b]
        return np.where(same_stream, self._place[a] <= self._place[b], known)


def _local_numbers(program: Program) -> Ints:
    count = [0] * program.num_ranks
    local: list[int] = []
    for stream in program.streams:
        local.append(count[stream.rank])
        count[stream.rank] += 1
    return np.array(local, np.int64)


def buffer_faults(program: Program) -> Iterator[tuple[int, str]]:
    """Pairs of an op and what it does wrong with a buffer."""
    uses = _Uses(program)
    plain = [*_lifetime_faults(program), *uses.outside_life()]
    yield from plain
    if not plain:
        before = Before(program)
        yield from uses.races(before)
        yield from uses.early_frees(before)
        yield from uses.reused_memory(before)


def _lifetime_faults(program: Program) -> Iterator[tuple[int, str]]:
    for lists, verb in ((program.allocs, "allocated"), (program.frees, "freed")):
        count = np.bincount(lists.values, minlength=program.num_buffers)
        for buffer in np.flatnonzero(count > 1).tolist():
            ops = lists.owners[lists.values == buffer].tolist()
            yield ops[1], f"buffer {buffer} is {verb} by {len(ops)} ops: {ops}"
    owns = np.array([stream.name == COMPUTE_STREAM for stream in program.streams], np.bool_)
    for op in np.unique(program.frees.owners[~owns[program.stream[program.frees.owners]]]).tolist():
        yield op, f"{describe(program, op)} frees, but is not on the stream {COMPUTE_STREAM!r}"


class _Uses:
    """Every (buffer, op that uses it), sorted; whether the op reads, writes or does both."""

    def __init__(self, program: Program) -> None:
        self.program = program
        buffer = np.concatenate([program.writes.values, program.reads.values])
        op = np.concatenate([program.writes.owners, program.reads.owners])
        writes = np.arange(len(op)) < len(program.writes.values)
        in_order = np.lexsort((~writes, op, buffer))
        buffer, op, writes = buffer[in_order], op[in_order], writes[in_order]
        # an op that reads and writes a buffer is one writer
        new = np.ones(len(op), np.bool_)
        new[1:] = (buffer[1:] != buffer[:-1]) | (op[1:] != op[:-1])
        self.buffer, self.op, self.writes = buffer[new], op[new], writes[new]
        self.reads = ~self.writes
        self.reads[np.cumsum(new)[~new] - 1] = True
        self.allocated_by = np.full(program.num_buffers, NO_OP, np.int64)
        self.allocated_by[program.allocs.values] = program.allocs.owners
        self.freed_by = np.full(program.num_buffers, NO_OP, np.int64)
        self.freed_by[program.frees.values] = program.frees.owners

    def _name(self, i: int) -> str:
        return describe(self.program, int(self.op[i]))

    def outside_life(self) -> Iterator[tuple[int, str]]:
        """Uses that are issued before the allocation or after the free; frees of nothing."""
        rank, born, dies = self.program.rank, self.allocated_by, self.freed_by
        freed = np.flatnonzero(dies != NO_OP)
        wrong = (born[freed] == NO_OP) | (born[freed] > dies[freed])
        wrong |= rank[born[freed]] != rank[dies[freed]]
        for buffer in freed[wrong].tolist():
            op = int(dies[buffer])
            yield op, f"{describe(self.program, op)} frees buffer {buffer}, not allocated before it"
        birth, death = born[self.buffer], dies[self.buffer]
        early = (birth == NO_OP) | (birth > self.op) | (rank[birth] != rank[self.op])
        late = (death != NO_OP) & (death < self.op) & ~early
        for bad, what in ((early, "before it is allocated"), (late, "after it is freed")):
            for i in np.flatnonzero(bad).tolist():
                yield int(self.op[i]), f"{self._name(i)} uses buffer {self.buffer[i]} {what}"

    def races(self, before: Before) -> Iterator[tuple[int, str]]:
        """Uses that the streams may run in another order than they are issued in."""
        index = np.arange(len(self.op))
        opens = np.ones(len(self.op), np.bool_)
        opens[1:] = self.buffer[1:] != self.buffer[:-1]
        start = np.maximum.accumulate(np.where(opens, index, 0))
        last_write = np.full(len(self.op), NO_OP, np.int64)
        last_write[1:] = np.maximum.accumulate(np.where(self.writes, index, NO_OP))[:-1]
        last_write[last_write < start] = NO_OP
        for i in np.flatnonzero((last_write == NO_OP) & self.reads).tolist():
            yield int(self.op[i]), f"{self._name(i)} reads buffer {self.buffer[i]}, not yet written"
        yield from self._unordered(before, last_write, index, "may run before the write by")
        # a write also comes after the reads of what was there
        next_write = np.full(len(self.op), len(self.op), np.int64)
        ahead = np.minimum.accumulate(np.where(self.writes, index, len(self.op))[::-1])[::-1]
        next_write[:-1] = ahead[1:]
        same = next_write < len(self.op)
        same[same] = self.buffer[next_write[same]] == self.buffer[same]
        reads = np.flatnonzero(same & ~self.writes)
        yield from self._unordered(before, reads, next_write[reads], "may run before the read by")

    def early_frees(self, before: Before) -> Iterator[tuple[int, str]]:
        """Frees that may come while an op still uses the buffer."""
        death = self.freed_by[self.buffer]
        freed = np.flatnonzero((death != NO_OP) & (death >= self.op))
        for i in freed[~before(self.op[freed], death[freed])].tolist():
            name, buffer = describe(self.program, int(death[i])), self.buffer[i]
            yield (
                int(death[i]),
                f"{name} may free buffer {buffer} before {self._name(i)} has used it",
            )

    def _unordered(
        self, before: Before, first: Ints, then: Ints, what: str
    ) -> Iterator[tuple[int, str]]:
        pairs = np.flatnonzero(first != NO_OP)
        first, then = first[pairs], then[pairs]
        for i in np.flatnonzero(~before(self.op[first], self.op[then])).tolist():
            use, other = int(then[i]), int(first[i])
            message = f"{self._name(use)} {what} {self._name(other)} of buffer {self.buffer[use]}"
            yield int(self.op[use]), message

    def reused_memory(self, before: Before) -> Iterator[tuple[int, str]]:
        """Uses that may touch memory while its earlier owner is still in use.

        Memory handed out at an allocation may be what any compute op issued before had freed, so
        every use comes after the last of those.
        """
        program = self.program
        frees = np.where(np.diff(program.frees.offsets) > 0, np.arange(program.num_ops), NO_OP)
        last_free = np.full(program.num_ops, NO_OP, np.int64)
        last_free[1:] = np.maximum.accumulate(frees)[:-1]
        last_free[last_free < program.rank_offsets[program.rank]] = NO_OP
        birth = self.allocated_by[self.buffer]
        former = np.where(birth != NO_OP, last_free[birth], NO_OP)
        at_risk = np.flatnonzero(former != NO_OP)
        for i in at_risk[~before(former[at_risk], self.op[at_risk])].tolist():
            name, buffer = describe(program, int(former[i])), self.buffer[i]
            message = f"{self._name(i)} may use buffer {buffer} before {name} has freed its memory"
            yield int(self.op[i]), message
