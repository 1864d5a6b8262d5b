"""Kernels of GPU tests, compiled beforehand in parallel processes: one by one they take minutes.

A test module says in ``COMPILE_AHEAD`` what has to run once, as calls of functions of this module.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    Job = tuple[Callable[..., None], tuple[object, ...]]


def compile_ahead(jobs: Iterable[Job]) -> None:
    """Run jobs, whose kernels are then in Triton's cache on disk.

    What fails here fails again in its own test, which says why.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for started in [pool.submit(call, *arguments) for call, arguments in jobs]:
            started.exception()


def run_site(cases: str, n: int, channels: int, dtype: torch.dtype) -> None:
    """Every part of a site of ``tests.kernels.CASES``; few tokens take the same kernels as many."""
    import torch

    importlib.import_module(f"tests.kernels.{cases}").Case(64, n, channels, dtype).run()
    torch.cuda.synchronize()


def run_op(kind: str, shape: Mapping[str, int], options: Mapping[str, object]) -> None:
    """F of an op, then I and W."""
    import torch

    from mhcplan.kernels.layers import Env, make_case

    case = make_case(kind, shape, Env(torch.device("cuda")), **options)
    outputs, saved = case.op.forward(*case.inputs)
    grads = case.op.example_grads(case.inputs, outputs, case.env)
    _, deferred = case.op.backward_input(saved, *grads)
    if deferred:
        case.op.backward_weight(deferred)
    torch.cuda.synchronize()
