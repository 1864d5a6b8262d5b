"""How well a profile prices what it did not measure: measured rows left out, then predicted.

A fifth of the shapes of every kind and pass is left out, chosen by a hash of their keys, so that
nobody chooses; the rest prices them. Transfers are left out by size, 1 MiB and above; the smallest
and the largest size of a curve stay: outside them a prediction is an extrapolation, which is
another question.
"""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from mhcplan.profiles.costs import CostMissing
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.vocabulary import TransferKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mhcplan.profiles.schema import OpTiming, Profile, TransferTiming

_Row = TypeVar("_Row")

ONE_IN = 5
LEAST_TRANSFER_BYTES = 2**20


class HeldOut(NamedTuple):
    """Errors of one family: an op kind, or the transfers of a pattern.

    Attributes:
        family: its name.
        shapes: of the family in the profile; held_out: how many of them were predicted.
        missing: how many of the held-out ones the rest could not price.
        median_percent, p90_percent, worst_percent: of the error's size; worst keeps its sign.
        worst: what was predicted worst.
    """

    family: str
    shapes: int
    held_out: int
    missing: int
    median_percent: float
    p90_percent: float
    worst_percent: float
    worst: str


class _Error(NamedTuple):
    family: str
    what: str
    percent: float | None


def holdout(profile: Profile) -> list[HeldOut]:
    """Errors by family: op kinds first, then patterns of transfers; ``all ops`` sums up the ops."""
    ops = _op_errors(profile)
    transfers = _transfer_errors(profile)
    sizes: dict[str, int] = defaultdict(int)
    for row in profile.ops:
        sizes[row.kind] += 1
    for row in profile.transfers:
        sizes[_pattern(row)] += row.bytes >= LEAST_TRANSFER_BYTES
    found = [
        _summary(family, sizes[family], [e for e in (*ops, *transfers) if e.family == family])
        for family in dict.fromkeys(e.family for e in (*ops, *transfers))
    ]
    return [*found, _summary("all ops", len(profile.ops), ops)]


def _op_errors(profile: Profile) -> list[_Error]:
    families: dict[tuple[str, str], list[OpTiming]] = defaultdict(list)
    for row in profile.ops:
        families[row.kind, row.pass_].append(row)
    held = [row for rows in families.values() for row in _held_out(rows, lambda r: str(r.key))]
    rest = CostModel(_without(profile, "ops", held))
    errors: list[_Error] = []
    for row in held:
        try:
            predicted = rest.op(row.key).duration_ns
        except CostMissing:
            errors.append(_Error(row.kind, str(row.key), None))
        else:
            errors.append(_Error(row.kind, str(row.key), 100 * (predicted / row.duration_ns - 1)))
    return errors


def _transfer_errors(profile: Profile) -> list[_Error]:
    curves: dict[tuple[str, str, int], list[TransferTiming]] = defaultdict(list)
    for row in profile.transfers:
        curves[row.pattern, row.medium, row.group_size].append(row)
    held: list[TransferTiming] = []
    for curve in curves.values():
        inside = sorted(curve, key=lambda row: row.bytes)[1:-1]
        large = [row for row in inside if row.bytes >= LEAST_TRANSFER_BYTES]
        held += _held_out(large, _transfer_name)
    rest = CostModel(_without(profile, "transfers", held))
    errors: list[_Error] = []
    for row in held:
        per_node = row.group_size if row.medium == "intra_node" else 1
        cost = rest.transfer(TransferKey(row.pattern, row.group_size, per_node, row.bytes))
        percent = 100 * (cost.duration_ns / row.duration_ns - 1)
        errors.append(_Error(_pattern(row), _transfer_name(row), percent))
    return errors


def _held_out(rows: Sequence[_Row], name: Callable[[_Row], str]) -> list[_Row]:
    """A fifth of ``rows``, rounded up: those whose names have the lowest hashes."""
    by_hash = sorted(rows, key=lambda row: sha256(name(row).encode()).digest())
    return by_hash[: -(-len(rows) // ONE_IN)]


def _without(
    profile: Profile, field: str, rows: Sequence[OpTiming] | Sequence[TransferTiming]
) -> Profile:
    unwanted = set(map(id, rows))
    kept = tuple(row for row in getattr(profile, field) if id(row) not in unwanted)
    return profile.model_copy(update={field: kept})


def _pattern(row: TransferTiming) -> str:
    return f"{row.pattern} {row.medium}"


def _transfer_name(row: TransferTiming) -> str:
    return f"{row.pattern} {row.medium} group_size={row.group_size} bytes={row.bytes}"


def _summary(family: str, shapes: int, errors: Iterable[_Error]) -> HeldOut:
    errors = list(errors)
    priced = [(abs(e.percent), e.percent, e.what) for e in errors if e.percent is not None]
    missing = len(errors) - len(priced)
    if not priced:
        return HeldOut(family, shapes, len(errors), missing, 0.0, 0.0, 0.0, "")
    sizes = np.array([size for size, *_ in priced])
    _, worst_percent, worst = max(priced)
    return HeldOut(
        family, shapes, len(errors), missing, float(np.median(sizes)),
        float(np.quantile(sizes, 0.9)), worst_percent, worst,
    )  # fmt: skip
