"""What the time of small steps was spent on, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.sim.breakdown import CLASSES, Breakdown, breakdown, busy_ns, overlap
from mhcplan.sim.engine import simulate
from mhcplan.sim.intervals import Union
from tests.support.programs import Maker, makers


def broken_down(maker: Maker) -> Breakdown:
    program, costs = maker.build()
    return breakdown(program, simulate(program, costs))


def spent(result: Breakdown, rank: int) -> dict[str, int]:
    """The classes of a rank that are not 0."""
    pairs = zip(CLASSES, result.ns[rank].tolist(), strict=True)
    return {name: ns for name, ns in pairs if ns}


def test_compute_goes_by_category_and_the_normal_stream_wins() -> None:
    maker = Maker()
    maker.op(0, 10, category="compute")
    maker.op(0, 4, category="optimizer")
    maker.op(0, 3, category="recompute")
    two = maker.transfer(0, maker.group("dp", 0, size=8), 2)
    maker.op(0, 5, stream="high", priority=-1, category="mhc", waits=[two])
    # the urgent op runs 2 .. 7 inside the op of 0 .. 15, which is what the time is called
    assert spent(broken_down(maker), 0) == {"compute": 15, "optimizer": 4, "recompute": 3}


def test_an_urgent_op_counts_where_the_normal_stream_is_idle() -> None:
    maker = Maker()
    urgent = maker.op(0, 5, stream="high", priority=-1, category="mhc")
    maker.op(0, 7, waits=[urgent])
    assert spent(broken_down(maker), 0) == {"mhc": 5, "compute": 7}


def test_waiting_for_expert_traffic() -> None:
    maker = Maker()
    ep = maker.group("ep", 0, size=8)
    work = maker.op(0, 10)
    dispatch = maker.transfer(0, ep, 8, waits=[work])
    maker.op(0, 3)
    maker.op(0, 4, waits=[dispatch])
    assert spent(broken_down(maker), 0) == {"compute": 17, "exposed_ep": 5}


def test_a_message_is_exposed_once_its_data_is_ready() -> None:
    maker = Maker(2)
    pp = maker.group("pp_f", 0, 1)
    work = maker.op(0, 10)
    maker.transfer(0, pp, 6, to=1, waits=[work])
    received = maker.transfer(1, pp, 6, source=0)
    maker.op(1, 5, waits=[received])
    result = broken_down(maker)
    assert spent(result, 1) == {"bubble": 10, "exposed_pp": 6, "compute": 5}
    assert spent(result, 0) == {"compute": 10, "exposed_pp": 6, "bubble": 5}
    assert result.rank == 0
    assert result.reported["bubble"] == 5
    assert result.bubble_percent == pytest.approx(100 * 5 / 21)


def test_a_message_that_waits_for_its_link_is_exposed() -> None:
    maker = Maker(3)
    groups = [maker.group(f"pp{i}", 0, to) for i, to in enumerate((2, 1))]
    work = maker.op(0, 10)
    for group, to in zip(groups, (2, 1), strict=True):
        maker.transfer(0, group, 6, to=to, waits=[work])
    maker.transfer(2, groups[0], 6, source=0)
    received = maker.transfer(1, groups[1], 6, source=0)
    maker.op(1, 5, waits=[received])
    assert spent(broken_down(maker), 1) == {"bubble": 10, "exposed_pp": 12, "compute": 5}


def test_classes_are_asked_in_order() -> None:
    """ep before pp before dp before host, each for what those before leave."""
    maker = Maker()
    ends = {name: maker.group(name, 0, size=8, medium=name) for name in ("ep", "pp", "dp")}
    waits = [maker.transfer(0, group, 10 * i) for i, group in enumerate(ends.values(), start=1)]
    maker.op(0, 5, waits=waits, host_ns=40)
    assert spent(broken_down(maker), 0) == {
        "exposed_ep": 10,
        "exposed_pp": 10,
        "exposed_dp": 10,
        "host": 10,
        "compute": 5,
    }


def test_the_end_of_the_step_waits_for_all_transfers_of_the_rank() -> None:
    maker = Maker(2)
    work = maker.op(0, 10)
    gather = maker.group("dp_experts", 0, size=8)
    maker.transfer(0, gather, 4, waits=[work])
    maker.op(1, 20)
    assert spent(broken_down(maker), 0) == {"compute": 10, "exposed_dp": 4, "bubble": 6}


def test_a_bookkeeping_op_splits_a_gap() -> None:
    """Until it came, the wait was its own; after it, that of the next op."""
    maker = Maker()
    ep, dp = maker.group("ep", 0, size=8), maker.group("dp", 0, size=8, medium="inter_node")
    short, long = maker.transfer(0, dp, 10), maker.transfer(0, ep, 30)
    maker.op(0, 0, waits=[short])
    maker.op(0, 5, waits=[long])
    assert spent(broken_down(maker), 0) == {"exposed_dp": 10, "exposed_ep": 20, "compute": 5}


def test_other_groups_explain_nothing() -> None:
    maker = Maker()
    other = maker.transfer(0, maker.group("world", 0, size=8), 10)
    maker.op(0, 5, waits=[other])
    assert spent(broken_down(maker), 0) == {"bubble": 10, "compute": 5}


def test_communication_on_a_plain_stream_is_no_compute() -> None:
    maker = Maker()
    ep = maker.group("ep", 0, size=8)
    sent = maker.transfer(0, ep, 10)
    maker.streams[maker.rows[sent].stream] = maker.streams[0]._replace(name="comm", group=-1)
    maker.op(0, 5, waits=[sent])
    assert spent(broken_down(maker), 0) == {"exposed_ep": 10, "compute": 5}


def test_an_unknown_category_is_an_error() -> None:
    maker = Maker()
    maker.op(0, 5, category="magic")
    with pytest.raises(ValueError, match="'magic' of a compute op"):
        broken_down(maker)


def test_overlap_and_busy_times() -> None:
    maker = Maker(2)
    ep = maker.group("ep", 0, size=8)
    dp = maker.group("dp", 0, size=8, medium="inter_node")
    first = maker.op(0, 10)
    maker.transfer(0, ep, 20)
    maker.transfer(0, dp, 6, waits=[first])
    maker.op(0, 3, waits=[first])
    maker.op(1, 7)
    program, costs = maker.build()
    timeline = simulate(program, costs)
    result = overlap(program, timeline)
    assert result.compute_ns.tolist() == [13, 7]
    assert result.traffic_ns.tolist() == [[20, 0, 6, 0], [0, 0, 0, 0]]
    assert result.hidden_ns.tolist() == [[13, 0, 3, 0], [0, 0, 0, 0]]
    names = {stream.name + str(stream.rank): i for i, stream in enumerate(program.streams)}
    busy = busy_ns(program, timeline)
    assert {name: int(busy[i]) for name, i in names.items()} == {
        "compute0": 13,
        "ep0": 20,
        "dp0": 6,
        "compute1": 7,
    }


def test_a_batch_is_busy_once() -> None:
    maker = Maker(3)
    pp = maker.group("pp", 0, 1, 2)
    late = maker.op(2, 9)
    maker.transfer(0, pp, 4, to=1, batch=0)
    maker.transfer(0, pp, 4, source=2, batch=0)
    maker.transfer(1, pp, 4, source=0)
    maker.transfer(2, pp, 4, to=0, waits=[late])
    program, costs = maker.build()
    busy = busy_ns(program, simulate(program, costs))
    stream = next(i for i, s in enumerate(program.streams) if (s.rank, s.name) == (0, "pp"))
    assert busy[stream] == 13


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6), st.integers(0, 10))
def test_unions_are_sets_of_instants(pairs: list[tuple[int, int]], at: int) -> None:
    begin, end = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    instants = {t for b, e in pairs for t in range(b, e)}
    union = Union.of(begin, end)
    assert {t for b, e in zip(union.begin, union.end, strict=True) for t in range(b, e)} == instants
    assert (union.begin[1:] > union.end[:-1]).all()
    assert union.below(np.array([at])).tolist() == [len([t for t in instants if t < at])]


@given(makers(max_steps=12))
def test_hidden_traffic_is_traffic_beside_compute(maker: Maker) -> None:
    program, costs = maker.build()
    timeline = simulate(program, costs)
    result = overlap(program, timeline)
    for rank in range(program.num_ranks):
        instants: dict[str, set[int]] = {"compute": set(), "ep": set(), "pp": set(), "dp": set()}
        for op in range(*program.rank_offsets[rank : rank + 2].tolist()):
            group = int(program.group[op])
            name = program.groups[group].name[:2] if group >= 0 else "compute"
            instants[name] |= set(range(int(timeline.start_ns[op]), int(timeline.end_ns[op])))
        assert result.compute_ns[rank] == len(instants["compute"])
        for i, name in enumerate(("ep", "pp", "dp")):
            assert result.traffic_ns[rank, i] == len(instants[name])
            assert result.hidden_ns[rank, i] == len(instants[name] & instants["compute"])
