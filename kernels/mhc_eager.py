"""The explicit parts of a site in eager torch: the CPU's way, through autograd of the reference.

Same signatures and layouts as :mod:`mhcplan.kernels.mhc`, arguments already checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mhcplan.kernels import reference
from mhcplan.kernels.reference import num_coefficients

if TYPE_CHECKING:
    from collections.abc import Sequence


def pre_forward(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, steps: int, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(u, coefficients, projection)``."""
    projection = reference.project(x, phi, norm_eps)
    coefficients = reference.mhc_coefficients(projection, bias, alpha, steps)
    return reference.pre_apply(x, coefficients), coefficients, projection


def post_backward(dy: Tensor, x: Tensor, f: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """``(df, dmix)``; here the first n columns of dmix are zero."""
    with torch.enable_grad():
        f, coefficients = f.detach().requires_grad_(), coefficients.detach().requires_grad_()
        y = reference.post_res(x.detach(), f, coefficients)
        df, dmix = torch.autograd.grad(y, (f, coefficients), dy)
    return df, dmix


def pre_backward_input(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, dmix: Tensor,
    phi: Tensor, bias: Tensor, alpha: Tensor, width: int, steps: int, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dp, dbias, dalpha)``."""
    n = x.shape[-2]
    m = num_coefficients(n)
    with torch.enable_grad():
        wide = x.detach().to(phi.dtype).requires_grad_()
        bias, alpha = bias.detach().requires_grad_(), alpha.detach().requires_grad_()
        projection = reference.project(wide, phi.detach(), norm_eps)
        mix = reference.mhc_coefficients(projection, bias, alpha, steps)
        u = reference.pre_apply(wide, mix)
        dmix = torch.cat([torch.zeros_like(dmix[:, :n]), dmix[:, n:]], dim=1)
        dx, dprojection, dbias, dalpha = torch.autograd.grad(
            (u, mix), (wide, projection, bias, alpha), (du.to(u.dtype), dmix)
        )
    res = reference.Coefficients.split(coefficients, n).res
    dx = dx + torch.einsum("toi,toc->tic", res, dy.to(res.dtype))
    # The kernels' layout: rounded to the residual's dtype, then, in bf16, the remainder.
    dp = x.new_zeros((x.shape[0], width))
    dp[:, :m] = dprojection[:, :m]
    if x.dtype != torch.float32:
        dp[:, width // 2 : width // 2 + m] = dprojection[:, :m] - dp[:, :m].float()
    return dx.to(x.dtype), dp, dbias, dalpha


def pre_backward_weight(x: Tensor, dp: Tensor) -> Tensor:
    """dphi ``[M, n C]``."""
    m = num_coefficients(x.shape[-2])
    whole = dp.float()
    if x.dtype != torch.float32:
        whole = whole[:, : dp.shape[1] // 2] + whole[:, dp.shape[1] // 2 :]
    return whole[:, :m].mT @ x.flatten(-2).float()


def recompute(
    x: Tensor, fs: Sequence[Tensor], coefficients: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """``(us, xs)``."""
    us, xs = [], []
    for index, mix in enumerate(coefficients):
        us.append(reference.pre_apply(x, mix))
        if index < len(fs):
            x = reference.post_res(x, fs[index], mix)
            xs.append(x)
    return us, xs
