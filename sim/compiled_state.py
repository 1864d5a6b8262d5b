"""What the event loop of :mod:`mhcplan.sim.compiled_loop` is given, keeps and finds out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mhcplan.sim import device, device_state
    from mhcplan.sim.jit import Ints


class Step(NamedTuple):
    """A step to be played; lists as offsets and values.

    Attributes:
        by_stream: ops of stream s are ``by_stream[stream_begin[s] : stream_begin[s + 1]]``.
        kernel_end: of a place in by_stream where a kernel begins, the one behind its last op.
        stream_rank, stream_place: of a stream, its rank and the first of its places.
        cost, host_sync: of an op.
        member: of an op, its number among the members of all transfers, or -1.
        wait_begin, recorder: of an op, the ops whose end it waits for; a negative number for an
            event that nobody records.
        behind: of an op, the one that must have begun because it is before this one in a hardware
            queue, or -1.
        host_ns, work: of a cost key.
        member_begin, link_begin, links, turn, moves: of a transfer: its members, the links that it
            holds, when it gets them, and its work.
        meeting, member_op, member_place: of a member, its transfer, its op and that one's place.
        rank_begin: ops of rank r are ``rank_begin[r] : rank_begin[r + 1]``.
    """

    stream_begin: Ints
    by_stream: Ints
    kernel_end: Ints
    stream_rank: Ints
    stream_place: Ints
    cost: Ints
    host_sync: Ints
    member: Ints
    wait_begin: Ints
    recorder: Ints
    behind: Ints
    host_ns: Ints
    work: Ints
    member_begin: Ints
    link_begin: Ints
    links: Ints
    turn: Ints
    moves: Ints
    meeting: Ints
    member_op: Ints
    member_place: Ints
    rank_begin: Ints


class Times(NamedTuple):
    """What the loop finds out, by op: -1 where it never happened."""

    issue_ns: Ints
    start_ns: Ints
    end_ns: Ints
    release_ns: Ints
    placed_ns: Ints


class Physics(NamedTuple):
    """What the device's functions are given; they see places instead of ops.

    Attributes:
        traits, gpu, state: by place, those of the op that has it; ``gpu.machine`` is empty where
            there is no contention.
        ctas, burden, out_link, in_link: of a member, see :class:`mhcplan.sim.device_state.Gpu`.
    """

    traits: device.Traits
    gpu: device_state.Gpu
    state: device_state.State
    ctas: Ints
    burden: Ints
    out_link: Ints
    in_link: Ints


class Loop(NamedTuple):
    """What changes while the step is played.

    Attributes:
        op: that has a place, or -1.
        given_rate, watched: of the op at a place, by its rank's device: its rate, and when the rank
            is to be looked at again.
        due, rank_due: when what runs at a place, or anything on a rank, is due next; stale: ranks
            of which that is to be worked out anew.
        place_rank, place_stream: rank and stream of a place.
        cursor: how many ops of a stream are behind it; wait_op, wait_at: how far it has checked
            what its next kernel waits for.
        kernel, under_way: place in by_stream of the kernel of transfers that a stream has come to,
            and how many of them have not ended.
        watcher, next_watcher: first stream that waits for an op to end, and the one after a stream.
        begin_watcher: first stream that waits for an op to begin.
        sleeper, host_due: first stream that waits for a rank's host, and when the first of these
            may go on; FAR where the host waits itself.
        issued, host_waits: the next op that a rank's host issues, and the one that it waits for.
        absent: members of a transfer that have not reached it.
        running, given, watch: see :func:`device.share_device`, :func:`device_sms.share_gpu`; those
            of a rank begin at rank_places; moved: places whose rate or next watch has changed.
        taken, link_watcher, next_on_link: whether a link is held; transfers that wait for it.
        awake, candidates, changed, counts: lists and their lengths.
    """

    op: Ints
    given_rate: Ints
    watched: Ints
    due: Ints
    rank_due: Ints
    stale: Ints
    place_rank: Ints
    place_stream: Ints
    cursor: Ints
    wait_op: Ints
    wait_at: Ints
    kernel: Ints
    under_way: Ints
    watcher: Ints
    next_watcher: Ints
    begin_watcher: Ints
    sleeper: Ints
    host_due: Ints
    issued: Ints
    host_waits: Ints
    absent: Ints
    running: Ints
    rank_places: Ints
    num_running: Ints
    given: Ints
    watch: Ints
    moved: Ints
    taken: Ints
    link_watcher: Ints
    next_on_link: Ints
    awake: Ints
    candidates: Ints
    changed: Ints
    is_changed: Ints
    counts: Ints
