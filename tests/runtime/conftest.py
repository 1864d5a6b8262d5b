"""Runtime tests start processes; those run plain torch, whatever other tests of the worker set."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Keep Triton's interpreter, which kernel tests ask for, out of the processes started here."""
    asked = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return (yield)
    finally:
        if asked is not None:
            os.environ["TRITON_INTERPRET"] = asked
