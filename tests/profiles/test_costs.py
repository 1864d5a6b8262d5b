"""Shares of sources, and the table that an engine plays with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.profiles.costs import SOURCES, Source, sources_percent, worst
from mhcplan.profiles.vocabulary import op_key

if TYPE_CHECKING:
    from mhcplan.profiles.lookup import CostModel


@given(
    shares=st.lists(
        st.tuples(st.sampled_from(SOURCES), st.integers(0, 10**15)), min_size=1, max_size=30
    ).filter(lambda pairs: any(ns for _, ns in pairs))
)
def test_shares_add_up_to_100_exactly_and_are_near(shares: list[tuple[Source, int]]) -> None:
    percent = sources_percent(shares)
    assert list(percent) == list(SOURCES)
    assert sum(percent.values()) == 100.0
    assert sum(reversed(percent.values())) == 100.0
    total = sum(ns for _, ns in shares)
    for source in SOURCES:
        exact = 100 * sum(ns for s, ns in shares if s == source) / total
        assert percent[source] == pytest.approx(exact, abs=0.25)
        assert (percent[source] > 0) == (exact > 0)


def test_shares_of_a_known_mix() -> None:
    shares: list[tuple[Source, int]] = [("measured", 700), ("measured", 50), ("assumed", 250)]
    assert sources_percent(shares) == {
        "measured": 75.0,
        "interpolated": 0.0,
        "extrapolated": 0.0,
        "assumed": 25.0,
    }


def test_tiny_assumed_share_is_not_hidden() -> None:
    assert sources_percent([("measured", 10**9), ("assumed", 1)])["assumed"] == 0.0625


def test_no_duration_has_no_shares() -> None:
    with pytest.raises(ValueError, match="needs a duration above 0"):
        sources_percent([("measured", 0)])


def test_worst_source() -> None:
    assert worst(["measured", "assumed", "extrapolated"]) == "assumed"
    assert worst(["interpolated", "measured"]) == "interpolated"


def test_table_of_a_program(costs: CostModel) -> None:
    norm = op_key("norm", "F", tokens=4096, hidden=2560)
    table = costs.table([str(norm), "none", "send_recv 2/2 1048576"])
    overheads = costs.profile.overheads
    cost = costs.op(norm)
    assert table.duration_ns.tolist()[:2] == [cost.duration_ns, 0]
    assert table.duration_ns[2] > 0
    assert table.host_ns.tolist() == [cost.host_ns, overheads.event_wait_ns, 20_000]
    assert table.workspace_bytes.tolist() == [cost.workspace_bytes, 0, 0]
    assert table.margin_percent == overheads.allocator_margin_percent
    assert table.context_bytes == overheads.context_bytes
    assert table.communicator_bytes == overheads.communicator_bytes
