"""Which plans a sweep visits: every combination of the values that its axes list.

An axis is a field of a plan, by its dotted path, and the values it takes: a list (``1,2,4``), a
range with both ends (``16..64..16``; the step is 1 without one), or both (``8,16..64..16``). The
last axis given varies fastest. ``global_batch`` is an axis too: it sets ``microbatches`` so that
every combination trains as many sequences a step.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, cast

from mhcplan.planner.plan.errors import short
from mhcplan.planner.plan.file import changed_plan, parse_setting
from mhcplan.planner.plan.spec import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pydantic import JsonValue

    from mhcplan.planner.plan.file import Fields
    from mhcplan.planner.plan.spec import PlanSpec

GLOBAL_BATCH = "global_batch"
MAX_POINTS = 100_000

_ITEM = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,\[{"'])+""")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Axis:
    """A field of a plan and the values that it takes."""

    path: str
    values: tuple[JsonValue, ...]


@dataclass(frozen=True)
class Point:
    """One combination: the values by path, and the plan they make or why they make none."""

    values: dict[str, JsonValue]
    plan: PlanSpec | None
    reason: str | None = None


def parse_axis(path: str, text: str) -> Axis:
    """An axis from a list, a range, or a list with ranges.

    >>> parse_axis("layout.pp", "4,8..16..4").values
    (4, 8, 12, 16)

    Raises:
        SpecError: no such field, nothing listed, or a range without a number in it.
    """
    items = [item.strip() for item in _ITEM.findall(text)]
    if not items or not all(items) or len(items) != text.count(",") + 1 - _inner_commas(items):
        raise SpecError(f"{path}={short(text)} must list values, such as 1,2,4 or 16..64..16")
    values = {json.dumps(value): value for item in items for value in _values(path, item)}
    return Axis(path, tuple(values.values()))


def axes_of(flags: Mapping[str, str], settings: Sequence[str]) -> tuple[Axis, ...]:
    """The axes of a command line: values by path of the flags given, and every ``--set``.

    Raises:
        SpecError: see :func:`parse_axis`; an axis given twice, or a setting without ``=``.
    """
    axes = [parse_axis(path, text) for path, text in flags.items()]
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise SpecError(f"--set {short(setting)} must be field=values, such as layout.pp=4,8")
        axes.append(parse_axis(path.strip(), text))
    paths = [axis.path for axis in axes]
    for path in paths:
        if paths.count(path) > 1:
            raise SpecError(f"{path} is given twice: list all its values once")
    return tuple(axes)


def points(fields: Fields, axes: Sequence[Axis]) -> Iterator[Point]:
    """Every combination of the axes' values as a plan made of ``fields``, or why it is none.

    Raises:
        SpecError: more than ``MAX_POINTS`` combinations.
    """
    count = prod(len(axis.values) for axis in axes)
    if count > MAX_POINTS:
        raise SpecError(f"{count:,} combinations are more than the {MAX_POINTS:,} of one sweep")
    return (_point(fields, values) for values in _combinations(axes))


def _combinations(axes: Sequence[Axis]) -> Iterator[dict[str, JsonValue]]:
    paths = [axis.path for axis in axes]
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip(paths, values, strict=True))


def _point(fields: Fields, values: dict[str, JsonValue]) -> Point:
    changes: dict[str, object] = dict(values)
    batch = changes.pop(GLOBAL_BATCH, None)
    try:
        return Point(values, changed_plan(fields, changes, cast("int | None", batch)))
    except SpecError as error:
        return Point(values, None, str(error))


def _values(path: str, item: str) -> Iterable[JsonValue]:
    found = _RANGE.fullmatch(item)
    if found is not None:
        first, last, step = (int(number) for number in (*found.group(1, 2), found[3] or 1))
        if step == 0 or first > last:
            raise SpecError(f"{path}={item} must be a range first..last..step that goes up")
        if (last - first) // step >= MAX_POINTS:
            raise SpecError(f"{path}={item} has more than {MAX_POINTS:,} values")
        return range(first, last + 1, step)
    if path == GLOBAL_BATCH:
        if not item.isascii() or not item.isdecimal() or int(item) < 1:
            raise SpecError(f"{GLOBAL_BATCH}={short(item)} must be a number of at least 1")
        return [int(item)]
    value = parse_setting(f"{path}={item}")[1]
    try:
        return [json.loads(json.dumps(value, allow_nan=False))]
    except (TypeError, ValueError):
        return [item]  # TOML's dates, and numbers that are none: no field of a plan takes them


def _inner_commas(items: Sequence[str]) -> int:
    return sum(item.count(",") for item in items)
