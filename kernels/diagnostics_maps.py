"""What the residual's maps do: gains, errors, mixing and collapse, per site and over depth.

Shapes: L sites in depth order, S sampled tokens, n rows, C channels. State 0 enters the first
site, state l + 1 leaves site l. H_res is ``[o, i]``: row o is written, row i is read. Everything is
float64 and batched over sites, and nothing here waits for a GPU.

Gains are the mHC paper's (arXiv 2512.24880, section 3.1 and figures 3, 7, 8): the *forward gain*
of a map is its largest absolute row sum, what it does to a signal that all rows share; the
*backward gain* its largest absolute column sum, the same for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mhcplan.kernels import reference
from mhcplan.kernels.reference import (
    DEFAULT_NORM_EPS,
    DEFAULT_SINKHORN_STEPS,
    Coefficients,
    num_coefficients,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Kind = Literal["mhc", "hc", "identity", "plain"]
_SQUARINGS = 20  # of H^T H; what stays undecided is below 1e-6 of the norm

# Figures of a record by name with what one site has of them. A pair is (mean, most) over tokens.
PER_TOKEN = (
    "forward_gain", "backward_gain", "composite_forward_gain", "composite_backward_gain",
    "row_error", "column_error", "spectral_norm", "composite_spectral_norm",
    "identity_distance", "uniform_distance", "row_similarity",
)  # fmt: skip

_PER_SITE = ("layer_similarity", "state_rms", "gradient_rms")
_MAPS = ("res_map", "forward_map", "backward_map")
_ROWS = ("pre_map", "post_map", "row_share")
OF_STATES = ("row_similarity", "layer_similarity", "state_rms", "row_share")  # not of maps alone


def figure_shapes(num_sites: int, n: int) -> dict[str, tuple[int, ...]]:
    """Shape of every figure that :func:`figures` returns."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(PER_TOKEN, (num_sites, 2))
    shapes |= dict.fromkeys(_PER_SITE, (num_sites,))
    shapes |= dict.fromkeys(_MAPS, (num_sites, n, n))
    return shapes | dict.fromkeys(_ROWS, (num_sites, n))


@dataclass(frozen=True)
class Site:
    """What makes a site's coefficients.

    Attributes:
        name: where it stands in its model.
        kind: of the residual.
        expansion_rate: n; 1 for ``plain``.
        parameters: phi (HC: theta), bias, alpha; of ``plain`` none. Read anew at every use.
        sinkhorn_steps: t_max, of ``mhc``.
        norm_eps: added to the mean square of the state.
    """

    name: str
    kind: Kind
    expansion_rate: int
    parameters: tuple[Tensor, ...] = ()
    sinkhorn_steps: int = DEFAULT_SINKHORN_STEPS
    norm_eps: float = DEFAULT_NORM_EPS


def make_site(
    name: str,
    kind: Kind,
    parameters: tuple[Tensor, Tensor, Tensor],
    sinkhorn_steps: int = DEFAULT_SINKHORN_STEPS,
    norm_eps: float = DEFAULT_NORM_EPS,
) -> Site:
    """A site of n rows, n read off its parameters: phi (HC: theta), bias and alpha.

    Raises:
        ValueError: the shapes are not those of a site of this kind.
    """
    projection, bias, alpha = parameters
    m = bias.numel()
    n = m // 2 if kind == "identity" else int((m + 1) ** 0.5) - 1
    rows = n + 2 if kind == "hc" else m
    fits = (
        m == (2 * n if kind == "identity" else num_coefficients(n))
        and n >= 2
        and projection.ndim == 2
        and projection.shape[0] == rows
        and (kind == "hc" or projection.shape[1] % n == 0)
        and alpha.shape == ((2,) if kind == "identity" else (3,))
    )
    if not fits:
        shapes = [tuple(p.shape) for p in parameters]
        raise ValueError(f"site {name}: shapes {shapes} are not those of a {kind} site")
    return Site(name, kind, n, parameters, sinkhorn_steps, norm_eps)


