"""The event loop of :mod:`mhcplan.sim.compiled`, as machine code; the reference says what it does.

What happens at one instant, and in which order, is told in :mod:`mhcplan.sim.engine`. Here a stream
is a cursor in the list of its ops instead of a process, and it waits for one thing at a time: for
the host to issue its next kernel, for a time, for an op to end, or for its kernel to end. Streams
that wait for the same op, or for the same host, form a linked list.

Every op that may run at the same time as others has a *place*: one a stream, or one an op of the
stream's largest batch. A tournament tree over the places holds when each of them is due next: its
root is the next instant.
"""

from __future__ import annotations

from typing import NamedTuple

from mhcplan.sim import device, device_sms
from mhcplan.sim.jit import Ints, compiled, usable_in_compiled

NEVER = -1
NOBODY = -1
FAR = device_sms.FAR
# Places in ``Loop.counts``.
_NUM_AWAKE, _NUM_CANDIDATES, _NUM_CHANGED, _NUM_MOVED = range(4)


class Step(NamedTuple):
    """A step to be played: arrays by op, stream, transfer or rank; lists as offsets and values.

    ``by_stream[stream_begin[s] : ...]`` are the ops of stream s; ``place`` is where an op is due.
    ``recorder`` is the op of each wait, or a negative number for an event that nobody records;
    ``behind`` the op that must have begun because it is before this one in a hardware queue, or -1.
    ``work`` is what is left of it (of a transfer: at its first member), and changes.
    """

    rank: Ints
    stream: Ints
    first: Ints
    meeting: Ints
    place: Ints
    host_ns: Ints
    host_sync: Ints
    work: Ints
    wait_begin: Ints
    recorder: Ints
    behind: Ints
    stream_begin: Ints
    by_stream: Ints
    member_begin: Ints
    members: Ints
    link_begin: Ints
    links: Ints
    turn: Ints
    rank_begin: Ints


class Times(NamedTuple):
    """What the loop finds out, by op: -1 where it never happened."""

    issue_ns: Ints
    start_ns: Ints
    end_ns: Ints
    release_ns: Ints
    placed_ns: Ints


class Physics(NamedTuple):
    """What the device's functions are given: ``gpu`` is empty where there is no contention."""

    traits: device.Traits
    gpu: device_sms.Gpu
    state: device_sms.State


class Loop(NamedTuple):
    """What changes while the step is played.

    Attributes:
        rate, rated_at: of the work of an op, or of a transfer at its first member.
        given_rate: to an op, by its rank's device.
        under_way: transfers of a kernel that have not ended, at the kernel's first op.
        absent: members of a transfer that have not reached it.
        due: the tournament tree; place p is leaf ``len(due) / 2 + p``.
        due_op: op that is due at a place; -1: the stream's next kernel will have been issued.
        place_stream: stream of a place.
        cursor: how many ops of a stream are behind it; wait_op, wait_at: how far it has checked
            what its next kernel waits for.
        watcher, next_watcher: first stream that waits for an op to end, and the one after a stream.
        begin_watcher: first stream that waits for an op to begin.
        sleeper: first stream that waits for a rank's host.
        issued: the next op that a rank's host issues.
        running, given, watch: see :func:`device.share_device`, :func:`device_sms.share_gpu`; those
            of a rank begin at running_begin; moved: ops whose rate or next watch has changed.
        watched: when an op's rank is to be looked at again.
        taken, link_watcher, next_on_link: whether a link is held; transfers that wait for it.
        awake, candidates, changed, counts: lists and their lengths.
    """

    rate: Ints
    rated_at: Ints
    given_rate: Ints
    under_way: Ints
    absent: Ints
    due: Ints
    due_op: Ints
    place_stream: Ints
    cursor: Ints
    wait_op: Ints
    wait_at: Ints
    watcher: Ints
    next_watcher: Ints
    begin_watcher: Ints
    sleeper: Ints
    issued: Ints
    running: Ints
    running_begin: Ints
    num_running: Ints
    given: Ints
    watch: Ints
    watched: Ints
    moved: Ints
    taken: Ints
    link_watcher: Ints
    next_on_link: Ints
    awake: Ints
    candidates: Ints
    changed: Ints
    is_changed: Ints
    counts: Ints


@compiled
def play(step: Step, physics: Physics, loop: Loop, times: Times) -> int:
    """Play a step: fills ``times``, changes ``loop``, returns how many ops never end."""
    for rank in range(len(step.rank_begin) - 1):
        _issue(step, loop, times, rank, 0)
    for stream in range(len(step.stream_begin) - 1):
        _wake(loop, stream)
    now = 0
    while True:
        while loop.counts[_NUM_AWAKE]:
            loop.counts[_NUM_AWAKE] -= 1
            _advance(step, loop, times, physics, loop.awake[loop.counts[_NUM_AWAKE]], now)
        if loop.due[1] == now:
            _complete_one(step, loop, times, now)
        elif loop.counts[_NUM_CANDIDATES] or loop.counts[_NUM_CHANGED]:
            _decide(step, loop, times, physics, now)
        elif loop.due[1] != FAR:
            now = loop.due[1]
        else:
            break
    never = 0
    for op in range(len(times.end_ns)):
        never += times.end_ns[op] == NEVER
    return never


