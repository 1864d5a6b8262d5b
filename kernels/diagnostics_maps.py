"""What the residual's maps do: gains, errors, mixing and collapse, per site and over depth.

Shapes: L sites in depth order, S sampled tokens, n rows, C channels. State 0 enters the first
site, state l + 1 leaves site l. H_res is ``[o, i]``: row o is written, row i is read. Everything is
float64 and nothing here waits for a GPU. All sites are one batch and depth is halved, not walked:
a launch costs the host of a training run more than these small tensors cost its GPU.

Gains are the mHC paper's (arXiv 2512.24880, section 3.1 and figures 3, 7, 8): the *forward gain*
of a map is its largest absolute row sum, what it does to a signal that all rows share; the
*backward gain* its largest absolute column sum, the same for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mhcplan.kernels.reference import (
    DEFAULT_NORM_EPS,
    DEFAULT_SINKHORN_STEPS,
    Coefficients,
    num_coefficients,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Kind = Literal["mhc", "hc", "identity", "plain"]
# H^T H to the power of 128^3 = 2^21: what stays undecided is below 1e-6 of the norm. A trace of 1
# keeps its largest eigenvalue above 1 / n, whose 128th power float64 holds for any n up to 250.
_POWER, _ROUNDS = 128, 3
_TINY = 1e-300  # divides nothing by zero, and changes nothing else

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
    if kind == "plain":
        ones = x.new_ones(*x.shape[:-2], 1, dtype=torch.float64)
        return Coefficients(ones, ones, ones.unsqueeze(-1))
    logits = _logits(sites, x)
    if kind == "hc":
        return Coefficients.split(logits, n)
    pre, post = torch.sigmoid(logits[..., :n]), 2 * torch.sigmoid(logits[..., n : 2 * n])
    if kind == "identity":
        return Coefficients(pre, post, _eye(n, pre).expand(*pre.shape, n))
    res = logits[..., 2 * n :].unflatten(-1, (n, n))
    return Coefficients(pre, post, _sinkhorn(res, sites[0].sinkhorn_steps))


def res_logits(sites: Sequence[Site], x: Tensor) -> Tensor:
    """What the Sinkhorn steps of mHC sites start from: ``[L, S, n, n]``, float64."""
    n = sites[0].expansion_rate
    return _logits(sites, x)[..., 2 * n :].unflatten(-1, (n, n))


def _logits(sites: Sequence[Site], x: Tensor) -> Tensor:
    """Gate x projection + bias ``[L, S, M]``, float64: of HC sites their coefficients (paper, eq.
    5), of mHC and identity sites what sigmoid and Sinkhorn start from (eq. 14-16).
    """
    n = sites[0].expansion_rate
    projection, bias, alpha = (
        torch.stack(p).detach().double() for p in zip(*(s.parameters for s in sites), strict=True)
    )
    x = x.double()
    if sites[0].kind == "hc":  # every row is normalised and projected by itself
        rows = torch.bmm(x.flatten(1, 2), projection.mT).unflatten(1, x.shape[1:3])
        dynamic = torch.tanh(rows * _inverse_rms(x, sites[0].norm_eps)).mT.flatten(-2)
    else:
        flat = x.flatten(-2)
        dynamic = torch.bmm(flat, projection.mT) * _inverse_rms(flat, sites[0].norm_eps)
    widths = [n, n, bias.shape[-1] - 2 * n][: alpha.shape[-1]]
    gates = torch.cat([a.expand(-1, w) for a, w in zip(alpha.split(1, -1), widths, strict=True)], 1)
    return torch.addcmul(bias[:, None], gates[:, None], dynamic)


def _inverse_rms(x: Tensor, norm_eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square() / x.shape[-1] + norm_eps)


def _sinkhorn(logits: Tensor, steps: int) -> Tensor:
    """As :func:`~mhcplan.kernels.reference.sinkhorn`, in logarithms: each half of a step is one
    launch, and no column is so small that it would be lost.
    """
    for _ in range(steps):
        logits = logits.log_softmax(-2).log_softmax(-1)
    return logits.exp()


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


# -- maps ------------------------------------------------------------------------------------------


def composites(res: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the sites' maps over depth, each ``[L, ..., n, n]``.

    Returns:
        ``forward[l] = H_l ... H_0``, from the first state to the one that leaves site l, and
        ``backward[l] = H_{L-1} ... H_l``, whose transpose brings the last state's gradient to the
        state that enters site l.
    """
    # the second is the first of the transposed maps from the last site on; after each round a
    # product spans twice as many sites
    products, span = torch.stack([res, res.flip(0).mT], 1), 1
    while span < len(res):
        longer = products[span:] @ products[:-span]
        products, span = torch.cat([products[:span], longer]), 2 * span
    return products[:, 0], products[:, 1].flip(0).mT


