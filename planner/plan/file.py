"""Plans on disk and from the command line: TOML files, ``--set``, and what beats what.

A plan file is TOML that starts with ``format = "mhcplan.plan"`` and ``format_version``; fields that
it leaves out keep their defaults, and a field that it does not know is an error. Writing a plan and
reading it back gives the same plan. Flags beat the file, the file beats the preset, and ``--set
path=value`` reaches any field, last of all.
"""

from __future__ import annotations

import copy
import json
import textwrap
import tomllib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args, get_origin

from pydantic import BaseModel

from mhcplan.planner.plan.errors import field_paths, short, unknown_field
from mhcplan.planner.plan.spec import (
    PLAN_FORMAT,
    PLAN_VERSION,
    LayoutSpec,
    PlanSpec,
    SpecError,
    make_plan,
)
from mhcplan.profiles.presets import MODELS, UnknownPresetError, find_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic.fields import FieldInfo

MAX_FILE_BYTES = 1 << 20

Fields = dict[str, object]

FLAG_FIELDS: dict[str, str] = {
    "n": "residual.expansion_rate",
    "residual": "residual.kind",
    "recompute_block": "residual.recompute_block",
    "pp": "layout.pp",
    "ep": "layout.ep",
    "dp": "layout.dp",
    "microbatches": "microbatches",
    "micro_batch_size": "micro_batch_size",
    "seq_len": "seq_len",
    "schedule": "schedule",
    "priority": "priority",
    "profile": "profile",
    "engine": "engine",
}
"""Plan field that each flag sets; the web page names fields in links as the flags are named."""


def plan_text(plan: PlanSpec) -> str:
    """The plan as TOML, every field written out, the model with all its sizes."""
    head = {"format": PLAN_FORMAT, "format_version": PLAN_VERSION}
    return _toml(head | plan.model_dump(mode="json", exclude_none=True)) + "\n"


def parse_plan(text: str, origin: str) -> PlanSpec:
    """Read a plan from TOML text; ``origin`` names it in errors.

    Raises:
        SpecError: no TOML, another format, a newer version, or a field that is not valid.
    """
    return _named(origin, _fields_of(text, origin))


def read_plan(path: Path) -> PlanSpec:
    """Read a plan file.

    Raises:
        SpecError: unreadable file, or see :func:`parse_plan`.
    """
    return _named(str(path), _read_fields(path))


def resolve_plan(
    source: str,
    flags: Mapping[str, object],
    settings: Sequence[str],
    global_batch: int | None = None,
) -> PlanSpec:
    """Build the plan of a command line.

    Args:
        source: a model preset's name, or the path of a plan file or a model's config.json.
        flags: value by dotted field path, of the flags that were given.
        settings: ``path=value`` of every ``--set``, in order.
        global_batch: sequences of the job's step, which then decide ``microbatches``.

    Raises:
        SpecError: see :func:`read_plan`, a setting that is no ``path=value`` or no field, and see
            :func:`changed_plan`.
    """
    changes = dict(flags)
    for setting in settings:
        path, value = parse_setting(setting)
        changes.pop(path, None)  # the last one counts, and is applied last
        changes[path] = value
    return changed_plan(source_fields(source), changes, global_batch)


def changed_plan(
    fields: Fields, changes: Mapping[str, object], global_batch: int | None = None
) -> PlanSpec:
    """The plan of ``fields``, which are left as they are, with ``changes`` (value by dotted path).

    Raises:
        SpecError: a field that is not valid; a ``global_batch`` beside ``microbatches``, or one
            that the replicas' microbatches do not divide.
    """
    data = copy.copy(fields)
    for path, value in changes.items():
        _put(data, path, value)
    if global_batch is not None:
        if "microbatches" in changes:
            raise SpecError(
                f"global_batch={global_batch} and microbatches={changes['microbatches']} exclude"
                " each other: one follows from the other"
            )
        _put(data, "microbatches", _share_of(global_batch, data))
    return make_plan(data)


def _share_of(global_batch: int, data: Fields) -> object:
    """Microbatches of one replica that make up ``global_batch`` sequences together."""
    layout = data.get("layout")
    tables = (data, cast("Fields", layout) if isinstance(layout, Mapping) else {})
    names = {"micro_batch_size": PlanSpec, "ep": LayoutSpec, "dp": LayoutSpec}
    sizes: dict[str, object] = {}
    for name, spec in names.items():
        default: object = spec.model_fields[name].default
        sizes[name] = tables[spec is LayoutSpec].get(name, default)
    factors = [size for size in sizes.values() if isinstance(size, int) and size > 0]
    if len(factors) < len(sizes):
        return data.get("microbatches", 1)  # a size is not valid: making the plan says which
    if global_batch % prod(factors):
        words = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise SpecError(f"global_batch={global_batch} must be a multiple of {words}")
    return global_batch // prod(factors)


