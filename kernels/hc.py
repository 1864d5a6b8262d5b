"""The Hyper-Connections site as explicit parts, as :mod:`mhcplan.kernels.mhc` has mHC's.

    F  u, coefficients, projection = hc_pre_forward(x, theta, bias, alpha)
       f = sublayer(u)
       y = mhc.mhc_post_forward(x, f, coefficients)

    I  df, dmix = mhc.mhc_post_backward(dy, x, f, coefficients)
       du = the sublayer's backward of df
       dx, dp, dbias, dalpha = hc_pre_backward_input(
           dy, x, du, coefficients, projection, dmix, theta, bias, alpha)
    W  dtheta = hc_pre_backward_weight(x, dp)
    or B, I and W in one pass over the state at n <= 4,
       dx, dtheta, dbias, dalpha = hc_pre_backward(
           dy, x, du, coefficients, projection, dmix, theta, bias, alpha)

    R  us, xs = mhc.mhc_recompute(x, fs, coefficients)

F_post,res and recompute are mHC's: they take coefficients as they come. Shapes and dtypes are those
of :mod:`mhcplan.kernels.mhc`, except ``theta [n + 2, C]`` in place of phi; ``projection
[T, n, n + 3]`` = (p = theta x_i, 1 / r) of every row; and ``dp``, opaque, three-dimensional. Each
row is normalised and projected by itself, and ``H = alpha tanh(p / r) + b`` is not constrained
(paper, equation 5).

CUDA tensors run the Triton kernels (CPU tensors too, under ``TRITON_INTERPRET=1``); other CPU
tensors run :mod:`mhcplan.kernels.hc_eager` in fp32. Nothing here records autograd, and no call
synchronises with the host. A wrong shape, dtype, device or layout raises ``ValueError`` or
``TypeError`` naming the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhcplan.kernels import hc_eager
from mhcplan.kernels.checks import check_norm_eps, check_site, check_state, check_tensor
from mhcplan.kernels.mhc import on_kernels, placed
from mhcplan.kernels.reference import DEFAULT_NORM_EPS
from mhcplan.kernels.triton_support import INTERPRETED, padded, residual_parts

if torch.cuda.is_available() or INTERPRETED:
    from mhcplan.kernels import hc_kernels, mhc_backward


def projection_gradient_width(n: int, dtype: torch.dtype) -> int:
    """Numbers a row of ``dp``, what I leaves for W, in the residual's dtype ``dtype``."""
    return residual_parts(dtype) * padded(n + 2)


def hc_pre_forward(
    x: Tensor, theta: Tensor, bias: Tensor, alpha: Tensor, *,
    norm_eps: float = DEFAULT_NORM_EPS, out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """F_pre: the coefficients of every token and the sublayer's input u = H_pre x.

    Args:
        x: state.
        theta: projection of a row: pre, post, then n of res; the weight of the norm absorbed.
        bias: b.
        alpha: gates of pre, post and res.
        norm_eps: added to the mean square of each row.
        out: memory for what is returned.

    Returns:
        ``(u, coefficients, projection)``.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device, layout or value.
    """
    check_site(x, theta=theta, bias=bias, alpha=alpha)
    check_norm_eps(norm_eps)
    if not on_kernels(x):
        return placed(hc_eager.pre_forward(x, theta, bias, alpha, norm_eps), out)
    partial = hc_kernels.project(x, theta)
    return hc_kernels.coefficients_and_pre(x, partial, bias, alpha, norm_eps, out)


def hc_pre_backward(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    theta: Tensor, bias: Tensor, alpha: Tensor, *, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """B of F_pre: every gradient of the site that is left.

    Args:
        dy: gradient of the next state, the very one that ``mhc_post_backward`` took.
        x: state.
        du: gradient of u.
        coefficients: of the forward.
        projection: of the forward.
        dmix: from ``mhc_post_backward``.
        theta: as in the forward.
        bias: as in the forward.
        alpha: as in the forward.
        out: memory for dx.

    Returns:
        ``(dx, dtheta, dbias, dalpha)``.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device or layout.
    """
    dx, dtheta, _, dbias, dalpha = _pre_backward(
        dy, x, du, coefficients, projection, dmix, theta, bias, alpha, True, out
    )
    assert dtheta is not None
    return dx, dtheta, dbias, dalpha


def hc_pre_backward_input(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    theta: Tensor, bias: Tensor, alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """I of F_pre: like :func:`hc_pre_backward` but leaves dtheta to W.

    Returns:
        ``(dx, dp, dbias, dalpha)``.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device or layout.
    """
    dx, _, dp, dbias, dalpha = _pre_backward(
        dy, x, du, coefficients, projection, dmix, theta, bias, alpha, False, None
    )
    return dx, dp, dbias, dalpha


def hc_pre_backward_weight(x: Tensor, dp: Tensor) -> Tensor:
    """W of F_pre: dtheta ``[n + 2, C]``, summed over tokens and rows, from what I returned.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device or layout.
    """
    tokens, n, _ = check_state("x", x)
    check_tensor("dp", dp, (tokens, n, projection_gradient_width(n, x.dtype)), x.dtype, x.device)
    if not on_kernels(x):
        return hc_eager.pre_backward_weight(x, dp)
    return mhc_backward.weight_backward(x, dp)


def _pre_backward(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    theta: Tensor, bias: Tensor, alpha: Tensor, with_weight: bool, out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dtheta or None, dp, dbias, dalpha)``."""
    check_site(
        x, dy=dy, du=du, coefficients=coefficients, dmix=dmix, theta=theta, bias=bias,
        alpha=alpha, y=out,
    )  # fmt: skip
    tokens, n, _ = x.shape
    check_tensor("projection", projection, (tokens, n, n + 3), torch.float32, x.device)
    if on_kernels(x):
        dp, s, dbias, dalpha = hc_kernels.coefficient_gradients(
            x, du, projection, dmix, bias, alpha
        )
        dx, dtheta = mhc_backward.pre_backward(
            dy, x, du, coefficients, dp, s, theta, with_weight, out
        )
        return dx, dtheta, dp, dbias, dalpha
    width = projection_gradient_width(n, x.dtype)
    dx, dp, dbias, dalpha = hc_eager.pre_backward_input(
        dy, x, du, coefficients, projection, dmix, theta, alpha, width
    )
    dtheta = hc_eager.pre_backward_weight(x, dp) if with_weight else None
    if out is not None:
        dx = out.copy_(dx)
    return dx, dtheta, dp, dbias, dalpha
