"""Contention: the engines agree on it, and hand-made steps come out as worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.engine import simulate
from tests.support.loads import loads, with_loads
from tests.support.programs import Maker, makers

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject

    from mhcplan.sim.program import CostTable, Program

COLUMNS = ("issue_ns", "start_ns", "end_ns", "cause", "reason")


def assert_equal(program: Program, costs: CostTable) -> None:
    expected, found = simulate(program, costs), simulate_compiled(program, costs)
    for name in COLUMNS:
        assert np.array_equal(getattr(expected, name), getattr(found, name)), name


@settings(max_examples=300, deadline=None)
@given(makers(), st.sampled_from([1, 13, 10**5]), st.data())
def test_equal_on_random_programs_and_loads(maker: Maker, scale: int, data: DataObject) -> None:
    program, costs = maker.build(scale=scale)
    assert_equal(program, with_loads(costs, data.draw(loads(program))))
