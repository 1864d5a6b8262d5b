"""What peers' presets have and a plan must say: sequence length, micro-batch size, no splitting."""

from __future__ import annotations

import pytest

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.predict import predict
from mhcplan.planner.report.make import make_report
from mhcplan.profiles.vocabulary import OpKey, TransferKey, parse_key
from mhcplan.sim.program import COMPONENTS
from tests.support.synthetic_profile import synthetic_profile

Axes = dict[str, int]


def plan(**changes: object) -> PlanSpec:
    base: dict[str, object] = {
        "model": "mhc-9b", "layout": {"pp": 4, "ep": 8}, "microbatches": 8, "seq_len": 1024,
    }  # fmt: skip
    return make_plan(base | changes)


def ops(changes: PlanSpec) -> list[tuple[str, OpKey | TransferKey]]:
    """Kind and cost key of every op, in order."""
    program = lower(changes, 4)
    keys = [parse_key(text) for text in program.cost_keys]
    return [
        (program.kinds[kind], key)
        for kind, cost in zip(program.kind, program.cost, strict=True)
        if (key := keys[cost]) is not None
    ]


@pytest.mark.parametrize(
    ("field", "attention"), [("micro_batch_size", "seq"), ("seq_len", "")], ids=lambda x: x
)
def test_twice_the_tokens_reach_every_cost(field: str, attention: str) -> None:
    """All work over tokens and all traffic of activations double, only ``seq`` tells which field
    it was; what is on parameters stays."""
    doubled = {"micro_batch_size": 2} if field == "micro_batch_size" else {"seq_len": 2048}
    for (kind, one), (_, two) in zip(ops(plan()), ops(plan(**doubled)), strict=True):
        if isinstance(one, TransferKey):
            assert isinstance(two, TransferKey)
            factor = 1 if kind in ("grad_reduce", "param_gather") else 2
            assert two == one._replace(num_bytes=factor * one.num_bytes), kind
            continue
        grown = {"tokens", "rows", *([] if attention else ["seq"])}
        expected = {a: n * 2 if a in grown else n for a, n in one.shape}
        assert dict(two.shape) == expected, kind


def test_twice_the_tokens_take_twice_the_memory_of_activations() -> None:
    kept = [COMPONENTS.index(name) for name in ("activations", "recompute", "communication")]
    one, two = (
        predict(plan(micro_batch_size=size), synthetic_profile()).step.memory.peak_bytes[:, kept]
        for size in (1, 2)
    )
    assert two.sum() == pytest.approx(2 * one.sum(), rel=0.01)


def test_the_report_says_that_nothing_is_split_but_experts() -> None:
    warnings = make_report(predict(plan(), synthetic_profile()), "").warnings
    assert any("tensor and context parallelism are 1" in text for text in warnings)