# -- the tree of what is due


@usable_in_compiled
def _set_due(loop: Loop, place: int, at: int) -> None:
    due = loop.due
    i = len(due) // 2 + place
    due[i] = at
    while i > 1:
        i //= 2
        least = min(due[2 * i], due[2 * i + 1])
        if due[i] == least:
            break
        due[i] = least


@usable_in_compiled
def _first_due(loop: Loop) -> int:
    """A place that is due at the next instant."""
    due = loop.due
    i, leaves = 1, len(due) // 2
    while i < leaves:
        i = 2 * i + (due[2 * i] != due[1])
    return i - leaves


# -- hosts and streams


@usable_in_compiled
def _issue(step: Step, loop: Loop, times: Times, rank: int, now: int) -> None:
    """The host issues ops up to the next one that it waits for."""
    op, at = loop.issued[rank], now
    while op < step.rank_begin[rank + 1]:
        at += step.host_ns[op]
        times.issue_ns[op] = at
        op += 1
        if step.host_sync[op - 1]:
            break
    loop.issued[rank] = op
    stream, loop.sleeper[rank] = loop.sleeper[rank], NOBODY
    while stream != NOBODY:
        _wake(loop, stream)
        stream = loop.next_watcher[stream]


@usable_in_compiled
def _wake(loop: Loop, stream: int) -> None:
    loop.awake[loop.counts[_NUM_AWAKE]] = stream
    loop.counts[_NUM_AWAKE] += 1


@usable_in_compiled
def _advance(step: Step, loop: Loop, times: Times, physics: Physics, stream: int, now: int) -> None:
    """Let a stream go on until it has to wait."""
    while loop.cursor[stream] < step.stream_begin[stream + 1]:
        begin = loop.cursor[stream]
        end = _kernel_end(step, stream, begin)
        op = step.by_stream[end - 1]
        if _must_wait(step, loop, times, stream, end, now):
            return
        loop.cursor[stream] = loop.wait_op[stream] = end
        loop.wait_at[stream] = -1
        if step.meeting[op] >= 0:
            _reach_transfers(step, loop, physics, begin, end, now)
            return
        if step.work[op]:
            _put_on_rank(step, loop, op)
            return
        _begin(loop, times, op, now)
        _finish(step, loop, times, op, now)


@usable_in_compiled
def _kernel_end(step: Step, stream: int, begin: int) -> int:
    """One past the last op of the kernel that begins there."""
    end, first = begin + 1, step.by_stream[begin]
    while end < step.stream_begin[stream + 1] and step.first[step.by_stream[end]] == first:
        end += 1
    return end


@usable_in_compiled
def _must_wait(step: Step, loop: Loop, times: Times, stream: int, end: int, now: int) -> bool:
    """Whether a stream's next kernel cannot start; sees to it that the stream is woken."""
    last = step.by_stream[end - 1]
    issue = times.issue_ns[last]
    if issue == NEVER:
        rank = step.rank[last]
        loop.next_watcher[stream], loop.sleeper[rank] = loop.sleeper[rank], stream
        return True
    if issue > now:
        place = step.place[step.by_stream[loop.cursor[stream]]]
        loop.due_op[place] = -1
        _set_due(loop, place, issue)
        return True
    while loop.wait_op[stream] < end:
        op = step.by_stream[loop.wait_op[stream]]
        for i in range(max(loop.wait_at[stream], step.wait_begin[op]), step.wait_begin[op + 1]):
            awaited = step.recorder[i]
            if awaited < 0:
                return True  # for ever
            if times.end_ns[awaited] == NEVER:
                loop.wait_at[stream] = i
                loop.next_watcher[stream] = loop.watcher[awaited]
                loop.watcher[awaited] = stream
                return True
        loop.wait_op[stream] += 1
        loop.wait_at[stream] = -1
    behind = step.behind[step.by_stream[loop.cursor[stream]]]
    if behind >= 0 and times.start_ns[behind] < 0 and times.placed_ns[behind] < 0:
        loop.next_watcher[stream] = loop.begin_watcher[behind]
        loop.begin_watcher[behind] = stream
        return True
    return False


@usable_in_compiled
def _begin(loop: Loop, times: Times, op: int, now: int) -> None:
    """A compute op begins: what is behind it in its hardware queue goes on."""
    times.start_ns[op] = now
    _wake_behind(loop, op)


