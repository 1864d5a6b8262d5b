"""The event loop of :mod:`mhcplan.sim.compiled`, as machine code; the reference says what it does.

What happens at one instant, and in which order, is told in :mod:`mhcplan.sim.engine`. Here a stream
is a cursor in the list of its ops instead of a process, and it waits for one thing at a time: for
the host to issue its next kernel, for a time, for an op to end, or for its kernel to end. Streams
that wait for the same op, or for the same host, form a linked list.

Every op that may run at the same time as others has a *place*: one a stream, or one an op of the
stream's largest batch. What changes while an op runs is kept there: of tens of thousands of ops
some dozens have a place at a time, and these stay in the processor's nearest memory. Of the ops on
a rank two or three run at a time, so what is due next on it is found faster than by a queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.sim import device, device_sms, device_state
from mhcplan.sim.jit import compiled, usable_in_compiled

if TYPE_CHECKING:
    from mhcplan.sim.compiled_state import Loop, Physics, Step, Times
    from mhcplan.sim.jit import Ints

NEVER = -1
NOBODY = -1
FAR = device_state.FAR
# Places in ``Loop.counts``.
_NUM_AWAKE, _NUM_CANDIDATES, _NUM_CHANGED, _NUM_MOVED, _NUM_STALE = range(5)


@compiled
def play(step: Step, physics: Physics, loop: Loop, times: Times) -> None:
    """Play a step: fills ``times``, but for what never happens, and changes ``loop``."""
    for rank in range(len(step.rank_begin) - 1):
        _issue(step, loop, times, rank, 0)
    for stream in range(len(step.stream_begin) - 1):
        _wake(loop, stream)
    now = 0
    while True:
        while loop.counts[_NUM_AWAKE]:
            loop.counts[_NUM_AWAKE] -= 1
            _advance(step, loop, times, physics, loop.awake[loop.counts[_NUM_AWAKE]], now)
        if loop.counts[_NUM_CANDIDATES] or loop.counts[_NUM_CHANGED]:
            _decide(step, loop, times, physics, now)
        next_due = _next_due(loop)
        if next_due > now and _goes_on_now(loop):
            continue
        if next_due == FAR:
            break
        now = next_due
        _complete(step, loop, times, physics, now)


@usable_in_compiled
def _goes_on_now(loop: Loop) -> bool:
    counts = loop.counts
    return counts[_NUM_AWAKE] + counts[_NUM_CANDIDATES] + counts[_NUM_CHANGED] > 0


# -- what is due


@usable_in_compiled
def _mark_stale(loop: Loop, rank: int) -> None:
    if loop.rank_due[rank] != NEVER:
        loop.rank_due[rank] = NEVER
        loop.stale[loop.counts[_NUM_STALE]] = rank
        loop.counts[_NUM_STALE] += 1


@usable_in_compiled
def _next_due(loop: Loop) -> int:
    """The next instant at which anything is due."""
    for i in range(loop.counts[_NUM_STALE]):
        rank = loop.stale[i]
        least, begin = loop.host_due[rank], loop.rank_places[rank]
        for at in range(begin, begin + loop.num_running[rank]):
            least = min(least, loop.due[loop.running[at]])
        loop.rank_due[rank] = least
    loop.counts[_NUM_STALE] = 0
    least = FAR
    for due in loop.rank_due:
        least = min(least, due)
    return least


@usable_in_compiled
def _complete(step: Step, loop: Loop, times: Times, physics: Physics, now: int) -> None:
    """All that is due now."""
    for rank in range(len(loop.rank_due)):
        if loop.rank_due[rank] != now:
            continue
        _mark_stale(loop, rank)
        if loop.host_due[rank] == now:
            _wake_sleepers(loop, rank)
        begin = loop.rank_places[rank]
        at = begin + loop.num_running[rank]
        while at > begin:  # from the last on: where one is taken off, the last one is put
            at -= 1
            if at >= begin + loop.num_running[rank]:  # a message to the rank itself took two off
                continue
            if loop.due[loop.running[at]] == now:
                _complete_one(step, loop, times, physics, loop.running[at], rank, now)


# -- hosts and streams


@usable_in_compiled
def _issue(step: Step, loop: Loop, times: Times, rank: int, now: int) -> None:
    """The host issues ops up to the next one that it waits for."""
    op, at = loop.issued[rank], now
    loop.host_waits[rank] = NOBODY
    while op < step.rank_begin[rank + 1]:
        at += step.host_ns[step.cost[op]]
        times.issue_ns[op] = at
        op += 1
        if step.host_sync[op - 1]:
            loop.host_waits[rank] = op - 1
            break
    loop.issued[rank] = op
    _wake_sleepers(loop, rank)


@usable_in_compiled
def _wake_sleepers(loop: Loop, rank: int) -> None:
    """The host has gone on: let all look that wait for it."""
    loop.host_due[rank] = FAR
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
        first, end = step.by_stream[begin], step.kernel_end[begin]
        if _must_wait(step, loop, times, stream, first, end, now):
            return
        loop.cursor[stream] = loop.wait_op[stream] = end
        loop.wait_at[stream] = -1
        if step.member[first] >= 0:
            _reach_transfers(step, loop, physics, stream, begin, end, now)
            return
        if step.work[step.cost[first]]:
            place = step.stream_place[stream]
            _take_place(step, loop, physics, place, first)
            _put_on_rank(loop, place, step.stream_rank[stream])
            return
        _begin(loop, times, first, now)
        _finish(step, loop, times, first, step.stream_rank[stream], now)


@usable_in_compiled
def _must_wait(
    step: Step, loop: Loop, times: Times, stream: int, first: int, end: int, now: int
) -> bool:
    """Whether a stream's next kernel cannot start; sees to it that the stream is woken."""
    issue = times.issue_ns[step.by_stream[end - 1]]
    if issue == NEVER or issue > now:
        rank = step.stream_rank[stream]
        loop.next_watcher[stream], loop.sleeper[rank] = loop.sleeper[rank], stream
        if issue > now:
            loop.host_due[rank] = min(loop.host_due[rank], issue)
            _mark_stale(loop, rank)
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
    behind = step.behind[first]
    if behind >= 0 and times.start_ns[behind] < 0 and times.placed_ns[behind] < 0:
        loop.next_watcher[stream] = loop.begin_watcher[behind]
        loop.begin_watcher[behind] = stream
        return True
    return False


