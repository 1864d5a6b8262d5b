"""Contention: the engines agree on it, and hand-made steps come out as worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.sim.breakdown import breakdown
from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.device_kernels import Kernel, Loads, Parameters, Traffic
from mhcplan.sim.engine import simulate
from mhcplan.sim.longest_path import StepGraph
from mhcplan.sim.order import NO_OP, order_of
from mhcplan.sim.timeline import REASONS, critical_path
from tests.support.loads import loads, with_loads
from tests.support.programs import Maker, makers

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject

    from mhcplan.sim.program import CostTable, Program
    from mhcplan.sim.timeline import Timeline

COLUMNS = ("issue_ns", "start_ns", "end_ns", "cause", "reason")
# nothing but SMs counts: every figure below can be worked out by hand
BARE = Parameters(
    num_sms=100, hbm_bytes_per_ns=1e9, busy_delay=0.0, memory_delay=0.0,
    compute_delay=0.0, crowding=1.0,
)  # fmt: skip
TILES = Kernel(1000, 500, 1)  # five waves of 200 ns
WAVE = Kernel(1000, 100, 1)
PERSISTENT = Kernel(1000, 100, 1, persistent=True)
STREAMING = Kernel(100, 10_000, 8, hbm_bytes=10**11)  # all of the memory bandwidth
STREAMING_TILES = Kernel(1000, 500, 1, hbm_bytes=10**12)


def assert_equal(program: Program, costs: CostTable) -> None:
    expected, found = simulate(program, costs), simulate_compiled(program, costs)
    for name in COLUMNS:
        assert np.array_equal(getattr(expected, name), getattr(found, name)), name


@settings(max_examples=150, deadline=None)
@given(makers(), st.sampled_from([1, 13, 10**5]), st.data())
def test_equal_on_random_programs_and_loads(maker: Maker, scale: int, data: DataObject) -> None:
    program, costs = maker.build(scale=scale)
    assert_equal(program, with_loads(costs, data.draw(loads(program))))


@settings(max_examples=50, deadline=None)
@given(makers(), st.data())
def test_what_waits_waits_and_nothing_runs_faster_than_alone(
    maker: Maker, data: DataObject
) -> None:
    program, costs = maker.build(scale=1000)
    costs = with_loads(costs, data.draw(loads(program)))
    line = simulate_compiled(program, costs)
    order, start, end = order_of(program), line.start_ns, line.end_ns
    assert (start >= line.issue_ns).all()
    assert (start[order.waited.owners] >= end[order.waited.values]).all()
    has_previous = order.previous != NO_OP
    assert (start[has_previous] >= end[order.previous[has_previous]]).all()
    for number in range(order.meeting.max(initial=-1) + 1):
        assert len(set(start[order.meeting == number].tolist())) == 1
    assert (end - start >= costs.duration_ns[program.cost]).all()
    assert StepGraph(program).step_ns([costs])[0] <= line.step_ns


@settings(max_examples=30, deadline=None)
@given(makers(), st.data())
def test_breakdown_and_critical_path_still_add_up(maker: Maker, data: DataObject) -> None:
    program, costs = maker.build(scale=1000)
    line = simulate_compiled(program, with_loads(costs, data.draw(loads(program))))
    assert (breakdown(program, line).ns.sum(axis=1) == line.step_ns).all()
    path = critical_path(line)
    assert sum(piece.end_ns - piece.start_ns for piece in path) == line.step_ns


# -- by hand ---------------------------------------------------------------------------------------


def played(
    maker: Maker,
    given: dict[int, Kernel | Traffic],
    *,
    compute_sms: int | None = None,
    connections: int = 8,
    **parameters: float,
) -> Timeline:
    """Play with the loads of some ops, by the number that the maker gave them."""
    program, costs = maker.build()
    by_op = {maker.index_of[number]: load for number, load in given.items()}
    keys = range(program.num_ops)
    loaded = Loads(
        tuple((load,) if isinstance(load := by_op.get(i), Kernel) else () for i in keys),
        tuple(load if isinstance(load := by_op.get(i), Traffic) else None for i in keys),
        replace(BARE, **parameters), compute_sms, connections,
    )  # fmt: skip
    assert_equal(program, with_loads(costs, loaded))
    return simulate_compiled(program, with_loads(costs, loaded))


def urgent_beside(kernel: Kernel) -> tuple[int, str]:
    """When an urgent kernel starts that comes 300 ns after ``kernel``, and why then."""
    maker = Maker()
    first = maker.op(0, 1000)
    group = maker.group("gap", 0, size=2, medium="gap")
    wait = maker.transfer(0, group, 300)
    urgent = maker.op(0, 50, stream="high", priority=-1, waits=[wait])
    line = played(maker, {first: kernel, wait: Traffic(0)})
    assert line.end_ns[first] >= 1000
    return int(line.start_ns[urgent]), REASONS[line.reason[urgent]]


def test_an_urgent_kernel_waits_for_the_wave_that_is_resident() -> None:
    assert urgent_beside(TILES) == (400, "sms")
    assert urgent_beside(Kernel(1000, 5000, 1)) == (300, "event")  # waves of 20 ns


def test_a_persistent_kernel_starves_an_urgent_one() -> None:
    assert urgent_beside(PERSISTENT) == (1000, "priority")
    assert urgent_beside(WAVE) == (1000, "priority")


@pytest.mark.parametrize(
    ("first_is", "urgent_is", "ends"),
    [
        (TILES, TILES, (1100, 500)),  # neither is bound by memory: the urgent one, then the other
        (TILES, STREAMING, (1050, 500)),  # half of what computes fits beside
        (STREAMING_TILES, STREAMING, (1100, 600)),  # both halve the memory
    ],
)
def test_what_goes_on_beside_an_urgent_kernel(
    first_is: Kernel, urgent_is: Kernel, ends: tuple[int, int]
) -> None:
    maker = Maker()
    first = maker.op(0, 1000)
    wait = maker.transfer(0, maker.group("gap", 0, size=2, medium="gap"), 400)
    urgent = maker.op(0, 100, stream="high", priority=-1, waits=[wait])
    given = {first: first_is, wait: Traffic(0), urgent: urgent_is}
    line = played(maker, given, together=0.5)
    assert line.start_ns[urgent] == 400
    assert (line.end_ns[first], line.end_ns[urgent]) == pytest.approx(ends, abs=2)


def test_an_equally_urgent_kernel_takes_what_the_first_leaves() -> None:
    maker = Maker()
    first, second = maker.op(0, 1000), maker.op(0, 100, stream="side")
    line = played(maker, {first: TILES, second: STREAMING}, together=0.5)
    assert line.end_ns[first] == 1000
    assert line.end_ns[second] == pytest.approx(200, abs=2)


def message_beside(
    kernel: Kernel, ctas: int = 20, *, priority: int = 0, after: int = 300
) -> tuple[int, int, str, int]:
    """Start and end of a message of 100 ns that comes ``after`` a kernel began, why it started
    then, and the end of a second such kernel."""
    maker = Maker()
    first = maker.op(0, 1000)
    second = maker.op(0, 1000)
    gap, pair = (maker.group(name, 0, size=2, medium=name) for name in ("gap", "pair"))
    wait = maker.transfer(0, gap, after)
    sent = maker.transfer(0, pair, 100, waits=[wait], priority=priority)
    line = played(
        maker, {first: kernel, second: kernel, wait: Traffic(0), sent: Traffic(ctas)}
    )  # fmt: skip
    start, end = int(line.start_ns[sent]), int(line.end_ns[sent])
    return start, end, REASONS[line.reason[sent]], int(line.end_ns[second])


def test_traffic_of_equal_priority_finds_room_between_two_kernels() -> None:
    start, end, reason, last = message_beside(WAVE)
    assert (start, end, reason) == (1000, 1100, "sms")
    # the second kernel lacks 20 SMs for 100 ns, in which it goes as if it took two waves
    assert last == 2050


def test_traffic_finds_room_in_a_tail_that_leaves_sms_idle() -> None:
    assert message_beside(Kernel(1000, 480, 1)) == (800, 900, "sms", 2000)


def test_a_copy_engine_and_a_grid_with_spare_sms_let_traffic_through() -> None:
    assert message_beside(WAVE, ctas=0) == (300, 400, "event", 2000)
    assert message_beside(Kernel(1000, 80, 1)) == (300, 400, "event", 2000)


def test_ctas_that_find_no_sm_follow_those_that_do() -> None:
    # 10 SMs are free for 20 CTAs: the link is what limits, so half of them are as fast
    assert message_beside(Kernel(1000, 90, 1))[:3] == (300, 400, "event")


def test_urgent_traffic_takes_the_next_sms_that_fall_free() -> None:
    start, end, reason, last = message_beside(TILES, priority=-1)
    assert (start, end, reason) == (400, 500, "sms")
    assert last > 2000  # fewer SMs for the rest of a wave


def test_urgent_traffic_waits_until_all_ctas_of_an_sm_have_ended() -> None:
    """Two CTAs of 200 ns an SM, out of step, of a kernel that leaves SMs at any time: that both
    have ended on 8 of 100 SMs takes sqrt(8 / 100) of a CTA's life."""
    kernel = replace(STREAMING_TILES, ctas=1000, ctas_per_sm=2)
    assert message_beside(kernel, priority=-1)[:3] == (300 + 57, 300 + 57 + 100, "sms")


