"""One training run of the stability benchmark, as the one process of a Program.

The shipped transformer is trained by the runtime; a binding that also tells a recorder what it
sees (states after each site, their gradients, loss and gradient norm) is all that is added. A map
is taken out of a scheme by pinning it: its gate is zero and its bias is what makes it constant, set
again after every step, so that every run of a kind executes the same kernels.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mhcplan.kernels.diagnostics import Recorder
from mhcplan.kernels.diagnostics_maps import Site, make_site, res_logits
from mhcplan.kernels.reference import Coefficients
from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.plan.spec import make_plan
from mhcplan.runtime.binding import ModelBinding
from mhcplan.runtime.data import TextBatches
from mhcplan.runtime.executor import Bound
from mhcplan.runtime.spec import RunSpec
from mhcplan.runtime.train import Session, Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mhcplan.kernels.layers import AdamW
    from mhcplan.runtime.executor import Attachments
    from mhcplan.sim.program import Op

WARM_UP_STEPS = 100
COST_WARM_UP = 3  # rounds of recording_cost that are not counted
DECAYS = ((0.8, 0.316), (0.9, 0.1))  # the mHC paper's, table 5
# of the logit of an entry against the others of its row and column: H_res = I up to 1e-13
_PINNED_LOGIT = 30.0
_START_LOGIT = 4.0  # a start near HC's: the row read has 0.98, the diagonal 0.95 at n = 4
_PARTS = ("pre", "post", "res")

MODELS: dict[str, dict[str, Any]] = {
    "100m": {
        "name": "stability-100m", "num_blocks": 24, "hidden_size": 512, "vocab_size": 8192,
        "attention": {"kind": "gqa", "num_heads": 8, "num_kv_heads": 8, "head_dim": 64},
        "num_dense_blocks": 1, "dense_ffn_dim": 768,
        "moe": {"num_experts": 8, "top_k": 2, "num_shared_experts": 1, "ffn_dim": 192},
    },
    "tiny": {
        "name": "stability-tiny", "num_blocks": 4, "hidden_size": 64, "vocab_size": 512,
        "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 2, "head_dim": 32},
        "num_dense_blocks": 1, "dense_ffn_dim": 96,
        "moe": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1, "ffn_dim": 32},
    },
}  # fmt: skip
MODELS["deep"] = MODELS["tiny"] | {"name": "stability-deep", "num_blocks": 24}  # for a CPU


@dataclass(frozen=True)
class Scheme:
    """A residual, how it starts, and which of its maps is not learned.

    Attributes:
        kind: ``plain``, ``hc`` or ``mhc``.
        pinned: the map that stays what it is without learning: H_pre 1/n, H_post 1, H_res I (as in
            the mHC paper's table 1).
        starts_as_hc: mHC starts by reading one row in turn and mixing little, as HC does, instead
            of with biases of zero, which read and mix all rows alike.
        decays_bias: weight decay shrinks the constant part of the maps as it does all else. HC's
            authors leave that part out (arXiv 2409.19606, section 4).
    """

    kind: str
    pinned: str | None = None
    starts_as_hc: bool = False
    decays_bias: bool = True


SCHEMES = {
    "plain": Scheme("plain"),
    "hc": Scheme("hc"),
    "mhc": Scheme("mhc"),
    "identity": Scheme("mhc", "res"),
    "mhc-no-pre": Scheme("mhc", "pre"),
    "mhc-no-post": Scheme("mhc", "post"),
    "hc-no-res": Scheme("hc", "res"),
}
SEVEN = tuple(SCHEMES)
SCHEMES["mhc-from-hc"] = Scheme("mhc", starts_as_hc=True)
SCHEMES["hc-no-decay"] = Scheme("hc", decays_bias=False)


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Attributes:
        out: folder of recordings and checkpoints.
        model: name in ``MODELS``.
        steps: of every run.
        tokens, seq_len: of a step, and of a sequence.
        lr: peak learning rate.
        every, sampled: steps between records, and tokens looked at.
        save_every: steps between checkpoints, a multiple of ``every``.
        seed: of weights and of the order of the text.
        dtype: of weights and activations.
        text: file of token numbers (numpy).
    """

    out: Path
    model: str
    steps: int
    tokens: int
    seq_len: int
    text: Path
    lr: float = 1e-3
    every: int = 10
    sampled: int = 64
    save_every: int = 500
    seed: int = 0
    dtype: str = "bfloat16"
    expansion_rate: int = 4
    about: dict[str, Any] = field(default_factory=dict)


class WatchedBinding(ModelBinding):
    """Binds ops as the runtime does, and shows a recorder what passes by."""

    recorder: Recorder | None = None
    recording_s = 0.0  # of the host, all that it did for the recorder

    def bind(self, op: Op, attached: Attachments) -> Bound | None:
        bound = super().bind(op, attached)
        kind = op.kind.removeprefix("mhc_").removeprefix("hc_")
        see = _SEEN.get((kind, op.pass_))
        if bound is None or (see is None and kind != "adamw"):
            return bound

        def run(i: list[Any], o: list[Any]) -> Sequence[Any]:
            recorder = self.recorder
            if recorder is not None and see is None:
                # of the optimizer: all gradients are there, and no parameter has changed yet
                began = time.perf_counter()
                recorder.step(self.batches.losses.mean(), self._gradient_norm())
                self.recording_s += time.perf_counter() - began
            made = bound.run(i, o)
            if recorder is not None and see is not None and recorder.listening:
                began = time.perf_counter()
                see(recorder, op.site, i, made)
                self.recording_s += time.perf_counter() - began
            return made

        return Bound(run, bound.layouts)

    def _gradient_norm(self) -> torch.Tensor:
        sections = [s for m in self.stages.values() for s in m.parameters.all_sections()]
        norms = torch._foreach_norm([section.grad for section in sections])
        return torch.linalg.vector_norm(torch.stack(norms))


def _see_start(recorder: Recorder, site: int, i: list[Any], _made: Sequence[Any]) -> None:
    """The first site's input; those of the others leave the site before."""
    if site == 0:
        recorder.state(0, _rows(i[0]))


def _see_end(recorder: Recorder, site: int, i: list[Any], made: Sequence[Any]) -> None:
    """What leaves a site; the plain residual is one op, so that it shows its input as well."""
    if len(i) == 2:
        _see_start(recorder, site, i, made)
    recorder.state(site + 1, _rows(made[0]))


def _see_gradient(recorder: Recorder, site: int, i: list[Any], _made: Sequence[Any]) -> None:
    recorder.gradient(site, _rows(i[0]))


_SEEN = {
    ("pre", "F"): _see_start,
    ("post", "F"): _see_end,
    ("residual", "F"): _see_end,
    ("post", "I"): _see_gradient,
    ("residual", "I"): _see_gradient,
}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The plain residual's state [T, C] as one of one row."""
    return x.unsqueeze(-2) if x.ndim == 2 else x


class WatchedTrainer(Trainer):
    binding_class = WatchedBinding


class Training:
    """A run that can be stopped after any step and taken up again.

    Args:
        name: in ``SCHEMES``.
        settings: of the comparison.
        device: where it runs.
    """

    def __init__(self, name: str, settings: Settings, device: torch.device) -> None:
        self.name, self.settings, self.scheme = name, settings, SCHEMES[name]
        kind = self.scheme.kind
        n = 1 if kind == "plain" else settings.expansion_rate
        plan = make_plan(
            {
                "model": MODELS[settings.model], "seq_len": settings.seq_len, "microbatches": 1,
                "residual": {"kind": kind, "expansion_rate": n, "recompute_block": "none"},
                "micro_batch_size": settings.tokens // settings.seq_len, "schedule": "1f1b",
                "priority": "none", "layout": {"pp": 1, "ep": 1, "dp": 1},
            }
        )  # fmt: skip
        choices: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "seed": settings.seed}
        spec = RunSpec.from_plan(plan.model_dump(mode="json"), routing="learned", **choices)
        self.trainer = WatchedTrainer(lower(plan, None), spec, Session(device))
        (self.stage,) = self.trainer.stages.values()
        text = torch.from_numpy(np.load(settings.text))
        self.trainer.text = TextBatches(
            spec.model.vocab_size, spec.tokens, spec.seq_len, settings.seed, text
        )
        self.sites = self._sites(n)
        self.binding: WatchedBinding = self.trainer.executor.binding  # type: ignore[assignment]
        self._pins = list(self._find_pins(n))
        self._undecayed = [] if self.scheme.decays_bias else list(self._find_biases())
        if self.scheme.starts_as_hc:
            self._start_as_hc(n)
        self._pin()
        self.step_number = self._load()

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return self.stage.parameters.num_elements

    def _sites(self, n: int) -> list[Site]:
        kind, weights = self.scheme.kind, self.stage.parameters.weights
        found = []
        for site in range(2 * len(self.stage.blocks)):
            prefix = f"blocks.{site // 2}.sites.{site % 2}"
            if kind == "plain":
                found.append(Site(prefix, "plain", n))
                continue
            names = ("theta" if kind == "hc" else "phi", "bias", "alpha")
            parts = [weights[f"{prefix}.{name}"].data for name in names]
            found.append(make_site(prefix, kind, (parts[0], parts[1], parts[2])))  # type: ignore[arg-type]
        return found

    # -- starts, and pinned maps

    def _start_as_hc(self, n: int) -> None:
        for number, site in enumerate(self.sites):
            bias = Coefficients.split(site.parameters[1], n)
            bias.pre.fill_(-_START_LOGIT)[number % n] = _START_LOGIT
            bias.res.copy_(_START_LOGIT * torch.eye(n))
        for section in self.stage.parameters.all_sections():
            section.adamw.master.copy_(section.own_of(section.data))

    def _find_pins(self, n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(view of a parameter, its value) of everything that the scheme does not learn."""
        part = self.scheme.pinned
        if part is None:
            return
        number = _PARTS.index(part)
        for site in self.sites:
            _, bias, alpha = site.parameters
            value = pinned_bias(self.scheme.kind, part, n).to(bias)
            view = getattr(Coefficients.split(bias, n), part)
            yield alpha[number], torch.zeros_like(alpha[number])
            yield view, value

    def _pin(self) -> None:
        for view, value in self._pins:
            view.copy_(value)

    def _find_biases(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """(bias, the optimizer's copy of it, its decay) of every site; one process owns it all."""
        for section in self.stage.parameters.all_sections():
            storage = section.data.untyped_storage().data_ptr()
            for site in self.sites:
                bias = site.parameters[1]
                if bias.untyped_storage().data_ptr() == storage:
                    at = bias.storage_offset() - section.data.storage_offset()
                    adamw = section.adamw
                    yield bias, adamw.master[at : at + bias.numel()], adamw.decay

    # -- steps

    def run(self, until: float) -> bool:
        """Train until the last step or the deadline (monotonic seconds); returns whether it ended.

        Saves before it returns, and every ``save_every`` steps.
        """
        s = self.settings
        if self.step_number >= s.steps:
            return True
        about = s.about | {
            "scheme": self.name, "model": s.model, "parameters": self.num_parameters,
            "steps": s.steps, "tokens_per_step": s.tokens, "seq_len": s.seq_len, "lr": s.lr,
            "seed": s.seed, "dtype": s.dtype, "device": device_name(self.trainer.session.device),
        }  # fmt: skip
        recorder = Recorder(
            self.sites, s.out / f"{self.name}.recording", every=s.every, tokens=s.sampled,
            about=about, first_step=self.step_number,
        )  # fmt: skip
        with recorder:
            self.binding.recorder = recorder
            while self.step_number < s.steps:
                self.advance()
                if self.step_number % s.every:
                    continue
                late = time.monotonic() > until
                if late or self.step_number % s.save_every == 0 or self.step_number == s.steps:
                    recorder.flush()
                    self._save()
                if self.step_number % (10 * s.every) == 0 or late:
                    loss = self.trainer.losses()[0]
                    print(f"{self.name}: step {self.step_number}, loss {loss:.4f}", flush=True)
                if late:
                    break
        self.binding.recorder = None
        if self.step_number == s.steps and self.scheme.kind == "mhc":
            assert recorder.last_states is not None
            logits = res_logits(self.sites, recorder.last_states[:-1]).float().cpu().numpy()
            np.save(s.out / f"{self.name}.logits.npy", logits)
        return self.step_number == s.steps

    def advance(self) -> None:
        """One step."""
        rate = learning_rate(self.step_number, self.settings.steps, self.settings.lr)
        for section in self.stage.parameters.all_sections():
            section.adamw.lr = rate
        before = [master.clone() for _, master, _ in self._undecayed]
        self.trainer.load(self.step_number)
        self.trainer.step()
        for (bias, master, decay), old in zip(self._undecayed, before, strict=True):
            master.add_(old, alpha=rate * decay)  # what AdamW's decay took from it
            bias.copy_(master)
        self._pin()
        self.step_number += 1

    # -- checkpoints

    @property
    def _checkpoint(self) -> Path:
        return self.settings.out / f"{self.name}.pt"

    def _save(self) -> None:
        weights = {k: w.data for k, w in self.stage.parameters.weights.items()}
        optimizer = [_optimizer_state(s.adamw) for s in self.stage.parameters.all_sections()]
        draft = self._checkpoint.with_suffix(".draft")
        torch.save({"step": self.step_number, "model": weights, "optimizer": optimizer}, draft)
        os.replace(draft, self._checkpoint)

    def _load(self) -> int:
        """Take up the run where its checkpoint is; returns the next step."""
        if not self._checkpoint.exists():
            return 0
        device = self.trainer.session.device
        saved = torch.load(self._checkpoint, map_location=device, weights_only=True)
        for name, weight in self.stage.parameters.weights.items():
            weight.data.copy_(saved["model"][name])
        sections = self.stage.parameters.all_sections()
        for section, tensors in zip(sections, saved["optimizer"], strict=True):
            for mine, theirs in zip(_optimizer_state(section.adamw), tensors, strict=True):
                mine.copy_(theirs)
            section.adamw.steps = saved["step"]
        return int(saved["step"])


def _optimizer_state(adamw: AdamW) -> tuple[torch.Tensor, ...]:
    return adamw.master, adamw.first, adamw.second


def pinned_bias(kind: str, part: str, n: int) -> torch.Tensor:
    """The bias that makes a map constant where its gate is zero."""
    eye = torch.eye(n)
    if kind == "hc":
        return {"pre": torch.full((n,), 1 / n), "post": torch.ones(n), "res": eye}[part]
    logit = -math.log(n - 1)  # sigmoid of it is 1 / n; H_post = 2 sigmoid(0) = 1
    constant = {"pre": torch.full((n,), logit), "post": torch.zeros(n), "res": _PINNED_LOGIT * eye}
    return constant[part]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then the paper's two drops."""
    rate = peak * min((step + 1) / WARM_UP_STEPS, 1.0)
    for share, factor in DECAYS:
        if step >= share * steps:
            rate = peak * factor
    return rate


def recording_cost(training: Training, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of steps without a recorder, with one, and with one that makes a record, in turns:
    the host's speed wanders by more than a recorder costs, but little from step to step.

    Returns:
        ``[rounds, 3]`` each: seconds of the step, and of them the host's inside the recorder.
    """
    s, binding = training.settings, training.binding
    device = training.trainer.session.device
    seconds, host = np.zeros((2, COST_WARM_UP + rounds, 3))
    path = s.out / f"{training.name}.cost.recording"
    with Recorder(training.sites, path, every=2, tokens=s.sampled) as recorder:
        for turn, arm in np.ndindex(seconds.shape):
            binding.recorder, binding.recording_s = recorder if arm else None, 0.0
            synchronize(device)
            began = time.perf_counter()
            training.advance()
            synchronize(device)
            seconds[turn, arm] = time.perf_counter() - began
            host[turn, arm] = binding.recording_s
        binding.recorder = None
    return seconds[COST_WARM_UP:], host[COST_WARM_UP:]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """For the record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
