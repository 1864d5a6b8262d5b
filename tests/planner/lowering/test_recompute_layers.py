"""F's own recompute: what runs again, what is no longer kept, and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import Prediction, Step, predict
from mhcplan.sim.check import check
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from mhcplan.profiles.schema import Profile

SUBLAYERS = {
    "selective": {"attention_mla"},
    "full": {"attention_mla", "dense_ffn", "router", "dispatch", "shared_experts", "experts",
             "regroup", "combine"},
}  # fmt: skip


@cache
def profile() -> Profile:
    return synthetic_profile()


@cache
def run(layers: str, ep: int = 8, schedule: str = "dualpipe", block: object = "auto") -> Prediction:
    plan = make_plan({
        "model": "mhc-9b", "layout": {"pp": 4, "ep": ep}, "microbatches": 8, "schedule": schedule,
        "recompute_layers": layers, "residual": {"recompute_block": block},
    })  # fmt: skip
    return predict(plan, profile())


def ops(step: Step, pass_: str) -> Counter[tuple[str, str]]:
    """Ops of a pass by kind and cost key."""
    return Counter(
        (op.kind, op.cost_key) for op in step.program if op.pass_ == pass_ and op.kind != "release"
    )


@pytest.mark.parametrize("layers", ["selective", "full"])
@pytest.mark.parametrize("residual", ["mhc", "plain"])
def test_what_runs_again_costs_what_it_cost_before(layers: str, residual: str) -> None:
    prediction = run(layers)
    step = prediction.step if residual == "mhc" else prediction.baseline
    first, again = ops(step, "F"), ops(step, "R")
    for (kind, key), count in again.items():
        if kind in SUBLAYERS[layers]:
            assert count == first[kind, key], kind
    assert {kind for kind, _ in again} == SUBLAYERS[layers] | {"norm"} | (
        {"mhc_recompute"} if residual == "mhc" else set()
    )


@pytest.mark.parametrize("ep", [1, 8])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipe"])
def test_more_recompute_takes_less_memory_and_more_time(ep: int, schedule: str) -> None:
    none, selective, full = (run(layers, ep, schedule) for layers in ("none", "selective", "full"))
    for one in ("step", "baseline"):
        steps: list[Step] = [getattr(p, one) for p in (none, selective, full)]
        assert all(check(step.program) == [] for step in steps)
        assert all(np.array_equal(s.memory.left_bytes, s.program.static_bytes) for s in steps)
        peaks = [step.memory.peak_bytes.sum() for step in steps]  # of some ranks it is the logits
        assert peaks[0] > peaks[1] > peaks[2]
        times = [step.timeline.step_ns for step in steps]
        assert times[0] < times[1] < times[2]


def test_it_stands_beside_mhcs_own_recompute() -> None:
    """Without a recompute block states stay, what the sublayers kept goes all the same."""
    kept, dropped = run("none", block="none"), run("full", block="none")
    assert not any(op.kind == "mhc_recompute" for op in dropped.step.program)
    peaks = [p.step.memory.peak_bytes.sum(axis=1).max() for p in (kept, dropped)]
    assert peaks[1] < peaks[0]
    assert dropped.step.memory.peak_bytes.sum() > run("full").step.memory.peak_bytes.sum()


def test_recompute_needs_no_message_unless_told_to_wait() -> None:
    plan = make_plan({
        "model": "mhc-9b", "layout": {"pp": 4, "ep": 8}, "microbatches": 8,
        "recompute_layers": "full",
    })  # fmt: skip
    step = predict(plan, profile()).step
    waiting = predict(plan.model_copy(update={"overlap_recompute": False}), profile())
    received = {
        buffer
        for op in step.program
        if op.kind == "pp_recv" and op.pass_ == "I"
        for buffer in op.writes
    }
    again = [op for op in step.program if op.pass_ == "R"]
    assert received
    assert all(received.isdisjoint(op.reads) for op in again)
    assert waiting.step.timeline.step_ns > step.timeline.step_ns
    assert waiting.baseline.timeline.step_ns > predict(plan, profile()).baseline.timeline.step_ns
