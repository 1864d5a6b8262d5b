"""The physics with contention: kernels and communication share SMs, memory and links.

Every engine calls :func:`share_gpu`, plainly or compiled, whenever something on a rank begins, ends
or comes to a point that it was told to watch. Between two such instants nothing changes, so no
event is spent on single CTAs. The rules were read off device traces of H100s;
:mod:`mhcplan.profiles.contention_replay` plays what was measured, and says how far off they are.

* **SMs.** A rank's compute ops go most urgent stream first. What runs is never taken back: a more
  urgent kernel begins when CTAs end, after the wave that is resident; a persistent kernel gives up
  its SMs at its end only.
* **Two ops at once.** Beside the op that has the SMs, one of a less urgent stream goes on: as far
  as both are bound by memory they halve it, and as far as one is and the other is not, the less
  urgent one keeps a share (``together``) of its rate. More urgent ones wait for CTAs to end.
* **Communication CTAs** take a whole SM each, and keep it until the transfer ends, peers' delays
  included. At equal priority they find SMs between two kernels, in the tail of one, or where a grid
  leaves some free; at high priority as soon as CTAs end. Those that find none follow later, and so
  many rounds the transfer takes. It starts when it has an SM on each member's rank.
* **A kernel that lacks SMs** takes as many waves as it needs on the others: one that filled the
  chip once takes twice as long, or less if pieces were dealt to its CTAs and the last ones, which
  are late, have one less. Clusters of CTAs need SMs of one GPC: of some no cluster of four or eight
  can be made, and each that is held where such a kernel begins is one that the kernel lacks; what
  it leaves free it does not miss. Attention, whose pieces are unequal, takes longer only for the
  time until its SMs begin to fall idle. Where CTAs follow each other, fewer of them wait for the
  same memory and each lives shorter. Where a kernel is bound by memory it lacks nothing but
  bandwidth. SMs that a green context keeps from compute are lacking as those that communication
  holds, but leave it whole clusters.
* **Memory.** The chains of loads and stores of a transfer are slower beside any kernel, most where
  it saturates memory, and its handshake is slower still; bytes that transfers move are missing to
  the kernel.
* **Links.** Transfers of a rank that together want more than a link carries share it.

An op goes at its mean rate over the kernels that are left of it, or at that of the kernel it is in
if traffic waits for that to end; transfers go at the mean over all kernels beside them: within an
op, only the places where SMs fall free are exact.

Tables are made by :mod:`mhcplan.sim.device_tables`. Shares are integers, in units of ``1 / SHARE``;
work and rates are those of :mod:`mhcplan.sim.device`.
"""

from __future__ import annotations

from mhcplan.sim.device import FULL_RATE, work_left
from mhcplan.sim.device_state import (
    BESIDE,
    COMPUTE_DELAY,
    COMPUTE_SMS,
    CROWDING,
    FAR,
    HAS_SMS,
    KNOWN,
    LATENCY_DELAY,
    LEAST_LIFE,
    NOT_PLACED,
    SHARE,
    SMS,
    TOGETHER,
    Gpu,
    State,
)
from mhcplan.sim.jit import Ints, usable_in_compiled

NOT_MODELLED: tuple[str, ...] = (
    "kernels of two streams of one GPU of which none is bound by memory run one after another",
    "within an op, traffic goes at its mean speed beside the op's kernels",
    "a message that NCCL's buffers would take is not sent before its receiver is there",
    "the queue of launched kernels has no limit, so the host never waits for room in it",
)

_MOST_BURDEN = SHARE * 9 // 10  # of memory bandwidth that traffic may take


# -- the rank


