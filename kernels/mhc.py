"""The mHC site as explicit parts: what a runtime calls op by op, what a profiler times.

    F  u, coefficients, projection = mhc_pre_forward(x, phi, bias, alpha)
       f = sublayer(u)
       y = mhc_post_forward(x, f, coefficients)
    or, across two sites, with one pass less over the state,
       y, u, coefficients, projection = mhc_post_pre_forward(x, f, coefficients, phi, bias, alpha)
       where phi, bias and alpha are the next site's, as are the coefficients returned

    I  df, dmix = mhc_post_backward(dy, x, f, coefficients)
       du = the sublayer's backward of df
       dx, dp, dbias, dalpha = mhc_pre_backward_input(
           dy, x, du, coefficients, projection, dmix, phi, bias, alpha)
    W  dphi = mhc_pre_backward_weight(x, dp)
    or B, I and W in one pass over the state,
       dx, dphi, dbias, dalpha = mhc_pre_backward(
           dy, x, du, coefficients, projection, dmix, phi, bias, alpha)

    R  us, xs = mhc_recompute(x, fs, coefficients)

Shapes: ``x``, ``y``, ``dx``, ``dy`` are ``[T, n, C]``; ``u``, ``f``, ``du``, ``df`` are ``[T, C]``,
all of one dtype, bf16 or fp32, contiguous; T is any number of tokens, n one of 2, 4, 8, 16, and
64 divides C. With M = n^2 + 2n, everything else is fp32: ``phi [M, n C]``, ``bias [M]``,
``alpha [3]`` (pre, post, res), ``coefficients [T, M]`` = (H_pre, H_post, H_res row-major),
``projection [T, M + 1]`` = (p = vec(x) phi^T, 1 / r), ``dmix [T, M]``, the gradient of
``coefficients`` (that of H_pre is zero so far), ``dp``: opaque, from I to W, in the residual's
dtype, ``projection_gradient_width(n, dtype)`` numbers a token.

``mhc_pre_backward*`` needs ``dy``, the very gradient that ``mhc_post_backward`` took: dx is written
once, with the contributions of both halves of the site.

A site keeps, beside x (stored or recomputed) and f, ``coefficients`` and ``projection``:
``saved_coefficient_bytes(n)`` a token. Recompute reads ``coefficients`` only.

CUDA tensors run the Triton kernels (CPU tensors too, under ``TRITON_INTERPRET=1``); other CPU
tensors run :mod:`mhcplan.kernels.reference` in fp32. Nothing here records autograd; see
:mod:`mhcplan.kernels.modules` for that. No call synchronises with the host. A wrong shape, dtype,
device or layout raises ``ValueError`` or ``TypeError`` naming the argument.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhcplan.kernels import mhc_eager, reference
from mhcplan.kernels.checks import (
    check_block,
    check_site,
    check_state,
    check_steps,
    check_tensor,
)
from mhcplan.kernels.reference import (
    DEFAULT_NORM_EPS,
    DEFAULT_SINKHORN_STEPS,
    num_coefficients,
)
from mhcplan.kernels.triton_support import (
    INTERPRETED,
    padded_coefficients,
    residual_parts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

if torch.cuda.is_available() or INTERPRETED:
    from mhcplan.kernels import mhc_backward, mhc_forward
    from mhcplan.kernels import mhc_recompute as recompute_kernels


def saved_coefficient_bytes(n: int) -> int:
    """Bytes a token that a site keeps from F to B: coefficients, projection and 1 / r in fp32."""
    return 4 * (2 * num_coefficients(n) + 1)


def projection_gradient_width(n: int, dtype: torch.dtype) -> int:
    """Numbers a token of ``dp``, what I leaves for W, in the residual's dtype ``dtype``."""
    return residual_parts(dtype) * padded_coefficients(n)


