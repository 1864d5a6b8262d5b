"""Step times, traces and memory of real runs.

Times come from steps that nothing watches, with Python's garbage collector off: issued op by op
(from the hosts' begin), or captured (from where the device begins). Traces come from other steps,
in which an event is recorded before and after every op: their step is longer, by how much is part
of a measurement. Clocks: a GPU's events are placed on the host's monotonic clock by an event whose
time on both is known to within ``uncertainty_ns``; processes of one machine share that clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from mhcplan.runtime.captured import CapturedStep
from mhcplan.runtime.trace import measured_timeline
from mhcplan.sim.files import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from mhcplan.runtime.executor import Instruction
    from mhcplan.runtime.train import Trainer

_CLOCK_TRIES = 8


class PeakBytes(NamedTuple):
    """Memory of a process through a step, of the allocator. Zero on a CPU.

    Attributes:
        static: held between steps; ``allocated``: most held in a step, ``static`` included;
        reserved: most that the allocator took from the device.
    """

    static: int
    allocated: int
    reserved: int


@dataclass(frozen=True)
class StepTimes:
    """Steps of one Trainer.

    Attributes:
        step_ns: each step, of the process that took longest.
        issue_ns: for each step, how long the slowest host took to issue it.
    """

    step_ns: list[int]
    issue_ns: list[int]

    @property
    def median_ns(self) -> int:
        """The figure to report."""
        return int(statistics.median(self.step_ns))

    @property
    def spread_percent(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.step_ns, n=4)
        return 100 * (high - low) / self.median_ns

    @property
    def median_issue_ns(self) -> int:
        """Host time of a step: where it nears the step's, the host decides how long that takes."""
        return int(statistics.median(self.issue_ns))


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection: what exists is frozen, what comes waits."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def time_steps(
    trainers: Mapping[str, Trainer] | Mapping[str, CapturedStep], steps: int, warm_up: int
) -> dict[str, StepTimes]:
    """Time steps of several Trainers in turns, so that drift of the machine hits all alike.

    Every process must call it with equal arguments; all get the times of the slowest.
    """
    own: dict[str, list[tuple[int, int]]] = {name: [] for name in trainers}
    with quiet():
        for step in range(warm_up + steps):
            for name, trainer in trainers.items():
                trainer.load(step)
                issue, whole = _timed_step(trainer)
                if step >= warm_up:
                    own[name].append((issue, whole))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    found: dict[str, StepTimes] = {}
    for name in trainers:
        issue_ns, step_ns = np.max([times[name] for times in every], axis=0).T.tolist()
        found[name] = StepTimes(step_ns, issue_ns)
    return found


def _timed_step(trainer: Trainer | CapturedStep) -> tuple[int, int]:
    """(ns until the host had issued the step, ns until it was done)."""
    device = trainer.session.device
    _together(device)
    begin = time.perf_counter_ns()
    trainer.step()
    issued = time.perf_counter_ns()
    _synchronize(device)
    if isinstance(trainer, CapturedStep):
        return issued - begin, trainer.elapsed_ns()
    return issued - begin, time.perf_counter_ns() - begin


