"""How fast a what-if is, from plan to report, and how that grows; printed as times and ratios.

    PYTHONPATH=src python benchmarks/sim.py [--only what-if,sweep,...] [--json out.json]

Everything is measured in this run on this machine; CPU time is printed beside wall time, so that a
busy machine shows. ``what-if``: the paper's 27B model, PP 8, M 64, DualPipe, op by op, with its
baseline played too and with the baseline that is kept; then the engines alone. ``sweep``: the fast
estimate of a list of plans on one and on two cores, the best of them confirmed by the engine, and
how far the estimate was off. ``cold``: a new process, with machine code on disk and without.
``trace``: a Perfetto file of 200,000 ops. ``growth``: with P, M and the number of blocks.

Where a what-if's time goes, in ms of CPU time for the plan's 72,080 ops, the least of forty rounds
while others used the machine (2.4 GHz EPYC): the engine's two plays 14 and 13, templates and the
order of ops 2.8, breakdown 2.4, what the clock follows 2.1, memory and the report 1.2 each; the
baseline on the other core. All of a plan takes 40. With all ranks played instead of half of them
(:mod:`mhcplan.sim.mirror`), as schedules need that are no mirror images, the plays took 25 and 27
in the same minutes, all of the plan 65. More than half of a new process are imports: numpy,
pydantic's models and the command line; numba is not loaded.

A play of all ranks takes 290 to 308 ns an op for 18,000 ops as for 290,000, so large arrays are not
what it waits for: a GPU is shared anew 90,000 times in 72,080 ops, each time with the rate of the
chosen kernel and of two transfers, and a look at what is due next. It executes some 1,200
instructions an op (counted by single steps, mhc-3b, P 2, M 4).

What made plays no faster: columns of an op side by side in memory (1.11 to 1.17 of the time), int32
instead of int64 (1.05 to 1.10), what :mod:`mhcplan.sim.device_sms` asks twice asked once (1.01 to
1.02), state of places, streams and ranks as records instead of columns (0.97, within noise), no
look at hosts that have issued all and at hardware queues that nobody waits for (1.02), straight to
the first rank on which anything is due (1.01), rates of ops asked for in one place, a fifth less
machine code (1.00). Compute ops that go on at once, not after all ranks, need a second copy of the
code and took 1.13. Ranks could be played apart only while no message between them waits or moves,
which is so for a fifth of the times that a GPU is shared. No period can be played once for all: the
overlapped pairs of rank 0 still differ by 11 us from one microbatch to the next after 22 of them.
Threads that hand over the GIL after 0.5 ms instead of 5 made no what-if faster.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import cycle, product
from multiprocessing import get_context
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan
from mhcplan.planner.predict import Prediction, forget_baselines, predict, simulate
from mhcplan.planner.report.make import make_report
from mhcplan.planner.sweep.ranking import Estimate, estimate
from mhcplan.profiles.lookup import cost_model_of
from mhcplan.profiles.presets import MODELS
from mhcplan.profiles.store import find_profile
from mhcplan.sim import tiling
from mhcplan.sim.chrome_trace import chrome_trace
from mhcplan.sim.memory import memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")
PROFILE = find_profile("h100-sxm")
SECTIONS = ("what-if", "sweep", "cold", "trace", "growth")
CONFIRMED = 8
SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")  # of a sweep
TRACE_OPS = 200_000
_MB = 1e6


@dataclass
class Timing:
    """Milliseconds of one call, the median of several."""

    wall_ms: float
    cpu_ms: float


@dataclass
class Section:
    """A table: rows of cells, and what to say below it."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_of(**changes: object) -> PlanSpec:
    """The paper's 27B model as the defaults have it: PP 8, EP 8, M 64, DualPipe, n 4."""
    return make_plan({"model": "mhc-27b"} | changes)


