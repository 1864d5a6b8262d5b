"""Steps worked out by hand, to the nanosecond."""

from __future__ import annotations

import numpy as np
import pytest

from mhcplan.sim.engine import DeadlockError, simulate
from mhcplan.sim.program import MeetError
from mhcplan.sim.timeline import REASONS, PathStep, Timeline, critical_path
from tests.support.programs import Maker


def play(maker: Maker) -> tuple[Timeline, dict[int, tuple[int, int]]]:
    """The timeline, and (start, end) by the number that the maker gave."""
    timeline = simulate(*maker.build())
    index = maker.index_of
    return timeline, {
        number: (int(timeline.start_ns[op]), int(timeline.end_ns[op]))
        for number, op in enumerate(index)
    }


def reason(maker: Maker, timeline: Timeline, number: int) -> tuple[str, int]:
    """Why an op started when it did, and the number of the op that is its cause."""
    index = maker.index_of
    op = index[number]
    cause = int(timeline.cause[op])
    return REASONS[timeline.reason[op]], index.index(cause) if cause >= 0 else -1


# -- streams, events, the host --------------------------------------------------------------------


def test_a_stream_runs_its_ops_in_order_and_events_order_streams() -> None:
    maker = Maker()
    ep = maker.group("ep", 0, size=8)
    first = maker.op(0, 10)
    sent = maker.transfer(0, ep, 7, waits=[first])
    beside = maker.op(0, 4)
    after = maker.op(0, 5, waits=[sent])
    timeline, at = play(maker)
    assert at == {first: (0, 10), sent: (10, 17), beside: (10, 14), after: (17, 22)}
    assert reason(maker, timeline, beside) == ("stream", first)
    assert reason(maker, timeline, after) == ("event", sent)
    assert timeline.step_ns == 22


def test_an_event_may_be_recorded_by_a_stream_that_is_issued_later_elsewhere() -> None:
    """Waits cross streams against the order in which the streams first appear."""
    maker = Maker()
    ep = maker.group("ep", 0, size=8)
    late = maker.transfer(0, ep, 3)
    compute = maker.op(0, 2, waits=[late])
    again = maker.transfer(0, ep, 3, waits=[compute])
    _, at = play(maker)
    assert at == {late: (0, 3), compute: (3, 5), again: (5, 8)}


def test_a_slow_host_sets_the_pace() -> None:
    maker = Maker()
    ops = [maker.op(0, 2, host_ns=5) for _ in range(3)]
    timeline, at = play(maker)
    assert [at[op] for op in ops] == [(5, 7), (10, 12), (15, 17)]
    assert {reason(maker, timeline, op) for op in ops} == {("host", -1)}
    assert timeline.issue_ns.tolist() == [5, 10, 15]


def test_a_fast_host_runs_ahead() -> None:
    maker = Maker()
    ops = [maker.op(0, 10, host_ns=4) for _ in range(3)]
    timeline, at = play(maker)
    assert [at[op] for op in ops] == [(4, 14), (14, 24), (24, 34)]
    assert timeline.issue_ns.tolist() == [4, 8, 12]


def test_the_host_issues_for_all_streams_of_its_rank_and_for_no_other_rank() -> None:
    maker = Maker(2)
    a = maker.op(0, 1, host_ns=5)
    b = maker.op(0, 1, host_ns=5, stream="side")
    c = maker.op(1, 1, host_ns=5)
    _, at = play(maker)
    assert (at[a], at[b], at[c]) == ((5, 6), (10, 11), (5, 6))


def test_a_host_sync_stalls_the_host_until_the_op_ends() -> None:
    maker = Maker()
    counts = maker.op(0, 20, host_ns=3, host_sync=True)
    after = maker.op(0, 4, host_ns=3, stream="side")
    timeline, at = play(maker)
    assert at == {counts: (3, 23), after: (26, 30)}
    assert reason(maker, timeline, after) == ("host", counts)
    assert critical_path(timeline) == [
        PathStep(-1, "start", 0, 3),
        PathStep(0, "host", 3, 23),
        PathStep(-1, "host", 23, 26),
        PathStep(1, "host", 26, 30),
    ]


def test_ops_of_no_duration_pass_on_what_they_wait_for() -> None:
    maker = Maker()
    ep = maker.group("ep", 0, size=8)
    sent = maker.transfer(0, ep, 6)
    released = maker.op(0, 0, waits=[sent])
    after = maker.op(0, 0)
    last = maker.op(0, 2, stream="side", waits=[after])
    _, at = play(maker)
    assert at == {sent: (0, 6), released: (6, 6), after: (6, 6), last: (6, 8)}