@usable_in_compiled
def _take_place(step: Step, loop: Loop, physics: Physics, place: int, op: int) -> None:
    """From now on a place is an op's: what is known of the op is to be found there."""
    traits, gpu, state = physics.traits, physics.gpu, physics.state
    loop.op[place] = op
    loop.given_rate[place], loop.watched[place] = device_state.NOT_PLACED, FAR
    loop.due[place] = FAR
    traits.number[place], traits.is_transfer[place] = op, 0
    gpu.cost[place], gpu.ctas[place] = step.cost[op], -1
    state.work[place] = step.work[step.cost[op]]
    state.rate[place] = state.rated_at[place] = state.spread[place] = 0
    state.start_ns[place] = state.placed[place] = state.placed_ns[place] = NEVER


@usable_in_compiled
def _begin(loop: Loop, times: Times, op: int, now: int) -> None:
    """A compute op begins: what is behind it in its hardware queue goes on."""
    times.start_ns[op] = now
    _wake_behind(loop, op)


@usable_in_compiled
def _wake_behind(loop: Loop, op: int) -> None:
    stream = loop.begin_watcher[op]
    if stream == NOBODY:
        return
    loop.begin_watcher[op] = NOBODY
    while stream != NOBODY:
        _wake(loop, stream)
        stream = loop.next_watcher[stream]


@usable_in_compiled
def _finish(step: Step, loop: Loop, times: Times, op: int, rank: int, now: int) -> None:
    """An op ends: what waits for it goes on."""
    times.end_ns[op] = now
    stream = loop.watcher[op]
    while stream != NOBODY:
        _wake(loop, stream)
        stream = loop.next_watcher[stream]
    if op == loop.host_waits[rank]:
        _issue(step, loop, times, rank, now)


# -- completions


