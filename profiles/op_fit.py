"""How long the kernels of one kind take, by physical form: launch, arithmetic and bytes.

    time = a + b products + c scores + d bytes + e longer of products and bytes + f splits
           + g stores,

a .. g >= 0; work is in the time that it takes at the profile's own rates. The numbers are the least
squares of the relative error over the measured shapes: a is what every launch of the kind pays,
b .. d are by how much it misses the rates, e is for kernels that compute and move bytes at once,
f is what one more split costs where few tokens are to fill the chip, and g is for what a product
stores when its sums are done, which no arithmetic of its own hides (in FP8, where the sums take
half as long, it shows). The vocabulary counts the
work; of grouped products whole tiles are counted. Kinds that run the same kernels share a fit
(:data:`ALIKE`); different expansion rates n run different ones, so each n with enough shapes has
its own. What the form leaves over is small and varies slowly from shape to shape;
:mod:`mhcplan.profiles.op_costs` interpolates it.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.profiles.schema import SECOND_NS, ProfileError
from mhcplan.profiles.vocabulary import OP_KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mhcplan.profiles.schema import Profile
    from mhcplan.profiles.vocabulary import OpKey

    Floats = NDArray[np.float64]

_TERMS = 7

# Kinds that run the same kernels at other sizes: what one teaches holds for the other.
_FAMILIES = (("attention_gqa", "attention_mla"), ("experts", "experts_skewed"))
ALIKE = {kind: family for family in _FAMILIES for kind in family}

# A grouped product gives each expert whole tiles of rows: torch's runs two CTAs of 128 rows side by
# side (on an H100, 72 experts of 341 rows take as long as if they had 512). W sums over rows.
_TILE_ROWS = 256

# F's projection sums over channels. Tiles of so many tokens fill the chip that many times over: the
# fewer they are, the more splits each sum is cut into, and the next kernel adds these one by one.
_PROJECTING = ("mhc_pre", "hc_pre", "mhc_collapse")
SPLIT_TOKENS, _SPLITS_PER_SM = 64, 2


def whole_tiles(key: OpKey) -> float:
    """Rows that the grouped products of the op compute, over the rows that experts have; else 1."""
    shape = dict(key.shape)
    if key.pass_ == "W" or key.kind not in ALIKE["experts"]:
        return 1.0
    rows, experts, tiles = shape["rows"], shape["experts"], 0
    if "largest" in shape:  # of one expert, in percent; the others share what is left
        tiles = -(-(first := rows * shape["largest"] // 100) // _TILE_ROWS)
        rows, experts = rows - first, experts - 1
    share, more = divmod(rows, max(experts, 1))
    tiles += more * -(-(share + 1) // _TILE_ROWS) + (experts - more) * -(-share // _TILE_ROWS)
    return tiles * _TILE_ROWS / max(shape["rows"], 1)


def splits(key: OpKey, num_sms: int) -> int:
    """Partial sums that the projection of the op is cut into on so many SMs; 0: it has none."""
    if key.pass_ != "F" or key.kind not in _PROJECTING:
        return 0
    tiles = -(-dict(key.shape)["tokens"] // SPLIT_TOKENS)
    return max(num_sms * _SPLITS_PER_SM // max(tiles, 1), 1)


class Roofline:
    """Least time of an op on the profiled machine, in ns, by the profile's own rates."""

    def __init__(self, profile: Profile) -> None:
        """Take the rates and the launch floor of ``profile``.

        Raises:
            ProfileError: a rate is missing.
        """
        rates = {rate.name: rate.per_second for rate in profile.rates}
        for name in ("gemm_bf16_flops", "copy_bytes"):
            if name not in rates:
                raise ProfileError(f"profile {profile.name}: rates: {name} is missing")
        self._flops, self._bytes = rates["gemm_bf16_flops"], rates["copy_bytes"]
        self._launch_ns = profile.overheads.launch_ns
        self.num_sms = profile.hardware.num_sms

    def work_ns(self, key: OpKey) -> tuple[float, float]:
        """Time of the op's arithmetic and of its bytes, each at the full rate."""
        kind, shape = OP_KINDS[key.kind], dict(key.shape)
        flops, num_bytes = kind.flops(shape, key.pass_), kind.bytes(shape, key.pass_)
        return flops / self._flops * SECOND_NS, num_bytes / self._bytes * SECOND_NS

    def __call__(self, key: OpKey) -> float:
        """Launch floor plus the longer of computing and moving bytes, in ns, at least 1."""
        # an empty op on a machine without a launch floor still has a logarithm
        return max(self._launch_ns + max(self.work_ns(key)), 1.0)


