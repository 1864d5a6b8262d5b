"""The Triton kernels of layers, in the interpreter, against the plain torch versions."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from mhcplan.kernels import layers_eager as eager
from mhcplan.kernels.layers_attention import rope_tables
from mhcplan.kernels.triton_support import INTERPRETED

if torch.cuda.is_available() or INTERPRETED:
    from mhcplan.kernels import layers_triton as kernels

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs TRITON_INTERPRET=1 or a GPU"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def same(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_names_are_those_of_the_plain_versions() -> None:
    functions = {n for n, f in inspect.getmembers(eager, inspect.isfunction) if n[0].islower()}
    assert set(kernels.__all__) == {
        n for n in functions if getattr(eager, n).__module__ == eager.__name__
    }


@pytest.mark.parametrize("width", [48, 100])
def test_rms_norm_with_strided_rows(width: int) -> None:
    wide = rand(7, width + 20)
    x, weight, dy = wide[:, :width], rand(width, seed=1), rand(7, width, seed=2)
    y, rstd = kernels.rms_norm(x, weight, 1e-6)
    same((y, rstd), eager.rms_norm(x, weight, 1e-6))
    assert torch.equal(kernels.rms_norm_again(x, weight, rstd), y)
    results = []
    for module in (kernels, eager):
        grad, dx = torch.full((width,), 0.5, device=DEVICE), torch.full_like(wide, 9.0)
        module.rms_norm_grad(dy, x, weight, rstd, grad, dx[:, :width])
        results.append((grad, dx))
    same(results[0], results[1])
    assert torch.equal(results[0][1][:, width:], torch.full((7, 20), 9.0, device=DEVICE))


def test_rms_norm_gradient_of_more_rows_than_programs() -> None:
    x, weight, dy = rand(300, 16), rand(16, seed=1), rand(300, 16, seed=2)
    _, rstd = eager.rms_norm(x, weight, 1e-6)
    results = []
    for module in (kernels, eager):
        grad, dx = torch.zeros(16, device=DEVICE), torch.empty_like(x)
        module.rms_norm_grad(dy, x, weight, rstd, grad, dx)
        results.append((grad, dx))
    same(results[0], results[1])


@pytest.mark.parametrize("width", [40, 1100])
def test_rows_of_a_state(width: int) -> None:
    x = rand(3, 4, width)
    same(kernels.sum_rows(x), eager.sum_rows(x))
    assert torch.equal(kernels.expand_rows(x[:, 0].contiguous(), 4), x[:, :1].expand(-1, 4, -1))


@pytest.mark.parametrize("width", [24, 1500])
def test_swiglu(width: int) -> None:
    gate_up, da = rand(3, 2 * width), rand(3, width, seed=1)
    same(kernels.swiglu(gate_up), eager.swiglu(gate_up))
    same(kernels.swiglu_grad(gate_up, da), eager.swiglu_grad(gate_up, da))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("heads", [3, 33])
def test_rope(sign: float, heads: int) -> None:
    cos, sin = rope_tables(4, 8, DEVICE)
    x = rand(8, heads * 12 + 5)  # five columns that are no head's
    y = x.clone()
    kernels.rope_(x, heads, 12, 4, cos, sin, sign)
    eager.rope_(y, heads, 12, 4, cos, sin, sign)
    same(x, y)


@pytest.mark.parametrize("heads", [3, 17])
def test_mla_key(heads: int) -> None:
    cos, sin = rope_tables(4, 8, DEVICE)
    nope, latent = rand(8, heads * 6), rand(8, 10 + 8, seed=1)
    key = kernels.mla_key(nope, latent[:, 10:], heads, cos, sin)
    same(key, eager.mla_key(nope, latent[:, 10:], heads, cos, sin))
    ours, theirs = torch.zeros_like(latent), torch.zeros_like(latent)
    same(
        kernels.mla_key_grad(key, ours[:, 10:], cos, sin),
        eager.mla_key_grad(key, theirs[:, 10:], cos, sin),
    )
    same(ours, theirs)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("experts", [6, 130])
def test_routing(scoring: str, renormalise: bool, forced: bool, experts: int) -> None:
    logits = rand(70, experts)
    ours = kernels.route(logits, 2, scoring, renormalise, forced)
    theirs = eager.route(logits, 2, scoring, renormalise, forced)
    same(ours, theirs)
    grads = [
        module.route_grad(rand(70, 2, seed=1), logits, ours[1], scoring, renormalise, torch.float32)
        for module in (kernels, eager)
    ]
    same(grads[0], grads[1])


def test_permutations() -> None:
    slot = eager.route(rand(20, 6), 3, "sigmoid", True, False)[2]
    x, rows, weights = rand(20, 40), rand(60, 40, seed=1), rand(20, 3, seed=2)
    same(kernels.permute(x, slot), eager.permute(x, slot))
    for other in (None, x):
        same(kernels.permute_grad(rows, slot, other), eager.permute_grad(rows, slot, other))
        same(
            kernels.unpermute(rows, weights, slot, other),
            eager.unpermute(rows, weights, slot, other),
        )
    same(
        kernels.unpermute_grad(x, rows, weights, slot),
        eager.unpermute_grad(x, rows, weights, slot),
    )
    index = torch.randperm(60, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    same(kernels.gather_rows(rows, index), eager.gather_rows(rows, index))
    same(kernels.scatter_rows(rows, index), eager.scatter_rows(rows, index))


@pytest.mark.parametrize("ends", [[5, 5, 21], [0, 17, 21]])
def test_grouped_weight_gradient(ends: list[int]) -> None:
    dy, x = rand(21, 24), rand(21, 40, seed=1)
    bounds = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    ours, theirs = (torch.full((3, 24, 40), 0.5, device=DEVICE) for _ in range(2))
    kernels.add_grouped_weight_gradient(ours, dy, x, bounds)
    eager.add_grouped_weight_gradient(theirs, dy, x, bounds)
    tolerance = 2e-5 if DEVICE.type == "cpu" else 2e-2  # tf32 on a GPU
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_embedding_gradient_with_repeated_tokens() -> None:
    ids = torch.tensor([1, 3, 1, 0], device=DEVICE)
    ours, theirs = torch.ones(5, 40, device=DEVICE), torch.ones(5, 40, device=DEVICE)
    kernels.add_embedding_gradient(ours, rand(4, 40), ids)
    eager.add_embedding_gradient(theirs, rand(4, 40), ids)
    same(ours, theirs)


@pytest.mark.parametrize("vocab", [50, 8192 + 100])
def test_cross_entropy(vocab: int) -> None:
    logits = rand(3, vocab) * 5
    logits[1] = -300.0  # equal and far from zero
    other = logits.clone()
    targets = torch.tensor([1, vocab - 1, 7], device=DEVICE)
    same(kernels.cross_entropy_(logits, targets, 0.25), eager.cross_entropy_(other, targets, 0.25))
    same(logits, other)


def test_adamw() -> None:
    ours = [rand(1100, seed=s) for s in range(3)] + [
        rand(1100, seed=3),
        rand(1100, seed=4).square(),
    ]
    theirs = [t.clone() for t in ours]
    for module, state in ((kernels, ours), (eager, theirs)):
        module.adamw_(*state, 1e-2, 0.9, 0.95, 1e-8, 0.1, 3)
    same(ours, theirs)
