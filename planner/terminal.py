"""What a person sees: standard output and standard error through rich.

rich itself minds ``NO_COLOR``, terminals without colour and the terminal's width.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

_PLAIN_WIDTH = 110  # columns of tables that go to a file or a pipe


class _Output(Console):
    """Leaves a reader that stopped reading to the command line; rich would exit 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def output() -> Console:
    """Standard output: as wide as the terminal, or wide enough for the tables."""
    plain = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return _Output(width=_PLAIN_WIDTH if plain else None, highlight=False)


def progress(what: str) -> AbstractContextManager[object]:
    """A spinner on standard error while something takes long, if a person is watching."""
    console = Console(stderr=True)
    return console.status(f"mhcplan: {what}") if console.is_terminal else nullcontext()


def note(text: str) -> None:
    """One line on standard error."""
    print(f"mhcplan: {text}", file=sys.stderr)
