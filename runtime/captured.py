"""A step as one CUDA graph: the device runs it, the host only starts it.

A step of small ops takes the host longer to issue than the device to run. Captured, the host's
time is out of the picture: streams, their priorities, events, transfers and memory are those of the
issued step. What the host computes is frozen: AdamW's bias correction stays that of the captured
step, so this is for timing and not for training. Every kernel must have run before (rehearse).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mhcplan.runtime.executor import Observer
    from mhcplan.runtime.train import Trainer

_LEAD_CYCLES = 4_000_000  # about 2 ms: longer than the host takes to start the graph


class CapturedStep:
    """A Trainer's step, captured; all processes must replay theirs together."""

    def __init__(self, trainer: Trainer, observer: Observer | None = None) -> None:
        """Capture a step; the events of ``observer`` must be external."""
        self.session, self._trainer = trainer.session, trainer
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph = torch.cuda.CUDAGraph()
        stream = trainer.session.streams.capture
        # other threads (NCCL's watchdog) may ask for events meanwhile
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            trainer.step(observer)

    def load(self, step: int) -> None:
        """Bring the microbatches of a step to the device."""
        self._trainer.load(step)

    def step(self) -> None:
        """Start the step, behind enough idling for the host to have started it when it begins."""
        torch.cuda._sleep(_LEAD_CYCLES)
        self._begin.record()
        self._graph.replay()
        self._end.record()

    @property
    def begin(self) -> torch.cuda.Event:
        """Recorded where the step begins."""
        return self._begin

    def elapsed_ns(self) -> int:
        """How long the last step took on this device, which must be idle."""
        return round(self._begin.elapsed_time(self._end) * 1e6)
