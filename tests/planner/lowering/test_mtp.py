"""The multi-token-prediction head: what it computes, holds and costs."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mhcplan.planner.plan.spec import make_plan, schedule_of
from mhcplan.planner.predict import Prediction, predict
from mhcplan.planner.report.make import make_report
from mhcplan.profiles.parameters import mtp_parameters
from mhcplan.profiles.presets import MTP_OFF, find_model
from mhcplan.profiles.specs import ResidualSpec
from mhcplan.profiles.vocabulary import VOCABULARY, OpKey, parse_key
from mhcplan.sim.check import check
from mhcplan.sim.program import COMPONENTS
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from mhcplan.profiles.schema import Profile


@cache
def profile() -> Profile:
    return synthetic_profile()


@cache
def run(
    *, mtp: bool, schedule: str = "1f1b", kind: str = "mhc", layers: str = "none"
) -> Prediction:
    plan = make_plan({
        "model": "mhc-9b", "layout": {"pp": 4, "ep": 8}, "microbatches": 8, "schedule": schedule,
        "residual": {"kind": kind}, "mtp": mtp, "recompute_layers": layers,
    })  # fmt: skip
    return predict(plan, profile())


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "zbv", "dualpipe"])
@pytest.mark.parametrize("kind", ["mhc", "plain"])
def test_the_last_stage_has_one_more_block_and_head(schedule: str, kind: str) -> None:
    without, with_head = (run(mtp=mtp, schedule=schedule, kind=kind).step for mtp in (False, True))
    more: Counter[tuple[str, str]] = Counter()
    for step, sign in ((with_head, 1), (without, -1)):
        for op in step.program:
            if op.kind not in ("release", "await"):
                more[op.kind, op.pass_] += sign
    chunks = 8
    assert [more["mtp_project", pass_] for pass_ in "FIW"] == [chunks] * 3
    assert more["attention_mla", "F"] == more["attention_mla", "W"] == chunks
    assert more["head", "F"] == more["head", "I"] == more["head", "W"] == chunks
    assert more["embedding", "F"] == more["embedding", "W"] == chunks
    assert more["dispatch", "F"] == more["combine", "I"] == chunks
    assert more["mhc_expand", "F"] == more["mhc_collapse", "B"] == (chunks if kind == "mhc" else 0)
    assert more["pp_send", "F"] == 0
    last = schedule_of(make_plan({"model": "mhc-9b", "layout": {"pp": 4}, "microbatches": 8,
                                  "schedule": schedule})).num_stages - 1  # fmt: skip
    assert {op.stage for op in with_head.program if op.kind == "mtp_project"} == {last}


@pytest.mark.parametrize("layers", ["none", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "zbv"])
def test_it_runs_sound_and_returns_its_memory(schedule: str, layers: str) -> None:
    prediction = run(mtp=True, schedule=schedule, layers=layers)
    for step in (prediction.step, prediction.baseline):
        assert check(step.program) == []
        assert np.array_equal(step.memory.left_bytes, step.program.static_bytes)
    without = run(mtp=False, schedule=schedule)
    assert prediction.step.timeline.step_ns > without.step.timeline.step_ns


def test_weights_are_those_of_the_report_it_follows() -> None:
    """DeepSeek-V3's repository: 11.5 B of unique MTP parameters (its README says 14 B with the
    embedding and head that are shared)."""
    counts = mtp_parameters(find_model("deepseek-v3"), ResidualSpec(kind="plain", expansion_rate=1))
    assert counts.embedding == counts.head == 0
    assert counts.total == pytest.approx(11.5e9, rel=0.01)
    shared = 2 * 129_280 * 7168
    assert counts.total + shared == pytest.approx(14e9, rel=0.05)


def test_the_embedding_is_shared_where_one_rank_has_both_ends() -> None:
    parameters = COMPONENTS.index("parameters")

    def added(schedule: str) -> int:
        static = [run(mtp=m, schedule=schedule).step.program.static_bytes for m in (False, True)]
        return int((static[1] - static[0])[:, parameters].max())

    embedding_bytes = 2 * 129_280 * 1920
    assert added("1f1b") - added("zbv") == embedding_bytes


def test_the_projection_costs_its_flops() -> None:
    """2C -> C for every token: 4 C^2 FLOPs forward."""
    program = run(mtp=True).step.program
    (key,) = {op.cost_key for op in program if op.kind == "mtp_project" and op.pass_ == "F"}
    found = parse_key(key)
    assert isinstance(found, OpKey)
    flops = VOCABULARY[found.kind].flops(dict(found.shape), "F")
    assert flops == pytest.approx(4096 * 2 * 2 * 1920 * 1920, rel=1e-3)


def test_the_report_says_what_of_it_is_assumed() -> None:
    plan = make_plan({
        "model": find_model("mhc-9b").model_copy(update={"assumed": (MTP_OFF,)}).model_dump(),
        "layout": {"pp": 4}, "microbatches": 8, "mtp": True,
    })  # fmt: skip
    on = make_report(predict(plan, profile()), "").warnings
    off = make_report(predict(plan.model_copy(update={"mtp": False}), profile()), "").warnings
    assert any("multi-token-prediction head is one block" in text for text in on)
    assert not any(MTP_OFF in text for text in on)
    assert any(MTP_OFF in text for text in off)
