"""Diagnostics: what products of maps keep, gains by hand, hooks, the file, checkpoints."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mhcplan.kernels import mhc, modules, reference
from mhcplan.kernels.diagnostics import Recorder
from mhcplan.kernels.diagnostics_checkpoint import CheckpointError, find_sites, record_checkpoint
from mhcplan.kernels.diagnostics_file import RecordingError, RecordingWriter
from mhcplan.kernels.diagnostics_maps import (
    Site,
    backward_gain,
    coefficients,
    composites,
    figure_shapes,
    figures,
    forward_gain,
    make_site,
    row_similarity,
    spectral_norm,
)
from mhcplan.planner.diagnose.recording import RecordingError as DiagnosisError
from mhcplan.planner.diagnose.recording import read_recording

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

C = 64
KINDS = ("mhc", "hc", "identity", "plain")


@pytest.fixture(autouse=True)
def _plain_torch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have their own tests; the interpreter would only make these slow."""
    monkeypatch.setattr(mhc, "INTERPRETED", False)


def permutations(depth: int, n: int, seed: int) -> Tensor:
    """Random doubly stochastic maps ``[depth, n, n]``, exact: mixtures of permutations."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(depth, 6, generator=generator, dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    orders = torch.rand(depth, 6, n, generator=generator).argsort(-1)
    matrices = torch.nn.functional.one_hot(orders, n).double()
    return (weights[..., None, None] * matrices).sum(1)


def network(kind: str, sites: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    n = 1 if kind == "plain" else 4
    made = [
        modules.make_site(kind, nn.Sequential(nn.RMSNorm(C), nn.Linear(C, C)), C, n, layer_index=i)
        for i in range(sites)
    ]
    for site in made:
        if kind != "plain":
            with torch.no_grad():
                site.alpha.fill_(0.5)
                site.bias.add_(torch.randn_like(site.bias), alpha=0.3)
    return nn.Sequential(*made)


def train(
    model: nn.Module, recorder: Recorder | None, steps: int, *, start: int = 0, n: int = 4
) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(2, 5, n, C, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        model.zero_grad()
        loss.backward()
        if recorder is not None:
            recorder.step(loss, 0.5 * step)
        losses.append(loss.item())
    return losses


# -- maps ------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 12), st.sampled_from([2, 4, 8]), st.integers(0, 10_000))
def test_products_of_doubly_stochastic_maps_stay_doubly_stochastic(
    depth: int, n: int, seed: int
) -> None:
    maps = permutations(depth, n, seed)
    for product in composites(maps):
        assert torch.allclose(product.sum(-1), torch.ones(n).double(), atol=1e-12)
        assert torch.allclose(product.sum(-2), torch.ones(n).double(), atol=1e-12)
        assert spectral_norm(product).max() <= 1 + 1e-9
        x = torch.randn(n, 3, dtype=torch.float64)
        assert torch.allclose((product @ x).mean(-2), x.mean(-2).expand(depth, 3), atol=1e-12)
        assert torch.allclose(forward_gain(product), torch.ones(depth).double(), atol=1e-12)


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(0, 10_000))
def test_composites_are_the_products_in_their_order(depth: int, seed: int) -> None:
    maps = torch.randn(depth, 3, 3, generator=torch.Generator().manual_seed(seed)).double()
    forward, backward = composites(maps)
    for l in range(depth):  # noqa: E741
        ahead, behind = torch.eye(3).double(), torch.eye(3).double()
        for i in range(l + 1):
            ahead = maps[i] @ ahead
        for i in range(l, depth):
            behind = maps[i] @ behind
        assert torch.allclose(forward[l], ahead)
        assert torch.allclose(backward[l], behind)


def test_gains_of_a_constructed_hc_stack() -> None:
    """Maps of one row and column direction: their products are known in closed form."""
    left, right = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, -3.0]).double()
    depth, inner = 20, float(right @ left)  # H = left right^T, H^d = inner^(d-1) H
    maps = torch.outer(left, right).expand(depth, 2, 2)
    forward, backward = composites(maps)
    power = abs(inner) ** torch.arange(depth, dtype=torch.float64)
    rows, columns = 2.0 * 2.5, 1.0 * 3.0  # |left|_max |sum right|, |sum left| |right|_max
    assert torch.allclose(forward_gain(forward), rows * power, rtol=1e-6)
    assert torch.allclose(backward_gain(backward), columns * power.flip(0), rtol=1e-6)
    sizes = left.norm() * right.norm() * power
    assert torch.allclose(spectral_norm(forward), sizes, rtol=1e-6)


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 10_000), st.floats(0, 1))
def test_spectral_norm_is_that_of_the_svd(n: int, seed: int, towards_identity: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(5, n, n, generator=generator, dtype=torch.float64)
    maps = maps * (1 - towards_identity) + towards_identity * torch.eye(n)
    want = torch.linalg.matrix_norm(maps, 2)
    assert torch.allclose(spectral_norm(maps), want, rtol=1e-6, atol=1e-12)
    assert spectral_norm(torch.zeros(n, n).double()) == 0


def test_row_similarity_of_copies_and_of_orthogonal_rows() -> None:
    def of(x: Tensor) -> float:
        return row_similarity(x @ x.mT).item()

    row = torch.randn(1, C).double()
    assert of(row.expand(4, C)) == pytest.approx(1)
    assert of(torch.eye(4).double()) == pytest.approx(0)
    assert of(torch.tensor([[1.0, 0], [1, 1], [0, 0]]).double()) == pytest.approx(
        (2**0.5 - 1) / 6  # one pair of three has a cosine; a row of zeros is no copy of itself
    )


def test_one_row_is_the_identity() -> None:
    mix = coefficients([Site("a", "plain", 1)] * 3, torch.randn(3, 7, 1, C))
    assert torch.equal(mix.res, torch.ones(3, 7, 1, 1).double())
    forward, backward = composites(mix.res)
    assert torch.equal(forward_gain(forward), torch.ones(3, 7).double())
    assert torch.equal(backward, forward)
    assert torch.equal(reference.sinkhorn(torch.randn(5, 1, 1)), torch.ones(5, 1, 1))


@pytest.mark.parametrize("kind", ["mhc", "hc", "identity"])
def test_coefficients_are_those_that_the_sites_use(kind: str) -> None:
    model, n = network(kind), 4
    x = torch.randn(3, 6, n, C)
    want = []
    for site, state in zip(model, x, strict=True):
        _, mix, *_ = site.pre(state)
        want.append(mix.double())
    sites = [
        make_site(str(i), kind, (getattr(s, "theta", getattr(s, "phi", None)), s.bias, s.alpha))
        for i, s in enumerate(model)
    ]
    got = coefficients(sites, x).pack()
    assert torch.allclose(got, torch.stack(want), atol=2e-6)


# -- recorder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_recorded_through_hooks(kind: str, tmp_path: Path) -> None:
    model = network(kind)
    with Recorder.attach(model, tmp_path / "run.recording", every=2, tokens=4) as recorder:
        losses = train(model, recorder, 5, n=recorder.sites[0].expansion_rate)
    assert not any(site._forward_hooks for site in model)
    found = read_recording(tmp_path / "run.recording")
    assert found.steps.tolist() == [1, 3]
    assert found.kind == kind
    steps, curve = found.curve("loss")
    assert steps.tolist() == [0, 1, 2, 3]
    assert curve == pytest.approx(losses[:4])
    assert found.curve("gradient_norm")[1].tolist() == [0, 0.5, 1, 1.5]
    shapes = figure_shapes(3, recorder.sites[0].expansion_rate)
    for name, shape in shapes.items():
        assert found.last(name).shape == shape
        assert np.isfinite(found.last(name)).all(), name
    assert found.last("row_share").sum(-1) == pytest.approx(np.ones(3))
    assert (found.last("gradient_rms") > 0).all()


def test_gradients_and_states_are_those_of_autograd(tmp_path: Path) -> None:
    model = network("mhc")
    x = torch.randn(8, 4, C)
    states = [x]
    for site in model:
        states.append(site(states[-1]))
        states[-1].retain_grad()
    states[-1].square().mean().backward()
    with Recorder.attach(model, tmp_path / "a", every=1, tokens=8) as recorder:
        loss = model(x).square().mean()
        loss.backward()
        recorder.step(loss)
    found = read_recording(tmp_path / "a")
    rms = [float(s.grad.double().square().mean().sqrt()) for s in states[1:]]
    assert found.last("gradient_rms") == pytest.approx(rms)
    stack = torch.stack([s.detach() for s in states])
    want = figures(recorder.sites, stack, torch.zeros_like(stack[1:]))
    assert found.last("composite_backward_gain") == pytest.approx(
        want["composite_backward_gain"].numpy()
    )


def test_recording_changes_nothing_of_the_run(tmp_path: Path) -> None:
    plain, watched = network("mhc"), network("mhc")
    losses = train(plain, None, 3)
    with Recorder.attach(watched, tmp_path / "a", every=1) as recorder:
        assert train(watched, recorder, 3) == losses
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_run_goes_on_behind_its_checkpoint(tmp_path: Path) -> None:
    path, model = tmp_path / "run.recording", network("hc")
    with Recorder.attach(model, path, every=2) as recorder:
        train(model, recorder, 8)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # the writer was killed; the checkpoint is of step 4
    with Recorder.attach(model, path, every=2, first_step=4) as recorder:
        train(model, recorder, 4, start=4)
    again = read_recording(path)
    assert again.steps.tolist() == [1, 3, 5, 7]
    assert again.cut_bytes == 0
    with pytest.raises(RecordingError, match="not a recording of this run"):
        Recorder.attach(network("mhc"), path, every=2, first_step=4)
    with pytest.raises(ValueError, match="first_step=3 must be a multiple"):
        Recorder.attach(model, path, every=2, first_step=3)


def test_a_model_without_sites_or_with_mixed_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no mHC, HC"):
        Recorder.attach(nn.Linear(2, 2), tmp_path / "a")
    mixed = nn.Sequential(network("mhc", 1), network("hc", 1))
    with pytest.raises(ValueError, match="one kind and size"):
        Recorder.attach(mixed, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Calls(TorchDispatchMode):
    """Counts what is asked of a device: ops that return a view of their input are free."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        _types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = str(func.overloadpacket)
        if not func.is_view and name != "aten._unsafe_view":
            self.made.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
