"""Argument checks shared by the kernels' front doors; every message names the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mhcplan.kernels.reference import num_coefficients

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = (2, 4, 8, 16)
RESIDUAL_DTYPES = (torch.bfloat16, torch.float32)


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Check one tensor against what it has to be.

    Raises:
        TypeError: it is no tensor, or its dtype differs.
        ValueError: its shape, device or layout differs.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")


def check_sizes(n: int, channels: int) -> None:
    """Check the rows and the width of a state.

    Raises:
        ValueError: n or C is not supported.
    """
    if n not in ROWS:
        raise ValueError(f"n={n} rows are not supported, expected one of {ROWS}")
    if channels <= 0 or channels % 64:
        raise ValueError(f"C={channels} channels are not supported, expected a multiple of 64")


def check_state(name: str, x: Tensor) -> tuple[int, int, int]:
    """Check a state ``[T, n, C]`` and return its three sizes.

    Raises:
        TypeError: it is no tensor, or neither bf16 nor fp32.
        ValueError: its rank, n, C or layout is not supported.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [T, n, C]")
    if x.dtype not in RESIDUAL_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}, expected bfloat16 or float32")
    tokens, n, channels = x.shape
    if n not in ROWS:
        raise ValueError(f"{name} has n={n} rows, expected one of {ROWS}")
    if channels == 0 or channels % 64:
        raise ValueError(f"{name} has C={channels} channels, expected a multiple of 64")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {x.stride()}")
    return tokens, n, channels


def check_site(x: Tensor, **others: Tensor | None) -> None:
    """Check a state and any tensors that go with it, told apart by their names.

    ``y`` may be ``None``. Names: ``y dy`` states; ``u f du df`` ``[T, C]``; ``phi``, ``bias``,
    ``alpha``, ``coefficients dmix``, ``projection`` as in :mod:`mhcplan.kernels.mhc`; HC's
    ``theta``.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor has the wrong shape, device or layout.
    """
    tokens, n, channels = check_state("x", x)
    m = num_coefficients(n)
    for name, tensor in others.items():
        if tensor is None:
            if name == "y":  # memory for a result, which need not be given
                continue
            raise TypeError(f"{name} must be a tensor, not None")
        dtype = torch.float32
        if name in ("y", "dy"):
            shape, dtype = x.shape, x.dtype
        elif name in ("u", "f", "du", "df"):
            shape, dtype = (tokens, channels), x.dtype
        else:
            shape = {
                "phi": (m, n * channels),
                "theta": (n + 2, channels),
                "bias": (m,),
                "alpha": (3,),
                "coefficients": (tokens, m),
                "dmix": (tokens, m),
                "projection": (tokens, m + 1),
            }[name]
        check_tensor(name, tensor, shape, dtype, x.device)


def check_block(x: Tensor, fs: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
    """Check the arguments of a block's recompute.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: there is no site, there are too many or too few ``fs``, or a tensor has the
            wrong shape, device or layout.
    """
    tokens, n, channels = check_state("x", x)
    sites = len(coefficients)
    if sites == 0:
        raise ValueError("coefficients is empty: a block has at least one site")
    if len(fs) not in (sites - 1, sites):
        raise ValueError(f"fs has {len(fs)} tensors, expected {sites - 1} or {sites}")
    for index, f in enumerate(fs):
        check_tensor(f"fs[{index}]", f, (tokens, channels), x.dtype, x.device)
    for index, mix in enumerate(coefficients):
        shape = (tokens, num_coefficients(n))
        check_tensor(f"coefficients[{index}]", mix, shape, torch.float32, x.device)


def check_steps(steps: int, norm_eps: float) -> None:
    """Check the two numbers of a site.

    Raises:
        ValueError: ``steps`` is less than 1 or ``norm_eps`` is negative.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    check_norm_eps(norm_eps)


def check_norm_eps(norm_eps: float) -> None:
    """Check what is added to a mean square.

    Raises:
        ValueError: it is negative.
    """
    if norm_eps < 0:
        raise ValueError(f"norm_eps={norm_eps} must not be negative")