def test_a_program_without_ops_takes_no_time() -> None:
    timeline = simulate(*Maker().build())
    assert timeline.step_ns == 0
    assert critical_path(timeline) == []


# -- priority -------------------------------------------------------------------------------------


def delay(maker: Maker, ns: int, name: str = "dp") -> int:
    """An op that ends after ``ns`` and takes no SMs and no link of others."""
    return maker.transfer(0, maker.group(f"{name}{ns}", 0, size=8, medium=f"m{ns}"), ns)


def test_an_urgent_op_stops_a_less_urgent_one_and_gives_the_sms_back() -> None:
    maker = Maker()
    four = delay(maker, 4)
    normal = maker.op(0, 10)
    urgent = maker.op(0, 3, stream="high", priority=-1, waits=[four])
    timeline, at = play(maker)
    assert at[urgent] == (4, 7)
    assert at[normal] == (0, 13)
    assert reason(maker, timeline, urgent) == ("event", four)


def test_a_less_urgent_op_waits_for_urgent_ones() -> None:
    maker = Maker()
    four = delay(maker, 4)
    urgent = [maker.op(0, 5, stream="high", priority=-1) for _ in range(2)]
    normal = maker.op(0, 10, waits=[four])
    timeline, at = play(maker)
    assert at[urgent[1]] == (5, 10)
    assert at[normal] == (10, 20)
    assert reason(maker, timeline, normal) == ("priority", urgent[1])


def test_an_op_can_be_stopped_many_times() -> None:
    maker = Maker()
    ends = [delay(maker, ns) for ns in (2, 6, 9)]
    normal = maker.op(0, 10)
    urgent = [maker.op(0, 1, stream="high", priority=-1, waits=[end]) for end in ends]
    _, at = play(maker)
    assert [at[op] for op in urgent] == [(2, 3), (6, 7), (9, 10)]
    assert at[normal] == (0, 13)


def test_three_levels_of_urgency() -> None:
    maker = Maker()
    two, three = delay(maker, 2), delay(maker, 3)
    low = maker.op(0, 10)
    middle = maker.op(0, 6, stream="high", priority=-1, waits=[two])
    top = maker.op(0, 4, stream="top", priority=-2, waits=[three])
    _, at = play(maker)
    assert (at[top], at[middle], at[low]) == ((3, 7), (2, 12), (0, 20))


def test_equally_urgent_ops_of_two_streams_take_turns_and_stop_nobody() -> None:
    maker = Maker()
    three = delay(maker, 3)
    first = maker.op(0, 5, waits=[three])
    second = maker.op(0, 10, stream="side")
    timeline, at = play(maker)
    assert at[second] == (0, 10), "it began first, and an equal does not stop it"
    assert at[first] == (10, 15)
    assert reason(maker, timeline, first) == ("priority", second)


def test_of_equals_that_wait_the_one_issued_first_goes_first() -> None:
    maker = Maker()
    busy = maker.op(0, 5, stream="third")
    first = maker.op(0, 2, stream="side")
    second = maker.op(0, 2)
    _, at = play(maker)
    assert (at[busy], at[first], at[second]) == ((0, 5), (5, 7), (7, 9))


def test_an_op_that_was_stopped_goes_on_before_its_equals_begin() -> None:
    maker = Maker()
    two, three = delay(maker, 2), delay(maker, 3)
    newcomer = maker.op(0, 4, waits=[three])
    stopped = maker.op(0, 10, stream="side")
    urgent = maker.op(0, 5, stream="high", priority=-1, waits=[two])
    _, at = play(maker)
    assert (at[urgent], at[stopped], at[newcomer]) == ((2, 7), (0, 15), (15, 19))


def test_bookkeeping_is_not_held_up_by_urgent_kernels() -> None:
    maker = Maker()
    two = delay(maker, 2)
    maker.op(0, 9, stream="high", priority=-1)
    freed = maker.op(0, 0, waits=[two])
    _, at = play(maker)
    assert at[freed] == (2, 2)


def test_ranks_have_sms_of_their_own() -> None:
    maker = Maker(2)
    a, b = maker.op(0, 5, stream="high", priority=-1), maker.op(1, 5)
    _, at = play(maker)
    assert at[a] == at[b] == (0, 5)


def test_transfers_take_no_sms() -> None:
    maker = Maker()
    ep = maker.group("ep", 0, size=8)
    compute, sent = maker.op(0, 9), maker.transfer(0, ep, 9)
    _, at = play(maker)
    assert at[compute] == at[sent] == (0, 9)


