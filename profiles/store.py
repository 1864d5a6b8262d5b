"""Profiles on disk: find, list, show, validate and compare them.

Shipped profiles live in ``profiles/data``, one JSON file each, and are found by name, as are those
derived from them (:mod:`mhcplan.profiles.derive`); any other profile is found by its path. Reading
one refuses what no machine can have (:mod:`mhcplan.profiles.plausibility`), so that a wrong unit is
an error and not a prediction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from mhcplan.profiles.derive import DERIVED, derive
from mhcplan.profiles.logs import read_log
from mhcplan.profiles.plausibility import implausible
from mhcplan.profiles.presets import unknown_name
from mhcplan.profiles.schema import (
    PROFILE_VERSION,
    Profile,
    ProfileError,
    parse_profile,
    profile_text,
)
from mhcplan.profiles.specs import Spec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

    from mhcplan.profiles.logs import Entry

SUFFIX = ".json"
_OF_FIGURES = ("ops", "transfers", "rates", "overheads")
_NO_PREDICTION = ("format", "format_version", "name", "provenance")  # moves with them


def shipped_profiles() -> dict[str, Traversable]:
    """The profiles that come with mhcplan: files by name, sorted."""
    data = files("mhcplan.profiles").joinpath("data")
    if not data.is_dir():
        return {}
    found = {f.name.removesuffix(SUFFIX): f for f in data.iterdir() if f.name.endswith(SUFFIX)}
    return dict(sorted(found.items()))


def profile_file_text(name_or_path: str) -> str:
    """The very text that ``--profile NAME_OR_PATH`` reads; of a derived one, as it would be stored.

    Raises:
        ProfileError: no such profile, with close names, or an unreadable file.
    """
    shipped = shipped_profiles()
    if name_or_path in shipped:
        return shipped[name_or_path].read_text(encoding="utf-8")
    if name_or_path in DERIVED:
        return profile_text(find_profile(name_or_path))
    path = Path(name_or_path)
    if not path.is_file() and not _looks_like_a_path(name_or_path):
        known = unknown_name("profile", name_or_path, dict.fromkeys(profile_names()))
        raise ProfileError(f"{known}; or give the path of a {SUFFIX} file")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ProfileError(f"{path}: is not a text file in UTF-8") from None


def find_profile(name_or_path: str) -> Profile:
    """The shipped or derived profile of this name, or the one in this file.

    Raises:
        ProfileError: no such profile, or one that cannot be used; one line that names the field.
    """
    if name_or_path in DERIVED and name_or_path not in shipped_profiles():
        return derive(find_profile(DERIVED[name_or_path]), name_or_path)
    profile = parse_profile(profile_file_text(name_or_path), name_or_path)
    for problem in implausible(profile):
        raise ProfileError(f"{name_or_path}: {problem}")
    return profile


def contention_log(name_or_path: str) -> list[Entry]:
    """The capture that the contention model of a profile was fitted to; empty if there is none.

    Of a shipped profile it comes with mhcplan, of another it lies where the capture wrote it.
    """
    if name_or_path in shipped_profiles():
        raw = files("mhcplan.profiles").joinpath("data", "raw")
        return read_log(raw.joinpath(f"{name_or_path}-contention.jsonl.xz"))
    return read_log(Path(f"{name_or_path}.contention.jsonl"))


def profile_names() -> tuple[str, ...]:
    """Names that :func:`find_profile` knows: measured profiles, and those derived from them."""
    shipped = shipped_profiles()
    derived = (name for name, base in DERIVED.items() if base in shipped)
    return tuple(sorted({*shipped, *derived}))


def list_profiles() -> list[Profile]:
    """All profiles that come with mhcplan, by name."""
    return [find_profile(name) for name in profile_names()]


def validate(name_or_path: str | Path) -> list[str]:
    """Every problem of a profile, one line each, field first; empty if it is sound.

    A file that is no JSON, of another format, or of a newer version has that one problem.

    Raises:
        ProfileError: no such profile.
    """
    name = str(name_or_path)
    text = profile_file_text(name)
    try:
        profile = parse_profile(text, name)
    except ProfileError as error:
        return list(error.problems) or [str(error)]
    return list(implausible(profile))


def _looks_like_a_path(text: str) -> bool:
    return text.endswith(SUFFIX) or len(Path(text).parts) > 1


def schema_text() -> str:
    """The JSON Schema of a profile file, as in ``docs/schemas/profile.schema.json``."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"mhcplan profile, version {PROFILE_VERSION}",
        **{k: v for k, v in Profile.model_json_schema().items() if k != "title"},
    }
    return json.dumps(schema, indent=1) + "\n"


