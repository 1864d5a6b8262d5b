"""Profiles on disk: found, refused with the field named, validated, compared."""

from __future__ import annotations

import json
import time
import timeit
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest

from mhcplan.profiles import store
from mhcplan.profiles.schema import (
    PROFILE_VERSION,
    Profile,
    ProfileError,
    parse_profile,
    profile_text,
    read_profile,
)
from mhcplan.profiles.store import (
    diff,
    find_profile,
    list_profiles,
    profile_file_text,
    profile_names,
    schema_text,
    shipped_profiles,
    validate,
    without_unused_runs,
)
from tests.support.scaling import scaled
from tests.support.synthetic_profile import make_synthetic_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.profiles.schema import OpTiming, TransferTiming

MISSING = object()
SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "schemas" / "profile.schema.json"
SMALL = make_synthetic_profile(("mhc-9b",), (2048,))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(profile_text(SMALL))
    return path


def change(file: Path, field: str, value: object) -> None:
    """Set the field at a dotted path, or remove it."""
    raw = json.loads(file.read_text())
    *outer, name = field.split(".")
    place = raw
    for part in outer:
        place = place[int(part) if isinstance(place, list) else part]
    if value is MISSING:
        del place[name]
    else:
        place[name] = value
    file.write_text(json.dumps(raw))


def refusal(file: Path) -> str:
    """The one line that reading ``file`` ends with, without the path."""
    with pytest.raises(ProfileError) as error:
        find_profile(str(file))
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{file}: ")
    return line.removeprefix(f"{file}: ")


def test_profile_survives_its_file(file: Path) -> None:
    assert find_profile(str(file)) == SMALL
    assert profile_file_text(str(file)) == profile_text(SMALL)
    assert validate(file) == []


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_are_sound(name: str) -> None:
    profile = find_profile(name)
    assert profile.name == name
    assert profile in list_profiles()


def test_shipped_profile_is_found_by_name(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    (file.parent / "data").mkdir()
    shipped = file.rename(file.parent / "data" / "h100-test.json")

    def package_files(_package: str) -> Path:
        return file.parent

    monkeypatch.setattr(store, "files", package_files)
    assert list(shipped_profiles()) == ["h100-test"]
    assert list_profiles() == [SMALL]
    assert find_profile("h100-test") == SMALL
    assert profile_file_text("h100-test") == shipped.read_text()
    with pytest.raises(
        ProfileError,
        match=r"^profile='h100-tst' is unknown; did you mean h100-test\?; or give the path of a",
    ):
        find_profile("h100-tst")


def test_two_thousand_rows_are_read_quickly(tmp_path: Path) -> None:
    """In some twice what JSON alone takes; ten would be a row checked in Python."""
    large = make_synthetic_profile(
        ("mhc-3b", "mhc-9b", "mhc-27b", "deepseek-v3"), (1024, 2048, 3072, 4096, 8192)
    )
    assert len(large.ops) > 2000
    path = tmp_path / "large.json"
    path.write_text(profile_text(large))

    def least_s(call: Callable[[], object]) -> float:
        return min(timeit.repeat(call, timer=time.process_time, number=1, repeat=5))

    assert least_s(lambda: read_profile(path)) < 10 * least_s(lambda: json.loads(path.read_text()))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.json: cannot be read"):
        find_profile(str(tmp_path / "none.json"))
    with pytest.raises(ProfileError, match=r"cannot be read"):
        find_profile(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("format", "mhcplan.plan", "format='mhcplan.plan' is not 'mhcplan.profile'"),
        ("format_version", MISSING, "format_version: is missing"),
        (
            "format_version",
            PROFILE_VERSION + 1,
            "format_version=2 is newer than this mhcplan reads",
        ),
        ("format_version", "1", "format_version: Input should be a valid integer"),
        ("rates", MISSING, "rates: Field required"),
        ("colour", "red", "colour: Extra inputs are not permitted"),
        ("ops.3.duration_us", 1, "ops.3.duration_us: Extra inputs are not permitted"),
        ("ops.3.duration_ns", 0.35, "ops.3.duration_ns: Input should be a valid integer"),
        ("ops.3.duration_ns", 350.0, "ops.3.duration_ns: Input should be a valid integer"),
        ("ops.3.duration_ns", "350", "ops.3.duration_ns: Input should be a valid integer"),
        ("ops.3.duration_ns", True, "ops.3.duration_ns: Input should be a valid integer"),
        ("ops.3.duration_ns", 0, "ops.3.duration_ns: Input should be greater than 0"),
        ("ops.3.kind", "mhc", "ops.3: kind='mhc' is not an op of this version"),
        ("ops.3.shape.tokens", MISSING, "ops.3: mhc_pre has axes"),
        ("ops.3.source", "guessed", "ops.3.source: Input should be 'measured' or 'assumed'"),
        ("ops.3.source", "assumed", "ops.3: source=assumed needs a citation"),
        ("transfers.0.group_size", 1, "transfers.0.group_size: Input should be greater than or"),
        ("transfers.0.group_size", 4, "transfers.0: group_size=4 must be 2: send_recv has"),
        ("overheads.launch_ns", MISSING, "overheads.launch_ns: Field required"),
    ],
)
def test_bad_field_is_named(file: Path, field: str, value: object, line: str) -> None:
    change(file, field, value)
    assert refusal(file).startswith(line)
    assert validate(file)[0].endswith(refusal(file))


