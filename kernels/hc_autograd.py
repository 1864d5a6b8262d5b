"""HC under autograd: custom ops, and the first of the two functions of a site.

As :mod:`mhcplan.kernels.mhc_autograd`, whose ``site_post`` is HC's second half too: what
:func:`site_pre` returns as x is for that alone. The ops are ``torch.ops.mhcplan.hc_*``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhcplan.kernels import hc
from mhcplan.kernels.mhc_autograd import running_queue
from mhcplan.kernels.reference import num_coefficients

# -- custom ops (types must be real at run time: torch reads the signatures) -----------------------


@torch.library.custom_op("mhcplan::hc_pre", mutates_args=())
def _pre_op(
    x: torch.Tensor, theta: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return hc.hc_pre_forward(x, theta, bias, alpha, norm_eps=norm_eps)


@_pre_op.register_fake
def _(
    x: Tensor, theta: Tensor, bias: Tensor, alpha: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, channels = x.shape
    return (
        x.new_empty((tokens, channels)),
        x.new_empty((tokens, num_coefficients(n)), dtype=torch.float32),
        x.new_empty((tokens, n, n + 3), dtype=torch.float32),
    )


@torch.library.custom_op("mhcplan::hc_pre_backward", mutates_args=())
def _pre_backward_op(
    dy: torch.Tensor, x: torch.Tensor, du: torch.Tensor, coefficients: torch.Tensor,
    projection: torch.Tensor, dmix: torch.Tensor, theta: torch.Tensor, bias: torch.Tensor,
    alpha: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return hc.hc_pre_backward(dy, x, du, coefficients, projection, dmix, theta, bias, alpha)


@_pre_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    theta: Tensor, bias: Tensor, alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(t) for t in (x, theta, bias, alpha))  # type: ignore[return-value]


@torch.library.custom_op("mhcplan::hc_pre_backward_input", mutates_args=())
def _pre_backward_input_op(
    dy: torch.Tensor, x: torch.Tensor, du: torch.Tensor, coefficients: torch.Tensor,
    projection: torch.Tensor, dmix: torch.Tensor, theta: torch.Tensor, bias: torch.Tensor,
    alpha: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return hc.hc_pre_backward_input(dy, x, du, coefficients, projection, dmix, theta, bias, alpha)


@_pre_backward_input_op.register_fake
def _(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    theta: Tensor, bias: Tensor, alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, n, _ = x.shape
    dp = x.new_empty((tokens, n, hc.projection_gradient_width(n, x.dtype)))
    return torch.empty_like(x), dp, torch.empty_like(bias), torch.empty_like(alpha)


@torch.library.custom_op("mhcplan::hc_pre_backward_weight", mutates_args=())
def _pre_backward_weight_op(x: torch.Tensor, dp: torch.Tensor) -> torch.Tensor:
    return hc.hc_pre_backward_weight(x, dp)


@_pre_backward_weight_op.register_fake
def _(x: Tensor, dp: Tensor) -> Tensor:
    _, n, channels = x.shape
    return x.new_empty((n + 2, channels), dtype=torch.float32)


# -- autograd --------------------------------------------------------------------------------------


_Context = Any  # torch has no public type for it


class _SitePre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, theta: Tensor, bias: Tensor, alpha: Tensor, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling():
            u, coefficients, projection = _pre_op(x, theta, bias, alpha, norm_eps)
        else:
            made = hc.hc_pre_forward(x, theta, bias, alpha, norm_eps=norm_eps)
            u, coefficients, projection = made
        ctx.save_for_backward(x, theta, bias, alpha, coefficients, projection)
        ctx.queue = running_queue()
        ctx.theta = theta if ctx.queue is not None else None
        return u, coefficients, x.view_as(x)

    @staticmethod
    def backward(ctx: _Context, du: Tensor, dmix: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, bias, alpha, coefficients, projection = ctx.saved_tensors
        arguments = (
            dy.contiguous(), x, du.contiguous(), coefficients, projection, dmix.contiguous(),
            theta, bias, alpha,
        )  # fmt: skip
        dtheta: Tensor | None = None
        if torch.compiler.is_compiling():
            dx, dtheta, dbias, dalpha = _pre_backward_op(*arguments)
        elif ctx.queue is None:
            dx, dtheta, dbias, dalpha = hc.hc_pre_backward(*arguments)
        else:
            dx, dp, dbias, dalpha = hc.hc_pre_backward_input(*arguments)
            ctx.queue.add(lambda: hc.hc_pre_backward_weight(x, dp), ctx.theta)
        return dx, dtheta, dbias, dalpha, None


def site_pre(
    x: Tensor, theta: Tensor, bias: Tensor, alpha: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(u, coefficients, x)`` with autograd; x and coefficients are for mHC's ``site_post``."""
    return _SitePre.apply(x, theta, bias, alpha, norm_eps)  # type: ignore[no-any-return]
