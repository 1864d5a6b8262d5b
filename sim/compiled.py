"""The fast engine: the same steps as :mod:`mhcplan.sim.engine`, played as machine code.

Both engines take the same Program and costs, follow the same rules at one instant, call the same
functions of :mod:`mhcplan.sim.device` and give the same Timeline, to the nanosecond; only the event
loop differs (:mod:`mhcplan.sim.compiled_loop`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from mhcplan.sim import device, device_state
from mhcplan.sim.causes import timeline_of
from mhcplan.sim.compiled_loop import FAR, NEVER, NOBODY, play
from mhcplan.sim.compiled_state import Loop, Physics, Step, Times
from mhcplan.sim.device_tables import queued_behind, tables_of, transfer_columns
from mhcplan.sim.jit import ints
from mhcplan.sim.mirror import half_of
from mhcplan.sim.order import order_of
from mhcplan.sim.program import Csr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from mhcplan.sim.program import CostTable, Program
    from mhcplan.sim.timeline import Timeline

    Array = NDArray[np.int64]


def simulate_compiled(program: Program, costs: CostTable) -> Timeline:
    """Play one step.

    Raises:
        MeetError: a transfer lacks an end or a member.
        DeadlockError: ops wait for each other.
    """
    half = half_of(program, costs)
    if half is None:
        times = _times(program, costs)
    else:
        played = _times(half, costs)
        ranks = np.split(played, half.rank_offsets[1:-1], axis=1)
        times = np.concatenate([*ranks, *reversed(ranks)], axis=1)
    issue, start, end, release, placed = times
    if (end == NEVER).any():
        _say_who_is_stuck(program, costs)
    behind = queued_behind(program, costs)
    return timeline_of(program, order_of(program), issue, start, end, release, placed, behind)


def _times(program: Program, costs: CostTable) -> Array:
    """Play all ranks of a Program: rows as in :class:`Times`."""
    room, behind = program.shared(_room_of), queued_behind(program, costs)
    times = np.full((len(Times._fields), program.num_ops), NEVER)
    step, physics = _step(program, costs, room, behind), _physics(program, costs, room)
    play(step, physics, _loop(program, room), Times(*times))
    return times


class _Room(NamedTuple):
    """What a Program's ops meet in: the same for all Programs of one order, and never written to.

    Attributes:
        by_stream, waited, links, members: ops of every stream, ops that every op waits for, links
            and ops of every transfer.
        place_stream, rank_places: stream of every place; places of rank r are
            ``rank_places[r] : rank_places[r + 1]``.
        turn: of every transfer, see :func:`mhcplan.sim.device.turns_of_transfers`.

    The others are those of :class:`Step`.
    """

    by_stream: Csr
    waited: Csr
    links: Csr
    members: Csr
    kernel_end: Array
    stream_rank: Array
    stream_place: Array
    host_sync: Array
    member: Array
    meeting: Array
    member_place: Array
    turn: Array
    place_stream: Array
    rank_places: Array


def _room_of(program: Program) -> _Room:
    order, by_stream = order_of(program), program.by_stream
    links = device.links_of_transfers(program, order.meeting)
    members = Csr.grouped(order.meeting, len(links.offsets) - 1)
    member = np.full(program.num_ops, -1)
    member[members.values] = np.arange(len(members.values))
    size = np.bincount(order.first, minlength=program.num_ops)
    stream_rank = ints([stream.rank for stream in program.streams])
    # one place an op of a stream's largest kernel, rank by rank
    num_places = np.zeros(len(program.streams), np.int64)
    np.maximum.at(num_places, program.stream, size)
    by_rank = np.argsort(stream_rank, kind="stable")
    place_stream = np.repeat(by_rank, num_places[by_rank])
    stream_place = np.empty_like(num_places)
    stream_place[by_rank] = np.cumsum(num_places[by_rank]) - num_places[by_rank]
    at = np.empty(program.num_ops, np.int64)
    at[by_stream.values] = np.arange(program.num_ops)
    in_kernel = (at - at[order.first])[members.values]
    kernel_end = np.arange(program.num_ops) + size[by_stream.values]
    return _Room(
        by_stream, order.waited, links, members, ints(kernel_end), stream_rank,
        stream_place, ints(program.host_sync), member, ints(members.owners),
        stream_place[program.stream[members.values]] + in_kernel,
        ints(device.turns_of_transfers(program, order.meeting)), ints(place_stream),
        np.searchsorted(stream_rank[place_stream], np.arange(program.num_ranks + 1)),
    )  # fmt: skip


def _step(program: Program, costs: CostTable, room: _Room, behind: Array) -> Step:
    work = device.work_of(1) * costs.duration_ns
    moves = np.zeros(len(room.turn), np.int64)  # a transfer takes as long as its longest member
    np.maximum.at(moves, room.meeting, work[program.cost[room.members.values]])
    return Step(
        stream_begin=ints(room.by_stream.offsets),
        by_stream=ints(room.by_stream.values),
        kernel_end=room.kernel_end,
        stream_rank=room.stream_rank,
        stream_place=room.stream_place,
        cost=ints(program.cost),
        host_sync=room.host_sync,
        member=room.member,
        wait_begin=ints(room.waited.offsets),
        recorder=ints(room.waited.values),
        behind=ints(behind),
        host_ns=ints(costs.host_ns),
        work=ints(work),
        member_begin=ints(room.members.offsets),
        link_begin=ints(room.links.offsets),
        links=ints(room.links.values),
        turn=room.turn,
        moves=ints(moves),
        meeting=room.meeting,
        member_op=ints(room.members.values),
        member_place=room.member_place,
        rank_begin=ints(program.rank_offsets),
    )


def _physics(program: Program, costs: CostTable, room: _Room) -> Physics:
    """Tables of places that nobody has yet."""
    num_places = len(room.place_stream)
    priority = np.array([stream.priority for stream in program.streams], np.int64)
    number, is_transfer, cost, waits, ctas, burden, out_link, in_link = _rows(8, num_places)
    priority = ints(priority[room.place_stream])
    members = transfer_columns(program, costs, room.members.values)
    return Physics(
        device.Traits(number, priority, is_transfer),
        device_state.Gpu(
            number, priority, cost, waits, ctas, burden, out_link, in_link, *tables_of(costs)
        ),
        device_state.State(
            *_rows(len(device_state.State._fields) - 1, num_places),
            known=np.full(2 * device_state.KNOWN, NEVER),
        ),
        *members,
    )


def _loop(program: Program, room: _Room) -> Loop:
    """The state before anything has happened."""
    ops, streams, ranks = program.num_ops, len(program.streams), program.num_ranks
    transfers, num_places = len(room.turn), len(room.place_stream)
    links = int(room.links.values.max(initial=-1)) + 1
    begin = ints(room.by_stream.offsets[:-1])
    op, given_rate, watched, running, given, watch, moved = _rows(7, num_places)
    wait_at, kernel, under_way, next_watcher, awake = _rows(5, streams)
    num_running, changed, is_changed, sleeper, stale = _rows(5, ranks)
    op[:] = sleeper[:] = NOBODY
    watch[:], wait_at[:] = FAR, -1
    return Loop(
        op=op,
        given_rate=given_rate,
        watched=watched,
        due=np.full(num_places, FAR),
        rank_due=np.full(ranks, FAR),
        stale=stale,
        place_rank=room.stream_rank[room.place_stream],
        place_stream=room.place_stream,
        cursor=begin.copy(),
        wait_op=begin.copy(),
        wait_at=wait_at,
        kernel=kernel,
        under_way=under_way,
        watcher=np.full(ops, NOBODY),
        next_watcher=next_watcher,
        begin_watcher=np.full(ops, NOBODY),
        sleeper=sleeper,
        host_due=np.full(ranks, FAR),
        host_waits=np.full(ranks, NOBODY),
        issued=ints(program.rank_offsets[:-1].copy()),
        absent=np.diff(room.members.offsets),
        running=running,
        rank_places=room.rank_places,
        num_running=num_running,
        given=given,
        watch=watch,
        moved=moved,
        taken=np.zeros(links, np.int64),
        link_watcher=np.full(links, NOBODY),
        next_on_link=np.full(transfers, NOBODY),
        awake=awake,
        candidates=np.zeros(transfers, np.int64),
        changed=changed,
        is_changed=is_changed,
        counts=np.zeros(5, np.int64),
    )


def _rows(count: int, length: int) -> Iterator[Array]:
    """So many arrays of zeros, in one piece of memory, which is faster to get than many."""
    return iter(np.zeros((count, length), np.int64))


def _say_who_is_stuck(program: Program, costs: CostTable) -> NoReturn:
    """The reference engine comes to the same standstill, and knows how to tell."""
    from mhcplan.sim.engine import simulate  # simpy is slow to import

    simulate(program, costs)
    raise AssertionError("the engines differ: only the compiled one does not end")