@pytest.mark.parametrize("value", [1e308, 2**70, -1])
@pytest.mark.parametrize(
    "field",
    [
        "hardware.num_sms",
        "overheads.event_wait_ns",
        "overheads.allocator_margin_percent",
        "contention_model.parameters.num_sms",
        "contention_model.parameters.busy_delay",
        "contention_model.traffic.0.sent_hbm_factor",
        "power_model.idle_watts",
    ],
)
def test_figure_that_no_machine_has_is_named(tmp_path: Path, field: str, value: float) -> None:
    shipped = tmp_path / "shipped.json"
    shipped.write_text(profile_file_text("h100-sxm"))
    change(shipped, field, value)
    assert refusal(shipped).startswith(f"{field}: ")


@pytest.mark.parametrize("name", ["num_sms", "hbm_bytes_per_ns"])
def test_contention_on_no_machine_is_refused(tmp_path: Path, name: str) -> None:
    shipped = tmp_path / "shipped.json"
    shipped.write_text(profile_file_text("h100-sxm"))
    change(shipped, f"contention_model.parameters.{name}", 0)
    assert refusal(shipped).startswith(f"contention_model: parameters.{name}=0.0 must be at least")


def test_row_that_appears_twice_is_named(file: Path) -> None:
    raw = json.loads(file.read_text())
    change(file, "ops", [*raw["ops"], raw["ops"][0]])
    assert refusal(file) == f"profile: ops: {SMALL.ops[0].key} appears twice"


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        # microseconds where nanoseconds belong
        ("ops.3.duration_ns", 9, "ops.3.duration_ns: 9 ns for mhc_pre.B"),
        ("transfers.20.duration_ns", 3_000, "transfers.20.duration_ns: 3000 ns for 1073741824 byt"),
        # GB/s, TFLOP/s and GB where bytes belong
        ("rates.0.per_second", 3_000, "rates.0.per_second: 3000 of copy_bytes"),
        ("rates.1.per_second", 700, "rates.1.per_second: 700 of gemm_bf16_flops"),
        ("hardware.memory_bytes", 80, "hardware.memory_bytes: 80 bytes do not hold a CUDA"),
        ("hardware.memory_bytes_per_second", 3350, "hardware.memory_bytes_per_second: 3350 would"),
        ("hardware.bf16_flops_per_second", 989, "hardware.bf16_flops_per_second: 989 does not go"),
        ("hardware.inter_node.bytes_per_second", 50, "hardware.inter_node.bytes_per_second: 50 ag"),
    ],
)
def test_wrong_unit_is_refused(file: Path, field: str, value: object, line: str) -> None:
    change(file, field, value)
    assert refusal(file).startswith(line)
    assert "is the unit " in refusal(file)
    assert validate(file)[0] == refusal(file)


def test_profile_in_microseconds_is_refused(file: Path) -> None:
    rows = [
        {**row, "duration_ns": row["duration_ns"] // 1000 + 1}
        for row in json.loads(file.read_text())["ops"]
    ]
    change(file, "ops", rows)
    assert refusal(file).startswith("ops.0.duration_ns: ")


def test_slower_and_faster_machines_are_plausible(file: Path) -> None:
    """The bounds judge a profile against its own machine, whatever its speed."""
    for factor in (2, 50):
        file.write_text(profile_text(scaled(SMALL, factor)))
        assert validate(file) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused(file: Path, share: float) -> None:
    text = file.read_text()
    file.write_text(text[: int(share * len(text))])
    assert refusal(file).startswith("not valid JSON (")
    assert validate(file) == [f"{file}: {refusal(file)}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[1, 2]", "format is not 'mhcplan.profile': the file is no object"),
        ("9" * 5000, "not valid JSON (a number of too many digits)"),
        ("NaN", "not valid JSON (NaN is no number"),
        ('{"a":' * 50_000, "not valid JSON (nested too deeply)"),
    ],
)
def test_other_json_is_refused(file: Path, text: str, line: str) -> None:
    file.write_text(text)
    assert refusal(file).startswith(line)


