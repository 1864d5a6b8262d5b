"""Stages given as plain modules, two processes, 1F1B by hand with B and with I and W."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhcplan.runtime.executor import Executor, TensorLayout, rank_ops, streams_of
from mhcplan.runtime.groups import Groups, GroupTransfers, Place
from mhcplan.runtime.launch import launch
from mhcplan.runtime.module_stage import ModuleBinding, ModuleStage
from mhcplan.runtime.streams import CpuStreams, StreamPool
from tests.support.programs import Maker

if TYPE_CHECKING:
    from mhcplan.sim.program import Program

MICROBATCHES, TOKENS, WIDTH = 3, 8, 16


def by_hand(*, split: bool) -> Program:
    """All forwards, then all backwards of two stages on two ranks."""
    maker = Maker(2)
    forward, backward = maker.group("pp_f:0>1", 0, 1), maker.group("pp_b:1>0", 1, 0)
    state: dict[tuple[str, int], int] = {}

    def buffer(name: str, b: int) -> int:
        return state.setdefault((name, b), maker.buffer(64))

    def compute(rank: int, pass_: str, b: int, **lists: Any) -> int:  # noqa: ANN401
        return maker.op(rank, 1, kind="module", pass_=pass_, stage=rank, microbatch=b, **lists)

    def transfer(rank: int, group: int, **rest: Any) -> int:  # noqa: ANN401
        sends = "to" in rest
        return maker.transfer(rank, group, 1, kind="pp_send" if sends else "pp_recv", **rest)

    sent: list[int] = []
    for b in range(MICROBATCHES):
        x, keep = buffer("x", b), buffer("keep0", b)
        f = compute(0, "F", b, writes=(x, keep), allocs=(x, keep))
        sent.append(transfer(0, forward, to=1, waits=[f], reads=(x,)))
        y, keep = buffer("y", b), buffer("keep1", b)
        got = transfer(1, forward, source=0, writes=(y,), allocs=(y,))
        maker.op(1, 1, kind="await", waits=[got])
        compute(1, "F", b, reads=(y,), writes=(keep,), allocs=(keep,))
    for b in range(MICROBATCHES):
        x, y, keep = buffer("x", b), buffer("y", b), buffer("keep1", b)
        g, defer = buffer("g", b), buffer("defer1", b)
        if split:
            made = (g, defer)
            i = compute(1, "I", b, reads=(keep,), writes=made, allocs=made, frees=(keep, y))
            compute(1, "W", b, reads=(defer,), frees=(defer,))
        else:
            i = compute(1, "B", b, reads=(keep,), writes=(g,), allocs=(g,), frees=(keep, y))
        out = transfer(1, backward, to=0, waits=[i], reads=(g,))
        maker.op(1, 1, kind="release", waits=[out], frees=(g,))
        h, keep = buffer("h", b), buffer("keep0", b)
        maker.op(0, 1, kind="release", waits=[sent[b]], frees=(x,))
        got = transfer(0, backward, source=1, writes=(h,), allocs=(h,))
        maker.op(0, 1, kind="await", waits=[got])
        compute(0, "B", b, reads=(h, keep), frees=(h, keep))
    for rank in range(2):
        maker.op(rank, 1, kind="adamw", pass_="O")
    return maker.build()[0]


def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1)),
    ]


def data(b: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(b))


def loss(y: Tensor, b: int) -> Tensor:
    return (y - b).square().mean() / MICROBATCHES


def run_stage(process: int, _world: int, program: Program, folder: str) -> None:
    torch.set_num_threads(1)
    place = Place(process, ep=1, dp=1)
    groups = Groups(StreamPool(torch.device("cpu")), 30).add(program, place)
    module = modules()[process]
    stage = ModuleStage(module, data=data) if process == 0 else ModuleStage(module, loss=loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    grads: list[Tensor] = []

    def step() -> None:
        grads.extend(p.grad.clone() for p in module.parameters() if p.grad is not None)
        optimizer.step()

    message = TensorLayout((TOKENS, WIDTH), torch.float32)
    binding = ModuleBinding({process: stage}, message, step=step, zero=optimizer.zero_grad)
    own = [program.streams[i] for i in streams_of(program, process)]
    events = sum(op.record >= 0 for op in rank_ops(program, process))
    executor = Executor(
        program, process, binding, GroupTransfers(groups, place), CpuStreams(own, events)
    )
    executor.step()
    torch.save((grads, binding.losses), Path(folder) / f"{process}.pt")
    dist.barrier()


@pytest.mark.parametrize("split", [False, True], ids=["B", "I and W"])
def test_modules_train_as_they_would_together(tmp_path: Path, split: bool) -> None:
    launch(run_stage, 2, by_hand(split=split), str(tmp_path), timeout_s=30)
    first, second = modules()
    losses = {}
    for b in range(MICROBATCHES):
        value = loss(second(first(data(b))), b)
        value.backward()
        losses[b] = value.detach()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for module, (grads, _) in zip((first, second), found, strict=True):
        for parameter, gradient in zip(module.parameters(), grads, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
    assert found[1][1].keys() == losses.keys()
    for b, value in losses.items():
        torch.testing.assert_close(found[1][1][b], value)
