"""Measuring contention: what a kernel and traffic between GPUs do to each other while they overlap.

One process a GPU. Every pair of :mod:`mhcplan.profiles.capture.overlap_pairs` is enqueued behind
matrix products that keep the chip hot, so that neither side starts before the other is in its
queue, and read from the device trace: time in the queue apart from time in the kernel. Before the
traffic may start a few ops run alone: what a chip's clock is depends on what it drew in the 50 ms
before, so that an op's time alone has to be taken in the very run. On a CPU (gloo, two threads) the
clock is used; that serves tests.

``python -m mhcplan.profiles.capture.contention --log FILE`` runs it by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mhcplan.profiles.capture.comm import reduction, run_workers
from mhcplan.profiles.capture.ops import append_line
from mhcplan.profiles.capture.overlap_kernels import Compute, makers
from mhcplan.profiles.capture.overlap_pairs import (
    COPY,
    CTAS,
    SIZES,
    Traffic,
    all_reductions,
    all_traffic,
    pair_key,
    pairs,
    row_of,
)
from mhcplan.profiles.capture.overlap_trace import Run, split_runs, trace_events
from mhcplan.profiles.contention import PHASES
from mhcplan.profiles.logs import read_log
from mhcplan.profiles.overlap import rows_of
from mhcplan.profiles.transfer_costs import REDUCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_CHUNK = 32  # pairs of one trace: reading it costs about a second
_MOST_OPS, _MOST_MESSAGES = 150, 48  # launches that fit a stream's queue of 1024 with their events
_COMPUTE_NS = {"A": 2_500_000, "B": 7_000_000, "C": 5_000_000}
_TRAFFIC_NS = {"A": 6_000_000, "B": 1_500_000, "C": 3_500_000}
_FEWEST = 8
_BEFORE_NS, _FEWEST_BEFORE = 400_000, 4  # of ops before the traffic; of the first nothing is kept


@dataclass
class Plan:
    """What to measure: sizes in bytes, CTA limits, and names of kernels (None: all)."""

    sizes: Sequence[int] = SIZES
    ctas: Sequence[int] = CTAS
    copies: Sequence[int] = SIZES
    names: Sequence[str] | None = None
    budget_seconds: float = 1e9


@dataclass
class _Estimate:
    """Rough times of one call, ns: on the stream, of the host; and kernels it launches."""

    stream_ns: float
    host_ns: float
    kernels: int = 1


class Bench:
    """One rank: its kernels, its communicators and how to run a pair of them."""

    def __init__(self, device: torch.device, plan: Plan) -> None:
        """Build the kernels and communicators; every rank calls it.

        A kernel that fails on any rank is reported and left out on all.
        """
        self.device, self.gpu = device, device.type == "cuda"
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.control: Any = dist.new_group(backend="gloo") if self.gpu else None
        self.plan = plan
        self.compute = self._build()
        most = max(plan.sizes) // 4
        self._send = torch.randn(most, device=device)
        self._receive = torch.empty_like(self._send)
        self._groups: dict[tuple[int, bool], Any] = {}
        self._estimates: dict[str, _Estimate] = {}
        if self.gpu:
            from mhcplan.profiles.capture.timing import GpuTimer

            self.timer = GpuTimer(device)
            self.streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._far: torch.Tensor | None = None

    def gather(self, item: Any) -> list[Any]:  # noqa: ANN401 - anything that pickles
        """``item`` of every rank, on every rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item, group=self.control)
        return found

    def _build(self) -> dict[str, Compute]:
        built: dict[str, Compute] = {}
        for name, make in makers(self.device).items():
            if self.plan.names is not None and name not in self.plan.names:
                continue
            begin = time.monotonic()
            try:
                built[name] = make()
                built[name].call()
                if self.gpu:
                    torch.cuda.synchronize()
            except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                _say(f"{name}: left out: {text}")
                built.pop(name, None)
            if self.rank == 0:
                _say(f"built {name} in {time.monotonic() - begin:.1f} s")
        common = set.intersection(*map(set, self.gather(list(built))))
        return {name: case for name, case in built.items() if name in common}

    # -- traffic -----------------------------------------------------------------------------------

    def _group(self, traffic: Traffic) -> Any:  # noqa: ANN401 - a process group
        if not self.gpu:
            return None
        key = traffic.group
        if key not in self._groups:
            options = dist.ProcessGroupNCCL.Options()
            options.is_high_priority_stream = traffic.high_priority
            if traffic.ctas:
                options.config.max_ctas = options.config.min_ctas = traffic.ctas
            self._groups[key] = dist.new_group(backend="nccl", pg_options=options)
        return self._groups[key]

    def message(self, traffic: Traffic) -> Callable[[], Any] | None:
        """A call that enqueues one message and returns handles; None without a part in it."""
        group = self._group(traffic)
        dtype = torch.float32 if traffic.pattern in REDUCTIONS else torch.bfloat16
        count = traffic.num_bytes // dtype.itemsize
        count -= count % self.size
        send, receive = self._send.view(dtype)[:count], self._receive.view(dtype)[:count]
        if traffic.pattern in REDUCTIONS:
            call = reduction(traffic.pattern, send, receive, self.size, group)
            return lambda: [call()]
        if traffic.pattern == "all_to_all":
            return lambda: [dist.all_to_all_single(receive, send, group=group, async_op=True)]
        if self.rank > 1:
            return None
        if traffic.pattern == COPY:
            return self._copy(count) if self.rank == 0 else None
        peer = 1 - self.rank
        out = dist.P2POp(dist.isend, send, peer, group)
        back = dist.P2POp(dist.irecv, receive, peer, group)
        parts = [out, back] if traffic.pattern == "send_recv_both" else [(out, back)[self.rank]]
        return lambda: dist.batch_isend_irecv(parts)

    def _copy(self, count: int) -> Callable[[], Any]:
        """Rank 0 writes to the second GPU by its copy engine; what is there belongs to rank 0."""
        source = self._send.view(torch.bfloat16)
        if self._far is None:
            self._far = torch.empty_like(source, device=torch.device("cuda", 1))
        near, there = source[:count], self._far
        far = there[:count]

        def call() -> list[Any]:
            far.copy_(near, non_blocking=True)
            return []

        return call

    # -- runs --------------------------------------------------------------------------------------

    def run(
        self, compute: int, work: Callable[[], object] | None, messages: int,
        send: Callable[[], Any] | None, hold_ns: float, before: int = 0, lag_ns: float = 0.0,
    ) -> tuple[Run, bool]:  # fmt: skip
        """Run both sides at once; on a GPU the returned run is empty: it is in the trace.

        Args:
            compute, work: how often to call what; None: this rank has no part.
            messages, send: likewise.
            hold_ns: what the host needs to enqueue all that.
            before: ops to run, beyond ``compute``, before the traffic may start.
            lag_ns: how much later than the other ranks this one begins.

        Returns:
            The run, and whether the host was too late: the streams had begun before it was done.
        """
        dist.barrier(group=self.control)
        if not self.gpu:
            return _run_on_host(compute, work, messages, send), False
        main = torch.cuda.current_stream()
        self.timer.fill(1.6 * hold_ns + 2_000_000 + lag_ns)
        torch.cuda._sleep(1)
        go, begun = torch.cuda.Event(), torch.cuda.Event()
        go.record(main)
        for stream in self.streams:
            stream.wait_event(go)
        with torch.cuda.stream(self.streams[0]):
            if work is not None:
                for _ in range(before):
                    work()
            begun.record()
        self.streams[1].wait_event(begun)
        handles: list[Any] = []
        with torch.cuda.stream(self.streams[1]):
            for _ in range(messages if send is not None else 0):
                handles += send()  # type: ignore[misc]
        with torch.cuda.stream(self.streams[0]):
            for _ in range(compute if work is not None else 0):
                work()  # type: ignore[misc]
        late = go.query()
        with torch.cuda.stream(self.streams[1]):
            for handle in handles:
                handle.wait()
        torch.cuda.synchronize()
        torch.cuda._sleep(1)  # the run's end: what holds the next one up is not part of it
        return Run(), late

    def estimate(self, key: str, call: Callable[[], Any] | None) -> _Estimate:
        """Rough times of a call, the same on every rank; kept under ``key``.

        Launches markers: not to be made while a trace is taken.
        """
        if key not in self._estimates:
            mine = _Estimate(0.0, 0.0) if call is None else self._try(call)
            every = self.gather(mine)
            self._estimates[key] = _Estimate(
                max(e.stream_ns for e in every), max(e.host_ns for e in every)
            )
        return self._estimates[key]

    def _try(self, call: Callable[[], Any]) -> _Estimate:
        host: list[int] = []

        def several(count: int) -> None:
            for _ in range(count):
                begin = time.perf_counter_ns()
                result = call()
                host.append(time.perf_counter_ns() - begin)
                for handle in result if isinstance(result, list) else []:
                    if hasattr(handle, "wait"):
                        handle.wait()

        several(2)
        if not self.gpu:
            several(2)
            return _Estimate(min(host), min(host))
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_500_000)
        start.record()
        several(4)
        end.record()
        end.synchronize()
        return _Estimate(start.elapsed_time(end) * 1e6 / 4, sorted(host)[len(host) // 2])


def _run_on_host(
    compute: int, work: Callable[[], object] | None, messages: int, send: Callable[[], Any] | None
) -> Run:
    """A thread computes while this one sends; times by the clock."""
    run = Run()

    def loop() -> None:
        for _ in range(compute):
            begin = time.perf_counter_ns()
            work()  # type: ignore[misc]
            run.compute.append([begin, time.perf_counter_ns() - begin])
            run.names.append("host")

    run.launch["host"] = [0, 0, 0, 0]
    thread = threading.Thread(target=loop)
    if work is not None:
        thread.start()
    for _ in range(messages if send is not None else 0):
        begin = time.perf_counter_ns()
        for handle in send():  # type: ignore[misc]
            handle.wait()
        run.traffic.append([begin, time.perf_counter_ns() - begin])
    if work is not None:
        thread.join()
    return run


def _say(text: str) -> None:
    print(f"[contention] {text}", file=sys.stderr, flush=True)


@dataclass
class _Book:
    """Rows of the log that carry the stamp; rank 0 writes."""

    path: Path
    stamp: dict[str, str]
    timelines: Path | None = None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, row: dict[str, Any], runs: dict[str, list[Run]]) -> None:
        self.rows[row["pair"]] = row
        append_line(self.path, {**self.stamp, "contention": row})
        if self.timelines is not None:
            spans = {k: [[r.compute, r.traffic] for r in v] for k, v in runs.items()}
            with gzip.open(self.timelines, "at", encoding="utf-8") as file:
                file.write(json.dumps({"pair": row["pair"], "runs": _relative(spans)}) + "\n")


def _relative(spans: dict[str, list[list[list[list[int]]]]]) -> dict[str, Any]:
    """The same spans counted from the first start of all ranks of a run: shorter numbers."""
    found = {}
    for name, ranks in spans.items():
        zero = min((s[0] for rank in ranks for part in rank for s in part), default=0)
        found[name] = [[[[s - zero, d] for s, d in part] for part in rank] for rank in ranks]
    return found


def read_rows(log: Path, stamp: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Rows of a log by pair that carry ``stamp``."""
    return rows_of(read_log(log, stamp))


@contextlib.contextmanager
def _tracing(gpu: bool) -> Iterator[list[Run]]:
    """Fills the list with the runs of the block, on a GPU."""
    runs: list[Run] = []
    if not gpu:
        yield runs
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as records:
        yield runs
        torch.cuda.synchronize()
    runs += split_runs(*trace_events(records))


Item = tuple[str, "Traffic | None"]


def _estimates(bench: Bench, item: Item) -> tuple[_Estimate, _Estimate]:
    """Of the compute and of the traffic; nothing where a side is absent."""
    name, traffic = item
    ours = theirs = _Estimate(0.0, 0.0)
    if name != "-":
        ours = bench.estimate(name, bench.compute[name].call)
    if traffic is not None:
        theirs = bench.estimate(str(traffic.alone), bench.message(traffic))
    return ours, theirs


def _counts(bench: Bench, item: Item, run: str) -> tuple[int, int]:
    """Ops and messages of a run: enough that the side which should outlive the other does."""
    if not bench.gpu:
        return 8, 8
    ours, theirs = _estimates(bench, item)
    ops = messages = 0
    if item[0] != "-":
        ops = min(_MOST_OPS, max(_FEWEST, round(_COMPUTE_NS[run] / max(1.0, ours.stream_ns))))
    if item[1] is not None:
        messages = round(_TRAFFIC_NS[run] / max(1.0, theirs.stream_ns))
        messages = min(_MOST_MESSAGES, max(_FEWEST, messages))
    if ops and messages and run != "A":  # long messages need more compute to outlive them
        want = (1.6 if run == "B" else 1.0) * messages * theirs.stream_ns
        ops = min(_MOST_OPS, max(ops, round(want / max(1.0, ours.stream_ns))))
    return ops, messages


def _before(ours: _Estimate) -> int:
    return max(_FEWEST_BEFORE, round(_BEFORE_NS / max(1.0, ours.stream_ns)))


def _measure(bench: Bench, item: Item) -> tuple[list[tuple[str, Run]], list[str]]:
    """The runs of one pair as (name, run), and which of them the host was late for."""
    name, traffic = item
    work = bench.compute[name].call if name != "-" else None
    if traffic is not None and traffic.busy == "first" and bench.rank:
        work = None
    send = None if traffic is None else bench.message(traffic)
    ours, theirs = _estimates(bench, item)
    found, late = [], []
    for run in PHASES if name != "-" and traffic is not None else ("A",):
        ops, messages = _counts(bench, item, run)
        before = _before(ours) if bench.gpu and work is not None and send is not None else 0
        hold = (ops + before) * ours.host_ns + messages * theirs.host_ns
        lag = bench.rank * PHASES[run] * ours.stream_ns
        result, was_late = bench.run(ops, work, messages, send, hold, before, lag)
        found.append((run, result))
        if was_late:
            late.append(f"{run}{bench.rank}")
    return found, late


def _chunk(bench: Bench, items: Sequence[Item], book: _Book) -> None:
    """Measure some pairs under one trace; rank 0 writes their rows."""
    done: list[tuple[Item, list[tuple[str, Run]], list[str]]] = []
    for item in items:
        _estimates(bench, item)
    with _tracing(bench.gpu) as traced:
        done += [(item, *_measure(bench, item)) for item in items]
    if bench.gpu:
        wanted = sum(len(runs) for _, runs, _ in done)
        if len(traced) != wanted:  # the profiler dropped records: rather none than wrong ones
            _say(f"rank {bench.rank}: {len(traced)} runs in the trace instead of {wanted}")
            traced = [Run() for _ in range(wanted)]
        source = iter(traced)
        done = [(i, [(name, next(source)) for name, _ in runs], late) for i, runs, late in done]
    every = bench.gather([(runs, late) for _, runs, late in done])
    if bench.rank:
        return
    for index, (item, _, _) in enumerate(done):
        ranks = [rank[index] for rank in every]
        runs = {name: [rank[0][i][1] for rank in ranks] for i, (name, _) in enumerate(ranks[0][0])}
        late = [mark for rank in ranks for mark in rank[1]]
        _write(bench, book, item, runs, late)


def _write(bench: Bench, book: _Book, item: Item, runs: dict[str, list[Run]],
           late: list[str]) -> None:  # fmt: skip
    name, traffic = item
    per_op = 1
    if name != "-":
        if traffic is None:
            ops = _counts(bench, item, "A")[0]
            per_op = max(1, round(len(runs["A"][0].compute) / ops))
        else:
            per_op = book.rows.get(pair_key(name, None), {}).get("per_op", 1)
    row = row_of(name, traffic, per_op, runs, late)
    row["per_op"] = per_op
    if name != "-" and traffic is None:
        row["family"] = bench.compute[name].family
        row["hbm_bytes"] = bench.compute[name].hbm_bytes
    if all(r.compute or r.traffic for r in runs["A"][:1]):
        book.add(row, runs)


def _items(bench: Bench, book: _Book) -> list[Item]:
    """What the log does not have yet: each side alone, then pairs."""
    plan = bench.plan
    traffic = all_traffic(plan.sizes, plan.ctas)
    names = list(bench.compute)
    copies = list(plan.copies) if bench.gpu else []
    alone: list[Item] = [(name, None) for name in names]
    alone += [("-", t) for t in (*traffic, *all_reductions(plan.sizes, plan.ctas))]
    alone += [("-", Traffic(COPY, size)) for size in copies]
    todo = [*alone, *pairs(names, traffic, copies)]
    missing = [i for i in todo if pair_key(*i) not in book.rows]
    found: list[Item] = bench.gather(missing)[0]
    return found


def _work(bench: Bench, book: _Book, chunk: int) -> None:
    begin = time.monotonic()
    todo = _items(bench, book)
    if bench.gpu:
        bench.timer.heat(0.5)
    for first in range(0, len(todo), chunk):
        stop = bench.gather(time.monotonic() - begin > bench.plan.budget_seconds)[0]
        if stop:
            break
        _chunk(bench, todo[first : first + chunk], book)
        if bench.rank == 0:
            seconds = time.monotonic() - begin
            _say(f"{min(first + chunk, len(todo))}/{len(todo)} {seconds:.0f} s,"
                 f" {len(book.rows)} rows")  # fmt: skip


def _worker(rank: int, world: int, device_type: str, port: int, job: dict[str, Any]) -> None:
    """One rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gpu = device_type == "cuda"
    device = torch.device(device_type, rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=world)
    book = _Book(Path(job["log"]), job["stamp"], job["timelines"] and Path(job["timelines"]))
    book.rows = read_rows(book.path, book.stamp)
    try:
        _work(Bench(device, Plan(**job["plan"])), book, job["chunk"])
    finally:
        dist.destroy_process_group()


def measure_contention(
    log: Path,
    stamp: dict[str, str],
    device_type: str,
    world: int = 2,
    plan: Plan | None = None,
    timelines: Path | None = None,
    chunk: int = _CHUNK,
) -> dict[str, dict[str, Any]]:
    """Measure every pair that ``log`` does not have yet.

    Args:
        log: file of lines; appended to, and read when a run is resumed.
        stamp: code hash and device name that lines must carry to be used again.
        device_type: ``cuda`` (NCCL) or ``cpu`` (gloo).
        world: processes, one a device.
        plan: what to measure, and for how long.
        timelines: gzip file for the start and length of every kernel, or None.
        chunk: pairs between two lines of the log, and two looks at the clock.

    Returns:
        All rows of the log by pair: see :func:`~mhcplan.profiles.capture.overlap_pairs.row_of`.

    Raises:
        RuntimeError: a worker failed.
    """
    job = {
        "log": str(log), "stamp": stamp, "plan": vars(plan or Plan()), "chunk": chunk,
        "timelines": str(timelines) if timelines else None,
    }  # fmt: skip
    run_workers(_worker, world, device_type, job)
    return read_rows(log, stamp)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure by itself, with the defaults of :class:`Plan`."""
    from mhcplan.profiles.capture.machine import code_sha256, device_name

    parser = argparse.ArgumentParser(prog="contention")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--timelines", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--budget-seconds", type=float, default=280.0)
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    stamp = {"code": code_sha256(), "device": device_name(device)}
    plan = Plan(budget_seconds=chosen.budget_seconds)
    rows = measure_contention(
        chosen.log, stamp, chosen.device, chosen.world, plan, chosen.timelines
    )
    _say(f"{len(rows)} rows in {chosen.log}")


if __name__ == "__main__":
    main()
