"""What a measured run does: memory, step times and a trace of every Program given, side by side.

:func:`run` starts the processes of one machine and returns what they measured. Processes that run
already call :func:`measure` with equal arguments; process 0 gets the results, and is told after
every stage what there is by then, so that a run that is cut off keeps its finished stages.
"""

from __future__ import annotations

import gc
import pickle
import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from mhcplan.profiles.accuracy import ProgramMeasured, Times, figures_of
from mhcplan.runtime.captured import CapturedStep
from mhcplan.runtime.launch import launch
from mhcplan.runtime.measure import PeakBytes, StepTimes, peak_memory, time_steps, trace_step
from mhcplan.runtime.train import Session, Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mhcplan.profiles.accuracy import Mode
    from mhcplan.runtime.spec import RunSpec
    from mhcplan.sim.files import Trace
    from mhcplan.sim.program import Program

LEAST_STEPS = 20  # that a reported median is of


class Subject(NamedTuple):
    """A Program to measure, and the run that it was lowered for."""

    program: Program
    spec: RunSpec


@dataclass
class Measured:
    """What was measured of one Program.

    Attributes:
        memory: of every process, without what other Programs held.
        losses: mean loss of the first steps, over all processes.
        issued: steps that the host issued op by op.
        captured: steps as CUDA graphs; None where there are none.
        trace: of a step that was captured if ``captured`` is there, else issued.
    """

    memory: list[PeakBytes]
    losses: list[float]
    issued: StepTimes
    captured: StepTimes | None = None
    trace: Trace | None = None

    @property
    def mode(self) -> Mode:
        """What the trace is of."""
        return "issued" if self.captured is None else "captured"

    def line(self) -> ProgramMeasured:
        """As accuracy rows have it."""
        assert self.trace is not None, "process 0 has the traces"
        times: dict[Mode, Times] = {"issued": _times(self.issued)}
        if self.captured is not None:
            times["captured"] = _times(self.captured)
        program, timeline = self.trace.program, self.trace.timeline
        return ProgramMeasured(
            times=times, losses=tuple(self.losses),
            allocated_bytes=tuple(peak.allocated for peak in self.memory),
            reserved_bytes=tuple(peak.reserved for peak in self.memory),
            traced_step_ns=timeline.step_ns, timeline=figures_of(program, timeline),
        )  # fmt: skip


def _times(times: StepTimes) -> Times:
    return Times(
        step_ns=times.median_ns, spread_percent=round(times.spread_percent, 3),
        steps=len(times.step_ns), issue_ns=times.median_issue_ns,
    )  # fmt: skip


def run(
    subjects: Mapping[str, Subject],
    world: int,
    *,
    device: str,
    steps: int = LEAST_STEPS,
    warm_up: int = 3,
    capture: bool = False,
    timeout_s: float = 120.0,
) -> dict[str, Measured]:
    """Measure Programs in ``world`` processes of this machine.

    Args:
        subjects: by name.
        world: processes, each with a GPU of its own.
        device: ``cuda`` or ``cpu``.
        steps, warm_up, capture: see :func:`measure`.
        timeout_s: when a transfer that nobody answers fails.

    Raises:
        ProcessFailed: a process failed; all have ended by then.
        RunError: a Program cannot run as asked.
    """
    for _, spec in subjects.values():
        spec.check()
    with TemporaryDirectory() as folder:
        result = Path(folder) / "measured"
        options = {"steps": steps, "warm_up": warm_up, "capture": capture}
        launch(
            _member, world, dict(subjects), options, device, timeout_s, str(result),
            device=device, timeout_s=timeout_s,
        )  # fmt: skip
        found: dict[str, Measured] = pickle.loads(result.read_bytes())
        return found


def _member(
    process: int,
    _world: int,
    subjects: dict[str, Subject],
    options: dict[str, Any],
    device: str,
    timeout_s: float,
    result: str,
) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    where = torch.device("cuda", process) if device == "cuda" else torch.device("cpu")
    found = measure(subjects, Session(where, timeout_s), **options)
    if process == 0:
        Path(result).write_bytes(pickle.dumps(found))


def measure(
    subjects: Mapping[str, Subject],
    session: Session,
    *,
    steps: int = LEAST_STEPS,
    warm_up: int = 3,
    capture: bool = False,
    issued_steps: int | None = None,
    keep: Callable[[dict[str, Measured]], None] = lambda _: None,
) -> dict[str, Measured]:
    """Measure Programs, their steps in turns; results are whole on process 0 only.

    Args:
        subjects: by name; memory is reported best for the first.
        session: of this process.
        steps: that are timed, at least two; ``warm_up``: before those.
        capture: also time captured steps (CUDA graphs), and trace one.
        issued_steps: that are issued by the host and timed; None: ``steps``.
        keep: told on process 0 after each stage what is there so far.
    """
    trainers, found = dict[str, Trainer](), dict[str, Measured]()
    memory: dict[str, list[PeakBytes]] = {}
    losses: dict[str, list[float]] = {}
    for name, (program, spec) in subjects.items():
        held = allocated(session.device)
        trainers[name] = trainer = Trainer(program, spec, session)
        trainer.rehearse()
        losses[name] = [_trained(trainer, step) for step in range(2)]
        memory[name] = _gathered(_without(peak_memory(trainer), held))
    for name, times in time_steps(trainers, issued_steps or steps, warm_up).items():
        found[name] = Measured(memory[name], losses[name], times)
    _add_traces(found, trainers, captured=False)
    _tell(session, keep, found)
    if capture:
        _add_captured(found, trainers, steps, warm_up)
        _tell(session, keep, found)
    return found


def _add_captured(
    found: dict[str, Measured], trainers: dict[str, Trainer], steps: int, warm_up: int
) -> None:
    graphs = {name: CapturedStep(trainer) for name, trainer in trainers.items()}
    for name, times in time_steps(graphs, steps, warm_up).items():
        found[name].captured = times
    del graphs
    _collect()
    _add_traces(found, trainers, captured=True)


def _add_traces(
    found: dict[str, Measured], trainers: dict[str, Trainer], *, captured: bool
) -> None:
    for name, trainer in trainers.items():
        found[name].trace = trace_step(trainer, 0, captured=captured)
        _collect()


def _tell(
    session: Session, keep: Callable[[dict[str, Measured]], None], found: dict[str, Measured]
) -> None:
    if session.process == 0:
        keep(found)


def _trained(trainer: Trainer, step: int) -> float:
    """Mean loss of a step over all microbatches, wherever they ended."""
    trainer.load(step)
    trainer.step()
    return statistics.fmean(
        loss for losses in _gathered(list(trainer.losses().values())) for loss in losses
    )


def _gathered(own: Any) -> list[Any]:  # noqa: ANN401 - anything that pickles
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def _without(peak: PeakBytes, held: int) -> PeakBytes:
    return PeakBytes(*(max(n - held, 0) for n in peak))


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a device; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _collect() -> None:
    """Give memory of what is gone back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
