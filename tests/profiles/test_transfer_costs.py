"""Transfers: sizes and groups between and beyond the measured ones, and traffic between nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.profiles.costs import CostMissing
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.transfer_costs import traffic_factor
from mhcplan.profiles.vocabulary import TransferKey
from tests.support.synthetic_profile import (
    LINK_BYTES_PER_SECOND,
    LINK_LATENCY_NS,
    synthetic_profile,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.profiles.schema import Profile, TransferTiming

COSTS = CostModel(synthetic_profile())
MIB = 1 << 20
NETWORK_NS_PER_BYTE = 1e9 / 50e9  # the preset's 50 GB/s
NETWORK_LATENCY_NS = 14_000


def with_transfers(
    profile: Profile, change: Callable[[TransferTiming], TransferTiming | None]
) -> CostModel:
    rows = (change(row) for row in profile.transfers)
    kept = tuple(row for row in rows if row is not None)
    return CostModel(profile.model_copy(update={"transfers": kept}))


def test_measured_transfers_cost_what_was_measured(profile: Profile, costs: CostModel) -> None:
    for row in profile.transfers:
        cost = costs.transfer(TransferKey(row.pattern, 2, 2, row.bytes))
        assert (cost.duration_ns, cost.host_ns) == (row.duration_ns, row.host_ns)
        assert (cost.source, cost.spread_percent) == ("measured", row.spread_percent)
        assert cost.ctas == row.ctas


@given(size=st.integers(1024, 1 << 30))
def test_latency_and_bandwidth_are_reproduced_between_sizes(size: int) -> None:
    cost = COSTS.transfer(TransferKey("send_recv", 2, 2, size))
    expected = LINK_LATENCY_NS + size * 1e9 / LINK_BYTES_PER_SECOND
    assert cost.duration_ns == pytest.approx(expected, abs=2)


@given(sizes=st.lists(st.integers(1, 1 << 34), min_size=2, max_size=8))
def test_larger_messages_never_take_less(sizes: list[int]) -> None:
    for size, per_node in ((8, 8), (16, 8), (2, 2), (8, 1)):
        times = [
            COSTS.transfer(TransferKey("all_to_all", size, per_node, b)).duration_ns
            for b in sorted(sizes)
        ]
        assert times == sorted(times)


def test_bandwidth_is_held_above_and_time_below_the_measured_sizes(costs: CostModel) -> None:
    largest = costs.transfer(TransferKey("send_recv", 2, 2, 1 << 30))
    above = costs.transfer(TransferKey("send_recv", 2, 2, 3 << 30))
    assert above.duration_ns == 3 * largest.duration_ns
    smallest = costs.transfer(TransferKey("send_recv", 2, 2, 1024))
    below = costs.transfer(TransferKey("send_recv", 2, 2, 5))
    assert below.duration_ns == smallest.duration_ns
    assert {above.source, below.source} == {"extrapolated"}


@pytest.mark.parametrize(
    ("pattern", "group", "factor"),
    [
        ("all_to_all", 8, (7 / 8) / (1 / 2)),
        ("all_to_all", 4, (3 / 4) / (1 / 2)),
        ("all_reduce", 8, (14 / 8) / (2 / 2)),
        ("reduce_scatter", 4, (3 / 4) / (1 / 2)),
        ("all_gather", 8, (7 / 8) / (1 / 2)),
    ],
)
def test_unmeasured_group_scales_with_traffic(
    costs: CostModel, pattern: str, group: int, factor: float
) -> None:
    pair = costs.transfer(TransferKey(pattern, 2, 2, MIB))
    cost = costs.transfer(TransferKey(pattern, group, group, MIB))
    assert cost.duration_ns == pytest.approx(pair.duration_ns * factor, abs=1)
    assert cost.source == "extrapolated"


def test_group_nearest_by_ratio_is_used(profile: Profile) -> None:
    """With groups of 2 and 16 measured, 6 is nearer to 16 (2.7x) than to 2 (3x)."""
    larger = tuple(
        row.model_copy(update={"group_size": 16, "duration_ns": 5 * row.duration_ns})
        for row in profile.transfers
    )
    both = CostModel(profile.model_copy(update={"transfers": profile.transfers + larger}))
    near = both.transfer(TransferKey("all_to_all", 16, 16, MIB))
    cost = both.transfer(TransferKey("all_to_all", 6, 6, MIB))
    assert near.source == "measured"
    assert cost.duration_ns == pytest.approx(near.duration_ns * (5 / 6) / (15 / 16), abs=1)


def test_group_beyond_four_times_is_refused(costs: CostModel) -> None:
    with pytest.raises(CostMissing) as refusal:
        costs.transfer(TransferKey("all_to_all", 16, 16, MIB))
    assert str(refusal.value) == (
        "profile synthetic: all_to_all on intra_node was measured for group_size 2;"
        " group_size=16 is more than 4x outside; measure it on 16 GPUs of a host:"
        " mhcplan profile measure --part comm --base synthetic --out mine.json"
    )


def test_reduce_scatter_is_half_an_all_reduce_where_not_measured(profile: Profile) -> None:
    model = with_transfers(profile, lambda row: row if row.pattern == "all_reduce" else None)
    whole = model.transfer(TransferKey("all_reduce", 2, 2, MIB))
    for pattern in ("reduce_scatter", "all_gather"):
        half = model.transfer(TransferKey(pattern, 2, 2, MIB))
        assert half.duration_ns == pytest.approx(whole.duration_ns / 2, abs=1)
        assert half.source == "assumed"
        assert "half of an all_reduce" in half.explanation
        assert half.link_bytes == MIB // 2


def test_unmeasured_pattern_is_refused(profile: Profile) -> None:
    model = with_transfers(profile, lambda row: row if row.pattern == "all_gather" else None)
    for pattern in ("all_to_all", "reduce_scatter", "send_recv"):
        with pytest.raises(CostMissing, match=f"{pattern} on intra_node was not measured; measure"):
            model.transfer(TransferKey(pattern, 2, 2, MIB))


def test_message_between_nodes_takes_the_assumed_link(costs: CostModel) -> None:
    cost = costs.transfer(TransferKey("send_recv", 2, 1, 84_000_000))
    assert cost.duration_ns == NETWORK_LATENCY_NS + 84_000_000 * NETWORK_NS_PER_BYTE
    assert cost.source == "assumed"
    assert "arXiv 2412.19437" in cost.explanation
    assert cost.link_bytes == 84_000_000
    assert cost.host_ns == costs.transfer(TransferKey("send_recv", 2, 2, MIB)).host_ns


@pytest.mark.parametrize(
    ("key", "sent"),
    [
        # all-to-all: the parts for ranks of other nodes
        (TransferKey("all_to_all", 16, 8, 64 * MIB), 32 * MIB),
        (TransferKey("all_to_all", 64, 8, 64 * MIB), 56 * MIB),
        (TransferKey("all_to_all", 4, 1, 64 * MIB), 48 * MIB),
        # rings: (nodes - 1) / nodes of the eighth that each of 8 ranks carries
        (TransferKey("reduce_scatter", 64, 8, 64 * MIB), 7 * MIB),
        (TransferKey("all_gather", 64, 8, 64 * MIB), 7 * MIB),
        (TransferKey("all_reduce", 64, 8, 64 * MIB), 14 * MIB),
        (TransferKey("all_reduce", 4, 1, 64 * MIB), 96 * MIB),
    ],
)
def test_bytes_that_leave_the_node(costs: CostModel, key: TransferKey, sent: int) -> None:
    cost = costs.transfer(key)
    assert cost.link_bytes == sent
    assert cost.source == "assumed"
    assert cost.duration_ns >= round(NETWORK_LATENCY_NS + sent * NETWORK_NS_PER_BYTE)


def test_longer_of_network_and_node_counts(costs: CostModel) -> None:
    """An all-to-all of 16 on 2 nodes waits for the network, a reduction of 64 on 8 nodes for its
    part inside the node once that is slow enough.
    """
    key = TransferKey("all_to_all", 16, 8, 64 * MIB)
    network_ns = NETWORK_LATENCY_NS + 32 * MIB * NETWORK_NS_PER_BYTE
    inside = costs.transfer(TransferKey("all_to_all", 8, 8, 32 * MIB)).duration_ns
    assert inside < network_ns
    assert costs.transfer(key).duration_ns == pytest.approx(network_ns, abs=1)

    slow = with_transfers(
        costs.profile, lambda row: row.model_copy(update={"duration_ns": 20 * row.duration_ns})
    )
    slow_inside = slow.transfer(TransferKey("all_to_all", 8, 8, 32 * MIB)).duration_ns
    assert slow_inside > network_ns
    cost = slow.transfer(key)
    assert (cost.duration_ns, cost.source) == (slow_inside, "assumed")
    assert "the longer of the two counts" in cost.explanation


def test_measured_network_is_used_before_the_assumed_link(profile: Profile) -> None:
    network = tuple(
        row.model_copy(update={"medium": "inter_node", "duration_ns": 7 * row.duration_ns})
        for row in profile.transfers
        if row.pattern == "send_recv"
    )
    model = CostModel(profile.model_copy(update={"transfers": profile.transfers + network}))
    inside = model.transfer(TransferKey("send_recv", 2, 2, MIB))
    cost = model.transfer(TransferKey("send_recv", 2, 1, MIB))
    assert cost.source == "measured"
    assert cost.duration_ns == 7 * inside.duration_ns
    # what eight ranks of a node send to seven other nodes each goes as one message did
    key = TransferKey("all_to_all", 64, 8, 64 * MIB)
    far = model.transfer(key)
    message = model.transfer(TransferKey("send_recv", 2, 1, 56 * MIB))
    assert far.duration_ns == message.duration_ns
    assert (far.source, far.link_bytes) == ("extrapolated", 56 * MIB)


@pytest.mark.parametrize(
    "key",
    [
        TransferKey("all_to_all", 1, 1, MIB),
        TransferKey("all_to_all", 8, 0, MIB),
        TransferKey("all_to_all", 8, 9, MIB),
        TransferKey("all_to_all", 8, 8, 0),
        TransferKey("send_recv", 4, 4, MIB),
    ],
)
def test_impossible_transfer_is_refused(costs: CostModel, key: TransferKey) -> None:
    with pytest.raises(ValueError, match=f"^transfer {key}"):
        costs.transfer(key)


def test_traffic_factors() -> None:
    assert traffic_factor("send_recv", 2) == 1
    assert traffic_factor("all_to_all", 4) == 0.75
    assert traffic_factor("all_reduce", 4) == 1.5
    assert traffic_factor("reduce_scatter", 2) == traffic_factor("all_gather", 2) == 0.5


def test_an_uneven_all_to_all_waits_for_what_the_first_rank_receives(profile: Profile) -> None:
    costs = CostModel(profile)
    for size, per_node in ((2, 2), (8, 8), (8, 1), (64, 8)):
        uneven = costs.transfer(TransferKey("all_to_all_uneven", size, per_node, 8 * MIB))
        even = costs.transfer(TransferKey("all_to_all", size, per_node, 12 * MIB))
        assert uneven.source == "assumed"
        assert uneven.duration_ns == pytest.approx(even.duration_ns, rel=1e-3)
        assert uneven.link_bytes == pytest.approx(even.link_bytes, rel=1e-3)
