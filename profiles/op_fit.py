"""How long the kernels of one kind take, by physical form: launch, arithmetic and bytes.

    time = a + b flops / GEMM rate + c bytes / copy rate,    a, b, c >= 0,

with the vocabulary's flops and bytes and the profile's own rates. The three numbers are the least
squares of the relative error over the measured shapes: a is what every launch of the kind pays, b
and c are by how much it misses the two rates. Different expansion rates n run different kernels,
so each n with enough shapes has its own three. What the form leaves over is small and varies
slowly from shape to shape; :mod:`mhcplan.profiles.op_costs` interpolates it.
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

_ENOUGH = 4  # shapes: one more than there are terms
_TERMS = 3


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
    """The form, fitted to the measured shapes of one kind and pass; else the roofline."""

    def __init__(
        self, keys: Sequence[OpKey], durations_ns: Sequence[int], roofline: Roofline
    ) -> None:
        """Fit; where fewer than four shapes were measured, the roofline is all there is."""
        self._roofline = roofline
        self._fits: dict[int | None, Floats] = {}
        shapes: dict[int | None, list[tuple[OpKey, int]]] = {}
        # ordered, so that no bit depends on the order of the profile's rows
        for key, duration_ns in sorted(zip(keys, durations_ns, strict=True)):
            shapes.setdefault(None, []).append((key, duration_ns))
            if (n := _rows_of_state(key)) is not None:
                shapes.setdefault(n, []).append((key, duration_ns))
        for n, measured in shapes.items():
            if len(measured) >= _ENOUGH:
                terms = np.array([self._terms(key) for key, _ in measured])
                durations = np.array([duration_ns for _, duration_ns in measured], float)
                self._fits[n] = _least_squares(terms / durations[:, None])

    def __call__(self, key: OpKey) -> float:
        """Time of ``key`` in ns, at least 1."""
        fit = self._fits.get(_rows_of_state(key), self._fits.get(None))
        if fit is None:
            return self._roofline(key)
        return max(float(fit @ self._terms(key)), 1.0)

    def _terms(self, key: OpKey) -> Floats:
        return np.array([1.0, *self._roofline.work_ns(key)])


def _rows_of_state(key: OpKey) -> int | None:
    return dict(key.shape).get("n")


def _least_squares(terms: Floats) -> Floats:
    """Non-negative x that makes ``terms @ x`` nearest to 1, by trying which of the x are 0.

    Args:
        terms: [shape, term], each row over the duration that was measured.
    """
    best, least = np.zeros(_TERMS), float(len(terms))
    for count in range(1, _TERMS + 1):
        for used in map(list, combinations(range(_TERMS), count)):
            found = np.linalg.lstsq(terms[:, used], np.ones(len(terms)), rcond=None)[0]
            if (found < 0).any():
                continue
            x = np.zeros(_TERMS)
            x[used] = found
            error = float(((terms @ x - 1) ** 2).sum())
            if error < least:
                best, least = x, error
    return best
