"""The step is affine in M from a few microbatches a rank on: against paths worked out in full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.schedules.catalogue import SCHEDULES
from mhcplan.planner.sweep.steady_state import Family, Played, families_of, growth_ns
from mhcplan.profiles.lookup import cost_model_of
from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.longest_path import StepGraph
from tests.support.synthetic_profile import synthetic_profile


def plan(schedule: str, pp: int, microbatches: int, **changes: object) -> PlanSpec:
    base = {"model": "mhc-3b", "layout": {"pp": pp, "ep": 8}, "schedule": schedule}
    return make_plan(base | {"microbatches": microbatches} | changes)


def family_of(plan: PlanSpec) -> Family | None:
    """The shortest."""
    return next(families_of(plan), None)


def played(plan: PlanSpec, block: int | None) -> Played:
    program = lower(plan, block)
    table = cost_model_of(synthetic_profile()).table(program.cost_keys)
    return Played(program, *StepGraph(program).path_ns(table))


@settings(max_examples=12, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    pp=st.sampled_from([1, 2, 4]),
    rounds=st.integers(6, 12),
    n=st.sampled_from([1, 4]),
    block=st.sampled_from(["none", "stage", 2]),
    priority=st.sampled_from(["none", "post", "all"]),
)
def test_where_growth_is_settled_the_step_is_affine_to_the_nanosecond(
    schedule: str, pp: int, rounds: int, n: int, block: str | int, priority: str
) -> None:
    if schedule == "dualpipe" and pp == 1:
        return
    residual = {"expansion_rate": n, "recompute_block": block}
    long = plan(schedule, pp, rounds * pp, residual=residual, priority=priority)
    resolved = resolve_recompute_block(long)
    family = family_of(long)
    if family is None:
        return
    short, longer = played(family.short, resolved), played(family.longer, resolved)
    grows_ns = growth_ns(short, longer)
    if grows_ns is not None:
        expected = short.step_ns + family.repeats * grows_ns
        assert played(long, resolved).step_ns == expected


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_growth_is_settled_for_plain_plans_of_every_schedule(schedule: str) -> None:
    family = family_of(plan(schedule, 2, 32))
    assert family is not None
    assert (family.short.microbatches, family.longer.microbatches) in {(6, 7), (6, 8)}
    grows_ns = growth_ns(played(family.short, 2), played(family.longer, 2))
    assert grows_ns is not None
    assert grows_ns > 0


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"dualpipe"}))  # that needs two ranks
def test_the_engine_is_affine_too_where_ops_do_not_slow_each_other_down(schedule: str) -> None:
    """With one rank nothing contends for links; equally urgent streams share nothing."""
    steps: list[int] = []
    for m in (8, 12, 16):
        program = lower(plan(schedule, 1, m, layout={"pp": 1, "ep": 1}, priority="none"), 2)
        table = cost_model_of(synthetic_profile()).table(program.cost_keys)
        steps.append(simulate_compiled(program, table).step_ns)
    assert steps[2] - steps[1] == steps[1] - steps[0] > 0


def test_growth_that_some_op_exceeds_is_not_settled() -> None:
    family = family_of(plan("1f1b", 2, 32))
    assert family is not None
    short, longer = played(family.short, 2), played(family.longer, 2)
    drifting = longer.path_ns.copy()
    drifting[-1] += longer.step_ns
    assert growth_ns(short, longer._replace(path_ns=drifting)) is None
    other = played(family.longer, None)
    assert not np.array_equal(other.program.kind, longer.program.kind)
    assert growth_ns(short, other) is None


def test_a_short_step_is_worked_out_itself() -> None:
    assert family_of(plan("1f1b", 4, 13)) is None
    assert family_of(plan("1f1b", 4, 14)) is not None
    assert family_of(plan("interleaved-1f1b", 4, 12 + 4)) is None
    assert family_of(plan("interleaved-1f1b", 4, 12 + 8)) is not None


def test_longer_families_follow_while_the_step_is_longer_still() -> None:
    families = list(families_of(plan("dualpipe", 4, 96)))
    assert [family.short.microbatches for family in families] == [12, 24, 48]
    assert [family.longer.microbatches for family in families] == [14, 26, 50]
    assert [family.repeats for family in families] == [42, 36, 24]
