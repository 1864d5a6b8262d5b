"""Schedules against golden files, DualPipe's published counts, formulas and simulated bubbles."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import pytest

from mhcplan.planner.schedules.actions import Action, parse_action
from mhcplan.planner.schedules.catalogue import SCHEDULES, Schedule, ScheduleError, build_schedule
from mhcplan.planner.schedules.graph import (
    ChunkTimes,
    Waits,
    bubbles_ns,
    chunk_graph,
    end_times_ns,
    peak_live_chunks,
)
from mhcplan.planner.schedules.p2p import P2P, place_messages

if TYPE_CHECKING:
    from collections.abc import Callable

EQUAL = ChunkTimes(forward_ns=10, input_grad_ns=10, weight_grad_ns=10, overlap_ns=30)


def makespan_ns(schedule: Schedule, times: ChunkTimes, p2p: P2P = "eager") -> int:
    """Step time of a table."""
    return max(end_times_ns(schedule, times, p2p).values())


# ---- Actions ----


@pytest.mark.parametrize(
    "action",
    [
        Action("F", 2, 0),
        Action("I", 0, 13),
        Action("W", 10, 1),
        Action("B", 7, 20),
        Action.overlap(Action("F", 0, 13), Action("B", 7, 5)),
    ],
    ids=str,
)
def test_an_action_reads_back_as_printed(action: Action) -> None:
    """Printing and parsing are inverse."""
    assert parse_action(str(action)) == action


@pytest.mark.parametrize(
    "text",
    [
        "",
        "F0",
        "0F",
        "0f1",
        " 0F1",
        "0F1\n",
        "0F10garbage",
        "0BW1",
        "00F1",
        "0F01",
        "-1F0",
        "٣F0",
        "0SEND_F1",
        "()OVERLAP_F_B",
        "(0F1)OVERLAP_F_B",
        "(0F1;3B0)",
        "(0F1;3B0)OVERLAP_F_B7",
        " (0F1;3B0)OVERLAP_F_B",
        "(3B0;0F1)OVERLAP_F_B",
        "(0F1;3I0)OVERLAP_F_B",
        "(0F1;3B0;1W0)OVERLAP_F_B",
        "((0F1;3B0)OVERLAP_F_B;1B0)OVERLAP_F_B",
    ],
)
def test_what_is_not_an_action_is_refused(text: str) -> None:
    """The parser is strict where torch's is not."""
    with pytest.raises(ValueError, match="must look like 2F0, 2I0, 2W0, 2B0 or"):
        parse_action(text)


def test_a_pair_is_its_forward_beside_its_backward() -> None:
    """A pair is named by its forward and has both as parts."""
    forward, backward = Action("F", 0, 3), Action("B", 3, 1)
    pair = Action.overlap(forward, backward)
    assert pair.parts == (forward, backward)
    assert (pair.kind, pair.stage, pair.microbatch) == ("OVERLAP", 0, 3)
    assert forward.parts == (forward,)


# ---- Tables ----


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches"),
    [
        ("1f1b", 4, 8),
        ("interleaved-1f1b", 4, 8),
        ("zb1p", 4, 8),
        ("zbv", 4, 8),
        ("dualpipe", 4, 8),
        ("dualpipe", 8, 20),
        ("dualpipev", 4, 8),
        ("dualpipev", 1, 4),
    ],
)
def test_tables_are_the_reviewed_ones(
    golden: Callable[[str, str], None], name: str, num_ranks: int, num_microbatches: int
) -> None:
    """Every row as torch would write it (``compute_only``), one line a rank."""
    schedule = build_schedule(name, num_ranks, num_microbatches)
    text = "".join(",".join(map(str, row)) + "\n" for row in schedule.actions)
    golden(f"{name}_p{num_ranks}_m{num_microbatches}.csv", text)


def test_grouped_messages_are_the_reviewed_ones(golden: Callable[[str, str], None]) -> None:
    """DualPipe's batches: in brackets what is posted at once and waited for by the next action."""
    schedule = build_schedule("dualpipe", 4, 8)
    lines: list[str] = []
    for row, slots in zip(schedule.actions, place_messages(schedule, "grouped"), strict=True):
        cells: list[str] = []
        for slot, action in zip(slots, (*row, None), strict=True):
            cells += [f"[{' '.join(map(str, slot))}]"] if slot else []
            cells += [str(action)] if action else []
        lines.append(",".join(cells) + "\n")
    golden("dualpipe_p4_m8_grouped.csv", "".join(lines))


