"""Flat parameter buffers of a stage: views for the ops, shards for the optimizer.

A stage has two parts, as the Program reduces them: ``dense`` (what every replica holds) and
``experts`` (this rank's routed experts). A part has a section a dtype (two, if vectors are not to
decay): one flat weight buffer, one flat fp32 gradient, of which AdamW owns this rank's equal share
(ZeRO-1). Values are drawn by (seed, name), so that equal names are equal numbers wherever they lie.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mhcplan.kernels.layers import AdamW, Weight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PARTS = ("dense", "experts")
# Elements. Every parameter starts on 128 bytes in bf16: matrix units and TMA ask for 16 at least.
_ALIGN = 64


class Parameter(NamedTuple):
    """A parameter before it has memory.

    Attributes:
        name: unique in the model.
        shape: of the tensor.
        std: of its normal values; 0 makes it ``mean`` everywhere.
        mean: added to every value; a tuple has one for each.
        wide: kept in fp32 whatever the compute dtype (the residual's own).
        copies: names of the slices along the first axis that are drawn each by itself (experts).
    """

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float | tuple[float, ...] = 0.0
    wide: bool = False
    copies: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()


def draw_(x: Tensor, seed: int, name: str, std: float, mean: float | tuple[float, ...]) -> None:
    """Fill ``x`` with values that depend on (seed, name) and the kind of device only."""
    x.copy_(torch.tensor(mean))
    if std == 0:
        return
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1
    generator = torch.Generator(x.device).manual_seed(key)
    values = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    x.add_(values.normal_(0.0, std, generator=generator))


@dataclass
class Section:
    """Parameters of one part, dtype and decay in flat buffers, padded to equal shares.

    Attributes:
        data: [size] weights; ``grad``: [size] their gradients, fp32 at least.
        own: this rank's share of both.
        adamw: the optimizer of that share.
    """

    data: Tensor
    grad: Tensor
    own: slice
    adamw: AdamW

    def rehearse(self) -> None:
        """Load the optimizer's kernel, on values of its own."""
        data = self.data.new_zeros(_ALIGN)
        AdamW(Weight(data, torch.zeros_like(data, dtype=self.grad.dtype))).step()

    def own_of(self, flat: Tensor) -> Tensor:
        """This rank's share of a flat buffer, a view."""
        return flat[self.own]


@dataclass
class StageParameters:
    """All parameters of a stage on one rank: views by name, and the sections they lie in."""

    weights: dict[str, Weight] = field(default_factory=dict)
    sections: dict[str, list[Section]] = field(default_factory=dict)

    @property
    def num_elements(self) -> int:
        """Parameters, padding not counted."""
        return sum(w.data.numel() for w in self.weights.values())

    def all_sections(self) -> list[Section]:
        """Of both parts."""
        return [section for part in PARTS for section in self.sections.get(part, [])]


def build_parameters(
    parts: Mapping[str, Sequence[Parameter]],
    shares: Mapping[str, tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    optimizer: Mapping[str, Any],
) -> StageParameters:
    """Allocate and draw a stage's parameters.

    Args:
        parts: parameters of each part.
        shares: (index, number) of this rank's optimizer share in each part.
        device: where they lie.
        dtype: of all but the wide ones.
        seed: of the values.
        optimizer: options of :class:`~mhcplan.kernels.layers.AdamW`; with ``decay_vectors`` False
            its decay leaves parameters of one axis (norms' gains, biases, alphas) alone.
    """
    options = dict(optimizer)
    decay_vectors = options.pop("decay_vectors", True)
    built = StageParameters()
    for part, parameters in parts.items():
        alike: dict[tuple[torch.dtype, bool], list[Parameter]] = {}
        for p in parameters:
            decays = decay_vectors or len(p.shape) > 1
            alike.setdefault((torch.float32 if p.wide else dtype, decays), []).append(p)
        kinds = product(dict.fromkeys((dtype, torch.float32)), (True, False))
        built.sections[part] = [
            _section(
                alike[section_dtype, decays], *shares[part], device, section_dtype, seed,
                built.weights, options if decays else options | {"decay": 0.0},
            )
            for section_dtype, decays in kinds if (section_dtype, decays) in alike
        ]  # fmt: skip
    return built


def _section(
    parameters: Sequence[Parameter],
    index: int,
    number: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    weights: dict[str, Weight],
    optimizer: Mapping[str, Any],
) -> Section:
    starts, size = [], 0
    for p in parameters:
        starts.append(size)
        size += -(-p.numel // _ALIGN) * _ALIGN
    share = -(-size // (number * _ALIGN)) * _ALIGN
    data = torch.zeros(share * number, dtype=dtype, device=device)
    grad = torch.zeros(share * number, dtype=torch.float32, device=device)
    for p, start in zip(parameters, starts, strict=True):
        view = data[start : start + p.numel].view(p.shape)
        if p.copies:
            for i, name in enumerate(p.copies):
                draw_(view[i], seed, name, p.std, p.mean)
        else:
            draw_(view, seed, p.name, p.std, p.mean)
        weights[p.name] = Weight(view, grad[start : start + p.numel].view(p.shape))
    own = slice(index * share, (index + 1) * share)
    return Section(data, grad, own, AdamW(Weight(data[own], grad[own]), **optimizer))