def test_a_handshake_is_made_again_for_ctas_that_found_no_sm() -> None:
    """10 SMs are free for 11 CTAs: there is a second round."""
    maker = Maker()
    busy = maker.op(0, 1000)
    gap, pair = (maker.group(name, 0, size=2, medium=name) for name in ("gap", "pair"))
    wait = maker.transfer(0, gap, 300)
    sent = maker.transfer(0, pair, 200, waits=[wait])
    given = {busy: Kernel(1000, 90, 1), wait: Traffic(0), sent: Traffic(11, fixed_ns=100)}
    line = played(maker, given)
    assert line.start_ns[sent] == 300
    assert line.end_ns[sent] == pytest.approx(300 + 2 * 100 + 100, abs=2)


def end_beside_50_held_sms(kernel: Kernel, crowding: float, traffic_share: float) -> int:
    """When an op of 1000 ns ends, beside traffic that uses a share of the memory bandwidth."""
    maker = Maker()
    held = maker.transfer(0, maker.group("pair", 0, size=2), 10_000)
    op = maker.op(0, 1000)
    moved = round(traffic_share * 10_000 * BARE.hbm_bytes_per_ns)
    given = {held: Traffic(50, received_hbm_bytes=moved), op: kernel}
    line = played(maker, given, crowding=crowding)
    return int(line.end_ns[maker.index_of[op]])


