"""A published pair replayed: DeepSeek's wall, its order, and what mHC's measures do to it."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from benchmarks.results.replay import KERNELS_EXPOSED_NS, TRACE
from mhcplan.planner.measured.replay import (
    Measures,
    MhcTimes,
    Phase,
    exposed_ns,
    period_ns,
    read_phases,
    replay,
)
from mhcplan.sim.check import check

if TYPE_CHECKING:
    from pathlib import Path

MILLISECOND_NS = 1_000_000
MHC = MhcTimes(*(n * 100_000 for n in (3, 2, 2, 5, 10)))
ALONE, PRIORITY = Measures(priority=False, decoupled=False), Measures(decoupled=False)


@pytest.fixture(scope="module")
def phases() -> tuple[Phase, ...]:
    return read_phases(TRACE)


def wall_ns(phases: tuple[Phase, ...]) -> int:
    return max(phase.end_ns for phase in phases)


def test_spans_replay_the_wall_within_1_percent(phases: tuple[Phase, ...]) -> None:
    done = replay(phases)
    assert wall_ns(phases) == 129_012_000  # 4 layers, 129.0 ms
    assert done.timeline.step_ns == pytest.approx(wall_ns(phases), rel=0.01)
    assert abs(done.breakdown_ns["exposed_ep"] - exposed_ns(phases)) < MILLISECOND_NS
    starts = {
        (done.program[i].kind, int(done.program[i].cost_key.split()[-1])): start
        for i, start in enumerate(done.timeline.start_ns.tolist())
    }
    for phase in phases:
        assert abs(starts[phase.name, phase.layer] - phase.start_ns) < MILLISECOND_NS, phase


def test_busy_times_replay_the_wall_within_6_percent(phases: tuple[Phase, ...]) -> None:
    done = replay(phases, busy=True)
    assert done.timeline.step_ns == pytest.approx(wall_ns(phases), rel=0.06)
    assert abs(done.breakdown_ns["exposed_ep"] - KERNELS_EXPOSED_NS) < MILLISECOND_NS


def test_order_within_each_stream_is_the_traces(phases: tuple[Phase, ...]) -> None:
    """The planner's order of phases is the one that DeepSeek ran."""
    traced: dict[str, list[str]] = defaultdict(list)
    for phase in phases:
        traced[phase.stream].append(f"{phase.name} {phase.layer}")
    program = replay(phases).program
    for name, keys in traced.items():
        assert keys == [op.cost_key for op in program if op.stream.name == name]


def test_exposed_time_of_a_trace_is_what_no_compute_hides() -> None:
    made = (
        Phase(0, "combine(B)", "comm", 0, 0, 10),
        Phase(0, "attn(F)", "compute", 0, 4, 8),
        Phase(0, "dispatch(F)", "comm", 0, 12, 20),
        Phase(0, "mlp(F)", "compute", 0, 15, 30),
    )
    assert exposed_ns(made) == 4 + 2 + 3


def test_both_engines_replay_alike(phases: tuple[Phase, ...]) -> None:
    options = {"pairs": 2, "mhc": MHC, "message_ns": 5 * MILLISECOND_NS}
    compiled, simpy = (replay(phases, **options, engine=e) for e in ("compiled", "simpy"))
    assert compiled.timeline.end_ns.tolist() == simpy.timeline.end_ns.tolist()


def test_programs_of_replays_are_sound(phases: tuple[Phase, ...]) -> None:
    done = replay(phases, pairs=3, mhc=MHC, message_ns=MILLISECOND_NS)
    assert check(done.program) == []


def test_pairs_reach_a_steady_state(phases: tuple[Phase, ...]) -> None:
    steps = [
        replay(phases, pairs=n, mhc=MHC, message_ns=5 * MILLISECOND_NS).timeline.step_ns
        for n in (3, 4, 5, 6)
    ]
    assert len({later - earlier for earlier, later in pairwise(steps)}) == 1


def test_each_measure_helps_where_the_paper_says(phases: tuple[Phase, ...]) -> None:
    """The priority stream keeps traffic from waiting behind compute; a decoupled recompute fills
    the wait for a message, so without messages it gains nothing."""
    message_ns = 5 * MILLISECOND_NS
    (alone_ns, alone), (priority_ns, priority), (all_ns, every) = (
        period_ns(phases, MHC, measures, message_ns) for measures in (ALONE, PRIORITY, Measures())
    )
    assert all_ns < priority_ns < alone_ns
    assert priority["exposed_ep"] < alone["exposed_ep"]
    assert every["exposed_pp"] < priority["exposed_pp"]
    assert sum(every.values()) == all_ns
    assert period_ns(phases, MHC, PRIORITY, 0)[0] == period_ns(phases, MHC, Measures(), 0)[0]
    assert period_ns(phases, None, Measures(), 0)[0] < period_ns(phases, MHC, Measures(), 0)[0]


def test_a_trace_without_traffic_is_as_long_as_its_compute(tmp_path: Path) -> None:
    """Every duration comes from the file."""
    names = "attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)", "attn(W)"
    traffic = "combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"
    rows = [f"0,{name},compute,5,{10 * i},{10 * i + 7}" for i, name in enumerate(names)]
    rows += [f"0,{name},comm,0,{10 * i},{10 * i}" for i, name in enumerate(traffic)]
    file = tmp_path / "pair.csv"
    file.write_text("\n".join(["layer,phase,stream,busy_us,start_us,end_us", *rows]))
    made = read_phases(file)
    assert replay(made).timeline.step_ns == len(names) * 7000
    assert replay(made, busy=True).timeline.step_ns == len(names) * 5000
