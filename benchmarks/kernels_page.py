"""Tables of ``docs/kernels.md`` from the measurements kept beside this file.

    python benchmarks/kernels_page.py [--write]

Prints the tables, or writes them into the page between its marks. ``kernels_h100.json`` holds
``rows``, one run of ``benchmarks/kernels.py``; ``hc``, what it wrote with ``--residual hc``;
``h200``, both on an H200; ``beside_peers``, runs with peers beside ours; ``elsewhere``, public
peers measured side by side on another H100; and ``counters`` of Nsight Compute.
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

ERROR_BARS = {"dx": 2.4e-3, "df": 1.7e-3, "dphi": 2.2e-4, "db": 1.3e-4, "dalpha": 8.5e-4}
LEANEST = "TileKernels"  # the peer whose peak memory is the bar
FORWARD, BOTH = 18, 46  # C elements a token that have to move
WARPS = {
    "long_scoreboard": "device memory", "short_scoreboard": "shared memory",
    "barrier": "a barrier", "lg_throttle": "a full load queue",
    "mio_throttle": "the shared-memory queue", "wait": "the instruction before",
    "selected": "nothing, they issue", "not_selected": "their turn", "drain": "stores to drain",
}  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: text on the left, figures on the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def shape(row: Row) -> tuple[int, int]:
    """``(T, C)``."""
    return row["T"], row["C"]


def percent(elements: int, at: tuple[int, int], us: float, copy: float) -> float:
    """% of a copy that moves ``elements`` C elements of 2 bytes a token, in ``us``."""
    tokens, channels = at
    return 100 * elements * channels * 2 * tokens / copy * 1e6 / us


def best_peers(run: dict[str, Any], key: str) -> dict[tuple[int, int], float]:
    """Microseconds of the fastest public peer that computes mHC, elsewhere, by (T, C)."""
    best: dict[tuple[int, int], float] = {}
    for peer in run["elsewhere"]["peers"]:
        if peer[key] is not None and peer["same_function"]:
            best[shape(peer)] = min(best.get(shape(peer), float("inf")), peer[key])
    return best


def slashed(values: list[float], digits: int = 1) -> str:
    """Figures of several widths in one cell."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def bars(run: dict[str, Any]) -> str:
    """What is asked for, and what the run reached."""
    rows = ordered(run)
    long = [row for row in rows if row["T"] == 16384]
    short = [row for row in rows if row["T"] == 4096]
    small = next(row for row in rows if shape(row) == (4096, 2560))
    forward, both = (best_peers(run, key) for key in ("forward_us", "both_us"))
    there, here = run["elsewhere"]["copy_bytes_per_second"], run["copy_bytes_per_second"]

    def best(elements: int, us: dict[tuple[int, int], float], chosen: list[Row]) -> str:
        return slashed([percent(elements, shape(row), us[shape(row)], there) for row in chosen], 0)

    def ran(site: str, chosen: list[Row]) -> str:
        return slashed([row[site]["percent"] for row in chosen])

    peak = small["peak_mib"]
    faster = [forward[shape(row)] / row["site forward, cross-site"]["us"] for row in long]
    lean = next(
        peer["peak_mib"] for peer in run["elsewhere"]["peers"]
        if peer["peer"] == LEANEST and shape(peer) == shape(small)
    )  # fmt: skip
    return table(
        ["C = 2560 / 4096 / 7168", "best peer", "bar", "the run"],
        [
            ["forward + backward, T = 16384, % of a copy on 46C", best(BOTH, both, long), "80",
             ran("site forward + backward", long)],
            ["the same at T = 4096", best(BOTH, both, short), "70",
             ran("site forward + backward", short)],
            ["forward alone, T = 16384, % on 18C", best(FORWARD, forward, long), "95",
             ran("site forward", long)],
            ["cross-site form, T = 16384, times as fast as the best peer's forward", "", "1.15",
             slashed(faster, 3)],
            ["the same, each against the copy of its own run", "", "",
             slashed([ratio * there / here for ratio in faster], 3)],
            ["recompute of 8 sites, 4096 x 2560, %", "77", "90",
             slashed([small["recompute 8 sites"]["percent"]])],
            ["peak memory of forward + backward, 4096 x 2560, MiB", f"{lean:.1f}",
             f"{lean:.1f}", f"{peak:.1f}{' (missed)' if peak > lean else ''}"],
            *[[f"error of {name} against float64, 4096 x 2560", f"{bar:.1e}", f"{bar:.1e}",
               f"{small['errors'][name]:.1e}"] for name, bar in ERROR_BARS.items()],
            ["bitwise equal run to run", "some", "yes",
             "yes" if all(row["repeats"] for row in rows) else "no"],
        ],
    )  # fmt: skip


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
    peak = ["peak memory, MiB", *(f"{row['peak_mib']:.0f}" for row in rows)]
    return table(head, [*cells, peak])


def hyper_connections(run: dict[str, Any]) -> str:
    """The same of HC, with its errors, which mHC has among its bars."""
    rows = ordered(run)
    checked = next(row for row in rows if "errors" in row)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in checked["errors"].items())
    repeats = "" if all(row["repeats"] for row in rows) else "not "
    return (
        f"{kernels(rows)}\n\n"
        f"A copy ran at {run['copy_bytes_per_second'] / 1e9:.0f} GB/s. "
        f"Results were {repeats}bitwise equal run to run.\n"
        f"Errors against float64 at {checked['T']} x {checked['C']}: {errors}."
    )


def peers(run: dict[str, Any]) -> str:
    """Public ways to run a site of 4096 tokens x 2560, each against the copy of its own run."""
    elsewhere, at = run["elsewhere"], (4096, 2560)

    def line(name: str, row: Row, copy: float, where: str) -> list[str]:
        def cell(elements: int, us: float | None) -> str:
            return "" if us is None else f"{us:.0f} ({percent(elements, at, us, copy):.0f})"

        peak = row.get("peak_mib")
        return [
            name, cell(FORWARD, row["forward_us"]), cell(BOTH, row["both_us"]),
            "" if peak is None else f"{peak:.0f}", where,
        ]  # fmt: skip

    here = [
        line(name, row, beside["copy_bytes_per_second"], f"beside {number}")
        for number, beside in enumerate(run["beside_peers"], 1)
        for name, row in beside.items()
        if isinstance(row, dict)
    ]
    there = [
        line(row["peer"], row, elsewhere["copy_bytes_per_second"], "elsewhere")
        for row in sorted(elsewhere["peers"], key=lambda row: row["both_us"] or 0)
        if shape(row) == at
    ]
    return table(
        ["4096 x 2560, us (% of a copy)", "forward", "forward + backward", "peak, MiB", "run"],
        here + there,
    )


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
    copy = run["copy_bytes_per_second"]
    return "\n\n".join([
        f"{run['device']}, torch {run['torch']}, triton {run['triton']}; a copy ran at "
        f"{copy / 1e9:.0f} GB/s.",
        "### Bars", bars(run),
        "### Times", kernels(ordered(run)),
        "### Times of HC", hyper_connections(run["hc"]),
        "### Times on an H200",
        f"{run['h200']['device']}; a copy ran at "
        f"{run['h200']['copy_bytes_per_second'] / 1e9:.0f} GB/s.",
        kernels(ordered(run["h200"])),
        "HC:", hyper_connections(run["h200"]["hc"]),
        "### Peers", peers(run),
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
