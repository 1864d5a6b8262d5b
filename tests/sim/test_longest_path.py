"""The longest path bounds every step from below, and is the step where nothing contends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.sim import device
from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.engine import simulate
from mhcplan.sim.longest_path import CycleError, StepGraph
from tests.sim.test_engine_properties import dependency_graph
from tests.support.programs import Maker, makers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.sim.program import CostTable, Program


def step_ns(program: Program, costs: CostTable) -> int:
    return int(StepGraph(program).step_ns([costs])[0])


@settings(max_examples=150, deadline=None)
@given(makers())
def test_it_bounds_the_step_and_is_the_longest_path_of_the_dependencies(maker: Maker) -> None:
    program, costs = maker.build()
    found = step_ns(program, costs)
    assert found <= simulate_compiled(program, costs).step_ns
    if maker.rows:
        assert found == nx.dag_longest_path_length(dependency_graph(program, costs))


@pytest.mark.parametrize("durations_ns", [(3, 9), (9, 3)])
def test_a_transfer_takes_as_long_as_its_longest_member(durations_ns: tuple[int, int]) -> None:
    maker = Maker(2)
    group = maker.group("ep", 0, 1)
    for rank, duration_ns in enumerate(durations_ns):
        maker.transfer(rank, group, duration_ns)
    program, costs = maker.build()
    assert step_ns(program, costs) == simulate_compiled(program, costs).step_ns == 9


def test_it_is_the_step_where_links_and_sms_are_without_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def everything_at_once(begin: int, end: int, *rest: object) -> None:
        rate = rest[-1]
        assert isinstance(rate, list)
        rate[begin:end] = [device.FULL_RATE] * (end - begin)

    def none_is_taken(begin: int, end: int, links: Sequence[int], taken: Sequence[int]) -> int:
        return -1

    monkeypatch.setattr(device, "share_device", everything_at_once)
    monkeypatch.setattr(device, "first_taken_link", none_is_taken)
    contended = 0

    @settings(max_examples=200, deadline=None)
    @given(makers())
    def check(maker: Maker) -> None:
        nonlocal contended
        program, costs = maker.build()
        assert step_ns(program, costs) == simulate(program, costs).step_ns
        contended += simulate_compiled(program, costs).step_ns > step_ns(program, costs)

    check()
    assert contended > 10, "the compiled engine's device is not patched, and contends"


@settings(max_examples=60, deadline=None)
@given(makers(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_many_tables_at_once_are_as_one_by_one(maker: Maker, scales: list[int]) -> None:
    tables = [maker.build(scale=scale)[1] for scale in scales]
    program, _ = maker.build()
    graph = StepGraph(program)
    together = graph.step_ns(tables)
    assert together.tolist() == [int(graph.step_ns([table])[0]) for table in tables]
    assert (together == together[0] // scales[0] * np.array(scales)).all()


@settings(max_examples=60, deadline=None)
@given(makers(host=False), st.floats(1.0, 3.0))
def test_factors_inflate_durations_and_never_shorten_the_step(maker: Maker, factor: float) -> None:
    program, costs = maker.build()
    graph = StepGraph(program)
    factors = np.full((1, len(program.cost_keys)), factor)
    inflated = np.ceil(costs.duration_ns * factor).astype(np.int64)
    expected = graph.step_ns([replace(costs, duration_ns=inflated)])
    assert graph.step_ns([costs], factors) == expected >= graph.step_ns([costs])


def test_ops_that_wait_for_each_other_are_refused() -> None:
    maker = Maker()
    a = maker.op(0, 5)
    b = maker.op(0, 5, stream="side", waits=[a])
    maker.wait(a, b)
    with pytest.raises(CycleError, match=r"^op \d .*waits for itself, through others$"):
        StepGraph(maker.build()[0])


def test_an_event_that_nobody_records_is_refused() -> None:
    maker = Maker()
    a = maker.op(0, 5)
    maker.op(0, 5, stream="side", waits=[a])
    program, _ = maker.build()
    nobody = replace(program, record=np.full(2, -1, np.int64))
    with pytest.raises(CycleError, match="no op records"):
        StepGraph(nobody)