@pytest.mark.parametrize(("per_sm", "expected_ns"), [(2, 1500), (1, 2000)])
def test_ctas_crowd_together_where_they_fit(per_sm: int, expected_ns: int) -> None:
    """100 CTAs on 50 SMs: two an SM, which share what one of them left idle, or two waves."""
    found = end_beside_50_held_sms(Kernel(1000, 100, per_sm), crowding=0.5, traffic_share=0.0)
    assert found == pytest.approx(expected_ns, rel=1e-3)


def test_ctas_that_crowded_together_leave_the_sms_to_others_that_fall_free() -> None:
    maker = Maker()
    pair, next_pair = (maker.group(name, 0, size=2, medium=name) for name in ("pair", "next"))
    held = maker.transfer(0, pair, 500)
    op = maker.op(0, 1000)
    sent = maker.transfer(0, next_pair, 100, waits=[held])
    kernel = Kernel(1000, 100, 2)
    line = played(maker, {held: Traffic(50), op: kernel, sent: Traffic(50)})
    assert line.start_ns[sent] == 500


def test_on_fewer_sms_a_kernel_bound_by_memory_needs_no_less_of_it() -> None:
    kernel = Kernel(1000, 100, 2, hbm_bytes=10**12)
    found = end_beside_50_held_sms(kernel, crowding=0.0, traffic_share=0.2)
    assert found == pytest.approx(1250, rel=1e-3)


