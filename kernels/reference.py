"""Eager reference of every residual scheme, in plain torch and in any floating dtype.

This file is the definition that the kernels are tested against; it is written for reading, runs in
float64 under ``torch.autograd.gradcheck``, and is also what the CPU uses. Equation numbers are
those of the mHC paper (arXiv 2512.24880).

Shapes: a site's state ``x`` is ``[..., n, C]`` (n rows of C channels a token); the input of its
sublayer ``u`` and its output ``f`` are ``[..., C]``. The coefficients of a token are the
concatenation ``[H_pre (n), H_post (n), H_res (n*n, row-major)]``, M = n^2 + 2n numbers, and

    y_o = sum_i H_res[o, i] x_i + H_post[o] f            (eq. 3; o: row written, i: row read)

Where the paper writes no epsilon and code needs one:

* r = sqrt(mean(x^2) + norm_eps): eq. 15 divides by the norm of x, which may be zero.
* Sinkhorn has no epsilon in its sums. Its first step runs on logarithms, so that any finite logits
  are fine: subtracting the maximum of each *column* is exact because the first normalisation is by
  columns (subtracting the maximum of each row, as usual for a softmax, would change the result of
  a finite number of steps). Later steps divide; a sum below ``SINKHORN_TINY`` (a column whose
  entries underflowed, which takes logits about 70 apart) is left as it is. Rows, normalised last,
  sum to 1 for any finite logits; NaN and inf logits give NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SINKHORN_TINY = 1e-30
DEFAULT_SINKHORN_STEPS = 20
DEFAULT_NORM_EPS = 1e-6


def num_coefficients(n: int) -> int:
    """M = n^2 + 2n: H_pre (n), H_post (n) and H_res (n^2) of one token at one site."""
    return n * n + 2 * n


class Coefficients(NamedTuple):
    """Coefficients of a site, split: ``pre`` [..., n], ``post`` [..., n], ``res`` [..., n, n]."""

    pre: Tensor
    post: Tensor
    res: Tensor

    @classmethod
    def split(cls, packed: Tensor, n: int) -> Coefficients:
        """View packed coefficients ``[..., n^2 + 2n]`` as their three parts."""
        pre, post, res = packed.split([n, n, n * n], dim=-1)
        return cls(pre, post, res.unflatten(-1, (n, n)))

    def pack(self) -> Tensor:
        """Concatenate the three parts to ``[..., n^2 + 2n]``."""
        return torch.cat([self.pre, self.post, self.res.flatten(-2)], dim=-1)


def sinkhorn(logits: Tensor, steps: int = DEFAULT_SINKHORN_STEPS) -> Tensor:
    """Sinkhorn-Knopp of ``exp(logits)`` (eq. 9): columns first, rows last, ``steps`` times.

    Args:
        logits: ``[..., n, n]``, index ``[o, i]``; a *column* is fixed i, a *row* fixed o.
        steps: t_max, at least 1.

    Raises:
        ValueError: ``steps`` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    m = torch.softmax(torch.log_softmax(logits, dim=-2), dim=-1)
    for _ in range(steps - 1):
        m = _normalise(_normalise(m, dim=-2), dim=-1)
    return m


def _normalise(m: Tensor, dim: int) -> Tensor:
    total = m.sum(dim, keepdim=True)
    return m / torch.where(total < SINKHORN_TINY, torch.ones_like(total), total)


def project(x: Tensor, phi: Tensor, norm_eps: float = DEFAULT_NORM_EPS) -> Tensor:
    """The projection and the norm of a state, in the dtype of ``phi`` (eq. 14-15).

    Args:
        x: state ``[..., n, C]``.
        phi: ``[M, n C]`` (the paper's phi, transposed; the norm's weight is absorbed).
        norm_eps: added to the mean square.

    Returns:
        ``[..., M + 1]``: the projection p = vec(x) phi^T, not yet divided by r, then 1 / r.
    """
    flat = x.flatten(-2).to(phi.dtype)
    inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return torch.cat([flat @ phi.mT, inverse_rms], dim=-1)


def mhc_coefficients(
    projection: Tensor,
    bias: Tensor,
    alpha: Tensor,
    steps: int = DEFAULT_SINKHORN_STEPS,
) -> Tensor:
    """Coefficients ``[..., M]`` from a projection ``[..., M + 1]`` (eq. 16-19).

    Args:
        projection: what :func:`project` returns.
        bias: b ``[M]``.
        alpha: ``[3]``: a_pre, a_post, a_res.
        steps: Sinkhorn steps t_max.
    """
    n = expansion_rate(bias.shape[-1])
    scale = alpha.repeat_interleave(torch.tensor([n, n, n * n], device=alpha.device))
    logits = projection[..., -1:] * projection[..., :-1] * scale + bias
    pre, post, res = Coefficients.split(logits, n)
    parts = Coefficients(torch.sigmoid(pre), 2 * torch.sigmoid(post), sinkhorn(res, steps))
    return parts.pack()


