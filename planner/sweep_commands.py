"""The commands that predict many plans: sweep and plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from mhcplan.planner.cli_flags import AxisFlags
from mhcplan.planner.commands import Source
from mhcplan.planner.farm import Backend
from mhcplan.planner.output import write_file
from mhcplan.planner.spec import SpecError
from mhcplan.planner.sweep import Progress, Sweep, SweepOptions, SweepRun
from mhcplan.planner.sweep_store import default_store
from mhcplan.planner.sweep_text import csv_text, json_lines, parquet_bytes, print_sweep
from mhcplan.planner.terminal import note, output, progress_bar

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
        fast: estimate by the longest path, a lower bound, and let the engine play the best five
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
        store=None if no_store else store or default_store(),
    )  # fmt: skip
    run = SweepRun(source, (axes or AxisFlags()).axes(), options)
    try:
        with progress_bar("sweep") as show:
            run.work(lambda at: show(at.done, at.total, _remark(at)))
    except KeyboardInterrupt:
        _write(run.result(), json=json, csv=csv, parquet=parquet)
        note("what is finished is kept in the store; the same command goes on from there")
        raise
    result = run.result()
    _write(result, json=json, csv=csv, parquet=parquet)
    return 0 if result.feasible else NOTHING_FEASIBLE


def _remark(at: Progress) -> str:
    return f"{at.stored} known from before" if at.stored else ""


def _write(result: Sweep, *, json: bool, csv: Path | None, parquet: Path | None) -> None:
    """Print a sweep and write its files; what cannot be written is said after all is shown."""
    if json:
        print(json_lines(result.rows), end="")
    else:
        print_sweep(result, output())
    for text in result.notes:
        note(text)
    if csv is not None:
        write_file(csv, csv_text(result))
    if parquet is not None:
        write_file(parquet, parquet_bytes(result))
