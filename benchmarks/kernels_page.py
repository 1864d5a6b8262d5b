"""Tables of ``docs/kernels.md`` from the measurements kept beside this file.

    python benchmarks/kernels_page.py [--write]

Prints the tables, or writes them into the page between its marks. ``kernels_h100.json`` holds
``rows``, one run of ``benchmarks/kernels.py``; ``later``, what ``kernels_tune.py`` timed of kernels
that changed after it; ``before``, the rows of a run before any tuning; and ``counters`` of Nsight
Compute.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RUN = FOLDER / "kernels_h100.json"
PAGE = FOLDER.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- tables: benchmarks/kernels_page.py -->", "<!-- end of tables -->"

Row = dict[str, Any]

# Microseconds of the best public forward of a site, DeepGEMM's projection with TileKernels' two
# other kernels as in vLLM, by (T, C): another run on an H100 SXM (2026-11-22), where a copy ran at
# 3084 GB/s; and of the best public forward and backward, as % of that copy on the same 46C.
PEER_COPY = 3084e9
PEER_FORWARD_US = {
    (4096, 2560): 132.5, (16384, 2560): 515.0, (4096, 4096): 208.9, (16384, 4096): 817.2,
    (4096, 7168): 364.0, (16384, 7168): 1445.8,
}  # fmt: skip
PEER_BOTH_PERCENT = {
    (4096, 2560): 38, (16384, 2560): 42, (4096, 4096): 47, (16384, 4096): 50,
    (4096, 7168): 57, (16384, 7168): 58,
}  # fmt: skip
ERROR_BARS = {"dx": 2.4e-3, "df": 1.7e-3, "dphi": 2.2e-4, "db": 1.3e-4, "dalpha": 8.5e-4}
PEER_PEAK_MIB = 203  # TileKernels, at 4096 x 2560

# Sites with a kernel that changed after the run: {site: kernel}.
CHANGED = {
    "site forward + backward": "pre backward (I + W)",
    "site forward, cross-site": "post_res + project",
}
WARPS = {
    "long_sb": "device memory", "barrier": "a barrier", "short_sb": "shared memory",
    "lg": "a full load queue", "mio": "the shared-memory queue", "wait": "the instruction before",
    "selected": "nothing, they issue", "not_selected": "their turn",
}  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: text on the left, figures on the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def shape(row: Row) -> tuple[int, int]:
    """``(T, C)``."""
    return row["T"], row["C"]


def later(run: dict[str, Any]) -> dict[tuple[str, int, int], Row]:
    """What was timed of changed kernels, by kernel, T and C."""
    return {(row["kernel"], row["T"], row["C"]): row for row in run["later"]["kernels"]}


def with_later(run: dict[str, Any], row: Row, site: str) -> float:
    """Microseconds of ``site`` with its changed kernel's time in place of the one it ran with."""
    kernel = CHANGED[site]
    now = later(run)[kernel, row["T"], row["C"]]["us"]
    return row[site]["us"] - row[kernel]["us"] + now


def bars(run: dict[str, Any]) -> str:
    """What is asked for, what the run reached, and what it comes to with the later kernels."""
    rows = ordered(run)
    long = [row for row in rows if row["T"] == 16384]
    short = [row for row in rows if row["T"] == 4096]
    small = next(row for row in rows if shape(row) == (4096, 2560))
    both, cross = CHANGED
    scale = PEER_COPY / run["copy_bytes_per_second"]

    def slashed(values: list[float], digits: int = 1) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in values)

    def both_lines(chosen: list[Row]) -> list[str]:
        ran = [row[both] for row in chosen]
        now = [
            site["percent"] * site["us"] / with_later(run, row, both)
            for row, site in zip(chosen, ran, strict=True)
        ]
        best = " / ".join(str(PEER_BOTH_PERCENT[shape(row)]) for row in chosen)
        return [best, slashed([site["percent"] for site in ran]), slashed(now)]

    def times_faster(by: float, worked_out: bool) -> str:
        return slashed([
            by * PEER_FORWARD_US[shape(row)]
            / (with_later(run, row, cross) if worked_out else row[cross]["us"])
            for row in long
        ], 3)  # fmt: skip

    long_best, long_ran, long_now = both_lines(long)
    short_best, short_ran, short_now = both_lines(short)
    return table(
        ["C = 2560 / 4096 / 7168", "best peer", "bar", "the run", "with later kernels"],
        [
            ["forward + backward, T = 16384, % of a copy on 46C", long_best, "80",
             long_ran, long_now],
            ["forward + backward, T = 4096, % on 46C", short_best, "70", short_ran, short_now],
            ["forward alone, T = 16384, % on 18C", "95 / 96 / 95", "95",
             slashed([row["site forward"]["percent"] for row in long]), ""],
            ["cross-site form, T = 16384, times as fast as the best peer's forward", "", "1.15",
             times_faster(1, False), times_faster(1, True)],
            ["the same, each against the copy of its own run", "", "",
             times_faster(scale, False), times_faster(scale, True)],
            ["recompute of 8 sites, 4096 x 2560, %", "77", "90",
             slashed([small["recompute 8 sites"]["percent"]]), ""],
            ["peak memory of forward + backward, 4096 x 2560, MiB", str(PEER_PEAK_MIB),
             str(PEER_PEAK_MIB), f"{mib(small):.0f}", ""],
            *[[f"error of {name} against float64, 4096 x 2560", f"{bar:.1e}", f"{bar:.1e}",
               f"{small['errors'][name]:.1e}", ""] for name, bar in ERROR_BARS.items()],
            ["bitwise equal run to run", "some", "yes",
             "yes" if all(row["repeats"] for row in rows) else "no", ""],
        ],
    )  # fmt: skip