def test_a_peer_that_is_late_makes_its_partner_hold_sms() -> None:
    maker = Maker(2)
    pair = maker.group("pair", 0, 1)
    here = maker.transfer(0, pair, 100, to=1)
    busy = maker.op(0, 1000)
    late = maker.op(1, 400)
    there = maker.transfer(1, pair, 100, source=0, waits=[late])
    line = played(maker, {here: Traffic(20), there: Traffic(20), busy: WAVE, late: WAVE})
    index = maker.index_of
    assert line.start_ns[index[here]] == line.start_ns[index[there]] == 400
    assert REASONS[line.reason[index[here]]] == "peer"
    # 500 ns at half speed, the time for which 20 SMs were held
    assert line.end_ns[index[busy]] == pytest.approx(1250, abs=2)


def end_beside_20_held_sms(kernel: Kernel, share: float) -> int:
    """When an op of 1000 ns ends that uses ``share`` of the memory bandwidth."""
    maker = Maker()
    held = maker.transfer(0, maker.group("pair", 0, size=2), 10_000)
    op = maker.op(0, 1000)
    kernel = replace(kernel, hbm_bytes=round(share * 1000 * BARE.hbm_bytes_per_ns))
    line = played(maker, {held: Traffic(20), op: kernel})
    return int(line.end_ns[maker.index_of[op]])


@pytest.mark.parametrize(("share", "last_ns"), [(0.0, 1000), (0.2, 850), (0.6, 550)])
def test_ctas_of_a_last_wave_wait_for_memory_only_as_far_as_others_use_it(
    share: float, last_ns: int
) -> None:
    """20 of 100 CTAs find no SM at first, and then run where 80 could: of their waits for memory
    a quarter is left."""
    assert end_beside_20_held_sms(PERSISTENT, share) == pytest.approx(1000 + last_ns, rel=1e-3)


@pytest.mark.parametrize(("share", "expected_ns"), [(0.0, 1400), (0.2, 1322), (0.6, 1166)])
def test_fewer_ctas_at_a_time_wait_less_for_memory(share: float, expected_ns: int) -> None:
    """500 CTAs on 80 SMs: six waves whose CTAs wait a fifth less, and 20 that wait a quarter."""
    assert end_beside_20_held_sms(TILES, share) == pytest.approx(expected_ns, rel=1e-3)


def test_a_persistent_grid_of_two_ctas_an_sm_is_no_fluid() -> None:
    maker = Maker()
    pair = maker.group("pair", 0, size=2)
    held = maker.transfer(0, pair, 10_000)
    op = maker.op(0, 1000)
    line = played(maker, {held: Traffic(20), op: Kernel(1000, 200, 2, persistent=True)})
    assert line.end_ns[maker.index_of[op]] == pytest.approx(2000, rel=1e-3)


@pytest.mark.parametrize(
    ("kernel", "expected_ns"),
    [
        # 2 of 100 CTAs find no SM; with their 4 pieces each they run when the others have ended
        (Kernel(1000, 100, 1, persistent=True, pieces=400), 2000),
        # the last 50, of which these are, have 3 pieces and not 4
        (Kernel(1000, 100, 1, persistent=True, pieces=350), 1750),
        # the others fetch what they can in 5 rounds; the first pieces of the late ones are left
        (Kernel(1000, 100, 1, persistent=True, pieces=400, dealt=False), 1500),
        # attention's SMs fall idle over the last 300 ns: 850 ns of all are for 98 to make up
        (Kernel(1000, 100, 1, persistent=True, pieces=400, dealt=False, tail_share=0.3), 1017),
    ],
)
def test_what_a_late_cta_leaves_undone_depends_on_how_its_kernel_hands_out_work(
    kernel: Kernel, expected_ns: int
) -> None:
    maker = Maker()
    pair = maker.group("pair", 0, size=2)
    held = maker.transfer(0, pair, 10_000)
    op = maker.op(0, 1000)
    line = played(maker, {held: Traffic(2), op: kernel})
    assert line.end_ns[maker.index_of[op]] == pytest.approx(expected_ns, rel=1e-3)


CLUSTERS = Kernel(1000, 80, 1, persistent=True, cluster=4)  # on all 80 SMs that clusters fit on


