"""Settings of all tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import settings

if TYPE_CHECKING:
    import pytest

# No test asserts a time: machines are shared, and the first call of a compiled function is slow.
settings.register_profile("mhcplan", deadline=None)
settings.load_profile("mhcplan")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the only way to rewrite golden files and what documents show: ``--update-golden``."""
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden files with today's output"
    )
