"""Settings of all tests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypothesis import settings

if TYPE_CHECKING:
    import pytest

# Workers of pytest-xdist have it; what commands print must not depend on who runs them.
os.environ.pop("COLUMNS", None)

# No test asserts a time: machines are shared, and the first call of a compiled function is slow.
settings.register_profile("mhcplan", deadline=None)
settings.load_profile("mhcplan")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the only way to rewrite golden files and what documents show: ``--update-golden``."""
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden files with today's output"
    )
