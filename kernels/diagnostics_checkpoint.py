"""Turns a checkpoint into a recording of one step.

A checkpoint has the sites' parameters but no data. H_res depends on the state, so the maps are
looked at on *probe states*: random normal ones of unit size, the same for every site. That shows
what the parameters allow, not what text makes of them; the recording says so (``about.probe``).
Figures that only a run has (loss, gradients, layers' states) are NaN.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhcplan.kernels.diagnostics import DEFAULT_TOKENS, about_sites
from mhcplan.kernels.diagnostics_file import RecordingWriter, record_dtype
from mhcplan.kernels.diagnostics_maps import OF_STATES, Kind, Site, check_alike, figures, make_site
from mhcplan.kernels.reference import DEFAULT_SINKHORN_STEPS

if TYPE_CHECKING:
    from pathlib import Path

_NESTED = ("model", "state_dict", "module", "weights")
# by the name of the projection and the number of gates; the exit of a model has one gate
_KINDS: dict[tuple[str, int], Kind] = {
    ("phi", 3): "mhc",
    ("phi", 2): "identity",
    ("theta", 3): "hc",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or has no sites; one line."""


def record_checkpoint(
    checkpoint: Path,
    recording: Path,
    *,
    sinkhorn_steps: int = DEFAULT_SINKHORN_STEPS,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
) -> None:
    """Write the recording of a torch checkpoint (a state dict, or a dict that holds one).

    Args:
        checkpoint: file of ``torch.save``; only tensors and plain containers are loaded.
        recording: file to write.
        sinkhorn_steps: t_max, which a checkpoint does not say.
        tokens: probe states.
        seed: of the probe states.

    Raises:
        CheckpointError: the file is missing, truncated or no checkpoint; it has no sites, or
            their parameters are misshapen or not finite.
    """
    weights, step = _load(checkpoint)
    try:
        sites = find_sites(weights, sinkhorn_steps)
        check_alike(sites)
        generator = torch.Generator().manual_seed(seed)
        n, width = sites[0].expansion_rate, sites[0].parameters[0].shape[1]
        channels = width if sites[0].kind == "hc" else width // n
        probe = torch.randn(tokens, n, channels, generator=generator)
        about = {"checkpoint": checkpoint.name, "step": step,
                 "probe": f"{tokens} random normal states, seed {seed}: not text"}  # fmt: skip
        states = probe.expand(len(sites) + 1, *probe.shape)
        made = figures(sites, states, torch.full_like(states[1:], torch.nan))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    values = [
        torch.full_like(value, torch.nan) if name in OF_STATES else value
        for name, value in made.items()
    ]
    flat = torch.cat([torch.full((2,), torch.nan), *(value.flatten() for value in values)])
    shapes = {name: tuple(value.shape) for name, value in made.items()}
    writer = RecordingWriter(
        recording, about_sites(sites, 1, tokens) | about, record_dtype(1, shapes)
    )
    writer.write(0 if step is None else step, 0.0, flat.numpy())
    writer.close()


def find_sites(
    weights: Mapping[str, Tensor], sinkhorn_steps: int = DEFAULT_SINKHORN_STEPS
) -> list[Site]:
    """The mHC, HC and identity sites of a state dict, in depth order.

    A site is what has ``phi`` (HC: ``theta``), ``bias`` and ``alpha`` under one name. Depth is the
    order of the numbers in the names.

    Raises:
        ValueError: there is none, or one is incomplete, misshapen or not finite.
    """
    found: list[Site] = []
    for key in sorted(weights, key=_by_number):
        name, _, last = key.rpartition(".")
        if last not in ("phi", "theta"):
            continue
        parts = [key, f"{name}.bias", f"{name}.alpha"]
        missing = [part for part in parts if part not in weights]
        if missing:
            raise ValueError(f"site {name} has no {missing[0].rpartition('.')[2]}")
        kind = _KINDS.get((last, weights[parts[2]].numel()))
        if kind is None:
            continue
        for part in parts:
            if not torch.isfinite(weights[part]).all():
                raise ValueError(f"{part} holds values that are not finite")
        projection, bias, alpha = (weights[part].float() for part in parts)
        found.append(make_site(name, kind, (projection, bias, alpha), sinkhorn_steps))
    if not found:
        raise ValueError(
            "no site found: none of its tensors are named phi (or theta), bias and alpha together"
        )
    return found


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def _load(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """Tensors by name, and the step that the checkpoint was made at if it says so."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        raise CheckpointError(
            f"{path}: not a whole torch checkpoint of plain tensors: another file, or cut off"
        ) from None
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    step = loaded.get("step")
    for name in _NESTED:
        if isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    weights = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    return weights, step if isinstance(step, int) else None