def test_launches_of_a_record_do_not_grow_with_depth_but_for_the_samples(
    kind: str, tmp_path: Path
) -> None:
    """A launch costs the host some 10 us: a thousand of them are a tenth of a step."""
    n = 1 if kind == "plain" else 4
    state, made = torch.randn(16, n, C), dict[int, list[str]]()
    for depth in (3, 48):
        with Recorder.attach(network(kind, depth), tmp_path / "a", every=2) as recorder:
            for step in range(4):
                with Calls() as calls:
                    for index in range(depth + 1):
                        recorder.state(index, state)
                    for index in range(depth):
                        recorder.gradient(index, state)
                    recorder.step(1.0, 2.0)
                if step % 2 == 0:
                    assert calls.made == []
            made[depth] = calls.made  # of the second record: the first asks for memory
    samples = {depth: calls.count("aten.copy_") for depth, calls in made.items()}
    assert samples == {3: 7, 48: 97}
    # products over twice the depth take one round more: a product and a join
    assert len(made[48]) - 97 == len(made[3]) - 7 + 4 * 2
    assert len(made[48]) - 97 <= 170
    waits = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten._linalg_svd"}
    assert not waits & set(made[48])


def test_neither_a_disk_nor_what_is_on_its_way_holds_a_step_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, gate, write = tmp_path / "a", threading.Event(), RecordingWriter.write

    def slow(*given: object) -> None:
        assert gate.wait(60)
        write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(RecordingWriter, "write", slow)
    model = network("mhc")
    with Recorder.attach(model, path, every=1) as recorder:
        train(model, recorder, 3)  # would wait for ever if it waited for a write
        with pytest.raises(DiagnosisError, match="has no whole record"):
            read_recording(path)
        gate.set()
        recorder.flush()
        assert read_recording(path).steps.tolist() == [0, 1, 2]


