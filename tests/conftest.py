"""Settings of all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable

# Workers of pytest-xdist have it; what commands print must not depend on who runs them.
os.environ.pop("COLUMNS", None)

# No test asserts a time: machines are shared, and the first call of a compiled function is slow.
settings.register_profile("mhcplan", deadline=None)
settings.load_profile("mhcplan")


SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"


@pytest.fixture
def published(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``published(name, text)`` asserts that the schema of ``name`` is the text, or writes it."""

    def check(name: str, text: str) -> None:
        path = SCHEMAS / f"{name}.schema.json"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: --update-golden writes it"

    return check


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the only way to rewrite golden files, schemas and documents: ``--update-golden``."""
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden files with today's output"
    )
