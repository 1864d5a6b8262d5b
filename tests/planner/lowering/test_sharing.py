"""What lowering keeps from one what-if to the next changes nothing but the time it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.schedules.catalogue import SCHEDULES
from mhcplan.sim import tiling
from mhcplan.sim.order import order_of
from tests.support.programs import assert_same

if TYPE_CHECKING:
    from mhcplan.sim.program import Program

SLIDERS: dict[str, Any] = {
    "n": st.sampled_from([1, 2, 4]),
    "block": st.sampled_from(["auto", "none", "stage", 1, 3]),
    "schedule": st.sampled_from(sorted(SCHEDULES)),
    "microbatches": st.sampled_from([8, 12]),
    "dp": st.sampled_from([1, 2]),
    "ep": st.sampled_from([1, 8]),
    "micro_batch_size": st.sampled_from([1, 2]),
    "priority": st.sampled_from(["post", "all"]),
}


def plan(sliders: dict[str, Any]) -> PlanSpec:
    layout = {"pp": 4, "ep": sliders["ep"], "dp": sliders["dp"]}
    residual = {"expansion_rate": sliders["n"], "recompute_block": sliders["block"]}
    rest = {name: sliders[name] for name in ("schedule", "microbatches", "micro_batch_size")}
    return make_plan(
        {"model": "mhc-3b", "layout": layout, "residual": residual, "priority": sliders["priority"]}
        | rest
    )


def lowered(plan: PlanSpec) -> Program:
    return lower(plan, resolve_recompute_block(plan))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.fixed_dictionaries(SLIDERS), min_size=2, max_size=3), st.data())
def test_a_program_is_the_same_whatever_was_lowered_before(
    drawn: list[dict[str, Any]], data: st.DataObject
) -> None:
    """The plans differ in few sliders, as a person's do, so that they share what can be shared."""
    kept = dict(drawn[0])
    for other in drawn:
        name = data.draw(st.sampled_from(sorted(SLIDERS)))
        kept[name] = other[name]
        program = lowered(plan(kept))
        order = order_of(program)
        tiling.forget()
        fresh = lowered(plan(kept))
        assert_same(program, fresh)
        assert order_of(fresh) is not order
        assert np.array_equal(order_of(fresh).meeting, order.meeting)


def test_another_n_shares_the_order_and_another_block_does_not() -> None:
    base = {"n": 4, "block": 3, "schedule": "1f1b", "microbatches": 8, "dp": 1, "ep": 8,
            "micro_batch_size": 1, "priority": "post"}  # fmt: skip
    four, two = lowered(plan(base)), lowered(plan(base | {"n": 2}))
    assert order_of(four) is order_of(two)
    assert four.waits is two.waits
    assert four.buffer_bytes.sum() > two.buffer_bytes.sum()
    assert four.cost_keys != two.cost_keys
    other = lowered(plan(base | {"block": 2}))
    assert order_of(other) is not order_of(four)
