"""A sweep for people and for other programs: table, JSON lines, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhcplan.planner.plan.file import FLAG_FIELDS
from mhcplan.planner.report.table import Section, print_section
from mhcplan.planner.report.text import gb, ms
from mhcplan.planner.sweep.row import SWEEP_FORMAT, SWEEP_VERSION, Figures, SweepRow
from mhcplan.planner.sweep.run import ranked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mhcplan.planner.sweep.run import Sweep

ROWS_SHOWN = 40  # of a larger sweep, the best
ESTIMATED = "Estimated: lower bounds of the step's time, without contention and the power limit"

Cell = str | int | float | bool | None

_FLAG_OF = {path: flag.replace("_", "-") for flag, path in FLAG_FIELDS.items()}
_FIGURES = ("overhead %", "step ms", "memory GB", "tokens/s", "")


def json_lines(rows: Sequence[SweepRow]) -> str:
    """A JSON object a line, as ``docs/schemas/sweep.schema.json`` has it."""
    return "".join(row.model_dump_json() + "\n" for row in rows)


def csv_text(sweep: Sweep) -> str:
    """A line a row under a line of names: the axes' paths, then everything of a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = _columns(sweep)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def parquet_bytes(sweep: Sweep) -> bytes:
    """The same columns as :func:`csv_text`, typed, as a Parquet file.

    Raises:
        ImportError: pyarrow is not installed.
    """
    arrow: Any = import_module("pyarrow")  # has no types
    parquet: Any = import_module("pyarrow.parquet")
    table = arrow.table({name: arrow.array(cells) for name, cells in _columns(sweep).items()})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def print_sweep(sweep: Sweep, console: Console) -> None:
    """The answer in a line, then a table: all rows, or the best of many."""
    from rich.text import Text

    console.print(Text(_headline(sweep), style="bold"), soft_wrap=True)
    rows, title = sweep.rows, ""
    if len(rows) > ROWS_SHOWN:
        rows = ranked(rows)[:ROWS_SHOWN]
        title = f"The {ROWS_SHOWN} best by tokens/s of a GPU; --csv and --json have all"
    if any(row.method == "estimate" for row in rows):
        title = f"{title}. {ESTIMATED}" if title else ESTIMATED
    _print_table(sweep, title, rows, console)
    deviation = sweep.worst_deviation_percent
    if deviation is not None:
        title = (
            f"The {len(sweep.confirmed)} most promising, played by the engine: their steps are up"
            f" to {deviation:.1f} % longer than estimated"
        )
        _print_table(sweep, title, sweep.confirmed, console)


def _headline(sweep: Sweep) -> str:
    count = dict.fromkeys(("predicted", "illegal", "unpriced"), 0)
    for row in sweep.rows:
        count[row.status] += 1
    fitting = sum(row.fits for row in sweep.rows)
    combinations = "combination" if sweep.total == 1 else "combinations"
    parts = [f"{sweep.total} {combinations}: {fitting} fit"]
    if count["predicted"] > fitting:
        parts.append(f"{count['predicted'] - fitting} too large")
    if count["illegal"]:
        parts.append(f"{count['illegal']} illegal")
    if count["unpriced"]:
        parts.append(f"{count['unpriced']} unpriced")
    if len(sweep.rows) < sweep.total:
        parts.append(f"{sweep.total - len(sweep.rows)} not finished")
    if sweep.stored:
        parts.append(f"{sweep.stored} known from before")
    return ", ".join(parts)


def _print_table(sweep: Sweep, title: str, rows: Sequence[SweepRow], console: Console) -> None:
    from rich.text import Text

    columns = (*(_FLAG_OF.get(axis.path, axis.path) for axis in sweep.axes), *_FIGURES)
    cells = tuple((*map(_shown, row.values.values()), *_figures(row)) for row in rows)
    styles = [None if row.fits else "dim" for row in rows]
    print_section(Section(title, columns, cells), console, styles)
    reasons = Counter(row.reason for row in rows if row.reason)
    if reasons:
        console.print()
    for reason, count in reasons.most_common():
        console.print(Text(f"{count} x {reason}"), soft_wrap=True)


def _figures(row: SweepRow) -> list[str]:
    figures = row.figures
    if figures is None:
        return ["", "", "", "", row.status]
    over = figures.device_memory_bytes - figures.memory_limit_bytes
    return [
        f"{figures.overhead_percent:+.2f}",
        ms(figures.step_time_ns),
        gb(figures.device_memory_bytes),
        f"{figures.tokens_per_second:,}",
        "" if figures.fits else f"does not fit: {gb(over)} over",
    ]


def _columns(sweep: Sweep) -> dict[str, list[Cell]]:
    """The rows by column: the format, the axes' values, and every field of a row."""
    rows = sweep.rows
    columns: dict[str, list[Cell]] = {
        "format": [SWEEP_FORMAT] * len(rows),
        "format_version": [SWEEP_VERSION] * len(rows),
    }
    for axis in sweep.axes:
        columns[axis.path] = _alike([row.values[axis.path] for row in rows])
    for name in SweepRow.model_fields:
        if name not in ("format", "format_version", "values", "figures"):
            columns[name] = [getattr(row, name) for row in rows]
    for name in Figures.model_fields:
        columns[name] = [row.figures and getattr(row.figures, name) for row in rows]
    return columns


def _alike(values: Sequence[object]) -> list[Cell]:
    """Values of one type for a column; text where they differ, as in ``auto`` and 4."""
    kinds = {type(value) for value in values}
    if len(kinds) == 1 and kinds <= {int, float, bool}:
        return list(values)  # pyright: ignore[reportReturnType] - of these types, as just seen
    return [_shown(value) for value in values]


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
