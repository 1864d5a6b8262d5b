"""Measuring transfers between the GPUs of one host: NCCL through torch.distributed.

One process a GPU. A transfer is timed as it runs on the process group's internal stream: a burst of
calls is enqueued back to back behind a sleep, between two events of that stream's waiters, so that
neither Python nor the peer's Python is in the figure. The slowest rank counts. Of messages between
pairs the first pair counts, while all others send as well, as in a pipeline. On a CPU (gloo) the
clock is used; that serves tests.

The processes are started here, one for each GPU of the host; or by torchrun, one on each of several
nodes, and then the network between them is measured.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
import torch.distributed as dist

from mhcplan.profiles.capture.ops import append_line
from mhcplan.profiles.capture.timing import spread_percent
from mhcplan.profiles.logs import read_log
from mhcplan.profiles.schema import Medium, Pattern, TransferTiming
from mhcplan.profiles.transfer_costs import REDUCTIONS, UNEVEN_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
# 1 KiB to 1 GiB in steps of 2; between them where messages of steps are; and closest where the
# library changes its protocol, so that a straight line from size to size is off by most
SIZES = tuple(
    sorted({
        *(1024 * 2**i for i in range(21)),
        *(3 * 2**i for i in range(19, 26)),
        *(eighths * 2**i for i in range(17, 20) for eighths in (10, 14)),
    })
)  # fmt: skip
# renamed after torch 2.11
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCING = ("all_reduce", "reduce_scatter")
_BURST_NS = 400_000
_SAMPLES = 15
_ROUNDS = 3  # at most, until enough bursts were enqueued in time
_TURNS = 5
_MAX_BURST = 40
_CYCLES_PER_NS = 2  # of the sleeping kernel; an SM runs at 2 GHz at most, so it never sleeps less
_SLOWER = 1.25


class Transfers:
    """The patterns on one rank, over buffers made once for the largest size."""

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        """Allocate; fp32 for patterns that reduce (as gradients are), bf16 for the others."""
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._send = torch.randn(max_bytes // 4, device=device)
        most = int(UNEVEN_SHARE * self._send.numel()) + self.size
        self._receive = torch.empty(most, device=device)

    def call(self, pattern: Pattern, num_bytes: int) -> Callable[[], Any]:
        """A call that enqueues one transfer of ``num_bytes`` and returns its handles."""
        dtype = torch.float32 if pattern in _REDUCING else torch.bfloat16
        count = num_bytes // dtype.itemsize
        count -= count % self.size
        send = self._send.view(dtype)[:count]
        receive = self._receive.view(dtype)[:count]
        if pattern == "all_to_all":
            return lambda: [dist.all_to_all_single(receive, send, async_op=True)]
        if pattern == "all_to_all_uneven":
            return self._uneven(send)
        if pattern in REDUCTIONS:
            call = reduction(pattern, send, receive, self.size)
            return lambda: [call()]
        return self._pairs(send, receive, both=pattern == "send_recv_both")

    def _uneven(self, send: torch.Tensor) -> Callable[[], Any]:
        """Every rank sends more to the first one than to the others."""
        parts = uneven_splits(send.numel(), self.size)
        gets = [parts[self.rank]] * self.size
        receive = self._receive.view(send.dtype)[: sum(gets)]
        return lambda: [dist.all_to_all_single(receive, send, gets, parts, async_op=True)]

    def _pairs(self, send: torch.Tensor, receive: torch.Tensor, *, both: bool) -> Callable[[], Any]:
        """Ranks 2k and 2k + 1 exchange, all pairs at once; in one direction the even one sends."""
        peer = self.rank ^ 1
        if peer >= self.size:
            return list
        sends = dist.P2POp(dist.isend, send, peer)
        receives = dist.P2POp(dist.irecv, receive, peer)
        parts = [sends, receives] if both else [receives if self.rank % 2 else sends]
        return lambda: dist.batch_isend_irecv(parts)


def reduction(
    pattern: str, send: torch.Tensor, receive: torch.Tensor, ranks: int, group: object = None
) -> Callable[[], Any]:
    """A call that enqueues one of ``REDUCTIONS`` over buffers of ``ranks`` parts; its handle."""
    part = send.numel() // ranks
    options: dict[str, Any] = {"group": group, "async_op": True}
    if pattern == "all_reduce":
        return lambda: dist.all_reduce(receive, **options)
    if pattern == "reduce_scatter":
        out = receive[:part]
        return lambda: _reduce_scatter(out, send, **options)
    mine = send[:part]
    return lambda: _all_gather(receive, mine, **options)


def uneven_splits(count: int, ranks: int) -> list[int]:
    """Elements of ``count`` for each rank: ``UNEVEN_SHARE`` even shares for the first one, what is
    left evenly for the others, the last one's part with the remainder.

    >>> uneven_splits(32, 2), uneven_splits(32, 4)
    ([24, 8], [12, 6, 6, 8])
    """
    first = int(UNEVEN_SHARE * count / ranks)
    other = (count - first) // (ranks - 1)
    return [first, *[other] * (ranks - 2), count - first - other * (ranks - 2)]


def _wait(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.wait()


def _time_gpu(
    call: Callable[[], Any], length: int, samples: int, hidden_ns: float
) -> tuple[list[float | None], list[int]]:
    """Per-call stream times of bursts and host times of calls, ns.

    A burst that was not enqueued within the ``hidden_ns`` that the stream sleeps counts as None.
    """
    durations: list[float | None] = []
    host: list[int] = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _wait(call())  # the peers meet here, so that the burst starts together
        torch.cuda._sleep(int(_CYCLES_PER_NS * hidden_ns))
        # the group's stream waits for the current one at each call: both queues fill meanwhile
        start.record()
        handles: list[Any] = []
        for _ in range(length):
            begin = time.perf_counter_ns()
            handles += call()
            host.append(time.perf_counter_ns() - begin)
        dry = start.query()
        _wait(handles)
        end.record()
        end.synchronize()
        durations.append(None if dry else start.elapsed_time(end) * 1e6 / length)
    return durations, host


def _time_host(call: Callable[[], Any], samples: int) -> tuple[list[float | None], list[int]]:
    times = []
    for _ in range(samples):
        dist.barrier()
        begin = time.perf_counter_ns()
        _wait(call())
        times.append(time.perf_counter_ns() - begin)
    return [float(t) for t in times], times


def _gather(mine: object) -> list[Any]:
    """What every rank passed, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _bursts(call: Callable[[], Any], gpu: bool, ranks: int) -> tuple[list[float], int]:
    """Times of bursts, each that of the slowest of the first ``ranks``; median host time; ns.

    Every rank makes the same calls, so all decide on what all saw. A burst counts if it was
    enqueued in time on every rank; where too few were, the streams sleep longer.
    """
    if not gpu:
        found = _gather(_time_host(call, 3))
        return [max(burst) for burst in zip(*(f[0] for f in found[:ranks]), strict=True)], round(
            max(statistics.median(f[1]) for f in found[:ranks])
        )
    probe = _gather(_time_gpu(call, 4, 3, 2_000_000))
    guess = max((d for f in probe for d in f[0] if d is not None), default=_BURST_NS)
    host_ns = max(statistics.median(f[1]) for f in probe)
    length = max(2, min(_MAX_BURST, round(_BURST_NS / guess)))
    hidden_ns = 2 * length * host_ns + 300_000
    good: list[float] = []
    host: list[float] = []
    for _ in range(_ROUNDS):
        found = _gather(_time_gpu(call, length, _SAMPLES, hidden_ns))
        together = zip(*(f[0] for f in found[:ranks]), strict=True)
        good += [max(burst) for burst in together if None not in burst]
        host.append(max(statistics.median(f[1]) for f in found[:ranks]))
        if len(good) >= _SAMPLES // 2:
            break
        hidden_ns *= 2
    return good, round(statistics.median(host))