@usable_in_compiled
def _complete_one(
    step: Step, loop: Loop, times: Times, physics: Physics, place: int, rank: int, now: int
) -> None:
    """Whatever is due at a place."""
    op, state = loop.op[place], physics.state
    if physics.traits.is_transfer[place]:
        _end_transfer(step, loop, times, step.meeting[step.member[op]], now)
    elif device.work_left(state.work[place], state.rate[place], now - state.rated_at[place]):
        loop.due[place], loop.watched[place] = FAR, NEVER
        _mark_changed(loop, rank)
    else:
        loop.op[place] = NOBODY
        _take_off_rank(loop, place, rank)
        _finish(step, loop, times, op, rank, now)
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
        place = step.member_place[i]
        stream, rank = loop.place_stream[place], loop.place_rank[place]
        _take_off_rank(loop, place, rank)
        loop.op[place] = NOBODY
        times.release_ns[step.member_op[i]] = now
        loop.under_way[stream] -= 1
        if not loop.under_way[stream]:  # a batch ends with its last transfer
            _end_kernel(step, loop, times, stream, rank, now)


@usable_in_compiled
def _end_kernel(step: Step, loop: Loop, times: Times, stream: int, rank: int, now: int) -> None:
    """All ops of the kernel that a stream has come to end."""
    for i in range(loop.kernel[stream], loop.cursor[stream]):
        _finish(step, loop, times, step.by_stream[i], rank, now)
    _wake(loop, stream)


# -- decisions


@usable_in_compiled
def _decide(step: Step, loop: Loop, times: Times, physics: Physics, now: int) -> None:
    count = loop.counts[_NUM_CANDIDATES]
    loop.counts[_NUM_CANDIDATES] = 0
    _sort_by_turn(loop.candidates, count, step.turn)
    for i in range(count):
        _try_to_start_transfer(step, loop, times, physics, loop.candidates[i], now)
    loop.counts[_NUM_MOVED] = 0
    for i in range(loop.counts[_NUM_CHANGED]):
        loop.is_changed[loop.changed[i]] = 0
        _share(loop, times, physics, loop.changed[i], now)
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
    step: Step, loop: Loop, physics: Physics, stream: int, begin: int, end: int, now: int
) -> None:
    loop.kernel[stream], loop.under_way[stream] = begin, end - begin
    for i in range(begin, end):
        op = step.by_stream[i]
        member = step.member[op]
        meeting, place = step.meeting[member], step.member_place[member]
        _take_place(step, loop, physics, place, op)
        physics.traits.is_transfer[place] = 1
        physics.state.work[place] = step.moves[meeting]
        if _has_contention(physics):  # its CTAs wait for SMs, here and now
            _ask_for_sms(step, physics, place, op, member, now)
            _put_on_rank(loop, place, step.stream_rank[stream])
            continue
        loop.absent[meeting] -= 1
        if not loop.absent[meeting]:
            _add_candidate(loop, meeting)


@usable_in_compiled
def _ask_for_sms(step: Step, physics: Physics, place: int, op: int, member: int, now: int) -> None:
    gpu, state = physics.gpu, physics.state
    gpu.ctas[place], gpu.burden[place] = physics.ctas[member], physics.burden[member]
    gpu.out_link[place], gpu.in_link[place] = physics.out_link[member], physics.in_link[member]
    gpu.waits[place] = step.wait_begin[op + 1] - step.wait_begin[op]
    state.here_ns[place] = now


@usable_in_compiled
def _add_candidate(loop: Loop, meeting: int) -> None:
    loop.candidates[loop.counts[_NUM_CANDIDATES]] = meeting
    loop.counts[_NUM_CANDIDATES] += 1


@usable_in_compiled
def _try_to_start_transfer(
    step: Step, loop: Loop, times: Times, physics: Physics, meeting: int, now: int
) -> None:
    begin, end = step.link_begin[meeting], step.link_begin[meeting + 1]
    taken = device.first_taken_link(begin, end, step.links, loop.taken)
    if taken >= 0:  # nothing to try again before that link is free
        loop.next_on_link[meeting] = loop.link_watcher[taken]
        loop.link_watcher[taken] = meeting
        return
    device.hold_links(begin, end, step.links, loop.taken, 1)
    for i in range(step.member_begin[meeting], step.member_begin[meeting + 1]):
        op, place = step.member_op[i], step.member_place[i]
        times.start_ns[op] = physics.state.start_ns[place] = now
        _put_on_rank(loop, place, loop.place_rank[place])


