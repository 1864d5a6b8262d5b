"""A step as a Chrome trace, for ui.perfetto.dev and chrome://tracing.

A process for each rank; in it a thread for each stream with a slice for each op, named by its kind;
a thread "actions" with a slice for each action, named as torch's pipeline runtime names them
(``PP:3B7``), so that a measured profile lies beside it; arrows from sends to receives; a counter of
the rank's memory. Ops that take no time are left out. The ops of a batched call are one kernel and
so have one slice's extent each.
"""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.sim.files import write_atomically
from mhcplan.sim.memory import memory_times_ns
from mhcplan.sim.order import COMPUTE_STREAM, batch_first
from mhcplan.sim.program import match_transfers
from mhcplan.sim.timeline import REASONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from mhcplan.sim.memory import Memory
    from mhcplan.sim.program import Program
    from mhcplan.sim.timeline import Timeline

    Ints = NDArray[np.int64]

_ACTIONS = 0  # the thread of actions; stream i is thread i + 1
_COMPRESSION = 3  # a third larger than the best, four times as fast


def to_chrome_trace(
    program: Program, timeline: Timeline, path: Path, memory: Memory | None = None
) -> None:
    """Write the trace to ``path``, a ``.json.gz``; the file is there whole or not at all."""
    write_atomically(path, chrome_trace(program, timeline, memory))


def chrome_trace(program: Program, timeline: Timeline, memory: Memory | None = None) -> bytes:
    """The trace as gzipped JSON; with ``memory``, a counter for each rank."""
    begin = timeline.start_ns.copy()
    np.minimum.at(begin, batch_first(program), timeline.start_ns)
    begin = begin[batch_first(program)]
    lines = [
        *_names(program),
        *_actions(program, timeline),
        *_slices(program, timeline, begin),
        *_arrows(program, timeline, begin),
    ]
    if memory is not None:
        lines += _memory(program, timeline, memory)
    text = '{"displayTimeUnit":"ns","traceEvents":[\n' + ",\n".join(lines) + "\n]}\n"
    return gzip.compress(text.encode(), _COMPRESSION, mtime=0)


def _microseconds(ns: Ints) -> list[str]:
    return [f"{micros:.3f}" for micros in (ns / 1000).tolist()]


def _quoted(labels: Iterable[str]) -> list[str]:
    return [json.dumps(label) for label in labels]


def _names(program: Program) -> Iterator[str]:
    def meta(what: str, rank: int, thread: int, args: dict[str, object]) -> str:
        return json.dumps({"name": what, "ph": "M", "pid": rank, "tid": thread, "args": args})

    for rank in range(program.num_ranks):
        yield meta("process_name", rank, 0, {"name": f"rank {rank}"})
        yield meta("process_sort_index", rank, 0, {"sort_index": rank})
        yield meta("thread_name", rank, _ACTIONS, {"name": "actions"})
    for i, stream in enumerate(program.streams):
        yield meta("thread_name", stream.rank, i + 1, {"name": stream.name})
        yield meta("thread_sort_index", stream.rank, i + 1, {"sort_index": i + 1})


def _slices(program: Program, timeline: Timeline, begin: Ints) -> Iterator[str]:
    ops = np.flatnonzero(timeline.end_ns > timeline.start_ns)
    kinds, categories = _quoted(program.kinds), _quoted(program.categories)
    cells, reasons = _quoted(program.cells), _quoted(REASONS)
    passes = _quoted(map(chr, range(256)))
    places = [f'"pid":{stream.rank},"tid":{i + 1}' for i, stream in enumerate(program.streams)]
    columns = (
        program.kind, program.category, program.stream, program.cell, program.pass_,
        program.stage, program.site, program.microbatch, timeline.reason, timeline.cause,
    )  # fmt: skip
    times = _microseconds(begin[ops]), _microseconds(timeline.end_ns[ops] - begin[ops])
    rows = zip(ops.tolist(), *times, *(column[ops].tolist() for column in columns), strict=True)
    for op, start, length, kind, category, stream, cell, pass_, stage, site, mb, why, cause in rows:
        yield (
            f'{{"name":{kinds[kind]},"cat":{categories[category]},"ph":"X",{places[stream]},'
            f'"ts":{start},"dur":{length},"args":{{"cell":{cells[cell]},"pass":{passes[pass_]},'
            f'"stage":{stage},"site":{site},"microbatch":{mb},"op":{op},'
            f'"started_by":{reasons[why]},"cause":{cause}}}}}'
        )


