"""The parts of an HC site that are not mHC's, in eager torch, backward written out: the CPU's way.

Same signatures and layouts as :mod:`mhcplan.kernels.hc`, arguments already checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhcplan.kernels import reference
from mhcplan.kernels.mhc_eager import mixed_gradient, rounded_parts, whole


def pre_forward(
    x: Tensor, theta: Tensor, bias: Tensor, alpha: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(u, coefficients, projection)``."""
    projection = reference.hc_project(x, theta, norm_eps)
    coefficients = reference.hc_coefficients(projection, bias, alpha)
    return reference.pre_apply(x, coefficients), coefficients, projection


def pre_backward_input(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    theta: Tensor, alpha: Tensor, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dp, dbias, dalpha)``."""
    n, channels = x.shape[-2:]
    wide_x, wide_du = x.to(theta.dtype), du.to(theta.dtype)
    inverse_rms = projection[..., -1:]
    scaled = projection[..., :-1] * inverse_rms
    dynamic = torch.tanh(scaled)

    given = dmix.unflatten(-1, (n + 2, n)).mT.clone()  # [T, i, k], as the projection
    given[..., 0] += torch.einsum("tc,tic->ti", wide_du, wide_x)
    dbias = given.sum(0).mT.flatten()
    by_gate = (given * dynamic).sum((0, 1))
    dalpha = torch.stack([by_gate[0], by_gate[1], by_gate[2:].sum()])

    dscaled = given * reference.hc_gates(alpha, n) * (1 - dynamic.square())
    dp = dscaled * inverse_rms
    s = -(dscaled * scaled).sum(-1, keepdim=True) * inverse_rms.square() / channels
    dx = mixed_gradient(dy, wide_du, coefficients) + dp @ theta + s * wide_x
    return dx.to(x.dtype), rounded_parts(dp, x.dtype, width), dbias, dalpha


def pre_backward_weight(x: Tensor, dp: Tensor) -> Tensor:
    """dtheta ``[n + 2, C]``."""
    rows = whole(dp, x.dtype)[..., : x.shape[-2] + 2]
    return rows.flatten(0, 1).mT @ x.flatten(0, 1).float()