@pytest.mark.parametrize(("cluster", "ctas"), [(1, 80), (2, 80), (4, 80), (8, 80), (4, 60)])
@settings(max_examples=20, deadline=None)
@given(held=st.integers(1, 40))
def test_a_kernel_in_clusters_lacks_each_sm_that_is_held_where_it_begins(
    cluster: int, ctas: int, held: int
) -> None:
    """Clusters of more than two find places on 80 of 100 SMs only."""
    maker = Maker()
    pair = maker.group("pair", 0, size=2)
    sent = maker.transfer(0, pair, 10_000)
    op = maker.op(0, 1000)
    kernel = replace(CLUSTERS, ctas=ctas, cluster=cluster)
    line = played(maker, {sent: Traffic(held), op: kernel}, clustered=0.8)
    fits = ctas <= (80 if cluster > 2 else 100) - held
    assert line.end_ns[maker.index_of[op]] == pytest.approx(1000 if fits else 2000, rel=1e-3)


def beside_clusters(first: Kernel, second: Kernel) -> tuple[int, int]:
    """When two kernels end beside a message of 4 CTAs that comes after 300 ns and stays."""
    maker = Maker()
    ops = [maker.op(0, 1000) for _ in range(2)]
    gap, pair = (maker.group(name, 0, size=2, medium=name) for name in ("gap", "pair"))
    wait = maker.transfer(0, gap, 300)
    sent = maker.transfer(0, pair, 10_000, waits=[wait])
    given = {wait: Traffic(0), sent: Traffic(4), ops[0]: first, ops[1]: second}
    line = played(maker, given, clustered=0.8)
    assert line.start_ns[sent] == 300
    ends = [int(line.end_ns[maker.index_of[op]]) for op in ops]
    return ends[0], ends[1]


def test_clusters_that_have_begun_do_not_miss_what_they_leave_free_but_the_next_ones_do() -> None:
    assert beside_clusters(CLUSTERS, CLUSTERS) == (1000, pytest.approx(3000, abs=3))
    assert beside_clusters(CLUSTERS, Kernel(1000, 80, 1)) == (1000, 2000)


def test_a_message_that_comes_as_clusters_begin_finds_what_they_leave_free() -> None:
    """It waits for an event, the kernel for none."""
    maker = Maker()
    first, second = maker.op(0, 300), maker.op(0, 1000)
    gap, pair = (maker.group(name, 0, size=2, medium=name) for name in ("gap", "pair"))
    wait = maker.transfer(0, gap, 300)
    sent = maker.transfer(0, pair, 10_000, waits=[wait])
    given = {wait: Traffic(0), sent: Traffic(4), first: TILES, second: CLUSTERS}
    line = played(maker, given, clustered=0.8)
    assert (line.start_ns[sent], line.end_ns[maker.index_of[second]]) == (300, 1300)


@pytest.mark.parametrize("first_ns", [500.0, 333.4])
def test_the_kernel_that_traffic_waits_for_goes_at_its_own_rate(first_ns: float) -> None:
    """An op of two kernels, 1000 ns in all. Half of the message finds SMs beside the first, which
    does not feel it; the other half comes when that ends, and the second takes two waves."""
    maker = Maker()
    gap, pair = (maker.group(name, 0, size=2, medium=name) for name in ("gap", "pair"))
    wait = maker.transfer(0, gap, 100)
    sent = maker.transfer(0, pair, 10_000, waits=[wait])
    op = maker.op(0, 1000)
    program, costs = maker.build()
    given = {maker.index_of[wait]: Traffic(0), maker.index_of[sent]: Traffic(20)}
    kernels = (
        Kernel(first_ns, 90, 1, persistent=True),
        Kernel(1000 - first_ns, 100, 1, persistent=True),
    )
    keys = range(program.num_ops)
    loaded = with_loads(costs, Loads(
        tuple(kernels if i == maker.index_of[op] else () for i in keys),
        tuple(given.get(i) for i in keys), BARE,
    ))  # fmt: skip
    assert_equal(program, loaded)
    line = simulate_compiled(program, loaded)
    assert line.end_ns[maker.index_of[op]] == pytest.approx(first_ns + 2 * (1000 - first_ns), abs=3)


