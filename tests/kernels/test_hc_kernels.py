"""HC's kernels (interpreted on a CPU) and its eager parts against the float64 reference."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from mhcplan.kernels import hc, mhc, reference
from mhcplan.kernels.triton_support import INTERPRETED
from mhcplan.profiles.specs import ResidualSpec
from mhcplan.profiles.vocabulary import coefficient_bytes
from tests.kernels import test_mhc_kernels as mhc_cases

pytestmark = mhc_cases.pytestmark
DEVICE = mhc_cases.DEVICE


class Case(mhc_cases.Case):
    """Random inputs of one HC site, its outputs by the kernels and by the reference in float64."""

    def __init__(
        self, tokens: int, n: int, channels: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        super().__init__(tokens, n, channels, dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        theta = torch.randn(n + 2, channels, generator=generator) / channels**0.5
        self.theta = theta.to(DEVICE)

    def run(self) -> dict[str, Tensor]:
        parameters = (self.theta, self.bias, self.alpha)
        u, mix, projection = hc.hc_pre_forward(self.x, *parameters)
        y = mhc.mhc_post_forward(self.x, self.f, mix)
        df, dmix = mhc.mhc_post_backward(self.dy, self.x, self.f, mix)
        given = (self.dy, self.x, self.du, mix, projection, dmix, *parameters)
        dx, dtheta, db, dalpha = hc.hc_pre_backward(*given)
        dx_i, dp, db_i, dalpha_i = hc.hc_pre_backward_input(*given)
        return {
            "u": u, "mix": mix, "y": y, "df": df, "dx": dx, "dtheta": dtheta, "db": db,
            "dalpha": dalpha, "dx of I": dx_i, "db of I": db_i, "dalpha of I": dalpha_i,
            "dtheta of W": hc.hc_pre_backward_weight(self.x, dp),
        }  # fmt: skip

    def expected(self) -> dict[str, Tensor]:
        leaves = [
            t.double().requires_grad_() for t in (self.x, self.f, self.theta, self.bias, self.alpha)
        ]
        x, f, theta, bias, alpha = leaves
        u, mix = reference.hc_pre(x, theta, bias, alpha)
        y = reference.post_res(x, f, mix)
        dx, df, dtheta, db, dalpha = torch.autograd.grad(
            (u, y), leaves, (self.du.double(), self.dy.double())
        )
        return {
            "u": u, "mix": mix, "y": y, "df": df, "dx": dx, "dtheta": dtheta, "db": db,
            "dalpha": dalpha, "dx of I": dx, "db of I": db, "dalpha of I": dalpha,
            "dtheta of W": dtheta,
        }  # fmt: skip


@given(
    tokens=st.integers(1, 12),
    n=st.sampled_from([2, 4]),
    width=st.integers(1, 2),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    eager=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_site_on_random_shapes(
    tokens: int, n: int, width: int, dtype: torch.dtype, eager: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if eager and DEVICE.type == "cpu":
            patch.setattr(mhc, "INTERPRETED", False)
        Case(tokens, n, 64 * width, dtype, seed).check()


@pytest.mark.parametrize(
    ("tokens", "n", "channels", "dtype"),
    [
        (70, 4, 192, torch.bfloat16),  # tiles of several tokens, slices shared by programs
        (40, 2, 128, torch.float32),
        (35, 8, 64, torch.bfloat16),
        (5, 8, 64, torch.float32),
        (2, 16, 64, torch.bfloat16),
    ],
)
def test_a_site(tokens: int, n: int, channels: int, dtype: torch.dtype) -> None:
    Case(tokens, n, channels, dtype).check()


def test_recompute_equals_the_forward_bit_by_bit() -> None:
    case = Case(3, 4, 64, torch.bfloat16)
    x, us, xs, fs, mixes = case.x, [], [], [], []
    for site in range(3):
        u, mix, _ = hc.hc_pre_forward(x, case.theta, case.bias + 0.1 * site, case.alpha)
        f = (case.f.float() * (1 + site)).to(case.f.dtype)
        x = mhc.mhc_post_forward(x, f, mix)
        us.append(u), xs.append(x), fs.append(f), mixes.append(mix)
    got_us, got_xs = mhc.mhc_recompute(case.x, fs[:-1], mixes)
    assert all(torch.equal(a, b) for a, b in zip(got_us, us, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got_xs, xs[:-1], strict=True))


def test_results_repeat_bit_by_bit() -> None:
    case = Case(20, 4, 128, torch.bfloat16)
    first, second = case.run(), case.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@mhc_cases.NUMPY_WARNS
def test_huge_projections_saturate_and_stay_finite() -> None:
    case = Case(6, 4, 64, torch.float32)
    case.theta *= 1e4
    outputs = case.run()
    gates = case.alpha.repeat_interleave(torch.tensor([4, 4, 16], device=DEVICE))
    torch.testing.assert_close((outputs["mix"] - case.bias).abs(), gates.expand(6, -1))
    assert all(torch.isfinite(value).all() for value in outputs.values())


@mhc_cases.NUMPY_WARNS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_propagate_to_their_token_and_no_other(bad: float) -> None:
    case = Case(6, 4, 64, torch.float32)
    case.x[2, 1, 5] = bad
    outputs = case.run()
    for name in ("u", "y", "dx", "df", "mix"):
        spoilt = outputs[name].flatten(1).isfinite().logical_not().any(1)
        assert spoilt.tolist() == [token == 2 for token in range(6)], name
    assert outputs["dtheta"].isnan().any()


def test_a_site_keeps_the_bytes_that_the_planner_counts() -> None:
    case = Case(3, 4, 64, torch.float32)
    _, mix, projection = hc.hc_pre_forward(case.x, case.theta, case.bias, case.alpha)
    spec = ResidualSpec(kind="hc", expansion_rate=4)
    counts = spec.num_coefficients, spec.num_logits, spec.num_norms
    assert coefficient_bytes(*counts, tokens=3) == mix.nbytes + projection.nbytes


def test_no_tokens() -> None:
    outputs = Case(0, 4, 64, torch.float32).run()
    assert outputs["y"].shape == (0, 4, 64)
    for name in ("dtheta", "db", "dalpha", "dtheta of W"):
        assert (outputs[name] == 0).all(), name


@pytest.mark.parametrize("eager", [False, True])
def test_gradient_of_coefficients_used_elsewhere_is_added(
    eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if eager:
        monkeypatch.setattr(mhc, "INTERPRETED", False)
    case = Case(5, 4, 64, torch.float32)
    parameters = (case.theta, case.bias, case.alpha)
    u, mix, projection = hc.hc_pre_forward(case.x, *parameters)
    weight = torch.randn_like(mix)
    zero = torch.zeros_like(case.x)
    _, _, db, dalpha = hc.hc_pre_backward(
        zero, case.x, torch.zeros_like(u), mix, projection, weight, *parameters
    )
    x, theta, bias, alpha = (t.double().requires_grad_() for t in (case.x, *parameters))
    _, wide = reference.hc_pre(x, theta, bias, alpha)
    want = torch.autograd.grad((wide * weight).sum(), (bias, alpha))
    torch.testing.assert_close(db.double(), want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dalpha.double(), want[1], rtol=1e-4, atol=1e-5)


BAD = [
    ("x", lambda t: t.flatten(1), ValueError),
    ("x", lambda t: t.double(), TypeError),
    ("theta", lambda t: t[:-1], ValueError),
    ("theta", lambda t: t.bfloat16(), TypeError),
    ("theta", lambda t: t.to("meta"), ValueError),
    ("bias", lambda t: t[:-1], ValueError),
    ("alpha", lambda t: t.double(), TypeError),
    ("dy", lambda t: t[..., :64].contiguous(), ValueError),
    ("du", lambda t: None, TypeError),
]


@pytest.mark.parametrize(("name", "spoil", "error"), BAD)
def test_wrong_arguments_are_named(name: str, spoil: object, error: type[Exception]) -> None:
    case = Case(4, 4, 128, torch.bfloat16)
    setattr(case, name, spoil(getattr(case, name)))
    with pytest.raises(error, match=rf"\b{name}\b"):
        case.run()


def test_what_passes_from_call_to_call_is_named_too() -> None:
    case = Case(4, 2, 64, torch.bfloat16)
    parameters = (case.theta, case.bias, case.alpha)
    _, mix, projection = hc.hc_pre_forward(case.x, *parameters)
    given = (case.dy, case.x, case.du, mix, projection[:-1], mix, *parameters)
    with pytest.raises(ValueError, match="projection"):
        hc.hc_pre_backward(*given)
    with pytest.raises(ValueError, match="dp"):
        hc.hc_pre_backward_weight(case.x, case.x)
    with pytest.raises(ValueError, match="norm_eps"):
        hc.hc_pre_forward(case.x, *parameters, norm_eps=-1.0)
    assert INTERPRETED or DEVICE.type == "cuda"
