"""Timing of calls on a stream: hot, launches hidden, inputs cold where they would be.

On a GPU a *burst* is a run of back-to-back calls between two events; its length is such that the
events cost little. Bursts are enqueued behind matrix products that keep the chip at its working
temperature and power for longer than the host needs to enqueue them, so that a burst takes what the
stream takes and not what Python takes. Trains of bursts are short, and longer ops rest in between:
after some 20 ms of matrix products on end a chip is at its power limit and lowers its clock, which
is the step's doing (:mod:`mhcplan.profiles.power`) and not the op's. On a CPU a call is timed by
the clock; that serves tests.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BURST_NS = 150_000  # an event pair costs about 1 us of stream time
_MAX_QUEUED = 600  # kernels: the driver's queue holds 1024, and a full queue stops the host
_MIN_SAMPLES = 8
_MAX_SAMPLES = 60
_TRAIN_NS = 10_000_000  # H100: products of 13 x 1.6 ms ran at full clock, of 13 x 2.8 ms 9 % slower
_FILLER_SIZE = 8192
_REHEAT_SECONDS = 0.08  # at most; a chip that rested for less is warm again after twice its rest
COPY_SHARE = 0.55


@dataclass(frozen=True)
class Sample:
    """Median times of one call in ns; spread as in :mod:`mhcplan.profiles.schema`."""

    duration_ns: int
    spread_percent: float
    samples: int
    host_ns: int


def spread_percent(values: Sequence[float]) -> float:
    """Half the distance between the 10th and the 90th percentile, as a share of the median."""
    if len(values) < 2:
        return 0.0
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return round(50 * (deciles[8] - deciles[0]) / statistics.median(values), 2)


def summarise(durations: Sequence[float], host: Sequence[float]) -> Sample:
    """Median, spread and count of per-call times in ns."""
    return Sample(
        duration_ns=max(1, round(statistics.median(durations))),
        spread_percent=spread_percent(durations),
        samples=len(durations),
        host_ns=round(statistics.median(host)),
    )


class Plan(NamedTuple):
    """How bursts are run: calls of a burst, bursts to time, bursts of a train, the rest before one.

    The first burst of a train is not timed: it pays for the filler's state.
    """

    length: int
    bursts: int
    train: int
    rest_ns: float


def plan_bursts(call_ns: float, budget_ns: int, kernels: int) -> Plan:
    """For calls of about ``call_ns`` that launch so many kernels; ``budget_ns`` of stream time."""
    length = max(1, min(round(_BURST_NS / call_ns), _MAX_QUEUED // (4 * kernels)))
    burst_ns = length * call_ns
    bursts = max(_MIN_SAMPLES, min(_MAX_SAMPLES, round(budget_ns / burst_ns)))
    train = min(_MAX_QUEUED // (length * kernels), 1 + int(_TRAIN_NS / burst_ns), bursts + 1)
    train = max(2, train)
    rest_ns = train * burst_ns if bursts * burst_ns > _TRAIN_NS else 0.0
    return Plan(length, bursts, train, rest_ns)


class HostTimer:
    """Times calls by the clock; for devices without events."""

    def heat(self, seconds: float = 0.0) -> None:
        """Nothing to heat."""

    def measure(self, calls: Sequence[Callable[[], object]], budget_ns: int, **_: int) -> Sample:
        """Run the calls in turn for about ``budget_ns``, three times at least."""
        times: list[float] = []
        end = time.perf_counter_ns() + budget_ns
        while len(times) < 3 or (time.perf_counter_ns() < end and len(times) < _MAX_SAMPLES):
            call = calls[len(times) % len(calls)]
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
        return summarise(times, times)


class GpuTimer:
    """Times calls on the current stream of a CUDA device; see the module's docstring.

    What keeps the chip hot is a matrix product and a copy in turn, so mixed that an H100 keeps its
    full clock (a profile's provenance has the clock under it). It takes tens of milliseconds to get
    there, so a measurement starts with up to ``_REHEAT_SECONDS`` of it.
    """

    def __init__(self, device: torch.device, copy_share: float = COPY_SHARE) -> None:
        """Allocate the load's operands and measure what one round of it takes.

        ``copy_share`` is the share of the load's time that goes to copies.
        """
        self.device = device
        size = (_FILLER_SIZE, _FILLER_SIZE)
        self._a, self._b, self._c = (
            torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(3)
        )
        self._from, self._to = self._c[:0], self._c[:0]
        self._filler_ns = 1_500_000.0
        self._busy_until = 0.0
        self._filler_ns = self._time_filler()
        # a gigabyte (512 MiB read and written) takes about 0.36 ms
        copied = int(copy_share / (1 - copy_share) * self._filler_ns / 360_000 * 2**28)
        self._from = torch.empty(copied, dtype=torch.bfloat16, device=device)
        self._to = torch.empty_like(self._from)
        self._filler_ns = self._time_filler()

    def fill(self, duration_ns: float) -> None:
        """Enqueue about ``duration_ns`` of load and return."""
        for _ in range(max(1, round(duration_ns / self._filler_ns))):
            torch.mm(self._a, self._b, out=self._c)
            if self._from.numel():
                self._to.copy_(self._from)

    def _time_filler(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.fill(20_000_000)
        start.record()
        self.fill(20 * self._filler_ns)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e6 / 20

    def heat(self, seconds: float = 1.0) -> None:
        """Load the chip for ``seconds`` without a pause."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.fill(20_000_000)
            torch.cuda.synchronize(self.device)

    def measure(
        self, calls: Sequence[Callable[[], object]], budget_ns: int, *, kernels: int = 4
    ) -> Sample:
        """Time the calls, run in turn, in bursts; about ``budget_ns`` of stream time.

        Args:
            calls: equal calls on different data; what each returns is kept until its next turn, so
                that outputs get memory of their own.
            budget_ns: stream time to spend.
            kernels: kernels that one call launches at most (bounds the queue).
        """
        kept: list[object] = [None] * len(calls)
        for i, call in enumerate(calls):  # compile, load and allocate
            kept[i] = call()
        torch.cuda.synchronize(self.device)
        self.heat(min(_REHEAT_SECONDS, 2 * (time.perf_counter() - self._busy_until)))
        guess, host_guess = self._probe(calls, kept)
        plan = plan_bursts(guess, budget_ns, kernels)
        durations: list[float] = []
        host: list[int] = []
        while len(durations) < plan.bursts:
            time.sleep(plan.rest_ns / 1e9)
            count = min(plan.train, plan.bursts - len(durations) + 1)
            found = self._batch(calls, kept, count, plan.length, host_guess, host)
            if found is None and host_guess < 1e8:
                host_guess *= 2  # the stream ran dry: hide more of the host's time
            durations += found or []
        self._busy_until = time.perf_counter()
        return summarise(durations, host)

    def _probe(
        self, calls: Sequence[Callable[[], object]], kept: list[object]
    ) -> tuple[float, float]:
        """Rough stream time and host time of a call in ns."""
        host: list[int] = []
        times = None
        allowance = 300_000.0
        while times is None:
            times = self._batch(calls, kept, 4, 1, allowance, host)
            allowance *= 2
        return max(1_000.0, min(times)), statistics.median(host)

    def _batch(
        self, calls: Sequence[Callable[[], object]], kept: list[object], count: int, length: int,
        host_ns: float, host: list[int],
    ) -> list[float] | None:  # fmt: skip
        """Per-call times of ``count`` bursts but the first, which pays for the filler's state.

        None if the load in front of them ended before all of them were enqueued.
        """
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        self.fill(1.5 * count * (length * host_ns + 10_000) + 300_000)
        turn = 0
        events[0].record()
        for event in events[1:]:
            for _ in range(length):
                start = time.perf_counter_ns()
                kept[turn] = calls[turn]()
                host.append(time.perf_counter_ns() - start)
                turn = (turn + 1) % len(calls)
            event.record()
        dry = events[0].query()
        events[-1].synchronize()
        if dry:
            return None
        spans = [a.elapsed_time(b) for a, b in itertools.pairwise(events[1:])]
        return [1e6 * span / length for span in spans]


def make_timer(device: torch.device) -> HostTimer | GpuTimer:
    """The timer for a device."""
    return GpuTimer(device) if device.type == "cuda" else HostTimer()