def timed(call: Callable[[], T], repeats: int = 1) -> tuple[T, Timing]:
    """Result and median times of a call."""
    walls: list[float] = []
    cpus: list[float] = []
    results: list[T] = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        results[:] = [call()]
        walls.append(1e3 * (time.perf_counter() - wall))
        cpus.append(1e3 * (time.process_time() - cpu))
    return results[0], Timing(statistics.median(walls), statistics.median(cpus))


def what_if(repeats: int) -> Section:
    """From plan to report, warm; then the engines alone."""
    section = Section("what-if, mhc-27b PP 8 M 64 DualPipe with its baseline",
                      ("what", "wall ms", "CPU ms", "ops"))  # fmt: skip
    ns, blocks = cycle((2, 4, 8)), cycle((2, 3, 4, 5, 6, 7))

    def ask(plan: PlanSpec) -> Prediction:
        prediction = predict(plan, PROFILE)
        make_report(prediction, "")
        return prediction

    def another_n() -> Prediction:
        return ask(plan_of(residual={"expansion_rate": next(ns)}))

    def another_n_and_baseline() -> Prediction:
        forget_baselines()
        return another_n()

    def another_block() -> Prediction:
        tiling.forget()
        forget_baselines()
        return ask(plan_of(residual={"recompute_block": next(blocks)}))

    for n, block in product((2, 4, 8), (2, 3, 4, 5, 6, 7)):  # warm up: code, templates, prices
        ask(plan_of(residual={"expansion_rate": n, "recompute_block": block}))
    for text, call in (
        ("another n, baseline kept", another_n),
        ("another n, baseline played", another_n_and_baseline),
        ("another recompute block, baseline played", another_block),
    ):
        prediction, timing = timed(call, repeats)
        programs = prediction.step.program, prediction.baseline.program
        ops = " + ".join(f"{program.num_ops:,}" for program in programs)
        section.rows.append((text, timing.wall_ms, timing.cpu_ms, ops))
    steps = (prediction.step, prediction.baseline)
    engines: dict[str, Timing] = {}
    for engine in ("compiled", "simpy"):
        rounds = repeats if engine == "compiled" else 1
        _, engines[engine] = timed(
            lambda engine=engine: [simulate(s.played, s.table, engine) for s in steps], rounds
        )
        section.rows.append(
            (
                f"engine {engine} alone, one core",
                engines[engine].wall_ms,
                engines[engine].cpu_ms,
                ops,
            )
        )
    ratio = engines["simpy"].cpu_ms / engines["compiled"].cpu_ms
    section.notes.append(f"compiled engine {ratio:.0f} times as fast as SimPy")
    return section


def many_layouts() -> list[PlanSpec]:
    """A sweep that changes the order of ops often: P, schedule, recompute block."""
    return _swept((32, 64, 128), ("auto", "none", "stage", 4), (1, 2))


def many_sizes() -> list[PlanSpec]:
    """A sweep over sizes: a range of microbatches for each of fewer layouts."""
    return _swept(range(64, 320, 16), ("auto", "none"), (1,))


def _swept(
    microbatches: Iterable[int], blocks: Iterable[str | int], sizes: Iterable[int]
) -> list[PlanSpec]:
    plans: list[PlanSpec] = []
    for pp, schedule, m, block, size, n in product(
        (4, 8), SCHEDULES, microbatches, blocks, sizes, (1, 2, 4, 8)
    ):
        plan = plan_of(
            residual={"expansion_rate": n, "recompute_block": block},
            layout={"pp": pp}, schedule=schedule, microbatches=m, micro_batch_size=size,
        )  # fmt: skip
        plans.append(plan)
    return plans


def _ready(_: object) -> None:
    """Load what a worker needs, machine code from disk."""
    estimate([plan_of(model="mhc-3b", layout={"pp": 2}, microbatches=8)], PROFILE)


def _estimates(plans: Sequence[PlanSpec]) -> tuple[list[Estimate], float]:
    """Estimates, and the CPU seconds that they took."""
    begin = time.process_time()
    found = [entry for entry in estimate(plans, PROFILE) if isinstance(entry, Estimate)]
    return found, time.process_time() - begin