def expansion_rate(m: int) -> int:
    """n of a site that has so many coefficients.

    Raises:
        ValueError: m is not n^2 + 2n for any n.
    """
    n = int((m + 1) ** 0.5) - 1
    if num_coefficients(n) != m:
        raise ValueError(f"bias has {m} numbers, which is not n^2 + 2n for any n")
    return n


def pre_apply(x: Tensor, coefficients: Tensor) -> Tensor:
    """u = sum_i H_pre[i] x_i ``[..., C]`` (eq. 3), summed in the wider of the two dtypes."""
    pre = coefficients[..., : x.shape[-2]]
    return torch.einsum("...i,...ic->...c", pre, x.to(pre.dtype)).to(x.dtype)


def post_res(x: Tensor, f: Tensor, coefficients: Tensor) -> Tensor:
    """y_o = sum_i H_res[o, i] x_i + H_post[o] f ``[..., n, C]`` (eq. 3)."""
    _, post, res = Coefficients.split(coefficients, x.shape[-2])
    mixed = torch.einsum("...oi,...ic->...oc", res, x.to(res.dtype))
    return (mixed + post.unsqueeze(-1) * f.to(res.dtype).unsqueeze(-2)).to(x.dtype)


def mhc_pre(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    steps: int = DEFAULT_SINKHORN_STEPS,
    norm_eps: float = DEFAULT_NORM_EPS,
) -> tuple[Tensor, Tensor]:
    """First half of an mHC site: ``(u, coefficients)`` of the state ``x`` (eq. 7-9)."""
    coefficients = mhc_coefficients(project(x, phi, norm_eps), bias, alpha, steps)
    return pre_apply(x, coefficients), coefficients


def hc_pre(
    x: Tensor, theta: Tensor, bias: Tensor, alpha: Tensor, norm_eps: float = DEFAULT_NORM_EPS
) -> tuple[Tensor, Tensor]:
    """First half of a Hyper-Connections site: ``(u, coefficients)`` (eq. 5).

    Each row is normalised by itself (RMSNorm over C, its weight absorbed in theta), and
    ``H = alpha tanh(theta x~) + b`` is not constrained any further.

    Args:
        x: state ``[..., n, C]``.
        theta: ``[n + 2, C]``: theta_pre, theta_post, theta_res (n rows).
        bias: ``[n^2 + 2n]`` in the order of the coefficients.
        alpha: ``[3]``.
        norm_eps: added to the mean square of each row.
    """
    coefficients = hc_coefficients(hc_project(x, theta, norm_eps), bias, alpha)
    return pre_apply(x, coefficients), coefficients


def hc_project(x: Tensor, theta: Tensor, norm_eps: float = DEFAULT_NORM_EPS) -> Tensor:
    """The projection and the norm of every row ``[..., n, n + 3]``, in the dtype of ``theta``.

    Of row i: theta x_i (n + 2 numbers), not yet divided by the row's r, then 1 / r.
    """
    wide = x.to(theta.dtype)
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
    return torch.cat([wide @ theta.mT, inverse_rms], dim=-1)


def hc_coefficients(projection: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """Coefficients ``[..., M]`` from the projections of a token's rows ``[..., n, n + 3]``.

    Number k of row i is H_pre[i] (k = 0), H_post[i] (k = 1), or H_res[k - 2, i]: always number
    k n + i of the packed coefficients.
    """
    dynamic = torch.tanh(projection[..., :-1] * projection[..., -1:]).mT
    return (hc_gates(alpha, dynamic.shape[-1])[:, None] * dynamic).flatten(-2) + bias


def hc_gates(alpha: Tensor, n: int) -> Tensor:
    """The gate of each number of a row's projection ``[n + 2]``: pre, post, n times res."""
    return torch.cat([alpha[:2], alpha[2:].expand(n)])


def identity_res(coefficients: Tensor, n: int) -> Tensor:
    """The same coefficients with H_res = I: rows keep to themselves (the Identity-HC ablation)."""
    pre, post, res = Coefficients.split(coefficients, n)
    eye = torch.eye(n, dtype=res.dtype, device=res.device).expand_as(res)
    return Coefficients(pre, post, eye).pack()


def expand(embedding: Tensor, n: int) -> Tensor:
    """Entry of the network: the embedding ``[..., C]`` copied to n rows ``[..., n, C]``."""
    return embedding.unsqueeze(-2).expand(*embedding.shape[:-1], n, -1).contiguous()


def collapse(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, norm_eps: float = DEFAULT_NORM_EPS
) -> Tensor:
    """Exit of the network: rows weighted by learned sigmoids and summed to ``[..., C]``.

    The weights are those of eq. 16-17 for H_pre alone: ``phi`` is ``[n, n C]``, ``bias`` ``[n]``,
    ``alpha`` ``[1]``.
    """
    projection = project(x, phi, norm_eps)
    weights = torch.sigmoid(alpha * projection[..., -1:] * projection[..., :-1] + bias)
    return pre_apply(x, weights)