class FittedTime:
    """The form, fitted to the measured shapes of a family in one pass; else the roofline."""

    def __init__(
        self, keys: Sequence[OpKey], durations_ns: Sequence[int], roofline: Roofline
    ) -> None:
        """Fit; where the terms are not fewer than the shapes, the roofline is all there is."""
        self._roofline = roofline
        self._fits: dict[int | None, Floats] = {}
        shapes: dict[int | None, list[tuple[OpKey, int]]] = {}
        # ordered, so that no bit depends on the order of the profile's rows
        for key, duration_ns in sorted(zip(keys, durations_ns, strict=True)):
            shapes.setdefault(None, []).append((key, duration_ns))
            if (n := _rows_of_state(key)) is not None:
                shapes.setdefault(n, []).append((key, duration_ns))
        for n, measured in shapes.items():
            terms = np.array([self._terms(key) for key, _ in measured])
            used = _independent(terms)
            if len(used) < len(measured):
                durations = np.array([duration_ns for _, duration_ns in measured], float)
                self._fits[n] = _least_squares(terms / durations[:, None], used)

    def __call__(self, key: OpKey) -> float:
        """Time of ``key`` in ns, at least 1."""
        fit = self._fits.get(_rows_of_state(key), self._fits.get(None))
        if fit is None:
            return self._roofline(key)
        return max(float(fit @ self._terms(key)), 1.0)

    def _terms(self, key: OpKey) -> Floats:
        kind, shape = OP_KINDS[key.kind], dict(key.shape)
        flops, num_bytes = (max(count(shape, key.pass_), 1) for count in (kind.flops, kind.bytes))
        flops_ns, bytes_ns = self._roofline.work_ns(key)
        scores_ns = flops_ns * kind.scores(shape, key.pass_) / flops
        products_ns = (flops_ns - scores_ns) * whole_tiles(key)
        num_splits = splits(key, self._roofline.num_sms)
        # W adds its product to a gradient in memory when it is done: nothing overlaps there
        longer_ns = max(products_ns, bytes_ns) if key.pass_ != "W" else 0.0
        stores_ns = bytes_ns * kind.stores(shape, key.pass_) / num_bytes
        return np.array([1.0, products_ns, scores_ns, bytes_ns, longer_ns, num_splits, stores_ns])


def _rows_of_state(key: OpKey) -> int | None:
    return dict(key.shape).get("n")


def _independent(terms: Floats) -> list[int]:
    """Columns that are not 0, each of equal ones once (all shapes may be bound by memory)."""
    kept: list[int] = []
    for i in range(_TERMS):
        if terms[:, i].any() and not any((terms[:, i] == terms[:, j]).all() for j in kept):
            kept.append(i)
    return kept


def _least_squares(terms: Floats, present: list[int]) -> Floats:
    """Non-negative x that makes ``terms @ x`` nearest to 1, by trying which of the x are 0.

    Args:
        terms: [shape, term], each row over the duration that was measured.
        present: columns to use; x is 0 elsewhere.
    """
    best, least = np.zeros(_TERMS), float(len(terms))
    for count in range(1, len(present) + 1):
        for used in map(list, combinations(present, count)):
            found = np.linalg.lstsq(terms[:, used], np.ones(len(terms)), rcond=None)[0]
            if (found < 0).any():
                continue
            x = np.zeros(_TERMS)
            x[used] = found
            error = float(((terms @ x - 1) ** 2).sum())
            if error < least:
                best, least = x, error
    return best
