"""The executor's calls to CUDA, on a stand-in that knows what they order and what they do not.

Streams are vector clocks. Memory is handed out as torch's allocator does: what the host has dropped
goes to whoever asks next, at once. So an op that touches memory before its last owner's work is
ordered ahead of it, or that reads what nothing ordered after its writer, is an error here, where on
a GPU it is a wrong number now and then.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from mhcplan.runtime import executor as executor_module
from mhcplan.runtime import streams as streams_module
from mhcplan.runtime.executor import Bound, Executor, rank_ops, streams_of
from mhcplan.runtime.streams import CudaStreams, StreamPool
from mhcplan.sim.program import Csr
from tests.runtime.plans import make_case

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.runtime.executor import Attachments
    from mhcplan.sim.program import Op, Program

CPU = torch.device("cpu")


class Clock:
    """A stream: what of every stream is done when its next work begins."""

    def __init__(self, name: str) -> None:
        self.name, self.done = name, dict[str, int]()

    def work(self) -> tuple[str, int]:
        """Put one piece of work behind all that the stream has."""
        self.done[self.name] = self.done.get(self.name, 0) + 1
        return self.name, self.done[self.name]

    def has(self, access: tuple[str, int]) -> bool:
        return self.done.get(access[0], 0) >= access[1]

    def wait(self, done: dict[str, int]) -> None:
        for name, count in done.items():
            self.done[name] = max(self.done.get(name, 0), count)

    def wait_event(self, event: Event) -> None:
        assert event.done is not None, "waits for an event that nobody has recorded"
        self.wait(event.done)

    def wait_stream(self, other: Clock) -> None:
        self.wait(other.done)


class Event:
    def __init__(self) -> None:
        self.done: dict[str, int] | None = None

    def record(self, stream: Clock) -> None:
        self.done = dict(stream.done)


class Cuda:
    """Stands for torch.cuda."""

    Event = Event

    def __init__(self) -> None:
        self.made = 0
        self.current = Clock("caller")

    def Stream(self, _device: object, priority: int) -> Clock:
        self.made += 1
        return Clock(f"stream {self.made} ({priority})")

    def set_stream(self, stream: Clock) -> None:
        self.current = stream

    def current_stream(self, _device: object) -> Clock:
        return self.current


@dataclass
class Slot:
    """A piece of memory through all its owners."""

    accesses: list[tuple[str, int]] = field(default_factory=list)


class Block:
    """What a buffer holds: a slot, given back when the last reference goes."""

    def __init__(self, memory: Memory, num_bytes: int) -> None:
        self._memory, self._bytes = memory, num_bytes
        self.slot = memory.take(num_bytes)
        self.before = tuple(self.slot.accesses)  # of earlier owners
        self.written: tuple[str, int] | None = None

    def __del__(self) -> None:
        self._memory.give(self.slot, self._bytes)

    def write(self, stream: Clock, what: str) -> None:
        for access in self.before:
            assert stream.has(access), f"{what} writes memory that {access[0]} may still use"
        self.written = self._touch(stream)

    def read(self, stream: Clock, what: str) -> None:
        assert self.written is not None, f"{what} reads what nobody wrote"
        assert stream.has(self.written), f"{what} may read before {self.written[0]} wrote"
        self._touch(stream)

    def _touch(self, stream: Clock) -> tuple[str, int]:
        access = stream.work()
        self.slot.accesses.append(access)
        return access


@dataclass
class Memory:
    """Slots that nobody owns, by size; bytes that are owned, and the most that were."""

    free: defaultdict[int, list[Slot]] = field(default_factory=lambda: defaultdict(list))
    held: int = 0
    peak: int = 0

    def take(self, num_bytes: int) -> Slot:
        self.held += num_bytes
        self.peak = max(self.peak, self.held)
        return self.free[num_bytes].pop() if self.free[num_bytes] else Slot()

    def give(self, slot: Slot, num_bytes: int) -> None:
        self.held -= num_bytes
        self.free[num_bytes].append(slot)


class Binding:
    """Every op reads its inputs and writes its outputs; collectives do so on their own stream."""

    def __init__(self, program: Program, cuda: Cuda, memory: Memory, nccl: Nccl) -> None:
        self._program, self._cuda, self._memory, self._nccl = program, cuda, memory, nccl

    def bind(self, op: Op, _attached: Attachments) -> Bound | None:
        if op.kind in ("release", "await"):
            return None
        sizes: Any = [int(self._program.buffer_bytes[b]) for b in op.writes]
        what = f"{op.cell} {op.kind}.{op.pass_}"

        def run(inputs: list[Any], out: list[Any]) -> list[Any]:
            made = [o or Block(self._memory, size) for o, size in zip(out, sizes, strict=True)]
            if op.group >= 0:
                return self._nccl.start([op], [*inputs, *made])
            for block in inputs:
                block.read(self._cuda.current, what)
            for block in made:
                block.write(self._cuda.current, what)
            return made

        return Bound(run, sizes)


class Nccl:
    """Process groups: each has a stream, which a call puts behind the current one."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._streams: dict[int, Clock] = {}

    def start(self, ops: Sequence[Op], blocks: Sequence[Block]) -> list[Any]:
        stream = self._streams.setdefault(ops[0].group, Clock(f"group {ops[0].group}"))
        stream.wait_stream(self._cuda.current)
        if ops[0].peer < 0:
            (op,) = ops
            touched = [(op, block, i < len(op.reads)) for i, block in enumerate(blocks)]
        else:
            touched = [(op, block, bool(op.reads)) for op, block in zip(ops, blocks, strict=True)]
        for op, block, is_read in touched:
            (block.read if is_read else block.write)(stream, f"{op.cell} {op.kind}")
        done = dict(stream.done)
        return [SimpleNamespace(wait=lambda: self._cuda.current.wait(done))]