def test_dualpipe_names_a_chunk_by_stage_and_global_microbatch() -> None:
    """Stage 0 is on ranks 0 and P-1; microbatches from M/2 on travel from rank P-1 to rank 0."""
    schedule = build_schedule("dualpipe", 4, 8)
    assert [schedule.direction_of(m) for m in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [schedule.rank_of(s, 3) for s in range(4)] == [0, 1, 2, 3]
    assert [schedule.rank_of(s, 4) for s in range(4)] == [3, 2, 1, 0]
    assert [schedule.stages_of(r) for r in range(4)] == [(0, 3), (1, 2), (2, 1), (3, 0)]


def test_loop_and_v_hold_two_stages_of_one_copy() -> None:
    """Interleaved goes around twice; the V schedules go down and back up."""
    loop, v = build_schedule("interleaved-1f1b", 3, 6), build_schedule("zbv", 3, 6)
    assert [loop.stages_of(r) for r in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert [v.stages_of(r) for r in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert (loop.num_stages, loop.num_ranks, loop.num_directions) == (6, 3, 1)


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("extra", [0, 2, 10])
def test_dualpipe_counts(num_ranks: int, extra: int) -> None:
    """Pairs, split and delayed chunks per rank in closed form."""
    num_microbatches = 2 * num_ranks + extra
    schedule = build_schedule("dualpipe", num_ranks, num_microbatches)
    for rank, row in enumerate(schedule.actions):
        position = min(rank, num_ranks - 1 - rank)
        is_middle = position == num_ranks // 2 - 1
        pairs = num_microbatches - 3 * num_ranks // 2 + position + 1 - is_middle
        split = num_ranks - position - 1
        kinds = [action.kind for action in row]
        assert kinds.count("OVERLAP") == pairs
        assert kinds.count("F") == num_microbatches - pairs
        assert kinds.count("I") == kinds.count("W") == split
        assert kinds.count("B") == num_microbatches - pairs - split
        at_once = kinds[: kinds.index("OVERLAP")].count("W")
        assert at_once == num_ranks // 2 - 1 - position
        queued = list(accumulate({"I": 1, "W": -1}.get(kind, 0) for kind in kinds))
        assert max(queued) <= position + 1
        assert queued[-1] == 0


# ---- Memory ----


@pytest.mark.parametrize("num_ranks", [4, 8, 16])
@pytest.mark.parametrize("extra", [0, 6])
def test_dualpipe_keeps_one_more_chunk_than_ranks(num_ranks: int, extra: int) -> None:
    """P+1 on every rank, as an overlapped pair allocates its F before its B frees."""
    schedule = build_schedule("dualpipe", num_ranks, 2 * num_ranks + extra)
    assert peak_live_chunks(schedule) == (num_ranks + 1,) * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_other_peaks(num_ranks: int) -> None:
    """1F1B and ZB1P fall from P to 1 along the ranks; the V schedules are level."""
    falling = tuple(range(num_ranks, 0, -1))
    num_microbatches = 3 * num_ranks
    peaks = {
        name: peak_live_chunks(build_schedule(name, num_ranks, num_microbatches))
        for name in ("1f1b", "zb1p", "zbv", "dualpipev", "interleaved-1f1b")
    }
    level = (2 * num_ranks,) * num_ranks
    assert peaks["1f1b"] == peaks["zb1p"] == falling
    assert peaks["zbv"] == level
    assert peaks["dualpipev"] == tuple(n + 1 for n in level)
    assert peaks["interleaved-1f1b"] == tuple(
        num_ranks + 1 + 2 * (num_ranks - 1 - rank) for rank in range(num_ranks)
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8])
def test_zb1p_needs_no_more_than_1f1b(num_ranks: int) -> None:
    """Live chunks and queued W together reach exactly P on every rank."""
    for row in build_schedule("zb1p", num_ranks, 2 * num_ranks).actions:
        held = peak = 0
        for action in row:
            held += {"F": 1, "I": 0, "W": -1}[action.kind]
            peak = max(peak, held)
        assert peak == num_ranks


# ---- Bubbles ----


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("per_rank", [1, 2, 5])
@pytest.mark.parametrize("times", [EQUAL, ChunkTimes(7, 9, 4, 20)], ids=["equal", "unequal"])
def test_bubbles_of_the_one_way_schedules(num_ranks: int, per_rank: int, times: ChunkTimes) -> None:
    """1F1B and interleaved: (P-1)(F+B); ZB1P: (P-1)(F+B-2W) as W <= F, I."""
    forward, backward = times.forward_ns, times.input_grad_ns + times.weight_grad_ns
    expected = {
        "1f1b": forward + backward,
        "interleaved-1f1b": forward + backward,
        "zb1p": forward + backward - 2 * times.weight_grad_ns,
    }
    for name, per_hop in expected.items():
        schedule = build_schedule(name, num_ranks, per_rank * num_ranks)
        assert set(bubbles_ns(schedule, times)) == {(num_ranks - 1) * per_hop}, name


@pytest.mark.parametrize("num_ranks", [2, 4, 6, 8, 16])
@pytest.mark.parametrize("extra", [0, 4])
def test_dualpipe_bubble_is_the_published_one_for_equal_times(num_ranks: int, extra: int) -> None:
    """(P/2-1)(F&B + B - 3W) with F = I = W and F&B = F+B, on every rank."""
    schedule = build_schedule("dualpipe", num_ranks, 2 * num_ranks + extra)
    assert set(bubbles_ns(schedule, EQUAL)) == {(num_ranks // 2 - 1) * (30 + 20 - 30)}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_dualpipev_bubble_is_dualpipes_of_twice_the_stages(num_ranks: int) -> None:
    """(P-1)(F&B + B - 3W) on P ranks with 2P stages."""
    schedule = build_schedule("dualpipev", num_ranks, 2 * num_ranks + 3)
    assert set(bubbles_ns(schedule, EQUAL)) == {(num_ranks - 1) * (30 + 20 - 30)}


@pytest.mark.parametrize(
    ("times", "eager", "buffered", "grouped"),
    [
        ((10, 10, 10, 30), (60, 60), (60, 60), (60, 60)),
        ((10, 10, 10, 25), (35, 45), (35, 45), (35, 45)),
        ((10, 10, 10, 20), (10, 30), (10, 30), (10, 30)),
        ((10, 14, 10, 30), (54, 62), (54, 62), (54, 62)),
        ((10, 20, 10, 34), (80, 92), (80, 92), (80, 92)),
        ((10, 12, 8, 26), (52, 60), (52, 60), (52, 60)),
        ((10, 8, 10, 24), (40, 48), (42, 50), (48, 56)),
        ((10, 10, 12, 26), (30, 42), (30, 42), (36, 48)),
        ((13, 11, 10, 29), (56, 66), (58, 68), (58, 68)),
        ((8, 10, 10, 25), (33, 39), (33, 39), (33, 39)),
    ],
)
def test_dualpipe_bubbles_for_unequal_times(
    times: tuple[int, int, int, int],
    eager: tuple[int, int],
    buffered: tuple[int, int],
    grouped: tuple[int, int],
) -> None:
    """P=8, M=20, messages for free: what the published formula does not say.

    An independent simulation of DualPipe found the ``buffered`` figures, least and most of all
    ranks. They differ from ``eager`` where F or W is longer than I: a receive that DualPipe posts
    early then holds back an action that does not need it.
    """
    schedule = build_schedule("dualpipe", 8, 20)
    expected: dict[Waits, tuple[int, int]] = {
        "eager": eager, "buffered": buffered, "grouped": grouped,
    }  # fmt: skip
    for p2p, figures in expected.items():
        bubbles = bubbles_ns(schedule, ChunkTimes(*times), p2p)
        assert (min(bubbles), max(bubbles)) == figures, p2p


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("extra", [0, 5])
def test_zbv_has_no_wait_inside_for_equal_times(num_ranks: int, extra: int) -> None:
    """From its first to its last action a rank always works."""
    schedule = build_schedule("zbv", num_ranks, 2 * num_ranks - 1 + extra)
    end_ns = end_times_ns(schedule, EQUAL)
    for row in schedule.actions:
        start_ns = end_ns[row[0]] - EQUAL.of(row[0])
        assert end_ns[row[-1]] - start_ns == sum(map(EQUAL.of, row))
    assert set(bubbles_ns(schedule, EQUAL)) == {(num_ranks - 1) * EQUAL.forward_ns}


# ---- Messages ----


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_one_microbatch_pays_every_hop_between_ranks_twice(num_ranks: int) -> None:
    """Down with its activation and back with its gradient; the turn of a V is local."""
    hops = {
        "1f1b": num_ranks - 1,
        "zb1p": num_ranks - 1,
        "interleaved-1f1b": 2 * num_ranks - 1,
        "zbv": 2 * num_ranks - 2,
    }
    for name, count in hops.items():
        schedule = build_schedule(name, num_ranks, 1)
        extra_ns = makespan_ns(schedule, ChunkTimes(10, 10, 10, 30, 7)) - makespan_ns(
            schedule, EQUAL
        )
        assert extra_ns == 2 * count * 7, name


@pytest.mark.parametrize("message_ns", [1, 10, 70])
@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "latencies"),
    [("dualpipe", p, m, m + 2 * p - 4) for p, m in [(4, 8), (6, 14), (8, 20), (12, 30), (16, 64)]]
    + [("dualpipev", p, m, 2 * m + 4 * p - 5) for p, m in [(3, 6), (4, 8), (8, 20)]],
)
def test_grouped_messages_cost_a_fixed_number_of_latencies(
    name: str, num_ranks: int, num_microbatches: int, latencies: int, message_ns: int
) -> None:
    """DualPipe: M + 2P - 4 of them for F = I = W, from P = 4 on; one more in part if above F."""
    schedule = build_schedule(name, num_ranks, num_microbatches)
    with_messages = ChunkTimes(10, 10, 10, 30, message_ns)
    extra_ns = makespan_ns(schedule, with_messages, "grouped") - makespan_ns(schedule, EQUAL)
    beyond_ns = max(0, message_ns - EQUAL.forward_ns) * schedule.num_stages // num_ranks
    assert extra_ns == latencies * message_ns + beyond_ns


@pytest.mark.parametrize("num_microbatches", [4, 6, 20])
def test_two_dualpipe_ranks_exchange_fewer_messages(num_microbatches: int) -> None:
    """Both ranks are the middle: M/2 + 1 latencies."""
    schedule = build_schedule("dualpipe", 2, num_microbatches)
    extra_ns = makespan_ns(schedule, ChunkTimes(10, 10, 10, 30, 7), "grouped") - makespan_ns(
        schedule, EQUAL
    )
    assert extra_ns == (num_microbatches // 2 + 1) * 7


def test_grouped_batches_keep_w_from_filling_a_wait() -> None:
    """In step 3 W waits for F1's receive, which shows as soon as W is longer than I."""
    schedule, times = build_schedule("dualpipe", 8, 20), ChunkTimes(10, 10, 12, 26)
    assert makespan_ns(schedule, times, "eager") == 616
    assert makespan_ns(schedule, times, "grouped") == 622


# ---- Errors ----


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "message"),
    [
        (
            "gpipe",
            4,
            8,
            "schedule='gpipe' must be one of 1f1b, interleaved-1f1b, zb1p, zbv, dualpipe, "
            "dualpipev",
        ),
        ("dualpipe", 3, 8, "pp=3 must be even for dualpipe: ranks mirror each other"),
        ("dualpipe", 1, 8, "pp=1 must be even for dualpipe: ranks mirror each other"),
        (
            "dualpipe",
            4,
            9,
            "microbatches=9 must be even for dualpipe: half of them go each way",
        ),
        (
            "dualpipe",
            8,
            14,
            "microbatches=14 must be at least 16 for dualpipe with pp=8: two a rank",
        ),
        (
            "dualpipev",
            4,
            7,
            "microbatches=7 must be at least 8 for dualpipev with pp=4: two a rank",
        ),
        (
            "interleaved-1f1b",
            4,
            11,
            "microbatches=11 must split into 2 equal rounds for interleaved-1f1b with pp=4: "
            "10 or 12 do",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(
    name: str, num_ranks: int, num_microbatches: int, message: str
) -> None:
    """The field, its value and what is valid."""
    with pytest.raises(ScheduleError) as raised:
        build_schedule(name, num_ranks, num_microbatches)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", SCHEDULES)
def test_numbers_below_one_are_told_in_one_line(name: str) -> None:
    """No schedule takes an empty pipeline or an empty step."""
    for field, pp, microbatches in (("pp", 0, 8), ("pp", -2, 8), ("microbatches", 2, 0)):
        with pytest.raises(ScheduleError) as raised:
            build_schedule(name, pp, microbatches)
        value = pp if field == "pp" else microbatches
        assert str(raised.value) == f"{field}={value} must be at least 1"


def test_rounds_that_the_error_names_are_valid() -> None:
    """Both numbers proposed for interleaved 1F1B build."""
    for num_ranks in range(1, 9):
        for num_microbatches in range(1, 80):
            try:
                build_schedule("interleaved-1f1b", num_ranks, num_microbatches)
            except ScheduleError as error:
                below, above = str(error).rsplit(": ", 1)[1].removesuffix(" do").split(" or ")
                assert int(below) < num_microbatches < int(above)
                build_schedule("interleaved-1f1b", num_ranks, int(below))
                build_schedule("interleaved-1f1b", num_ranks, int(above))


def test_a_deadlock_is_told_with_the_actions_that_wait() -> None:
    """Two ranks that each want the other's output first."""
    good = build_schedule("1f1b", 2, 2)
    crossed = tuple(map(parse_action, ("0F0", "0B0", "0F1", "0B1")))
    late = tuple(map(parse_action, ("1F0", "1F1", "1B0", "1B1")))
    bad = Schedule("1f1b", 2, good.placement, (crossed, late).__getitem__)
    message = "schedule='1f1b' deadlocks before 0B0, 1F1"
    with pytest.raises(ScheduleError, match=message):
        end_times_ns(bad, EQUAL)
    with pytest.raises(ScheduleError, match=message):
        place_messages(bad)
    assert sorted(chunk_graph(good).nodes) == sorted(a for row in good.actions for a in row)
