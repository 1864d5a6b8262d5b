"""Runtime tests start processes; those run plain torch, whatever other tests of the worker set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator


@pytest.fixture(scope="module", autouse=True)
def plain_torch() -> Generator[None]:
    """Keep Triton's interpreter, which kernel tests ask for, out of the processes started here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield
