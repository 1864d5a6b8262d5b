"""HC's kernels at real shapes, on a GPU only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from mhcplan.kernels import hc, mhc
from mhcplan.kernels.layers import Env, make_case
from tests.kernels import test_hc_kernels as cases
from tests.support.compile_ahead import run_site

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SITES = [
    (64, 16, 640, torch.bfloat16),
    (64, 16, 128, torch.float32),
    (300, 8, 640, torch.float32),
    (300, 8, 1920, torch.bfloat16),
    (4096, 4, 2560, torch.bfloat16),
    (333, 4, 1344, torch.bfloat16),  # 64 divides C, and no larger power of two
    (300, 4, 640, torch.float32),
    (300, 2, 1920, torch.bfloat16),
]
COMPILE_AHEAD = [(run_site, ("test_hc_kernels", *site[1:])) for site in SITES]


@pytest.fixture(scope="module")
def case() -> cases.Case:
    """A site of the 27B model."""
    return cases.Case(4096, 4, 2560, torch.bfloat16)


@pytest.mark.parametrize(("tokens", "n", "channels", "dtype"), SITES)
def test_a_site(tokens: int, n: int, channels: int, dtype: torch.dtype) -> None:
    cases.Case(tokens, n, channels, dtype).check()


def test_results_repeat_bit_by_bit() -> None:
    case = cases.Case(16384, 4, 2560, torch.bfloat16)  # where they once did not
    first = case.run()
    for _ in range(50):
        again = case.run()
        assert not [name for name in first if not torch.equal(first[name], again[name])]


def test_recompute_equals_the_forward(case: cases.Case) -> None:
    u, mix, _ = hc.hc_pre_forward(case.x, case.theta, case.bias, case.alpha)
    y = mhc.mhc_post_forward(case.x, case.f, mix)
    u_next, mix_next, _ = hc.hc_pre_forward(y, case.theta, case.bias, case.alpha)
    us, xs = mhc.mhc_recompute(case.x, [case.f], [mix, mix_next])
    assert torch.equal(us[0], u)
    assert torch.equal(us[1], u_next)
    assert torch.equal(xs[0], y)


def test_a_site_in_a_cuda_graph(case: cases.Case) -> None:
    want = case.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.run()
    for value in got.values():
        value.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_what_the_runtime_calls_waits_for_nothing_and_takes_no_fp32_state(
    no_waits: Callable[[], AbstractContextManager[None]],
) -> None:
    """The eager form cast the whole state to fp32, several times over."""
    shape = {"n": 4, "hidden": 2560, "tokens": 4096}
    case = make_case("hc_pre", shape, Env(torch.device("cuda")))
    calls = [case.prepare(pass_) for pass_ in "FIWB"]
    for call in calls:
        call()
    torch.cuda.synchronize()
    with no_waits():
        for call in calls:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            grown = torch.cuda.max_memory_allocated() - before
            assert grown < 1.5 * case.inputs[0].nbytes
