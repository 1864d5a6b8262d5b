"""What is written is read back exactly, and what cannot be read says why in one line."""

from __future__ import annotations

import base64
import contextlib
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.sim.engine import simulate
from mhcplan.sim.file_schemas import schema_text
from mhcplan.sim.files import (
    FormatError,
    Trace,
    parse_program,
    parse_trace,
    program_json,
    read_program,
    read_trace,
    trace_json,
    write_program,
    write_trace,
)
from tests.support.programs import Maker, add_buffers, assert_same, makers

if TYPE_CHECKING:
    from collections.abc import Callable


def example() -> Trace:
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    a = maker.op(0, 10, cell="0F0")
    maker.transfer(0, pp, 5, to=1, waits=[a])
    maker.transfer(1, pp, 5, source=0)
    program, costs = add_buffers(maker).build()
    program.meta["schedule"] = "1f1b"
    return Trace(program, simulate(program, costs), "predicted", {"note": "\u00fc"})


@settings(max_examples=40, deadline=None)
@given(makers(max_steps=10))
def test_a_round_trip_changes_nothing(maker: Maker) -> None:
    program, costs = add_buffers(maker).build()
    assert_same(program, parse_program(program_json(program).encode(), "file"))
    timeline = simulate(program, costs)
    text = trace_json(Trace(program, timeline, "measured", {"x": [1, None]}))
    trace = parse_trace(text.encode(), "file")
    assert_same(program, trace.program)
    assert_same(timeline, trace.timeline)
    assert (trace.source, trace.meta) == ("measured", {"x": [1, None]})
    assert trace_json(trace) == text