def on_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take ``x``: on a GPU, or in the interpreter."""
    return x.is_cuda or INTERPRETED


def placed(made: Sequence[Tensor], out: Sequence[Tensor] | None) -> Any:  # noqa: ANN401
    """``made``, copied into ``out`` if that is given: for what cannot write there by itself."""
    if out is None:
        return made
    for target, source in zip(out, made, strict=True):
        target.copy_(source)
    return tuple(out)


def mhc_pre_forward(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    steps: int = DEFAULT_SINKHORN_STEPS,
    norm_eps: float = DEFAULT_NORM_EPS,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """F_pre: the coefficients of every token (eq. 14-19) and the sublayer's input u = H_pre x.

    Args:
        x: state.
        phi: projection, with the weight of the norm absorbed.
        bias: b.
        alpha: gates of pre, post and res.
        steps: Sinkhorn steps t_max.
        norm_eps: added to the mean square of the state.
        out: memory for what is returned.

    Returns:
        ``(u, coefficients, projection)``.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device, layout or value.
    """
    check_site(x, phi=phi, bias=bias, alpha=alpha)
    check_steps(steps, norm_eps)
    if not on_kernels(x):
        return placed(mhc_eager.pre_forward(x, phi, bias, alpha, steps, norm_eps), out)
    partial = mhc_forward.project(x, phi)
    return mhc_forward.coefficients_and_pre(x, partial, bias, alpha, steps, norm_eps, out)


def mhc_post_forward(
    x: Tensor, f: Tensor, coefficients: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """F_post,res: the next state y = H_res x + H_post f (eq. 3), in ``out`` if given.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device or layout.
    """
    check_site(x, f=f, coefficients=coefficients, y=out)
    if not on_kernels(x):
        y = reference.post_res(x, f, coefficients)
        return y if out is None else out.copy_(y)
    return mhc_forward.post_res(x, f, coefficients, out)


def mhc_post_pre_forward(
    x: Tensor,
    f: Tensor,
    coefficients: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    steps: int = DEFAULT_SINKHORN_STEPS,
    norm_eps: float = DEFAULT_NORM_EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F_post,res of one site and F_pre of the next; ``phi``, ``bias``, ``alpha`` are the next's.

    Returns:
        ``(y, u, coefficients, projection)``, all but y of the next site.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device, layout or value.
    """
    check_site(x, f=f, coefficients=coefficients, phi=phi, bias=bias, alpha=alpha)
    check_steps(steps, norm_eps)
    if not on_kernels(x):
        y = reference.post_res(x, f, coefficients)
        return y, *mhc_eager.pre_forward(y, phi, bias, alpha, steps, norm_eps)
    y, partial = mhc_forward.post_project(x, f, coefficients, phi)
    return y, *mhc_forward.coefficients_and_pre(y, partial, bias, alpha, steps, norm_eps)


