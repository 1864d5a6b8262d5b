"""Streams and events of one rank: CUDA's, or their stand-in on a CPU.

Both have one contract. ``enter(stream, events)`` makes ``stream`` current once it has waited for
the events; what is called next runs on it; ``transferred(works)`` orders the stream after
transfers that were just started on it; ``leave(event)`` records an event behind all of that.

On a GPU a communication stream of the Program is a process group's internal stream. The group puts
a transfer behind whatever the *current* stream holds, so each has a stream of ours in front of it,
which waits for the op's events, is current while the transfer is called and then waits for it: an
event recorded there is the transfer's handle.

On a CPU an op runs when it is called, and a transfer runs in the background until an op waits for
its event. Nothing else overlaps, but who waits for what is the same.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from mhcplan.sim.program import NORMAL_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mhcplan.sim.program import Stream

MAX_STREAMS_PER_PRIORITY = 32  # torch's pool; the next one would be the first again


class StreamPool:
    """The CUDA streams of a process: all its Programs and captures take the same ones.

    torch deals streams out of 32 of each priority, round and round, and process groups get theirs
    from there too. If every Program took new ones, one of them would soon be the stream that a
    process group runs on: a send then stands behind a receive that waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        """No stream is made yet, but the default process group will take one."""
        self.device = device
        self._made: dict[int, list[torch.cuda.Stream]] = {}
        self._of_groups = {NORMAL_PRIORITY: 1}

    def take(self, priorities: Sequence[int]) -> list[torch.cuda.Stream]:
        """A stream for each priority, different ones: the same for equal arguments.

        Raises:
            ValueError: torch has not as many streams of one priority.
        """
        taken: Counter[int] = Counter()
        found: list[torch.cuda.Stream] = []
        for priority in priorities:
            made = self._made.setdefault(priority, [])
            if taken[priority] == len(made):
                made.append(self._new(priority))
            found.append(made[taken[priority]])
            taken[priority] += 1
        return found

    def count_group(self, priority: int) -> None:
        """Note that a process group takes a stream.

        Raises:
            ValueError: torch has not as many streams of one priority.
        """
        self._of_groups[priority] = self._of_groups.get(priority, 0) + 1
        self._check(priority)

    def _new(self, priority: int) -> torch.cuda.Stream:
        self._check(priority, more=1)
        return torch.cuda.Stream(self.device, priority=priority)

    def _check(self, priority: int, more: int = 0) -> None:
        count = len(self._made.get(priority, ())) + self._of_groups.get(priority, 0) + more
        if count > MAX_STREAMS_PER_PRIORITY:
            raise ValueError(
                f"{count} streams of priority {priority}: torch has {MAX_STREAMS_PER_PRIORITY}"
            )


class CudaStreams:
    """CUDA streams and events. Index 0 is the compute stream."""

    def __init__(
        self,
        streams: Sequence[Stream],
        num_events: int,
        pool: StreamPool,
        compute_sms: int | None = None,
    ) -> None:
        """Make streams of the Program's priorities.

        Args:
            streams: of a rank, its compute stream first.
            num_events: that its ops record.
            device: where they are.
            compute_sms: SMs for streams that belong to no group, which then have no priority.

        Raises:
            ValueError: too many streams of one priority.
        """
        self.device = pool.device
        self.streams = pool.take([stream.priority for stream in streams])
        if compute_sms is not None:
            # torch destroys the context, and with it these streams, when nobody has it any more
            self._context = _capped_context(pool.device, compute_sms)
            for i, stream in enumerate(streams):
                if stream.group < 0:
                    self.streams[i] = self._context.Stream()
        self._events = [torch.cuda.Event() for _ in range(num_events)]
        self._current = self.streams[0]

    def enter(self, stream: int, events: Iterable[int]) -> None:
        """Make ``stream`` current and let it wait for ``events``."""
        chosen = self.streams[stream]
        if chosen is not self._current:
            torch.cuda.set_stream(chosen)
            self._current = chosen
        for event in events:
            chosen.wait_event(self._events[event])

    def transferred(self, works: Sequence[Any]) -> None:
        """Order the current stream after transfers; the host goes on."""
        for work in works:
            work.wait()

    def leave(self, event: int) -> None:
        """Record ``event`` on the current stream."""
        self._events[event].record(self._current)

    def host_wait(self) -> None:
        """Block the host until the current stream is done."""
        self._current.synchronize()

    def begin(self) -> None:
        """Start a step: the compute stream is current, behind all of the caller's stream."""
        caller = torch.cuda.current_stream(self.device)
        self.streams[0].wait_stream(caller)
        for stream in self.streams[1:]:
            stream.wait_stream(self.streams[0])
        torch.cuda.set_stream(self.streams[0])
        self._current, self._caller = self.streams[0], caller

    def join(self) -> None:
        """End a step: the compute stream waits for all, the caller's stream for it."""
        for stream in self.streams[1:]:
            self.streams[0].wait_stream(stream)
        self._caller.wait_stream(self.streams[0])
        torch.cuda.set_stream(self._caller)


def _capped_context(device: torch.device, sms: int) -> Any:  # noqa: ANN401 - torch's has no type
    """What makes streams whose kernels share ``sms`` SMs (CUDA's green contexts, torch >= 2.11)."""
    from torch.cuda.green_contexts import GreenContext

    return GreenContext.create(num_sms=sms, device_id=device.index)


class CpuStreams:
    """Ops run at once, transfers until somebody waits for them. Index 0 is the compute stream."""

    def __init__(self, streams: Sequence[Stream], num_events: int) -> None:
        """Nothing is running."""
        self.device = torch.device("cpu")
        self._running: list[list[_Once]] = [[] for _ in streams]
        self._of_event: list[list[_Once]] = [[] for _ in range(num_events)]
        self._current = 0

    def begin(self) -> None:
        """Start a step."""
        self._current = 0

    def enter(self, stream: int, events: Iterable[int]) -> None:
        """Wait for the transfers behind ``events``."""
        self._current = stream
        for event in events:
            _finish(self._of_event[event])

    def transferred(self, works: Sequence[Any]) -> None:
        """Note what is running on the current stream."""
        self._running[self._current] += [_Once(work) for work in works]

    def leave(self, event: int) -> None:
        """``event`` stands for what the current stream has running now."""
        running = self._running[self._current]
        running[:] = [once for once in running if once.work is not None]
        self._of_event[event] = list(running)

    def host_wait(self) -> None:
        """Finish what the current stream has running."""
        _finish(self._running[self._current])

    def join(self) -> None:
        """Finish everything."""
        for running in self._running:
            _finish(running)


class _Once:
    """A transfer that is waited for once: gloo's sends and receives never end a second wait."""

    def __init__(self, work: Any) -> None:  # noqa: ANN401 - torch's works have no common type
        self.work = work

    def wait(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work.wait()


def _finish(running: list[_Once]) -> None:
    for once in running:
        once.wait()
    running.clear()
