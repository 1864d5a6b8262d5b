"""The modules: gradients against autograd of the reference, deferral, recompute, compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mhcplan.kernels import mhc, modules, reference
from mhcplan.kernels.mhc_autograd import defer_weight_gradients
from mhcplan.kernels.modules import HcSite, MhcSite, recompute_block

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
C = 64
BOTH = pytest.mark.parametrize("kind", [MhcSite, HcSite])


@pytest.fixture(autouse=True)
def _plain_torch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have their own tests; the interpreter would only make these slow."""
    monkeypatch.setattr(mhc, "INTERPRETED", False)


def sublayer(norm_inside: bool = False) -> nn.Module:
    layers = [nn.Linear(C, C), nn.SiLU(), nn.Linear(C, C)]
    return nn.Sequential(nn.RMSNorm(C), *layers) if norm_inside else nn.Sequential(*layers)


def sites(count: int, n: int = 4, own_norm: bool = True, kind: type = MhcSite) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList()
    for _ in range(count):
        norm = nn.RMSNorm(C) if own_norm else None
        site = kind(sublayer(norm_inside=not own_norm), C, n, norm=norm)
        with torch.no_grad():
            site.alpha.fill_(0.5)
            site.bias.normal_()
            if kind is HcSite:
                site.theta.normal_(std=C**-0.5)
        made.append(site)
    return made.to(DEVICE)


def gradients(model: nn.ModuleList, x: Tensor, h: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, h.numel(), device=h.device).view_as(h)
    (h * weights).sum().backward()
    result = [h.detach(), x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return result


def state(n: int = 4, *lead: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(lead or (2, 3)), n, C, generator=generator).to(DEVICE).requires_grad_()


@BOTH
@pytest.mark.parametrize("n", [2, 4])
def test_gradients_are_those_of_autograd_of_the_reference(n: int, kind: type) -> None:
    model, x, x_ref = sites(2, n, kind=kind), state(n), state(n)
    h, r = x, x_ref
    for site in model:
        h = site(h)
        pre, weight = (
            (reference.hc_pre, site.theta) if kind is HcSite else (reference.mhc_pre, site.phi)
        )
        u, mix = pre(r, weight, site.bias, site.alpha)
        r = reference.post_res(r, site.sublayer(site.norm(u)), mix)
    got, want = gradients(model, x, h), gradients(model, x_ref, r)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 1, 3)])
def test_any_leading_shape(lead: tuple[int, ...]) -> None:
    (site,) = sites(1)
    x = state(4, *lead)
    assert site(x).shape == x.shape
    torch.testing.assert_close(site(x).flatten(0, -3), site(x.flatten(0, -3)))


@BOTH
@pytest.mark.parametrize("own_norm", [True, False])
@pytest.mark.parametrize("block_sites", [1, 2, 3])
def test_block_recompute_changes_no_bit(block_sites: int, own_norm: bool, kind: type) -> None:
    model, x, x_again = sites(3, own_norm=own_norm, kind=kind), state(), state()
    h = x
    for site in model:
        h = site(h)
    want = gradients(model, x, h)
    h = x_again
    for first in range(0, 3, block_sites):
        with recompute_block() as block:
            for site in model[first : first + block_sites]:
                h = site(h)
        assert block.num_sites == min(block_sites, 3 - first)
    assert all(map(torch.equal, gradients(model, x_again, h), want))


def test_block_keeps_only_what_it_must() -> None:
    model, x = sites(3), state()

    def stored(run: bool) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        h = x
        if run:
            block = modules.RecomputeBlock()
            modules._blocks.append(block)
            try:
                with torch.autograd.graph.saved_tensors_hooks(
                    lambda t: p if not isinstance(p := block.pack(t), Tensor) else pack(p),
                    modules.RecomputeBlock.unpack,
                ):
                    for site in model:
                        h = site(h)
            finally:
                modules._blocks.pop()
        else:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                for site in model:
                    h = site(h)
        h.sum().backward()
        return sum(seen.values())

    tokens = x.numel() // (4 * C)
    per_state, per_u = 4 * C * 4 * tokens, C * 4 * tokens
    # two later states, three u (saved by the norms) and three normalised u (by the linears)
    assert stored(False) - stored(True) >= 2 * per_state + 6 * per_u


def test_sites_of_a_block_must_follow_each_other() -> None:
    model, x = sites(2), state()
    with recompute_block(), pytest.raises(RuntimeError, match="follow each other"):
        model[1](model[0](x) * 2)


