"""What a person sees: standard output and standard error through rich.

rich itself minds ``NO_COLOR``, terminals without colour and the terminal's width.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_PATIENCE_SECONDS = 1.0
_SLOW_SECONDS = 4.0
COMPILES = "(a first run compiles)"
_PLAIN_WIDTH = 110  # columns of tables that go to a file or a pipe


class _Output(Console):
    """Leaves a reader that stopped reading to the command line; rich would exit 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def output() -> Console:
    """Standard output: as wide as the terminal, or wide enough for the tables."""
    plain = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return _Output(width=_PLAIN_WIDTH if plain else None, highlight=False)


@contextmanager
def progress(what: str, if_slow: str = "") -> Generator[None]:
    """A spinner on standard error while something takes long, if a person is watching.

    After some seconds it also says ``if_slow``: why it may take so long.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"mhcplan: {what}") as status:
        slow = Timer(_SLOW_SECONDS, lambda: status.update(f"mhcplan: {what} {if_slow}"))
        slow.start()
        try:
            yield
        finally:
            slow.cancel()


def note(text: str) -> None:
    """One line on standard error."""
    print(f"mhcplan: {text}", file=sys.stderr)


@contextmanager
def progress_bar(what: str) -> Generator[Callable[[int, int, str], None]]:
    """A bar on standard error for what takes longer than a second, if a person is watching.

    Yields a function to be called with how much is done, of how much, and a remark.
    """
    from rich.progress import (  # most commands show none
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn(f"mhcplan: {what}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"), console=console, transient=True,
    )  # fmt: skip
    task = bar.add_task(what, remark="")
    begin = time.monotonic()

    def show(done: int, total: int, remark: str = "") -> None:
        bar.update(task, completed=done, total=total, remark=remark)
        if (
            not bar.live.is_started
            and console.is_terminal
            and time.monotonic() - begin > _PATIENCE_SECONDS
        ):
            bar.start()

    try:
        yield show
    finally:
        if bar.live.is_started:  # one that was not would end a line that nobody began
            bar.stop()
