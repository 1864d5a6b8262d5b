"""What lowering keeps from one what-if to the next changes nothing but the time it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.planner.lowering.lower import lower, stage_shapes, work_of
from mhcplan.planner.lowering.recompute import as_played, resolve_recompute_block
from mhcplan.planner.lowering.stage_templates import pair_template, stage_templates
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


@pytest.mark.parametrize(
    ("slider", "value", "is_shared"),
    [("n", 2, True), ("micro_batch_size", 2, True), ("ep", 4, True), ("n", 1, False),
     ("ep", 1, False), ("priority", "all", False), ("block", 2, False)],
)  # fmt: skip
def test_templates_are_recorded_once_for_plans_that_differ_in_numbers(
    slider: str, value: object, *, is_shared: bool
) -> None:
    base = {"n": 4, "block": 3, "schedule": "dualpipe", "microbatches": 8, "dp": 1, "ep": 8,
            "micro_batch_size": 1, "priority": "post"}  # fmt: skip
    bundles: list[Any] = []
    for one in (plan(base), plan(base | {slider: value})):
        work, shapes = work_of(one, resolve_recompute_block(one)), stage_shapes(one)
        stage = stage_templates(work, shapes[1])
        pair = pair_template(work, shapes[1], shapes[2])
        bundles.append((stage, stage.actions["B"], pair))
    (stage, backward, pair), (other, other_backward, other_pair) = bundles
    assert (backward.waits is other_backward.waits) == is_shared
    assert (pair.waits is other_pair.waits) == is_shared
    assert stage.labels.costs != other.labels.costs or slider in ("priority", "block")
    if is_shared:
        kinds = {cost.split()[0] for cost in stage.labels.costs}
        assert kinds == {cost.split()[0] for cost in other.labels.costs}


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("block", ["auto", "none", "stage", 3, 99])
def test_a_plan_as_played_has_the_same_program(n: int, block: object) -> None:
    base = {"n": n, "block": block, "schedule": "1f1b", "microbatches": 8, "dp": 2, "ep": 8,
            "micro_batch_size": 1, "priority": "post"}  # fmt: skip
    named = plan(base)
    resolved = resolve_recompute_block(named)
    played = as_played(named, resolved)
    assert resolve_recompute_block(played) == resolved
    assert as_played(played, resolved) == played
    assert played.residual.is_plain == (n == 1)
    programs = (replace(lower(one, resolved), meta={}) for one in (named, played))
    assert_same(*programs)