def without_unused_runs(profile: Profile) -> Profile:
    """The profile without runs of which no row is left.

    The first run stays, of which rates and overheads are; so do runs on one GPU while an op does
    not say which run it is of, and those on several while a transfer does not.
    """
    ops, transfers = profile.ops, profile.transfers
    used = {0, *(row.run for row in (*ops, *transfers))}
    unsaid_op, unsaid_transfer = (None in {row.run for row in rows} for rows in (ops, transfers))
    kept = [
        i for i, run in enumerate(profile.provenance)
        if i in used or (unsaid_transfer if run.num_devices > 1 else unsaid_op)
    ]  # fmt: skip
    number = {None: None, **{old: new for new, old in enumerate(kept)}}
    return profile.model_copy(
        update={
            "provenance": tuple(profile.provenance[i] for i in kept),
            "ops": tuple(row.model_copy(update={"run": number[row.run]}) for row in ops),
            "transfers": tuple(
                row.model_copy(update={"run": number[row.run]}) for row in transfers
            ),
        }
    )


@dataclass(frozen=True)
class RowChange:
    """A figure that two profiles have both: ``percent`` is the change from the first."""

    row: str
    before: int
    after: int
    spread_percent: float

    @property
    def percent(self) -> float:
        """Change in percent of the first."""
        return 100 * (self.after / self.before - 1) if self.before else 0.0

    @property
    def beyond_spread(self) -> bool:
        """Whether the change exceeds the spreads of the two measurements together."""
        return abs(self.percent) > self.spread_percent


@dataclass(frozen=True)
class ProfileDiff:
    """What a second profile has more, less and different; rows in the order of their names.

    ``other`` has the paths of what differs and is no figure: the machine's data, fitted models.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[RowChange, ...]
    unchanged: int
    other: tuple[str, ...]


def diff(first: Profile, second: Profile) -> ProfileDiff:
    """Compare two profiles figure by figure: ops, transfers, rates and overheads; and their rest,
    but for what says how it was measured.
    """
    before, after = _figures(first), _figures(second)
    both = sorted(before.keys() & after.keys())
    changes = [
        RowChange(row, before[row][0], after[row][0], before[row][1] + after[row][1])
        for row in both
    ]
    return ProfileDiff(
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(change for change in changes if change.before != change.after),
        unchanged=sum(change.before == change.after for change in changes),
        other=tuple(
            path
            for name in Profile.model_fields
            if name not in _NO_PREDICTION and name not in _OF_FIGURES
            for path in _unlike(getattr(first, name), getattr(second, name), name)
        ),
    )


def _unlike(first: object, second: object, path: str) -> Iterator[str]:
    """Paths of the fields in which two parts of a profile differ."""
    if isinstance(first, Spec) and type(first) is type(second):
        for name in type(first).model_fields:
            yield from _unlike(getattr(first, name), getattr(second, name), f"{path}.{name}")
    elif first != second:
        yield path


def _figures(profile: Profile) -> dict[str, tuple[int, float]]:
    """Figure and spread by a name that says what it is of."""
    figures = {str(row.key): (row.duration_ns, row.spread_percent) for row in profile.ops}
    for row in profile.transfers:
        name = f"{row.pattern} {row.medium} group_size={row.group_size} bytes={row.bytes}"
        figures[name] = (row.duration_ns, row.spread_percent)
    for rate in profile.rates:
        figures[f"rate {rate.name}"] = (rate.per_second, rate.spread_percent)
    for name, value in profile.overheads:
        if isinstance(value, int):
            figures[f"overhead {name}"] = (value, 0.0)
    return figures
