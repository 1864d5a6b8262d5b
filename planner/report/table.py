"""Tables for a terminal: no wider than their words and figures need, so that 80 columns hold them.

Names of columns are broken into lines before a table grows, words wrap before figures do, and a
figure is never cut: half a figure is a wrong one.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

_FIGURE = re.compile(r"[-+]?\d[\d,.]*( GB|x|%)?|-|")
_WORDS_AT_LEAST = 12  # letters that a column of words is left with
# looks, the first that fits is taken: letters of a column's name in a line, spaces between columns
_LOOKS = ((12, 2), (1, 2), (1, 1))
_ENDLESS = 100_000  # columns: measured for a terminal of its own width, every table fits


@dataclass(frozen=True)
class Section:
    """A table with a title; a row named "step" is the total."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_section(
    section: Section, console: Console, styles: Sequence[str | None] | None = None
) -> None:
    """Write one table, an empty line and its title above it; ``styles``: of its rows."""
    from rich.text import Text

    section = _without_empty(section)
    styles = styles or ["bold" if row[0] == "step" else None for row in section.rows]
    console.print()
    if section.title:
        console.print(Text(section.title, style="bold"), soft_wrap=True)
    console.print(_fitting(section, styles, console), soft_wrap=True)


def _fitting(section: Section, styles: Sequence[str | None], console: Console) -> Table:
    """The table in the first look that fits; in the last one, too wide if it must be."""
    endless = console.options.update(width=_ENDLESS)
    *looks, last = _LOOKS
    for look in looks:
        table = _table(section, styles, *look)
        if console.measure(table, options=endless).maximum <= console.width:
            return table
    table = _table(section, styles, *last)
    wanted = console.measure(table, options=endless)
    if wanted.maximum > console.width:
        table.width = max(wanted.minimum, console.width)
    return table


def _table(section: Section, styles: Sequence[str | None], name_width: int, gap: int) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True,
        padding=(0, gap - 1), show_header=any(section.columns),
    )  # fmt: skip
    columns = _columns(section)
    widths = [max(map(len, cells), default=0) for cells in columns]
    names = [
        textwrap.wrap(name, max(width, name_width), break_long_words=False, break_on_hyphens=False)
        for name, width in zip(section.columns, widths, strict=True)
    ]
    tallest = max(map(len, names), default=0)
    for name, cells, width in zip(names, columns, widths, strict=True):
        words = not all(map(_FIGURE.fullmatch, cells))
        table.add_column(
            Text("\n".join([*[""] * (tallest - len(name)), *name])),
            justify="left" if words else "right", no_wrap=not words, overflow="fold",
            min_width=min(width, _WORDS_AT_LEAST) if words else width,
        )  # fmt: skip
    for row, style in zip(section.rows, styles, strict=True):
        table.add_row(*map(Text, row), style=style)
    return table


def _without_empty(section: Section) -> Section:
    """The table without columns that have neither a name nor anything in them."""
    named = zip(section.columns, _columns(section), strict=True)
    said = [bool(name or any(cells)) for name, cells in named]
    rows = tuple(tuple(compress(row, said)) for row in section.rows)
    return Section(section.title, tuple(compress(section.columns, said)), rows)


def _columns(section: Section) -> list[tuple[str, ...]]:
    """Cells by column."""
    return list(zip(*section.rows, strict=True)) or [()] * len(section.columns)
