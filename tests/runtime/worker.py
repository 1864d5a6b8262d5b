"""What the processes of the tests do: run cases, keep what they computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from mhcplan.runtime.binding import ModelBinding
from mhcplan.runtime.executor import Attachments, Bound
from mhcplan.runtime.parameters import draw_
from mhcplan.runtime.spec import RunSpec
from mhcplan.runtime.train import Session, Trainer
from mhcplan.sim.order import batch_first

if TYPE_CHECKING:
    from mhcplan.sim.program import Op, Program

STEPS = 2
OPTIMIZER = {"lr": 1e-3, "eps": 1e-8}


@dataclass
class Case:
    """A Program to run and what it was lowered from.

    ``shuffle``: seed of another legal order; other cases are rehearsed, which must change nothing.
    """

    name: str
    program: Program
    plan: dict[str, Any]
    choices: dict[str, Any] = field(default_factory=dict)
    shuffle: int | None = None

    @property
    def spec(self) -> RunSpec:
        return RunSpec.from_plan(self.plan, dtype=torch.float32, **self.choices)


class KeepsGradients(ModelBinding):
    """Copies the reduced gradients before the optimizer uses them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.gradients: dict[int, dict[str, torch.Tensor]] = {}

    def _adamw_o(self, op: Op, attached: Attachments) -> Bound:
        update = super()._adamw_o(op, attached)

        def run(i: Any, o: Any) -> Any:  # noqa: ANN401
            if not self.gradients:
                for number, stage in self.stages.items():
                    weights = stage.parameters.weights
                    self.gradients[number] = {k: w.main_grad.clone() for k, w in weights.items()}
            return update.run(i, o)

        return Bound(run)


class UnsettledTrainer(Trainer):
    binding_class = KeepsGradients

    def _build_stages(self, optimizer: Any) -> Any:  # noqa: ANN401
        stages = super()._build_stages(optimizer)
        for stage in stages.values():
            for name, weight in stage.parameters.weights.items():
                unsettle_(weight.data, name)
            for section in stage.parameters.all_sections():
                section.adamw.master.copy_(section.own_of(section.data))
        return stages


def unsettle_(weight: torch.Tensor, name: str) -> None:
    """Give the residual's small parameters values at which its rows differ.

    As initialised, all rows of the state are nearly equal, and the gradients of how they are mixed
    nearly cancel: nothing to compare.
    """
    if name.endswith((".bias", ".alpha")):
        more = torch.empty_like(weight)
        draw_(more, 1, name, 0.3, 0.0)
        weight.add_(more)


def legal_order(program: Program, rank: int, seed: int) -> list[int]:
    """A random order of a rank's ops (of a batched call the first) that respects streams and
    events, transfers first.

    Transfers run by themselves on a GPU, so here they are issued as soon as they may be, and what
    waits for one comes last: else a blocking wait could keep back what the peer needs.
    """
    begin, end = program.rank_offsets[rank : rank + 2]
    first = batch_first(program)
    before: dict[int, set[int]] = {}
    awaited: dict[int, set[int]] = {}
    for i in range(begin, end):
        awaited[i] = waits = {int(program.recorder[e]) for e in program.waits[i]}
        previous = int(program.previous_on_stream[first[i]])
        of_call = before.setdefault(int(first[i]), set())
        of_call |= {int(first[j]) for j in (*waits, previous) if j >= 0}
    rng, order = np.random.default_rng(seed), list[int]()
    done: set[int] = set()
    while before:
        ready = [i for i, needed in before.items() if needed <= done]
        transfers = [i for i in ready if program.group[i] >= 0]
        free = [i for i in ready if not any(program.group[j] >= 0 for j in awaited[i])]
        # one stream far ahead of the others, another one each seed: what comes late is missed most
        lead = [i for i in free if program.stream[i] % 2 == seed % 2]
        chosen = int(rng.choice(lead or free or [min(ready)]))
        if transfers:
            chosen = min(transfers)
        done.add(chosen)
        del before[chosen]
        order.append(chosen - int(begin))
    return order


def run_case(case: Case, session: Session) -> dict[str, Any]:
    """Losses of all steps, reduced gradients of the first, weights after the last."""
    order = None
    if case.shuffle is not None:
        rank = session.process // case.spec.replicas
        order = legal_order(case.program, rank, case.shuffle)
    trainer = UnsettledTrainer(
        case.program, case.spec, session, optimizer=OPTIMIZER, order=order, poison=True
    )
    if order is None:
        trainer.rehearse()
    losses = []
    for step in range(STEPS):
        trainer.load(step)
        trainer.step()
        losses.append(trainer.losses())
    binding = trainer.executor.binding
    assert isinstance(binding, KeepsGradients)
    weights = {
        number: {k: w.data.clone() for k, w in stage.parameters.weights.items()}
        for number, stage in trainer.stages.items()
    }
    return {"losses": losses, "gradients": binding.gradients, "weights": weights}


def run_cases(process: int, world: int, folder: str) -> None:
    """One process of a set: runs every case of ``folder`` and saves what came out."""
    torch.set_num_threads(1)
    cases: list[Case] = torch.load(Path(folder) / "cases.pt", weights_only=False)
    session = Session(torch.device("cpu"), timeout_s=60)
    results = {case.name: run_case(case, session) for case in cases}
    torch.save(results, Path(folder) / f"results{process}.pt")
    dist.barrier()