# -- transfers ------------------------------------------------------------------------------------


def test_a_send_and_its_receive_start_when_both_are_there() -> None:
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    work = maker.op(0, 8)
    send = maker.transfer(0, pp, 5, to=1, waits=[work])
    receive = maker.transfer(1, pp, 5, source=0)
    used = maker.op(1, 3, waits=[receive])
    timeline, at = play(maker)
    assert at[send] == at[receive] == (8, 13)
    assert at[used] == (13, 16)
    assert reason(maker, timeline, send) == ("event", work)
    assert reason(maker, timeline, receive) == ("peer", work)


def test_a_send_waits_for_its_receiver() -> None:
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    send = maker.transfer(0, pp, 5, to=1)
    work = maker.op(1, 8)
    receive = maker.transfer(1, pp, 5, source=0, waits=[work])
    after = maker.transfer(0, pp, 5, to=1)
    maker.transfer(1, pp, 5, source=0)
    timeline, at = play(maker)
    assert at[send] == at[receive] == (8, 13)
    assert at[after] == (13, 18)
    assert reason(maker, timeline, send) == ("peer", work)


def test_a_collective_waits_for_every_member_and_takes_as_long_as_its_longest() -> None:
    maker = Maker(3)
    dp = maker.group("dp", 0, 1, 2)
    work = [maker.op(rank, ns) for rank, ns in enumerate((3, 9, 6))]
    calls = [maker.transfer(rank, dp, ns, waits=[work[rank]]) for rank, ns in enumerate((4, 5, 4))]
    _, at = play(maker)
    assert [at[call] for call in calls] == [(9, 14)] * 3


def test_a_peer_that_waits_for_its_host_is_a_peer() -> None:
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    send = maker.transfer(0, pp, 5, to=1)
    receive = maker.transfer(1, pp, 5, source=0, host_ns=7)
    timeline, at = play(maker)
    assert at[send] == at[receive] == (7, 12)
    assert reason(maker, timeline, send) == ("peer", -1)
    assert critical_path(timeline)[0] == PathStep(-1, "start", 0, 7)


# -- links ----------------------------------------------------------------------------------------


def sends(
    maker: Maker, source: int, to: int, ns: int, *, medium: str = "intra_node", priority: int = 0
) -> tuple[int, int]:
    """A send and its receive in a group, and so on streams, of their own."""
    group = maker.group(f"pp{len(maker.groups)}", source, to, medium=medium)
    send = maker.transfer(source, group, ns, to=to, priority=priority)
    return send, maker.transfer(to, group, ns, source=source, priority=priority)


def test_transfers_out_of_one_rank_take_turns() -> None:
    maker = Maker(3)
    (a, _), (b, received) = sends(maker, 0, 1, 5), sends(maker, 0, 2, 5)
    timeline, at = play(maker)
    assert (at[a], at[b]) == ((0, 5), (5, 10))
    assert reason(maker, timeline, b)[0] == reason(maker, timeline, received)[0] == "link"
    assert timeline.end_ns[timeline.cause[maker.index_of[b]]] == 5


def test_transfers_into_one_rank_take_turns() -> None:
    maker = Maker(3)
    (a, _), (b, _) = sends(maker, 0, 2, 5), sends(maker, 1, 2, 5)
    _, at = play(maker)
    assert sorted([at[a], at[b]]) == [(0, 5), (5, 10)]


def test_out_and_in_are_two_links_and_media_do_not_meet() -> None:
    maker = Maker(3)
    ops = [
        sends(maker, 0, 1, 5)[0],
        sends(maker, 1, 0, 5)[0],
        sends(maker, 0, 2, 5, medium="inter_node")[0],
    ]
    _, at = play(maker)
    assert [at[op] for op in ops] == [(0, 5)] * 3


def test_a_collective_takes_both_links_of_all_its_members() -> None:
    maker = Maker(3)
    dp = maker.group("dp", 0, 1)
    for rank in (0, 1):
        last = maker.transfer(rank, dp, 6)
    into, _ = sends(maker, 2, 1, 5)
    out, _ = sends(maker, 0, 2, 5)
    _, at = play(maker)
    assert at[last] == (0, 6)
    assert at[into] == at[out] == (6, 11)


def test_a_link_goes_to_the_urgent_then_to_the_one_issued_first() -> None:
    maker = Maker(5)
    sends(maker, 0, 1, 5)
    second = sends(maker, 0, 2, 5)[0]
    third = sends(maker, 0, 3, 5)[0]
    urgent = sends(maker, 0, 4, 5, priority=-1)[0]
    _, at = play(maker)
    # at instant 0 all four are there, so the urgent one is served first of all
    assert (at[urgent], at[second], at[third]) == ((0, 5), (10, 15), (15, 20))


