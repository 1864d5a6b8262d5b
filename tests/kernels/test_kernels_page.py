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


def test_percents_are_floor_over_time(run: dict[str, Any]) -> None:
    """From bytes, time and the copy of the run; and as peers' percents are worked out."""
    elements = {
        "project": 4, "pre backward (I + W)": 13, "post_res + project": 9,
        "site forward": page.FORWARD, "site forward + backward": page.BOTH,
    }  # fmt: skip
    copy = run["copy_bytes_per_second"]
    for row in page.ordered(run):
        for name, c_elements in elements.items():
            us, percent = row[name]["us"], row[name]["percent"]
            floor_us = c_elements * row["C"] * 2 * row["T"] / copy * 1e6
            assert percent == pytest.approx(100 * floor_us / us, rel=1e-2)
            again = page.percent(c_elements, page.shape(row), us, copy)
            assert percent == pytest.approx(again, rel=1e-2)


def test_the_best_peer_is_the_fastest_that_computes_mhc(run: dict[str, Any]) -> None:
    at = (16384, 2560)
    here = [peer for peer in run["elsewhere"]["peers"] if page.shape(peer) == at]
    fastest = min(peer["both_us"] for peer in here if peer["both_us"])
    best = page.best_peers(run, "both_us")[at]
    assert fastest < best  # flash-mHC's mHC-lite does less
    assert best == next(p["both_us"] for p in here if p["peer"] == "TransformerEngine")


def test_what_a_peak_is_made_of_sums_to_it(run: dict[str, Any]) -> None:
    """The page's account, of both GPUs."""
    tokens, channels, n, m = 4096, 2560, 4, 24
    found = [
        next(row["peak_mib"] for row in page.ordered(rows) if page.shape(row) == (tokens, channels))
        for rows in (run, run["h200"])
    ]
    state, dphi = tokens * n * channels * 2, m * n * channels * 4
    returned = 2 * state + 2 * state // n + dphi
    # mix, dmix, projection with 1 / r, dp in two parts of 32 columns of bf16, s
    coefficients = tokens * (4 * m + 4 * m + 4 * (m + 1) + 2 * 2 * 32 + 4)
    assert found == pytest.approx([(returned + coefficients) / 2**20] * 2, abs=0.01)
