"""mHC under autograd: custom ops, the two autograd functions of a site, deferred dphi.

The ops ``torch.ops.mhcplan.mhc_*`` wrap the explicit parts of :mod:`mhcplan.kernels.mhc` and have
fake implementations, so that ``torch.compile`` and CUDA graphs take them as they are.

A site is two functions around its sublayer. dx has contributions of both, and the kernel that
writes it takes them all at once; so the first function passes x on to the second, whose "gradient"
of that x is dY itself. The two must therefore be used as a pair, as :func:`site_pre` and
:func:`site_post` are by :class:`mhcplan.kernels.modules.MhcSite`: what ``site_pre`` returns as x is
for ``site_post`` alone.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhcplan.kernels import mhc
from mhcplan.kernels.reference import num_coefficients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# -- custom ops (types must be real at run time: torch reads the signatures) -----------------------


@torch.library.custom_op("mhcplan::mhc_pre", mutates_args=())
def _pre_op(
    x: torch.Tensor, phi: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor,
    steps: int, norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return mhc.mhc_pre_forward(x, phi, bias, alpha, steps=steps, norm_eps=norm_eps)


@_pre_op.register_fake
def _(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, steps: int, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, channels = x.shape
    m = num_coefficients(n)
    return (
        x.new_empty((tokens, channels)),
        x.new_empty((tokens, m), dtype=torch.float32),
        x.new_empty((tokens, m + 1), dtype=torch.float32),
    )


@torch.library.custom_op("mhcplan::mhc_post", mutates_args=())
def _post_op(x: torch.Tensor, f: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    return mhc.mhc_post_forward(x, f, coefficients)


@_post_op.register_fake
def _(x: Tensor, f: Tensor, coefficients: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mhcplan::mhc_post_backward", mutates_args=())
def _post_backward_op(
    dy: torch.Tensor, x: torch.Tensor, f: torch.Tensor, coefficients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return mhc.mhc_post_backward(dy, x, f, coefficients)


@_post_backward_op.register_fake
def _(dy: Tensor, x: Tensor, f: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(f), torch.empty_like(coefficients)


@torch.library.custom_op("mhcplan::mhc_pre_backward", mutates_args=())
def _pre_backward_op(
    dy: torch.Tensor, x: torch.Tensor, du: torch.Tensor, coefficients: torch.Tensor,
    projection: torch.Tensor, dmix: torch.Tensor, phi: torch.Tensor, bias: torch.Tensor,
    alpha: torch.Tensor, steps: int, norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return mhc.mhc_pre_backward(
        dy, x, du, coefficients, projection, dmix, phi, bias, alpha,
        steps=steps, norm_eps=norm_eps,
    )  # fmt: skip


@_pre_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    phi: Tensor, bias: Tensor, alpha: Tensor, steps: int, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(t) for t in (x, phi, bias, alpha))  # type: ignore[return-value]


@torch.library.custom_op("mhcplan::mhc_pre_backward_input", mutates_args=())
def _pre_backward_input_op(
    dy: torch.Tensor, x: torch.Tensor, du: torch.Tensor, coefficients: torch.Tensor,
    projection: torch.Tensor, dmix: torch.Tensor, phi: torch.Tensor, bias: torch.Tensor,
    alpha: torch.Tensor, steps: int, norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return mhc.mhc_pre_backward_input(
        dy, x, du, coefficients, projection, dmix, phi, bias, alpha,
        steps=steps, norm_eps=norm_eps,
    )  # fmt: skip


@_pre_backward_input_op.register_fake
def _(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    phi: Tensor, bias: Tensor, alpha: Tensor, steps: int, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    width = mhc.projection_gradient_width(x.shape[1], x.dtype)
    dp = x.new_empty((x.shape[0], width))
    return torch.empty_like(x), dp, torch.empty_like(bias), torch.empty_like(alpha)


@torch.library.custom_op("mhcplan::mhc_pre_backward_weight", mutates_args=())
def _pre_backward_weight_op(x: torch.Tensor, dp: torch.Tensor) -> torch.Tensor:
    return mhc.mhc_pre_backward_weight(x, dp)


@_pre_backward_weight_op.register_fake
def _(x: Tensor, dp: Tensor) -> Tensor:
    _, n, channels = x.shape
    return x.new_empty((num_coefficients(n), n * channels), dtype=torch.float32)


# -- deferred weight gradients ---------------------------------------------------------------------


class WeightGradients:
    """Projections' gradients of sites whose forward ran under :func:`defer_weight_gradients`."""

    def __init__(self) -> None:
        """Start empty."""
        self._pending: list[Callable[[], None]] = []

    def __len__(self) -> int:
        """Weight gradients that wait."""
        return len(self._pending)

    def add(self, work: Callable[[], Tensor], parameter: Tensor) -> None:
        """Queue the gradient of a parameter; ``work`` keeps what I left until then."""

        def run() -> None:
            found = work()
            parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)

        self._pending.append(run)

    def run(self, count: int | None = None) -> None:
        """Work out the oldest ``count`` that wait (all by default), into the parameters' grads."""
        now, self._pending = self._pending[:count], self._pending[len(self._pending[:count]) :]
        for run in now:
            run()


