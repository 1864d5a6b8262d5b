"""The recorder on a GPU: it never makes the host wait, and sees what the CPU's sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from mhcplan.kernels import modules
from mhcplan.kernels.diagnostics import Recorder
from mhcplan.planner.diagnose.recording import read_recording

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
C = 128


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    made = [modules.make_site(kind, nn.Linear(C, C), C, 4, layer_index=i) for i in range(6)]
    for site in made:
        with torch.no_grad():
            site.alpha.fill_(0.5)
            site.bias.add_(torch.randn_like(site.bias), alpha=0.3)
    return nn.Sequential(*made)


@pytest.mark.parametrize("kind", ["mhc", "hc", "identity"])
def test_no_step_waits_for_the_gpu_and_figures_agree(
    kind: str, tmp_path: Path, no_waits: Callable[[], AbstractContextManager[None]]
) -> None:
    x = torch.randn(2, 40, 4, C)
    for device in ("cpu", "cuda"):
        model, state = network(kind).to(device), x.to(device)
        with Recorder.attach(model, tmp_path / device, every=2, tokens=16) as recorder:
            for _ in range(6):
                loss = model(state).square().mean()
                loss.backward()
                norm = loss.detach() * 2
                with no_waits():
                    recorder.step(loss, norm)
    cpu, gpu = (read_recording(tmp_path / device) for device in ("cpu", "cuda"))
    assert gpu.steps.tolist() == cpu.steps.tolist() == [1, 3, 5]
    for name in cpu.records.dtype.names or ():
        if name not in ("step", "elapsed_s", "crc"):
            torch.testing.assert_close(
                torch.tensor(gpu.figure(name)), torch.tensor(cpu.figure(name)),
                rtol=2e-3, atol=2e-4,
            )  # fmt: skip
