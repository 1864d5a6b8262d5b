"""Memory traffic of a site by the paper's accounting, in elements a token and as multiples of C.

Table 2 of arXiv 2512.24880 and what fusing leaves of it (section 4.3.1): the numbers that make mHC
expensive, and the floor that kernels are measured against. F's own traffic is not in it; the
n^2 + 2n coefficients a token are, apart, since C does not multiply them.
"""

from __future__ import annotations

from typing import NamedTuple

from mhcplan.profiles.vocabulary import coefficients


class Traffic(NamedTuple):
    """Elements a token: ``reads`` and ``writes`` are multiples of C, the others are not."""

    reads: int
    writes: int
    small_reads: int = 0
    small_writes: int = 0

    def __add__(self, other: tuple[object, ...]) -> Traffic:
        """Traffic of one operation after the other."""
        assert isinstance(other, Traffic)
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


PLAIN_RESIDUAL = Traffic(reads=2, writes=1)


def hc_rows(n: int) -> dict[str, Traffic]:
    """Table 2: the operations of an unfused hyper-connection with n rows."""
    return {
        "coefficients": Traffic(n, 0, 0, coefficients(n)),
        "apply H_pre": Traffic(n, 1, n, 0),
        "apply H_post": Traffic(1, n, n, 0),
        "apply H_res": Traffic(n, n, n * n, 0),
        "residual merge": Traffic(2 * n, n),
    }


def hc_unfused(n: int) -> Traffic:
    """Sum of Table 2: reads (5n + 1)C + n^2 + 2n, writes (3n + 1)C + n^2 + 2n.

    >>> hc_unfused(4)
    Traffic(reads=21, writes=13, small_reads=24, small_writes=24)
    """
    return sum(hc_rows(n).values(), Traffic(0, 0))


def fused_post_res(n: int) -> Traffic:
    """F_post,res in one kernel: H_post, H_res and the merge read (n + 1)C and write nC.

    >>> fused_post_res(4)[:2]
    (5, 4)
    """
    rows = hc_rows(n)
    small = rows["apply H_post"].small_reads + rows["apply H_res"].small_reads
    return Traffic(n + 1, n, small)


def identity_forward(n: int) -> Traffic:
    """H_res = I: the scans of :func:`fused_forward`, with 2n coefficients.

    >>> identity_forward(4)
    Traffic(reads=13, writes=5, small_reads=8, small_writes=8)
    """
    return Traffic(3 * n + 1, n + 1, 2 * n, 2 * n)


def single_pass_forward(n: int) -> Traffic:
    """Single-pass mHC (arXiv 2609.19969): H_pre is the one of the site before, so that one scan
    writes the next state, the next sublayer's input and the next coefficients: (2n + 2)C.

    >>> single_pass_forward(4)
    Traffic(reads=5, writes=5, small_reads=24, small_writes=24)
    """
    small = coefficients(n)
    return Traffic(n + 1, n + 1, small, small)


def fused_forward(n: int) -> Traffic:
    """Coefficients, pre-apply and F_post,res as three kernels: (4n + 2)C in all.

    >>> sum(fused_forward(4)[:2])
    18
    """
    rows = hc_rows(n)
    return rows["coefficients"] + rows["apply H_pre"] + fused_post_res(n)
