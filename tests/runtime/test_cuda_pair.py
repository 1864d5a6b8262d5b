"""On two GPUs: NCCL carries what gloo carried, and a captured step is the issued one.

Gradients of one step, in bf16, are held against autograd's in fp32 on one GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mhcplan.runtime.captured import CapturedStep
from mhcplan.runtime.executor import Bound
from mhcplan.runtime.groups import ALL_GATHER
from mhcplan.runtime.launch import launch
from mhcplan.runtime.spec import RunSpec
from mhcplan.runtime.train import Session
from tests.runtime.comparison import own_part
from tests.runtime.plans import make_case
from tests.runtime.test_cuda import MODEL, check, expected
from tests.runtime.worker import KeepsGradients, UnsettledTrainer

if TYPE_CHECKING:
    from mhcplan.runtime.executor import Attachments
    from mhcplan.sim.program import Op
    from tests.runtime.worker import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
CASES: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b", "recompute": 2, "microbatches": 6},
    "1f1b plain": {"schedule": "1f1b", "n": 1},
    "interleaved": {"schedule": "interleaved-1f1b", "recompute": 1, "n": 2},
    "zb1p": {"schedule": "zb1p", "recompute": "stage", "priority": "all"},
    "zbv": {"schedule": "zbv", "recompute": 1},
    "dualpipe": {"schedule": "dualpipe", "recompute": 2, "priority": "recompute"},
    "dualpipe grouped": {"schedule": "dualpipe", "p2p": "grouped", "n": 2},
    "dualpipev grouped one": {
        "schedule": "dualpipev", "p2p": "grouped", "comm_streams": "one", "recompute": "stage",
    },
    "experts": {"schedule": "dualpipev", "pp": 1, "ep": 2, "recompute": 2},
    "experts, urgent": {
        "schedule": "dualpipev", "pp": 1, "ep": 2, "priority": "all", "comm_priority": "high",
    },
    "weights": {"schedule": "1f1b", "pp": 1, "dp": 2, "n": 2},
}  # fmt: skip
STILL = {"lr": 0.0, "decay": 0.0}  # an optimizer that leaves the weights as they are


class GathersGradients(KeepsGradients):
    """Makes every gradient whole before it is kept: NCCL reduces into each process's share only."""

    def _adamw_o(self, op: Op, attached: Attachments) -> Bound:
        keep_and_update = super()._adamw_o(op, attached)

        def run(i: Any, o: Any) -> Any:  # noqa: ANN401
            for stage, reduction in sorted(self.reductions.items()):
                for part, handle in reduction._groups.values():
                    for section in self.stages[stage].parameters.sections[part]:
                        own = section.own_of(section.grad)
                        ALL_GATHER(section.grad, own, group=handle.group)
            return keep_and_update.run(i, o)

        return Bound(run)


class PairTrainer(UnsettledTrainer):
    binding_class = GathersGradients


def case_of(name: str) -> Case:
    return make_case(name, model=MODEL, seq_len=512, routing="forced", **CASES[name])


def run_pair(process: int, _world: int, folder: str) -> None:
    """Every case: gradients of an issued step, losses of an issued and of a captured one."""
    session, found = Session(torch.device("cuda", process)), {}
    for name in CASES:
        case = case_of(name)
        spec = RunSpec.from_plan(case.plan, **case.choices)
        trainer = PairTrainer(case.program, spec, session, optimizer=STILL)
        trainer.rehearse()
        trainer.load(0)
        trainer.step()
        issued = trainer.losses()
        captured = CapturedStep(trainer)
        trainer.batches.losses.zero_()
        captured.load(0)
        captured.step()
        torch.cuda.synchronize()
        binding = trainer.executor.binding
        assert isinstance(binding, KeepsGradients)
        gradients = {
            key: gradient.cpu()
            for of_stage in binding.gradients.values()
            for key, gradient in of_stage.items()
        }
        found[name] = {"gradients": gradients, "issued": issued, "captured": trainer.losses()}
        del trainer, captured, binding
    torch.save(found, Path(folder) / f"{process}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pair")
    launch(run_pair, 2, str(folder), device="cuda", timeout_s=120)
    return [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_compute_what_one_does(results: list[dict[str, Any]], name: str) -> None:
    case = case_of(name)
    spec, seen = RunSpec.from_plan(case.plan, **case.choices), set[str]()
    right = expected(case)
    for process, found in enumerate(results):
        gradients = found[name]["gradients"]
        seen |= set(gradients)
        check(
            gradients,
            {key: own_part(right[key], key, spec, process % spec.ep).cpu() for key in gradients},
        )
    assert seen == set(right)


@pytest.mark.parametrize("name", CASES)
def test_a_captured_step_computes_what_an_issued_one_does(
    results: list[dict[str, Any]], name: str
) -> None:
    losses = [of for found in results for of in found[name]["issued"].values()]
    assert losses
    for found in results:
        assert found[name]["captured"] == found[name]["issued"]