@usable_in_compiled
def share_gpu(
    begin: int, end: int, running: Ints, now: int, gpu: Gpu, state: State, rate: Ints, watch: Ints
) -> None:
    """Place CTAs and set the rates of what is on one rank.

    Args:
        begin, end: the rank's ops are ``running[begin : end]``: of each compute stream the one that
            is free to run, and every transfer that a stream has come to and that has not ended.
        running: ops, in no order that means anything.
        now: the instant.
        gpu, state: of all ops; places are taken in ``state``.
        rate: filled in the places of ``running``: units of work a nanosecond, for a transfer what
            this rank gives it, or NOT_PLACED.
        watch: filled likewise with the instant at which to call again, or FAR.
    """
    chosen, current = -1, -1
    held = transfers = 0
    waits = False
    for i in range(begin, end):
        op = running[i]
        rate[i], watch[i] = 0, FAR
        if gpu.ctas[op] >= 0:
            held += max(state.placed[op], 0)
            waits |= state.placed[op] < gpu.ctas[op]
            transfers += 1
            continue
        if state.rate[op] > 0 and state.placed[op] == HAS_SMS:
            current = i
        if chosen < 0 or _goes_first(op, running[chosen], state, gpu):
            chosen = i
    kernel, left, until = -1, 0, 0
    if chosen >= 0:
        if current >= 0 and current != chosen:
            kernel = _kernel_at(running[current], now, gpu, state)
            left = _left(running[current], now, state)
            if not _gives_way(kernel, running[current], left, gpu):
                chosen = current
                until = _next_wave(kernel, running[current], left, gpu)
        kernel = _kernel_at(running[chosen], now, gpu, state)
        left = _left(running[chosen], now, state)
        op = running[chosen]
        if _begins(kernel, op, left, gpu):
            state.spread[op] = _sms_at_begin(begin, end, running, now, op, held, gpu, state)
    wake = FAR
    if waits:
        until, wake, held = _place_all(
            begin, end, running, now, gpu, state, chosen, kernel, left, until, held
        )
    burden = 0
    if transfers:
        burden = _rate_transfers(begin, end, running, gpu, state, chosen, rate)
    if chosen < 0:
        return
    op = running[chosen]
    state.placed[op] = HAS_SMS
    rate[chosen] = _compute_rate(op, kernel, left, until, held, burden, gpu, state)
    beside = -1
    if end - begin - transfers > 1:
        beside = _next_to(begin, end, running, chosen, gpu, state)
    if beside >= 0 and gpu.priority[running[beside]] >= gpu.priority[op]:
        op = running[beside]
        kernel_beside, left_beside = _kernel_at(op, now, gpu, state), _left(op, now, state)
        state.placed[op] = BESIDE
        if _begins(kernel_beside, op, left_beside, gpu):
            state.spread[op] = gpu.machine[SMS] - held
        alone = _compute_rate(op, kernel_beside, left_beside, 0, held, burden, gpu, state)
        halved, fits = _both(running[chosen], op, gpu)
        rate[chosen] = max(rate[chosen] * (SHARE - halved) // SHARE, 1)
        rate[beside] = alone * (halved + fits) // SHARE
    if until > 0:
        wake = min(wake, now + (left - until + rate[chosen] - 1) // rate[chosen])
    watch[chosen] = wake


@usable_in_compiled
def _goes_first(op: int, other: int, state: State, gpu: Gpu) -> bool:
    """Whether compute op ``op`` gets the SMs and not ``other``."""
    if gpu.priority[op] != gpu.priority[other]:
        return gpu.priority[op] < gpu.priority[other]
    if (state.start_ns[op] >= 0) != (state.start_ns[other] >= 0):
        return state.start_ns[op] >= 0
    return gpu.number[op] < gpu.number[other]


# -- where an op is. ``left`` is work left of it, ``until`` work left of it at some later point


@usable_in_compiled
def _left(op: int, now: int, state: State) -> int:
    return work_left(state.work[op], state.rate[op], now - state.rated_at[op])


@usable_in_compiled
def _kernel_at(op: int, now: int, gpu: Gpu, state: State) -> int:
    """The kernel that an op is in; at a border the one that begins."""
    key = gpu.cost[op]
    last = gpu.begin[key + 1] - 1
    done = gpu.end[last] - _left(op, now, state)
    kernel = gpu.begin[key]
    while kernel < last and gpu.end[kernel] <= done:
        kernel += 1
    return kernel


@usable_in_compiled
def _after(kernel: int, op: int, gpu: Gpu) -> int:
    """Work that is left of an op at the end of one of its kernels."""
    return gpu.end[gpu.begin[gpu.cost[op] + 1] - 1] - gpu.end[kernel]


@usable_in_compiled
def _before(kernel: int, op: int, gpu: Gpu) -> int:
    """Work that is left of an op at the beginning of one of its kernels."""
    if kernel == gpu.begin[gpu.cost[op]]:
        return gpu.end[gpu.begin[gpu.cost[op] + 1] - 1]
    return _after(kernel - 1, op, gpu)


@usable_in_compiled
def _begins(kernel: int, op: int, left: int, gpu: Gpu) -> bool:
    """Whether none of its CTAs has been placed yet. Ends are rounded up by less than 1 ns."""
    return left > _before(kernel, op, gpu) - FULL_RATE


@usable_in_compiled
def _gives_way(kernel: int, op: int, left: int, gpu: Gpu) -> bool:
    """Whether a more urgent kernel's CTAs get SMs now."""
    if _begins(kernel, op, left, gpu) or gpu.loose[kernel]:
        return True
    life = gpu.life[kernel]
    return life > 0 and (_before(kernel, op, gpu) - left) % life < FULL_RATE


@usable_in_compiled
def _next_wave(kernel: int, op: int, left: int, gpu: Gpu) -> int:
    """Work left when the next CTAs end: of the wave, or of a persistent kernel."""
    life, after = gpu.life[kernel], _after(kernel, op, gpu)
    if life == 0:
        return after
    done = _before(kernel, op, gpu) - left
    return max(after, left - life + done % life)


# -- communication CTAs


@usable_in_compiled
def _place_all(
    begin: int, end: int, running: Ints, now: int, gpu: Gpu, state: State, chosen: int, kernel: int,
    left: int, until: int, held: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Give SMs to transfers that lack some: most urgent first, then in issue order.

    Returns work left of the chosen op, and an instant, at which to look again; and all SMs held.
    """
    blocked = False  # by CTAs of a kernel that a more urgent one has stopped
    for i in range(begin, end):
        blocked |= i != chosen and gpu.ctas[running[i]] < 0 and state.start_ns[running[i]] >= 0
    wake, before, before_priority = FAR, -1, -FAR
    while True:
        member = -1
        for i in range(begin, end):
            op = running[i]
            if gpu.ctas[op] < 0 or state.placed[op] == gpu.ctas[op]:
                continue
            number, priority = gpu.number[op], gpu.priority[op]
            is_later = priority > before_priority or (
                priority == before_priority and number > before
            )
            if is_later and (
                member < 0
                or priority < gpu.priority[member]
                or (priority == gpu.priority[member] and number < gpu.number[member])
            ):
                member = op
        if member < 0:
            break
        before, before_priority = gpu.number[member], gpu.priority[member]
        lacks = gpu.ctas[member] - max(state.placed[member], 0)
        in_use = 0
        if chosen >= 0:
            in_use = _in_use(member, now, running[chosen], kernel, left, blocked, gpu, state)
        take = min(lacks, max(gpu.machine[SMS] - in_use - held, 0))
        if chosen >= 0 and in_use == 0:
            state.spread[running[chosen]] -= take
        if take > 0 or gpu.ctas[member] == 0:
            if state.placed[member] < 0:
                state.placed_ns[member] = now
            state.placed[member] = max(state.placed[member], 0) + take
            held += take
            lacks -= take
        if lacks > 0 and chosen >= 0:
            urgent = gpu.priority[member] < gpu.priority[running[chosen]]
            if urgent and gpu.loose[kernel]:
                ready = state.here_ns[member] + gpu.drain_ns[kernel]
                if ready > now:
                    wake = min(wake, ready)
            until = max(until, _next_room(lacks, urgent, running[chosen], kernel, left, gpu))
    return until, wake, held


@usable_in_compiled
def _in_use(
    member: int, now: int, op: int, kernel: int, left: int, blocked: bool, gpu: Gpu, state: State
) -> int:
    """SMs that compute leaves to nobody, as far as ``member`` of a transfer is concerned."""
    ahead = gpu.priority[member] < gpu.priority[op]
    if _begins(kernel, op, left, gpu):
        if _comes_after(member, op, now, gpu, state):
            return gpu.used[kernel]
        return gpu.machine[SMS] if blocked else 0
    rest = left - _after(kernel, op, gpu)
    if rest <= gpu.tail[kernel] + FULL_RATE and not blocked:
        if gpu.idle[kernel] >= 0:
            placed = _used(kernel, state.spread[op], gpu)
            return min(gpu.machine[SMS] - gpu.idle[kernel], placed)
        return gpu.machine[SMS] * rest // max(gpu.tail[kernel], 1)
    drained = now >= state.here_ns[member] + gpu.drain_ns[kernel]
    if ahead and drained and _gives_way(kernel, op, left, gpu):
        return 0
    return gpu.machine[SMS] if blocked else _used(kernel, state.spread[op], gpu)


@usable_in_compiled
def _comes_after(member: int, op: int, now: int, gpu: Gpu, state: State) -> bool:
    """Whether a transfer gets what SMs a compute op leaves, where a kernel of it begins."""
    # a stream's next kernel is there before another stream has seen the event it waited for
    late = gpu.waits[member] > 0 and state.here_ns[member] == now
    equal = gpu.priority[member] == gpu.priority[op]
    return gpu.priority[member] > gpu.priority[op] or (equal and late)


@usable_in_compiled
def _sms_at_begin(
    begin: int, end: int, running: Ints, now: int, op: int, held: int, gpu: Gpu, state: State
) -> int:
    """SMs that a kernel of an op finds which begins now, of those that are not held."""
    for i in range(begin, end):  # the engine may look twice at an instant
        member = running[i]
        if state.placed_ns[member] == now and _comes_after(member, op, now, gpu, state):
            held -= state.placed[member]
    return gpu.machine[SMS] - held


@usable_in_compiled
def _used(kernel: int, spread: int, gpu: Gpu) -> int:
    """SMs of a kernel that began on ``spread`` of them: fewer where its CTAs crowd together."""
    if spread < gpu.used[kernel] and gpu.units[kernel] <= spread * gpu.fit[kernel]:
        return spread
    return gpu.used[kernel]


@usable_in_compiled
def _next_room(lacks: int, urgent: bool, op: int, kernel: int, left: int, gpu: Gpu) -> int:
    """Work left of the op when SMs fall free next for CTAs that lack them; 0: at its end."""
    after = _after(kernel, op, gpu)
    if urgent and gpu.life[kernel] and not gpu.loose[kernel]:
        return _next_wave(kernel, op, left, gpu)
    tail = gpu.tail[kernel]
    if gpu.idle[kernel] < 0:  # as many as are lacking have fallen idle
        tail -= tail * min(lacks, gpu.machine[SMS]) // gpu.machine[SMS]
    if gpu.idle[kernel] != 0 and left - after > tail + FULL_RATE:
        return after + tail
    return after


@usable_in_compiled
def _rate_transfers(
    begin: int, end: int, running: Ints, gpu: Gpu, state: State, chosen: int, rate: Ints
) -> int:
    """Set the rates of transfers; returns the share of the memory bandwidth that they take."""
    delay = gpu.delay[gpu.cost[running[chosen]]] if chosen >= 0 else SHARE
    burden = moving = 0
    for i in range(begin, end):
        op = running[i]
        moving += gpu.ctas[op] >= 0 and state.start_ns[op] >= 0
    for i in range(begin, end):
        op = running[i]
        if gpu.ctas[op] < 0:
            continue
        if state.placed[op] < 0:
            rate[i] = NOT_PLACED
            continue
        if state.start_ns[op] < 0:
            continue  # its peers are not there
        crowd = SHARE if moving == 1 else _crowd(begin, end, running, op, gpu, state)
        rate[i] = _transfer_rate(gpu.cost[op], gpu.ctas[op], state.placed[op], delay, crowd, gpu)
        burden += gpu.burden[op] * rate[i] // FULL_RATE
    return min(burden, _MOST_BURDEN)


@usable_in_compiled
def _crowd(begin: int, end: int, running: Ints, op: int, gpu: Gpu, state: State) -> int:
    """What the transfers that move want of the links of one of them, at least SHARE."""
    out = into = 0
    for i in range(begin, end):
        other = running[i]
        if gpu.ctas[other] >= 0 and state.start_ns[other] >= 0:
            share = gpu.link[gpu.cost[other]]
            out += share if gpu.out_link[other] == gpu.out_link[op] else 0
            into += share if gpu.in_link[other] == gpu.in_link[op] else 0
    crowd = SHARE
    if gpu.out_link[op] >= 0:
        crowd = max(crowd, out)
    if gpu.in_link[op] >= 0:
        crowd = max(crowd, into)
    return crowd


@usable_in_compiled
def _transfer_rate(key: int, ctas: int, placed: int, delay: int, crowd: int, gpu: Gpu) -> int:
    """Rate of a transfer of cost key ``key`` with ``placed`` of its CTAs on SMs, while transfers
    want ``crowd`` of its links."""
    rounds = 1
    if 0 < placed < ctas:
        rounds = (ctas + placed - 1) // placed
    alone, fixed, chain = gpu.alone[key], gpu.fixed[key], gpu.chain[key]
    handshake = SHARE + (delay - SHARE) * gpu.machine[LATENCY_DELAY] // SHARE
    body = alone - fixed
    parts = max(body * crowd, body * SHARE + chain * (rounds * delay - SHARE))
    beside = fixed * rounds * handshake + parts
    if beside <= alone * SHARE:
        return FULL_RATE
    return max(alone * (SHARE * FULL_RATE) // beside, 1)  # int64 holds transfers of half a minute


# -- compute


@usable_in_compiled
def _next_to(begin: int, end: int, running: Ints, chosen: int, gpu: Gpu, state: State) -> int:
    """The compute op that goes first of all but the chosen one, or -1."""
    found = -1
    for i in range(begin, end):
        op = running[i]
        if i == chosen or gpu.ctas[op] >= 0:
            continue
        if found < 0 or _goes_first(op, running[found], state, gpu):
            found = i
    return found


@usable_in_compiled
def _both(op: int, other: int, gpu: Gpu) -> tuple[int, int]:
    """What ``other`` gets beside ``op``: half of the memory that both want, and what fits into the
    rest; shares of its rate."""
    first, second = gpu.memory[gpu.cost[op]], gpu.memory[gpu.cost[other]]
    return min(first, second) // 2, abs(first - second) * gpu.machine[TOGETHER] // SHARE


@usable_in_compiled
def _compute_rate(
    op: int, kernel: int, left: int, until: int, held: int, burden: int, gpu: Gpu, state: State
) -> int:
    """Rate of an op while traffic goes on as it does now: that of its kernel where it is looked at
    again before that ends (``until``), else the mean over what is left."""
    sms = max(min(gpu.machine[COMPUTE_SMS], gpu.machine[SMS] - held), 1)
    if sms == gpu.machine[SMS] and burden == 0:
        return FULL_RATE
    after = _after(kernel, op, gpu)
    part = left - after
    is_placed = part <= gpu.tail[kernel] + FULL_RATE and _has_places(kernel, op, held, gpu, state)
    slowdown = _slowdown(kernel, is_placed, sms, burden, gpu, state)
    if until >= after:
        return max(FULL_RATE * SHARE // slowdown, 1)
    time = part // SHARE * slowdown
    for k in range(kernel + 1, gpu.begin[gpu.cost[op] + 1]):
        part = gpu.end[k] - gpu.end[k - 1]
        time += part // SHARE * _slowdown(k, False, sms, burden, gpu, state)
    return max(min(FULL_RATE * (left >> 8) // max(time >> 8, 1), FULL_RATE), 1)  # no overflow


@usable_in_compiled
def _has_places(kernel: int, op: int, held: int, gpu: Gpu, state: State) -> bool:
    """Whether all CTAs of a kernel in its tail have SMs, beside what is held."""
    if gpu.idle[kernel] < 0:
        return True
    if held > gpu.idle[kernel]:
        return False
    # clusters need more than SMs that are idle now: had they enough when they began?
    missing = gpu.machine[SMS] - state.spread[op]
    return gpu.most[kernel] == gpu.machine[SMS] or missing <= gpu.most[kernel] - gpu.used[kernel]


@usable_in_compiled
def _slowdown(kernel: int, is_placed: bool, sms: int, burden: int, gpu: Gpu, state: State) -> int:
    """Time of a kernel on ``sms`` SMs over its time alone; its CTAs may all be placed already."""
    like = gpu.like[kernel]
    question = ((2 * like + is_placed) * (gpu.machine[SMS] + 1) + sms) * SHARE + burden
    slot = 2 * ((97 * like + 31 * sms + burden) % KNOWN)
    if state.known[slot] != question:
        waves = _more_waves(kernel, gpu.machine[COMPUTE_SMS] if is_placed else sms, gpu)
        state.known[slot] = question
        state.known[slot + 1] = _slowdown_in(waves, kernel, sms, burden, gpu)
    return state.known[slot + 1]


@usable_in_compiled
def _slowdown_in(waves: int, kernel: int, sms: int, burden: int, gpu: Gpu) -> int:
    """The same where it takes ``waves`` as many waves."""
    bound = gpu.bound[kernel]
    by_sm = waves * (SHARE + gpu.machine[COMPUTE_DELAY] * burden // SHARE) // SHARE
    share = max(SHARE * sms // gpu.machine[SMS], gpu.machine[LEAST_LIFE])
    by_memory = max(waves * share // SHARE, SHARE) * SHARE // (SHARE - burden)
    return max(((SHARE - bound) * by_sm + bound * by_memory) // SHARE, SHARE)


@usable_in_compiled
def _more_waves(kernel: int, sms: int, gpu: Gpu) -> int:
    """Waves of a kernel on ``sms`` SMs over waves on all of them."""
    if sms == gpu.machine[SMS]:
        return SHARE
    all_sms, count = gpu.most[kernel], gpu.units[kernel]
    most = min(all_sms, gpu.machine[COMPUTE_SMS])  # a green context's SMs make whole clusters
    sms = max(most - (gpu.machine[COMPUTE_SMS] - sms), 1)  # each that is held is one of those
    if gpu.fluid[kernel]:
        return SHARE + gpu.fluid[kernel] * (all_sms - sms) // sms
    usual, fit = gpu.usual[kernel], gpu.fit[kernel]
    if usual < fit and count <= sms * fit:  # they crowd together instead
        each = (count + sms - 1) // sms
        return max(SHARE + gpu.machine[CROWDING] * (each - usual) // usual, SHARE)
    late = max(gpu.own[kernel] - usual * sms, 0)
    waves = waves_of(count - late, usual * sms, gpu.lone[kernel])
    if gpu.life[kernel] and not gpu.loose[kernel]:  # fewer CTAs at a time wait for the same memory
        full = (count - 1) // (usual * sms)
        waves -= full * (SHARE - gpu.lone[kernel]) * (all_sms - sms) // all_sms
    if late:
        waves += gpu.lone[kernel]
    if all_sms - sms <= gpu.idle[kernel] - (gpu.machine[SMS] - most):  # the last CTAs come late
        waves -= gpu.less[kernel] * gpu.lone[kernel] // SHARE
    return max(SHARE * waves // gpu.waves[kernel], SHARE)


@usable_in_compiled
def waves_of(count: int, at_once: int, lone: int) -> int:
    """Time of ``count`` CTAs, of which ``at_once`` run at a time, in lives of a CTA; times SHARE.

    Those of a last wave that is not full live shorter, down to ``lone / SHARE``: what they waited
    for the memory that the others used.
    """
    full = (count - 1) // at_once
    rest = count - full * at_once
    return full * SHARE + lone + (SHARE - lone) * rest // at_once
