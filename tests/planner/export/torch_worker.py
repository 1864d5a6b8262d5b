"""One of two processes that run exported tables under torch.distributed.pipelining, on gloo.

``python -m tests.planner.export.torch_worker RANK FOLDER``: every case below in turn; writes what
it found to FOLDER/result_RANK.json. The model is two-layer blocks with a residual, a block a stage.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.utils.checkpoint import checkpoint

from mhcplan.planner.export.torch_csv import (
    compute_comms_rows,
    compute_only_rows,
    csv_text,
    exported_schedule,
)
from mhcplan.planner.schedules.catalogue import build_schedule
from mhcplan.runtime.torch_dualpipe import BidirectionalStage, load_bidirectional
from mhcplan.runtime.torch_overlap import register_overlap

RANKS, WIDTH, ROWS = 2, 8, 2


class Case(NamedTuple):
    """``table``: which file is loaded. ``titan``: as torchtitan does, gradients not scaled."""

    schedule: str
    microbatches: int
    table: str = "compute_only"
    overlap: bool = False
    recompute: bool = False
    titan: bool = False


CASES = {
    "1f1b": Case("1f1b", 4),
    "1f1b comms": Case("1f1b", 4, "compute_comms"),
    "interleaved comms": Case("interleaved-1f1b", 4, "compute_comms"),
    "zb1p": Case("zb1p", 4),
    "zbv": Case("zbv", 5),
    "zbv comms": Case("zbv", 5, "compute_comms"),
    "zbv recompute": Case("zbv", 5, recompute=True),
    "dualpipev": Case("dualpipev", 6),
    "dualpipev overlap": Case("dualpipev", 6, overlap=True),
    "dualpipev comms overlap": Case("dualpipev", 6, "compute_comms", overlap=True),
    "dualpipev recompute overlap": Case("dualpipev", 6, overlap=True, recompute=True),
    "torchtitan dualpipev": Case("dualpipev", 6, overlap=True, titan=True),
    "torchtitan zbv": Case("zbv", 5, titan=True),
    "dualpipe": Case("dualpipe", 8, "compute_comms"),
    "dualpipe overlap": Case("dualpipe", 8, "compute_comms", overlap=True),
}


class Block(nn.Module):
    forwards = 0

    def __init__(self, layer: int, recompute: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(layer)
        self.up = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        self.recompute = recompute

    def _body(self, x: torch.Tensor) -> torch.Tensor:
        Block.forwards += 1
        return x + torch.tanh(x @ self.up) @ self.down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recompute:
            return checkpoint(self._body, x, use_reentrant=False)
        return self._body(x)


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


def data(seed: int, microbatches: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    shape = (microbatches * ROWS, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def one_process(layers: int, microbatches: int, seed: int) -> tuple[list[float], list[Block]]:
    """Losses, and blocks with gradients of the mean loss, without a pipeline."""
    blocks = [Block(layer, recompute=False) for layer in range(layers)]
    x, target = data(seed, microbatches)
    losses: list[float] = []
    for a, b in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        loss = loss_fn(nn.Sequential(*blocks)(a), b)
        (loss / microbatches).backward()
        losses.append(loss.item())
    return losses, blocks


def run_case(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    schedule = build_schedule(case.schedule, RANKS, case.microbatches)
    exported = exported_schedule(schedule, recomputes=case.recompute)
    make = compute_comms_rows if case.table == "compute_comms" else compute_only_rows
    table = folder / f"table_{rank}.csv"
    table.write_text(csv_text(make(exported)))
    if schedule.num_directions == 2:
        return _run_both_directions(case, rank, table)
    held = sorted(schedule.stages_of(rank))
    layers = schedule.num_stages
    cpu = torch.device("cpu")
    stages = [PipelineStage(Block(s, case.recompute), s, layers, cpu) for s in held]
    runtime = _PipelineScheduleRuntime(
        stages, n_microbatches=case.microbatches, loss_fn=loss_fn, scale_grads=not case.titan
    )
    runtime._load_csv(str(table), format=case.table)
    overlap = register_overlap(runtime) if case.overlap else None
    x, target = data(0, case.microbatches)
    losses: list[torch.Tensor] = []
    steps = 2  # in the second, shapes are known and nothing of the first may be left
    for _ in range(steps):
        for stage in stages:
            stage.submod.zero_grad()
        losses.clear()
        Block.forwards = 0
        is_last = layers - 1 in held
        runtime.step(*((x,) if 0 in held else ()), target=target if is_last else None,
                     losses=losses, return_outputs=False)  # fmt: skip
    forwards = Block.forwards
    scale = case.microbatches if case.titan else 1
    return {
        "gradients": _worst(stages, one_process(layers, case.microbatches, 0)[1], scale),
        "losses": _difference(losses, one_process(layers, case.microbatches, 0)[0], is_last),
        "pairs": overlap.pairs / steps if overlap else 0,
        "forwards": forwards,
        "last": is_last,
    }


def _run_both_directions(case: Case, rank: int, table: Path) -> dict[str, Any]:
    half, layers, cpu = case.microbatches // 2, RANKS, torch.device("cpu")
    stages: list[BidirectionalStage] = []
    for index in (rank, 2 * RANKS - 1 - rank):
        layer = index % RANKS
        like = torch.zeros(ROWS, WIDTH, requires_grad=layer > 0)
        output = torch.zeros(ROWS, WIDTH, requires_grad=True)
        block = Block(layer, case.recompute)
        stages.append(
            BidirectionalStage(block, index, 2 * RANKS, cpu, input_args=like, output_args=output)
        )
    runtime = load_bidirectional(stages, str(table), n_microbatches=half, loss_fn=loss_fn)
    overlap = register_overlap(runtime) if case.overlap else None
    ends = [data(seed, half) for seed in range(2)]  # by direction
    losses: list[torch.Tensor] = []
    # rank 0 feeds direction 0 and holds the end of direction 1, rank 1 the other way round
    runtime.step(ends[rank][0], target=ends[1 - rank][1], losses=losses, return_outputs=False)
    expected = [one_process(layers, half, seed) for seed in range(2)]
    worst = max(_worst([s], expected[s.stage_index // RANKS][1], 1, s.stage_index % RANKS)
                for s in stages)  # fmt: skip
    return {
        "gradients": worst,
        "losses": _difference(losses, expected[1 - rank][0], True),
        "pairs": overlap.pairs if overlap else 0,
        "forwards": 0,
        "last": True,
    }


def _worst(stages: Any, blocks: list[Block], scale: int, layer: int | None = None) -> float:  # noqa: ANN401
    differences = [0.0]
    for stage in stages:
        expected = blocks[stage.stage_index if layer is None else layer]
        for ours, theirs in zip(stage.submod.parameters(), expected.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            differences.append((ours.grad - scale * theirs.grad).abs().max().item() / scale)
    return max(differences)


def _difference(losses: list[torch.Tensor], expected: list[float], is_last: bool) -> float:
    if not is_last:
        return 0.0
    found = torch.stack(losses).detach()
    return (found - torch.tensor(expected)).abs().max().item()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    try:
        for name, case in CASES.items():
            results[name] = {"error": "the case did not end"}
            results[name] = run_case(case, rank, folder)
    except Exception:  # the test shows it; the other rank would only wait
        results[name] = {"error": traceback.format_exc()}
    (folder / f"result_{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # a peer may be stuck in a collective that this rank will not reach


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