def mib(row: Row) -> float:
    """Peak of a site's forward and backward above what was there before."""
    return row["peak_mb"] * 1e6 / 2**20


def ordered(run: dict[str, Any]) -> list[Row]:
    """The run's rows by T, then C."""
    return sorted(run["rows"], key=shape)


def lines(rows: list[Row]) -> list[str]:
    """Names of what was timed at every shape, in order: our kernels, then sites."""
    return [
        name
        for name, value in rows[0].items()
        if isinstance(value, dict) and "percent" in value and all(name in row for row in rows)
    ]


def kernels(rows: list[Row]) -> str:
    """Microseconds and percent of a copy of every kernel and of whole sites."""
    head = ["us (% of a copy)", *(f"{row['T']} x {row['C']}" for row in rows)]
    cells = [
        [name, *(f"{row[name]['us']:.0f} ({row[name]['percent']:.0f})" for row in rows)]
        for name in lines(rows)
    ]
    host = ["host, eager", *(f"{row['host_us']:.0f}" for row in rows)]
    peak = ["peak memory, MiB", *(f"{mib(row):.0f}" for row in rows)]
    return table(head, [*cells, host, peak])


def changes(run: dict[str, Any]) -> str:
    """Percent of a copy of every kernel before tuning, in the run, and later."""
    rows = ordered(run)
    old = {shape(row): row for row in run["before"]["rows"]}
    new = later(run)
    cells: list[list[str]] = []
    for name in lines(rows):
        steps: list[str] = []
        for row in rows:
            figures = [old[shape(row)][name]["percent"], row[name]["percent"]]
            if (name, *shape(row)) in new:
                figures.append(new[name, *shape(row)]["percent"])
            steps.append(" → ".join(f"{figure:.0f}" for figure in figures))
        cells.append([name, *steps])
    return table(["% of a copy", *(f"{row['T']} x {row['C']}" for row in rows)], cells)


def counters(run: dict[str, Any]) -> str:
    """What was busy, and what warps waited for."""
    cells: list[list[str]] = []
    for kernel in run["counters"]:
        waits = list(kernel["warps_percent"].items())[:4]
        cells.append([
            kernel["kernel"],
            *(f"{kernel[unit]:.0f}" for unit in (
                "dram_percent", "l2_percent", "issue_percent", "occupancy_percent")),
            ", ".join(f"{WARPS[stall]} {percent:.0f}" for stall, percent in waits),
        ])  # fmt: skip
    return table(
        ["% of peak", "DRAM", "L2", "issue slots", "warps", "what warps wait for, % of samples"],
        cells,
    )


def tables(run: dict[str, Any]) -> str:
    """Everything between the page's marks."""
    copies = [run["copy_bytes_per_second"], run["later"]["copy_bytes_per_second"]]
    copy = " and ".join(f"{copy / 1e9:.0f}" for copy in copies)
    return "\n\n".join([
        f"{run['device']}, torch {run['torch']}, triton {run['triton']}; a copy ran at {copy} GB/s "
        "in the run and in the later one.",
        "### Bars", bars(run),
        "### Times of the run", kernels(ordered(run)),
        "### Before tuning → the run → later", changes(run),
        "### Counters", counters(run),
    ])  # fmt: skip


def written(page: str, run: dict[str, Any]) -> str:
    """``page`` with its tables made anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables(run)}\n\n{END}{after}"


def main() -> None:
    """Print, or write into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead")
    arguments = parser.parse_args()
    run = json.loads(RUN.read_text(encoding="utf-8"))
    if arguments.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), run), encoding="utf-8")
    else:
        print(tables(run))


if __name__ == "__main__":
    main()