def parse_setting(text: str) -> tuple[str, object]:
    """Split ``path=value``; the value is read as TOML, and as plain text where it is none.

    >>> parse_setting("layout.pp=16"), parse_setting("schedule=zbv")
    (('layout.pp', 16), ('schedule', 'zbv'))

    Raises:
        SpecError: no ``=``, or a path that is no field of a plan.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals:
        raise SpecError(f"--set {short(text)} must be field=value, such as layout.pp=16")
    if path not in set(field_paths(PlanSpec)):
        raise SpecError(unknown_field(path, PlanSpec))
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return path, value.strip()
    return path, parsed["value"] if set(parsed) == {"value"} else value.strip()


def source_fields(source: str | PlanSpec) -> Fields:
    """The fields that a preset's name, a plan file, a model's config.json or a plan gives.

    Those of a plan file are not yet validated.

    Raises:
        SpecError: no such preset or file, or see :func:`read_plan` and
            :func:`mhcplan.planner.plan.hf_config.model_of_config`.
    """
    if isinstance(source, PlanSpec):
        return source.model_dump(mode="json")
    if source in MODELS:
        return {"model": source}
    path = Path(source)
    if path.suffix == ".json":
        from mhcplan.planner.plan.hf_config import model_of_config

        return {"model": model_of_config(path).model_dump(mode="json")}
    if path.suffix == ".toml" or path.exists():
        return _read_fields(path)
    try:
        find_model(source)
    except UnknownPresetError as error:
        raise SpecError(f"{error} (a plan file would end in .toml)") from None
    raise AssertionError(source)


def _read_fields(path: Path) -> Fields:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SpecError(f"{path}: a plan file has at most {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark first
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{path}: is not a text file in UTF-8") from None
    return _fields_of(text, str(path))


def _fields_of(text: str, origin: str) -> Fields:
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "nested too deep"
        raise SpecError(f"{origin}: not valid TOML ({reason})") from None
    found, version = data.pop("format", None), data.pop("format_version", None)
    if found != PLAN_FORMAT:
        given = " is missing:" if found is None else f"={short(found)}"
        raise SpecError(f"{origin}: format{given} must be {PLAN_FORMAT!r}")
    if type(version) is not int or version < 1:
        raise SpecError(f"{origin}: format_version={short(version)} must be {PLAN_VERSION}")
    if version > PLAN_VERSION:
        raise SpecError(
            f"{origin}: format_version={version} is newer than this mhcplan reads"
            f" (up to {PLAN_VERSION}); upgrade mhcplan"
        )
    return data


def _named(origin: str, data: Fields) -> PlanSpec:
    try:
        return make_plan(data)
    except SpecError as error:
        raise SpecError(f"{origin}: {error}") from None


def _put(data: Fields, path: str, value: object) -> None:
    """Set a field by its path; a preset's name on the way becomes the preset's own fields."""
    *parents, last = path.split(".")
    table = data
    for name in parents:
        inner = table.get(name)
        if name == "model" and isinstance(inner, str):
            inner = find_model(inner).model_dump(mode="json")
        # a copy: the tables of a preset or a file are not ours to change
        inner = copy.copy(cast("Fields", inner)) if isinstance(inner, Mapping) else {}
        table[name] = inner
        table = inner
    table[last] = value


def commented_plan_text(plan: PlanSpec) -> str:
    """The plan as TOML to be edited by a person: what every field decides stands above it.

    A preset is named rather than written out; fields without a value are there as comments.
    """
    lines = [
        "# A plan for mhcplan: predict it with `mhcplan predict FILE`. mHC stands in [residual],",
        "# the use of the GPUs in [layout], both at the end. Fields that are left out keep their",
        "# defaults. Not modelled, so no fields: tensor, context, fully sharded parallelism.",
        f'format = "{PLAN_FORMAT}"',
        f"format_version = {PLAN_VERSION}",
    ]
    tables: list[str] = []
    for name, field in PlanSpec.model_fields.items():
        value: object = getattr(plan, name)
        if name == "model" and plan.model == MODELS.get(plan.model.name):
            value = plan.model.name
        if isinstance(value, BaseModel):
            tables += ["", f"# {field.description}", *_commented_table(name, value)]
        else:
            lines += ["", *_commented(name, value, field)]
    return "\n".join([*lines, *tables, ""])


def _commented_table(name: str, spec: BaseModel) -> list[str]:
    if name == "model":  # its fields are sizes: names say what they are
        return [_toml({name: spec.model_dump(mode="json", exclude_none=True)})]
    fields = type(spec).model_fields.items()
    lines = (line for key, field in fields for line in _commented(key, getattr(spec, key), field))
    return [f"[{name}]", *lines]


def _commented(name: str, value: object, field: FieldInfo) -> list[str]:
    choices = " | ".join(str(choice) for choice in _choices(field.annotation))
    text = f"# {field.description}" + (f" [{choices}]" if choices else "")
    if value is None:
        setting = f"# {name} ="
    else:
        plain: object = json.loads(json.dumps(value))  # TOML knows lists, not tuples
        setting = _toml({name: plain})
    return [*textwrap.wrap(text, 96, subsequent_indent="# "), setting]


def _choices(annotation: object) -> Iterator[object]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for inner in get_args(annotation):
            yield from _choices(inner)


def _toml(data: Mapping[str, object]) -> str:
    import tomli_w

    return tomli_w.dumps(data).rstrip("\n")