def _measure(
    transfers: Transfers, pattern: Pattern, num_bytes: int, medium: Medium
) -> TransferTiming | None:
    """One row on rank 0, None elsewhere and where nothing could be timed; every rank calls it."""
    call = transfers.call(pattern, num_bytes)
    gpu = transfers.device.type == "cuda"
    for _ in range(3):
        _wait(call())
    if gpu:
        torch.cuda.synchronize()
    ranks = 2 if pattern.startswith("send") else transfers.size
    times, host_ns = _bursts(call, gpu, ranks)
    if transfers.rank or not times:
        return None
    return TransferTiming(
        source="measured", pattern=pattern, medium=medium, group_size=ranks,
        bytes=num_bytes, duration_ns=max(1, round(statistics.median(times))),
        spread_percent=spread_percent(times), samples=len(times), host_ns=host_ns,
    )  # fmt: skip


def _communicator_bytes(device: torch.device) -> int:
    """Device memory that the first collective and the first pair of messages take."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.mem_get_info(device)[0]
    small = Transfers(device, 4096)
    held = torch.cuda.memory_reserved(device)
    for pattern in PATTERNS:
        _wait(small.call(pattern, 4096)())
    torch.cuda.synchronize(device)
    grown = torch.cuda.memory_reserved(device) - held
    return max(0, before - torch.cuda.mem_get_info(device)[0] - grown)


class Launched(NamedTuple):
    """This process as torchrun started it, and what lies between it and the others."""

    rank: int
    world: int
    medium: Medium


def launched() -> Launched | None:
    """How torchrun started this process; None if it did not.

    Raises:
        ValueError: several processes on each of several nodes: neither NVLink nor the network alone
            would be measured.
    """
    if not dist.is_torchelastic_launched():
        return None
    rank, world, local = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    if local not in (1, world):
        raise ValueError(
            f"LOCAL_WORLD_SIZE={local} of WORLD_SIZE={world}: start one process a node"
            " (torchrun --nproc-per-node 1), or all on one node"
        )
    return Launched(rank, world, "intra_node" if local == world else "inter_node")


def _worker(
    rank: int, world: int, device_type: str, port: int, job: dict[str, Any], result: str
) -> None:
    """One rank of those that are started here."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    _join(rank, rank, world, device_type, job, result)


