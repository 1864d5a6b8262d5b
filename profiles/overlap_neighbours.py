"""What a played pair is off by, from measured pairs of the same kernel.

The engine's model is off alike for like traffic: what it misses of a kernel beside messages of 8
MiB it misses beside those of 16. So the price of a pair is what the engine plays, times what
measured pairs of that kernel are off by, the more alike their traffic is the more they count: the
mean of a Gaussian process over the logarithms of what they are off by (C. E. Rasmussen, C. K. I.
Williams, Gaussian Processes for Machine Learning, 2006, equation 2.25). Pairs of other kernels say
nothing: a kernel left out altogether was priced no better by them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.profiles.contention_fit import predict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mhcplan.profiles.contention_fit import Pair
    from mhcplan.sim.device_kernels import Parameters

# Held-out errors hardly depend on either: 0.6 to 0.9 and 0.1 to 0.5 differ by less than 0.4 points
_ALIKE = 0.75  # how much of what two pairs are off by is common, for each step between them
_PARTICULAR = 0.25  # variance of what is particular to one pair, as a share of the common one's


class Priced(NamedTuple):
    """Slowdowns of a pair, and how many measured pairs they were brought nearer to."""

    compute: float
    traffic: float
    neighbours: int


class Neighbours:
    """Measured pairs that prices are brought nearer to."""

    def __init__(self, known: Iterable[Pair], parameters: Parameters) -> None:
        """``known``: measured pairs; ``parameters`` of the model that plays."""
        self._parameters = parameters
        self._known: defaultdict[str, list[Pair]] = defaultdict(list)
        for pair in known:
            self._known[pair.compute].append(pair)
        self._off: dict[str, list[tuple[float, float]]] = {}

    def price(self, pair: Pair, played: tuple[float, float]) -> Priced:
        """Slowdowns of a pair that the model plays as ``played``. The pair itself, if it is known,
        and pairs of which one is sent ahead and the other is not, do not count."""
        known = self._known[pair.compute]
        off = self._off_of(pair.compute)
        alike = [
            i for i, other in enumerate(known)
            if other.name != pair.name and other.message.eager == pair.message.eager
        ]  # fmt: skip
        if not alike:
            return Priced(*played, 0)
        others = [known[i] for i in alike]
        common = _common(others, others) + _PARTICULAR * np.eye(len(others))
        weights = np.linalg.solve(common, _common(others, [pair]))[:, 0]
        logs = weights @ np.array([off[i] for i in alike])
        compute, traffic = (
            one * math.exp(log) for one, log in zip(played, logs.tolist(), strict=True)
        )
        return Priced(compute, traffic, len(others))

    def _off_of(self, compute: str) -> list[tuple[float, float]]:
        """Logarithms of measured over played, of either side, of the known pairs of a kernel."""
        if compute not in self._off:
            self._off[compute] = [
                (math.log(pair.measured[0] / played[0]), math.log(pair.measured[1] / played[1]))
                for pair in self._known[compute]
                for played in (predict(pair, self._parameters),)
            ]
        return self._off[compute]


def price_errors(pairs: Sequence[Pair], parameters: Parameters) -> list[tuple[Pair, float, float]]:
    """Error |predicted / measured - 1| of both sides of each held-out pair, priced with the help of
    those that are not held out."""
    neighbours = Neighbours((pair for pair in pairs if not pair.held_out), parameters)
    found: list[tuple[Pair, float, float]] = []
    for pair in pairs:
        if pair.held_out:
            price = neighbours.price(pair, predict(pair, parameters))
            compute, traffic = pair.measured
            found.append((pair, abs(price.compute / compute - 1), abs(price.traffic / traffic - 1)))
    return found


def _common(first: Sequence[Pair], second: Sequence[Pair]) -> np.ndarray:
    return np.array([[_ALIKE ** _steps(a, b) for b in second] for a in first])


def _steps(a: Pair, b: Pair) -> float:
    """How far apart the traffic of two pairs is: one for another pattern, another priority and
    other ranks that compute, and one for each doubling of bytes and of CTAs."""
    return (
        (a.pattern != b.pattern)
        + (a.message.high_priority != b.message.high_priority)
        + (a.message.both_busy != b.message.both_busy)
        + abs(math.log2(a.num_bytes / b.num_bytes))
        + abs(math.log2(max(a.message.ctas, 1) / max(b.message.ctas, 1)))
    )
