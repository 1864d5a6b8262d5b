"""Runs one rank's ops of a Program, in host issue order, on real streams.

What an op computes comes from a :class:`Binding`; this module knows streams, events, buffers and
transfers only. A buffer of the Program holds a :data:`Value`: a tensor, or a tuple of tensors that
live and die together.

Memory follows the Program. All of it belongs to the compute stream: an op there makes its own
outputs, those of other streams' ops are made beforehand, at the op that the Program names, with
the compute stream current, and passed as ``out``. A reference is dropped when the op that frees
the buffer has been issued. ``record_stream`` is never needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mhcplan.runtime.spec import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.runtime.streams import CpuStreams, CudaStreams
    from mhcplan.sim.program import Op, Program

Value = Tensor | tuple[Tensor, ...]
COMPUTE = 0  # number of the compute stream among a rank's
_ON_PARAMETERS = "O"  # pass of what works on parameters, once a step


class TensorLayout(NamedTuple):
    """Shape and dtype of a tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Layout = tuple[TensorLayout, ...]  # of a buffer; one entry: the value is a tensor, else a tuple
Run = Callable[[list[Any], list[Any]], "Sequence[Any]"]  # see Bound


def allocate(layout: Layout, device: torch.device, fill: float | None = None) -> Value:
    """Memory for a buffer; ``fill`` sets all of it (NaN is -1 in integers)."""
    made = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in layout)
    if fill is not None:
        for x in made:
            x.fill_(fill if x.is_floating_point() or not math.isnan(fill) else -1)
    return made[0] if len(made) == 1 else made


@dataclass(frozen=True)
class Bound:
    """What an op does.

    Attributes:
        run: takes the values of the buffers read, in order, and for each buffer written its
            memory or None; returns the values written. For a collective: the transfers started,
            a list of works, which write into the given memory.
        layouts: of the buffers written; needed where another op allocates them.
    """

    run: Run
    layouts: tuple[Layout, ...] = ()


class Attachments:
    """Small tensors that live exactly as long as a buffer does (norm statistics, for one)."""

    def __init__(self) -> None:
        """Nothing is attached."""
        self._of: dict[int, dict[str, Value]] = {}

    def put(self, buffer: int, name: str, value: Value) -> None:
        """Attach ``value`` to a buffer."""
        self._of.setdefault(buffer, {})[name] = value

    def get(self, buffer: int, name: str) -> Any:  # noqa: ANN401 - whatever was put
        """What was attached; raises KeyError if nothing was."""
        return self._of[buffer][name]

    def drop(self, buffer: int) -> None:
        """Forget all that is attached to a buffer."""
        self._of.pop(buffer, None)


class Binding(Protocol):
    """Says what each op computes."""

    def bind(self, op: Op, attached: Attachments) -> Bound | None:
        """The callable of an op; None for ops that only wait and free."""


class Transfers(Protocol):
    """Starts sends and receives; see :mod:`mhcplan.runtime.groups`."""

    def start(self, ops: Sequence[Op], tensors: Sequence[Tensor]) -> list[Any]:
        """Start the sends and receives of one call; returns their works."""
        ...


class Observer(Protocol):
    """Is told when the host issues ops; for traces."""

    def before(self, index: int) -> None:
        """The host turns to instruction ``index``, its stream is current and has waited."""

    def after(self, index: int) -> None:
        """The host has issued it; its stream is current."""


