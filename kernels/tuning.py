"""Tile sizes of every kernel, from a table: nothing is tuned while a user waits.

``config`` looks a kernel up by its rows n and element size and takes the entry for the nearest C.
The table is written by ``benchmarks/kernels_tune.py``, which times the candidates on the GPU at
hand and prints the winners in this form; the entries here were measured on an H100 SXM.
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


# {kernel: {(n, bytes an element): {C: Config}}}; a missing (n, bytes) falls back to the default.
_DEFAULT: dict[str, Config] = {
    "project": Config(BT=64, BK=64, warps=4, stages=4),
    "pre": Config(BT=4, BC=256, warps=4, stages=2, BS=32),
    "post": Config(BT=4, BC=256, warps=4),
    "post_project": Config(BT=64, BC=32, warps=8, stages=2),
    "post_backward": Config(BT=4, BC=128, warps=4),
    "pre_reduce": Config(BT=4, BC=256, warps=4, BS=32),
    "small": Config(BS=64, warps=4),
    "pre_backward": Config(BT=64, BC=64, warps=8, stages=3, per_sm=1),
    "pre_backward_input": Config(BT=64, BC=64, warps=8, stages=1),
    "weight": Config(BT=64, BC=64, warps=4, stages=3),
    "recompute": Config(BT=4, BC=256, warps=4),
}

_TABLE: dict[str, dict[tuple[int, int], dict[int, Config]]] = {}

KERNELS = tuple(_DEFAULT)
_OVERRIDE: dict[str, Config] = {}


def override(kernel: str, chosen: Config | None) -> None:
    """Use ``chosen`` for every shape of ``kernel`` from now on; ``None`` ends that (for tuning)."""
    if chosen is None:
        _OVERRIDE.pop(kernel, None)
    else:
        _OVERRIDE[kernel] = chosen


def config(kernel: str, n: int, channels: int, tokens: int, dtype: torch.dtype) -> Config:
    """Configuration of ``kernel`` for states of ``n`` rows, ``channels`` wide.

    Raises:
        KeyError: there is no kernel of that name.
    """
    if kernel in _OVERRIDE:
        return _OVERRIDE[kernel]
    default = _DEFAULT[kernel]
    by_channels = _TABLE.get(kernel, {}).get((n, dtype.itemsize))
    if not by_channels:
        return default
    nearest = min(by_channels, key=lambda c: (abs(c - channels), c))
    return by_channels[nearest]
