"""The tables of docs/kernels.md are those of the measurements kept in benchmarks/."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import kernels_page as page


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return json.loads(page.RUN.read_text(encoding="utf-8"))


def test_the_page_holds_the_tables_of_the_measurements(run: dict[str, Any]) -> None:
    kept = page.PAGE.read_text(encoding="utf-8")
    assert kept == page.written(kept, run), "python benchmarks/kernels_page.py --write"


def test_a_site_with_a_later_kernel_trades_that_kernel_alone(run: dict[str, Any]) -> None:
    row = page.ordered(run)[0]
    for site, kernel in page.CHANGED.items():
        now = page.later(run)[kernel, row["T"], row["C"]]["us"]
        assert page.with_later(run, row, site) - now == pytest.approx(
            row[site]["us"] - row[kernel]["us"]
        )


def test_percents_are_floor_over_time(run: dict[str, Any]) -> None:
    """Of the run and of what was timed later, from bytes, time and the copy of its own run."""
    row = page.ordered(run)[0]
    elements = {"project": 4, "site forward": 18, "site forward + backward": 46}
    for name, c_elements in elements.items():
        floor_us = c_elements * row["C"] * 2 * row["T"] / row["copy_bytes_per_second"] * 1e6
        assert row[name]["percent"] == pytest.approx(100 * floor_us / row[name]["us"], rel=1e-2)
    copy = run["later"]["copy_bytes_per_second"]
    elements = {"pre backward (I + W)": 13, "post_res + project": 9}
    for (kernel, tokens, channels), later in page.later(run).items():
        floor_us = elements[kernel] * channels * 2 * tokens / copy * 1e6
        assert later["percent"] == pytest.approx(100 * floor_us / later["us"], rel=1e-2)
