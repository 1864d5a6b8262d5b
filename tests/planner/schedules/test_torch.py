"""torch's own generators as the independent oracle, token for token."""

from __future__ import annotations

import pytest

from mhcplan.planner.schedules.catalogue import SCHEDULES, Schedule, build_schedule
from mhcplan.planner.schedules.p2p import place_messages

torch_schedules = pytest.importorskip(
    "torch.distributed.pipelining.schedules", reason="torch is the oracle and is not installed"
)
visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")

COMPUTE = {"F", "I", "W", "B", "OVERLAP_F_B"}


def _tokens(schedule: Schedule) -> list[list[str]]:
    return [[str(action) for action in row] for row in schedule.actions]


def _torch_tokens(name: str, num_ranks: int, num_microbatches: int) -> list[list[str]]:
    """Compute actions of torch's schedule, without idle slots and gradient reduction."""
    rows = visualizer.get_schedule_ops(name, num_ranks, num_microbatches)
    return [[str(a) for a in row if a and a.computation_type.value in COMPUTE] for row in rows]


@pytest.mark.parametrize(
    ("ours", "theirs", "least_per_rank"),
    [
        ("interleaved-1f1b", "Interleaved1F1B", 0),
        ("zbv", "ZBVZeroBubble", 0),
        ("dualpipev", "DualPipeV", 2),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_rows_are_torchs(ours: str, theirs: str, least_per_rank: int, num_ranks: int) -> None:
    """Same order for few, just enough and many microbatches."""
    compared = 0
    for num_microbatches in (1, 3, 4, 8, 15, 16, 20, 24):
        if num_microbatches < least_per_rank * num_ranks:
            continue
        if ours == "interleaved-1f1b" and num_microbatches % max(1, num_microbatches // num_ranks):
            continue
        schedule = build_schedule(ours, num_ranks, num_microbatches)
        assert _tokens(schedule) == _torch_tokens(theirs, num_ranks, num_microbatches)
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("per_rank", [1, 2, 5])
def test_1f1b_is_torchs_but_for_its_last_rank(num_ranks: int, per_rank: int) -> None:
    """torch 2.13 counts the last rank's F from 1 to M there, so it leaves out microbatch 0."""
    ours = _tokens(build_schedule("1f1b", num_ranks, per_rank * num_ranks))
    theirs = _torch_tokens("1F1B", num_ranks, per_rank * num_ranks)
    assert ours[:-1] == theirs[:-1]
    assert [token.split("F")[0] for token in ours[-1]] == [t.split("F")[0] for t in theirs[-1]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_microbatches", [1, 3, 8, 20])
def test_zb1p_is_torchs_interleaved_zero_bubble_with_one_stage(
    num_ranks: int, num_microbatches: int
) -> None:
    """torch has ZB1P for two or more stages a rank; its row function takes one as well."""
    expected: list[list[str]] = []
    for rank in range(num_ranks):

        def only_stage(_: int, stage: int = rank) -> int:
            return stage

        warm_up = torch_schedules._get_warmup_ops(
            rank, 1, num_microbatches, num_ranks, num_microbatches, multiply_factor=1
        )
        row = torch_schedules._get_1f1b_rank_ops(
            1,
            num_ranks,
            warm_up,
            num_microbatches - warm_up,
            warm_up,
            rank,
            only_stage,
            only_stage,
            num_1f1b_microbatches=rank,
            enable_zero_bubble=True,
        )
        expected.append([str(action) for action in row if action])
    assert _tokens(build_schedule("zb1p", num_ranks, num_microbatches)) == expected


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "dualpipe"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_eager_messages_are_torchs_lowering(name: str, num_ranks: int) -> None:
    """torch inserts the same sends and receives at the same places (one copy of the model)."""
    schedule = build_schedule(name, num_ranks, 4 * num_ranks)
    parse = torch_schedules._Action.from_str

    def stage_to_rank(stage: int) -> int:
        return schedule.rank_of(stage, 0)

    lowered = torch_schedules._add_send_recv(
        {rank: [parse(text) for text in row] for rank, row in enumerate(_tokens(schedule))},
        stage_to_rank=stage_to_rank,
        num_stages=schedule.num_stages,
    )
    for rank, slots in enumerate(place_messages(schedule)):
        row: list[str] = []
        for slot, action in zip(slots, (*schedule.actions[rank], None), strict=True):
            row += map(str, slot)
            row += [str(action)] if action else []
        assert row == [str(action) for action in lowered[rank]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_torch_reads_our_actions_back(name: str) -> None:
    """Every action is valid in torch's grammar and prints the same there."""
    for row in _tokens(build_schedule(name, 4, 8)):
        assert [str(torch_schedules._Action.from_str(text)) for text in row] == row


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "dualpipe"])
def test_torch_finds_our_tables_valid(name: str) -> None:
    """torch's validator accepts them and finds the stages where we put them."""
    schedule = build_schedule(name, 4, 8)
    parse = torch_schedules._Action.from_str
    rows = {rank: [parse(text) for text in row] for rank, row in enumerate(_tokens(schedule))}
    mapping = torch_schedules._validate_schedule(rows, 4, schedule.num_stages, 8)
    assert mapping == {stage: schedule.rank_of(stage, 0) for stage in range(schedule.num_stages)}
