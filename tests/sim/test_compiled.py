"""The compiled engine against the reference: equal to the nanosecond, whatever is played."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.sim import compiled, compiled_loop, device, engine
from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.engine import DeadlockError, simulate
from mhcplan.sim.program import MeetError
from tests.support.programs import Maker, makers

if TYPE_CHECKING:
    from collections.abc import Callable, MutableSequence, Sequence

    from mhcplan.sim.program import CostTable, Program

COLUMNS = ("issue_ns", "start_ns", "end_ns", "cause", "reason")


def assert_equal(program: Program, costs: CostTable) -> None:
    expected, found = simulate(program, costs), simulate_compiled(program, costs)
    for name in COLUMNS:
        assert np.array_equal(getattr(expected, name), getattr(found, name)), name


@settings(max_examples=200, deadline=None)
@given(makers(), st.sampled_from([1, 7, 10**6]))
def test_equal_on_random_programs(maker: Maker, scale: int) -> None:
    assert_equal(*maker.build(scale=scale))


@settings(max_examples=100, deadline=None)
@given(makers(max_steps=80))
def test_equal_on_longer_programs(maker: Maker) -> None:
    assert_equal(*maker.build())


def test_equal_on_an_empty_program() -> None:
    assert_equal(*Maker(num_ranks=2).build())


def crowded(
    begin: int,
    end: int,
    running: Sequence[int],
    start_ns: Sequence[int],
    traits: device.Traits,
    rate: MutableSequence[int],
) -> None:
    """Physics of no machine: everything slows down everything, at rates that divide badly."""
    ops = [running[i] for i in range(begin, end)]
    transfers = sum(traits.is_transfer[op] for op in ops)
    begun = sum(start_ns[op] >= 0 for op in ops)
    first = min(ops, key=lambda op: traits.number[op], default=-1)
    for i, op in zip(range(begin, end), ops, strict=True):
        is_transfer = traits.is_transfer[op]
        others = transfers if is_transfer else len(ops) + begun + traits.priority[op]
        halted = begun > 2 and traits.number[op] % 3 == 0 and op != first and not is_transfer
        rate[i] = 0 if halted else device.FULL_RATE // (1 + others) - 3


@pytest.fixture
def crowded_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines call :func:`crowded`; the compiled one's loop runs as plain Python."""
    assert engine.device is compiled_loop.device is device
    monkeypatch.setattr(device, "share_device", crowded)
    monkeypatch.setattr(compiled, "play", compiled_loop.play.__wrapped__)  # type: ignore[attr-defined]


def test_equal_whatever_rates_the_device_gives(crowded_device: None) -> None:
    slowed = 0

    @settings(max_examples=150, deadline=None)
    @given(makers())
    def check(maker: Maker) -> None:
        nonlocal slowed
        program, costs = maker.build()
        assert_equal(program, costs)
        timeline = simulate(program, costs)
        alone = costs.duration_ns[program.cost]
        slowed += bool((timeline.end_ns - timeline.start_ns > alone + 1).any())

    check()
    assert slowed > 20


def two_that_wait_for_each_other() -> Maker:
    maker = Maker()
    a = maker.op(0, 5)
    b = maker.op(0, 5, stream="side", waits=[a])
    maker.op(0, 5, waits=[b])
    maker.wait(a, b)
    return maker


def a_host_that_waits() -> Maker:
    """Each rank begins with the collective that the other one ends with."""
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    ep = maker.group("ep", 0, 1)
    first = maker.transfer(0, pp, 3)
    maker.op(0, 3, waits=[first], host_sync=True)
    maker.transfer(0, ep, 3)
    b = maker.transfer(1, ep, 3)
    maker.transfer(1, pp, 3, waits=[b])
    return maker


@pytest.mark.parametrize("make", [two_that_wait_for_each_other, a_host_that_waits])
def test_deadlocks_are_told_in_the_same_words(make: Callable[[], Maker]) -> None:
    program, costs = make().build()
    messages = []
    for play in (simulate, simulate_compiled):
        with pytest.raises(DeadlockError) as caught:
            play(program, costs)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "waits for" in messages[0]


def test_a_send_without_its_receive_is_told_in_the_same_words() -> None:
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    maker.transfer(0, pp, 3, to=1)
    maker.transfer(1, pp, 3, source=0)
    maker.transfer(0, pp, 3, to=1)
    for play in (simulate, simulate_compiled):
        with pytest.raises(MeetError, match=r"group pp 0 -> 1: its members call it 2 and 1 times"):
            play(*maker.build())
