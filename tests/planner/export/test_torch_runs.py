"""The exported tables run under torch's own pipelining, with the gradients of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed.pipelining", reason="runs under torch")

from mhcplan.planner.schedules.catalogue import build_schedule
from tests.planner.export.torch_worker import CASES, RANKS

ROOT = Path(__file__).parents[3]
TOLERANCE = 2e-6  # fp32 sums of at most 8 microbatches, in another order


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case; all cases in one pair of processes."""
    folder = tmp_path_factory.mktemp("torch")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    if sys.platform == "darwin":
        environment["GLOO_SOCKET_IFNAME"] = "lo0"
    command = [sys.executable, "-m", "tests.planner.export.torch_worker"]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, cwd=ROOT)
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            process.wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_losses_are_those_of_one_process(
    results: list[dict[str, Any]], name: str
) -> None:
    assert any(rank[name].get("last") for rank in results), [rank[name] for rank in results]
    for rank in results:
        found = rank[name]
        assert "error" not in found, found["error"]
        assert found["gradients"] <= TOLERANCE
        assert found["losses"] <= TOLERANCE


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.overlap])
def test_every_pair_is_run_by_the_registered_function(
    results: list[dict[str, Any]], name: str
) -> None:
    case = CASES[name]
    schedule = build_schedule(case.schedule, RANKS, case.microbatches)
    for rank, row in enumerate(schedule.actions):
        pairs = sum(action.kind == "OVERLAP" for action in row)
        assert results[rank][name]["pairs"] == pairs > 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.recompute])
def test_recomputed_stages_run_forward_exactly_twice(
    results: list[dict[str, Any]], name: str
) -> None:
    """Split into I and W, torch would recompute once more for every parameter group."""
    case = CASES[name]
    expected = 2 * 2 * case.microbatches  # stages a rank, forward and recompute
    for rank in results:
        assert rank[name]["forwards"] == expected