@usable_in_compiled
def _wake_behind(loop: Loop, op: int) -> None:
    stream, loop.begin_watcher[op] = loop.begin_watcher[op], NOBODY
    while stream != NOBODY:
        _wake(loop, stream)
        stream = loop.next_watcher[stream]


@usable_in_compiled
def _finish(step: Step, loop: Loop, times: Times, op: int, now: int) -> None:
    """An op ends: what waits for it goes on."""
    times.end_ns[op] = now
    stream = loop.watcher[op]
    while stream != NOBODY:
        _wake(loop, stream)
        stream = loop.next_watcher[stream]
    if step.host_sync[op]:
        _issue(step, loop, times, step.rank[op], now)


# -- completions


@usable_in_compiled
def _complete_one(step: Step, loop: Loop, times: Times, now: int) -> None:
    """Whatever is due at one place that is due now."""
    place = _first_due(loop)
    _set_due(loop, place, FAR)
    op = loop.due_op[place]
    if op < 0:
        _wake(loop, loop.place_stream[place])
    elif step.meeting[op] >= 0:
        _end_transfer(step, loop, times, step.meeting[op], now)
    elif device.work_left(step.work[op], loop.rate[op], now - loop.rated_at[op]):
        loop.watched[op] = NEVER
        _mark_changed(loop, step.rank[op])
    else:
        _take_off_rank(step, loop, op)
        _finish(step, loop, times, op, now)
        _wake(loop, loop.place_stream[place])


@usable_in_compiled
def _end_transfer(step: Step, loop: Loop, times: Times, meeting: int, now: int) -> None:
    begin, end = step.link_begin[meeting], step.link_begin[meeting + 1]
    device.hold_links(begin, end, step.links, loop.taken, 0)
    for i in range(begin, end):
        link = step.links[i]
        waiting, loop.link_watcher[link] = loop.link_watcher[link], NOBODY
        while waiting != NOBODY:
            _add_candidate(loop, waiting)
            waiting = loop.next_on_link[waiting]
    for i in range(step.member_begin[meeting], step.member_begin[meeting + 1]):
        member = step.members[i]
        _take_off_rank(step, loop, member)
        times.release_ns[member] = now
        first = step.first[member]
        loop.under_way[first] -= 1
        if not loop.under_way[first]:  # a batch ends with its last transfer
            _end_kernel(step, loop, times, step.stream[member], now)


@usable_in_compiled
def _end_kernel(step: Step, loop: Loop, times: Times, stream: int, now: int) -> None:
    """All ops of the kernel that a stream has come to end."""
    i = loop.cursor[stream] - 1
    first = step.first[step.by_stream[i]]
    while i >= step.stream_begin[stream] and step.first[step.by_stream[i]] == first:
        _finish(step, loop, times, step.by_stream[i], now)
        i -= 1
    _wake(loop, stream)


# -- decisions


@usable_in_compiled
def _decide(step: Step, loop: Loop, times: Times, physics: Physics, now: int) -> None:
    count = loop.counts[_NUM_CANDIDATES]
    loop.counts[_NUM_CANDIDATES] = 0
    _sort_by_turn(loop.candidates, count, step.turn)
    for i in range(count):
        _try_to_start_transfer(step, loop, times, loop.candidates[i], now)
    loop.counts[_NUM_MOVED] = 0
    for i in range(loop.counts[_NUM_CHANGED]):
        loop.is_changed[loop.changed[i]] = 0
        _share(step, loop, times, physics, loop.changed[i], now)
    loop.counts[_NUM_CHANGED] = 0
    for i in range(loop.counts[_NUM_MOVED]):
        _go_on(step, loop, times, physics, loop.moved[i], now)


@usable_in_compiled
def _sort_by_turn(candidates: Ints, count: int, turn: Ints) -> None:
    """Insertion sort: there are few, mostly one."""
    for i in range(1, count):
        candidate, j = candidates[i], i
        while j and turn[candidates[j - 1]] > turn[candidate]:
            candidates[j] = candidates[j - 1]
            j -= 1
        candidates[j] = candidate


@usable_in_compiled
def _reach_transfers(
    step: Step, loop: Loop, physics: Physics, begin: int, end: int, now: int
) -> None:
    for i in range(begin, end):
        op = step.by_stream[i]
        if _has_contention(physics):  # its CTAs wait for SMs, here and now
            physics.state.here_ns[op] = now
            _put_on_rank(step, loop, op)
            continue
        meeting = step.meeting[op]
        loop.absent[meeting] -= 1
        if not loop.absent[meeting]:
            _add_candidate(loop, meeting)


@usable_in_compiled
def _add_candidate(loop: Loop, meeting: int) -> None:
    loop.candidates[loop.counts[_NUM_CANDIDATES]] = meeting
    loop.counts[_NUM_CANDIDATES] += 1


