"""The checker of torch CSVs: sound tables pass, every way of breaking one is found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mhcplan.planner.check.torch_csv import check_rows
from mhcplan.planner.export.torch_csv import (
    compute_comms_rows,
    compute_only_rows,
    exported_schedule,
)
from mhcplan.planner.schedules.catalogue import SCHEDULES, build_schedule

if TYPE_CHECKING:
    from collections.abc import Callable

Table = list[list[str]]

ONE_COPY = [name for name in SCHEDULES if name != "dualpipe"]


def comms(name: str, num_ranks: int = 2, microbatches: int = 8) -> Table:
    return [list(row) for row in compute_comms_rows(build_schedule(name, num_ranks, microbatches))]


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ONE_COPY)
def test_exported_tables_are_sound(name: str, num_ranks: int, recomputes: bool) -> None:
    schedule = build_schedule(name, num_ranks, 4 * num_ranks)
    schedule = exported_schedule(schedule, recomputes=recomputes)
    assert check_rows(compute_only_rows(schedule), num_microbatches=4 * num_ranks) == []
    assert check_rows(compute_comms_rows(schedule), num_microbatches=4 * num_ranks) == []


@pytest.mark.parametrize("num_ranks", [2, 4, 6])
def test_dualpipe_is_sound_as_two_copies_and_not_as_one(num_ranks: int) -> None:
    rows = compute_comms_rows(build_schedule("dualpipe", num_ranks, 4 * num_ranks))
    assert check_rows(rows, directions=2, num_microbatches=2 * num_ranks) == []
    assert check_rows(rows) != []


def _drop(text: str) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        row = next(row for row in table if text in row)
        row.remove(text)

    return change


def _double(text: str) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        row = next(row for row in table if text in row)
        row.insert(row.index(text), text)

    return change


def _swap(first: str, second: str) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        row = next(row for row in table if first in row)
        i, j = row.index(first), row.index(second)
        row[i], row[j] = row[j], row[i]

    return change


def _replace(old: str, new: str) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        row = next(row for row in table if old in row)
        row[row.index(old)] = new

    return change


def _move_to_front(text: str) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        row = next(row for row in table if text in row)
        row.remove(text)
        row.insert(2, text)  # after both UNSHARD

    return change


def _move_after(text: str, after: str) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        row = next(row for row in table if text in row)
        row.remove(text)
        row.insert(row.index(after) + 1, text)

    return change


PAIR = "(0F3;3B1)OVERLAP_F_B"

# on dualpipev with 2 ranks and 8 microbatches
MUTATIONS: list[tuple[str, str, Callable[[Table], None]]] = [
    ("grammar", "torch reads 0B without a microbatch", _replace("0F1", "0BW1")),
    ("grammar", "torch reads 0F1", _replace("0F1", "0F1garbage")),
    ("grammar", "lower case", _replace("0F1", "0f1")),
    ("grammar", "torch finds out when it runs", _replace(PAIR, "()OVERLAP_F_B")),
    ("grammar", "a pair of F and I", _replace(PAIR, "(0F3;3I1)OVERLAP_F_B")),
    ("grammar", "three in a pair", _replace(PAIR, "(0F3;3B1;3B2)OVERLAP_F_B")),
    ("grammar", "B before F", _replace(PAIR, "(3B1;0F3)OVERLAP_F_B")),
    ("rows", "blank line", lambda table: table.append([])),
    ("rows", "idle slot beside communication", _replace("0F1", "")),
    ("rows", "no ranks", lambda table: table.clear()),
    ("stages", "a stage on two ranks", lambda table: table[1].append("0F0")),
    ("stages", "a stage left out", lambda table: table[1].append("9F0")),
    ("stages", "reduction of another rank's stage", lambda table: table[1].append("0REDUCE_GRAD")),
    ("counts", "no forward", _drop("0F1")),
    ("counts", "forward twice", _double("0F1")),
    ("counts", "no backward", _drop("2B0")),
    ("counts", "no W", _drop("3W0")),
    ("counts", "I and B", _replace("3W0", "3B0")),
    ("counts", "microbatch of no number", _replace("0F1", "0F99999999999")),
    ("order", "backward before forward", _swap("3F0", "3I0")),
    ("order", "W before I", _swap("3I0", "3W0")),
    ("order", "losses not ascending", _swap("3F0", "3F1")),
    ("messages", "no receive", _drop("3RECV_F0")),
    ("messages", "no send", _drop("0SEND_F0")),
    ("messages", "receive twice", _double("3RECV_F0")),
    ("messages", "send before its forward", _swap("0F0", "0SEND_F0")),
    ("messages", "receive after its forward", _swap("3RECV_F0", "3F0")),
    ("messages", "message inside a rank", lambda table: table[1].append("1SEND_F0")),
    ("pairing", "sends swapped at one end", _move_after("0SEND_F0", "0SEND_F1")),
    ("pairing", "receives swapped at one end", _move_to_front("3RECV_F1")),
    ("reduction", "gradients M times too large", _drop("0REDUCE_GRAD")),
    ("reduction", "reduced twice", _double("0REDUCE_GRAD")),
    ("reduction", "reduced too early", _move_to_front("0REDUCE_GRAD")),
    ("sharding", "computed before it is gathered", _drop("0UNSHARD")),
    ("sharding", "gathered twice", _double("0UNSHARD")),
    ("sharding", "released too early", _move_to_front("0RESHARD")),
]


@pytest.mark.parametrize(
    ("rule", "change"), [(r, c) for r, _, c in MUTATIONS], ids=[w for _, w, _ in MUTATIONS]
)
def test_every_mutation_is_found(rule: str, change: Callable[[Table], None]) -> None:
    table = comms("dualpipev")
    assert check_rows(table) == []
    before = [list(row) for row in table]
    change(table)
    assert table != before
    findings = check_rows(table)
    assert {finding.rule for finding in findings} == {rule}, findings
    for finding in findings:
        assert "\n" not in finding.message


def test_ranks_that_wait_for_each_other_are_a_deadlock() -> None:
    """Each rank's row is in order; together they are not: 1F1B's last rank asks for F1 first."""
    table = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
    findings = check_rows(table)
    assert {finding.rule for finding in findings} == {"deadlock"}
    assert [finding.message for finding in findings] == [
        "rank 0, cell 1: 0B0 waits for ever",
        "rank 1, cell 1: 1F1 waits for ever",
    ]


def test_idle_slots_of_compute_only_are_no_fault() -> None:
    assert check_rows([["0F0", "", "", "0B0"], ["", "1F0", "1B0", ""]]) == []


def test_microbatches_must_be_those_of_the_schedule() -> None:
    rows = compute_only_rows(build_schedule("1f1b", 2, 4))
    assert check_rows(rows, num_microbatches=4) == []
    for wrong in (3, 5):
        assert {f.rule for f in check_rows(rows, num_microbatches=wrong)} == {"counts"}


def test_of_many_findings_twenty_are_listed() -> None:
    findings = check_rows([["x"] * 50])
    assert len(findings) == 21
    assert findings[-1].message == "and 30 more findings of this rule"
