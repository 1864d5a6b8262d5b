"""What a site's forward and backward allocate, counted from shapes, and what memory does twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhcplan.kernels import hc, mhc, mhc_backward
from mhcplan.kernels.reference import num_coefficients
from mhcplan.kernels.triton_support import INTERPRETED, padded, residual_parts

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU's own allocator counts: see gpu")

BLOCK = 512  # bytes that torch's CUDA allocator rounds up to
SHAPES = [(tokens, channels) for tokens in (4096, 16384) for channels in (2560, 4096, 7168)]
MEASURED = Path(__file__).parents[2] / "benchmarks" / "kernels_h100.json"


class Allocator(TorchDispatchMode):
    """Counts the bytes of storages that are made while it is entered, as CUDA's would.

    Attributes:
        peak_bytes: most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = {_storage(t).cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _storage(tensor).cdata not in given:
                size = -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK
                self._alive[_storage(tensor).cdata] = (_storage(tensor), size)
        self._alive = {k: kept for k, kept in self._alive.items() if not kept[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return made


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


@pytest.fixture
def _nothing_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = type(mhc_backward._pre_backward_kernel)
    monkeypatch.setattr(kernel, "run", lambda *_args, **_kwargs: None)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def inputs(tokens: int, n: int, channels: int) -> dict[str, Tensor]:
    """What is there before: the state, the sublayer's output, gradients of u and y, parameters."""
    m = num_coefficients(n)
    return {
        "x": empty(tokens, n, channels), "dy": empty(tokens, n, channels),
        "f": empty(tokens, channels), "du": empty(tokens, channels),
        "phi": empty(m, n * channels, dtype=torch.float32),
        "theta": empty(n + 2, channels, dtype=torch.float32),
        "bias": empty(m, dtype=torch.float32), "alpha": empty(3, dtype=torch.float32),
    }  # fmt: skip


def peak_bytes(tokens: int, channels: int, n: int = 4, family: str = "mhc") -> int:
    """Peak of a site's forward and backward, whose results are all kept."""
    given = inputs(tokens, n, channels)
    x, f, dy, du = (given[name] for name in ("x", "f", "dy", "du"))
    projection = given["phi" if family == "mhc" else "theta"]
    parameters = (projection, given["bias"], given["alpha"])
    forward: Callable[..., Any] = mhc.mhc_pre_forward if family == "mhc" else hc.hc_pre_forward
    backward: Callable[..., Any] = mhc.mhc_pre_backward if family == "mhc" else hc.hc_pre_backward
    with Allocator() as allocator:
        u, mix, projected = forward(x, *parameters)
        y = mhc.mhc_post_forward(x, f, mix)
        df, dmix = mhc.mhc_post_backward(dy, x, f, mix)
        gradients = backward(dy, x, du, mix, projected, dmix, *parameters)
        del u, y, df, gradients
    return allocator.peak_bytes


def results_bytes(tokens: int, channels: int, n: int, slices: int, outputs: int) -> int:
    """u, y, df, dx, the projection's gradient; a block each for those of bias and alpha."""
    state = tokens * n * channels * 2
    return 2 * state + 2 * state // n + 4 * outputs * slices * channels + 2 * BLOCK


@pytest.mark.usefixtures("_nothing_launched")
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_at_the_peak_of_a_site_there_is_no_more_than_has_to_be(tokens: int, channels: int) -> None:
    """Its results; mix, dmix, the projection with 1 / r, dp in two parts of 32, s: 408 bytes."""
    coefficients = tokens * (4 * 24 + 4 * 24 + 4 * 25 + 2 * 2 * 32 + 4)
    expected = results_bytes(tokens, channels, 4, slices=4, outputs=24) + coefficients
    assert peak_bytes(tokens, channels) == expected


@pytest.mark.usefixtures("_nothing_launched")
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_the_peak_is_no_higher_than_the_leanest_public_kernels(tokens: int, channels: int) -> None:
    peers = json.loads(MEASURED.read_text(encoding="utf-8"))["elsewhere"]["peers"]
    shape = (tokens, channels)
    best = min(p["peak_mib"] for p in peers if (p["T"], p["C"]) == shape and p["peak_mib"])
    assert peak_bytes(tokens, channels) / 2**20 <= best


@pytest.mark.usefixtures("_nothing_launched")
def test_small_partial_sums_have_memory_of_their_own() -> None:
    """HC's at 4096 tokens: 14 slots for 264 programs of 20 tiles of a slice's 256."""
    tokens, channels, dtheta = 4096, 2560, 4 * 6 * 2560
    # mix, dmix, the projection with 1 / r, dp in two parts of 16 a row, s
    coefficients = tokens * (4 * 24 + 4 * 24 + 4 * 28 + 4 * 2 * 2 * 16 + 4 * 4)
    expected = results_bytes(tokens, channels, 4, slices=1, outputs=6) + coefficients
    assert peak_bytes(tokens, channels, family="hc") == expected + 14 * dtheta


@pytest.mark.usefixtures("_nothing_launched")
@pytest.mark.parametrize("tokens", [64, 512, 1024])
def test_partial_sums_take_no_more_than_an_eighth_of_dx(tokens: int) -> None:
    dx = empty(tokens, 4, 2560)
    numbers = dx.numel() // 2 // 8
    assert 8 * mhc_backward._lent_tokens(dx, numbers, 16) in (0, tokens)
    assert mhc_backward._lent_tokens(dx, numbers + 1, 16) == 0


@pytest.mark.parametrize(
    ("n", "slices", "dtype"),
    [(2, 2, torch.bfloat16), (2, 2, torch.float32), (4, 1, torch.bfloat16)],  # the last is HC's
)
def test_partial_sums_in_memory_of_dx_change_nothing(
    n: int, slices: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, channels = 100, 64
    outputs = num_coefficients(n) if slices == n else n + 2
    line = residual_parts(dtype) * padded(outputs)
    by_row = () if slices == n else (n,)
    state = (tokens, n, channels)
    given = (
        torch.randn(state).to(dtype), torch.randn(state).to(dtype),
        torch.randn(tokens, channels).to(dtype), torch.randn(tokens, num_coefficients(n)),
        torch.randn(tokens, *by_row, line).to(dtype), torch.randn(tokens, *by_row),
        torch.randn(outputs, slices * channels),
    )  # fmt: skip
    want = mhc_backward.pre_backward(*given, with_weight=True)
    lent: list[int] = []
    lent_tokens = mhc_backward._lent_tokens

    def lend(dx: Tensor, numbers: int, block: int) -> int:
        lent.append(lent_tokens(dx, numbers, block))
        return lent[-1]

    monkeypatch.setattr(mhc_backward, "LEAST_LENT_BYTES", 0)
    monkeypatch.setattr(mhc_backward, "LEAST_TIMES_LENT", 1)
    monkeypatch.setattr(mhc_backward, "_lent_tokens", lend)
    got = mhc_backward.pre_backward(*given, with_weight=True)
    assert 0 < lent[0] < tokens
    for out, expected in zip(got, want, strict=True):
        assert out is not None
        assert expected is not None
        assert torch.equal(out, expected)