def test_transfers_that_want_more_than_a_link_carries_share_it() -> None:
    maker = Maker()
    a, b, c = (maker.group(name, 0, size=2) for name in ("a", "b", "c"))
    ops = [maker.transfer(0, group, 300) for group in (a, b, c)]
    shares = dict(zip(ops, (1.0, 0.5, 0.5), strict=True))
    line = played(maker, {op: Traffic(0, link_share=share) for op, share in shares.items()})
    assert line.end_ns.tolist() == pytest.approx([600, 600, 600], abs=2)


@pytest.mark.parametrize("shared_end_sends", [True, False])
def test_a_link_has_two_directions_and_each_is_shared(shared_end_sends: bool) -> None:
    maker = Maker(3)
    given: dict[int, Kernel | Traffic] = {}
    for other in (1, 2):
        group = maker.group(f"pair{other}", 0, other)
        ends = (0, other) if shared_end_sends else (other, 0)
        given[maker.transfer(ends[0], group, 300, to=ends[1])] = Traffic(0)
        given[maker.transfer(ends[1], group, 300, source=ends[0])] = Traffic(0)
    assert played(maker, given).end_ns.tolist() == pytest.approx([600] * 4, abs=2)


def test_compute_on_fewer_sms_takes_more_waves_and_leaves_room() -> None:
    maker = Maker()
    op = maker.op(0, 1000)
    assert played(maker, {op: TILES}, compute_sms=84).end_ns[op] == pytest.approx(1200, abs=2)
    maker = Maker()
    op = maker.op(0, 1000)
    gap, pair = (maker.group(name, 0, size=2, medium=name) for name in ("gap", "pair"))
    wait = maker.transfer(0, gap, 300)
    sent = maker.transfer(0, pair, 100, waits=[wait])
    line = played(maker, {op: TILES, wait: Traffic(0), sent: Traffic(16)}, compute_sms=84)
    assert (line.start_ns[sent], line.end_ns[op]) == (300, pytest.approx(1200, abs=2))


@pytest.mark.parametrize("kernel", [WAVE, PERSISTENT])
def test_a_grid_made_for_the_whole_gpu_takes_a_second_wave_on_fewer_sms(kernel: Kernel) -> None:
    """Also where a message comes in its second wave, which leaves SMs for it."""
    maker = Maker()
    gap, pair = (maker.group(name, 0, size=2, medium=name) for name in ("gap", "pair"))
    wait = maker.transfer(0, gap, 1500)
    sent = maker.transfer(0, pair, 100, waits=[wait])
    op = maker.op(0, 1000)
    line = played(maker, {op: kernel, wait: Traffic(0), sent: Traffic(60)}, compute_sms=84)
    assert line.start_ns[sent] == 1500
    assert line.end_ns[op] == pytest.approx(2000, abs=2)


def test_one_hardware_queue_makes_streams_wait_for_what_was_launched_before() -> None:
    def start_of_the_last(connections: int) -> int:
        maker = Maker()
        gap, pair = (maker.group(name, 0, size=2, medium=name) for name in ("gap", "pair"))
        wait = maker.transfer(0, gap, 300)
        blocked = maker.op(0, 100, waits=[wait])
        free = maker.transfer(0, pair, 50)
        line = played(
            maker, {wait: Traffic(0), blocked: PERSISTENT, free: Traffic(0)},
            connections=connections,
        )  # fmt: skip
        return int(line.start_ns[free])

    assert start_of_the_last(8) == 0
    assert start_of_the_last(1) == 300


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_op_alone_takes_its_time_whatever_its_kernels(data: DataObject) -> None:
    maker = Maker()
    for _ in range(6):
        maker.op(0, data.draw(st.integers(0, 10**6)))
    program, costs = maker.build()
    given_loads = data.draw(loads(program).filter(lambda one: one.compute_sms is None))
    line = simulate_compiled(program, with_loads(costs, given_loads))
    assert (line.end_ns - line.start_ns).tolist() == costs.duration_ns.tolist()
