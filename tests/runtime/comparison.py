"""What processes computed, held against one process without pipeline."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhcplan.runtime.data import TextBatches
from mhcplan.runtime.launch import launch
from mhcplan.runtime.model import build_stage
from tests.runtime.reference_model import ReferenceModel
from tests.runtime.worker import OPTIMIZER, STEPS, Case, run_cases, unsettle_

if TYPE_CHECKING:
    from pathlib import Path

    from mhcplan.runtime.spec import RunSpec

# float32: sums over tokens, microbatches and ranks are taken in another order, and the softmax,
# the norms and Sinkhorn in another form. Relative to the largest entry of a tensor.
GRADIENT_TOLERANCE = 5e-5
# The final norm undoes any common factor of the rows' weights, so their gradients nearly cancel.
EXIT_TOLERANCE = 2e-4
LOSS_TOLERANCE = 2e-6


def run(cases: list[Case], processes: int, folder: Path) -> list[dict[str, Any]]:
    """Results by process and case name; those that ``folder`` holds already are taken."""
    paths = [folder / f"results{p}.pt" for p in range(processes)]
    if not all(path.exists() for path in paths):
        torch.save(cases, folder / "cases.pt")
        launch(run_cases, processes, str(folder), timeout_s=60)
    return [torch.load(path, weights_only=False) for path in paths]


def initial_weights(spec: RunSpec, device: str = "cpu") -> dict[str, Tensor]:
    """All parameters of the whole model, by the runtime's names."""
    stage = build_stage(
        replace(spec, ep=1), range(spec.model.num_blocks), expert_index=0,
        shares=dict.fromkeys(("dense", "experts"), (0, 1)), device=torch.device(device),
        loss_scale=1.0, optimizer={},
    )  # fmt: skip
    weights = {name: w.data.clone() for name, w in stage.parameters.weights.items()}
    for name, weight in weights.items():
        unsettle_(weight, name)
    return weights


@lru_cache
def reference(spec: RunSpec, microbatches: int) -> dict[str, Any]:
    """Losses [step][microbatch] over all replicas, and gradients of the first step.

    ``microbatches`` counts those of one replica.
    """
    weights = {k: w.double().requires_grad_() for k, w in initial_weights(spec).items()}
    model = ReferenceModel(spec, weights)
    options: dict[str, Any] = OPTIMIZER | {"betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(weights.values(), **options)
    text = TextBatches(spec.model.vocab_size, spec.tokens, spec.seq_len, spec.seed)
    total = microbatches * spec.replicas
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append([])
        for number in range(total):
            loss = model.loss(*text.microbatch(step, number))
            (loss / total).backward()
            losses[-1].append(loss.item())
        if step == 0:
            gradients = {k: w.grad.clone() for k, w in weights.items() if w.grad is not None}
        optimizer.step()
    return {"losses": losses, "gradients": gradients}


def check(case: Case, results: list[dict[str, Any]]) -> None:
    """Losses and gradients equal one process's; copies of a stage have equal weights."""
    spec, m = case.spec, case.plan["microbatches"]
    expected = reference(spec, m)
    seen: set[str] = set()
    losses: dict[tuple[int, int], float] = {}
    for process, of_case in enumerate(results):
        result, replica = of_case[case.name], process % spec.replicas
        for step, found in enumerate(result["losses"]):
            losses |= {(step, replica * m + b): loss for b, loss in found.items()}
        for gradients in result["gradients"].values():
            for name, gradient in gradients.items():
                seen.add(name)
                right = own_part(expected["gradients"][name], name, spec, replica % spec.ep)
                right = right.to(gradient.dtype)
                error = (gradient - right).abs().max() / right.abs().max().clamp_min(1e-30)
                most = EXIT_TOLERANCE if name.startswith("collapse.") else GRADIENT_TOLERANCE
                assert error < most, f"{case.name}: {name} is off by {error:.1e}"
    assert seen == set(expected["gradients"]), case.name
    assert len(losses) == STEPS * m * spec.replicas
    for (step, number), loss in losses.items():
        right = expected["losses"][step][number]
        assert abs(loss / right - 1) < LOSS_TOLERANCE, f"{case.name}: loss {step}/{number}"
    check_copies(case, results)


def own_part(gradient: Tensor, name: str, spec: RunSpec, index: int) -> Tensor:
    """The experts that a process holds; all of any other parameter."""
    return gradient.chunk(spec.ep)[index] if ".experts." in name else gradient


def check_copies(case: Case, results: list[dict[str, Any]]) -> None:
    """Processes that hold the same parameter have bitwise equal weights after the steps."""
    first: dict[tuple[str, int], Tensor] = {}
    for process, of_case in enumerate(results):
        for weights in of_case[case.name]["weights"].values():
            for name, weight in weights.items():
                share = process % case.spec.ep if ".experts." in name else 0
                held = first.setdefault((name, share), weight)
                assert torch.equal(held, weight), f"{case.name}: copies of {name} differ"
