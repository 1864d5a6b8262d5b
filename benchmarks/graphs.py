"""A step as one CUDA graph of all its streams, beside the same step as graphs of one stream each.

    python benchmarks/closed_loop.py --compile-only --only ROW ... --out OUT    # once, in parallel
    python benchmarks/graphs.py [--rows ROW ...] [--steps 5]

Rows are those of the closed loop. Both ways are captured from one Trainer and timed in turns, each
step that of the slowest process; then kernels are recorded (CUPTI's, no events within), of process
0: *kernels* is the sum of their times, *memsets* how many of them began after compute had stood
still for 20 us or more, and for how long in all. It is why ``runtime/captured.py`` makes many
graphs. Needs two GPUs.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.closed_loop_rows import GPUS, SETS
from mhcplan.planner.measured.claim import programs_of
from mhcplan.planner.plan.spec import make_plan
from mhcplan.profiles.accuracy import MHC
from mhcplan.profiles.capture.overlap_trace import split_runs, trace_events
from mhcplan.runtime.captured import CapturedStep
from mhcplan.runtime.launch import launch
from mhcplan.runtime.measure import time_steps
from mhcplan.runtime.spec import RunSpec
from mhcplan.runtime.train import Session, Trainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhcplan.profiles.capture.overlap_trace import Run

WORLD = 2
ROWS = {
    row: fields
    for name, rows in SETS.items()
    if GPUS[name] == WORLD
    for row, fields in rows.items()
}
STALL_NS = 20_000


class OneGraph(CapturedStep):
    """A Trainer's step as one graph of all streams."""

    def __init__(self, trainer: Trainer) -> None:
        """Capture a step."""
        self.session, self._trainer = trainer.session, trainer
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph = torch.cuda.CUDAGraph()
        # other threads (NCCL's watchdog) may ask for events meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            trainer.step()

    def _replay(self) -> None:
        self._graph.replay()


def stalls_ns(run: Run) -> list[int]:
    """How long no kernel of compute had run when a memset began, of the memsets that it kept."""
    found: list[int] = []
    idle_since = run.compute[0][0] if run.compute else 0
    for (start, length), name in zip(run.compute, run.names, strict=True):
        if name.startswith("Memset") and start - idle_since >= STALL_NS:
            found.append(start - idle_since)
        idle_since = max(idle_since, start + length)
    return found


def traced(ways: Mapping[str, CapturedStep]) -> dict[str, Run]:
    """The kernels of a step of each way on this device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as records:
        for captured in ways.values():
            torch.cuda.synchronize()
            torch.distributed.barrier()
            captured.step()  # begins with the marker of a run
            torch.cuda._sleep(1)
        torch.cuda.synchronize()
    return dict(zip(ways, split_runs(*trace_events(records)), strict=True))


def compare(process: int, _world: int, rows: list[str], steps: int) -> None:
    """One process of two."""
    session = Session(torch.device("cuda", process))
    if process == 0:
        print(
            f"{'row':24}{'captured as':22}{'step ms':>9}{'kernels ms':>12}{'memsets':>9}{'ms':>7}"
        )
    for row in rows:
        plan = make_plan(ROWS[row])
        spec = RunSpec.from_plan(plan.model_dump(mode="json"), dtype=torch.bfloat16)
        trainer = Trainer(programs_of(plan)[MHC], spec, session)
        trainer.rehearse()
        trainer.load(0)
        trainer.step()
        ways = {"one graph": OneGraph(trainer), "graphs of one stream": CapturedStep(trainer)}
        times = time_steps(ways, steps, warm_up=1)
        for way, run in traced(ways).items():
            stalls = stalls_ns(run)
            kernels_ms = sum(length for _, length in run.compute) / 1e6
            if process == 0:
                print(
                    f"{row:24}{way:22}{times[way].median_ns / 1e6:9.1f}{kernels_ms:12.1f}"
                    f"{len(stalls):9}{sum(stalls) / 1e6:7.1f}",
                    flush=True,
                )
        del trainer, ways
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", choices=ROWS,
        default=["ep2-n4-post-normal", "ep2-n4-none-normal"],
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    options = parser.parse_args()
    if torch.cuda.device_count() < WORLD:
        parser.error(f"needs {WORLD} CUDA devices, found {torch.cuda.device_count()}")
    launch(compare, WORLD, options.rows, options.steps, device="cuda")


if __name__ == "__main__":
    main()
