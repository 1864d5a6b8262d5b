"""Which GPUs share traffic and where they stand; streams and their priorities."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.planner.lowering.placement import placement_of, tables_of
from mhcplan.planner.plan.spec import PlanSpec, make_plan

MODEL = {
    "name": "m", "num_blocks": 16, "hidden_size": 256, "vocab_size": 1024,
    "attention": {"kind": "mla", "num_heads": 4},
    "moe": {"num_experts": 120, "top_k": 2, "ffn_dim": 128},
}  # fmt: skip


def plan_of(schedule: str = "1f1b", pp: int = 4, **more: object) -> PlanSpec:
    layout = {name: more.pop(name) for name in ("ep", "dp", "gpus_per_node") if name in more}
    return make_plan(
        {
            "model": MODEL, "schedule": schedule, "microbatches": 16, "seq_len": 128,
            "layout": {"pp": pp, **layout}, **more,
        }
    )  # fmt: skip


@given(
    st.sampled_from(["1f1b", "dualpipe"]), st.sampled_from([2, 4]),
    st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 4), st.integers(1, 16),
)  # fmt: skip
def test_a_team_is_as_spread_as_the_worst_of_its_kind(
    schedule: str, pp: int, ep: int, dp: int, nodes: int
) -> None:
    """Every GPU has a place (rank, d, e) and number (rank dp + d) ep + e: teams by their places."""
    plan = plan_of(schedule, pp, ep=ep, dp=dp, gpus_per_node=nodes)
    placement = placement_of(plan)

    def most_in_a_node(places: list[tuple[int, int, int]]) -> int:
        at = [((r * dp + d) * ep + e) // nodes for r, d, e in places]
        return max(map(at.count, at))

    replicas, experts = range(dp), range(ep)
    for rank, teams in enumerate(placement.ranks):
        holders = {rank, pp - 1 - rank} if schedule == "dualpipe" else {rank}
        assert teams.holders == tuple(sorted(holders))
        of_experts = [[(rank, d, e) for e in experts] for d in replicas]
        of_copies = [list(product(holders, replicas, [e])) for e in experts]
        of_dense = [list(product(holders, replicas, experts))]
        for team, all_alike in (
            (teams.experts, of_experts), (teams.expert_copies, of_copies), (teams.dense, of_dense),
        ):  # fmt: skip
            assert team.gpus == len(all_alike[0])
            assert team.per_node == min(map(most_in_a_node, all_alike))
    pairs = [[(r, d, e), (r + 1, d, e)] for r in range(pp - 1) for d in replicas for e in experts]
    assert placement.pipe == (2, min(map(most_in_a_node, pairs)))


@pytest.mark.parametrize(
    ("nodes", "pipe", "experts"),
    [(8, "inter_node", "intra_node"), (4, "inter_node", "inter_node"), (32, *["intra_node"] * 2)],
)
def test_groups_take_the_link_that_their_team_needs(nodes: int, pipe: str, experts: str) -> None:
    groups = tables_of(plan_of(ep=8, gpus_per_node=nodes)).groups
    assert {g.medium for g in groups if g.name.startswith("pp")} == {pipe}
    assert {g.medium for g in groups if g.name.startswith("ep")} == {experts}


@pytest.mark.parametrize("comm_priority", ["normal", "high"])
@pytest.mark.parametrize("comm_streams", ["one", "two"])
def test_communication_is_as_urgent_as_the_plan_says(comm_priority: str, comm_streams: str) -> None:
    """torch's numbers: -1 is urgent."""
    plan = plan_of(
        "dualpipe", ep=2, p2p="grouped", comm_streams=comm_streams, comm_priority=comm_priority
    )
    urgency = {stream.name: stream.priority for stream in tables_of(plan).streams}
    assert (urgency.pop("compute"), urgency.pop("high")) == (0, -1)
    assert set(urgency.values()) == {-1 if comm_priority == "high" else 0}
