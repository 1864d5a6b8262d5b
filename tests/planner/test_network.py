"""Another network between nodes: bandwidth scales, latency stays, and nothing else changes."""

from __future__ import annotations

import pytest

from mhcplan.planner.explain.explanation import explain
from mhcplan.planner.plan.spec import SpecError, make_plan
from mhcplan.planner.predict import predict
from mhcplan.planner.report.make import make_report
from mhcplan.profiles.derive import with_network
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.vocabulary import TransferKey
from tests.support.synthetic_profile import synthetic_profile

PROFILE = synthetic_profile()
MESSAGE = TransferKey("send_recv", 2, 1, 1 << 26)
INSIDE = TransferKey("send_recv", 2, 2, 1 << 26)


@pytest.mark.parametrize("speed", [0.25, 0.5, 2.0])
def test_what_exceeds_the_latency_scales(speed: float) -> None:
    plain, other = CostModel(PROFILE), CostModel(PROFILE).with_network(speed)
    latency = PROFILE.hardware.inter_node.latency_ns
    before, after = plain.transfer(MESSAGE).duration_ns, other.transfer(MESSAGE).duration_ns
    assert after - latency == pytest.approx((before - latency) / speed, rel=1e-6)
    assert f"at {speed:g} times its bandwidth" in other.transfer(MESSAGE).explanation
    assert other.transfer(INSIDE) == plain.transfer(INSIDE)
    assert CostModel(PROFILE).with_network(1.0).profile is PROFILE


def test_measured_messages_between_nodes_scale_and_are_assumed_then() -> None:
    row = next(row for row in PROFILE.transfers if row.pattern == "send_recv")
    rows = tuple(
        row.model_copy(update={"medium": "inter_node", "bytes": size, "duration_ns": ns})
        for size, ns in ((1 << 10, 10_000), (1 << 26, 1_010_000))
    )
    measured = PROFILE.model_copy(update={"transfers": (*PROFILE.transfers, *rows)})
    slow = with_network(measured, 0.5).transfers[-2:]
    assert [row.duration_ns for row in slow] == [10_000, 2_010_000]
    assert {row.source for row in slow} == {"assumed"}
    assert with_network(measured, 0.5).transfers[:-2] == PROFILE.transfers


def test_a_plan_on_a_slower_network_takes_longer_and_says_so() -> None:
    plan = {"model": "mhc-3b", "layout": {"pp": 4, "ep": 8}, "microbatches": 8}
    steps = [
        predict(make_plan({**plan, "network_speed": speed}), PROFILE) for speed in (0.25, 1.0, 4.0)
    ]
    lengths = [found.step.timeline.step_ns for found in steps]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 1.001 * lengths[1]
    baselines = [found.baseline.timeline.step_ns for found in steps]
    assert baselines == sorted(set(baselines), reverse=True)
    said = " ".join(make_report(steps[0], "").warnings)
    assert "at 0.25 times its bandwidth, as network_speed asks" in said
    assert explain(steps[0]).step_time_ns == lengths[0]


@pytest.mark.parametrize("speed", [0, -1, "nan", 1e-6, 1e9])
def test_speeds_that_no_network_has_are_refused(speed: object) -> None:
    with pytest.raises(SpecError, match="network_speed"):
        make_plan({"model": "mhc-3b", "network_speed": speed})
