"""Records what the residual of a model does while it trains: gains, mixing, collapse, gradients.

    with Recorder.attach(model, "run.recording", every=10) as recorder:
        for batch in data:
            loss = model(batch)
            loss.backward()
            recorder.step(loss, gradient_norm)
            optimizer.step()

:meth:`Recorder.attach` hooks the sites of :mod:`mhcplan.kernels.modules` (not compiled ones); code
that is made of explicit parts hands over states and gradients itself (:meth:`Recorder.state`,
:meth:`Recorder.gradient`). ``mhcplan diagnose`` reads the file.

On most steps nothing happens but that two scalars are noted. On every ``every``-th, a few tokens'
states and gradients are copied, and after the backward the maps of all sites are worked out from
them in one batch (:mod:`mhcplan.kernels.diagnostics_maps`), in float64 from fp32 logits: what the
recording shows is the scheme, not the rounding of a kernel. The result goes to pinned memory and is
written when the next one comes, so that the host never waits for the GPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mhcplan.kernels import modules
from mhcplan.kernels.diagnostics_file import RecordingWriter, record_dtype
from mhcplan.kernels.diagnostics_maps import (
    Site,
    check_alike,
    figure_shapes,
    figures,
    make_site,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DEFAULT_EVERY = 10
DEFAULT_TOKENS = 64

_SITES = (modules.MhcSite, modules.HcSite, modules.IdentitySite, modules.PlainSite)


class Recorder:
    """Streams a record every few steps to a file.

    Args:
        sites: of the model in depth order, all alike; their parameters are read at every record.
        path: the file.
        every: steps from one record to the next.
        tokens: tokens whose maps are looked at, evenly spaced over a microbatch (S).
        about: what is recorded, for the file: names and numbers.
        first_step: number of the first step, a multiple of ``every``; above 0, the file that is
            there is continued behind it.

    Raises:
        ValueError: there is no site, they differ, or a number is out of range.
        RecordingError: the file to be continued is another recording.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        path: Path | str,
        *,
        every: int = DEFAULT_EVERY,
        tokens: int = DEFAULT_TOKENS,
        about: Mapping[str, Any] | None = None,
        first_step: int = 0,
    ) -> None:
        check_alike(sites)
        if every < 1 or tokens < 1:
            raise ValueError(f"every={every} and tokens={tokens} must be at least 1")
        if first_step % every:
            raise ValueError(f"first_step={first_step} must be a multiple of every={every}")
        self.sites, self.every, self.tokens = tuple(sites), every, tokens
        self._step, self._began = first_step, time.monotonic()
        self._shapes = figure_shapes(len(sites), sites[0].expansion_rate)
        dtype = record_dtype(every, self._shapes)
        known = about_sites(sites, every, tokens) | dict(about or {})
        keep = first_step - 1 if first_step else None
        self._writer = RecordingWriter(Path(path), known, dtype, keep_until=keep)
        self.last_states: Tensor | None = None  # sampled for the last record: [L + 1, S, n, C]
        self._states: Tensor | None = None
        self._gradients: Tensor | None = None
        self._curve: Tensor | None = None
        self._pending: tuple[Tensor, int, float, Any] | None = None
        self._hooks: list[Any] = []

    @classmethod
    def attach(cls, model: nn.Module, path: Path | str, **options: Any) -> Recorder:  # noqa: ANN401
        """A recorder that hooks all sites of a model; ``options`` as for the class.

        Sites must run in the order in which the model registered them, each once a microbatch.
        """
        found = {name: m for name, m in model.named_modules() if isinstance(m, _SITES)}
        recorder = cls([_site_of(name, m) for name, m in found.items()], path, **options)
        for index, module in enumerate(found.values()):
            recorder._hooks.append(module.register_forward_hook(recorder._hook(index)))
        return recorder

    def _hook(self, index: int) -> Callable[..., None]:
        def seen(_module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            if not self.listening:
                return
            if index == 0:
                self.state(0, inputs[0])
            self.state(index + 1, y)
            if y.requires_grad:
                y.register_hook(lambda dy: self.gradient(index, dy))

        return seen

    @property
    def listening(self) -> bool:
        """Whether the running step is recorded: states and gradients of others are not needed."""
        return (self._step + 1) % self.every == 0

    @torch.no_grad()
    def state(self, index: int, x: Tensor) -> None:
        """Note the state ``[..., n, C]`` before site ``index``, or after the last one."""
        if self.listening:
            sample = self._sample(x)
            if self._states is None or self._states.shape[1:] != sample.shape:
                self._states = sample.new_zeros(len(self.sites) + 1, *sample.shape)
            self._states[index].copy_(sample)

    @torch.no_grad()
    def gradient(self, index: int, dy: Tensor) -> None:
        """Note the gradient of the state that leaves site ``index``, ``[..., n, C]``."""
        if self.listening:
            sample = self._sample(dy)
            if self._gradients is None or self._gradients.shape[1:] != sample.shape:
                self._gradients = sample.new_full((len(self.sites), *sample.shape), torch.nan)
            self._gradients[index].copy_(sample)

    def _sample(self, x: Tensor) -> Tensor:
        n = self.sites[0].expansion_rate
        flat = x.reshape(-1, n, x.shape[-1])
        return flat[:: max(flat.shape[0] // self.tokens, 1)][: self.tokens]

    @torch.no_grad()
    def step(self, loss: Tensor | float, gradient_norm: Tensor | float = float("nan")) -> None:
        """End a step: after its backward, before the optimizer changes the sites' parameters.

        Args:
            loss: of the step.
            gradient_norm: of all parameters.
        """
        device = self._states.device if self._states is not None else torch.device("cpu")
        if self._curve is None:
            where = loss.device if isinstance(loss, Tensor) else device
            self._curve = torch.full((2, self.every), torch.nan, dtype=torch.float64, device=where)
        for row, value in enumerate((loss, gradient_norm)):
            slot = self._curve[row, self._step % self.every]
            slot.copy_(value) if isinstance(value, Tensor) else slot.fill_(value)
        if self.listening:
            self._record()
            self._curve.fill_(torch.nan)
        self._step += 1

    def _record(self) -> None:
        """Work out the record and start its way to the host."""
        if self._states is None:
            raise RuntimeError("no state was noted: did the sites run in this step?")
        gradients = self._gradients
        if gradients is None:
            gradients = self._states.new_full(self._states[1:].shape, torch.nan)
        made = figures(self.sites, self._states, gradients)
        assert self._curve is not None
        curve = self._curve.to(self._states.device)
        flat = torch.cat([curve.flatten(), *(made[name].flatten() for name in self._shapes)])
        self.last_states, self._states, self._gradients = self._states, None, None
        self.flush()  # the record before: it arrived long ago
        host, event = flat, None
        if flat.is_cuda:
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            host.copy_(flat, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = host, self._step, time.monotonic() - self._began, event
        if event is None:
            self.flush()

    def flush(self) -> None:
        """Write the record that is on its way, if one is; call it before saving a checkpoint, so
        that a run that goes on from there misses none.
        """
        if self._pending is None:
            return
        values, step, elapsed_s, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        self._writer.write(step, elapsed_s, values.numpy())

    def close(self) -> None:
        """Write what is on its way, take the hooks off and close the file."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.flush()
        self._writer.close()

    def __enter__(self) -> Self:
        """Record until the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def about_sites(sites: Sequence[Site], every: int, tokens: int) -> dict[str, Any]:
    """What a recording says about itself."""
    first = sites[0]
    return {
        "kind": first.kind,
        "expansion_rate": first.expansion_rate,
        "sinkhorn_steps": first.sinkhorn_steps,
        "sites": [site.name for site in sites],
        "every": every,
        "tokens": tokens,
    }


def _site_of(name: str, module: nn.Module) -> Site:
    if isinstance(module, modules.PlainSite):
        return Site(name, "plain", 1)
    assert isinstance(module, modules.MhcSite | modules.HcSite | modules.IdentitySite)
    eps = module.norm_eps
    if isinstance(module, modules.HcSite):
        return make_site(name, "hc", (module.theta, module.bias, module.alpha), norm_eps=eps)
    parameters = (module.phi, module.bias, module.alpha)
    if isinstance(module, modules.IdentitySite):
        return make_site(name, "identity", parameters, norm_eps=eps)
    return make_site(name, "mhc", parameters, module.sinkhorn_steps, eps)