def test_a_record_that_cannot_be_written_is_an_error_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(RecordingWriter, "write", full)
    model = network("mhc")
    recorder = Recorder.attach(model, tmp_path / "a", every=2)
    train(model, recorder, 2)
    with pytest.raises(OSError, match="no space left"):
        recorder.close()


def test_what_was_not_noted_is_not_a_number(tmp_path: Path) -> None:
    with Recorder.attach(network("mhc"), tmp_path / "a", every=1) as recorder:
        with pytest.raises(RuntimeError, match="did the sites run"):
            recorder.step(1.0)
        for _ in range(2):
            for index in range(4):
                recorder.state(index, torch.randn(8, 4, C))
            for index in range(3 - recorder._step):  # the last site's gradient comes no more
                recorder.gradient(index, torch.randn(8, 4, C))
            recorder.step(1.0)
    found = read_recording(tmp_path / "a").figure("gradient_rms")
    assert np.isnan(found).tolist() == [[False] * 3, [False, False, True]]


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mhc", "hc", "identity"])
def test_a_checkpoint_becomes_a_recording(kind: str, tmp_path: Path) -> None:
    model = network(kind, sites=11)  # 10 comes behind 9, not behind 1
    torch.save({"model": model.state_dict(), "step": 12}, tmp_path / "a.pt")
    record_checkpoint(tmp_path / "a.pt", tmp_path / "a.recording")
    found = read_recording(tmp_path / "a.recording")
    assert found.kind == kind
    assert found.sites == [str(i) for i in range(11)]
    assert found.is_checkpoint
    assert found.steps.tolist() == [12]
    probe = torch.randn(64, 4, C, generator=torch.Generator().manual_seed(0))
    sites = find_sites(model.state_dict())
    maps = coefficients(sites, probe.expand(11, 64, 4, C)).res
    gain = forward_gain(composites(maps)[0]).mean(-1)
    assert found.last("composite_forward_gain")[:, 0] == pytest.approx(gain.numpy())
    assert np.isnan(found.last("row_similarity")).all()
    assert np.isnan(found.last("gradient_rms")).all()


def _spoil_bias(weights: dict[str, Any]) -> None:
    weights["1.bias"][3] = float("inf")


def _reshape_phi(weights: dict[str, Any]) -> None:
    weights["1.phi"] = weights["1.phi"][:-1]


def _drop_alpha(weights: dict[str, Any]) -> None:
    del weights["1.alpha"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_bias, "1.bias holds values that are not finite"),
        (_reshape_phi, "site 1: shapes"),
        (_drop_alpha, "site 1 has no alpha"),
        (dict.clear, "no site found"),
    ],
)
def test_a_wrong_checkpoint_is_named(
    spoil: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    weights = dict(network("mhc").state_dict())
    spoil(weights)
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        record_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_named(share: float, tmp_path: Path) -> None:
    torch.save(network("mhc").state_dict(), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"a\.pt: not a whole torch checkpoint"):
        record_checkpoint(tmp_path / "a.pt", tmp_path / "out")


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        record_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    (tmp_path / "a.pt").write_text(json.dumps({"phi": 1}))
    with pytest.raises(CheckpointError, match="not a whole torch checkpoint"):
        record_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        record_checkpoint(tmp_path / "a.pt", tmp_path / "out")