def check_alike(sites: Sequence[Site]) -> None:
    """Sites are read in one batch, so they must be alike; raises ValueError naming one that is not.

    (Parameters may have any values; their shapes, the kind and the constants must be equal.)
    """
    if not sites:
        raise ValueError("there is no mHC, HC, identity or plain site to diagnose")

    def shape(site: Site) -> tuple[object, ...]:
        sizes = tuple(p.shape for p in site.parameters)
        return site.kind, site.expansion_rate, sizes, site.sinkhorn_steps, site.norm_eps

    for site in sites:
        if shape(site) != shape(sites[0]):
            raise ValueError(
                f"site {site.name} is {shape(site)}, site {sites[0].name} is {shape(sites[0])}:"
                " a recording takes sites of one kind and size"
            )


def coefficients(sites: Sequence[Site], x: Tensor) -> Coefficients:
    """Coefficients of every site on its own state, float64.

    Args:
        sites: alike (:func:`check_alike`).
        x: ``[L, S, n, C]``, the state before each site.
    """
    kind, n = sites[0].kind, sites[0].expansion_rate
    wide = {"dtype": torch.float64, "device": x.device}
    if kind == "plain":
        ones = torch.ones(*x.shape[:-2], 1, **wide)
        return Coefficients(ones, ones, ones.unsqueeze(-1))
    if kind == "hc":
        return Coefficients.split(_hc_coefficients(sites, x), n)
    logits = _logits(sites, x)
    pre, post = torch.sigmoid(logits[..., :n]), 2 * torch.sigmoid(logits[..., n : 2 * n])
    if kind == "identity":
        return Coefficients(pre, post, torch.eye(n, **wide).expand(*pre.shape, n))
    res = logits[..., 2 * n :].unflatten(-1, (n, n))
    return Coefficients(pre, post, reference.sinkhorn(res, sites[0].sinkhorn_steps))


def res_logits(sites: Sequence[Site], x: Tensor) -> Tensor:
    """What the Sinkhorn steps of mHC sites start from: ``[L, S, n, n]``, float64."""
    n = sites[0].expansion_rate
    return _logits(sites, x)[..., 2 * n :].unflatten(-1, (n, n))


def _stacked(sites: Sequence[Site]) -> list[Tensor]:
    return [torch.stack(p).detach() for p in zip(*(s.parameters for s in sites), strict=True)]


def _logits(sites: Sequence[Site], x: Tensor) -> Tensor:
    """Logits of mHC and identity sites ``[L, S, M]`` (paper, eq. 14-16)."""
    n = sites[0].expansion_rate
    phi, bias, alpha = _stacked(sites)
    flat = x.flatten(-2).to(phi.dtype)
    inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + sites[0].norm_eps)
    projection = torch.bmm(flat, phi.mT) * inverse_rms
    widths = [n, n, bias.shape[-1] - 2 * n][: alpha.shape[-1]]
    gates = torch.cat([a.expand(-1, w) for a, w in zip(alpha.split(1, -1), widths, strict=True)], 1)
    return (projection * gates[:, None] + bias[:, None]).double()


