"""A command line, run in the test's own process."""

from __future__ import annotations

from collections.abc import Callable

# words of the command line to (exit code, standard output, standard error)
Run = Callable[..., tuple[int, str, str]]