def test_infinite_spread_is_refused(file: Path) -> None:
    text = file.read_text().replace('"spread_percent": 2.0', '"spread_percent": 1e999', 1)
    file.write_text(text)
    assert refusal(file).startswith("ops.0.spread_percent: Input should be a finite number")


def test_binary_file_is_refused(file: Path) -> None:
    file.write_bytes(b"\x80\xff\x00")
    assert refusal(file) == "is not a text file in UTF-8"


def test_validate_lists_every_problem(file: Path) -> None:
    change(file, "ops.1.duration_ns", -1)
    change(file, "ops.5.host_ns", "6")
    change(file, "rates.0.name", "copy")
    assert [line.split(":")[0] for line in validate(file)] == [
        "rates.0.name", "ops.1.duration_ns", "ops.5.host_ns",
    ]  # fmt: skip


def test_diff_of_equal_profiles_is_empty() -> None:
    found = diff(SMALL, SMALL)
    assert (found.added, found.removed, found.changed, found.other) == ((), (), (), ())
    assert found.unchanged == len(SMALL.ops) + len(SMALL.transfers) + len(SMALL.rates) + 7


def test_diff_names_what_decides_predictions_and_is_no_figure() -> None:
    hardware = SMALL.hardware
    slower = hardware.inter_node.model_copy(update={"bytes_per_second": 1})
    found = diff(
        SMALL,
        SMALL.model_copy(
            update={
                "name": "mine",
                "hardware": hardware.model_copy(update={"inter_node": slower}),
                "power_model": find_profile("h100-sxm").power_model,
            }
        ),
    )
    assert found.changed == ()
    assert found.other == ("hardware.inter_node.bytes_per_second", "power_model")


def test_diff_says_what_changed_and_by_how_much() -> None:
    first, second, *rest = SMALL.ops
    slower = first.model_copy(update={"duration_ns": round(first.duration_ns * 1.25)})
    nearly = second.model_copy(update={"duration_ns": round(second.duration_ns * 1.02)})
    changed = SMALL.model_copy(update={"ops": (slower, nearly, *rest[1:])})
    found = diff(SMALL, changed)
    assert found.removed == (str(rest[0].key),)
    assert found.added == ()
    by_row = {row.row: row for row in found.changed}
    assert by_row[str(first.key)].percent == pytest.approx(25, abs=0.1)
    assert by_row[str(first.key)].beyond_spread
    assert not by_row[str(second.key)].beyond_spread
    assert diff(changed, SMALL).added == found.removed


def test_runs_without_a_row_are_dropped_and_rows_still_name_theirs() -> None:
    run = SMALL.provenance[0]
    runs = [
        run.model_copy(update={"command": str(i), "num_devices": devices})
        for i, devices in enumerate((1, 1, 2, 1, 2, 2))
    ]
    ops = [row.model_copy(update={"run": 3}) for row in SMALL.ops]
    transfers = [row.model_copy(update={"run": 4}) for row in SMALL.transfers]

    def left(ops: list[OpTiming], transfers: list[TransferTiming]) -> str:
        changes = {"provenance": tuple(runs), "ops": tuple(ops), "transfers": tuple(transfers)}
        before = SMALL.model_copy(update=changes)
        after = without_unused_runs(before)
        assert parse_profile(profile_text(after), "after") == after
        for was, row in zip((*ops, *transfers), (*after.ops, *after.transfers), strict=True):
            assert (row.run is None) == (was.run is None)
            if was.run is not None and row.run is not None:
                assert after.provenance[row.run] == before.provenance[was.run]
        return "".join(run.command for run in after.provenance)

    assert left(ops, transfers) == "034"
    assert left(ops, list(SMALL.transfers)) == "02345"  # those do not say theirs
    assert left([*ops[1:], SMALL.ops[0]], transfers) == "0134"


def test_schema_file_is_current(published: Callable[[str, str], None]) -> None:
    published("profile", schema_text())


def test_schema_accepts_profiles_and_refuses_broken_ones() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    raw = json.loads(profile_text(SMALL))
    jsonschema.validate(raw, schema)
    for broken in ({"format": "other"}, {"ops": [{"kind": "norm"}]}, {"surprise": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**raw, **broken}, schema)


def test_file_text_is_one_row_a_line() -> None:
    lines = profile_text(SMALL).splitlines()
    assert sum('"kind": ' in line for line in lines if line.lstrip().startswith("{")) == len(
        SMALL.ops
    )


def test_digest_follows_content() -> None:
    again = Profile.model_validate_json(profile_text(SMALL))
    assert again.digest == SMALL.digest
    assert SMALL.model_copy(update={"name": "other"}).digest != SMALL.digest
