"""Sets of half-open intervals [begin, end) of integers, as sorted arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


def fresh_lengths(begin: Ints, end: Ints) -> Ints:
    """How much each interval adds to the union of those before it; ``begin`` must be sorted."""
    reached = np.maximum.accumulate(end)
    from_ = begin.copy()
    from_[1:] = np.maximum(from_[1:], reached[:-1])
    return np.maximum(end - from_, 0)


@dataclass(frozen=True)
class Union:
    """The union of intervals: disjoint, sorted, with gaps between them."""

    begin: Ints
    end: Ints

    @staticmethod
    def of(begin: Ints, end: Ints) -> Union:
        """Unite any intervals; those with ``end <= begin`` are empty."""
        full = end > begin
        by_begin = np.argsort(begin[full], kind="stable")
        begin, reached = begin[full][by_begin], np.maximum.accumulate(end[full][by_begin])
        opens = np.ones(len(begin), np.bool_)
        opens[1:] = begin[1:] > reached[:-1]
        closes = np.roll(opens, -1)  # the last one closes, as the first one opens
        return Union(begin[opens], reached[closes])

    def below(self, at: Ints) -> Ints:
        """Length of the part below each of the given instants."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.end - self.begin)])
        count = np.searchsorted(self.begin, at, side="right")
        inside = np.zeros(len(at), np.int64)
        some = count > 0
        inside[some] = np.maximum(self.end[count[some] - 1] - at[some], 0)
        return total[count] - inside

    def common(self, begin: Ints, end: Ints) -> Ints:
        """Length that each given interval has in common with the union."""
        return self.below(end) - self.below(begin)