def test_who_waits_for_a_taken_link_keeps_nobody_off_a_free_one() -> None:
    maker = Maker(4)
    long = sends(maker, 0, 1, 20)[0]
    blocked = sends(maker, 2, 1, 5)[0]
    passes = sends(maker, 2, 3, 5)[0]
    _, at = play(maker)
    assert at[long] == (0, 20)
    assert at[passes] == (0, 5), "the out link of rank 2 is free while `blocked` waits"
    assert at[blocked] == (20, 25)


# -- batches --------------------------------------------------------------------------------------


def test_a_batch_ends_with_its_last_transfer() -> None:
    maker = Maker(3)
    pp = maker.group("pp", 0, 1, 2)
    late = maker.op(2, 9)
    to_1 = maker.transfer(0, pp, 4, to=1, batch=0)
    from_2 = maker.transfer(0, pp, 4, source=2, batch=0)
    after = maker.op(0, 1, waits=[to_1])
    at_1 = maker.transfer(1, pp, 4, source=0)
    at_2 = maker.transfer(2, pp, 4, to=0, waits=[late])
    timeline, at = play(maker)
    assert at[at_1] == (0, 4), "rank 1 needs nothing of rank 2"
    assert at[to_1] == (0, 13), "it is a part of one kernel, which ends with the other part"
    assert at[from_2] == at[at_2] == (9, 13)
    assert at[after] == (13, 14)
    assert reason(maker, timeline, after) == ("event", from_2)
    assert [step.start_ns for step in critical_path(timeline)] == [0, 9, 13]


def test_a_batch_reaches_its_transfers_when_all_its_ops_could_start() -> None:
    maker = Maker(3)
    pp = maker.group("pp", 0, 1, 2)
    work = maker.op(0, 6)
    to_1 = maker.transfer(0, pp, 4, to=1, batch=0)
    to_2 = maker.transfer(0, pp, 4, to=2, batch=0, waits=[work])
    maker.transfer(1, pp, 4, source=0)
    maker.transfer(2, pp, 4, source=0)
    _, at = play(maker)
    assert at[to_1] == (6, 14), "both need the link out of rank 0: 6 .. 10 and 10 .. 14"
    assert at[to_2] == (10, 14)


def test_batches_that_meet_several_batches_of_a_peer_do_not_lock_up() -> None:
    """Rank 2 meets rank 1 in its only batch, and rank 0 comes to that in two."""
    maker = Maker(3)
    pp = maker.group("pp", 0, 1, 2)
    maker.transfer(0, pp, 3, to=1, batch=0)
    last = maker.transfer(0, pp, 3, to=2, batch=1)
    maker.transfer(1, pp, 3, source=0, batch=0)
    maker.transfer(1, pp, 3, source=2, batch=0)
    maker.transfer(2, pp, 3, to=1, batch=0)
    maker.transfer(2, pp, 3, source=0, batch=0)
    _, at = play(maker)
    assert at[last] == (3, 6)


def test_without_a_batch_two_ranks_that_both_send_first_lock_up() -> None:
    def exchange(batch: int) -> Maker:
        maker = Maker(2)
        pp = maker.group("pp", 0, 1)
        for rank in (0, 1):
            maker.transfer(rank, pp, 5, to=1 - rank, batch=batch, kind="pp_send", cell=f"{rank}F0")
            maker.transfer(rank, pp, 5, source=1 - rank, batch=batch, kind="pp_recv")
        return maker

    assert play(exchange(0))[0].step_ns == 5
    with pytest.raises(DeadlockError) as error:
        play(exchange(-1))
    assert str(error.value) == (
        "deadlock, 4 ops never end: "
        "op 0 (rank 0, stream pp, pp_send of 0F0) waits for its peer, "
        "op 3 (rank 1, stream pp, pp_recv); "
        "op 2 (rank 1, stream pp, pp_send of 1F0) waits for its peer, "
        "op 1 (rank 0, stream pp, pp_recv)"
    )


# -- what cannot be played ------------------------------------------------------------------------


def test_a_host_that_waits_for_what_it_has_not_issued_is_a_deadlock() -> None:
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    received = maker.transfer(0, pp, 5, source=1)
    maker.op(0, 5, waits=[received], host_sync=True, kind="counts")
    maker.transfer(0, pp, 5, to=1)
    first = maker.transfer(1, pp, 5, source=0)
    maker.transfer(1, pp, 5, to=0, waits=[first])
    with pytest.raises(
        DeadlockError, match=r"op 1 \(rank 0, stream compute, counts\) waits for op 0"
    ):
        play(maker)


