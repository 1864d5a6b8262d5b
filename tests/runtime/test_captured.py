"""Captured steps without a GPU: a stand-in for CUDA graphs shows what is called, in which order.

Its graph runs what is captured at once and notes each replay; its events hold the time at which
they were recorded, as those of a GPU would after a step.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from benchmarks import graphs
from mhcplan.planner.measured.claim import begins_graph
from mhcplan.profiles.capture.overlap_trace import Run
from mhcplan.runtime import captured
from mhcplan.runtime.captured import CapturedStep
from mhcplan.runtime.executor import Bound, Executor
from mhcplan.runtime.measure import time_steps, trace_step
from mhcplan.runtime.spec import RunSpec
from mhcplan.runtime.train import Session, Trainer
from tests.runtime.plans import make_case

if TYPE_CHECKING:
    from collections.abc import Iterator


class Log(list[str]):
    """What was called; ``capturing`` while a graph is made."""

    capturing = False


class Event:
    log = Log()

    def __init__(self, *, enable_timing: bool, external: bool = False) -> None:
        assert enable_timing
        self.external, self.ns = external, -1

    def record(self) -> None:
        # an internal event recorded in a graph is an edge: it never gets a time
        assert self.external or not self.log.capturing
        self.ns = time.perf_counter_ns()
        self.log.append("record")

    def synchronize(self) -> None:
        assert self.ns >= 0

    def elapsed_time(self, end: Event) -> float:
        assert min(self.ns, end.ns) >= 0, "an event that was not recorded has no time"
        return (end.ns - self.ns) / 1e6


class Pool:
    id = (0, 1)


class Graph:
    def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
        assert pool == Pool.id
        assert capture_error_mode == "thread_local"
        Event.log.capturing = True

    def capture_end(self) -> None:
        Event.log.capturing = False

    def replay(self) -> None:
        Event.log.append("replay")


@contextmanager
def use_mem_pool(pool: Pool) -> Iterator[None]:
    assert isinstance(pool, Pool)
    assert not Event.log.capturing  # torch refuses a pool that a capture fills
    yield


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """A trainer on the CPU that takes its device for a GPU once it is built."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    case = make_case("captured", schedule="1f1b", pp=1, n=2, recompute=2, microbatches=2)
    session = Session(torch.device("cpu"))
    made = Trainer(case.program, RunSpec.from_plan(case.plan, dtype=torch.float32), session)
    made.rehearse()
    session.device = torch.device("cuda", 0)
    Event.log = Log()
    stand_in: dict[str, Any] = {
        "Event": Event, "CUDAGraph": Graph, "MemPool": Pool, "use_mem_pool": use_mem_pool,
        "synchronize": lambda _device=None: None, "get_device_name": lambda _device=None: "made up",
        "_sleep": lambda _cycles: Event.log.append("sleep"),
    }  # fmt: skip
    for name, value in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield made
    dist.destroy_process_group()


def test_a_captured_step_is_started_behind_a_lead(trainer: Trainer) -> None:
    step = CapturedStep(trainer)
    step.load(0)
    Event.log.clear()
    step.step()
    replays = len(Event.log) - 3
    assert Event.log == ["sleep", "record", *["replay"] * replays, "record"]
    assert step.elapsed_ns() > 0
    times = time_steps({"captured": step}, steps=3, warm_up=1)["captured"]
    assert len(times.step_ns) == 3
    assert Event.log.count("replay") == 5 * replays


def test_a_graph_is_of_one_stream_and_no_event_is_within(trainer: Trainer) -> None:
    """The device's streams wait for what the issued step's wait for, and for nothing else."""
    instructions = trainer.executor.instructions
    parts = captured.parts_of(instructions)
    assert [it for part in parts for it in part] == instructions
    assert len(parts) < len(instructions) / 2
    for part in parts:
        assert len({it.stream for it in part}) == 1
        assert not any(it.waits for it in part[1:])
        assert not any(it.records for it in part[:-1])
        assert len(part) == 1 or not any(it.is_transfer for it in part)


def test_the_one_graph_that_parts_are_compared_with_is_one(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def graph(made: Graph, *, capture_error_mode: str) -> Iterator[None]:
        made.capture_begin(pool=Pool.id, capture_error_mode=capture_error_mode)
        yield
        made.capture_end()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    step = graphs.OneGraph(trainer)
    step.load(0)
    Event.log.clear()
    step.step()
    assert Event.log == ["sleep", "record", "replay", "record"]
    assert len(time_steps({"one graph": step}, steps=2, warm_up=0)["one graph"].step_ns) == 2


def test_a_memset_is_late_if_compute_stood_still_before_it() -> None:
    names = ["gemm", "long", "Memset (Device)", "Memset (Device)", "gemm", "Memset (Device)"]
    spans_us = [[0, 100], [10, 300], [250, 1], [330, 1], [400, 10], [429, 1]]
    run = Run([[1000 * start, 1000 * length] for start, length in spans_us], names=names)
    assert graphs.stalls_ns(run) == [20_000]
    assert graphs.stalls_ns(Run()) == []


def test_the_comparison_of_graphs_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["graphs.py", "--help"])
    with pytest.raises(SystemExit) as done:
        graphs.main()
    assert done.value.code == 0
    assert "one CUDA graph" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("sys.argv", ["graphs.py", "--rows", "1f1b-n1"])
    with pytest.raises(SystemExit) as done:
        graphs.main()
    assert done.value.code == 2
    assert "needs 2 CUDA devices, found 1" in capsys.readouterr().err


def test_a_captured_trace_has_no_host(trainer: Trainer) -> None:
    trace = trace_step(trainer, 0, captured=True)
    assert trace is not None
    assert trace.meta["captured"] is True
    assert trace.meta["device"] == "made up"
    assert not trace.timeline.issue_ns.any()
    issued = trace_step(trainer, 0)
    assert issued is not None
    assert np.count_nonzero(issued.timeline.issue_ns) > 0.9 * issued.program.num_ops
    assert (issued.timeline.end_ns >= issued.timeline.start_ns).all()


@pytest.mark.parametrize("p2p", ["eager", "grouped"])
def test_claims_begin_graphs_where_the_runtime_does(p2p: str) -> None:
    """The Program alone says it, without a binding."""
    case = make_case("claimed", schedule="dualpipe", pp=2, n=2, recompute=2, p2p=p2p)
    program = case.program
    begins = begins_graph(program)
    anything: Any = SimpleNamespace(
        bind=lambda _op, _attached: Bound(lambda _reads, _out: [], ((),) * 8), start=None
    )
    for rank in range(2):
        executor = Executor(program, rank, anything, anything, anything)
        parts = captured.parts_of(executor.instructions)
        first = [part[0].ops[0].index for part in parts]
        own = slice(*program.rank_offsets[rank : rank + 2])
        assert (np.flatnonzero(begins[own]) + own.start).tolist() == first
