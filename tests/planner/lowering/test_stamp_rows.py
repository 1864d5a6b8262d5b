"""Where messages and releases stand among a rank's actions."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

import pytest

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.schedules.catalogue import build_schedule

if TYPE_CHECKING:
    from mhcplan.sim.program import Program

MODEL = {
    "name": "m", "num_blocks": 8, "hidden_size": 256, "vocab_size": 1024, "dense_ffn_dim": 512,
    "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 4},
}  # fmt: skip
SCHEDULES = ("1f1b", "interleaved-1f1b", "zb1p", "zbv", "dualpipe", "dualpipev")


def lowered(schedule: str, p2p: str = "eager") -> Program:
    return lower(
        make_plan(
            {
                "model": MODEL, "schedule": schedule, "microbatches": 8, "seq_len": 128,
                "layout": {"pp": 4}, "p2p": p2p,
            }
        ),
        2,
    )  # fmt: skip


def cells_of(program: Program, rank: int) -> list[str]:
    """Cells of a rank in host issue order."""
    begin, end = program.rank_offsets[rank : rank + 2]
    return [cell for cell, _ in groupby(program.cells[k] for k in program.cell[begin:end])]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eager_messages_travel_beside_an_action(schedule: str) -> None:
    """A receive is posted before the action ahead of the one that needs it, a send is waited for
    behind the action after the one that made it."""
    program = lowered(schedule)
    for rank, row in enumerate(build_schedule(schedule, 4, 8).actions):
        cells = cells_of(program, rank)
        at = [cells.index(str(action)) for action in row]
        for k, part in ((k, part) for k, action in enumerate(row) for part in action.parts):
            letter = "F" if part.kind == "F" else "B"
            receive, send, release = (
                f"{part.stage}{what}_{letter}{part.microbatch}"
                for what in ("RECV", "SEND", "RELEASE")
            )
            if part.kind != "W" and receive in cells:
                assert cells.index(receive) < at[max(k - 1, 0)]
            if part.kind != "W" and send in cells:
                assert at[k] < cells.index(send) < cells.index(release)
                assert k + 1 == len(row) or at[k + 1] < cells.index(release)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_grouped_messages_are_waited_for_at_once(schedule: str) -> None:
    program = lowered(schedule, "grouped")
    for rank in range(4):
        for at, cell in enumerate(cells := cells_of(program, rank)):
            if match := re.fullmatch(r"(\d+)SEND_([FB])(\d+)", cell):
                stage, letter, microbatch = match.groups()
                release = cells.index(f"{stage}RELEASE_{letter}{microbatch}")
                between = cells[at + 1 : release]
                assert all(re.search("SEND|RECV|AWAIT|RELEASE", other) for other in between)


def test_ranks_of_dualpipe_that_mirror_each_other_post_alike() -> None:
    """The two in the middle send to each other at once: first come, first served would differ."""
    program = lowered("dualpipe")

    def kinds(rank: int) -> list[str]:
        return [re.sub(r"\d+", "", cell) for cell in cells_of(program, rank)]

    assert kinds(0) == kinds(3)
    assert kinds(1) == kinds(2)