def _deviation(found: Estimate) -> tuple[float, float]:
    """The engine's step over the estimate's in percent, its overhead minus the estimate's."""
    prediction = predict(found.plan, PROFILE)
    step_ns = prediction.step.timeline.step_ns
    return (
        100 * (step_ns / found.step_time_ns - 1),
        prediction.overhead_percent - found.overhead_percent,
    )


def sweep(_: int) -> Section:
    """Plans a second; then the best, and some of the others, played by the engine."""
    columns = ("what", "plans", "wall s", "CPU s", "plans/s by wall", "by CPU")
    section = Section("sweep of mhc-27b", columns)
    for text, plans in (("layouts", many_layouts()), ("sizes", many_sizes())):
        # plans that share the order of all their ops stay in one process; many stages take longer
        halves: tuple[list[PlanSpec], list[PlanSpec]] = ([], [])
        for plan in plans:
            halves[(plan.layout.pp == 8) ^ (plan.schedule in SCHEDULES[::2])].append(plan)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found, row = _measured(pool, [plans])
        section.rows.append((f"{text}, one core", *row))
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            row = _measured(pool, halves, confirmed=CONFIRMED)[1]
        section.rows.append((f"{text}, two cores, {CONFIRMED} best played", *row))
        best = _best(found)
        for name, some in (("best", best), ("every 41st", found[::41])):
            off = [_deviation(entry) for entry in some]
            section.notes.append(
                f"{text}, {name} ({len(off)} plans): the engine's step is at most"
                f" {max(o[0] for o in off):.2f} % longer, its overhead at most"
                f" {max(abs(o[1]) for o in off):.2f} points away"
            )
    return section


def _measured(
    pool: ProcessPoolExecutor, parts: Sequence[list[PlanSpec]], confirmed: int = 0
) -> tuple[list[Estimate], tuple[object, ...]]:
    """Estimates by a process for each part, and how long they took with ``confirmed`` predictions
    by the same processes; CPU time is that of the estimates."""
    list(pool.map(_ready, parts))
    begin = time.perf_counter()
    done = list(pool.map(_estimates, parts))
    found = [entry for estimates, _ in done for entry in estimates]
    list(pool.map(_confirm, [entry.plan for entry in _best(found)[:confirmed]]))
    wall_s = time.perf_counter() - begin
    count, cpu_s = sum(map(len, parts)), sum(cpu_s for _, cpu_s in done)
    return found, (count, wall_s, cpu_s, count / wall_s, count / cpu_s)


def _confirm(plan: PlanSpec) -> int:
    return predict(plan, PROFILE).step.timeline.step_ns


def _best(found: Sequence[Estimate]) -> list[Estimate]:
    fitting = [entry for entry in found if entry.fits]
    return sorted(fitting, key=_time_per_token)[:CONFIRMED]


def _time_per_token(found: Estimate) -> float:
    return found.step_time_ns / found.plan.tokens_per_step


