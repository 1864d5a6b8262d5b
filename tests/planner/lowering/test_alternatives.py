"""Residuals without kernels of ours: lowered, priced by their bytes, and said to be assumed."""

from __future__ import annotations

from functools import cache

import pytest

from mhcplan.planner.plan.spec import SpecError, make_plan
from mhcplan.planner.predict import Prediction, predict
from mhcplan.planner.report.make import make_report
from mhcplan.planner.report.text import headline

ALTERNATIVES = {
    "identity": {"identity_pre", "identity_post"},
    "mhc-lite": {"lite_pre", "mhc_post"},
    "mhc-single-pass": {"single_pre", "mhc_post"},
}


@cache
def predicted(kind: str) -> Prediction:
    return predict(
        make_plan(
            {
                "model": "mhc-27b", "residual": {"kind": kind}, "microbatches": 8,
                "layout": {"pp": 4, "ep": 8}, "schedule": "1f1b", "engine": "simpy",
            }
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ALTERNATIVES)
def test_alternatives_are_priced_as_assumed(kind: str) -> None:
    prediction = predicted(kind)
    program = prediction.step.program
    ours = {name for name in program.kinds if name.endswith(("_pre", "_post"))}
    assert ours == ALTERNATIVES[kind]
    report = make_report(prediction, "")
    assert any("priced as mhc_pre" in warning for warning in report.warnings)
    assert report.overhead_percent > 0
    assert kind.removeprefix("mhc-").split("-")[0] in headline(report).lower()
    # the same ops in the same order: only what they cost differs
    assert program.num_ops == predicted("mhc").step.program.num_ops


def test_fewer_bytes_are_fewer_milliseconds() -> None:
    step = {kind: predicted(kind).step.timeline.step_ns for kind in ("mhc", *ALTERNATIVES)}
    assert step["mhc-single-pass"] < step["identity"] < step["mhc"]
    assert step["mhc-lite"] == pytest.approx(step["mhc"], rel=0.01)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match="expansion_rate=8 must be at most 4 with kind=mhc-lite"):
        make_plan({"model": "mhc-9b", "residual": {"kind": "mhc-lite", "expansion_rate": 8}})