def _actions(program: Program, timeline: Timeline) -> Iterator[str]:
    """Runs of ops of one cell on the stream "compute"."""
    computes = np.array([stream.name == COMPUTE_STREAM for stream in program.streams], np.bool_)
    ops = np.flatnonzero(
        computes[program.stream] & (timeline.end_ns > timeline.start_ns) & (program.group < 0)
    )
    if not len(ops):
        return
    cell, rank = program.cell[ops], program.rank[ops]
    opens = np.ones(len(ops), np.bool_)
    opens[1:] = (cell[1:] != cell[:-1]) | (rank[1:] != rank[:-1])
    first, last = ops[opens], ops[np.roll(opens, -1)]
    names = [json.dumps(f"PP:{cell}") for cell in program.cells]
    starts = _microseconds(timeline.start_ns[first])
    lengths = _microseconds(timeline.end_ns[last] - timeline.start_ns[first])
    rows = zip(program.rank[first].tolist(), program.cell[first].tolist(), starts, lengths,
               strict=True)  # fmt: skip
    for rank_, cell_, start, length in rows:
        yield (
            f'{{"name":{names[cell_]},"cat":"action","ph":"X","pid":{rank_},"tid":{_ACTIONS},'
            f'"ts":{start},"dur":{length}}}'
        )


def _arrows(program: Program, timeline: Timeline, begin: Ints) -> Iterator[str]:
    """From each send to its receive; both ends of an arrow lie inside their slices."""
    meeting = match_transfers(program)
    messages = (program.peer >= 0) & (timeline.end_ns > timeline.start_ns)
    sends = np.flatnonzero(messages & program.is_send)
    receives = np.flatnonzero(messages & ~program.is_send)
    for ops, phase, at in (
        (sends, '"ph":"s"', begin[sends]),
        (receives, '"ph":"f","bp":"e"', timeline.end_ns[receives] - 1),
    ):
        rows = zip(
            meeting[ops].tolist(), program.rank[ops].tolist(), program.stream[ops].tolist(),
            _microseconds(at), strict=True,
        )  # fmt: skip
        for number, rank, stream, time in rows:
            yield (
                f'{{"name":"message","cat":"message",{phase},"id":{number},"pid":{rank},'
                f'"tid":{stream + 1},"ts":{time}}}'
            )


def _memory(program: Program, timeline: Timeline, memory: Memory) -> Iterator[str]:
    """What each rank holds, where it changes: at an instant the most, then what is left of it."""
    at, held = memory_times_ns(program, timeline), memory.held_bytes.sum(axis=1)
    opens = np.ones(program.num_ops, np.bool_)
    opens[1:] = (at[1:] != at[:-1]) | (program.rank[1:] != program.rank[:-1])
    first = np.flatnonzero(opens)
    if not len(first):
        return
    last = np.append(first[1:], program.num_ops) - 1
    # two points an instant, one after the other
    points = np.column_stack([np.maximum.reduceat(held, first), held[last]]).ravel()
    rank, time = program.rank[first].repeat(2), at[first].repeat(2)
    changes = np.ones(len(points), np.bool_)
    changes[1:] = (points[1:] != points[:-1]) | (rank[1:] != rank[:-1])
    rows = zip(rank[changes].tolist(), _microseconds(time[changes]), points[changes].tolist(),
               strict=True)  # fmt: skip
    for rank_, time_, held_ in rows:
        yield f'{{"name":"memory","ph":"C","pid":{rank_},"ts":{time_},"args":{{"bytes":{held_}}}}}'