@usable_in_compiled
def _put_on_rank(loop: Loop, place: int, rank: int) -> None:
    loop.running[loop.rank_places[rank] + loop.num_running[rank]] = place
    loop.num_running[rank] += 1
    _mark_changed(loop, rank)


@usable_in_compiled
def _take_off_rank(loop: Loop, place: int, rank: int) -> None:
    i, last = loop.rank_places[rank], loop.rank_places[rank] + loop.num_running[rank] - 1
    while loop.running[i] != place:
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
def _share(loop: Loop, times: Times, physics: Physics, rank: int, now: int) -> None:
    state = physics.state
    begin = loop.rank_places[rank]
    end = begin + loop.num_running[rank]
    if _has_contention(physics):
        device_sms.share_gpu(begin, end, loop.running, now, physics.gpu, state, loop.given,
                             loop.watch)  # fmt: skip
    else:
        device.share_device(begin, end, loop.running, state.start_ns, physics.traits, loop.given)
    for i in range(begin, end):
        place = loop.running[i]
        if loop.given_rate[place] != loop.given[i] or loop.watched[place] != loop.watch[i]:
            if state.placed_ns[place] == now:
                times.placed_ns[loop.op[place]] = now
                _wake_behind(loop, loop.op[place])
            loop.given_rate[place], loop.watched[place] = loop.given[i], loop.watch[i]
            loop.moved[loop.counts[_NUM_MOVED]] = place
            loop.counts[_NUM_MOVED] += 1


@usable_in_compiled
def _go_on(step: Step, loop: Loop, times: Times, physics: Physics, place: int, now: int) -> None:
    """Go on at the rate that the device gives now: to a transfer, the least of its ranks'."""
    rate, op = loop.given_rate[place], loop.op[place]
    begun = physics.state.start_ns[place] != NEVER
    if not physics.traits.is_transfer[place]:
        if rate and not begun:
            physics.state.start_ns[place] = now
            _begin(loop, times, op, now)
        _set_rate(loop, physics, place, rate, now)
        return
    meeting = step.meeting[step.member[op]]
    for i in range(step.member_begin[meeting], step.member_begin[meeting + 1]):
        if loop.op[step.member_place[i]] != step.member_op[i]:
            return  # it is not there yet
        rate = min(rate, loop.given_rate[step.member_place[i]])
    if rate < 0:
        return  # a member waits for SMs
    if not begun:
        _start_transfer(step, loop, times, physics, meeting, now)
    place = step.member_place[step.member_begin[meeting]]
    if rate != physics.state.rate[place]:
        _set_rate(loop, physics, place, rate, now)


@usable_in_compiled
def _start_transfer(
    step: Step, loop: Loop, times: Times, physics: Physics, meeting: int, now: int
) -> None:
    """All members have SMs: it moves bytes from now on, which their ranks will feel."""
    for i in range(step.member_begin[meeting], step.member_begin[meeting + 1]):
        place = step.member_place[i]
        times.start_ns[step.member_op[i]] = physics.state.start_ns[place] = now
        _mark_changed(loop, loop.place_rank[place])


@usable_in_compiled
def _set_rate(loop: Loop, physics: Physics, place: int, rate: int, now: int) -> None:
    """Go on at another rate, or look again at another time."""
    state = physics.state
    if rate != state.rate[place]:
        elapsed_ns = now - state.rated_at[place]
        state.work[place] = device.work_left(state.work[place], state.rate[place], elapsed_ns)
        state.rate[place], state.rated_at[place] = rate, now
    due = FAR
    if rate:
        due = state.rated_at[place] + device.time_to_finish_ns(state.work[place], rate)
        due = min(due, loop.watched[place])
    loop.due[place] = due
    _mark_stale(loop, loop.place_rank[place])