def test_ops_behind_a_stuck_host_sync_are_named_too() -> None:
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    maker.transfer(0, pp, 5, source=1, host_sync=True)
    maker.op(0, 5, kind="late")
    maker.transfer(0, pp, 5, to=1)
    maker.transfer(1, pp, 5, source=0)
    maker.transfer(1, pp, 5, to=0)
    with pytest.raises(DeadlockError, match=r"late\) waits for the host, which waits for op 0"):
        play(maker)


def test_an_event_that_nobody_records_is_a_deadlock() -> None:
    maker = Maker()
    a = maker.op(0, 1)
    maker.op(0, 1, stream="side", waits=[a])
    program, costs = maker.build()
    program.record[:] = -1
    with pytest.raises(DeadlockError, match="waits for an event that no op records"):
        simulate(program, costs)


def test_a_send_without_a_receive_is_refused() -> None:
    maker = Maker(2)
    pp = maker.group("pp01", 0, 1)
    maker.transfer(0, pp, 5, to=1)
    with pytest.raises(MeetError, match="pp01 0 -> 1"):
        play(maker)


# -- a whole step ---------------------------------------------------------------------------------

GOLDEN = """\
rank 0 compute         0 -  100 F0            start
rank 0 compute       100 -  200 F1            stream  after F0
rank 0 compute       430 -  650 B0            event   after recv-B0
rank 0 compute       680 -  830 B1            event   after recv-B1
rank 0 high          480 -  500 post          event   after sync
rank 0 ep            430 -  480 sync          event   after recv-B0
rank 0 pp            100 -  130 send-F0       event   after F0
rank 0 pp            200 -  230 send-F1       event   after F1
rank 0 pp            400 -  430 recv-B0       peer    after B0
rank 0 pp            650 -  680 recv-B1       peer    after B1
rank 1 compute       130 -  230 F0            event   after recv-F0
rank 1 compute       230 -  400 B0            stream  after F0
rank 1 compute       400 -  500 F1            stream  after B0
rank 1 compute       500 -  650 B1            stream  after F1
rank 1 pp            100 -  130 recv-F0       peer    after F0
rank 1 pp            200 -  230 recv-F1       peer    after F1
rank 1 pp            400 -  430 send-B0       event   after B0
rank 1 pp            650 -  680 send-B1       event   after B1"""


def one_forward_one_backward() -> Maker:
    """Two ranks, two microbatches; B0 of rank 0 shares its SMs with an urgent op."""
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    ep = maker.group("ep", 0, size=8, medium="nvlink")
    for name in ("F0", "F1"):
        f = maker.op(0, 100, cell=name)
        maker.transfer(0, pp, 30, to=1, waits=[f], cell=f"send-{name}")
    for name, ns in (("B0", 200), ("B1", 150)):
        received = maker.transfer(0, pp, 30, source=1, cell=f"recv-{name}")
        maker.op(0, ns, waits=[received], cell=name)
        if name == "B0":
            sync = maker.transfer(0, ep, 50, waits=[received], cell="sync")
            maker.op(0, 20, stream="high", priority=-1, waits=[sync], cell="post")
    received = [maker.transfer(1, pp, 30, source=0, cell=f"recv-{name}") for name in ("F0", "F1")]
    for name, ns in (("0", 170), ("1", 150)):
        maker.op(1, 100, waits=[received[int(name)]], cell=f"F{name}")
        b = maker.op(1, ns, cell=f"B{name}")
        maker.transfer(1, pp, 30, to=0, waits=[b], cell=f"send-B{name}")
    return maker


def test_a_step_as_people_read_it() -> None:
    program, costs = one_forward_one_backward().build()
    timeline = simulate(program, costs)
    lines: list[str] = []
    for op in np.lexsort((timeline.start_ns, program.stream, program.rank)).tolist():
        view = program[op]
        cause = int(timeline.cause[op])
        after = f"after {program[cause].cell}" if cause >= 0 else ""
        lines.append(
            f"rank {view.rank} {view.stream.name:<10}{timeline.start_ns[op]:>7} -"
            f"{timeline.end_ns[op]:>5} {view.cell:<14}{REASONS[timeline.reason[op]]:<8}{after}"
        )
    order = {"compute": 0, "high": 1, "ep": 2, "pp": 3}
    lines.sort(key=lambda line: (line.split()[1], order[line.split()[2]], int(line.split()[3])))
    assert "\n".join(line.rstrip() for line in lines) == GOLDEN