def _together(device: torch.device) -> None:
    """Start all processes at one time, with idle devices."""
    _synchronize(device)
    dist.barrier()
    _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(trainer: Trainer, steps: int = 2) -> PeakBytes:
    """Memory of this process through some steps; only this Trainer may hold any."""
    if trainer.session.device.type != "cuda":
        for step in range(steps):
            trainer.load(step)
            trainer.step()
        return PeakBytes(0, 0, 0)
    _synchronize(trainer.session.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    static = torch.cuda.memory_allocated()
    for step in range(steps):
        trainer.load(step)
        trainer.step()
    _synchronize(trainer.session.device)
    return PeakBytes(static, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


# -- traces ----------------------------------------------------------------------------------------


class _HostEvent:
    """A moment on the host: what a CPU has instead of a CUDA event."""

    def record(self) -> None:
        self.ns = time.perf_counter_ns()


def _cuda_event(*, external: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, external=external)


class _Recorder:
    """Observer of a step: when the host issued each instruction, when its stream ran it."""

    def __init__(
        self, instructions: list[Instruction], device: torch.device, *, external: bool
    ) -> None:
        self._cuda, self._external = device.type == "cuda", external
        count = len(instructions)
        self.issued = np.zeros(count, np.int64)
        self.begins = [self._event() for _ in range(count)]
        self.ends = [self._event() for _ in range(count)]
        self._base = self._event()

    def _event(self) -> Any:  # noqa: ANN401 - torch's event or ours
        # within a graph, an internal event is an edge and has no time
        return _cuda_event(external=self._external) if self._cuda else _HostEvent()

    def before(self, index: int) -> None:
        self.begins[index].record()

    def after(self, index: int) -> None:
        self.ends[index].record()
        self.issued[index] = time.perf_counter_ns()

    def set_clock(self) -> None:
        """Find an event's time on the host's clock: the try whose bounds are closest."""
        self.base_ns, self.uncertainty_ns = 0, 0
        best = None
        for _ in range(_CLOCK_TRIES if self._cuda else 0):
            event, begin = _cuda_event(), time.perf_counter_ns()
            event.record()
            event.synchronize()
            end = time.perf_counter_ns()
            if best is None or end - begin < best:
                best = end - begin
                self._base, self.base_ns = event, (begin + end) // 2
                self.uncertainty_ns = (end - begin) // 2

    def times_ns(self, events: list[Any]) -> NDArray[np.int64]:
        """Host-clock times of events; the device must be idle."""
        if not self._cuda:
            return np.array([event.ns for event in events], np.int64)
        elapsed = [round(self._base.elapsed_time(event) * 1e6) for event in events]
        return self.base_ns + np.array(elapsed, np.int64)


def trace_step(trainer: Trainer, step: int, *, captured: bool = False) -> Trace | None:
    """Run a step with events around every op; process 0 gets the trace of its replica.

    Every process must call it. Times of a batched call are those of all its ops.

    Args:
        trainer: whose step.
        step: whose microbatches.
        captured: as CUDA graphs; all its ops count as issued when it begins.
    """
    instructions = trainer.executor.instructions
    recorder = _Recorder(instructions, trainer.session.device, external=captured)
    begin = _watched_step(trainer, step, recorder, captured)
    ops = np.array([op.index for it in instructions for op in it.ops])
    of = np.repeat(np.arange(len(instructions)), [len(it.ops) for it in instructions])
    columns = np.stack(
        [
            ops, recorder.issued[of], recorder.times_ns(recorder.begins)[of],
            recorder.times_ns(recorder.ends)[of],
        ]
    )  # fmt: skip
    mine = {
        "begin": begin, "columns": columns, "replica": trainer.place.replica,
        "uncertainty_ns": recorder.uncertainty_ns,
    }  # fmt: skip
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    if trainer.session.process != 0:
        return None
    return _assemble(trainer, [part for part in parts if part["replica"] == 0], captured)


def _watched_step(trainer: Trainer, step: int, recorder: _Recorder, captured: bool) -> int:
    """Run a step for ``recorder``; returns when it began, on the host's clock."""
    device = trainer.session.device
    graph = CapturedStep(trainer, recorder) if captured else None
    trainer.load(step)
    with quiet():
        _together(device)
        recorder.set_clock()
        _together(device)
        begin = time.perf_counter_ns()
        if graph is None:
            trainer.step(recorder)
        else:
            graph.step()
        _synchronize(device)
    if graph is not None:
        begin = int(recorder.times_ns([graph.begin])[0])
        recorder.issued[:] = begin
    return begin


def _assemble(trainer: Trainer, parts: list[dict[str, Any]], captured: bool) -> Trace:
    """One trace from the parts of a replica's processes."""
    program = trainer.program
    table = np.zeros((3, program.num_ops), np.int64)
    begin = min(part["begin"] for part in parts)
    for part in parts:
        ops, *times = part["columns"]
        table[:, ops] = np.stack(times) - begin
    issue, start, end = np.maximum(table, 0)
    meta = {
        "plan_digest": program.meta.get("plan_digest"),
        "clock_uncertainty_ns": max(part["uncertainty_ns"] for part in parts),
        "captured": captured,
        "device": _device_name(trainer.session.device),
        "torch": torch.__version__,
    }
    return Trace(program, measured_timeline(program, issue, start, end), "measured", meta)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