def cold(repeats: int) -> Section:
    """`mhcplan predict mhc-27b --json` in a new process."""
    section = Section(
        "new process: mhcplan predict mhc-27b", ("what", "wall s", "CPU s", "peak MB")
    )
    command = (
        "import sys; from mhcplan.planner.cli import main\n"
        "try: main(['predict', 'mhc-27b', '--json'])\n"
        "finally: print(open('/proc/self/status').read(), file=sys.stderr)"
    )
    with tempfile.TemporaryDirectory() as folder:
        # an installed package has its bytecode, and so has a checkout after the first process
        environment = os.environ | {"NUMBA_CACHE_DIR": folder, "PYTHONDONTWRITEBYTECODE": ""}

        def run() -> float:
            """Peak memory of a process, in MB."""
            done = subprocess.run(
                [sys.executable, "-c", command], env=environment, check=True, capture_output=True
            )
            (peak,) = re.findall(rb"VmHWM:\s*(\d+) kB", done.stderr)
            return int(peak) * 1024 / _MB

        for text, rounds in (("first ever: compiles", 1), ("later", max(repeats // 4, 3))):
            before = os.times()
            peak_mb, timing = timed(run, rounds)
            after = os.times()
            children_s = after.children_user + after.children_system
            cpu_s = (children_s - before.children_user - before.children_system) / rounds
            section.rows.append((text, timing.wall_ms / 1e3, cpu_s, peak_mb))
    return section


def trace(_: int) -> Section:
    """A Perfetto file."""
    section = Section("Perfetto trace", ("ops", "wall s", "CPU s", "MB"))
    plan = plan_of(microbatches=192)
    program = lower(plan, resolve_recompute_block(plan))
    assert program.num_ops > TRACE_OPS
    table = cost_model_of(PROFILE).table(program.cost_keys)
    timeline, memory = simulate(program, table, "compiled"), memory_of(program, table)
    data, timing = timed(lambda: chrome_trace(program, timeline, memory))
    section.rows.append(
        (program.num_ops, timing.wall_ms / 1e3, timing.cpu_ms / 1e3, len(data) / _MB)
    )
    return section


def growth(repeats: int) -> Section:
    """Microseconds an op as steps get larger, lowered anew."""
    section = Section(
        "growth", ("P", "M", "blocks", "ops", "lower us/op", "engine us/op", "estimate us/op")
    )
    predict(plan_of(model="mhc-3b", layout={"pp": 2}, microbatches=8), PROFILE)  # machine code
    mhc = MODELS["mhc-27b"]
    cases = [(p, 64, 30) for p in (2, 4, 8, 16, 32)]
    cases += [(8, m, 30) for m in (16, 32, 128, 256)]
    cases += [(8, 64, blocks) for blocks in (60, 120)]
    for p, m, blocks in cases:
        model = mhc.model_copy(update={"num_blocks": blocks})
        try:
            plan = plan_of(model=model.model_dump(), layout={"pp": p}, microbatches=m)
        except SpecError:  # 32 ranks have no work for 30 blocks
            continue
        block = resolve_recompute_block(plan)
        lower(plan, block)  # records the templates

        def anew(plan: PlanSpec = plan, block: int | None = block) -> None:
            tiling.forget()
            lower(plan, block)

        _, lowering = timed(anew, max(repeats // 4, 3))
        program = lower(plan, block)
        table = cost_model_of(PROFILE).table(program.cost_keys)
        _, engine = timed(lambda program=program, table=table: simulate(program, table, "compiled"))
        _, estimated = timed(lambda plan=plan: estimate([plan], PROFILE))
        per_op = [1e3 * t.cpu_ms / program.num_ops for t in (lowering, engine, estimated)]
        section.rows.append((p, m, blocks, program.num_ops, *per_op))
    return section


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How fast a what-if is, from plan to report.")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of what is short")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    makers = dict(zip(SECTIONS, (what_if, sweep, cold, trace, growth), strict=True))
    wanted = options.only.split(",")
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        parser.error(f"--only {unknown[0]}: it is one of {', '.join(SECTIONS)}")
    console = Console()
    sections: list[Section] = []
    for name in wanted:
        sections.append(makers[name](options.repeats))
        _print(console, sections[-1])
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MB
    load = os.getloadavg()[0]
    console.print(f"peak memory of this process {peak_mb:.0f} MB; load of the machine {load:.1f}")
    if options.json:
        figures = {"sections": [asdict(s) for s in sections], "peak_mb": peak_mb, "load": load}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


def _print(console: Console, section: Section) -> None:
    table = Table(*section.columns, title=section.title, title_justify="left")
    for row in section.rows:
        table.add_row(*(f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)
    for note in section.notes:
        console.print(note)


if __name__ == "__main__":
    main()