def forward_gain(maps: Tensor) -> Tensor:
    """Largest absolute row sum of ``[..., n, n]``."""
    return maps.sum(-1).abs().amax(-1)


def backward_gain(maps: Tensor) -> Tensor:
    """Largest absolute column sum of ``[..., n, n]``."""
    return maps.sum(-2).abs().amax(-1)


def spectral_norm(maps: Tensor) -> Tensor:
    """Largest singular value of ``[..., n, n]``, without the host's help that an SVD takes.

    High powers of ``H^T H`` turn into the projection on its top eigenspace. A share p of a lower
    eigenvalue that is left over makes the result smaller by that share of the difference, so that
    values which cannot be told apart do no harm.
    """
    gram = maps.mT @ maps
    power = _unit_trace(gram)
    for _ in range(_ROUNDS):
        power = _unit_trace(torch.linalg.matrix_power(power, _POWER))
    return (power * gram).sum((-2, -1)).clamp_min(0).sqrt()


def _unit_trace(maps: Tensor) -> Tensor:
    trace = maps.diagonal(dim1=-2, dim2=-1).sum(-1)
    return maps / trace.clamp_min(_TINY)[..., None, None]


def row_similarity(gram: Tensor) -> Tensor:
    """Mean cosine between the rows of a state: 1 means that they are copies.

    Args:
        gram: products of the rows ``[..., n, n]``.
    """
    n = gram.shape[-1]
    if n == 1:
        return torch.ones_like(gram[..., 0, 0])
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = gram / (norms[..., None] * norms[..., None, :]).clamp_min(_TINY)
    return (cosines.sum((-2, -1)) - n) / (n * (n - 1))


# -- a record --------------------------------------------------------------------------------------


def figures(sites: Sequence[Site], states: Tensor, gradients: Tensor) -> Mapping[str, Tensor]:
    """Everything that a record says about the sites; see :func:`figure_shapes`.

    Args:
        sites: alike.
        states: ``[L + 1, S, n, C]``.
        gradients: of the loss to the state that leaves each site, ``[L, S, n, C]``.
    """
    n, x = sites[0].expansion_rate, states.double()
    mix = coefficients(sites, x[:-1])
    forward, backward = composites(mix.res)
    maps = torch.stack([mix.res, forward, backward])
    forward_gains, backward_gains = forward_gain(maps), backward_gain(maps)
    norms = spectral_norm(maps[:2])
    gram = x @ x.mT
    energy = gram.diagonal(dim1=-2, dim2=-1)  # of each row, [L + 1, S, n]
    total = energy.sum(-1)
    per_token = {
        "forward_gain": forward_gains[0],
        "backward_gain": backward_gains[0],
        "composite_forward_gain": forward_gains[1],
        "composite_backward_gain": backward_gains[2],
        "row_error": (mix.res.sum(-1) - 1).abs().amax(-1),
        "column_error": (mix.res.sum(-2) - 1).abs().amax(-1),
        "spectral_norm": norms[0],
        "composite_spectral_norm": norms[1],
        "identity_distance": torch.linalg.matrix_norm(mix.res - _eye(n, x)),
        "uniform_distance": torch.linalg.matrix_norm(mix.res - 1 / n),
        "row_similarity": row_similarity(gram[1:]),
    }
    assert tuple(per_token) == PER_TOKEN
    tokens = torch.stack(list(per_token.values()))
    pairs = torch.stack([tokens.mean(-1), tokens.amax(-1)], -1)
    product = (x[:-1] * x[1:]).sum((-2, -1))
    gradient_norm = torch.linalg.vector_norm(gradients.flatten(1), dim=-1, dtype=torch.float64)
    res_map, forward_map, backward_map = maps.mean(2)
    return dict(zip(PER_TOKEN, pairs, strict=True)) | {
        "layer_similarity": (product / (total[:-1] * total[1:]).sqrt().clamp_min(_TINY)).mean(-1),
        "state_rms": (total[1:].mean(-1) / x[0, 0].numel()).sqrt(),
        "gradient_rms": gradient_norm / gradients[0].numel() ** 0.5,
        "res_map": res_map,
        "forward_map": forward_map,
        "backward_map": backward_map,
        "pre_map": mix.pre.mean(1),
        "post_map": mix.post.mean(1),
        "row_share": (energy[1:] / total[1:, :, None].clamp_min(_TINY)).mean(1),
    }
