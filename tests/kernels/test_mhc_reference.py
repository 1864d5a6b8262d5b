"""The eager reference against the paper's equations, and its gradients in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from mhcplan.kernels import mhc_eager, reference
from mhcplan.kernels.reference import Coefficients


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def literal_sinkhorn(logits: Tensor, steps: int) -> Tensor:
    """Equation 9 word for word: exp, then columns, then rows, ``steps`` times."""
    m = logits.exp()
    for _ in range(steps):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_sinkhorn_is_equation_9(n: int, steps: int) -> None:
    logits = rand(5, n, n, seed=n, scale=3.0)
    torch.testing.assert_close(
        reference.sinkhorn(logits, steps), literal_sinkhorn(logits, steps), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_doubly_stochastic_after_twenty_steps(n: int) -> None:
    m = reference.sinkhorn(rand(64, n, n, seed=n, scale=0.5))
    torch.testing.assert_close(m.sum(-1), torch.ones(64, n, dtype=m.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(m.sum(-2), torch.ones(64, n, dtype=m.dtype), rtol=0, atol=1e-5)
    assert (m >= 0).all()


def test_rows_come_last() -> None:
    m = reference.sinkhorn(rand(64, 4, 4, scale=6.0), steps=1)
    torch.testing.assert_close(m.sum(-1), torch.ones(64, 4, dtype=m.dtype))
    assert (m.sum(-2) - 1).abs().max() > 0.1  # one step leaves all error in the columns


@given(st.integers(0, 2**31 - 1), st.sampled_from([2, 4, 8]), st.floats(1.0, 1e4))
@settings(max_examples=60, deadline=None)
def test_extreme_logits_stay_finite_with_rows_that_sum_to_one(
    seed: int, n: int, scale: float
) -> None:
    logits = (rand(8, n, n, seed=seed) * scale).requires_grad_()
    m = reference.sinkhorn(logits)
    torch.testing.assert_close(m.sum(-1), torch.ones(8, n, dtype=m.dtype), rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad((m * rand(8, n, n, seed=1)).sum(), logits)
    assert torch.isfinite(m).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_give_nan(bad: float) -> None:
    logits = rand(2, 4, 4)
    logits[0, 1, 2] = bad
    m = reference.sinkhorn(logits)
    assert m[0].isnan().any()
    assert torch.isfinite(m[1]).all()


def test_site_is_equations_3_7_and_8() -> None:
    x, f, phi, bias = rand(4, 8), rand(8, seed=1), rand(24, 32, seed=2), rand(24, seed=3)
    alpha = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    u, packed = reference.mhc_pre(x, phi, bias, alpha, norm_eps=0.0)
    normed = x.flatten() / x.flatten().square().mean().sqrt()
    logits = normed @ phi.T
    pre = torch.sigmoid(alpha[0] * logits[:4] + bias[:4])
    post = 2 * torch.sigmoid(alpha[1] * logits[4:8] + bias[4:8])
    res = literal_sinkhorn((alpha[2] * logits[8:] + bias[8:]).view(4, 4), 20)
    torch.testing.assert_close(packed, Coefficients(pre, post, res).pack())
    torch.testing.assert_close(u, pre @ x)
    torch.testing.assert_close(reference.post_res(x, f, packed), res @ x + post[:, None] * f)


def test_hc_is_equation_5() -> None:
    x, theta, bias = rand(4, 8), rand(6, 8, seed=1), rand(24, seed=2)
    alpha = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    u, packed = reference.hc_pre(x, theta, bias, alpha, norm_eps=0.0)
    rows = x / x.square().mean(-1, keepdim=True).sqrt()
    pre = alpha[0] * torch.tanh(theta[0] @ rows.T) + bias[:4]
    post = alpha[1] * torch.tanh(theta[1] @ rows.T) + bias[4:8]
    res = alpha[2] * torch.tanh(theta[2:] @ rows.T) + bias[8:].view(4, 4)
    torch.testing.assert_close(packed, Coefficients(pre, post, res).pack())
    torch.testing.assert_close(u, pre @ x)


def test_gradcheck_of_every_scheme() -> None:
    n, c = 2, 3
    x, f = rand(2, n, c).requires_grad_(), rand(2, c, seed=1).requires_grad_()
    phi, bias = rand(8, n * c, seed=2).requires_grad_(), rand(8, seed=3).requires_grad_()
    theta = rand(n + 2, c, seed=4).requires_grad_()
    alpha = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64, requires_grad=True)

    def mhc(x: Tensor, f: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        u, mix = reference.mhc_pre(x, phi, bias, alpha, steps=3)
        return u, reference.post_res(x, f, mix)

    def hc(x: Tensor, f: Tensor, theta: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        u, mix = reference.hc_pre(x, theta, bias, alpha)
        return u, reference.post_res(x, f, mix)

    def identity(
        x: Tensor, f: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor
    ) -> tuple[Tensor, ...]:
        u, mix = reference.mhc_pre(x, phi, bias, alpha, steps=3)
        return u, reference.post_res(x, f, reference.identity_res(mix, n))

    def ends(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
        return reference.collapse(x, phi[:n], bias[:n], alpha[:1])

    assert torch.autograd.gradcheck(mhc, (x, f, phi, bias, alpha))
    assert torch.autograd.gradcheck(hc, (x, f, theta, bias, alpha))
    assert torch.autograd.gradcheck(identity, (x, f, phi, bias, alpha))
    assert torch.autograd.gradcheck(ends, (x, phi, bias, alpha))


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_explicit_sinkhorn_backward_is_autograds(steps: int) -> None:
    logits, gradient = rand(3, 4, 4).requires_grad_(), rand(3, 4, 4, seed=1)
    (expected,) = torch.autograd.grad(reference.sinkhorn(logits, steps), logits, gradient)
    got = mhc_eager._sinkhorn_backward(logits.detach(), gradient, steps)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_identity_hc_keeps_rows_apart() -> None:
    x, f, mix = rand(3, 4, 8), rand(3, 8, seed=1), rand(3, 24, seed=2)
    y = reference.post_res(x, torch.zeros_like(f), reference.identity_res(mix, 4))
    torch.testing.assert_close(y, x)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_below_one_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        reference.sinkhorn(rand(4, 4), steps)
