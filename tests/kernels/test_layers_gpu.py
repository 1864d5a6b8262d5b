"""Every op in bf16 on a GPU at the 9B model's shapes, against float64 of the same weights."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from mhcplan.kernels.layers import Env, make_case
from tests.support.compile_ahead import run_op

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 2048
HERE = {"tokens": TOKENS, "hidden": 1920}
SHAPES: dict[str, dict[str, int]] = {
    "residual": HERE,
    "norm": HERE,
    "attention_mla": {
        **HERE, "seq": 1024, "heads": 24, "nope": 128, "rope": 64, "v": 128, "kv_rank": 512,
        "q_rank": 0,
    },
    "attention_gqa": {**HERE, "seq": 1024, "heads": 16, "kv_heads": 4, "head_dim": 128},
    "dense_ffn": {**HERE, "ffn": 10240},
    "shared_experts": {**HERE, "ffn": 2560},
    "router": {**HERE, "experts": 64, "top_k": 6},
    "regroup": {"rows": 6 * TOKENS, "hidden": 1920},
    "experts": {"rows": 6 * TOKENS, "hidden": 1920, "ffn": 1280, "experts": 8},
    "unpermute": {**HERE, "top_k": 6},
    "embedding": {**HERE, "vocab": 129280},
    "head": {"tokens": 512, "hidden": 1920, "vocab": 129280},
}  # fmt: skip
CASES = [(kind, None) for kind in SHAPES if not kind.startswith("attention")]
CASES += [(f"attention_{k}", b) for k in ("mla", "gqa") for b in ("cudnn", "flash")]
COMPILE_AHEAD = [
    (run_op, (kind, SHAPES[kind], {} if backend is None else {"backend": backend}))
    for kind, backend in CASES
]
# bf16 operands and intermediate results, sums in fp32
TOLERANCE = 1.5e-2


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; infinite where something is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_op_agrees_with_float64(kind: str, backend: str | None) -> None:
    device = torch.device("cuda")
    options = {} if backend is None else {"backend": backend}
    case = make_case(kind, SHAPES[kind], Env(device), **options)
    exact = {} if backend is None else {"backend": "math"}
    other = make_case(kind, SHAPES[kind], Env(device, torch.float64), **exact)
    for weight, wide in zip(case.op.weights.values(), other.op.weights.values(), strict=True):
        wide.data.copy_(weight.data)
        weight.main_grad.fill_(0.25)
        wide.main_grad.fill_(0.25)
    other.inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs)
    outputs, saved = case.op.forward(*case.inputs)
    expected, wide_saved = other.op.forward(*other.inputs)
    found = {}
    for i, (y, want) in enumerate(zip(outputs, expected, strict=True)):
        found[f"output {i}"] = error(y.double(), want.double())
    grads = case.op.example_grads(case.inputs, outputs, case.env)
    dx, deferred = case.op.backward_input(saved, *grads)
    wide_dx, wide_deferred = other.op.backward_input(wide_saved, *(g.double() for g in grads))
    for i, (g, want) in enumerate(zip(dx, wide_dx, strict=True)):
        if g is not None:
            found[f"gradient {i}"] = error(g, want)
    if deferred:
        case.op.backward_weight(deferred)
        other.op.backward_weight(wide_deferred)
    for name, weight in case.op.weights.items():
        got, want = weight.main_grad.double() - 0.25, other.op.weights[name].main_grad - 0.25
        found[name] = error(got, want)
    print(kind, backend, {k: f"{v:.1e}" for k, v in found.items()})
    assert max(found.values()) < TOLERANCE, found


def test_no_op_waits_for_the_gpu(no_waits: Callable[[], AbstractContextManager[None]]) -> None:
    device = torch.device("cuda")
    for kind in ("router", "experts", "unpermute", "norm", "head", "embedding", "dense_ffn"):
        case = make_case(kind, SHAPES[kind], Env(device))
        calls = [case.prepare(p) for p in "FIW" if not (kind == "embedding" and p == "I")
                 and not (p == "W" and kind in ("norm", "unpermute"))]  # fmt: skip
        for call in calls:
            call()
        torch.cuda.synchronize()
        with no_waits():
            for call in calls:
                call()
