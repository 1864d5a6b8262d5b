"""Proof that a Program is sound: the rules of :mod:`mhcplan.sim.program`, without running it.

:func:`check` goes from the plain to the subtle, and stops at the first part that has findings, as
later parts rely on earlier ones:

1. structure: columns fit together, indices are in range, ops are sorted by rank;
2. streams: an op runs on a stream of its rank, a group's stream runs that group's transfers only;
3. events: recorded at most once, waited for on the same rank and after the record in issue order;
4. transfers: both ends and all members are there and agree; batches are consecutive;
5. deadlock: streams, events, meetings and host syncs played without time come to an end;
6. buffers: used between allocation and free in issue order and in every order that the streams may
   run in (:mod:`mhcplan.sim.check_buffers`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.check_buffers import buffer_faults
from mhcplan.sim.deadlock import find_cycle
from mhcplan.sim.order import NO_OP, batch_first, describe, order_of, waited_ops
from mhcplan.sim.program import COMPONENTS, Csr, MeetError, match_transfers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from mhcplan.sim.program import Program

_SHOWN_PER_RULE = 20


class Finding(NamedTuple):
    """A broken rule. ``op`` is where to look first, or -1."""

    rule: str
    message: str
    op: int = NO_OP


def check(program: Program) -> list[Finding]:
    """Find what is wrong with a Program; an empty list proves it sound.

    Of many findings of one rule the first 20 are listed, and a last one says how many there are.
    """
    for rule, faults in _RULES.items():
        findings = [Finding(rule, message, op) for op, message in faults(program)]
        if findings:
            extra = len(findings) - _SHOWN_PER_RULE
            if extra > 0:
                more = Finding(rule, f"and {extra} more findings of this rule")
                findings = [*findings[:_SHOWN_PER_RULE], more]
            return findings
    return []


def structure_faults(program: Program) -> Iterator[tuple[int, str]]:
    """What makes a Program unreadable: lengths, ranges, order of ranks."""
    n = program.num_ops
    for name, bound in _index_columns(program).items():
        yield from _out_of_range(name, getattr(program, name), n, *bound)
    for name in ("host_sync", "is_send", "payload_bytes", "pass_"):
        if len(getattr(program, name)) != n:
            yield NO_OP, f"{name} has {len(getattr(program, name))} entries for {n} ops"
    lists = {"waits": program.num_events} | dict.fromkeys(
        ("reads", "writes", "allocs", "frees"), program.num_buffers
    )
    for name, bound in lists.items():
        yield from _bad_csr(name, getattr(program, name), n, bound)
    yield from _out_of_range(
        "buffer_component", program.buffer_component, program.num_buffers, 0, len(COMPONENTS)
    )
    if program.static_bytes.shape != (program.num_ranks, len(COMPONENTS)):
        yield NO_OP, f"static_bytes has shape {program.static_bytes.shape}"
    for name in ("buffer_bytes", "static_bytes", "payload_bytes"):
        if (getattr(program, name) < 0).any():
            yield NO_OP, f"{name} has a negative entry"
    for stream in program.streams:
        if not (0 <= stream.rank < program.num_ranks and -1 <= stream.group < len(program.groups)):
            yield NO_OP, f"{stream} has no such rank or group"
    for group in program.groups:
        if not all(0 <= member < program.num_ranks for member in group.members):
            yield NO_OP, f"{group} has a member that is no rank"
        if len(set(group.members)) < len(group.members):
            yield NO_OP, f"{group} has a member twice"
    unsorted = np.flatnonzero(np.diff(program.rank) < 0)
    if len(unsorted):
        yield int(unsorted[0]) + 1, f"op {unsorted[0] + 1} of a lower rank follows a higher one"


def _index_columns(program: Program) -> dict[str, tuple[int, int]]:
    """Lowest and beyond-highest value of every column of indices."""
    return {
        "rank": (0, program.num_ranks),
        "stream": (0, len(program.streams)),
        "kind": (0, len(program.kinds)),
        "category": (0, len(program.categories)),
        "cell": (0, len(program.cells)),
        "cost": (0, len(program.cost_keys)),
        "record": (NO_OP, program.num_events),
        "group": (-1, len(program.groups)),
        "peer": (-1, program.num_ranks),
        **dict.fromkeys(("stage", "site", "microbatch", "batch"), (-1, np.iinfo(np.int32).max)),
    }


def _out_of_range(
    name: str, values: NDArray[np.integer], length: int, lowest: int, beyond: int
) -> Iterator[tuple[int, str]]:
    if len(values) != length:
        yield NO_OP, f"{name} has {len(values)} entries, not {length}"
        return
    bad = np.flatnonzero((values < lowest) | (values >= beyond))
    if len(bad):
        entry, value = int(bad[0]), int(values[bad[0]])
        yield entry, f"{name} of entry {entry} is {value}, not in {lowest} .. {beyond - 1}"


def _bad_csr(name: str, lists: Csr, length: int, beyond: int) -> Iterator[tuple[int, str]]:
    offsets, values = lists.offsets, lists.values
    fits = len(offsets) == length + 1 and offsets[0] == 0 and offsets[-1] == len(values)
    if not fits or (np.diff(offsets) < 0).any():
        yield NO_OP, f"{name}: its offsets do not cut {len(values)} values into {length} lists"
        return
    yield from _out_of_range(name, values, len(values), 0, beyond)


def _stream_faults(program: Program) -> Iterator[tuple[int, str]]:
    stream_rank = np.array([stream.rank for stream in program.streams], np.int64)
    stream_group = np.array([stream.group for stream in program.streams], np.int64)
    for op in np.flatnonzero(stream_rank[program.stream] != program.rank).tolist():
        yield op, f"{describe(program, op)} is on a stream of another rank"
    owner = stream_group[program.stream]
    for op in np.flatnonzero((owner >= 0) & (owner != program.group)).tolist():
        name = program.groups[int(owner[op])].name
        yield op, f"{describe(program, op)} is on the internal stream of group {name}"
    used: dict[tuple[int, int], int] = {}
    for op in np.flatnonzero(program.group >= 0).tolist():
        place = int(program.rank[op]), int(program.group[op])
        if used.setdefault(place, int(program.stream[op])) != program.stream[op]:
            name = program.groups[int(program.group[op])].name
            yield op, f"{describe(program, op)}: group {name} uses two streams of this rank"


def _event_faults(program: Program) -> Iterator[tuple[int, str]]:
    records = program.record[program.record >= 0]
    for event in np.flatnonzero(np.bincount(records, minlength=1) > 1).tolist():
        ops = np.flatnonzero(program.record == event).tolist()
        yield ops[1], f"event {event} is recorded by {len(ops)} ops: {ops}"
    waiting, recorder = program.waits.owners, waited_ops(program)
    for i in np.flatnonzero(recorder == NO_OP).tolist():
        name = describe(program, int(waiting[i]))
        event = int(program.waits.values[i])
        yield int(waiting[i]), f"{name} waits for event {event}, which no op records"
    foreign = (recorder != NO_OP) & (program.rank[recorder] != program.rank[waiting])
    late = (recorder >= waiting) & ~foreign
    for bad, why in ((foreign, "of another rank"), (late, "that is not issued before it")):
        for i in np.flatnonzero(bad).tolist():
            name, other = (describe(program, int(op)) for op in (waiting[i], recorder[i]))
            yield int(waiting[i]), f"{name} waits for an op {why}: {other}"


def _transfer_faults(program: Program) -> Iterator[tuple[int, str]]:
    alone = [*_end_faults(program), *_batch_faults(program)]
    yield from alone
    if alone:
        return
    try:
        meeting = match_transfers(program)
    except MeetError as error:
        yield NO_OP, str(error)
        return
    ops = np.flatnonzero(meeting >= 0)
    ops = ops[np.argsort(meeting[ops], kind="stable")]
    together = meeting[ops[1:]] == meeting[ops[:-1]]
    one_way = program.peer[ops[1:]] >= 0
    columns = (program.payload_bytes, program.kind)
    for column, where, what in zip(columns, (one_way, ~one_way), ("sizes", "kinds"), strict=True):
        differ = together & where & (column[ops[1:]] != column[ops[:-1]])
        for i in np.flatnonzero(differ).tolist():
            a, b = (describe(program, int(op)) for op in ops[i : i + 2])
            yield int(ops[i]), f"{a} meets {b}, but their {what} differ"


def _end_faults(program: Program) -> Iterator[tuple[int, str]]:
    for op in np.flatnonzero(program.group >= 0).tolist():
        group, rank = program.groups[int(program.group[op])], int(program.rank[op])
        ends = {rank, int(program.peer[op])} - {-1}
        if not ends <= set(group.members):
            yield op, f"{describe(program, op)}: group {group.name} lacks one of the ranks {ends}"
        elif rank == program.peer[op]:
            yield op, f"{describe(program, op)} is its own peer"
        elif program.is_send[op] and program.peer[op] < 0:
            yield op, f"{describe(program, op)} is a send to nobody"


def _batch_faults(program: Program) -> Iterator[tuple[int, str]]:
    batched = program.batch >= 0
    for op in np.flatnonzero(batched & ((program.group < 0) | (program.peer < 0))).tolist():
        yield op, f"{describe(program, op)} is in a batch but neither sends nor receives"
    first = batch_first(program)
    seen: dict[tuple[int, int], int] = {}
    for op in np.flatnonzero(batched).tolist():
        call = int(program.stream[op]), int(program.batch[op])
        if seen.setdefault(call, int(first[op])) != first[op]:
            yield op, f"{describe(program, op)}: other ops stand between it and its batch"


def _deadlocks(program: Program) -> Iterator[tuple[int, str]]:
    cycle = find_cycle(program, order_of(program))
    if cycle:
        names = ", which waits for ".join(describe(program, op) for op in [*cycle, cycle[0]])
        yield cycle[0], f"deadlock: {names}"


_RULES: dict[str, Callable[[Program], Iterator[tuple[int, str]]]] = {
    "structure": structure_faults,
    "streams": _stream_faults,
    "events": _event_faults,
    "transfers": _transfer_faults,
    "deadlock": _deadlocks,
    "buffers": buffer_faults,
}
