"""Starts the processes of a run, and ends all of them when one fails.

A process that fails cannot tell its peers through NCCL or gloo: they wait for its messages, on the
GPU for ever. So each process watches a key-value store from a thread of its own: it writes a beat
and reads whether somebody has failed or fallen silent. If so it prints who and why, and ends its
process, whatever its main thread waits for.

:func:`launch` starts all processes of one machine. Where something else started them (torchrun),
:func:`join` alone does the rest.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import Store, TCPStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POLL_S = 0.25
SILENCE_S = 60.0  # a process may hold the interpreter's lock for long while it compiles
_GRACE_S = 10.0  # between telling processes to end and killing them
_FAILED = "mhcplan/failed"
FAILED_EXIT_CODE = 3
# What GPU processes need before CUDA starts; what is set already stays.
_ENVIRONMENT = {
    # a queue for every stream: with fewer, one that waits for a peer holds up another's kernels.
    # A plan has CUDA's own 8 unless it says otherwise, for it knows its streams only: here each
    # communication stream is two, NCCL's and the one in front of it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # as the profile's allocator margin was measured
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # captured transfers then run as issued ones do, and as the profile's were measured: NCCL would
    # register the buffers of a graph and copy less
    "NCCL_GRAPH_REGISTER": "0",
}


class ProcessFailed(RuntimeError):
    """A process of the run failed; the message has its number and traceback."""


class Watch(threading.Thread):
    """Ends this process when another one fails, or is silent for ``silence_s``."""

    def __init__(
        self, store: Store, process: int, world: int, silence_s: float = SILENCE_S
    ) -> None:
        """``store``: a connection that nothing else uses."""
        super().__init__(name="watch", daemon=True)
        self._store, self._process, self._world = store, process, world
        self._silence_s = silence_s
        self._done = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}

    def run(self) -> None:
        """Beat and look until :meth:`stop`."""
        beat = 0
        while not self._done.wait(POLL_S):
            beat += 1
            try:
                self._store.set(f"mhcplan/beat/{self._process}", str(beat))
                reason = self._reason()
            except (RuntimeError, dist.DistError) as error:
                reason = f"the store does not answer: {error}"
            if reason and not self._done.is_set():
                print(f"process {self._process} ends: {reason}", file=sys.stderr, flush=True)
                os._exit(FAILED_EXIT_CODE)

    def fail(self, reason: str) -> None:
        """Tell the others why this process ends; the first to fail is the one they hear of."""
        self.stop()
        self._store.compare_set(_FAILED, "", reason)

    def stop(self) -> None:
        """Stop watching: this process has done its part."""
        self._done.set()
        self.join()
        self._store.set(f"mhcplan/beat/{self._process}", "done")

    def _reason(self) -> str:
        if self._store.check([_FAILED]):
            return self._store.get(_FAILED).decode()
        now = time.monotonic()
        for other in range(self._world):
            key = f"mhcplan/beat/{other}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            last, since = self._seen.get(other, (None, now))
            if beat != last:
                self._seen[other] = beat, now
            elif beat != b"done" and now - since > self._silence_s:
                return f"process {other} is silent for {self._silence_s:.0f} s"
        return ""


@contextmanager
def join(
    process: int, world: int, host: str, port: int, device: torch.device, timeout_s: float = 120.0
) -> Iterator[None]:
    """Be process ``process`` of a run while the block lasts.

    Args:
        process: this one's number; ``world``: how many there are.
        host: where the store listens; ``port``: on what.
        device: decides the backend, NCCL or gloo.
        timeout_s: for the store, and for transfers that nobody answers.
    """

    def connect() -> TCPStore:
        timeout = timedelta(seconds=timeout_s)
        return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)

    if device.type == "cuda":
        torch.cuda.set_device(device)
    watch = Watch(connect(), process, world)
    watch.start()
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=connect(), rank=process,
            world_size=world, timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
        yield
        dist.barrier()
        watch.stop()
        dist.destroy_process_group()
    except BaseException:
        reason = f"process {process} failed:\n{traceback.format_exc()}"
        print(reason, file=sys.stderr, flush=True)
        try:
            watch.fail(reason)  # raises where the store is gone, as its process is
        finally:
            # tearing groups down would wait for peers that are ending as well
            os._exit(FAILED_EXIT_CODE)


def launch(
    entry: Callable[..., None],
    world: int,
    *args: object,
    device: str = "cpu",
    timeout_s: float = 120.0,
) -> None:
    """Run ``entry(process, world, *args)`` in ``world`` processes of this machine.

    Args:
        entry: importable by name; runs with the default process group open.
        world: number of processes; with ``device`` cuda, process i takes GPU i.
        args: passed on; must pickle.
        device: ``cpu`` or ``cuda``.
        timeout_s: see :func:`join`.

    Raises:
        ProcessFailed: a process failed or died. All have ended by then.
    """
    if device == "cuda":
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    processes = [
        context.Process(
            target=_child, args=(entry, i, world, store.port, device, timeout_s, args), daemon=True
        )
        for i in range(world)
    ]
    for process in processes:
        process.start()
    try:
        _supervise(processes, store)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _child(
    entry: Callable[..., None],
    process: int,
    world: int,
    port: int,
    device: str,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    where = torch.device("cuda", process) if device == "cuda" else torch.device("cpu")
    with join(process, world, "127.0.0.1", port, where, timeout_s):
        entry(process, world, *args)


def _supervise(processes: list[Any], store: TCPStore) -> None:
    """Wait until all have ended; raises ProcessFailed, after a grace for the others to end."""
    while any(p.is_alive() for p in processes):
        dead = [i for i, p in enumerate(processes) if p.exitcode not in (None, 0)]
        if dead:
            store.compare_set(_FAILED, "", f"processes {dead} ended")
            until = time.monotonic() + _GRACE_S
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
            break
        time.sleep(POLL_S / 5)
    codes = {i: p.exitcode for i, p in enumerate(processes)}
    failed = [i for i, code in codes.items() if code]
    if failed:
        # one that died without a word is the cause: others may only have lost their connection
        silent = [i for i in failed if codes[i] != FAILED_EXIT_CODE]
        words = [f"process {i} {_how_it_ended(codes[i])}" for i in silent]
        if store.check([_FAILED]):
            words.append(store.get(_FAILED).decode())
        raise ProcessFailed("\n".join(words) or f"processes {failed} ended, see what they printed")


def _how_it_ended(code: int) -> str:
    """An exit code in words: a negative one is the signal that killed the process."""
    if code >= 0:
        return f"ended with exit code {code}"
    why = ": the machine ran out of memory, or somebody ended it" * (-code == signal.SIGKILL)
    return f"was killed by {signal.Signals(-code).name}{why}"
