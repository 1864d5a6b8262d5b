"""What is wrong with a plan, in one line: field, value and what is valid.

pydantic finds every problem of its input; a person fixes one at a time. :func:`describe` takes the
first and says it as the field is written in a plan file or after ``--set``.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, cast, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

_VALUE_LENGTH, _MESSAGE_LENGTH = 60, 200
_DISCRIMINATED = {"attention": {"mla", "gqa"}}  # loc names the union's arm, a plan's path does not
_VALID = {
    "residual.recompute_block": "must be auto, none, stage or a number of sites of at least 1",
    "layout.blocks_per_stage": "must be a list of blocks, one of every stage, such as [4, 4, 3]",
    "memory_limit_bytes": "must be a size of at least 1 MB, such as 80000000000 or '80GB'",
}
_NOT_MODELLED = {
    **dict.fromkeys(("tp", "tensor_parallel", "tensor_parallel_size"), "tensor parallelism"),
    **dict.fromkeys(("sp", "sequence_parallel"), "sequence parallelism"),
    **dict.fromkeys(("cp", "context_parallel", "context_parallel_size"), "context parallelism"),
    **dict.fromkeys(("fsdp", "fsdp2", "hsdp", "dp_shard"), "fully sharded data parallelism"),
    **dict.fromkeys(("zero", "zero_stage"), "ZeRO beyond stage 1"),
}
_FIELD_OF = {"n": "expansion_rate"}  # by the paper's name, which is the flag's as well
_TABLE = re.compile(r"must be a valid dictionary or instance of \w+")  # pydantic's words for it
_NAMED = re.compile(r"^[a-z_][\w.]*=")  # a message that already says field=value


def field_paths(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field of a model as a dotted path, parents before children."""
    for name, field in root.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from field_paths(inner, f"{prefix}{name}.")


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of ``error``, found while validating a ``root``, as one line."""
    first = error.errors()[0]
    path = _path(first["loc"])
    match first["type"]:
        case "extra_forbidden":
            return unknown_field(path, root)
        case "missing":
            return f"{path} is missing: a plan cannot do without it"
        case "union_tag_invalid" | "union_tag_not_found":
            return _wrong_kind(first, path)
        case "value_error":
            return _own_message(first, path)
        case _:
            valid = _VALID.get(path) or _must(first["msg"])
            return f"{path or 'plan'}={short(first['input'])} {valid}"


def unknown_field(path: str, root: type[BaseModel]) -> str:
    """One line that says that a plan has no field ``path`` and which one was probably meant."""
    path = path if path.isprintable() else short(path)
    known = list(dict.fromkeys(field_paths(root)))
    last = path.rpartition(".")[2]
    if missing := not_modelled(last):
        return f"{path} is not a field of a plan: {missing}"
    close = fields_named(last, root) or difflib.get_close_matches(path, known, n=2, cutoff=0.6)
    if close:
        return f"{path} is not a field of a plan; did you mean {' or '.join(close)}?"
    top = [k for k in known if "." not in k]
    return f"{path} is not a field of a plan; its fields are {', '.join(top)}"


def fields_named(name: str, root: type[BaseModel]) -> list[str]:
    """Dotted paths of the fields that are called ``name``, in whatever table."""
    known = dict.fromkeys(field_paths(root))
    last = _FIELD_OF.get(name, name)
    return [path for path in known if path.rpartition(".")[2] == last]


def not_modelled(name: str) -> str:
    """One line for a layout that plans cannot have, such as ``tp``; empty for any other name."""
    what = _NOT_MODELLED.get(name.replace("-", "_"))
    if what is None:
        return ""
    return (
        f"{what} is not modelled; layouts are pp x ep x dp, with the optimizer sharded over"
        " ep x dp (ZeRO-1)"
    )


def short(value: object) -> str:
    """A value as one line of bounded length."""
    text = repr(value)
    return text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 3] + "..."


def _own_message(problem: ErrorDetails, path: str) -> str:
    text = str(problem.get("ctx", {}).get("error", problem["msg"]))
    parent, _, last = path.rpartition(".")
    if not path or not _NAMED.match(text):
        return f"{path}: {text}" if path else text
    if text.startswith(f"{last}="):
        path = parent
    return f"{path}.{text}" if path else text


def _wrong_kind(problem: ErrorDetails, path: str) -> str:
    """An ``attention`` whose ``kind`` is none of those there are."""
    whole: object = problem["input"]
    given = cast("dict[str, object]", whole) if isinstance(whole, dict) else {}
    kinds = sorted(_DISCRIMINATED[path.rpartition(".")[2]])
    return f"{path}.kind={short(given.get('kind'))} must be {' or '.join(kinds)}"


def _must(message: str) -> str:
    text = message.replace("Input should be", "must be").replace("Input should", "must")
    text = text if text.startswith("must") else f"is not valid: {text}"
    text = _TABLE.sub("must be a table", text)
    return text[:_MESSAGE_LENGTH]


def _path(loc: tuple[int | str, ...]) -> str:
    parts: list[str] = []
    for part in loc:
        if isinstance(part, str) and part in _DISCRIMINATED.get(parts[-1] if parts else "", ()):
            continue
        if isinstance(part, str) and ("[" in part or part in ("int", "constrained-int")):
            continue  # the arm of a plain union, as pydantic names it
        parts.append(part if isinstance(part, str) and part.isidentifier() else short(part))
    return ".".join(parts)


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from _models_in(inner)
