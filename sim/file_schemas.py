"""JSON Schemas of program and trace files, for people who read them without mhcplan.

They are kept in ``docs/schemas``. What a schema cannot say, such as that indices are in range,
:func:`mhcplan.sim.check.structure_faults` checks when a file is read.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from mhcplan.sim.files import FORMAT_VERSION, OP_COLUMNS, OP_LISTS, TIME_COLUMNS
from mhcplan.sim.program import COMPONENTS
from mhcplan.sim.timeline import REASONS

_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_WORDS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
_META: dict[str, Any] = {"type": "object", "description": "what the writer wants to keep"}

_MEANING = {
    "rank": "rank; ops are sorted by rank and, within a rank, in host issue order",
    "stream": "index into streams",
    "kind": "index into kinds",
    "category": "index into categories",
    "cell": "index into cells: the action that the op belongs to",
    "cost": "index into cost_keys",
    "pass_": "ASCII code of the pass: F, I, W, B, R or O",
    "stage": "pipeline stage, or -1",
    "site": "site of the model, or -1",
    "microbatch": "microbatch, or -1",
    "record": "event recorded when the op ends, or -1",
    "host_sync": "1 where the host waits for the op to end before it issues the next",
    "group": "index into groups for a transfer, or -1",
    "peer": "the other rank of a send or receive, or -1",
    "is_send": "1 for a send",
    "payload_bytes": "bytes of a transfer's buffer",
    "batch": "sends and receives of one batched call share a number, else -1",
    "waits": "events that the op's stream waits for before the op",
    "reads": "buffers read",
    "writes": "buffers written",
    "allocs": "buffers allocated",
    "frees": "buffers freed",
    "issue_ns": "when the host had issued the op",
    "start_ns": "when the op began",
    "end_ns": "when the op ended",
    "cause": "the op whose end let it start, or -1",
    "reason": f"why it did not start earlier, an index into {', '.join(REASONS)}",
}


def schema_text(format_name: Literal["program", "trace"]) -> str:
    """The JSON Schema of a file format, as kept in ``docs/schemas``."""
    head = {
        "format": {"const": f"mhcplan.{format_name}"},
        "format_version": {"const": FORMAT_VERSION},
    }
    if format_name == "program":
        body = _object(head | _program())
    else:
        body = _object(
            head
            | {
                "source": {"enum": ["predicted", "measured"]},
                "step_ns": _COUNT,
                "meta": _META,
                "program": _object(_program()),
                "columns": _object({name: _column(name, t) for name, t in TIME_COLUMNS.items()}),
            }
        )
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"mhcplan {format_name}, version {FORMAT_VERSION}",
        "description": "Times are integer nanoseconds, sizes integer bytes. A column is the base64 "
        "of its zlib-compressed little-endian values.",
    }
    return json.dumps(schema | body, indent=1) + "\n"


def _program() -> dict[str, Any]:
    integer, text = {"type": "integer"}, {"type": "string"}
    stream = {"rank": _COUNT, "name": text, "priority": integer,
              "group": integer | {"description": "of its internal stream, or -1"}}  # fmt: skip
    group = {"name": text, "members": {"type": "array", "items": _COUNT}, "size": _COUNT,
             "medium": text}  # fmt: skip
    row = {"type": "array", "items": _COUNT, "minItems": len(COMPONENTS),
           "maxItems": len(COMPONENTS)}  # fmt: skip
    lists = {
        name: _object({"offsets": _column("", "int64"), "values": _column("", "int64")})
        | {"description": f"{_MEANING[name]}: list i is values[offsets[i] : offsets[i + 1]]"}
        for name in OP_LISTS
    }
    return {
        **dict.fromkeys(("num_ranks", "num_ops", "num_events", "num_buffers"), _COUNT),
        "meta": _META,
        "streams": {"type": "array", "items": _object(stream)},
        "groups": {"type": "array", "items": _object(group)},
        **dict.fromkeys(("kinds", "categories", "cells", "cost_keys"), _WORDS),
        "static_bytes": {
            "type": "array", "items": row,
            "description": f"by rank: bytes held all through, of {', '.join(COMPONENTS)}",
        },
        "buffers": _object(
            {"bytes": _column("", "int64"), "component": _column("", "int8")}
        ),
        "columns": _object({name: _column(name, dtype) for name, dtype in OP_COLUMNS.items()}),
        "lists": _object(lists),
    }  # fmt: skip


def _column(name: str, dtype: str) -> dict[str, Any]:
    fields = {"dtype": {"const": dtype}, "data": {"type": "string", "contentEncoding": "base64"}}
    return _object(fields) | ({"description": _MEANING[name]} if name else {})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
