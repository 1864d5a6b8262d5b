"""What every Triton kernel of this folder shares: the interpreter's repair, masks and split dots.

Precision. Residuals are bf16 or fp32, parameters and coefficients fp32. A product of a bf16 tile
with an fp32 tile runs on the tensor cores as two bf16 products: the fp32 tile is split into its
rounded value and the remainder (16 bits of mantissa; tf32 has 10), which costs what one tf32
product costs and needs no copy of the bf16 tile in fp32. fp32 residuals use three tf32 products.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005, RET505  (Triton: no types for tensors, no
# starred tuples, and an early return under a constexpr needs its else)

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _repair_interpreter() -> None:
    """Let runtime loop bounds work under numpy >= 2.4.

    Triton 3.6 keeps scalars as arrays of shape (1,), and numpy 2.4 no longer turns those into int.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _repair_interpreter()


def residual_parts(dtype: torch.dtype) -> int:
    """Parts in which fp32 factors meet a residual: bf16 takes rounded value and remainder."""
    return 1 if dtype == torch.float32 else 2


def padded(outputs: int) -> int:
    """Width of rows that hold so many numbers and one more, for the tensor cores."""
    return max(16, triton.next_power_of_2(outputs + 1))


def padded_coefficients(n: int) -> int:
    """:func:`padded` for the M coefficients of a token."""
    return padded(n * n + 2 * n)


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` of two tiles of the residual's dtype on the tensor cores."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    elif _INTERPRETED:  # numpy has no bf16: the interpreter would multiply the bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def settled(product):
    """A product that a loop accumulates, once the tensor cores are through with it.

    Left to itself, Triton 3.6 lets the last product of an iteration run on into the next. It keeps
    a buffer more for a factor that only products read; that of a factor which is read otherwise
    too is overwritten, with zeros in the last iterations, while the product may still read it.
    """
    if _INTERPRETED:
        return product
    else:  # any use of it in the loop makes the compiler wait; this one costs nothing
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [product], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def split(tile, dtype: tl.constexpr):
    """An fp32 tile as its value rounded to ``dtype`` and the remainder in ``dtype``."""
    high = tile.to(dtype)
    return high, (tile - high.to(tl.float32)).to(dtype)


@triton.jit
def parts_and_columns(MP: tl.constexpr, PARTS: tl.constexpr):
    """Part and coefficient of the lines of a tile that has the parts one after the other."""
    j = tl.arange(0, PARTS * MP)
    return j // MP, j % MP


@triton.jit
def sum_parts(tile, PARTS: tl.constexpr):
    """``[R, PARTS * K]``, parts side by side, summed to ``[R, K]``."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], PARTS, tile.shape[1] // PARTS]), axis=1)


@triton.jit
def load_rows(ptr, offsets, mask, N: tl.constexpr, C: tl.constexpr):
    """Tiles of the n rows of a state: a tuple of n tiles; ``offsets`` are those of row 0."""
    rows = ()
    for i in tl.static_range(N):
        rows = rows + (tl.load(ptr + i * C + offsets, mask=mask, other=0.0),)
    return rows


@triton.jit
def load_mix(ptr, tokens, mask, first: tl.constexpr, count: tl.constexpr, M: tl.constexpr):
    """``count`` coefficients of each token from column ``first`` on: a tuple of vectors."""
    mix = ()
    base = ptr + tokens.to(tl.int64) * M + first
    for j in tl.static_range(count):
        mix = mix + (tl.load(base + j, mask=mask, other=0.0),)
    return mix


@triton.jit
def columns(tile):
    """The columns of a tile ``[BT, a power of two]``: a tuple of vectors, taken in registers.

    Inside a pipelined loop one load of such a tile takes the place of a load for each column,
    whose many small copies fill the queue of the memory unit.
    """
    pairs: tl.constexpr = tile.shape[1] // 2
    if pairs == 1:
        return tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], pairs, 2]))
        evens = columns(even)
        odds = columns(odd)
        both = ()
        for j in tl.static_range(pairs):
            both = both + (evens[j], odds[j])
        return both


@triton.jit
def replaced(items, index: tl.constexpr, value):
    """A tuple with another value at ``index``."""
    new = ()
    for j in tl.static_range(len(items)):
        new = new + ((value if j == index else items[j]),)
    return new


@triton.jit
def fold(tile, V: tl.constexpr):
    """Sum groups of V neighbouring channels (inside one thread): [BT, BC] -> [BT, BC / V]."""
    if V == 1:
        return tile
    else:
        return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // V, V]), axis=2)


@triton.jit
def _split_phi_kernel(phi_ptr, out_ptr, size: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    high, low = split(tl.load(phi_ptr + offsets, mask=mask, other=0.0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, high, mask=mask)
    tl.store(out_ptr + size + offsets, low, mask=mask)


def split_phi(phi: Tensor, dtype: torch.dtype) -> Tensor:
    """phi ``[M, K]`` in the residual's dtype: ``[parts, M, K]``.

    Every projection does so first, in a launch that takes about 5 us when nothing is in L2. Split
    tile by tile in the loop over the channels, phi would reach the tensor cores by way of
    registers, behind two more barriers a step.
    """
    if residual_parts(dtype) == 1:
        return phi.unsqueeze(0)
    out = phi.new_empty((2, *phi.shape), dtype=dtype)
    block = 2048
    _split_phi_kernel[(triton.cdiv(phi.numel(), block),)](
        phi, out, size=phi.numel(), BLOCK=block, num_warps=4
    )
    return out
