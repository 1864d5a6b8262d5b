"""Files of Programs and of traces: JSON with a readable header and compact columns.

``mhcplan.program`` holds a :class:`~mhcplan.sim.program.Program`. ``mhcplan.trace`` holds a
Timeline, predicted or measured, with the Program it belongs to, so that it can be read alone and
two traces of one Program laid side by side, op by op.

Tables that people read (streams, groups, labels) are plain JSON. A column is
``{"dtype": "int32", "data": ...}``, the base64 of its zlib-compressed little-endian values; a list
an op is two columns, ``offsets`` and ``values``. What is written is read back exactly.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import zlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np

from mhcplan.sim.check import structure_faults
from mhcplan.sim.program import COMPONENTS, Csr, Group, Program, Stream
from mhcplan.sim.timeline import REASONS, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

PROGRAM_FORMAT, TRACE_FORMAT = "mhcplan.program", "mhcplan.trace"
FORMAT_VERSION = 1
_OLDEST_READ = 1

OP_COLUMNS = {
    **dict.fromkeys(("rank", "stream", "kind", "category", "cell", "cost"), "int32"),
    **dict.fromkeys(("stage", "site", "microbatch", "group", "peer", "batch"), "int32"),
    **dict.fromkeys(("record", "payload_bytes"), "int64"),
    **dict.fromkeys(("host_sync", "is_send"), "bool"),
    "pass_": "uint8",
}
OP_LISTS = ("waits", "reads", "writes", "allocs", "frees")
_LABELS = ("kinds", "categories", "cells", "cost_keys")
TIME_COLUMNS = {
    **dict.fromkeys(("issue_ns", "start_ns", "end_ns", "cause"), "int64"),
    "reason": "int8",
}


class FormatError(ValueError):
    """A file that cannot be read; the message is one line that says why."""


class Trace(NamedTuple):
    """A Timeline with its Program. ``meta`` is what the writer wants to keep (JSON values)."""

    program: Program
    timeline: Timeline
    source: Literal["predicted", "measured"]
    meta: dict[str, Any]


def write_program(program: Program, path: Path) -> None:
    """Write a program file; it is there whole or not at all."""
    write_atomically(path, program_json(program).encode())


def read_program(path: Path) -> Program:
    """Read a program file.

    Raises:
        FormatError: it is no readable program file.
        OSError: it cannot be opened.
    """
    return parse_program(path.read_bytes(), str(path))


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace file; it is there whole or not at all."""
    write_atomically(path, trace_json(trace).encode())


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        FormatError: it is no readable trace file.
        OSError: it cannot be opened.
    """
    return parse_trace(path.read_bytes(), str(path))


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, so that nobody ever sees a part of it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# -- writing --------------------------------------------------------------------------------------


def program_json(program: Program) -> str:
    """A Program as the text of its file."""
    return _lines({"format": PROGRAM_FORMAT, "format_version": FORMAT_VERSION} | _plain(program))


def trace_json(trace: Trace) -> str:
    """A trace as the text of its file."""
    return _lines(
        {
            "format": TRACE_FORMAT,
            "format_version": FORMAT_VERSION,
            "source": trace.source,
            "step_ns": trace.timeline.step_ns,
            "meta": trace.meta,
            "program": _plain(trace.program),
            "columns": _packed_all(trace.timeline, TIME_COLUMNS),
        }
    )


def _lines(document: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of the outermost object."""
    entries = (
        f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}"
        for key, value in document.items()
    )
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _plain(program: Program) -> dict[str, Any]:
    return {
        "num_ranks": program.num_ranks,
        "num_ops": program.num_ops,
        "num_events": program.num_events,
        "num_buffers": program.num_buffers,
        "meta": program.meta,
        "streams": [stream._asdict() for stream in program.streams],
        "groups": [group._asdict() for group in program.groups],
        **{name: list(getattr(program, name)) for name in _LABELS},
        "static_bytes": program.static_bytes.tolist(),
        "buffers": {
            "bytes": _packed(program.buffer_bytes, "int64"),
            "component": _packed(program.buffer_component, "int8"),
        },
        "columns": _packed_all(program, OP_COLUMNS),
        "lists": {
            name: {
                "offsets": _packed(getattr(program, name).offsets, "int64"),
                "values": _packed(getattr(program, name).values, "int64"),
            }
            for name in OP_LISTS
        },
    }


