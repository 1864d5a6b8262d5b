"""Every schedule family, residual, recompute block, layout and way to send, in gloo processes.

Losses of two steps and the gradients of the first equal those of one process that runs the model
whole under torch's autograd, in float64. Runs whose name ends in ``shuffled`` issue their ops in a
random order that the Program's streams and events allow, on memory full of NaN: a missing wait
shows as a wrong number.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from mhcplan.runtime.launch import ProcessFailed
from mhcplan.sim.program import Csr
from tests.runtime.comparison import check, run
from tests.runtime.plans import FORCED, make_case

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.worker import Case

Computed = tuple["dict[str, Case]", list[dict[str, Any]]]

GQA = {"attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}}
QUERIES = {
    "attention": {
        "kind": "mla", "num_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "kv_lora_rank": 24, "q_lora_rank": 16,
    },
}  # fmt: skip
DENSE = {"moe": None, "num_dense_blocks": 4}
NO_SHARED = {"moe": {"num_experts": 4, "top_k": 3, "num_shared_experts": 0, "ffn_dim": 32}}
DEEP = {"num_blocks": 8}

ON_TWO: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b", "n": 4},
    "1f1b plain": {"schedule": "1f1b", "n": 1},
    "1f1b L_r 1 shuffled": {"schedule": "1f1b", "n": 2, "recompute": 1, "shuffle": 1},
    "1f1b HC, GQA": {"schedule": "1f1b", "kind": "hc", "n": 2, "recompute": 2, "model": GQA},
    "interleaved L_r 2": {"schedule": "interleaved-1f1b", "recompute": 2, "model": QUERIES},
    "zb1p L_r stage": {"schedule": "zb1p", "n": 2, "recompute": "stage", "model": NO_SHARED},
    "zb1p dense": {"schedule": "zb1p", "n": 2, "recompute": 3, "model": DENSE},
    "zbv all shuffled": {
        "schedule": "zbv", "recompute": 1, "priority": "all", "shuffle": 2, "microbatches": 5,
    },
    "dualpipe plain": {"schedule": "dualpipe", "n": 1, "priority": "none"},
    "dualpipe grouped": {
        "schedule": "dualpipe", "recompute": 2, "p2p": "grouped", "priority": "recompute",
        "microbatches": 8,
    },
    "dualpipe shuffled": {
        "schedule": "dualpipe", "recompute": "stage", "priority": "all", "shuffle": 3,
    },
    "dualpipev grouped one": {
        "schedule": "dualpipev", "recompute": "stage", "p2p": "grouped", "comm_streams": "one",
        "n": 2,
    },
    "dualpipev plain shuffled": {"schedule": "dualpipev", "n": 1, "shuffle": 4},
    "experts over two": {"schedule": "1f1b", "pp": 1, "ep": 2, "recompute": 2, "shuffle": 5},
    "experts over two, dualpipev": {"schedule": "dualpipev", "pp": 1, "ep": 2, "n": 2},
    "weights over two": {"schedule": "1f1b", "pp": 1, "dp": 2, "n": 2, "routing": FORCED},
}  # fmt: skip

ON_FOUR: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b", "pp": 4, "n": 2, "recompute": 2, "microbatches": 6},
    "interleaved": {"schedule": "interleaved-1f1b", "pp": 4, "model": DEEP, "n": 1},
    "zb1p": {"schedule": "zb1p", "pp": 4, "n": 4, "recompute": 1, "shuffle": 6},
    "zbv": {"schedule": "zbv", "pp": 4, "model": DEEP, "n": 2, "microbatches": 8},
    "dualpipe": {"schedule": "dualpipe", "pp": 4, "recompute": "stage", "microbatches": 8},
    "dualpipe grouped": {
        "schedule": "dualpipe", "pp": 4, "n": 2, "p2p": "grouped", "microbatches": 8,
        "priority": "all", "recompute": 2,
    },
    "dualpipev grouped": {
        "schedule": "dualpipev", "pp": 4, "model": DEEP, "n": 2, "p2p": "grouped",
        "microbatches": 8,
    },
    "dualpipe, experts over two": {
        "schedule": "dualpipe", "ep": 2, "recompute": 2, "p2p": "grouped", "comm_streams": "one",
    },
    "dualpipe, experts over two, shuffled": {
        "schedule": "dualpipe", "ep": 2, "n": 2, "priority": "all", "shuffle": 7,
    },
    "dualpipev, experts over two": {
        "schedule": "dualpipev", "ep": 2, "recompute": "stage", "priority": "recompute",
    },
    "zbv, weights over two": {"schedule": "zbv", "dp": 2, "n": 4, "recompute": 2},
    "experts over two, weights over two": {"schedule": "1f1b", "pp": 1, "ep": 2, "dp": 2, "n": 2},
}  # fmt: skip


def computed(
    wanted: dict[str, dict[str, Any]], processes: int, tmp: pytest.TempPathFactory
) -> Computed:
    """Runs all cases in one set of processes, once for all workers of pytest."""
    torch.set_num_threads(1)
    cases = {name: make_case(name, **options) for name, options in wanted.items()}
    base = tmp.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"on{processes}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cases, run(list(cases.values()), processes, folder)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Computed:
    return computed(ON_TWO, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> Computed:
    return computed(ON_FOUR, 4, tmp_path_factory)


@pytest.mark.parametrize("name", ON_TWO)
def test_two_processes_compute_what_one_does(on_two: Computed, name: str) -> None:
    cases, results = on_two
    check(cases[name], results)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_processes_compute_what_one_does(on_four: Computed, name: str) -> None:
    cases, results = on_four
    check(cases[name], results)


def test_a_missing_wait_shows(tmp_path: Path) -> None:
    """What the shuffled runs would miss if they passed whatever the Program waits for."""
    case = make_case("waitless", schedule="1f1b", pp=1, priority="all", shuffle=1)
    keep = np.ones(case.program.num_ops, np.bool_)
    high = [i for i, stream in enumerate(case.program.streams) if stream.name == "high"]
    keep[np.isin(case.program.stream, high)] = False
    waits = [w if k else [] for w, k in zip(lists(case.program.waits), keep, strict=True)]
    case.program = replace(case.program, waits=Csr.from_lists(waits))
    with pytest.raises((ProcessFailed, AssertionError), match=r"KeyError|is off by nan"):
        check(case, run([case], 1, tmp_path))


def lists(csr: Csr) -> list[list[int]]:
    return [csr[i].tolist() for i in range(len(csr.offsets) - 1)]