def _hc_coefficients(sites: Sequence[Site], x: Tensor) -> Tensor:
    """Packed coefficients of HC sites ``[L, S, M]`` (eq. 5)."""

    def one(x: Tensor, theta: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
        return reference.hc_pre(x, theta, bias, alpha, sites[0].norm_eps)[1]

    return torch.func.vmap(one)(x, *_stacked(sites)).double()


# -- maps ------------------------------------------------------------------------------------------


def composites(res: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the sites' maps over depth, each ``[L, ..., n, n]``.

    Returns:
        ``forward[l] = H_l ... H_0``, from the first state to the one that leaves site l, and
        ``backward[l] = H_{L-1} ... H_l``, whose transpose brings the last state's gradient to the
        state that enters site l.
    """
    forward, backward = [res[0]], [res[-1]]
    for h in res[1:]:
        forward.append(h @ forward[-1])
    for h in res[:-1].flip(0):
        backward.append(backward[-1] @ h)
    return torch.stack(forward), torch.stack(backward[::-1])


def forward_gain(maps: Tensor) -> Tensor:
    """Largest absolute row sum of ``[..., n, n]``."""
    return maps.sum(-1).abs().amax(-1)


def backward_gain(maps: Tensor) -> Tensor:
    """Largest absolute column sum of ``[..., n, n]``."""
    return maps.sum(-2).abs().amax(-1)


def spectral_norm(maps: Tensor) -> Tensor:
    """Largest singular value of ``[..., n, n]``, without the host's help that an SVD takes.

    Powers of ``H^T H`` by squaring turn into the projection on its top eigenspace. A share p of a
    lower eigenvalue that is left over makes the result smaller by that share of the difference, so
    that values which cannot be told apart do no harm.
    """
    gram = maps.mT @ maps
    trace = _trace(gram)
    power = gram / torch.where(trace > 0, trace, torch.ones_like(trace))[..., None, None]
    for _ in range(_SQUARINGS):
        power = power @ power
        scale = _trace(power)
        power = power / torch.where(scale > 0, scale, torch.ones_like(scale))[..., None, None]
    return (power * gram).sum((-2, -1)).clamp_min(0).sqrt()


def _trace(maps: Tensor) -> Tensor:
    return maps.diagonal(dim1=-2, dim2=-1).sum(-1)


def row_similarity(x: Tensor) -> Tensor:
    """Mean cosine between the rows of states ``[..., n, C]``: 1 means that they are copies."""
    n = x.shape[-2]
    if n == 1:
        return x.new_ones(x.shape[:-2])
    unit = torch.nn.functional.normalize(x, dim=-1)
    # |sum of unit vectors|^2 counts every pair twice and every vector once
    return (unit.sum(-2).square().sum(-1) - unit.square().sum((-2, -1))) / (n * (n - 1))


# -- a record --------------------------------------------------------------------------------------


def figures(sites: Sequence[Site], states: Tensor, gradients: Tensor) -> Mapping[str, Tensor]:
    """Everything that a record says about the sites; see :func:`figure_shapes`.

    Args:
        sites: alike.
        states: ``[L + 1, S, n, C]``.
        gradients: of the loss to the state that leaves each site, ``[L, S, n, C]``.
    """
    mix = coefficients(sites, states[:-1])
    n = sites[0].expansion_rate
    forward, backward = composites(mix.res)
    x = states.double()
    eye = torch.eye(n, dtype=torch.float64, device=x.device)
    norms = spectral_norm(torch.stack([mix.res, forward]))
    per_token = {
        "forward_gain": forward_gain(mix.res),
        "backward_gain": backward_gain(mix.res),
        "composite_forward_gain": forward_gain(forward),
        "composite_backward_gain": backward_gain(backward),
        "row_error": (mix.res.sum(-1) - 1).abs().amax(-1),
        "column_error": (mix.res.sum(-2) - 1).abs().amax(-1),
        "spectral_norm": norms[0],
        "composite_spectral_norm": norms[1],
        "identity_distance": (mix.res - eye).square().sum((-2, -1)).sqrt(),
        "uniform_distance": (mix.res - 1 / n).square().sum((-2, -1)).sqrt(),
        "row_similarity": row_similarity(x[1:]),
    }
    assert tuple(per_token) == PER_TOKEN
    energy = x[1:].square().sum(-1)
    return {
        name: torch.stack([value.mean(-1), value.amax(-1)], -1) for name, value in per_token.items()
    } | {
        "layer_similarity": torch.cosine_similarity(
            x[:-1].flatten(-2), x[1:].flatten(-2), dim=-1
        ).mean(-1),
        "state_rms": energy.mean((-2, -1)).div(x.shape[-1]).sqrt(),
        "gradient_rms": gradients.double().square().mean((-3, -2, -1)).sqrt(),
        "res_map": mix.res.mean(1),
        "forward_map": forward.mean(1),
        "backward_map": backward.mean(1),
        "pre_map": mix.pre.mean(1),
        "post_map": mix.post.mean(1),
        "row_share": (energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)).mean(1),
    }