def _packed_all(owner: object, columns: Mapping[str, str]) -> dict[str, dict[str, str]]:
    return {name: _packed(getattr(owner, name), dtype) for name, dtype in columns.items()}


def _packed(values: NDArray[Any], dtype: str) -> dict[str, str]:
    raw = np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"dtype": dtype, "data": base64.b64encode(zlib.compress(raw, 1)).decode()}


# -- reading --------------------------------------------------------------------------------------


def parse_program(data: bytes, name: str) -> Program:
    """Read the bytes of a program file; ``name`` is what errors call it.

    Raises:
        FormatError: it is no readable program file.
    """
    return _Reader(data, name, PROGRAM_FORMAT).program()


def parse_trace(data: bytes, name: str) -> Trace:
    """Read the bytes of a trace file; ``name`` is what errors call it.

    Raises:
        FormatError: it is no readable trace file.
    """
    return _Reader(data, name, TRACE_FORMAT).trace()


class _Reader:
    """Reads one document; ``_at`` names the part that is being read."""

    def __init__(self, data: bytes, name: str, wanted: str) -> None:
        self._name = name
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise self._error(f"not JSON, or cut short: {reason}") from None
        self._document = self._object(document, "the file")
        found = self._document.get("format")
        if found != wanted:
            raise self._error(f"its format is {found!r}, not {wanted!r}")
        version = self._number(self._document, "format_version", "the file")
        if version > FORMAT_VERSION:
            raise self._error(
                f"{wanted} version {version} is newer than {FORMAT_VERSION}, the newest that this "
                "version of mhcplan reads"
            )
        if version < _OLDEST_READ:
            raise self._error(f"{wanted} version {version} is older than {_OLDEST_READ}")

    def program(self) -> Program:
        return self._program(self._document)

    def trace(self) -> Trace:
        document = self._document
        program = self._program(self._object(document.get("program"), "program"))
        source = document.get("source")
        if source not in ("predicted", "measured"):
            raise self._error(f"source is {source!r}, not 'predicted' or 'measured'")
        columns = self._columns(document, TIME_COLUMNS, program.num_ops)
        reason, cause = columns["reason"], columns["cause"]
        if ((reason < 0) | (reason >= len(REASONS))).any():
            raise self._error("columns.reason has a code that stands for no reason")
        if ((cause < -1) | (cause >= program.num_ops)).any():
            raise self._error("columns.cause names an op that there is not")
        meta = self._object(document.get("meta"), "meta")
        return Trace(program, Timeline(**columns), source, meta)

    def _program(self, document: dict[str, Any]) -> Program:
        num_ops = self._number(document, "num_ops", "program")
        num_ranks = self._number(document, "num_ranks", "program")
        num_buffers = self._number(document, "num_buffers", "program")
        buffers = self._object(document.get("buffers"), "buffers")
        lists = self._object(document.get("lists"), "lists")
        fields: dict[str, Any] = {
            **{name: self._words(document, name) for name in _LABELS},
            **self._columns(document, OP_COLUMNS, num_ops),
            **{name: self._csr(lists, name, num_ops) for name in OP_LISTS},
        }
        program = Program(
            num_ranks=num_ranks,
            num_events=self._number(document, "num_events", "program"),
            streams=tuple(self._rows(document, "streams", Stream)),
            groups=tuple(self._rows(document, "groups", Group)),
            buffer_bytes=self._column(buffers, "buffers", "bytes", "int64", num_buffers),
            buffer_component=self._column(buffers, "buffers", "component", "int8", num_buffers),
            static_bytes=self._static_bytes(document, num_ranks),
            meta=self._object(document.get("meta"), "meta"),
            **fields,
        )
        for _, fault in structure_faults(program):
            raise self._error(fault)
        return program

    def _columns(
        self, document: dict[str, Any], columns: Mapping[str, str], length: int
    ) -> dict[str, NDArray[Any]]:
        table = self._object(document.get("columns"), "columns")
        return {
            name: self._column(table, "columns", name, dtype, length)
            for name, dtype in columns.items()
        }

    def _csr(self, lists: dict[str, Any], name: str, num_ops: int) -> Csr:
        pair = self._object(lists.get(name), f"lists.{name}")
        offsets = self._column(pair, f"lists.{name}", "offsets", "int64", num_ops + 1)
        return Csr(
            offsets, self._column(pair, f"lists.{name}", "values", "int64", int(offsets[-1]))
        )

    def _column(
        self, table: dict[str, Any], where: str, name: str, dtype: str, length: int
    ) -> NDArray[Any]:
        where = f"{where}.{name}"
        column = self._object(table.get(name), where)
        if column.get("dtype") != dtype:
            raise self._error(f"{where} has dtype {column.get('dtype')!r}, not {dtype!r}")
        stored = np.dtype(dtype).newbyteorder("<")
        size = length * stored.itemsize
        try:
            packed = base64.b64decode(column.get("data", ""), validate=True)
            unpack = zlib.decompressobj()
            raw = unpack.decompress(packed, max(size, 0) + 1)
        except (binascii.Error, zlib.error, ValueError, TypeError, OverflowError) as error:
            raise self._error(f"{where} cannot be unpacked: {error}") from None
        if len(raw) != size:
            raise self._error(f"{where} does not hold {length} values")
        return np.frombuffer(raw, stored).astype(dtype)

    def _static_bytes(self, document: dict[str, Any], num_ranks: int) -> NDArray[np.int64]:
        rows = document.get("static_bytes")
        try:
            table = np.array(rows, np.int64).reshape(num_ranks, len(COMPONENTS))
        except (TypeError, ValueError, OverflowError):
            raise self._error("static_bytes is not a table of integers") from None
        if table.tolist() != rows:
            raise self._error("static_bytes is not a row of 8 integers for each rank")
        return table

    def _rows(self, document: dict[str, Any], name: str, kind: type[Any]) -> Iterable[Any]:
        rows = document.get(name)
        if not isinstance(rows, list):
            raise self._error(f"{name} is not a list")
        wanted = {
            "rank": int, "name": str, "priority": int, "group": int,
            "members": list, "size": int, "medium": str,
        }  # fmt: skip
        for row in cast("list[object]", rows):
            fields = self._object(row, name)
            if set(fields) != set(kind._fields) or not all(
                type(value) is wanted[field] for field, value in fields.items()
            ):
                raise self._error(f"{name}: {json.dumps(row)[:80]} is no {kind.__name__.lower()}")
            members = fields.get("members", [])
            if not all(type(member) is int for member in members):
                raise self._error(f"{name}: members are not ranks: {members}")
            yield kind(**fields | ({"members": tuple(members)} if "members" in fields else {}))

    def _words(self, document: dict[str, Any], name: str) -> tuple[str, ...]:
        words = document.get(name)
        if not isinstance(words, list):
            raise self._error(f"{name} is not a list")
        if not all(isinstance(word, str) for word in cast("list[object]", words)):
            raise self._error(f"{name} has an entry that is no text")
        return tuple(cast("list[str]", words))

    def _number(self, document: dict[str, Any], name: str, where: str) -> int:
        value = document.get(name)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self._error(f"{name} of {where} is {json.dumps(value)[:40]}, not a whole number")
        return value

    def _object(self, value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(f"{where} is {'missing' if value is None else 'not an object'}")
        return cast("dict[str, Any]", value)

    def _error(self, why: str) -> FormatError:
        return FormatError(f"{self._name}: {why}")