def _join(
    rank: int, local_rank: int, world: int, device_type: str, job: dict[str, Any], result: str
) -> None:
    """Measure what the log does not have; rank 0 writes the lines, and its job is everybody's."""
    gpu = device_type == "cuda"
    device = torch.device(device_type, local_rank) if gpu else torch.device("cpu")
    options: dict[str, Any] = {}
    if gpu:
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=world, **options)
    try:
        found = [job]
        dist.broadcast_object_list(found, 0)
        _run(device, found[0], Path(result))
    finally:
        dist.destroy_process_group()


def _run(device: torch.device, job: dict[str, Any], result: Path) -> None:
    rank = dist.get_rank()
    if not job["todo"]:
        return
    communicator = _communicator_bytes(device)
    sizes = sorted(s for _, s in job["todo"])
    transfers = Transfers(device, max(sizes))
    begin = time.monotonic()
    for done, (pattern, num_bytes) in enumerate(job["todo"]):
        # every rank must stop at the same transfer: rank 0 decides
        stop = [time.monotonic() - begin > job["budget_seconds"]]
        dist.broadcast_object_list(stop, 0)
        if stop[0]:
            break
        row = _measure(transfers, pattern, num_bytes, job["medium"])
        if rank == 0 and row is not None:
            data = row.model_dump(mode="json", exclude_none=True)
            line = {**job["stamp"], "transfer": data, "communicator_bytes": communicator}
            append_line(result, line)
            print(
                f"[capture {done + 1}/{len(job['todo'])} {time.monotonic() - begin:.0f}s] {pattern}"
                f" {num_bytes}: {row.duration_ns / 1000:.1f}us",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def run_workers(worker: Callable[..., None], world: int, device_type: str, *args: object) -> None:
    """Run ``worker(rank, world, device_type, port, *args)`` in a process for each of ``world``
    ranks, which meet at ``port``, to their end.

    Raises:
        RuntimeError: one of them failed.
    """
    context, port = torch.multiprocessing.get_context("spawn"), _free_port()
    workers = [
        context.Process(target=worker, args=(rank, world, device_type, port, *args), daemon=True)
        for rank in range(world)
    ]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    if any(each.exitcode for each in workers):
        raise RuntimeError(f"a worker failed: {[each.exitcode for each in workers]}")


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def read_transfers(log: Path, stamp: dict[str, str]) -> tuple[list[TransferTiming], int]:
    """Rows of a log that carry ``stamp`` (code, device), and the communicator's bytes.

    The fastest of equal rows counts: what disturbs a message makes it longer.
    """
    rows: dict[tuple[str, int], TransferTiming] = {}
    communicator = 0
    for row, taken in _logged(log, stamp):
        key = row.pattern, row.bytes
        rows[key] = faster(rows.get(key, row), row)
        communicator = max(communicator, taken)
    return without_starved(rows.values()), communicator


def faster(first: TransferTiming, second: TransferTiming) -> TransferTiming:
    """Of two measurements of one message: the shorter time, and the host's shorter time."""
    row = min(first, second, key=lambda row: row.duration_ns)
    return row.model_copy(update={"host_ns": min(first.host_ns, second.host_ns)})


def _logged(log: Path, stamp: dict[str, str]) -> list[tuple[TransferTiming, int]]:
    return [
        (TransferTiming.model_validate(line["transfer"]), line["communicator_bytes"])
        for line in read_log(log, stamp)
    ]


def without_starved(rows: Iterable[TransferTiming]) -> list[TransferTiming]:
    """The rows that are not slower (by a quarter) than a larger message of their pattern.

    A message cannot take longer than one with more bytes: such a row shows a stream that waited for
    its host. It is as good as not measured.
    """
    kept: list[TransferTiming] = []
    least: dict[tuple[str, int], int] = {}
    for row in sorted(rows, key=lambda row: row.bytes, reverse=True):
        curve = row.pattern, row.group_size
        if row.duration_ns <= _SLOWER * least.get(curve, row.duration_ns):
            kept.append(row)
            least[curve] = min(row.duration_ns, least.get(curve, row.duration_ns))
    return kept


def measure_transfers(
    log: Path,
    stamp: dict[str, str],
    device_type: str,
    world: int,
    sizes: Sequence[int] = SIZES,
    budget_seconds: float = 1e9,
) -> tuple[list[TransferTiming], int]:
    """Measure every pattern at every size, as far as ``log`` does not have it yet.

    All of them are measured in turn, five times over: a host that is busy for some seconds
    disturbs one time of a message and not the others.

    Args:
        log: file of lines; appended to, and read when a run is resumed.
        stamp: code hash and device name that lines must carry to be used again.
        device_type: ``cuda`` (NCCL) or ``cpu`` (gloo).
        world: processes, one a device; torchrun's, where it started this one.
        sizes: bytes, see :class:`~mhcplan.profiles.schema.TransferTiming`; each at least 4 a rank.
        budget_seconds: stop before the next transfer when this much time has passed.

    Returns:
        All rows of the log, and the bytes that NCCL's communicators take on a device.

    Raises:
        RuntimeError: a worker failed.
    """
    have = Counter((row.pattern, row.bytes) for row, _ in _logged(log, stamp))
    todo = [
        (pattern, size)
        for turn in range(_TURNS)
        for size in sorted(sizes)
        for pattern in PATTERNS
        if have[pattern, size] <= turn
    ]
    started = launched()
    medium = started.medium if started else "intra_node"
    job = {"todo": todo, "stamp": stamp, "budget_seconds": budget_seconds, "medium": medium}
    if started:
        local_rank = int(os.environ["LOCAL_RANK"])
        _join(started.rank, local_rank, started.world, device_type, job, str(log))
    elif todo:
        run_workers(_worker, world, device_type, job, str(log))
    return read_transfers(log, stamp)