def mhc_post_backward(
    dy: Tensor, x: Tensor, f: Tensor, coefficients: Tensor,
    *, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """F_post,res backward, as far as the sublayer waits for it: ``(df, dmix)``.

    ``out``: memory for both. The gradient of x through H_res is left to ``mhc_pre_backward*``,
    which needs ``dy`` again.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device or layout.
    """
    check_site(x, dy=dy, f=f, coefficients=coefficients)
    if not on_kernels(x):
        return placed(mhc_eager.post_backward(dy, x, f, coefficients), out)
    return mhc_backward.post_backward(dy, x, f, coefficients, out)


def mhc_pre_backward(
    dy: Tensor,
    x: Tensor,
    du: Tensor,
    coefficients: Tensor,
    projection: Tensor,
    dmix: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    steps: int = DEFAULT_SINKHORN_STEPS,
    norm_eps: float = DEFAULT_NORM_EPS,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B of F_pre: every gradient of the site that is left, in one pass over the state at n <= 4.

    Args:
        dy: gradient of the next state.
        x: state.
        du: gradient of u.
        coefficients: of the forward.
        projection: of the forward.
        dmix: from ``mhc_post_backward``.
        phi: as in the forward.
        bias: as in the forward.
        alpha: as in the forward.
        steps: as in the forward.
        norm_eps: as in the forward.
        out: memory for dx.

    Returns:
        ``(dx, dphi, dbias, dalpha)``.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device, layout or value.
    """
    dx, dphi, _, dbias, dalpha = _pre_backward(
        dy,
        x,
        du,
        coefficients,
        projection,
        dmix,
        phi,
        bias,
        alpha,
        steps,
        norm_eps,
        True,
        out,
    )
    assert dphi is not None
    return dx, dphi, dbias, dalpha


def mhc_pre_backward_input(
    dy: Tensor,
    x: Tensor,
    du: Tensor,
    coefficients: Tensor,
    projection: Tensor,
    dmix: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    steps: int = DEFAULT_SINKHORN_STEPS,
    norm_eps: float = DEFAULT_NORM_EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """I of F_pre: like :func:`mhc_pre_backward` but leaves dphi to W.

    Returns:
        ``(dx, dp, dbias, dalpha)``; db and dalpha cost nothing here, so W has only dphi.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device, layout or value.
    """
    dx, _, dp, dbias, dalpha = _pre_backward(
        dy,
        x,
        du,
        coefficients,
        projection,
        dmix,
        phi,
        bias,
        alpha,
        steps,
        norm_eps,
        False,
        None,
    )
    return dx, dp, dbias, dalpha


def mhc_pre_backward_weight(x: Tensor, dp: Tensor) -> Tensor:
    """W of F_pre: dphi = dp^T x ``[M, n C]`` from what I returned.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device or layout.
    """
    tokens, n, _ = check_state("x", x)
    check_tensor("dp", dp, (tokens, projection_gradient_width(n, x.dtype)), x.dtype, x.device)
    if not on_kernels(x):
        return mhc_eager.pre_backward_weight(x, dp)
    return mhc_backward.weight_backward(x, dp)


def _pre_backward(
    dy: Tensor, x: Tensor, du: Tensor, coefficients: Tensor, projection: Tensor, dmix: Tensor,
    phi: Tensor, bias: Tensor, alpha: Tensor, steps: int, norm_eps: float, with_weight: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dphi or None, dp, dbias, dalpha)``."""
    check_site(
        x, dy=dy, du=du, coefficients=coefficients, projection=projection, dmix=dmix,
        phi=phi, bias=bias, alpha=alpha, y=out,
    )  # fmt: skip
    check_steps(steps, norm_eps)
    if on_kernels(x):
        dp, s, dbias, dalpha = mhc_backward.coefficient_gradients(
            x, du, coefficients, projection, dmix, bias, alpha, steps
        )
        dx, dphi = mhc_backward.pre_backward(dy, x, du, coefficients, dp, s, phi, with_weight, out)
        return dx, dphi, dp, dbias, dalpha
    width = projection_gradient_width(x.shape[1], x.dtype)
    dx, dp, dbias, dalpha = mhc_eager.pre_backward_input(
        dy, x, du, coefficients, projection, dmix, phi, bias, alpha, width, steps
    )
    dphi = mhc_eager.pre_backward_weight(x, dp) if with_weight else None
    if out is not None:
        dx = out.copy_(dx)
    return dx, dphi, dp, dbias, dalpha


def mhc_recompute(
    x: Tensor, fs: Sequence[Tensor], coefficients: Sequence[Tensor],
    *, out: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """R: rebuild a block of sites from its input, in one launch (16 sites a launch at most).

    Args:
        x: input of the block's first site.
        fs: stored outputs of the sublayers; that of the last site may be left out.
        coefficients: stored coefficients, one tensor a site.
        out: memory for what is returned, us then xs.

    Returns:
        ``(us, xs)``: u of every site; xs[l] is the state after site l, for every f given.
        Bitwise equal to what the forward wrote.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: there is no site, or an argument has the wrong number, shape, device or layout.
    """
    check_block(x, fs, coefficients)
    if not on_kernels(x):
        us, xs = mhc_eager.recompute(x, fs, coefficients)
        made = placed((*us, *xs), out)
        return list(made[: len(us)]), list(made[len(us) :])
    return recompute_kernels.recompute_block(x, fs, coefficients, out)
