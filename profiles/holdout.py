"""How well a profile prices what it did not measure: measured rows left out, then predicted.

A fifth of the shapes of every kind and pass is left out, chosen by a hash of their keys, so that
nobody chooses; the rest prices them. Of a curve (transfers by size, from 1 MiB on; ops with one
axis) the smallest and the largest stay: outside them a prediction is an extrapolation, which is
another question. Overlapped pairs are held out by a hash of their names, when the contention model
is fitted.

Every family has bars, and says by how much it misses them: :data:`BARS`.
"""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from mhcplan.profiles.contention_fit import TRAITS, Pairs
from mhcplan.profiles.costs import CostMissing
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.overlap import parameters_of, rows_of
from mhcplan.profiles.overlap_neighbours import price_errors
from mhcplan.profiles.vocabulary import OP_KINDS, TransferKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mhcplan.profiles.logs import Entry
    from mhcplan.profiles.schema import OpTiming, Profile, TransferTiming

_Row = TypeVar("_Row")

ONE_IN = 5
LEAST_TRANSFER_BYTES = 2**20


class Bar(NamedTuple):
    """What the errors of a family may be, and how much of it must be held out, in percent; None:
    anything.
    """

    share: float | None = 100 / ONE_IN
    median: float | None = None
    p90: float | None = None
    mean: float | None = None
    worst: float | None = None


# median and 90th percentile of shapes; messages of pipelines and experts, from 1 MiB on, each;
# slowdowns of overlapped pairs on average
BARS = {
    "ops": Bar(median=5.0, p90=12.0),
    "transfers": Bar(median=5.0, p90=12.0),
    "messages": Bar(worst=5.0),
    "pairs": Bar(mean=5.0, share=None),  # each by its own hash: one in five, more or less
}
_MESSAGES = ("send_recv", "send_recv_both", "all_to_all")


class HeldOut(NamedTuple):
    """Errors of one family: an op kind, the transfers of a pattern, a side of overlapped pairs.

    Attributes:
        family: its name.
        shapes: of the family in the profile; held_out: how many of them were predicted.
        missing: how many of the held-out ones the rest could not price.
        median_percent, p90_percent, mean_percent, worst_percent: of the error's size; worst keeps
            its sign.
        worst: what was predicted worst.
        bar: what is asked of it.
    """

    family: str
    shapes: int
    held_out: int
    missing: int
    median_percent: float
    p90_percent: float
    mean_percent: float
    worst_percent: float
    worst: str
    bar: Bar

    @property
    def misses(self) -> tuple[str, ...]:
        """Which bars it misses, with the figures; none: it passes."""
        errors = {
            "median": self.median_percent, "p90": self.p90_percent, "mean": self.mean_percent,
            "worst": abs(self.worst_percent),
        }  # fmt: skip
        problems = [
            f"{name} {error:.1f} % over {limit:g} %"
            for name, error in errors.items()
            if (limit := getattr(self.bar, name)) is not None and error > limit
        ]
        if self.bar.share is not None and 100 * self.held_out < self.bar.share * self.shapes:
            problems.append(f"{self.held_out} of {self.shapes} held out")
        if self.missing:
            problems.append(f"{self.missing} without a price")
        return tuple(problems)


class _Error(NamedTuple):
    family: str
    what: str
    percent: float | None


def holdout(profile: Profile, contention_log: Sequence[Entry] = ()) -> list[HeldOut]:
    """Errors by family: op kinds, patterns of transfers, overlapped pairs; and of all ops.

    ``contention_log``: of the capture that the contention model was fitted to
    (:func:`mhcplan.profiles.store.contention_log`); empty: no pairs.
    """
    ops = _op_errors(profile)
    transfers = _transfer_errors(profile)
    sizes: dict[str, int] = defaultdict(int)
    bars: dict[str, Bar] = {}
    for row in profile.ops:
        sizes[row.kind] += 1
        bars[row.kind] = BARS["ops"]
    for row in profile.transfers:
        sizes[_pattern(row)] += row.bytes >= LEAST_TRANSFER_BYTES
        bars[_pattern(row)] = BARS["messages" if row.pattern in _MESSAGES else "transfers"]
    found = [
        _summary(name, sizes[name], [e for e in (*ops, *transfers) if e.family == name], bars[name])
        for name in dict.fromkeys(e.family for e in (*ops, *transfers))
    ]
    found.append(_summary("all ops", len(profile.ops), ops, BARS["ops"]))
    if contention_log and profile.contention_model is not None:
        found += _pairs(profile, contention_log)
    return found


