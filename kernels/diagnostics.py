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
them in one batch (:mod:`mhcplan.kernels.diagnostics_maps`), in float64: what the recording shows is
the scheme, not the rounding of a kernel. The result goes to pinned memory, and a thread waits for
it and writes it, so that the training loop waits neither for the GPU nor for a disk.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
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
        self._states, self._gradients = _Samples(len(sites) + 1), _Samples(len(sites))
        # loss and gradient norm of each step since the last record: those that the host knows, and
        # those that a device does
        self._known = np.full((2, every), np.nan)
        self._curve: Tensor | None = None
        self._thread = ThreadPoolExecutor(1, "recorder")
        self._writes: deque[Future[None]] = deque()
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

    @property
    def last_states(self) -> Tensor | None:
        """Those sampled for the last record, ``[L + 1, S, n, C]``, until the next one overwrites
        them.
        """
        return self._states.buffer

    def state(self, index: int, x: Tensor) -> None:
        """Note the state ``[..., n, C]`` before site ``index``, or after the last one."""
        if self.listening:
            with torch.no_grad():
                self._states.note(index, self._sample(x))

    def gradient(self, index: int, dy: Tensor) -> None:
        """Note the gradient of the state that leaves site ``index``, ``[..., n, C]``."""
        if self.listening:
            with torch.no_grad():
                self._gradients.note(index, self._sample(dy))

    def _sample(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.sites[0].expansion_rate, x.shape[-1])
        stride = max(flat.shape[0] // self.tokens, 1)
        return flat[: stride * self.tokens : stride]

    @torch.no_grad()
    def step(self, loss: Tensor | float, gradient_norm: Tensor | float = float("nan")) -> None:
        """End a step: after its backward, before the optimizer changes the sites' parameters.

        Args:
            loss: of the step.
            gradient_norm: of all parameters.

        Raises:
            RuntimeError: the step is recorded and no site ran in it.
            OSError: an earlier record could not be written.
        """
        for row, value in enumerate((loss, gradient_norm)):
            self._note(row, self._step % self.every, value)
        if self.listening:
            self._record()
        self._step += 1

    def _note(self, row: int, at: int, value: Tensor | float) -> None:
        if not isinstance(value, Tensor):
            self._known[row, at] = value
        elif value.device.type == "cpu":
            self._known[row, at] = value.item()
        else:
            if self._curve is None:
                shape, nan = self._known.shape, float("nan")
                self._curve = torch.full(shape, nan, dtype=torch.float64, device=value.device)
            self._curve[row, at].copy_(value)

    def _record(self) -> None:
        """Work out the record and send it on its way to the host and to the file."""
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()  # raises what went wrong
        states, gradients = self._states.take(), self._gradients.take()
        if states is None:
            raise RuntimeError("no state was noted: did the sites run in this step?")
        if gradients is None:
            gradients = torch.full_like(states[1:], torch.nan)
        made = figures(self.sites, states, gradients)
        curve, known = self._curve, self._known
        if curve is None:
            curve = torch.full(known.shape, torch.nan, dtype=torch.float64, device=states.device)
        parts = [*(made[name] for name in self._shapes), curve.to(states.device)]
        host, arrived = _to_host(torch.cat([part.flatten() for part in parts]))
        curve.fill_(torch.nan)
        self._known = np.full_like(known, np.nan)
        elapsed_s = time.monotonic() - self._began
        write = self._thread.submit(self._write, self._step, elapsed_s, known, host, arrived)
        self._writes.append(write)

    def _write(
        self,
        step: int,
        elapsed_s: float,
        known: np.ndarray,
        host: Tensor,
        arrived: torch.cuda.Event | None,
    ) -> None:
        """In the thread: wait for a record and append it to the file."""
        if arrived is not None:
            arrived.synchronize()
        figures_, curve = np.split(host.numpy(), [host.numel() - known.size])
        curve = curve.reshape(known.shape)
        curve = np.where(np.isnan(curve), known, curve)
        self._writer.write(step, elapsed_s, np.concatenate([curve.ravel(), figures_]))

    def flush(self) -> None:
        """Wait until the records so far are written; call it before saving a checkpoint, so that a
        run that goes on from there misses none.

        Raises:
            OSError: one could not be written.
        """
        while self._writes:
            self._writes.popleft().result()

    def close(self) -> None:
        """Write what is on its way, take the hooks off and close the file; raises as ``flush``."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            self.flush()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def __enter__(self) -> Self:
        """Record until the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class _Samples:
    """Samples of tensors that pass by, in memory that is asked for once: pieces that come and go
    between a model's activations would tear holes into its memory.
    """

    def __init__(self, number: int) -> None:
        self.buffer: Tensor | None = None  # [number, S, n, C]
        self._number = number
        self._noted: set[int] = set()

    def note(self, index: int, sample: Tensor) -> None:
        """Copy a sample; one that was noted before is forgotten."""
        if self.buffer is None or self.buffer.shape[1:] != sample.shape:
            self.buffer = sample.new_empty(self._number, *sample.shape)
            self._noted.clear()
        self.buffer[index].copy_(sample)
        self._noted.add(index)

    def take(self) -> Tensor | None:
        """All samples, with NaN where none was noted since the last call; None if none was."""
        if not self._noted:
            return None
        assert self.buffer is not None
        for index in set(range(self._number)) - self._noted:
            self.buffer[index].fill_(torch.nan)
        self._noted.clear()
        return self.buffer


def _to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A tensor on its way to the host, and what says that it has arrived."""
    if not x.is_cuda:
        return x, None
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
    arrived.record()
    return host, arrived


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