def steps(program: Program, rank: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run two steps of a rank; returns the most bytes that its buffers held."""
    cuda, memory = Cuda(), Memory()
    monkeypatch.setattr(streams_module.torch, "cuda", cuda)
    monkeypatch.setattr(
        executor_module, "allocate", lambda size, _device, _fill: Block(memory, size)
    )
    nccl = Nccl(cuda)
    own = [program.streams[i] for i in streams_of(program, rank)]
    events = sum(op.record >= 0 for op in rank_ops(program, rank))
    binding: Any = Binding(program, cuda, memory, nccl)
    streams = CudaStreams(own, events, StreamPool(CPU))
    executor = Executor(program, rank, binding, nccl, streams)
    for _ in range(2):
        executor.step()
        assert cuda.current.name == "caller"
        assert memory.held == 0
    return memory.peak


def counted_peak(program: Program, rank: int) -> int:
    """The same by the Program: what is allocated and freed, in host issue order."""
    held = peak = 0
    for i in np.flatnonzero(program.rank == rank).tolist():
        held += int(program.buffer_bytes[program.allocs[i]].sum())
        peak = max(peak, held)
        held -= int(program.buffer_bytes[program.frees[i]].sum())
    return peak


CASES: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b", "recompute": 2},
    "all": {"schedule": "zb1p", "recompute": 1, "priority": "all"},
    "dualpipe": {"schedule": "dualpipe", "recompute": "stage", "priority": "recompute"},
    "grouped": {"schedule": "dualpipev", "p2p": "grouped", "comm_streams": "one", "ep": 2},
    "experts": {"schedule": "dualpipe", "ep": 2, "priority": "all", "recompute": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_work_is_ordered_and_memory_is_what_was_counted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = make_case(name, routing="forced", **CASES[name]).program
    for rank in range(program.num_ranks):
        assert steps(program, rank, monkeypatch) == counted_peak(program, rank)


def test_a_missing_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of stream: none of its ops waits for anything."""
    program = make_case("waitless", routing="forced", **CASES["experts"]).program
    for name in ("compute", "high", "ep"):
        idle = [i for i, stream in enumerate(program.streams) if stream.name.startswith(name)]
        of_stream = np.isin(program.stream, idle)
        waits = [
            [] if gone else program.waits[i].tolist() for i, gone in enumerate(of_stream.tolist())
        ]
        broken = replace(program, waits=Csr.from_lists(waits))
        with pytest.raises(AssertionError, match="may"):
            steps(broken, 0, monkeypatch)


def test_memory_dropped_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message's buffer goes when it is sent, not when it has been sent."""
    program = make_case("hasty", routing="forced", **CASES["1f1b"]).program
    frees = [program.frees[i].tolist() for i in range(program.num_ops)]
    for i, op in enumerate(program):
        if op.kind == "pp_send":
            (buffer,) = op.reads
            owner = next(k for k, freed in enumerate(frees) if buffer in freed)
            frees[owner].remove(buffer)
            frees[i].append(buffer)
    broken = replace(program, frees=Csr.from_lists(frees))
    with pytest.raises(AssertionError, match="may still use"):
        steps(broken, 0, monkeypatch)