def test_files_are_written_whole_and_read_back(tmp_path: Path) -> None:
    trace = example()
    path = tmp_path / "step.json"
    for _ in range(2):  # over what is there
        write_trace(trace, path)
        assert_same(trace.timeline, read_trace(path).timeline)
    write_program(trace.program, path)
    assert_same(trace.program, read_program(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.json"]


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="folder"):
        write_program(example().program, target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_the_header_is_readable() -> None:
    lines = trace_json(example()).splitlines()
    assert lines[:5] == [
        "{",
        '"format": "mhcplan.trace",',
        '"format_version": 1,',
        '"source": "predicted",',
        '"step_ns": 15,',
    ]


def pack(values: list[int], dtype: str = "int32") -> dict[str, str]:
    raw = np.array(values, dtype).tobytes()
    return {"dtype": dtype, "data": base64.b64encode(zlib.compress(raw)).decode()}


BAD: dict[str, tuple[str, Any, str]] = {
    "another format": (
        "format",
        "mhcplan.plan",
        "its format is 'mhcplan.plan', not 'mhcplan.trace'",
    ),
    "no format": ("format", None, "its format is None"),
    "a newer version": ("format_version", 2, "mhcplan.trace version 2 is newer than 1"),
    "version 0": ("format_version", 0, "version 0 is older than 1"),
    "a version in words": ("format_version", "1", 'format_version of the file is "1"'),
    "an unknown source": ("source", "guessed", "source is 'guessed'"),
    "no program": ("program", None, "program is missing"),
    "a program that is a list": ("program", [], "program is not an object"),
    "no columns": ("columns", None, "columns is missing"),
    "a column left out": ("columns.end_ns", None, "columns.end_ns is missing"),
    "a column of another type": ("columns.end_ns", pack([0] * 5), "has dtype 'int32', not 'int64'"),
    "a column too short": ("columns.end_ns", pack([0] * 4, "int64"), "does not hold 5 values"),
    "a column too long": ("columns.end_ns", pack([0] * 6, "int64"), "does not hold 5 values"),
    "no base64": (
        "columns.end_ns",
        {"dtype": "int64", "data": "*"},
        "columns.end_ns cannot be unpacked",
    ),
    "no zlib": (
        "columns.end_ns",
        {"dtype": "int64", "data": "AAAA"},
        "columns.end_ns cannot be unpacked",
    ),
    "no data": ("columns.end_ns", {"dtype": "int64"}, "does not hold 5 values"),
    "a reason that is none": ("columns.reason", pack([9] * 5, "int8"), "stands for no reason"),
    "a cause that is none": ("columns.cause", pack([5] * 5, "int64"), "op that there is not"),
    "an op of no rank": ("program.columns.rank", pack([0, 0, 0, 1, 7]), "rank of entry 4 is 7"),
    "ranks out of order": ("program.columns.rank", pack([1, 0, 0, 1, 1]), "lower rank follows"),
    "fewer ops than columns": ("program.num_ops", 3, "does not hold 3 values"),
    "a negative number of ops": ("program.num_ops", -1, "num_ops of program is -1"),
    "lists that cut nothing": (
        "program.lists.waits.offsets",
        pack([0, 9, 0, 0, 0, 2], "int64"),
        "waits",
    ),
    "endless lists": (
        "program.lists.waits.offsets",
        pack([0, 0, 0, 0, 0, 2**62], "int64"),
        "lists.waits.values",
    ),
    "a stream without a name": ("program.streams.0.name", None, "is no stream"),
    "a stream in words": ("program.streams", "compute", "streams is not a list"),
    "a group of words": ("program.groups.0.members", ["a"], "members are not ranks"),
    "labels that are numbers": ("program.kinds", [1], "kinds has an entry that is no text"),
    "static bytes in words": ("program.static_bytes", "much", "static_bytes is not a table"),
    "static bytes by halves": (
        "program.static_bytes",
        [[0.5] * 8] * 2,
        "static_bytes is not a row of 8",
    ),
}


def spoiled(path: str, value: object) -> bytes:
    document = json.loads(trace_json(example()))
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line(case: str) -> None:
    path, value, words = BAD[case]
    with pytest.raises(FormatError) as error:
        parse_trace(spoiled(path, value), "step.json")
    message = str(error.value)
    assert message.startswith("step.json: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_what_is_no_json_object_is_one_line(text: bytes) -> None:
    with pytest.raises(FormatError, match=r"^f: .*$"):
        parse_program(text, "f")


@settings(max_examples=60)
@given(st.data())
def test_a_file_cut_short_anywhere_is_one_line(data: st.DataObject) -> None:
    text = program_json(example().program).strip()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(FormatError, match=r"^f: .*cut short.*$"):
        parse_program(text[:cut].encode(), "f")


def leaves(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [path, *(leaf for key in value for leaf in leaves(value[key], (*path, key)))]
    if isinstance(value, list):
        return [path, *(leaf for i, v in enumerate(value) for leaf in leaves(v, (*path, i)))]
    return [path]


DOCUMENT = json.loads(trace_json(example()))
ODD = st.sampled_from([None, True, -1, 3, 2**70, 1.5, "", "x", [], [[]], {}, {"a": 1}])


@settings(max_examples=300)
@given(st.sampled_from(leaves(DOCUMENT)[1:]), ODD)
def test_nothing_odd_in_a_file_is_a_traceback(path: tuple[Any, ...], odd: object) -> None:
    document = json.loads(json.dumps(DOCUMENT))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = odd
    with contextlib.suppress(FormatError):
        trace_json(parse_trace(json.dumps(document).encode(), "f"))


# -- schemas ------------------------------------------------------------------------------------

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


@pytest.mark.parametrize("name", ["program", "trace"])
def test_the_published_schema_is_current(
    name: Literal["program", "trace"], published: Callable[[str, str], None]
) -> None:
    published(name, schema_text(name))


@pytest.mark.parametrize("name", ["program", "trace"])
def test_files_satisfy_their_schemas_and_strangers_do_not(name: str) -> None:
    trace = example()
    text = program_json(trace.program) if name == "program" else trace_json(trace)
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    check = jsonschema.Draft202012Validator(schema)
    document = json.loads(text)
    check.validate(document)
    for key in document:
        assert not check.is_valid({k: v for k, v in document.items() if k != key}), key
    assert not check.is_valid(document | {"surprise": 1})
