"""The fast engine: the same steps as :mod:`mhcplan.sim.engine`, played as machine code.

Both engines take the same Program and costs, follow the same rules at one instant, call the same
functions of :mod:`mhcplan.sim.device` and give the same Timeline, to the nanosecond; only the event
loop differs (:mod:`mhcplan.sim.compiled_loop`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from mhcplan.sim import device, device_sms
from mhcplan.sim.causes import timeline_of
from mhcplan.sim.compiled_loop import FAR, NEVER, NOBODY, Loop, Physics, Step, Times, play
from mhcplan.sim.device_tables import gpu_of, queued_behind
from mhcplan.sim.jit import ints
from mhcplan.sim.order import order_of
from mhcplan.sim.program import Csr

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.order import Order
    from mhcplan.sim.program import CostTable, Program
    from mhcplan.sim.timeline import Timeline

    Array = NDArray[np.int64]


def simulate_compiled(program: Program, costs: CostTable) -> Timeline:
    """Play one step.

    Raises:
        MeetError: a transfer lacks an end or a member.
        DeadlockError: ops wait for each other.
    """
    order, room = order_of(program), program.shared(_room_of)
    behind = queued_behind(program, costs)
    step = _step(program, costs, order, room, behind)
    loop = _loop(program, order, room)
    times = Times(*(ints(np.full(program.num_ops, NEVER, np.int64)) for _ in Times._fields))
    physics = Physics(
        device.traits_of(program),
        gpu_of(program, costs),
        device_sms.State(
            start_ns=times.start_ns,
            work=step.work,
            rate=loop.rate,
            rated_at=loop.rated_at,
            here_ns=ints(np.zeros(program.num_ops, np.int64)),
            placed=ints(np.full(program.num_ops, NEVER, np.int64)),
            placed_ns=times.placed_ns,
            spread=ints(np.zeros(program.num_ops, np.int64)),
        ),
    )
    if play(step, physics, loop, times):
        _say_who_is_stuck(program, costs)
    issue, start, end, release, placed = map(np.asarray, times)
    return timeline_of(program, order, issue, start, end, release, placed, behind)


class _Room(NamedTuple):
    """What a Program's ops meet in: the same for all Programs of one order.

    Attributes:
        links: of every transfer; members: ops of every transfer; turn: of every transfer, see
            :func:`mhcplan.sim.device.turns_of_transfers`.
        place: of every op, where it is kept while it may run; places: how many a rank has.
    """

    links: Csr
    members: Csr
    turn: Array
    place: Array
    places: Array


def _room_of(program: Program) -> _Room:
    order = order_of(program)
    links = device.links_of_transfers(program, order.meeting)
    return _Room(
        links,
        Csr.grouped(order.meeting, len(links.offsets) - 1),
        device.turns_of_transfers(program, order.meeting),
        *_places(program, order),
    )


def _step(program: Program, costs: CostTable, order: Order, room: _Room, behind: Array) -> Step:
    return Step(
        rank=ints(program.rank),
        stream=ints(program.stream),
        first=ints(order.first),
        meeting=ints(order.meeting),
        place=ints(room.place),
        host_ns=ints(costs.host_ns[program.cost]),
        host_sync=ints(program.host_sync),
        work=ints(_work(program, costs, order)),
        wait_begin=ints(order.waited.offsets),
        recorder=ints(order.waited.values),
        behind=ints(behind),
        stream_begin=ints(program.by_stream.offsets),
        by_stream=ints(program.by_stream.values),
        member_begin=ints(room.members.offsets),
        members=ints(room.members.values),
        link_begin=ints(room.links.offsets),
        links=ints(room.links.values),
        turn=ints(room.turn),
        rank_begin=ints(program.rank_offsets),
    )


def _loop(program: Program, order: Order, room: _Room) -> Loop:
    """The state before anything has happened."""
    links, place, places = room.links, room.place, room.places
    ops, streams, ranks = program.num_ops, len(program.streams), program.num_ranks
    transfers, num_places = len(links.offsets) - 1, int(places.sum())
    num_links = int(links.values.max(initial=-1)) + 1
    leaves = 1 << max(num_places - 1, 1).bit_length()
    place_stream = np.zeros(num_places, np.int64)
    place_stream[place] = program.stream
    is_transfer = order.meeting >= 0
    per_op, per_stream = np.zeros(ops, np.int64), np.zeros(streams, np.int64)
    per_rank, per_place = np.zeros(ranks, np.int64), np.zeros(num_places, np.int64)
    per_link, per_transfer = np.zeros(num_links, np.int64), np.zeros(transfers, np.int64)
    return Loop(
        rate=ints(per_op),
        rated_at=ints(per_op.copy()),
        given_rate=ints(per_op + device_sms.NOT_PLACED),
        under_way=ints(np.bincount(order.first[is_transfer], minlength=ops)),
        absent=ints(np.bincount(order.meeting[is_transfer], minlength=transfers)),
        due=ints(np.full(2 * leaves, FAR, np.int64)),
        due_op=ints(per_place.copy()),
        place_stream=ints(place_stream),
        cursor=ints(program.by_stream.offsets[:-1].copy()),
        wait_op=ints(program.by_stream.offsets[:-1].copy()),
        wait_at=ints(per_stream - 1),
        watcher=ints(per_op + NOBODY),
        next_watcher=ints(per_stream + NOBODY),
        begin_watcher=ints(per_op + NOBODY),
        sleeper=ints(per_rank + NOBODY),
        issued=ints(program.rank_offsets[:-1].copy()),
        running=ints(per_place.copy()),
        running_begin=ints(np.cumsum(places) - places),
        num_running=ints(per_rank.copy()),
        given=ints(per_place.copy()),
        watch=ints(per_place + FAR),
        watched=ints(per_op + FAR),
        moved=ints(per_place.copy()),
        taken=ints(per_link),
        link_watcher=ints(per_link + NOBODY),
        next_on_link=ints(per_transfer + NOBODY),
        awake=ints(per_stream),
        candidates=ints(per_transfer),
        changed=ints(per_rank.copy()),
        is_changed=ints(per_rank),
        counts=ints(np.zeros(4, np.int64)),
    )


def _work(program: Program, costs: CostTable, order: Order) -> Array:
    """Work of each op; that of a transfer, at its first member, is its longest member's."""
    work = device.work_of(1) * costs.duration_ns[program.cost]
    ops = np.flatnonzero(order.meeting >= 0)
    longest = np.zeros(int(order.meeting.max(initial=-1)) + 1, np.int64)
    np.maximum.at(longest, order.meeting[ops], work[ops])
    work[ops] = longest[order.meeting[ops]]
    return work


def _places(program: Program, order: Order) -> tuple[Array, Array]:
    """The place of each op, and how many places each rank has: one an op of a stream's kernels."""
    by_stream = program.by_stream.values
    at = np.empty(program.num_ops, np.int64)
    at[by_stream] = np.arange(program.num_ops)
    in_kernel = at - at[order.first]
    size = np.zeros(len(program.streams), np.int64)
    np.maximum.at(size, program.stream, in_kernel + 1)
    of_rank = np.zeros(program.num_ranks, np.int64)
    np.add.at(of_rank, [stream.rank for stream in program.streams], size)
    first = np.cumsum(size) - size
    return first[program.stream] + in_kernel, of_rank


def _say_who_is_stuck(program: Program, costs: CostTable) -> NoReturn:
    """The reference engine comes to the same standstill, and knows how to tell."""
    from mhcplan.sim.engine import simulate  # simpy is slow to import

    simulate(program, costs)
    raise AssertionError("the engines differ: only the compiled one does not end")
