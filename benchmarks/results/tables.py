"""A section of the results: a table between two pieces of text, as Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A table of figures and what to say of it.

    Attributes:
        title: heading.
        about: what was predicted, and with which assumptions.
        columns, rows: the table; the first column is text, the others are figures.
        reading: what the figures mean, with figures taken from them.
    """

    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    reading: str = ""

    def markdown(self, name: str) -> str:
        """The section, and the command that prints it."""
        lines = [
            f"## {self.title}", "", self.about, "",
            _line(self.columns), "|---|" + "---:|" * (len(self.columns) - 1),
            *map(_line, self.rows), "",
        ]  # fmt: skip
        if self.reading:
            lines += [self.reading, ""]
        return "\n".join([*lines, f"`python -m benchmarks.results {name}`", ""])


def ms(ns: float) -> str:
    """Nanoseconds as milliseconds."""
    return f"{ns / 1e6:,.2f}"


def gb(num_bytes: float) -> str:
    """Bytes as GB (10^9)."""
    return f"{num_bytes / 1e9:,.2f}"


def percent(share: float) -> str:
    """A difference in percent, with its sign."""
    return f"{share:+.2f}"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