@dataclass
class Instruction:
    """An op, or the ops of one batched call, ready to be issued.

    ``place`` lists (buffer, layout) to allocate on the compute stream before it.
    """

    ops: tuple[Op, ...]
    stream: int
    waits: tuple[int, ...]
    records: tuple[int, ...]
    run: Run | None
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    place: list[tuple[int, Layout]] = field(default_factory=list)
    frees: tuple[int, ...] = ()
    is_transfer: bool = False
    host_sync: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it needs neither another process nor gradients that mean something."""
        return not self.is_transfer and self.ops[0].pass_ != _ON_PARAMETERS


class Executor:
    """One rank of a Program, bound and ready to run steps.

    Args:
        program: the Program; ``rank``: whose ops to run.
        binding: what ops compute.
        transfers: starts sends and receives.
        streams: the rank's streams and events, in the order of :func:`streams_of`.
        order: order of issue as positions in the rank's ops (of a batched call its first); None is
            the Program's. Another one is for tests, on a CPU: any order that respects streams and
            events must give equal results.
        poison: fill preallocated memory with NaN, so that a read before the write shows.

    Raises:
        RunError: an op writes a buffer that another op allocates, and its layout is not known.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        binding: Binding,
        transfers: Transfers,
        streams: CudaStreams | CpuStreams,
        *,
        order: Sequence[int] | None = None,
        poison: bool = False,
    ) -> None:
        self.streams, self.attached = streams, Attachments()
        self.binding = binding
        self._fill = float("nan") if poison else None
        self._transfers = transfers
        ops = rank_ops(program, rank)
        bound = [binding.bind(op, self.attached) for op in ops]
        self._values: dict[int, Any] = {}
        self.instructions = self._compile(program, rank, ops, bound)
        if order is not None:
            self.instructions = _reordered(self.instructions, ops, order)

    def step(self, observer: Observer | None = None) -> None:
        """Issue all ops. Returns when they are issued; on a CPU, when they are done."""
        self._run(self.instructions, observer, self._fill)

    def rehearse(self) -> None:
        """Run what needs no other process, on zeros where a message should be; leaves gradients.

        The first launch of a GPU kernel compiles and loads it, which may wait for all that runs on
        the device: for ever, if that is a transfer whose peer waits for this process.
        """
        alone = [it if it.is_local else replace(it, run=None) for it in self.instructions]
        self._run(alone, None, 0.0)

    def _run(
        self, instructions: list[Instruction], observer: Observer | None, fill: float | None
    ) -> None:
        streams = self.streams
        streams.begin()
        with torch.no_grad():
            for index, it in enumerate(instructions):
                if it.place:
                    streams.enter(COMPUTE, ())
                    self.place(it, fill)
                streams.enter(it.stream, it.waits)
                self.perform(index, it, observer)
                for event in it.records:
                    streams.leave(event)
                if it.host_sync:
                    streams.host_wait()
        streams.join()
        self.check_freed()

    def place(self, it: Instruction, fill: float | None = None) -> None:
        """Allocate what the Program has allocated here; the compute stream must be current."""
        for buffer, layout in it.place:
            self._values[buffer] = allocate(layout, self.streams.device, fill)

    def perform(self, index: int, it: Instruction, observer: Observer | None = None) -> None:
        """Put an instruction on the current stream, and drop what it frees."""
        values = self._values
        if observer is not None:
            observer.before(index)
        if it.run is not None:
            inputs = [values[b] for b in it.reads]
            out = [values.get(b) for b in it.writes]
            made = it.run(inputs, out)
            if it.is_transfer:
                self.streams.transferred(made)
            else:
                for buffer, value in zip(it.writes, made, strict=True):
                    values[buffer] = value
            inputs = out = made = None  # a value freed below must have no other owner
        if observer is not None:
            observer.after(index)
        for buffer in it.frees:
            del values[buffer]
            self.attached.drop(buffer)

    def check_freed(self) -> None:
        """After a step: raise RunError if it kept a buffer."""
        if self._values:
            left = sorted(self._values)[:5]
            raise RunError(f"{len(self._values)} buffers are never freed, such as {left}")

    # -- from ops to instructions

    def _compile(
        self, program: Program, rank: int, ops: list[Op], bound: list[Bound | None]
    ) -> list[Instruction]:
        numbers = {stream: i for i, stream in enumerate(streams_of(program, rank))}
        events = {event: i for i, event in enumerate(events_of(ops))}
        local = {op.index: i for i, op in enumerate(ops)}
        found: list[Instruction] = []
        at: list[Instruction] = []
        for i, op in enumerate(ops):
            joins = op.batch >= 0 and i > 0 and ops[i - 1].batch == op.batch
            if joins:
                _join(found[-1], op, events)
            else:
                found.append(_instruction(op, bound[i], numbers[program.stream[op.index]], events))
            at.append(found[-1])
        for it in found:
            if it.ops[0].peer >= 0:
                it.run = self._messages(it)
        self._place(ops, bound, at, local)
        return found

    def _messages(self, it: Instruction) -> Run:
        """The run of a send, a receive or a batch of both."""
        sends = [bool(op.reads) for op in it.ops]
        start, ops = self._transfers.start, it.ops

        def run(inputs: list[Any], out: list[Any]) -> list[Any]:
            given, wanted = iter(inputs), iter(out)
            return start(ops, [next(given) if s else next(wanted) for s in sends])

        return run

    def _place(
        self,
        ops: list[Op],
        bound: list[Bound | None],
        at: list[Instruction],
        local: dict[int, int],
    ) -> None:
        """Put every allocation that its writer does not make by itself where the Program has it."""
        writer = {b: (i, k) for i, op in enumerate(ops) for k, b in enumerate(op.writes)}
        for i, op in enumerate(ops):
            for buffer in op.allocs:
                if buffer not in writer:
                    continue
                by, position = writer[buffer]
                if by == i and at[i].stream == COMPUTE:
                    continue
                bound_by = bound[by]
                if bound_by is None or position >= len(bound_by.layouts):
                    raise RunError(
                        f"op {ops[by].index} ({ops[by].kind}.{ops[by].pass_}) runs on stream"
                        f" {ops[by].stream.name}: its binding must tell the layouts it writes"
                    )
                at[i].place.append((buffer, bound_by.layouts[position]))


