"""The commands that predict many plans: sweep and plan."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt

from mhcplan.planner.cli.axis_flags import AxisFlags
from mhcplan.planner.cli.predict import Source
from mhcplan.planner.cli.terminal import note, output, progress_bar
from mhcplan.planner.output import write_file
from mhcplan.planner.plan.file import plan_text
from mhcplan.planner.plan.spec import SpecError
from mhcplan.planner.report.text import ms
from mhcplan.planner.search.branch_and_bound import Found
from mhcplan.planner.search.find import Method, quests
from mhcplan.planner.search.report import SearchReport
from mhcplan.planner.search.text import print_search
from mhcplan.planner.sweep.farm import Backend
from mhcplan.planner.sweep.run import Progress, Sweep, SweepOptions, SweepRun
from mhcplan.planner.sweep.store import StoreError, SweepStore, default_store
from mhcplan.planner.sweep.text import ESTIMATED, csv_text, json_lines, parquet_bytes, print_sweep

NOTHING_FEASIBLE = 1

Switch = Annotated[bool, Parameter(negative=())]


def sweep(
    source: Source,
    /,
    *,
    axes: AxisFlags | None = None,
    fast: Switch = False,
    exact: Switch = False,
    json: Switch = False,
    csv: Path | None = None,
    parquet: Path | None = None,
    store: Path | None = None,
    no_store: Switch = False,
    fresh: Switch = False,
    jobs: PositiveInt | None = None,
    backend: Backend = "local",
) -> int:
    """Predict every combination of the values given, on all cores; none is worked out twice.

    Finished points are kept in a store, so a sweep that was stopped goes on where it was.
    Exits 1 if no plan fits.

        mhcplan sweep mhc-27b --n 1,2,4 --pp 4,8 --global-batch 512
        mhcplan sweep plan.toml --microbatches 16..64..16 --set p2p=eager,grouped --csv sweep.csv
        mhcplan sweep mhc-27b --schedule dualpipe,zbv --recompute-block none,auto,1..8 --fast

    Args:
        source: a model preset, or a plan file (.toml)
        axes: fields and their values
        fast: estimate by the longest path, a lower bound that leaves out contention and the power
            limit, and let the engine play the best
        exact: play every plan by the engine (the default)
        json: print a JSON object a line instead of a table
        csv: write all rows to this file
        parquet: write all rows to this file (needs the extra sweep)
        store: SQLite file of finished points; without it, one in your folder for caches
        no_store: neither read nor keep finished points
        fresh: work out again what the store knows
        jobs: processes; without it, one a core, or all that the cluster has
        backend: local processes, or a cluster found as RAY_ADDRESS or DASK_SCHEDULER_ADDRESS say
    """
    if fast and exact:
        raise SpecError("--fast and --exact exclude each other")
    options = SweepOptions(
        method="estimate" if fast else "engine", backend=backend, jobs=jobs, fresh=fresh,
        store=None if no_store else store or _usual_store(),
    )  # fmt: skip
    run = SweepRun(source, (axes or AxisFlags()).axes(), options)
    try:
        with progress_bar("sweep") as show:
            run.work(lambda at: show(at.done, at.total, _remark(at)))
    except KeyboardInterrupt:
        _write(run.result(), json=json, csv=csv, parquet=parquet)
        if options.store is not None:
            note("what is finished is kept in the store; the same command goes on from there")
        raise
    result = run.result()
    _write(result, json=json, csv=csv, parquet=parquet)
    return 0 if result.feasible else NOTHING_FEASIBLE


def _usual_store() -> Path | None:
    """The store in the folder for caches; where that cannot be had, none, which is said."""
    path = default_store()
    try:
        with SweepStore(path):
            return path
    except StoreError as error:
        note(f"{error}: finished points are not kept (--store names another place)")
        return None


def _remark(at: Progress) -> str:
    return f"{at.stored} known from before" if at.stored else ""


def _write(result: Sweep, *, json: bool, csv: Path | None, parquet: Path | None) -> None:
    """Print a sweep and write its files, also for a reader who leaves early; what cannot be
    written is said after all is shown."""
    try:
        if json:
            print(json_lines(result.rows), end="")
            if any(row.method == "estimate" for row in result.rows):
                note(ESTIMATED)
        else:
            print_sweep(result, output())
        for text in result.notes:
            note(text)
    finally:
        if csv is not None:
            write_file(csv, csv_text(result))
        if parquet is not None:
            write_file(parquet, parquet_bytes(result))


def plan(
    source: Source,
    /,
    *,
    gpus: PositiveInt,
    memory_gib: PositiveFloat | None = None,
    axes: AxisFlags | None = None,
    seconds: PositiveFloat = 45.0,
    jobs: PositiveInt | None = None,
    backend: Backend = "local",
    method: Method = "auto",
    json: Switch = False,
    file: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
) -> int:
    """Find the plan of the fastest step on given GPUs, and say how far that is proven.

    Searches pp, ep, dp, micro-batch size, schedule, recompute block and priority; a flag narrows
    its field to the values given, --set searches further fields. Every plan trains the same
    sequences a step. n is yours to choose; a list of n gives an answer for each.
    Exits 1 if nothing fits.

        mhcplan plan mhc-27b --gpus 64 --memory-gib 80
        mhcplan plan mhc-27b --gpus 128 --schedule dualpipe,dualpipev --global-batch 1024
        mhcplan plan plan.toml --gpus 64 --pp 8 --n 2,4 -o best.toml

    Args:
        source: a model preset, or a plan file (.toml)
        gpus: how many there are: pp x ep x dp
        memory_gib: memory of one GPU in GiB; without it, that of the profile's GPU
        axes: values to choose from
        seconds: when to stop with what is found
        jobs: processes; without it, one a core, or all that the cluster has
        backend: local processes, or a cluster found as RAY_ADDRESS or DASK_SCHEDULER_ADDRESS say
        method: exact bounds the whole space, sampled lets Optuna choose, auto takes what suits
        json: print a JSON object instead of text, one a line for each n
        file: write the best plan to this file (.toml)
    """
    axes = axes or AxisFlags()
    asked = quests(source, gpus, memory_gib, axes.axes())
    if file is not None and len(asked) > 1:
        raise SpecError("--output takes one plan: give one value of --n")
    limit = [] if memory_gib is None else ["--memory-gib", f"{memory_gib:g}"]
    command = shlex.join(
        ["mhcplan", "plan", source, "--gpus", str(gpus), *limit, *axes.arguments()]
    )
    found = False
    for quest in asked:
        run = quest.begin(method)
        try:
            with run.farm(backend, jobs) as farm, progress_bar(f"plan, n={quest.rate}") as show:
                run.search.run(farm, seconds / len(asked), lambda at: show(*_at(at)))
        finally:  # also what an interrupted search has found
            report = run.report(command)
            _show(report, json=json, file=file)
        found |= bool(report.best)
    return 0 if found else NOTHING_FEASIBLE


def _at(found: Found) -> tuple[int, int, str]:
    tally = found.tally
    best = f"best {ms(found.candidates[0].merit[0])} ms" if found.candidates else ""
    return tally.total - tally.unknown, tally.total, best


def _show(report: SearchReport, *, json: bool, file: Path | None) -> None:
    try:
        if json:
            print(report.model_dump_json())
        else:
            print_search(report, output())
    finally:
        if file is not None and report.best:
            write_file(file, plan_text(report.best[0].plan))
            note(f"wrote {file}; now: mhcplan predict {shlex.quote(str(file))}")
