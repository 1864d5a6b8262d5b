"""Half of the ranks tell what all of them do, and only where they are mirror images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.device_kernels import Kernel, Loads, Parameters, Traffic
from mhcplan.sim.engine import DeadlockError, simulate
from mhcplan.sim.mirror import half_of
from mhcplan.sim.program import Csr
from tests.support.loads import loads, with_loads
from tests.support.programs import Maker, build_mirrored, mirror_images

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import DataObject

    from mhcplan.sim.program import CostTable, Program


def assert_equal(program: Program, costs: CostTable) -> None:
    expected, found = simulate(program, costs), simulate_compiled(program, costs)
    for name in ("issue_ns", "start_ns", "end_ns", "cause", "reason"):
        assert np.array_equal(getattr(expected, name), getattr(found, name)), name


@settings(max_examples=200, deadline=None)
@given(mirror_images(), st.data())
def test_half_of_the_ranks_tell_what_the_reference_plays_for_all(
    made: tuple[Program, CostTable], data: DataObject
) -> None:
    program, costs = made
    costs = with_loads(costs, data.draw(loads(program)))
    half = half_of(program, costs)
    assert half is not None
    assert half.num_ops == program.num_ops // 2
    assert_equal(program, costs)


def exchange(batch: int = 0) -> tuple[Program, CostTable]:
    """Two ranks compute, send each other what they have and go on with what they got."""
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    for rank in (0, 1):
        made = maker.op(rank, 5)
        sent = maker.transfer(rank, pp, 3, to=1 - rank, batch=batch, waits=[made])
        got = maker.transfer(rank, pp, 3, source=1 - rank, batch=batch, waits=[made])
        maker.op(rank, 7, waits=[sent, got])
    program, costs = build_mirrored(maker)
    return program, crowded(program, costs)


def crowded(program: Program, costs: CostTable) -> CostTable:
    """The same costs on a machine of few SMs."""
    transfers = set(program.cost[program.group >= 0].tolist())
    keys = range(len(program.cost_keys))
    given = Loads(
        kernels=tuple(() if key in transfers else (Kernel(5.0, 20, 1),) for key in keys),
        traffic=tuple(Traffic(2) if key in transfers else None for key in keys),
        parameters=Parameters(num_sms=8, hbm_bytes_per_ns=10.0),
    )
    return with_loads(costs, given)


def test_a_message_between_two_mirror_images_meets_itself() -> None:
    program, costs = exchange()
    half = half_of(program, costs)
    assert half is not None
    assert half.num_ranks == 1
    assert half.peer.tolist() == [-1, 0, 0, -1]
    assert_equal(program, costs)


def on_the_second_rank(program: Program, column: str, value: object) -> Program:
    changed: dict[str, Any] = {column: getattr(program, column).copy()}
    changed[column][-1] = value
    return replace(program, **changed)


def another_priority(program: Program) -> Program:
    streams = [s._replace(priority=-s.rank) for s in program.streams]
    return replace(program, streams=tuple(streams))


def other_waits(program: Program) -> Program:
    return replace(
        program, waits=Csr(program.waits.offsets, np.append(program.waits.values[:-1], 0))
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda program: on_the_second_rank(program, "cost", 0),
        lambda program: on_the_second_rank(program, "host_sync", value=True),
        another_priority,
        other_waits,
        lambda program: replace(program, batch=np.where(program.rank == 1, -1, program.batch)),
    ],
    ids=["cost", "host_sync", "priority", "waits", "batch"],
)
def test_ranks_that_differ_in_anything_are_all_played(
    change: Callable[[Program], Program],
) -> None:
    program, costs = exchange()
    program = change(program)
    assert half_of(program, costs) is None
    try:
        expected = simulate(program, costs)
    except DeadlockError:
        with pytest.raises(DeadlockError):
            simulate_compiled(program, costs)
    else:
        assert np.array_equal(expected.end_ns, simulate_compiled(program, costs).end_ns)


def assert_all_are_played(maker: Maker) -> None:
    program, costs = build_mirrored(maker)
    costs = crowded(program, costs)
    assert half_of(program, costs) is None
    assert_equal(program, costs)


def test_ranks_that_wait_for_as_much_but_not_op_by_op_are_all_played() -> None:
    maker = Maker(2)
    for rank in (0, 1):
        made = maker.op(rank, 5), maker.op(rank, 7)
        for waits in (made[:1], made[1:]) if rank == 0 else (made, ()):
            maker.op(rank, 3, stream="high", priority=-1, waits=waits)
    assert_all_are_played(maker)


def test_ranks_whose_messages_share_a_link_are_no_image_of_those_whose_do_not() -> None:
    maker = Maker(4)
    for source, target, media in ((0, 1, ("nvlink", "nvlink")), (3, 2, ("nvlink", "network"))):
        for number, medium in enumerate(media):
            pp = maker.group(f"pp{number}", *sorted((source, target)), medium=medium)
            maker.transfer(source, pp, 20, to=target)
            maker.transfer(target, pp, 20, source=source)
    assert_all_are_played(maker)


def test_ranks_that_send_what_their_images_receive_are_all_played() -> None:
    maker = Maker(4)
    for source, target in ((0, 1), (2, 3)):
        pp = maker.group("pp", *sorted((source, target)))
        maker.transfer(source, pp, 20, to=target)
        maker.transfer(target, pp, 20, source=source)
    assert_all_are_played(maker)


def test_ranks_whose_ops_are_on_other_streams_are_all_played() -> None:
    maker = Maker(2)
    for rank, names in enumerate((("compute", "compute", "other"), ("compute", "other", "other"))):
        for name in names:
            maker.op(rank, 5, stream=name)
    assert_all_are_played(maker)


def test_without_contention_all_are_played() -> None:
    program, costs = exchange()
    assert half_of(program, replace(costs, loads=None)) is None


def test_all_are_played_where_the_half_would_match_messages_otherwise() -> None:
    """Rank 0 sends to rank 1, then to its image; rank 1 receives from the image of 0 first."""
    maker = Maker(4)
    pp = maker.group("pp", 0, 1, 2, 3)
    for rank, last in ((0, 0), (1, 0), (2, 3), (3, 3)):
        near, far = abs(last - 1), abs(last - 2)
        if rank == last:
            for to, duration_ns in ((near, 3), (far, 9)):
                maker.transfer(rank, pp, duration_ns, to=to, batch=0)
        else:
            for source in (3 - last, last):
                maker.transfer(rank, pp, 3, source=source, batch=0)
    assert_all_are_played(maker)


def test_a_standstill_is_told_of_all_ranks() -> None:
    """Unbatched, either waits for the other one's receive before its own."""
    program, costs = exchange(batch=-1)
    assert half_of(program, costs) is not None
    messages: list[str] = []
    for play in (simulate, simulate_compiled):
        with pytest.raises(DeadlockError) as caught:
            play(program, costs)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
