"""How kernels share out work that does not divide by itself, and how their sums come together.

Two ways to fill the chip when one dimension alone has too few tiles: cut the channels into splits,
whose partial sums a consumer adds in order; or give every program an equal share of a line of
tiles, with :func:`sum_partials` adding what programs that met in a slice left behind. Sums are
added in a fixed order: results repeat bit by bit.
"""

# ruff: noqa: ANN001, ANN202  (Triton: no types for tensors)

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from mhcplan.kernels.tuning import Config

_H100_MULTIPROCESSORS = 132  # what the interpreter takes, which has no device


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; the H100's where there is none."""
    if device.type != "cuda":
        return _H100_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def channel_splits(
    blocks: int, channels: int, step: int, device: torch.device, per_sm: int, least_steps: int = 1
) -> tuple[int, int]:
    """``(splits, steps of a split)`` of ``channels`` that fill the chip ``per_sm`` times.

    Args:
        blocks: blocks of tokens, each of which is split.
        channels: what is split; step: channels of one step.
        device: of the tensors.
        per_sm: programs that a multiprocessor should have.
        least_steps: steps that a split has at least.
    """
    most = channels // (least_steps * step) or 1
    wanted = max(1, min(most, num_multiprocessors(device) * per_sm // max(1, blocks)))
    steps = triton.cdiv(triton.cdiv(channels, wanted), step)
    return triton.cdiv(channels, steps * step), steps


class Shares(NamedTuple):
    """A line of slices, each of ``tiles`` tiles of tokens; a program takes ``share`` tiles of it.

    Attributes:
        tiles: of a slice.
        share: tiles of a program.
        programs: how many.
        slots: most programs that meet in one slice, and so leave partial sums for it.
    """

    tiles: int
    share: int
    programs: int
    slots: int


def shares(slices: int, tokens: int, cfg: Config, device: torch.device) -> Shares:
    """Share ``slices`` of ``tokens`` equally among ``cfg.per_sm`` programs a multiprocessor."""
    tiles = max(1, triton.cdiv(tokens, cfg.BT))
    programs = max(1, num_multiprocessors(device) * cfg.per_sm)
    # At least four tiles each: a program's partial sums cost about one.
    share = min(max(triton.cdiv(slices * tiles, programs), 4), slices * tiles)
    return Shares(
        tiles, share, triton.cdiv(slices * tiles, share), triton.cdiv(tiles - 1, share) + 1
    )


@triton.jit(do_not_specialize=["tiles", "share"])
def _sum_partials_kernel(
    partial_ptr, out_ptr, tiles, share,
    size: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    piece = offsets % C // BC
    slots = ((piece + 1) * tiles - 1) // share - piece * tiles // share + 1
    total = tl.load(partial_ptr + offsets, mask=offsets < size, other=0.0)
    for slot in tl.range(1, tl.max(slots)):
        inside = (offsets < size) & (slot < slots)
        total += tl.load(partial_ptr + slot * size + offsets, mask=inside, other=0.0)
    tl.store(out_ptr + offsets, total, mask=offsets < size)


def sum_partials(partial: Tensor, shared: Shares, channels: int, block_c: int) -> Tensor:
    """Add, in order, what the programs that met in a slice left: ``[slots, ...]`` to ``[...]``.

    Args:
        partial: the last dimension is made of rows of ``channels``, cut into slices of ``block_c``.
        shared: how the work was shared out.
        channels, block_c: see ``partial``.
    """
    out = partial.new_empty(partial.shape[1:])
    block = 512
    _sum_partials_kernel[(triton.cdiv(out.numel(), block),)](
        partial, out, shared.tiles, shared.share,
        size=out.numel(), C=channels, BC=block_c, BLOCK=block,
    )  # fmt: skip
    return out
