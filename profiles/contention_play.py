"""Playing the rules of :mod:`mhcplan.profiles.contention` on two ranks: the price of a pair.

Both streams are kept full until each has done a few ops; the second rank lags and is a little
slower, as real ones are, so that no special phase decides. A few hundred events, some milliseconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mhcplan.profiles.contention import (
    Kernel,
    Message,
    Parameters,
    Slowdowns,
    ends_of,
    hbm_share,
    message_ns,
    units,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST_OPS, _LEAST_MESSAGES = 6, 10
_STARTS = (0.23, 0.61)  # the second rank's lag, as a share of an op: no phase is special
_SKEW = 1.01  # the second rank is that much slower: no two GPUs are equal
_FEW = 3
_MANY_EVENTS, _MOST_EVENTS = 12_000, 400_000
_NEVER = float("inf")
_EPSILON = 1e-6  # ns


class _Rank:
    """The compute stream of a rank: CTAs of its running kernel in cohorts that started together."""

    def __init__(
        self, kernels: Sequence[Kernel], gap_ns: float, parameters: Parameters, start: float,
        speed: float,
    ) -> None:  # fmt: skip
        self.kernels, self.gap, self.p, self.speed = kernels, gap_ns, parameters, speed
        self.begin_at = start
        self.index = -1
        self.pending = 0
        self.held = 0  # SMs of communication CTAs
        self.used = 0  # SMs of compute CTAs
        self.cohorts: list[tuple[float, int]] = []  # (end, SMs)
        self.traffic_share = 0.0
        self.ops: list[float] = []
        self.scale = [1.0] * len(kernels)  # of lives, so that CTAs out of step add up to a kernel

    def calibrate(self) -> None:
        """Play each kernel alone that has CTAs of unequal life, and scale them to its duration."""
        for index, kernel in enumerate(self.kernels):
            if kernel.tail_share and not kernel.persistent:
                trial = _Rank([kernel], 1.0, self.p, 0.0, 1.0)
                now = 0.0
                while not trial.ops or trial.cohorts:
                    trial.advance(now)
                    trial.place(now)
                    if trial.cohorts:
                        now = trial.next_event
                        trial.advance(now)
                        trial.place(now)
                self.scale[index] = kernel.duration_ns / now

    @property
    def free(self) -> int:
        return self.p.num_sms - self.held - self.used

    @property
    def share(self) -> float:
        return hbm_share(self.kernels[self.index], self.p) if self.cohorts else 0.0

    @property
    def next_event(self) -> float:
        return min((end for end, _ in self.cohorts), default=self.begin_at)

    @property
    def drain_ns(self) -> float:
        """Time until a whole SM is free where an urgent CTA has asked for it."""
        kernel = self.kernels[self.index]
        usual = min(kernel.ctas_per_sm, -(-kernel.ctas // self.p.num_sms))
        if usual == 1 or not self.cohorts:
            return 0.0
        waves = -(-units(kernel) // (usual * self.p.num_sms))
        return self.p.drain_lives * kernel.duration_ns / waves

    def advance(self, now: float) -> None:
        """Retire what ends now, begin what begins now."""
        if self.cohorts:
            left = [c for c in self.cohorts if c[0] > now + _EPSILON]
            self.used = sum(sms for _, sms in left)
            self.cohorts = left
            if not left and not self.pending:
                self.begin_at = now + self.gap
        elif now >= self.begin_at - _EPSILON:
            self.begin_at = _NEVER
            self.index = (self.index + 1) % len(self.kernels)
            kernel = self.kernels[self.index]
            self.pending = units(kernel)
            if self.index == 0:
                self.ops.append(now)

    def place(self, now: float) -> None:
        """Give the free SMs to CTAs that wait for one."""
        if not self.pending or self.free <= 0:
            return
        kernel = self.kernels[self.index]
        count = min(self.pending, self.free * kernel.ctas_per_sm)
        sms = min(self.free, count)
        self.pending -= count
        self.used += sms
        life = self._life(kernel, -(-count // sms))
        self.cohorts += [(now + at, part) for at, part in ends_of(kernel, life, sms, self.pending)]

    def _life(self, kernel: Kernel, each: int) -> float:
        """Life of CTAs of which ``each`` share an SM. Compute-bound ones share the SM's rate,
        memory-bound ones the chip's bandwidth, so that SMs they lack cost them nothing."""
        p = self.p
        usual = min(kernel.ctas_per_sm, -(-kernel.ctas // p.num_sms))
        waves = -(-units(kernel) // (usual * p.num_sms))
        bound = (hbm_share(kernel, p) - p.bound_from) / (1 - p.bound_from)
        bound = min(1.0, max(0.0, 1.5 * bound))
        by_sm = max(1 + p.crowding * (each / usual - 1), 0.5)
        by_sm *= 1 + p.compute_delay * self.traffic_share
        by_memory = max(self.used / p.num_sms, p.least_life) / (1 - min(0.9, self.traffic_share))
        alone = kernel.duration_ns / waves * self.speed * self.scale[self.index]
        return alone * ((1 - bound) * by_sm + bound * by_memory)


class _Link:
    """The stream of messages: CTAs wait for SMs on both ranks, move their share, and leave."""

    def __init__(self, message: Message, parameters: Parameters) -> None:
        self.message, self.p = message, parameters
        self.size = max(1, message.ctas)
        self.ready = 0.0
        self.done: list[tuple[float, float, float]] = []  # (ready, first CTA, end)
        self._renew()

    def _renew(self) -> None:
        self.first = [_NEVER, _NEVER]
        self.placed = [0, 0]
        self.moved = 0
        self.batches: list[list[float]] = []  # [CTAs, share that is left]

    def rate(self, ranks: Sequence[_Rank]) -> float:
        """Share of a CTA's part that it moves in a ns."""
        active = round(sum(count for count, _ in self.batches)) if self.message.ctas else 0
        return 1 / message_ns(self.message, max(rank.share for rank in ranks), self.p, active)

    def next_event(self, now: float, ranks: Sequence[_Rank]) -> float:
        if self.batches:
            return now + self.batches[0][1] / self.rate(ranks)
        return self.ready if self.ready > now + _EPSILON else _NEVER

    def advance(self, ranks: Sequence[_Rank], before: float, now: float) -> None:
        """Move on; CTAs that are done leave, and with the last of them the message."""
        if not self.batches:
            return
        step = (now - before) * self.rate(ranks)
        for batch in self.batches:
            batch[1] -= step
        while self.batches and self.batches[0][1] <= 1e-9:
            count = round(self.batches.pop(0)[0])
            self.moved += count
            for rank in ranks:
                rank.held -= min(count, rank.held)
        if self.moved == self.size:
            self.done.append((self.ready, sum(self.first) / 2, now))
            self.ready = now + self.message.gap_ns
            self._renew()
        self._burden(ranks)

    def _burden(self, ranks: Sequence[_Rank]) -> None:
        active = sum(count for count, _ in self.batches) / self.size
        for rank, moved in zip(ranks, self.message.hbm_bytes, strict=True):
            rate = moved * self.rate(ranks) / self.p.hbm_bytes_per_ns
            rank.traffic_share = min(0.9, active * rate)

    def admit(self, ranks: Sequence[_Rank], now: float, *, ahead: bool) -> None:
        """Place what may be placed; ``ahead``: before the kernel's own CTAs that wait."""
        if now < self.ready - _EPSILON:
            return
        for i, rank in enumerate(ranks):
            stays = bool(rank.cohorts) and rank.kernels[rank.index].persistent
            if self.message.ctas and rank.pending and (not ahead or stays):
                continue
            if self.message.ctas and rank.pending and now < self.ready + rank.drain_ns:
                continue
            take = self.size - self.placed[i]
            if self.message.ctas:
                take = min(take, rank.free)
                rank.held += take
            if take:
                self.first[i] = min(self.first[i], now)
                self.placed[i] += take
        fresh = min(self.placed) - self.moved - round(sum(count for count, _ in self.batches))
        if fresh > 0:
            self.batches.append([fresh, 1.0])
            self._burden(ranks)


def _play(ranks: Sequence[_Rank], link: _Link) -> None:
    """Let both streams run until each has done enough, or for long and each has done a little.

    Raises:
        RuntimeError: neither happens.
    """
    now = 0.0
    for count in range(_MOST_EVENTS):
        busy = [rank for rank in ranks if rank.begin_at < _NEVER or rank.cohorts or rank.pending]
        after = min([link.next_event(now, ranks), *(rank.next_event for rank in ranks)])
        if after == _NEVER:
            raise RuntimeError("the model came to a stop: SMs are held that nothing will free")
        link.advance(ranks, now, after)
        now = after
        for rank in ranks:
            rank.advance(now)
        # a message that waited when a kernel began is older than it; else the kernel's CTAs are
        link.admit(ranks, now, ahead=link.message.high_priority)
        for rank in ranks:
            rank.place(now)
        link.admit(ranks, now, ahead=False)
        ops = min(len(rank.ops) for rank in busy)
        if len(link.done) > _LEAST_MESSAGES and ops > _LEAST_OPS:
            return
        if count > _MANY_EVENTS and len(link.done) > _FEW and ops > _FEW:
            return
    raise RuntimeError(f"the model saw {len(link.done)} messages in {_MOST_EVENTS} events")


def _mean_step(times: Sequence[float]) -> float:
    return (times[-1] - times[1]) / (len(times) - 2)


def overlap(
    kernels: Sequence[Kernel],
    message: Message,
    parameters: Parameters,
    op_ns: float | None = None,
) -> Slowdowns:
    """Mean slowdowns of an op and of traffic that run beside each other all the time.

    Args:
        kernels: of the op, in order; it follows itself on the stream.
        message: the traffic; a message follows the one before.
        parameters: of the machine.
        op_ns: period of the op alone, with the gaps between kernels; default: none.

    Raises:
        ValueError: there is no kernel, or a message that takes more SMs than there are.
        RuntimeError: messages take so much longer than CTAs live that playing them is hopeless.
    """
    if not kernels:
        raise ValueError("kernels: an op needs at least one kernel")
    if not 0 <= message.ctas <= parameters.num_sms:
        raise ValueError(f"ctas={message.ctas} must be 0 .. {parameters.num_sms}, the SMs")
    total = sum(kernel.duration_ns for kernel in kernels)
    alone = total if op_ns is None else op_ns
    gap = max(1.0, (alone - total) / len(kernels))
    if message.eager and message.both_busy:
        ends = [
            replace(message, hbm_bytes=bytes_, both_busy=False)
            for bytes_ in (message.hbm_bytes, message.hbm_bytes[::-1])
        ]
        one, two = (overlap(kernels, end, parameters, op_ns) for end in ends)
        return Slowdowns(
            (one.compute[0], two.compute[0]), max(one.traffic, two.traffic),
            max(one.queue_ns, two.queue_ns), max(one.kernel_ns, two.kernel_ns),
        )  # fmt: skip
    found = [_overlap_from(kernels, message, parameters, gap, alone, lag) for lag in _STARTS]
    mean = [sum(values) / len(found) for values in zip(*found, strict=True)]
    return Slowdowns((mean[0], mean[1]), mean[2], mean[3], mean[4])


def _overlap_from(
    kernels: Sequence[Kernel], message: Message, parameters: Parameters, gap: float, alone: float,
    lag: float,
) -> tuple[float, float, float, float, float]:  # fmt: skip
    second = lag * alone if message.both_busy else _NEVER
    ranks = [
        _Rank(kernels, gap, parameters, 0.0, 1.0),
        _Rank(kernels, gap, parameters, second, _SKEW),
    ]
    for rank in ranks:
        rank.calibrate()
    link = _Link(message, parameters)
    _play(ranks, link)
    ops = [
        _mean_step(r.ops) / (alone * s) if r.ops else 1.0  # a rank that only sends or receives
        for r, s in zip(ranks, (1.0, _SKEW), strict=True)
    ]
    messages = link.done[1:]
    ends = [end for _, _, end in link.done]
    queue = sum(first - ready for ready, first, _ in messages) / len(messages) + message.gap_ns
    moving = sum(end - first for _, first, end in messages) / len(messages)
    return ops[0], ops[1], _mean_step(ends) / (message.alone_ns + message.gap_ns), queue, moving