@BOTH
def test_weight_gradients_can_be_deferred(kind: type) -> None:
    model, x, x_again = sites(2, kind=kind), state(), state()
    h = x
    for site in model:
        h = site(h)
    want = gradients(model, x, h)
    h = x_again
    with defer_weight_gradients() as pending:
        for site in model:
            h = site(h)
    weights = torch.linspace(-1, 1, h.numel(), device=h.device).view_as(h)
    (h * weights).sum().backward()
    assert len(pending) == 2
    weight = "theta" if kind is HcSite else "phi"
    assert all(getattr(site, weight).grad is None for site in model)
    pending.run(1)
    assert len(pending) == 1
    pending.run()
    got = [h.detach(), x_again.grad, *(p.grad for p in model.parameters())]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ops_pass_torchs_own_checks() -> None:
    (site,) = sites(1)
    x = state().detach().flatten(0, 1)
    given = (x, site.phi.detach(), site.bias.detach(), site.alpha.detach(), 20, 1e-6)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mhcplan.mhc_pre, given, test_utils=utilities)
    u, mix, projection = torch.ops.mhcplan.mhc_pre(*given)
    torch.library.opcheck(torch.ops.mhcplan.mhc_post, (x, u, mix), test_utils=utilities)
    torch.library.opcheck(torch.ops.mhcplan.mhc_post_backward, (x, x, u, mix), test_utils=utilities)
    df, dmix = torch.ops.mhcplan.mhc_post_backward(x, x, u, mix)
    rest = (x, x, df, mix, projection, dmix, *given[1:])
    torch.library.opcheck(torch.ops.mhcplan.mhc_pre_backward, rest, test_utils=utilities)
    torch.library.opcheck(torch.ops.mhcplan.mhc_pre_backward_input, rest, test_utils=utilities)
    _, dp, _, _ = torch.ops.mhcplan.mhc_pre_backward_input(*rest)
    torch.library.opcheck(torch.ops.mhcplan.mhc_pre_backward_weight, (x, dp), test_utils=utilities)


def test_ops_of_hc_pass_torchs_own_checks() -> None:
    (site,) = sites(1, kind=HcSite)
    x = state().detach().flatten(0, 1)
    parameters = (site.theta.detach(), site.bias.detach(), site.alpha.detach())
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mhcplan.hc_pre, (x, *parameters, 1e-6), test_utils=utilities)
    u, mix, projection = torch.ops.mhcplan.hc_pre(x, *parameters, 1e-6)
    rest = (x, x, u, mix, projection, mix, *parameters)
    torch.library.opcheck(torch.ops.mhcplan.hc_pre_backward, rest, test_utils=utilities)
    torch.library.opcheck(torch.ops.mhcplan.hc_pre_backward_input, rest, test_utils=utilities)
    _, dp, _, _ = torch.ops.mhcplan.hc_pre_backward_input(*rest)
    torch.library.opcheck(torch.ops.mhcplan.hc_pre_backward_weight, (x, dp), test_utils=utilities)


@BOTH
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_site_gives_the_same(kind: type) -> None:
    (site,) = model = sites(1, kind=kind)
    x, x_again = state(), state()
    want = gradients(model, x, site(x))
    compiled = torch.compile(site, backend="aot_eager", fullgraph=True)
    got = gradients(model, x_again, compiled(x_again))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mhc", "hc", "identity", "plain"])
def test_every_kind_of_site_trains(kind: str) -> None:
    torch.manual_seed(0)
    n = 1 if kind == "plain" else 4
    model = nn.Sequential(
        modules.Expand(n),
        modules.make_site(kind, sublayer(), C, n, norm=nn.RMSNorm(C)),
        modules.make_site(kind, sublayer(), C, n, norm=nn.RMSNorm(C), layer_index=1),
        modules.Collapse(C, n),
    ).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, target = torch.randn(16, C, device=DEVICE), torch.randn(16, C, device=DEVICE)
    losses = []
    for _ in range(6):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_one_row_is_the_plain_residual() -> None:
    site = modules.make_site("mhc", sublayer(), C, 1).to(DEVICE)
    assert isinstance(site, modules.PlainSite)
    x = torch.randn(3, 1, C, device=DEVICE)
    torch.testing.assert_close(site(x), x + site.sublayer(x))


def test_hc_starts_as_a_plain_residual_of_its_row() -> None:
    site = HcSite(sublayer(), C, 4, layer_index=2).to(DEVICE)
    x = torch.randn(3, 4, C, device=DEVICE)
    torch.testing.assert_close(site(x), x + site.sublayer(x[:, 2:3]))


@pytest.mark.parametrize(("n", "c", "match"), [(3, 64, "n=3"), (4, 100, "C=100"), (0, 64, "n=0")])
def test_unsupported_sizes_are_named(n: int, c: int, match: str) -> None:
    for kind in (MhcSite, HcSite):
        with pytest.raises(ValueError, match=match):
            kind(nn.Identity(), c, n)


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="kind='nope'"):
        modules.make_site("nope", nn.Identity(), C, 4)
