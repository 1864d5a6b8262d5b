"""What holds for every legal number of ranks and microbatches."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.planner.schedules.actions import input_of, output_of
from mhcplan.planner.schedules.catalogue import SCHEDULES, Schedule, ScheduleError, build_schedule
from mhcplan.planner.schedules.graph import ChunkTimes, bubbles_ns, end_times_ns, peak_live_chunks
from mhcplan.planner.schedules.p2p import P2P, place_messages

if TYPE_CHECKING:
    from mhcplan.planner.schedules.actions import Action, Output


def _legal(name: str, num_ranks: int, num_microbatches: int) -> bool:
    try:
        build_schedule(name, num_ranks, num_microbatches)
    except ScheduleError:
        return False
    return True


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule of up to 8 ranks and 40 microbatches."""
    name = draw(st.sampled_from(list(SCHEDULES)))
    step = 2 if name == "dualpipe" else 1
    num_ranks = step * draw(st.integers(1, 8 // step))
    least = 2 * num_ranks if name.startswith("dualpipe") else 1
    legal = [m for m in range(least, 41, step) if _legal(name, num_ranks, m)]
    return build_schedule(name, num_ranks, draw(st.sampled_from(legal)))


durations = st.integers(1, 50)
chunk_times = st.builds(ChunkTimes, durations, durations, durations, durations, st.integers(0, 30))
p2ps = st.sampled_from(["eager", "grouped"])
many = settings(max_examples=60, deadline=None)


def test_legal_is_what_the_docstrings_say() -> None:
    """Every P and M builds, but for the stated limits."""
    for num_ranks in range(1, 9):
        for num_microbatches in range(1, 41):
            legal = {name for name in SCHEDULES if _legal(name, num_ranks, num_microbatches)}
            expected = {"1f1b", "zb1p", "zbv"}
            if num_microbatches >= 2 * num_ranks:
                expected.add("dualpipev")
                if num_ranks % 2 == 0 and num_microbatches % 2 == 0:
                    expected.add("dualpipe")
            if num_microbatches % max(1, num_microbatches // num_ranks) == 0:
                expected.add("interleaved-1f1b")
            assert legal == expected


@many
@given(schedules())
def test_every_chunk_runs_once_where_it_is_held(schedule: Schedule) -> None:
    """F once and B or I and W once per (stage, microbatch), on the rank that holds the chunk."""
    runs: Counter[tuple[str, int, int]] = Counter()
    for rank, row in enumerate(schedule.actions):
        for part in (part for action in row for part in action.parts):
            assert part.stage in schedule.stages_of(rank)
            assert schedule.rank_of(part.stage, part.microbatch) == rank
            for kind in "IW" if part.kind == "B" else part.kind:
                runs[kind, part.stage, part.microbatch] += 1
    chunks = [(s, m) for s in range(schedule.num_stages) for m in range(schedule.num_microbatches)]
    assert runs == Counter((kind, *chunk) for kind in "FIW" for chunk in chunks)


@many
@given(schedules())
def test_a_chunk_runs_f_then_its_gradients(schedule: Schedule) -> None:
    """F before I or B, I before W; a pair never joins F and B of one chunk."""
    for row in schedule.actions:
        order: dict[tuple[int, int], str] = defaultdict(str)
        for action in row:
            assert len({(part.stage, part.microbatch) for part in action.parts}) == len(
                action.parts
            )
            for part in action.parts:
                order[part.stage, part.microbatch] += part.kind
        assert set(order.values()) <= {"FB", "FIW"}


@many
@given(schedules())
def test_the_last_stage_sees_microbatches_in_order(schedule: Schedule) -> None:
    """Losses are appended, so a rank's F of the last stage must ascend; so do all others."""
    for row in schedule.actions:
        seen: dict[int, list[int]] = defaultdict(list)
        for part in (part for action in row for part in action.parts):
            if part.kind == "F":
                seen[part.stage].append(part.microbatch)
        for microbatches in seen.values():
            assert microbatches == sorted(microbatches)


@many
@given(schedules(), chunk_times)
def test_nothing_deadlocks_and_waiting_for_batches_never_helps(
    schedule: Schedule, times: ChunkTimes
) -> None:
    """Both ways of posting messages end; no rank is busy for longer than the step."""
    eager, grouped = end_times_ns(schedule, times), end_times_ns(schedule, times, "grouped")
    assert len(eager) == sum(map(len, schedule.actions))
    assert all(eager[action] <= grouped[action] for action in eager)
    assert min(bubbles_ns(schedule, times)) >= 0


@many
@given(schedules(), chunk_times, st.integers(2, 5))
def test_time_scales(schedule: Schedule, times: ChunkTimes, factor: int) -> None:
    """All times k-fold make every action end k times as late."""
    scaled = ChunkTimes(
        factor * times.forward_ns,
        factor * times.input_grad_ns,
        factor * times.weight_grad_ns,
        factor * times.overlap_ns,
        factor * times.message_ns,
    )
    once, often = end_times_ns(schedule, times), end_times_ns(schedule, scaled)
    assert often == {action: factor * end_ns for action, end_ns in once.items()}


@many
@given(schedules(), p2ps)
def test_both_ends_of_a_message_meet_in_order(schedule: Schedule, p2p: P2P) -> None:
    """NCCL and gloo match the k-th send of a pair of ranks with the k-th receive."""
    sent: dict[tuple[int, int], list[object]] = defaultdict(list)
    received: dict[tuple[int, int], list[object]] = defaultdict(list)
    for rank, slots in enumerate(place_messages(schedule, p2p)):
        for message in (message for slot in slots for message in slot):
            if message.kind.startswith("SEND"):
                sent[rank, message.peer].append(message.carries)
            else:
                received[message.peer, rank].append(message.carries)
    assert sent == received


@many
@given(schedules())
def test_a_flow_is_consumed_in_the_order_it_is_produced(schedule: Schedule) -> None:
    """Activations, or gradients, from one rank to another never overtake each other."""
    produced: dict[tuple[str, int, int], list[Output]] = defaultdict(list)
    consumed: dict[tuple[str, int, int], list[Output]] = defaultdict(list)
    for rank, row in enumerate(schedule.actions):
        for part in (part for action in row for part in action.parts):
            need = input_of(part, schedule.num_stages)
            if need and (source := schedule.rank_of(need.stage, need.microbatch)) != rank:
                consumed[need.of, source, rank].append(need)
            if (output := output_of(part)) and (target := _target(schedule, output)) != rank:
                produced[output.of, rank, target].append(output)
    assert {flow: outputs for flow, outputs in produced.items() if flow[2] >= 0} == consumed


def _target(schedule: Schedule, output: Output) -> int:
    """Rank that needs the output; -1 for the last activation and the first gradient."""
    stage = output.stage + (1 if output.of == "F" else -1)
    inside = 0 <= stage < schedule.num_stages
    return schedule.rank_of(stage, output.microbatch) if inside else -1


@many
@given(schedules())
def test_eager_messages_pass_through_one_queue_a_rank(schedule: Schedule) -> None:
    """Even if all sends and receives of a rank block one another, first in, first out."""
    graph: nx.DiGraph[Action | Output] = nx.DiGraph()
    for row, slots in zip(schedule.actions, place_messages(schedule), strict=True):
        graph.add_edges_from(pairwise(row))
        graph.add_edges_from(pairwise(message.carries for slot in slots for message in slot))
        for k, slot in enumerate(slots):
            graph.add_edges_from((row[k - 1], m.carries) for m in slot if m.kind[0] == "S")
        received = {message.carries for slot in slots for message in slot if message.kind[0] == "R"}
        for action in row:
            needs = (input_of(part, schedule.num_stages) for part in action.parts)
            graph.add_edges_from((need, action) for need in needs if need and need in received)
    assert nx.is_directed_acyclic_graph(graph)


@many
@given(schedules(), p2ps)
def test_messages_are_posted_around_their_actions(schedule: Schedule, p2p: P2P) -> None:
    """Sends after what makes them, receives before what needs them, and no other messages."""
    for rank, (row, slots) in enumerate(
        zip(schedule.actions, place_messages(schedule, p2p), strict=True)
    ):
        posted: dict[str, int] = {}
        for k, slot in enumerate(slots):
            for message in slot:
                assert message.peer != rank
                assert str(message) not in posted
                posted[str(message)] = k
        for k, action in enumerate(row):
            for part in action.parts:
                _check_receive(schedule, rank, part, posted, k)
                _check_send(schedule, rank, part, posted, k)
        assert not posted


def _check_receive(
    schedule: Schedule, rank: int, part: Action, posted: dict[str, int], k: int
) -> None:
    need = input_of(part, schedule.num_stages)
    if need and schedule.rank_of(need.stage, need.microbatch) != rank:
        assert posted.pop(f"{part.stage}RECV_{need.of}{part.microbatch}") <= k


def _check_send(
    schedule: Schedule, rank: int, part: Action, posted: dict[str, int], k: int
) -> None:
    step = {"F": 1, "I": -1, "B": -1, "W": 0}[part.kind]
    target = part.stage + step
    if 0 <= target < schedule.num_stages and schedule.rank_of(target, part.microbatch) != rank:
        way = "F" if step == 1 else "B"
        assert posted.pop(f"{part.stage}SEND_{way}{part.microbatch}") > k


@many
@given(schedules())
def test_live_chunks_never_pass_what_exists(schedule: Schedule) -> None:
    """A rank keeps no more chunks than it runs; DualPipe and DualPipeV keep stages + 1."""
    for rank, peak in enumerate(peak_live_chunks(schedule)):
        chunks = sum(a.kind in {"F", "OVERLAP"} for a in schedule.actions[rank])
        assert 1 <= peak <= chunks
        if schedule.name.startswith("dualpipe"):
            assert peak == schedule.num_stages + 1


@many
@given(st.integers(1, 8), st.integers(0, 24), durations)
def test_equal_times_give_the_published_bubbles(half: int, extra: int, unit: int) -> None:
    """1F1B, ZB1P and DualPipe with F = I = W, for any P and legal M."""
    num_ranks, num_microbatches = 2 * half, 4 * half + 2 * extra
    times = ChunkTimes(unit, unit, unit, 3 * unit)
    published = {
        "1f1b": (num_ranks - 1) * 3 * unit,
        "zb1p": (num_ranks - 1) * unit,
        "dualpipe": (half - 1) * 2 * unit,
    }
    for name, bubble_ns in published.items():
        schedule = build_schedule(name, num_ranks, num_microbatches)
        assert set(bubbles_ns(schedule, times)) == {bubble_ns}, name


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_value(name: str) -> None:
    """The same call gives an equal, hashable, immutable table."""
    first, second = build_schedule(name, 4, 8), build_schedule(name, 4, 8)
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(AttributeError):
        first.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