_queues: list[WeightGradients] = []


def running_queue() -> WeightGradients | None:
    """Where a site whose forward runs now leaves its weight gradient; None: nowhere."""
    return _queues[-1] if _queues and not torch.compiler.is_compiling() else None


@contextlib.contextmanager
def defer_weight_gradients() -> Iterator[WeightGradients]:
    """Sites whose *forward* runs inside leave W (dphi, HC's dtheta) out of backward and queue it.

    A compiled site does not: its backward is one graph.

    Example:
        >>> with defer_weight_gradients() as pending:  # doctest: +SKIP
        ...     loss = model(batch)
        >>> loss.backward()  # doctest: +SKIP
        >>> pending.run()  # doctest: +SKIP
    """
    queue = WeightGradients()
    _queues.append(queue)
    try:
        yield queue
    finally:
        _queues.pop()


# -- autograd --------------------------------------------------------------------------------------
# Eager code calls the parts directly; the ops, which cost the host more, serve the compiler.


_Context = Any  # torch has no public type for it


class _SitePre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        phi: Tensor,
        bias: Tensor,
        alpha: Tensor,
        steps: int,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling():
            u, coefficients, projection = _pre_op(x, phi, bias, alpha, steps, norm_eps)
        else:
            u, coefficients, projection = mhc.mhc_pre_forward(
                x, phi, bias, alpha, steps=steps, norm_eps=norm_eps
            )
        ctx.save_for_backward(x, phi, bias, alpha, coefficients, projection)
        ctx.steps, ctx.norm_eps = steps, norm_eps
        ctx.queue = running_queue()
        ctx.phi = phi if ctx.queue is not None else None
        return u, coefficients, x.view_as(x)

    @staticmethod
    def backward(ctx: _Context, du: Tensor, dmix: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, phi, bias, alpha, coefficients, projection = ctx.saved_tensors
        arguments = (
            dy.contiguous(), x, du.contiguous(), coefficients, projection, dmix.contiguous(),
            phi, bias, alpha,
        )  # fmt: skip
        numbers = {"steps": ctx.steps, "norm_eps": ctx.norm_eps}
        dphi: Tensor | None = None
        if torch.compiler.is_compiling():
            dx, dphi, dbias, dalpha = _pre_backward_op(*arguments, **numbers)
        elif ctx.queue is None:
            dx, dphi, dbias, dalpha = mhc.mhc_pre_backward(*arguments, **numbers)
        else:
            dx, dp, dbias, dalpha = mhc.mhc_pre_backward_input(*arguments, **numbers)
            ctx.queue.add(lambda: mhc.mhc_pre_backward_weight(x, dp), ctx.phi)
        return dx, dphi, dbias, dalpha, None, None


class _SitePost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, f: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(x, f, coefficients)
        if torch.compiler.is_compiling():
            return _post_op(x, f, coefficients)
        return mhc.mhc_post_forward(x, f, coefficients)

    @staticmethod
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dy = dy.contiguous()
        backward = _post_backward_op if torch.compiler.is_compiling() else mhc.mhc_post_backward
        df, dmix = backward(dy, *ctx.saved_tensors)
        return dy, df, dmix  # dY stands in for the gradient of x: see the module's docstring


def site_pre(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, steps: int, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(u, coefficients, x)`` with autograd; hand x and coefficients to :func:`site_post`."""
    return _SitePre.apply(x, phi, bias, alpha, steps, norm_eps)  # type: ignore[no-any-return]


def site_post(x: Tensor, f: Tensor, coefficients: Tensor) -> Tensor:
    """The next state, with autograd, from the x and the coefficients of :func:`site_pre`."""
    return _SitePost.apply(x, f, coefficients)  # type: ignore[no-any-return]
