"""How fast plans are swept and searched, and how far a search is from trying everything.

    PYTHONPATH=src python -m benchmarks.search [--only sweep,plan,clusters] [--json out.json]

``sweep``: 1,000 plans of mhc-27b, by the fast estimate and by the engine, on one core and on all,
then once more from the store; each in a new process. ``plan``: 64 GPUs of 80 GiB, what was proven
in how long. ``clusters``: the same points on a Dask and a Ray cluster of two workers. CPU time is
printed beside wall time, so that a busy machine shows.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mhcplan.planner.search.find import find_plans
from mhcplan.planner.search.text import print_search
from mhcplan.planner.sweep.axes import axes_of
from mhcplan.planner.sweep.run import Sweep, SweepOptions, sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTS = ("sweep", "plan", "clusters")
AXES = axes_of(
    {
        "residual.expansion_rate": "1,2,4,8",
        "residual.recompute_block": "none,auto,2,4,stage",
        "layout.pp": "2,4,6,8,10",
        "microbatches": "32,64",
        "schedule": "1f1b,zb1p,zbv,dualpipe,dualpipev",
    },
    [],
)
SMALL = axes_of({"residual.expansion_rate": "1,2,4", "microbatches": "32..64..2"}, [])


@dataclass
class Row:
    """One thing that was timed; CPU seconds of this process and its children."""

    what: str
    points: int
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def per_second(self) -> float:
        return self.points / self.wall_s

    @property
    def per_cpu_second(self) -> float:
        return self.points / self.cpu_s


@contextmanager
def timed(row: Row) -> Iterator[None]:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield
    row.wall_s, row.cpu_s = time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """Of this process and of those that have ended; workers are let go by the end of a sweep."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in used)


def sweeps() -> Iterator[tuple[Row, Sweep]]:
    with tempfile.TemporaryDirectory() as folder:
        kept = SweepOptions(store=Path(folder) / "store")
        for what, options in (
            ("estimate, one process", SweepOptions(method="estimate", jobs=1)),
            ("estimate, all cores", SweepOptions(method="estimate")),
            ("engine, all cores", kept),
            ("engine, from the store", kept),
        ):
            yield _alone(what, options)


def clusters() -> Iterator[tuple[Row, Sweep]]:
    yield _swept("engine, local, 2 workers", SweepOptions(jobs=2), small=True)
    for backend, module in (("dask", "distributed"), ("ray", "ray")):
        if find_spec(module) is None:
            print(f"{backend} is not installed", file=sys.stderr)
            continue
        options = replace(SweepOptions(jobs=2), backend=backend)  # pyright: ignore[reportArgumentType]
        yield _swept(f"engine, {backend}, 2 workers", options, small=True)


def _alone(what: str, options: SweepOptions) -> tuple[Row, Sweep]:
    """Swept by a new process, which has kept nothing of other sweeps."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_swept, what, options).result()


def _swept(what: str, options: SweepOptions, *, small: bool = False) -> tuple[Row, Sweep]:
    gc.set_threshold(200_000, 20, 20)  # as the command line does; workers follow
    row = Row(what, 0)
    with timed(row):
        swept = sweep("mhc-27b", SMALL if small else AXES, options)
    row.points = swept.total
    return row, swept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    console, rows, results = Console(), list[Row](), list[list[object]]()
    for part, work in (("sweep", sweeps), ("clusters", clusters)):
        if part not in parts:
            continue
        table = Table(title=part)
        for name in ("", "points", "wall s", "CPU s", "points/s", "points/CPU s"):
            table.add_column(name, justify="left" if not name else "right")
        for row, swept in work():
            rows.append(row)
            results.append([r.figures for r in swept.rows if r.method == "engine"])
            table.add_row(
                row.what, f"{row.points:,}", f"{row.wall_s:.2f}", f"{row.cpu_s:.2f}",
                f"{row.per_second:,.0f}", f"{row.per_cpu_second:,.0f}",
            )  # fmt: skip
            if (worst := swept.worst_deviation_percent) is not None:
                best = len(swept.confirmed)
                console.print(f"{row.what}: {worst:.2f} % too short at worst, of the best {best}")
        console.print(table)
        equal = [figures for figures in results if figures]
        console.print(f"equal figures: {all(f == equal[0] for f in equal)}")
        results.clear()
    if "plan" in parts:
        row = Row("plan mhc-27b, 64 GPUs of 80 GiB", 0)
        with timed(row):
            (report,) = find_plans("mhc-27b", 64, 80)
        row.points = report.space.plans
        rows.append(row)
        print_search(report, console)
        console.print(f"{row.wall_s:.1f} s wall, {row.cpu_s:.1f} s CPU")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