@usable_in_compiled
def _try_to_start_transfer(step: Step, loop: Loop, times: Times, meeting: int, now: int) -> None:
    begin, end = step.link_begin[meeting], step.link_begin[meeting + 1]
    taken = device.first_taken_link(begin, end, step.links, loop.taken)
    if taken >= 0:  # nothing to try again before that link is free
        loop.next_on_link[meeting] = loop.link_watcher[taken]
        loop.link_watcher[taken] = meeting
        return
    device.hold_links(begin, end, step.links, loop.taken, 1)
    for i in range(step.member_begin[meeting], step.member_begin[meeting + 1]):
        times.start_ns[step.members[i]] = now
        _put_on_rank(step, loop, step.members[i])


@usable_in_compiled
def _put_on_rank(step: Step, loop: Loop, op: int) -> None:
    rank = step.rank[op]
    loop.running[loop.running_begin[rank] + loop.num_running[rank]] = op
    loop.num_running[rank] += 1
    _mark_changed(loop, rank)


@usable_in_compiled
def _take_off_rank(step: Step, loop: Loop, op: int) -> None:
    rank = step.rank[op]
    i, last = loop.running_begin[rank], loop.running_begin[rank] + loop.num_running[rank] - 1
    while loop.running[i] != op:
        i += 1
    loop.running[i] = loop.running[last]
    loop.num_running[rank] -= 1
    _mark_changed(loop, rank)


@usable_in_compiled
def _mark_changed(loop: Loop, rank: int) -> None:
    if not loop.is_changed[rank]:
        loop.is_changed[rank] = 1
        loop.changed[loop.counts[_NUM_CHANGED]] = rank
        loop.counts[_NUM_CHANGED] += 1


@usable_in_compiled
def _has_contention(physics: Physics) -> bool:
    return len(physics.gpu.machine) > 0


@usable_in_compiled
def _share(step: Step, loop: Loop, times: Times, physics: Physics, rank: int, now: int) -> None:
    begin = loop.running_begin[rank]
    end = begin + loop.num_running[rank]
    if _has_contention(physics):
        device_sms.share_gpu(begin, end, loop.running, now, physics.gpu, physics.state, loop.given,
                             loop.watch)  # fmt: skip
    else:
        device.share_device(begin, end, loop.running, times.start_ns, physics.traits, loop.given)
    for i in range(begin, end):
        op = loop.running[i]
        if loop.given_rate[op] != loop.given[i] or loop.watched[op] != loop.watch[i]:
            if times.placed_ns[op] == now:
                _wake_behind(loop, op)
            loop.given_rate[op], loop.watched[op] = loop.given[i], loop.watch[i]
            loop.moved[loop.counts[_NUM_MOVED]] = op
            loop.counts[_NUM_MOVED] += 1


@usable_in_compiled
def _go_on(step: Step, loop: Loop, times: Times, physics: Physics, op: int, now: int) -> None:
    """Go on at the rate that the device gives now: to a transfer, the least of its ranks'."""
    rate, meeting = loop.given_rate[op], step.meeting[op]
    if meeting >= 0:
        for i in range(step.member_begin[meeting], step.member_begin[meeting + 1]):
            rate = min(rate, loop.given_rate[step.members[i]])
        if rate < 0:
            return  # a member waits for SMs
        if times.start_ns[op] == NEVER:
            _start_transfer(step, loop, times, meeting, now)
        op = step.members[step.member_begin[meeting]]
    elif rate and times.start_ns[op] == NEVER:
        _begin(loop, times, op, now)
    _set_rate(step, loop, op, rate, now)


@usable_in_compiled
def _start_transfer(step: Step, loop: Loop, times: Times, meeting: int, now: int) -> None:
    """All members have SMs: it moves bytes from now on, which their ranks will feel."""
    for i in range(step.member_begin[meeting], step.member_begin[meeting + 1]):
        times.start_ns[step.members[i]] = now
        _mark_changed(loop, step.rank[step.members[i]])


@usable_in_compiled
def _set_rate(step: Step, loop: Loop, op: int, rate: int, now: int) -> None:
    """Go on at another rate, or look again at another time."""
    if rate != loop.rate[op]:
        elapsed_ns = now - loop.rated_at[op]
        step.work[op] = device.work_left(step.work[op], loop.rate[op], elapsed_ns)
        loop.rate[op], loop.rated_at[op] = rate, now
    elif step.meeting[op] >= 0:
        return
    place, due = step.place[op], FAR
    if rate:
        due = loop.rated_at[op] + device.time_to_finish_ns(step.work[op], rate)
        due = min(due, loop.watched[op])
    loop.due_op[place] = op
    _set_due(loop, place, due)
