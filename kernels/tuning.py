"""Tile sizes of every kernel, from a table: nothing is tuned while a user waits.

``config`` looks a kernel up by its rows n and bytes an element, and takes the tuned entry for the
nearest C if there is one. ``benchmarks/kernels_tune.py`` times candidates on the GPU at hand and
prints the winners in the form of ``_TUNED``. The entries for n = 4 and 8 in bf16 were timed on an
H100 SXM, and what else is in ``_TUNED``; others were chosen by what the compiler makes of them (no
spills, shared memory that fits). In fp32 a product has 16 rows for each of its warps or is too
small for warpgroups: of one whose warps repeat rows, ptxas makes code that reads outside shared
memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Config(NamedTuple):
    """Tile of one kernel; a kernel ignores the fields it has no use for.

    Attributes:
        BT: tokens of a tile.
        BC: channels of a tile.
        warps: warps of a program.
        stages: loads in flight ahead of the one in use; 1 turns software pipelining off.
        BK: channels of all rows together in a step of the projection.
        BS: tokens of a program that works out coefficients or their gradients.
        steps_c: channel tiles that one program walks.
        per_sm: programs that should share a multiprocessor, where the grid can be chosen.
        V: neighbouring channels summed inside a thread before they are accumulated.
    """

    BT: int = 4
    BC: int = 256
    warps: int = 4
    stages: int = 1
    BK: int = 64
    BS: int = 32
    steps_c: int = 1
    per_sm: int = 2
    V: int = 1


# n = 4 in bf16, and whatever has no entry of its own.
_DEFAULT: dict[str, Config] = {
    "project": Config(BT=64, BK=128, warps=4, stages=3),
    "pre": Config(BT=2, BC=512, warps=4, stages=3, BS=64),
    "post": Config(BT=1, BC=1024, warps=4),
    "post_project": Config(BT=64, BC=64, warps=8, stages=3, per_sm=1),
    "post_backward": Config(BT=4, BC=256, warps=4, V=8),
    "pre_reduce": Config(BT=4, BC=256, warps=4, BS=32, V=8),
    "small": Config(BS=64, warps=4),
    "pre_backward": Config(BT=16, BC=128, warps=8, stages=3, per_sm=1),
    "pre_backward_input": Config(BT=16, BC=128, warps=8, stages=3, per_sm=1),
    "weight": Config(BT=64, BC=64, warps=4, stages=4, per_sm=4),
    "recompute": Config(BT=4, BC=256, warps=4),
    "wide_project": Config(BT=128, BK=64, warps=8, stages=3),
    "wide_input": Config(BT=32, BC=64, warps=4, stages=3),
    "wide_weight": Config(BT=64, BK=128, warps=8, stages=3),
    "hc_project": Config(BT=64, BK=128, warps=4, stages=3),
    "hc_pre": Config(BT=2, BC=512, warps=4, stages=3),
    "hc_reduce": Config(BT=8, BC=256, warps=8, per_sm=4, V=8),
    "hc_pre_backward": Config(BT=16, BC=128, warps=8, stages=3, per_sm=1),
    "hc_pre_backward_input": Config(BT=16, BC=128, warps=8, stages=3, per_sm=1),
    "hc_wide_input": Config(BT=32, BC=64, warps=4, stages=3),
    "hc_weight": Config(BT=64, BC=64, warps=4, stages=4, per_sm=4),
}

# What does not fit, or not well, at other (n, bytes an element).
_OTHER: dict[tuple[int, int], dict[str, Config]] = {
    (2, 4): {
        "pre_backward": Config(BT=32, BC=32, warps=4, per_sm=4),
        "pre_backward_input": Config(BT=32, BC=32, warps=4, per_sm=4),
        "project": Config(BT=64, BK=64, warps=4, stages=3),
        "hc_project": Config(BT=64, BK=64, warps=4, stages=3),
    },
    (4, 4): {
        "project": Config(BT=64, BK=64, warps=4, stages=2),
        "post_project": Config(BT=64, BC=32, warps=8),
        "pre_backward_input": Config(BT=32, BC=32, warps=4, stages=2, per_sm=2),
        "weight": Config(BT=64, BC=64, warps=4, stages=2, per_sm=2),
        "hc_project": Config(BT=64, BK=64, warps=4, stages=3),
    },
    (8, 2): {
        "small": Config(BS=32, warps=4),
        "post": Config(BT=1, BC=512, warps=2),
        "post_backward": Config(BT=4, BC=256, warps=4, stages=3, V=8),
        "pre_reduce": Config(BT=2, BC=512, warps=4, BS=64, V=8),
        "recompute": Config(BT=2, BC=256, warps=4),
        "hc_reduce": Config(BT=4, BC=512, warps=8, per_sm=4, V=8),
    },
    (8, 4): {
        "hc_project": Config(BT=64, BK=64, warps=4, stages=3),
        "hc_wide_input": Config(BT=32, BC=32, warps=8),
        "small": Config(BS=32, warps=4),
        "wide_project": Config(BT=64, BK=32, warps=4, stages=3),
        "wide_input": Config(BT=32, BC=32, warps=8),
        "wide_weight": Config(BT=32, BK=64, warps=4, stages=2),
        "post": Config(BT=2, BC=256, warps=4),
        "post_backward": Config(BT=2, BC=256, warps=4, V=8),
        "recompute": Config(BT=2, BC=128, warps=4),
    },
    (16, 2): {
        "pre": Config(BT=2, BC=512, warps=4, stages=3, BS=16),
        "hc_reduce": Config(BT=2, BC=512, warps=8, per_sm=4, V=8),
        "hc_wide_input": Config(BT=32, BC=32, warps=8),
        "small": Config(BS=16, warps=8),
        "wide_project": Config(BT=64, BK=32, warps=8, stages=3, per_sm=1),
        "wide_input": Config(BT=32, BC=32, warps=8),
        "wide_weight": Config(BT=32, BK=64, warps=8, stages=2, per_sm=1),
        "post": Config(BT=2, BC=128, warps=4),
        "post_backward": Config(BT=2, BC=256, warps=4, V=8),
        "recompute": Config(BT=2, BC=128, warps=4),
    },
    (16, 4): {
        "pre": Config(BT=2, BC=512, warps=4, stages=3, BS=16),
        "hc_project": Config(BT=64, BK=32, warps=4, stages=3),
        "hc_reduce": Config(BT=2, BC=256, warps=8, per_sm=4, V=8),
        "hc_wide_input": Config(BT=16, BC=32, warps=8),
        "small": Config(BS=16, warps=8),
        "wide_project": Config(BT=32, BK=16, warps=8, stages=2, per_sm=1),
        "wide_input": Config(BT=16, BC=32, warps=8),
        "wide_weight": Config(BT=16, BK=32, warps=8, stages=1, per_sm=1),
        "post": Config(BT=2, BC=128, warps=4),
        "post_backward": Config(BT=2, BC=256, warps=4, V=8),
        "recompute": Config(BT=2, BC=128, warps=4),
    },
}

# Tuned: {(n, bytes an element): {kernel: {C: Config}}}.
_ByWidth = dict[str, dict[int, Config]]
_TUNED: dict[tuple[int, int], _ByWidth] = {
    # Four warps at n = 2 and for HC: dp of 16 tokens (HC's: of a row) is 256 numbers of two bytes,
    # and asynchronous copies take four.
    (2, 2): {
        "pre_backward": {2560: Config(BT=16, BC=64, warps=4, stages=4)},
        "pre_backward_input": {2560: Config(BT=16, BC=128, warps=4, stages=3)},
    },
    (4, 2): {
        "hc_pre_backward": {2560: Config(BT=16, BC=128, warps=4, stages=3)},
        "hc_pre_backward_input": {2560: Config(BT=16, BC=128, warps=4, stages=3)},
        "pre": {
            2560: Config(BT=2, BC=512, warps=4, stages=3, BS=64),
            4096: Config(BT=1, BC=1024, warps=4, stages=3, BS=64),
        },
        "post_backward": {
            2560: Config(BT=4, BC=256, warps=4, V=8),
            4096: Config(BT=2, BC=512, warps=4, stages=3, V=8),
        },
        "pre_reduce": {
            2560: Config(BT=4, BC=256, warps=4, BS=16, V=8),
            4096: Config(BT=4, BC=256, warps=4, BS=32, V=8),
            7168: Config(BT=2, BC=512, warps=4, BS=64, V=8),
        },
    },
    (8, 2): {
        "pre": {
            2560: Config(BT=2, BC=512, warps=4, stages=3, BS=64),
            7168: Config(BT=1, BC=1024, warps=4, stages=3, BS=64),
        },
    },
}

# Tuned for no more tokens than that, where other tiles win than for many: programs that work out
# coefficients, of fewer tokens each, are then still enough to fill the chip.
_FEW_TOKENS = 4096
_TUNED_FOR_FEW: dict[tuple[int, int], _ByWidth] = {
    (4, 2): {
        "pre": {
            2560: Config(BT=2, BC=512, warps=4, stages=3, BS=16),
            4096: Config(BT=1, BC=1024, warps=4, stages=3, BS=64),
        },
    },
    (8, 2): {"pre": {2560: Config(BT=4, BC=256, warps=4, BS=16)}},
}

KERNELS = tuple(_DEFAULT)
_OVERRIDE: dict[str, Config] = {}


def override(kernel: str, chosen: Config | None) -> None:
    """Use ``chosen`` for every shape of ``kernel`` from now on; ``None`` ends that (for tuning)."""
    if chosen is None:
        _OVERRIDE.pop(kernel, None)
    else:
        _OVERRIDE[kernel] = chosen


def config(
    kernel: str, n: int, channels: int, dtype: torch.dtype, tokens: int | None = None
) -> Config:
    """Configuration of ``kernel`` for states of ``n`` rows, ``channels`` wide.

    ``tokens``: given for kernels only whose tiles depend on how many there are.

    Raises:
        KeyError: there is no kernel of that name.
    """
    if kernel in _OVERRIDE:
        return _OVERRIDE[kernel]
    kind = n, dtype.itemsize
    by_channels = _TUNED.get(kind, {}).get(kernel)
    if tokens is not None and tokens <= _FEW_TOKENS:
        by_channels = _TUNED_FOR_FEW.get(kind, {}).get(kernel, by_channels)
    if not by_channels:
        return _OTHER.get(kind, {}).get(kernel, _DEFAULT[kernel])
    return by_channels[min(by_channels, key=lambda c: (abs(c - channels), c))]