def _pairs(profile: Profile, log: Sequence[Entry]) -> list[HeldOut]:
    """Slowdowns of both sides, and of each by itself; of sends that go ahead of their receiver
    apart: in a step both ends meet."""
    parameters = parameters_of(profile)
    pairs = Pairs(rows_of(log), parameters.num_sms).pairs(TRAITS)
    held = price_errors(pairs, parameters)
    found: list[HeldOut] = []
    for what, ahead in (("pairs", False), ("pairs, sent ahead", True)):
        count = sum(pair.message.eager == ahead for pair in pairs)
        alike = [error for error in held if error[0].message.eager == ahead]
        compute = [_Error("compute", pair.name, 100 * error) for pair, error, _ in alike]
        traffic = [_Error("traffic", pair.name, 100 * error) for pair, _, error in alike]
        for family, errors in (
            (what, [*compute, *traffic]), (f"{what}: compute", compute),
            (f"{what}: traffic", traffic),
        ):  # fmt: skip
            found.append(_summary(family, count, errors, BARS["pairs"]))
    return found


def _op_errors(profile: Profile) -> list[_Error]:
    families: dict[tuple[str, str], list[OpTiming]] = defaultdict(list)
    for row in profile.ops:
        families[row.kind, row.pass_].append(row)
    held = [
        row
        for (kind, _), rows in families.items()
        for row in _held_out(_inside_of_curve(kind, rows), lambda r: str(r.key), len(rows))
    ]
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
        count = sum(row.bytes >= LEAST_TRANSFER_BYTES for row in curve)
        held += _held_out(large, _transfer_name, count)
    rest = CostModel(_without(profile, "transfers", held))
    errors: list[_Error] = []
    for row in held:
        per_node = row.group_size if row.medium == "intra_node" else 1
        cost = rest.transfer(TransferKey(row.pattern, row.group_size, per_node, row.bytes))
        percent = 100 * (cost.duration_ns / row.duration_ns - 1)
        errors.append(_Error(_pattern(row), _transfer_name(row), percent))
    return errors


def _inside_of_curve(kind: str, rows: list[OpTiming]) -> list[OpTiming]:
    """All rows of a kind with several axes; of one with one axis, all but its ends."""
    axis, *others = OP_KINDS[kind].axes
    return rows if others else sorted(rows, key=lambda row: row.shape[axis])[1:-1]


def _held_out(rows: Sequence[_Row], name: Callable[[_Row], str], family: int) -> list[_Row]:
    """A fifth of a family of so many, rounded up: the ``rows`` whose names have lowest hashes."""
    by_hash = sorted(rows, key=lambda row: sha256(name(row).encode()).digest())
    return by_hash[: -(-family // ONE_IN)]


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


def _summary(family: str, shapes: int, found: Iterable[_Error], bar: Bar) -> HeldOut:
    held = list(found)
    priced = [(abs(e.percent), e.percent, e.what) for e in held if e.percent is not None]
    missing = len(held) - len(priced)
    if not priced:
        return HeldOut(family, shapes, len(held), missing, 0.0, 0.0, 0.0, 0.0, "", bar)
    sizes = np.array([size for size, *_ in priced])
    _, worst_percent, worst = max(priced)
    return HeldOut(
        family, shapes, len(held), missing, float(np.median(sizes)),
        float(np.quantile(sizes, 0.9)), float(sizes.mean()), worst_percent, worst, bar,
    )  # fmt: skip
