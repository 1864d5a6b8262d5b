"""A what-if as the page's address holds it: a query of a model and of the fields that were changed.

``model=mhc-27b&n=2&layout.gpus_per_node=4`` names fields as the command line does: by flag (with
``_``), else by dotted path with a value as after ``--set``. ``a`` holds the query of the plan that
is pinned beside it. The API takes the very query of the page, so a link, a click and ``curl`` ask
the same.

Nothing in a query names a file: a model is a preset or a TOML table of its sizes, a profile is one
that is shipped or that the person who started the server gave it.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qsl, urlencode

from pydantic import BaseModel

from mhcplan.planner.plan.errors import field_paths, short
from mhcplan.planner.plan.file import FLAG_FIELDS, parse_setting, resolve_plan
from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan
from mhcplan.profiles.presets import MODELS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

DEFAULT_MODEL = "mhc-27b"
MAX_QUERY_BYTES = 8192
MAX_SETTINGS = 100
MAX_SITES_PLAYED = 60_000  # M x L: about 19 ops each, 1.1 million in all

_FLAGS = {path: flag for flag, path in FLAG_FIELDS.items()}
_PATHS = frozenset(field_paths(PlanSpec))
_NAMED = re.compile(r"([a-z_][a-z_0-9.]*)(?:=|: | is )")  # how errors name a field
_PINNED = "a"


class Refused(ValueError):
    """A what-if that is not played: one line, and the name in the query of the field to blame."""

    def __init__(self, message: str, field: str | None = None) -> None:
        """``field`` None: no single field is to blame."""
        super().__init__(message, field)
        self.message, self.field = message, field

    def of_pinned(self) -> Refused:
        """The same, said of the pinned plan: no field of the page is to blame."""
        return Refused(f"A, the pinned plan: {self.message}")


@dataclass(frozen=True)
class WhatIf:
    """A model and what was changed in its default plan.

    Attributes:
        model: a preset's name, or a TOML table of sizes.
        settings: (dotted path, value as text) of every changed field, in order.
    """

    model: str = DEFAULT_MODEL
    settings: tuple[tuple[str, str], ...] = ()

    def plan(self) -> PlanSpec:
        """The plan to play.

        Raises:
            Refused: a field that is not valid, or a step of more ops than a page plays.
        """
        preset, settings = self._of_preset()
        try:
            plan = resolve_plan(preset, {}, [f"{path}={text}" for path, text in settings])
        except SpecError as error:
            raise refused(error) from None
        played = plan.microbatches * plan.model.num_sites
        if played > MAX_SITES_PLAYED:
            raise Refused(
                f"microbatches={plan.microbatches} must be at most"
                f" {MAX_SITES_PLAYED // plan.model.num_sites} for {plan.model.name} here: `mhcplan"
                " predict` plays larger steps",
                "microbatches",
            )
        return plan

    def query(self) -> str:
        """The query that stands for this what-if in a link."""
        items = ((_FLAGS.get(path, path), text) for path, text in self.settings)
        return urlencode([("model", self.model), *items])

    def command(self) -> str:
        """What to type to get the same on the command line."""
        preset, settings = self._of_preset()
        words = ["mhcplan", "predict", preset]
        for path, text in settings:
            flag = _FLAGS.get(path)
            words += [f"--{flag.replace('_', '-')}", text] if flag else ["--set", f"{path}={text}"]
        return shlex.join(words)

    def name(self) -> str:
        """The same as a side of ``compare`` is written."""
        return self.command().removeprefix("mhcplan predict ")

    def changed(self, changes: Iterable[tuple[str, str]]) -> WhatIf:
        """This what-if with some fields (by dotted path) set otherwise."""
        return WhatIf(self.model, tuple((dict(self.settings) | dict(changes)).items()))

    def _of_preset(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """A preset to start from, and all that is changed in it."""
        if self.model in MODELS:
            return self.model, self.settings
        return DEFAULT_MODEL, (("model", self.model), *self.settings)


def parse_query(query: str, profiles: Collection[str]) -> tuple[WhatIf, WhatIf | None]:
    """The what-if of a query, and the one that is pinned beside it.

    Args:
        query: of an address, without ``?``.
        profiles: names that ``profile`` may have.

    Raises:
        Refused: no query, too long, a field twice, no such model, profile or field. Values are
            checked by :meth:`WhatIf.plan`.
    """
    if len(query) > MAX_QUERY_BYTES:
        raise Refused(f"the address has {len(query)} bytes, at most {MAX_QUERY_BYTES} are read")
    items = parse_qsl(query, keep_blank_values=True)
    names = [name for name, _ in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused(f"{short(twice)} stands twice in the address", twice)
    fields = {k: v for k, v in items if k != _PINNED}
    if len(fields) > MAX_SETTINGS:
        raise Refused(f"the address changes {len(fields)} fields, at most {MAX_SETTINGS} are read")
    pinned = dict(items).get(_PINNED)
    return _whatif(fields, profiles), _pinned(pinned, profiles) if pinned else None


def whatif_of(plan: PlanSpec) -> WhatIf:
    """The what-if whose plan this is, with as few changes as say it."""
    model = plan.model.name
    if MODELS.get(model) != plan.model:
        model = _toml(plan.model.model_dump(mode="json", exclude_none=True))
    default = dict(_leaves(make_plan({"model": DEFAULT_MODEL})))
    changes = ((p, v) for p, v in _leaves(plan) if p != "model" and default.get(p) != v)
    return WhatIf(model, tuple((path, _text(path, value)) for path, value in changes))


def refused(error: ValueError) -> Refused:
    """An error of a plan or profile, with the field that it names first."""
    message = " ".join(str(error).split())
    named = (FLAG_FIELDS.get(name, name) for name in _NAMED.findall(message))
    path = next((path for path in named if path in _PATHS), None)
    return Refused(message, _FLAGS.get(path, path) if path else None)


def _pinned(query: str, profiles: Collection[str]) -> WhatIf:
    try:
        return parse_query(query, profiles)[0]
    except Refused as error:
        raise error.of_pinned() from None


def _whatif(fields: dict[str, str], profiles: Collection[str]) -> WhatIf:
    model = fields.pop("model", DEFAULT_MODEL)
    settings = {FLAG_FIELDS.get(name, name): text for name, text in fields.items()}
    if not model.startswith("{") and model not in MODELS:
        known = ", ".join(MODELS)
        raise Refused(f"model={short(model)} must be one of {known}, or a TOML table", "model")
    for path, text in settings.items():
        try:
            parse_setting(f"{path}={text}")
        except SpecError as error:
            raise Refused(str(error), path) from None
    profile = settings.get("profile")
    if profile is not None and profile not in profiles:
        known = ", ".join(profiles)
        raise Refused(
            f"profile={short(profile)} must be one of {known} (mhcplan web --profiles FILE adds"
            " one)",
            "profile",
        )
    return WhatIf(model, tuple(settings.items()))


def _leaves(plan: BaseModel, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Fields by dotted path, tables opened; a model is one value."""
    for name in type(plan).model_fields:
        value: object = getattr(plan, name)
        if isinstance(value, BaseModel) and name != "model":
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _text(path: str, value: object) -> str:
    """A value as it stands in a query: as bare as ``--set`` reads it back."""
    if isinstance(value, str) and parse_setting(f"{path}={value}")[1] == value:
        return value
    return _toml(value)


def _toml(value: object) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        table = cast("dict[str, object]", value)
        return "{" + ", ".join(f"{name} = {_toml(inner)}" for name, inner in table.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(inner) for inner in cast("list[object]", value)) + "]"
    return json.dumps(value, ensure_ascii=False)
