"""The recorder on a GPU: it never makes the host wait, and sees what the CPU's sees."""

from __future__ import annotations

from contextlib import nullcontext
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
            for step in range(6):
                with nullcontext() if step < 2 else no_waits():  # loading kernels does wait
                    loss = model(state).square().mean()
                    loss.backward()
                    recorder.step(loss, loss.detach() * 2)
    cpu, gpu = (read_recording(tmp_path / device) for device in ("cpu", "cuda"))
    assert gpu.steps.tolist() == cpu.steps.tolist() == [1, 3, 5]
    for name in cpu.records.dtype.names or ():
        if name not in ("step", "elapsed_s", "crc"):
            torch.testing.assert_close(
                torch.tensor(gpu.figure(name)), torch.tensor(cpu.figure(name)),
                rtol=2e-3, atol=2e-4,
            )  # fmt: skip


def test_the_host_runs_ahead_of_a_gpu_that_is_held_back(tmp_path: Path) -> None:
    """Whatever the recorder waited for, the GPU's sleep would be over."""
    model = network("mhc").cuda()
    state = torch.randn(64, 4, C, device="cuda")
    sleep, awake = 4_000_000_000, torch.cuda.Event()  # some seconds
    with Recorder.attach(model, tmp_path / "a", every=1, tokens=16) as recorder:
        for first in (True, False):  # at first, kernels are loaded and memory is asked for
            torch.cuda.synchronize()
            torch.cuda._sleep(sleep)
            awake.record()
            for _ in range(3):
                for index in range(7):
                    recorder.state(index, state)
                recorder.step(state[0, 0, 0], 1.0)
            assert first or not awake.query()
            recorder.flush()  # of the recorder, this alone waits
            assert awake.query()
    assert read_recording(tmp_path / "a").steps.tolist() == list(range(6))
