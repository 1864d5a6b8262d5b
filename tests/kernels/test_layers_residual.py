"""The residual's ops, composed as a site, against autograd of the eager reference in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhcplan.kernels import reference
from mhcplan.kernels.layers import OPS, Case, Env, make_case
from mhcplan.profiles.capture.grid import TINY

ENV = Env(torch.device("cpu"), torch.float32, seed=5)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def leaves_of(case: Case) -> tuple[Tensor, list[Tensor]]:
    x = case.inputs[0].detach().requires_grad_()
    return x, [w.data.detach().requires_grad_() for w in case.op.weights.values()]


@pytest.mark.parametrize("residual", ["mhc", "hc"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_site_agrees_with_autograd(residual: str, fused: bool) -> None:
    pre = make_case(f"{residual}_pre", TINY[f"{residual}_pre"], ENV)
    post = OPS[f"{residual}_post"]()
    for weight in pre.op.weights.values():
        weight.main_grad.fill_(0.5)
    (u, mix), saved_pre = pre.op.forward(*pre.inputs)
    (y,), saved_post = post.forward(pre.inputs[0], u * 3, mix)  # the sublayer multiplies by 3
    dy = ENV.normal(*y.shape, salt=9)
    _, df, dmix = post.backward_input(saved_post, dy)[0]
    grads = (dy, df * 3, dmix)
    if fused:
        (dx,) = pre.op.backward(saved_pre, *grads)
    else:
        (dx,), deferred = pre.op.backward_input(saved_pre, *grads)
        pre.op.backward_weight(deferred)

    x, parameters = leaves_of(pre)
    steps = {"steps": TINY["mhc_pre"]["steps"]} if residual == "mhc" else {}
    want_u, want_mix = getattr(reference, f"{residual}_pre")(x, *parameters, **steps)
    want_y = reference.post_res(x, want_u * 3, want_mix)
    close(y, want_y)
    found = torch.autograd.grad(want_y, [x, *parameters], dy)
    close(dx, found[0])
    for weight, want in zip(pre.op.weights.values(), found[1:], strict=True):
        close(weight.main_grad, want + 0.5)


def test_collapse_agrees_with_autograd() -> None:
    case = make_case("mhc_collapse", TINY["mhc_collapse"], ENV)
    for weight in case.op.weights.values():
        weight.main_grad.fill_(0.5)
    (h,), saved = case.op.forward(*case.inputs)
    dh = ENV.normal(*h.shape, salt=9)
    (dx,) = case.op.backward(saved, dh)
    x, parameters = leaves_of(case)
    want = reference.collapse(x, *parameters)
    close(h, want)
    found = torch.autograd.grad(want, [x, *parameters], dh)
    close(dx, found[0])
    for weight, grad in zip(case.op.weights.values(), found[1:], strict=True):
        close(weight.main_grad, grad + 0.5)


def test_expand_agrees_with_autograd() -> None:
    case = make_case("mhc_expand", TINY["mhc_expand"], ENV)
    (x,), saved = case.op.forward(*case.inputs)
    n = TINY["mhc_expand"]["n"]
    assert torch.equal(x, case.inputs[0][:, None].expand(-1, n, -1))
    close(case.op.backward_input(saved, x)[0][0], n * case.inputs[0])


def test_recompute_gives_what_the_sites_gave() -> None:
    """Also: what F of the sites made is bit for bit what R makes."""
    shape = TINY["mhc_recompute"]
    pre = make_case("mhc_pre", {**TINY["mhc_pre"], "n": shape["n"]}, ENV)
    x, us, xs, fs, mixes = pre.inputs[0], [], [], [], []
    state = x
    for site in range(shape["sites"]):
        (u, mix), _ = pre.op.forward(state)
        us.append(u)
        mixes.append(mix)
        if site < shape["sites"] - 1:
            fs.append(u * 0.5)
            ((state,), _) = OPS["mhc_post"]().forward(state, fs[-1], mix)
            xs.append(state)
    again = OPS["mhc_recompute"]().recompute((x, *fs, *mixes))
    assert all(torch.equal(a, b) for a, b in zip(again, [*us, *xs], strict=True))
