"""docs/results.md is what its commands print with the present code and profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import document, plans
from mhcplan.profiles.store import find_profile

PROFILE = "h100-sxm"
AGAIN = "docs/results.md is old: python -m benchmarks.results --write"


@pytest.fixture(scope="module")
def kept() -> str:
    return (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_document_is_of_the_present_profile(kept: str) -> None:
    assert find_profile(PROFILE).digest in kept, AGAIN
    assert [line for line in kept.splitlines() if line.startswith("`python -m")] == [
        f"`python -m benchmarks.results {name}`" for name in document.SECTIONS
    ], AGAIN


@pytest.mark.parametrize("name", ["replay", "replay-measures", "bubbles", "latency"])
def test_quick_sections_are_current(kept: str, name: str) -> None:
    assert document.section(name, PROFILE) in kept, AGAIN


def test_default_row_is_current(kept: str) -> None:
    """One of the rows that take long; all of them come from the same commands."""
    row = plans.predicted(find_profile(PROFILE))
    line = f"| default | {row.report.step_time_ns / 1e6:,.2f} | +0.00 |"
    assert line in kept, AGAIN
