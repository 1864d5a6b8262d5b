"""Measuring single ops, and adding them to a profile that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mhcplan.profiles.capture import grid, machine
from mhcplan.profiles.capture.__main__ import main
from mhcplan.profiles.capture.measure import CommPart, OpsPart, extend, read_part
from mhcplan.profiles.schema import ProfileError, parse_profile, profile_text, read_profile
from mhcplan.profiles.vocabulary import op_key

if TYPE_CHECKING:
    from pathlib import Path

NORM = [op_key("norm", p, **grid.TINY["norm"]) for p in "FI"]
RESIDUAL = op_key("residual", "F", **grid.TINY["residual"])
QUICK = ["--device", "cpu", "--part", "ops", "--op-budget-ms", "0.01"]


def test_keys_of_a_file_are_added_to_a_profile(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    words = [*QUICK, "--out", str(first), "--name", "mine"]
    assert main([*words, "--op", str(NORM[0]), "--op", str(NORM[1])]) == 0
    keys = tmp_path / "more.keys"
    keys.write_text(f"{NORM[1]}\n{RESIDUAL}\n", encoding="utf-8")
    assert main([*QUICK, "--out", str(second), "--keys", str(keys), "--base", str(first)]) == 0
    base, found = read_profile(first), read_profile(second)
    assert [row.key for row in base.ops] == NORM
    assert {row.key for row in found.ops} == {*NORM, RESIDUAL}
    assert found.name == "mine"
    assert (found.rates, found.overheads, found.ops[0]) == (base.rates, base.overheads, base.ops[0])
    assert found.provenance == (*base.provenance, *found.provenance[-1:])
    again = {
        row.key: row for row in read_part(second.with_name("second.json.ops.json"), OpsPart).ops
    }
    assert {row.key: row for row in found.ops}[NORM[1]].duration_ns == again[NORM[1]].duration_ns


def test_only_what_a_profile_lacks_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    asked = [*QUICK, "--op", str(NORM[0]), "--op", str(NORM[1])]
    assert main([*QUICK, "--op", str(NORM[0]), "--out", str(first)]) == 0
    assert main([*asked, "--base", str(first), "--missing", "--out", str(second)]) == 0
    measured = read_part(second.with_name("second.json.ops.json"), OpsPart).ops
    assert [row.key for row in measured] == NORM[1:]
    assert {row.key for row in read_profile(second).ops} == set(NORM)
    assert main([*asked, "--missing", "--out", str(second)]) == 2
    assert "--base" in capsys.readouterr().err


def test_rows_that_spread_are_measured_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    keys = [*NORM, RESIDUAL]
    assert main([*QUICK, *(w for k in keys for w in ("--op", str(k))), "--out", str(first)]) == 0
    base = read_profile(first)
    rows = [row.model_copy(update={"spread_percent": 5.0 * i}) for i, row in enumerate(base.ops)]
    first.write_text(profile_text(base.model_copy(update={"ops": tuple(rows)})), encoding="utf-8")
    words = [*QUICK, "--base", str(first), "--spread-above", "5", "--out", str(second)]
    assert main(words) == 0
    measured = read_part(second.with_name("second.json.ops.json"), OpsPart).ops
    assert [row.key for row in measured] == [base.ops[2].key]
    found = read_profile(second).ops
    host_ns = min(measured[0].host_ns, rows[2].host_ns)
    assert found == (*rows[:2], measured[0].model_copy(update={"run": 1, "host_ns": host_ns}))


def test_rows_say_which_run_measured_them_and_stale_ones_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (tmp_path / f"{name}.json" for name in ("first", "second", "third"))
    monkeypatch.setattr(machine, "code_sha256", lambda: "old")
    assert main([*QUICK, "--out", str(first), "--op", str(NORM[0]), "--op", str(NORM[1])]) == 0
    monkeypatch.setattr(machine, "code_sha256", lambda: "new")
    words = [*QUICK, "--base", str(first), "--op", str(NORM[1]), "--op", str(RESIDUAL)]
    assert main([*words, "--out", str(second)]) == 0
    runs = {row.key: row.run for row in read_profile(second).ops}
    assert runs == {NORM[0]: 0, NORM[1]: 1, RESIDUAL: 1}
    assert main([*QUICK, "--base", str(second), "--stale", "--out", str(third)]) == 0
    measured = read_part(third.with_name("third.json.ops.json"), OpsPart).ops
    assert [row.key for row in measured] == NORM[:1]
    found = read_profile(third)
    assert {row.key: row.run for row in found.ops} == {**runs, NORM[0]: 2}
    lost = (found.ops[0].model_copy(update={"run": 9}), *found.ops[1:])
    text = profile_text(found.model_copy(update={"ops": lost}))
    with pytest.raises(ProfileError, match=r"ops\.0\.run: 9 is no entry of provenance"):
        parse_profile(text, "third.json")


def test_transfers_of_larger_groups_are_added(tmp_path: Path) -> None:
    assert main([*QUICK, "--out", str(tmp_path / "p.json"), "--op", str(RESIDUAL)]) == 0
    base = read_profile(tmp_path / "p.json")
    run = base.provenance[0].model_copy(update={"num_devices": 4})
    row = {"source": "measured", "pattern": "all_to_all", "group_size": 4, "bytes": 64,
           "duration_ns": 10}  # fmt: skip
    part = CommPart.model_validate(
        {"provenance": run.model_dump(), "communicator_bytes": 1, "transfers": [row]}
    )
    found = extend(base, None, [part])
    assert found.overheads.communicator_bytes == part.communicator_bytes
    assert base.overheads.communicator_bytes != part.communicator_bytes
    assert [(t.group_size, t.run) for t in found.transfers] == [(4, 1)]
    assert found.ops == base.ops
    again = extend(found, None, [part.model_copy(update={"communicator_bytes": 2})])
    assert again.provenance == found.provenance, "the run that was replaced is gone"
    assert again.transfers == found.transfers
    text = profile_text(found).replace('"run": 1', '"run": 7')
    with pytest.raises(ProfileError, match=r"transfers\.0\.run: 7 is no entry of provenance"):
        parse_profile(text, "x.json")
    other = part.model_copy(update={"provenance": run.model_copy(update={"device": "another"})})
    with pytest.raises(ProfileError, match="not on 'another'"):
        extend(base, None, [other])


def test_how_close_kernels_of_a_graph_are_is_the_last_runs_word(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    assert main([*QUICK, "--out", str(out), "--op", str(RESIDUAL)]) == 0
    base, part = read_profile(out), read_part(out.with_name("p.json.ops.json"), OpsPart)
    found = extend(base, part.model_copy(update={"graph_gap_ns": 1100}), [])
    assert found.overheads.graph_gap_ns == 1100
    assert found.digest != base.digest
    assert extend(found, part, []).overheads == found.overheads  # this one did not measure it


def test_the_shorter_time_of_a_host_stays(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    assert main([*QUICK, "--out", str(out), "--op", str(RESIDUAL)]) == 0
    base, part = read_profile(out), read_part(out.with_name("p.json.ops.json"), OpsPart)
    for times in (0.5, 2.0):
        measured = {"duration_ns": 7, "host_ns": round(times * base.ops[0].host_ns)}
        again = (part.ops[0].model_copy(update=measured),)
        (found,) = extend(base, part.model_copy(update={"ops": again}), []).ops
        assert found.duration_ns == 7
        assert found.host_ns == min(base.ops[0].host_ns, again[0].host_ns)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("norm.F hidden=64", "norm has axes"),
        ("brew.F cups=2", "brew"),
        ("all_to_all 2/2 64", "--part comm"),
    ],
)
def test_what_is_no_op_is_refused(
    key: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--out", str(tmp_path / "p.json"), "--op", key]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
