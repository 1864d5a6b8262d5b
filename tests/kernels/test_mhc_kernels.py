"""The Triton kernels (interpreted on a CPU) against the float64 reference."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from mhcplan.kernels import mhc, reference
from mhcplan.kernels.reference import num_coefficients
from mhcplan.kernels.triton_support import INTERPRETED

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs TRITON_INTERPRET=1 or a GPU"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# exp that overflows to inf, or NaN in a product, is what such a test is about; numpy, which does
# the interpreter's arithmetic, would warn.
NUMPY_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# The interpreter truncates to bf16 where the hardware rounds: twice the error, all of one sign,
# in every factor of a product.
BF16_ERROR = (2.6e-3, 5e-5) if DEVICE.type == "cuda" else (8e-3, 2e-4)
TOLERANCE = {torch.bfloat16: BF16_ERROR, torch.float32: (2e-6, 5e-6)}  # residuals, the rest


class Case:
    """Random inputs of one site, its outputs by the kernels and by the reference in float64."""

    def __init__(
        self, tokens: int, n: int, channels: int, dtype: torch.dtype, steps: int = 20, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def placed(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            return tensor.to(DEVICE, dtype)

        m = num_coefficients(n)
        self.x, self.dy = (placed(rand(tokens, n, channels), dtype) for _ in range(2))
        self.f, self.du = (placed(rand(tokens, channels), dtype) for _ in range(2))
        self.phi = placed(rand(m, n * channels) / (n * channels) ** 0.5)
        self.bias = placed(rand(m) * 0.5)
        self.alpha = placed(torch.tensor([0.7, 0.9, 1.1]))
        self.n, self.steps = n, steps

    def run(self) -> dict[str, Tensor]:
        numbers = {"steps": self.steps}
        parameters = (self.phi, self.bias, self.alpha)
        u, mix, projection = mhc.mhc_pre_forward(self.x, *parameters, **numbers)
        y = mhc.mhc_post_forward(self.x, self.f, mix)
        df, dmix = mhc.mhc_post_backward(self.dy, self.x, self.f, mix)
        given = (self.dy, self.x, self.du, mix, projection, dmix, *parameters)
        dx, dphi, db, dalpha = mhc.mhc_pre_backward(*given, **numbers)
        dx_i, dp, db_i, dalpha_i = mhc.mhc_pre_backward_input(*given, **numbers)
        return {
            "u": u, "mix": mix, "y": y, "df": df, "dx": dx, "dphi": dphi, "db": db,
            "dalpha": dalpha, "dx of I": dx_i, "db of I": db_i, "dalpha of I": dalpha_i,
            "dphi of W": mhc.mhc_pre_backward_weight(self.x, dp),
        }  # fmt: skip

    def expected(self) -> dict[str, Tensor]:
        leaves = [
            t.double().requires_grad_() for t in (self.x, self.f, self.phi, self.bias, self.alpha)
        ]
        x, f, phi, bias, alpha = leaves
        u, mix = reference.mhc_pre(x, phi, bias, alpha, self.steps)
        y = reference.post_res(x, f, mix)
        dx, df, dphi, db, dalpha = torch.autograd.grad(
            (u, y), leaves, (self.du.double(), self.dy.double())
        )
        return {
            "u": u, "mix": mix, "y": y, "df": df, "dx": dx, "dphi": dphi, "db": db,
            "dalpha": dalpha, "dx of I": dx, "db of I": db, "dalpha of I": dalpha,
            "dphi of W": dphi,
        }  # fmt: skip

    def check(self) -> None:
        got = self.run()
        residual_error, other_error = TOLERANCE[self.x.dtype]
        for name, want in self.expected().items():
            allowed = residual_error if got[name].dtype == self.x.dtype else other_error
            error = ((got[name].double() - want).norm() / want.norm()).item()
            assert error < allowed, f"{name}: {error:.2e}"


@given(
    tokens=st.integers(1, 20),
    n=st.sampled_from([2, 4]),
    width=st.integers(1, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    steps=st.sampled_from([1, 2, 5, 20]),
    seed=st.integers(0, 999),
)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_site_on_random_shapes(
    tokens: int, n: int, width: int, dtype: torch.dtype, steps: int, seed: int
) -> None:
    Case(tokens, n, 64 * width, dtype, steps, seed).check()


@pytest.mark.parametrize(
    ("tokens", "n", "channels", "dtype"),
    [
        (70, 4, 192, torch.bfloat16),  # tiles of several tokens, slices shared by programs
        (70, 2, 320, torch.float32),
        (9, 8, 64, torch.bfloat16),
        (70, 8, 128, torch.bfloat16),
        (9, 8, 64, torch.float32),
        (2, 16, 64, torch.bfloat16),
    ],
)
def test_a_site(tokens: int, n: int, channels: int, dtype: torch.dtype) -> None:
    Case(tokens, n, channels, dtype).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_site_form_equals_the_two_halves(dtype: torch.dtype) -> None:
    case = Case(37, 4, 128, dtype)
    parameters = (case.phi, case.bias, case.alpha)
    _, mix, _ = mhc.mhc_pre_forward(case.x, *parameters)
    y = mhc.mhc_post_forward(case.x, case.f, mix)
    expected = (y, *mhc.mhc_pre_forward(y, *parameters))
    got = mhc.mhc_post_pre_forward(case.x, case.f, mix, *parameters)
    assert torch.equal(got[0], y)  # bit by bit; the projection sums in another order
    for out, want in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(out, want, rtol=1e-5 if out.dtype != dtype else 1e-2, atol=1e-5)


@pytest.mark.parametrize(("n", "sites"), [(2, 3), (4, 5), (4, 18), (8, 2)])
def test_recompute_equals_the_forward_bit_by_bit(n: int, sites: int) -> None:
    case = Case(3, n, 64, torch.bfloat16)
    x, us, xs, fs, mixes = case.x, [], [], [], []
    for site in range(sites):
        bias = case.bias + 0.1 * site
        u, mix, _ = mhc.mhc_pre_forward(x, case.phi, bias, case.alpha)
        f = (case.f.float() * (1 + site)).to(case.f.dtype)
        x = mhc.mhc_post_forward(x, f, mix)
        us.append(u), xs.append(x), fs.append(f), mixes.append(mix)
    got_us, got_xs = mhc.mhc_recompute(case.x, fs, mixes)
    assert all(torch.equal(a, b) for a, b in zip(got_us, us, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got_xs, xs, strict=True))
    got_us, got_xs = mhc.mhc_recompute(case.x, fs[:-1], mixes)
    assert torch.equal(got_us[-1], us[-1])
    assert len(got_xs) == sites - 1


def test_results_repeat_bit_by_bit() -> None:
    case = Case(20, 4, 128, torch.bfloat16)
    first, second = case.run(), case.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_coefficients_are_doubly_stochastic(n: int) -> None:
    case = Case(32, n, 64, torch.bfloat16)
    _, mix, _ = mhc.mhc_pre_forward(case.x, case.phi, case.bias, 0.5 * case.alpha)
    res = reference.Coefficients.split(mix, n).res
    ones = torch.ones(32, n, device=DEVICE)
    torch.testing.assert_close(res.sum(-1), ones, rtol=0, atol=2e-6)
    torch.testing.assert_close(res.sum(-2), ones, rtol=0, atol=1e-5)


@NUMPY_WARNS
def test_extreme_logits_stay_finite_with_rows_that_sum_to_one() -> None:
    case = Case(16, 4, 64, torch.float32)
    case.alpha *= 1000.0
    outputs = case.run()
    res = reference.Coefficients.split(outputs["mix"], 4).res
    torch.testing.assert_close(res.sum(-1), torch.ones(16, 4, device=DEVICE), rtol=0, atol=1e-5)
    assert all(torch.isfinite(value).all() for value in outputs.values())


@NUMPY_WARNS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_propagate_to_their_token_and_no_other(bad: float) -> None:
    case = Case(6, 4, 64, torch.float32)
    case.x[2, 1, 5] = bad
    outputs = case.run()
    for name in ("u", "y", "dx", "df", "mix"):
        spoilt = outputs[name].flatten(1).isfinite().logical_not().any(1)
        assert spoilt.tolist() == [token == 2 for token in range(6)], name
    assert outputs["dphi"].isnan().any()


def test_no_tokens() -> None:
    outputs = Case(0, 4, 64, torch.float32).run()
    assert outputs["y"].shape == (0, 4, 64)
    for name in ("dphi", "db", "dalpha", "dphi of W"):
        assert (outputs[name] == 0).all(), name


def test_gradient_of_coefficients_used_elsewhere_is_added() -> None:
    case = Case(5, 4, 64, torch.float32)
    parameters = (case.phi, case.bias, case.alpha)
    u, mix, projection = mhc.mhc_pre_forward(case.x, *parameters)
    weight = torch.randn_like(mix)
    zero = torch.zeros_like(case.x)
    _, _, db, _ = mhc.mhc_pre_backward(
        zero, case.x, torch.zeros_like(u), mix, projection, weight, *parameters
    )
    x, phi, bias, alpha = (t.double().requires_grad_() for t in (case.x, *parameters))
    _, wide = reference.mhc_pre(x, phi, bias, alpha)
    (want,) = torch.autograd.grad((wide * weight).sum(), bias)
    torch.testing.assert_close(db.double(), want, rtol=1e-4, atol=1e-5)


def test_saved_bytes_are_what_is_saved() -> None:
    case = Case(3, 4, 64, torch.float32)
    _, mix, projection = mhc.mhc_pre_forward(case.x, case.phi, case.bias, case.alpha)
    assert mhc.saved_coefficient_bytes(4) * 3 == mix.nbytes + projection.nbytes


BAD = [
    ("x", lambda t: t.flatten(1), ValueError),
    ("x", lambda t: t.double(), TypeError),
    ("x", lambda t: t[:, :3].contiguous(), ValueError),
    ("x", lambda t: t[..., :40].contiguous(), ValueError),
    ("x", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError),
    ("phi", lambda t: t[:-1], ValueError),
    ("phi", lambda t: t.bfloat16(), TypeError),
    ("phi", lambda t: t.to("meta"), ValueError),
    ("bias", lambda t: t[:-1], ValueError),
    ("alpha", lambda t: t.double(), TypeError),
    ("f", lambda t: t[:-1], ValueError),
    ("f", lambda t: t.float(), TypeError),
    ("dy", lambda t: t[..., :64].contiguous(), ValueError),
    ("du", lambda t: None, TypeError),
]


@pytest.mark.parametrize(("name", "spoil", "error"), BAD)
def test_wrong_arguments_are_named(name: str, spoil: object, error: type[Exception]) -> None:
    case = Case(4, 4, 128, torch.bfloat16)
    setattr(case, name, spoil(getattr(case, name)))
    with pytest.raises(error, match=rf"\b{name}\b"):
        case.run()


def test_wrong_recompute_arguments_are_named() -> None:
    case = Case(4, 4, 64, torch.bfloat16)
    _, mix, _ = mhc.mhc_pre_forward(case.x, case.phi, case.bias, case.alpha)
    with pytest.raises(ValueError, match="coefficients is empty"):
        mhc.mhc_recompute(case.x, [], [])
    with pytest.raises(ValueError, match="fs has 3"):
        mhc.mhc_recompute(case.x, [case.f] * 3, [mix] * 2)
    with pytest.raises(TypeError, match=r"coefficients\[1\]"):
        mhc.mhc_recompute(case.x, [case.f], [mix, mix.double()])
    with pytest.raises(ValueError, match="steps"):
        mhc.mhc_pre_forward(case.x, case.phi, case.bias, case.alpha, steps=0)
