"""The explicit parts of a site in eager torch, backward written out: the CPU's way.

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
    """``(df, dmix)``."""
    wide_dy, wide_x, wide_f = (t.to(coefficients.dtype) for t in (dy, x, f))
    post = reference.Coefficients.split(coefficients, x.shape[-2]).post
    dmix = reference.Coefficients(
        torch.zeros_like(post),
        torch.einsum("toc,tc->to", wide_dy, wide_f),
        torch.einsum("toc,tic->toi", wide_dy, wide_x),
    ).pack()
    return torch.einsum("to,toc->tc", post, wide_dy).to(f.dtype), dmix


def pre_backward_input(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    phi: Tensor, bias: Tensor, alpha: Tensor, width: int, steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dp, dbias, dalpha)``."""
    n, channels = x.shape[-2:]
    m = num_coefficients(n)
    mix = reference.Coefficients.split(coefficients, n)
    given = reference.Coefficients.split(dmix, n)
    wide_x, wide_du = x.to(phi.dtype), du.to(phi.dtype)

    inverse_rms = projection[:, m:]
    scaled = projection[:, :m] * inverse_rms
    scale = alpha.repeat_interleave(torch.tensor([n, n, n * n], device=alpha.device))
    res_logits = (scaled * scale + bias)[:, 2 * n :].unflatten(-1, (n, n))
    dpre = given.pre + torch.einsum("tc,tic->ti", wide_du, wide_x)
    dlogits = reference.Coefficients(
        dpre * mix.pre * (1 - mix.pre),
        given.post * mix.post * (1 - mix.post / 2),
        _sinkhorn_backward(res_logits, given.res, steps),
    ).pack()
    dbias = dlogits.sum(0)
    dalpha = torch.stack([part.sum() for part in (dlogits * scaled).split([n, n, n * n], -1)])

    dp = dlogits * scale * inverse_rms
    s = -(dp * projection[:, :m]).sum(-1) * inverse_rms[:, 0].square() / (n * channels)
    dx = mixed_gradient(dy, wide_du, coefficients) + (dp @ phi).unflatten(-1, (n, channels))
    dx += s[:, None, None] * wide_x
    return dx.to(x.dtype), rounded_parts(dp, x.dtype, width), dbias, dalpha


def mixed_gradient(dy: Tensor, du: Tensor, coefficients: Tensor) -> Tensor:
    """What reaches x through H_res and H_pre alone, in the dtype of the coefficients."""
    mix = reference.Coefficients.split(coefficients, dy.shape[-2])
    dx = torch.einsum("toi,toc->tic", mix.res, dy.to(coefficients.dtype))
    return dx + mix.pre[:, :, None] * du[:, None, :]


def rounded_parts(dp: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """``[..., m]`` as kernels keep it: rounded to ``dtype``, padded, then, in bf16, the remainder.

    ``width`` is that of both parts together.
    """
    parts = dp.new_zeros((*dp.shape[:-1], width), dtype=dtype)
    m = dp.shape[-1]
    parts[..., :m] = dp
    if dtype != torch.float32:
        parts[..., width // 2 : width // 2 + m] = dp - parts[..., :m].float()
    return parts


def whole(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of :func:`rounded_parts` in fp32, still padded."""
    dp = parts.float()
    if dtype == torch.float32:
        return dp
    return dp[..., : dp.shape[-1] // 2] + dp[..., dp.shape[-1] // 2 :]


def _sinkhorn_backward(logits: Tensor, gradient: Tensor, steps: int) -> Tensor:
    """Back through every step of ``reference.sinkhorn``."""
    column = torch.softmax(logits, dim=-2)
    m = torch.softmax(torch.log_softmax(logits, dim=-2), dim=-1)
    walked: list[tuple[Tensor, Tensor, int]] = []
    for dim in (-2, -1) * (steps - 1):
        total = m.sum(dim, keepdim=True)
        total = torch.where(total < reference.SINKHORN_TINY, torch.ones_like(total), total)
        m = m / total
        walked.append((m, total, dim))
    for after, total, dim in reversed(walked):
        gradient = (gradient - (gradient * after).sum(dim, keepdim=True)) / total
    if walked:
        first_after, first_total, _ = walked[0]
        m = first_after * first_total
    gradient = m * (gradient - (gradient * m).sum(-1, keepdim=True))
    return gradient - column * gradient.sum(-2, keepdim=True)


def pre_backward_weight(x: Tensor, dp: Tensor) -> Tensor:
    """dphi ``[M, n C]``."""
    m = num_coefficients(x.shape[-2])
    return whole(dp, x.dtype)[:, :m].mT @ x.flatten(-2).float()


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
