"""A step as CUDA graphs: the device runs it, the host only starts them.

A step of small ops takes the host longer to issue than the device to run. Captured, the host's
time is out of the picture: streams, their priorities, events, transfers and memory are those of the
issued step. What the host computes is frozen: AdamW's bias correction stays that of the captured
step, so this is for timing and not for training. Every kernel must have run before (rehearse).

Each graph holds what follows each other on one stream, up to the next event that somebody waits
for; streams and events between them are real ones. A whole step as one graph was up to 5 % longer:
where the driver lays out many branches, messages and memsets (attention and products have some)
begin up to 0.1 ms late and more (docs/accuracy.md).
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mhcplan.runtime.executor import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.runtime.executor import Executor, Instruction, Observer
    from mhcplan.runtime.train import Trainer

_LEAD_CYCLES = 40_000_000  # about 20 ms, by which the host is ahead of the device


class _Part(NamedTuple):
    """What follows each other on a stream, as one graph; None where it only waits and frees."""

    stream: int
    waits: tuple[int, ...]
    records: tuple[int, ...]
    graph: torch.cuda.CUDAGraph | None


class CapturedStep:
    """A Trainer's step, captured; all processes must replay theirs together."""

    def __init__(self, trainer: Trainer, observer: Observer | None = None) -> None:
        """Capture a step; the events of ``observer`` must be external."""
        self.session, self._trainer = trainer.session, trainer
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._streams = trainer.executor.streams
        # of all graphs: what one writes another reads; torch has no type for its id as a handle
        self._pool: Any = torch.cuda.MemPool()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # nothing is given back while a capture wants memory
        self._streams.begin()
        with torch.no_grad():
            self._parts = self._capture(trainer.executor, observer)
        self._streams.join()

    def load(self, step: int) -> None:
        """Bring the microbatches of a step to the device."""
        self._trainer.load(step)

    def step(self) -> None:
        """Start the step, behind enough idling for the host to stay ahead of it."""
        torch.cuda._sleep(_LEAD_CYCLES)
        self._begin.record()
        self._replay()
        self._end.record()

    @property
    def begin(self) -> torch.cuda.Event:
        """Recorded where the step begins."""
        return self._begin

    def elapsed_ns(self) -> int:
        """How long the last step took on this device, which must be idle."""
        return round(self._begin.elapsed_time(self._end) * 1e6)

    def _replay(self) -> None:
        streams = self._streams
        streams.begin()
        for part in self._parts:
            streams.enter(part.stream, part.waits)
            if part.graph is not None:
                part.graph.replay()
            for event in part.records:
                streams.leave(event)
        streams.join()

    def _capture(self, executor: Executor, observer: Observer | None) -> list[_Part]:
        parts: list[_Part] = []
        index = 0
        for its in parts_of(executor.instructions):
            stream, graph = its[0].stream, None
            if observer is not None or any(it.run is not None for it in its):
                graph = torch.cuda.CUDAGraph()
            is_placed = stream != COMPUTE or graph is None  # all memory is the compute stream's
            if is_placed:
                executor.streams.enter(COMPUTE, ())
                with torch.cuda.use_mem_pool(self._pool):
                    for it in its:
                        executor.place(it)
            executor.streams.enter(stream, ())
            if graph is not None:
                # other threads (NCCL's watchdog) may ask for events meanwhile
                graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")
            for it in its:
                if not is_placed:
                    executor.place(it)
                executor.perform(index, it, observer)
                index += 1
            if graph is not None:
                graph.capture_end()
            parts.append(_Part(stream, its[0].waits, its[-1].records, graph))
        executor.check_freed()
        return parts


def parts_of(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Instructions in host issue order, cut where the stream changes, before one that waits or
    transfers and after one that others wait for or that transfers."""
    parts: list[list[Instruction]] = []
    previous: Instruction | None = None
    for it in instructions:
        if previous is None or (
            it.stream != previous.stream
            or it.waits or previous.records
            or it.is_transfer or previous.is_transfer
        ):  # fmt: skip
            parts.append([])
        parts[-1].append(it)
        previous = it
    return parts
