"""Timing that all kernel benchmarks share: cold L2, launches hidden, medians."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_FLUSH_BYTES = 256 * 2**20


class Timer:
    """Times callables on the current CUDA device.

    Before every timed call the L2 cache is filled by *reading* a large buffer: writing one would
    leave dirty lines whose write-back is charged to the kernel. The host runs ahead of the device,
    which a GPU sleep holds back, so that launches cost nothing.
    """

    def __init__(self) -> None:
        self._flush = torch.ones(_FLUSH_BYTES // 4, device="cuda")
        self._cycles = 20_000_000

    def us(self, call: Callable[[], object], repeats: int = 15, warmups: int = 3) -> float:
        """Median microseconds of ``call``."""
        for _ in range(warmups):
            call()
        torch.cuda.synchronize()
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        torch.cuda._sleep(self._cycles)
        for start, end in pairs:
            self._flush.sum()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3

    def copy_bytes_per_second(self, size_bytes: int = 2**30) -> float:
        """Bytes read plus bytes written per second of a device-to-device copy."""
        source = torch.ones(size_bytes // 4, device="cuda")
        target = torch.empty_like(source)
        return 2 * size_bytes / (self.us(lambda: target.copy_(source)) * 1e-6)