def rank_ops(program: Program, rank: int) -> list[Op]:
    """Ops of a rank in host issue order."""
    begin, end = program.rank_offsets[rank : rank + 2]
    return [program[i] for i in range(begin, end)]


def streams_of(program: Program, rank: int) -> list[int]:
    """Numbers of a rank's streams, its compute stream first.

    Raises:
        RunError: the rank has no stream called ``compute``.
    """
    own = [i for i, stream in enumerate(program.streams) if stream.rank == rank]
    compute = [i for i in own if program.streams[i].name == "compute"]
    if not compute:
        raise RunError(f"rank {rank} has no compute stream")
    return [compute[0], *(i for i in own if i != compute[0])]


def events_of(ops: Sequence[Op]) -> list[int]:
    """Events that a rank's ops record."""
    return [op.record for op in ops if op.record >= 0]


def _instruction(op: Op, bound: Bound | None, stream: int, events: dict[int, int]) -> Instruction:
    return Instruction(
        ops=(op,), stream=stream, waits=tuple(events[e] for e in op.waits),
        records=(events[op.record],) if op.record >= 0 else (),
        run=None if bound is None else bound.run, reads=op.reads, writes=op.writes,
        frees=op.frees, is_transfer=op.group >= 0, host_sync=op.host_sync,
    )  # fmt: skip


def _join(it: Instruction, op: Op, events: dict[int, int]) -> None:
    """Add an op to the batched call that ``it`` is."""
    it.ops += (op,)
    it.waits = tuple(dict.fromkeys((*it.waits, *(events[e] for e in op.waits))))
    it.records += (events[op.record],) if op.record >= 0 else ()
    it.reads += op.reads
    it.writes += op.writes
    it.frees += op.frees


def _reordered(
    instructions: list[Instruction], ops: Sequence[Op], order: Sequence[int]
) -> list[Instruction]:
    place = {ops[position].index: k for k, position in enumerate(order)}
    return sorted(instructions, key=lambda it: place[it.ops[0].index])
