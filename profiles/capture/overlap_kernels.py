"""Kernels that run beside traffic: one representative of each class, and a GEMM of known shape.

What two kernels do to each other is decided by how many CTAs they have, how long a CTA lives and
how much memory traffic they make, so the cases cover that space: GEMMs that fill the chip in one
wave or in many, with short and long CTAs, one CTA a tile or persistent, on all SMs or on fewer;
attention by pinned backend at MLA's head sizes; grouped GEMM; the mHC kernels; elementwise.
"""

# ruff: noqa: ANN001, ANN202  (Triton: no types for tensors)

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer, smid

from mhcplan.kernels.layers import BACKENDS, Env, make_case

if TYPE_CHECKING:
    from collections.abc import Callable

TILE_M, TILE_N, TILE_K = 128, 256, 64
_MHC = {"n": 4, "hidden": 2560, "tokens": 4096}
_TINY_MHC = {"n": 2, "hidden": 64, "tokens": 8}


@dataclass(frozen=True)
class Compute:
    """A kernel to overlap.

    Attributes:
        name: of the case.
        family: class of compute: gemm, gemm_persistent, gemm_library, grouped_gemm, attention,
            projection, post_res or elementwise.
        call: runs it once on the current stream.
        hbm_bytes: bytes it must move at least.
    """

    name: str
    family: str
    call: Callable[[], object]
    hbm_bytes: int


@triton.jit
def _gemm_kernel(
    a, b, c, m, n, k, tiles, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """C [m, n] = A [m, k] B [n, k]^T; a CTA walks tiles a grid apart, so grid = tiles is one each.

    m, n and k are multiples of the tile."""
    columns = n // TN
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile // columns) * TM + tl.arange(0, TM)
        column = (tile % columns) * TN + tl.arange(0, TN)
        inner = tl.arange(0, TK)
        a_at = a + row[:, None] * k + inner[None, :]
        b_at = b + column[None, :] * k + inner[:, None]
        total = tl.zeros([TM, TN], tl.float32)
        for _ in range(0, k, TK):
            total = tl.dot(tl.load(a_at), tl.load(b_at), total)
            a_at += TK
            b_at += TK
        tl.store(c + row[:, None] * n + column[None, :], total.to(c.dtype.element_ty))


@triton.jit
def _clock_kernel(out, life_ns):
    """Every CTA lives ``life_ns`` and writes (first ns, last ns, SM) of the GPU's global timer."""
    start = globaltimer()
    now = start
    while now < start + life_ns:
        now = globaltimer()
    at = out + 3 * tl.program_id(0)
    tl.store(at, start)
    tl.store(at + 1, now)
    tl.store(at + 2, smid().to(tl.int64))


def clock_ctas(out: torch.Tensor, ctas: int, life_ns: int, warps: int = 32) -> None:
    """Launch ``ctas`` CTAs of ``warps`` warps that do nothing for ``life_ns`` (two fit on an SM at
    32 warps); ``out`` int64 [ctas, 3] gets the start and end of each in ns, and its SM."""
    kernel: Any = _clock_kernel[(ctas,)]  # Triton's launch options are not in its types
    kernel(out, life_ns, num_warps=warps)


def tiled_gemm(
    device: torch.device, rows: int, columns: int, inner: int, grid: int | None = None
) -> Callable[[], object]:
    """A bf16 GEMM of 128 x 256 tiles, one CTA an SM; ``grid`` CTAs walk the tiles (default: each
    has one)."""
    env = Env(device)
    a, b = env.normal(rows, inner), env.normal(columns, inner, salt=1)
    c = torch.empty(rows, columns, device=device, dtype=a.dtype)
    tiles = (rows // TILE_M) * (columns // TILE_N)
    count = tiles if grid is None else min(grid, tiles)
    kernel: Any = _gemm_kernel[(count,)]  # Triton's launch options are not in its types
    sizes = {"TM": TILE_M, "TN": TILE_N, "TK": TILE_K}
    return lambda: kernel(a, b, c, rows, columns, inner, tiles, **sizes, num_warps=8, num_stages=4)


def _gemm_bytes(rows: int, columns: int, inner: int) -> int:
    return 2 * (rows * inner + columns * inner + rows * columns)


def _tiled(device: torch.device, num_sms: int) -> list[tuple[str, str, Any, int]]:
    """One wave of long and of short CTAs, many waves of each, persistent on all and on fewer SMs.

    11 x 12 tiles fill the 132 SMs of an H100 or H200 exactly; elsewhere the grid says so.
    """
    spare = max(1, num_sms - 20)  # the split of DeepSeek's published trace: 112 + 20 = 132
    shapes = {
        "gemm_wave_long": ("gemm", 1408, 3072, 8192, None),
        "gemm_wave_short": ("gemm", 1408, 3072, 2048, None),
        "gemm_tiles_long": ("gemm", 4096, 6144, 4096, None),
        "gemm_tiles_short": ("gemm", 8192, 8192, 512, None),
        "gemm_persistent": ("gemm_persistent", 4096, 8192, 2048, num_sms),
        "gemm_persistent_spare": ("gemm_persistent", 4096, 7168, 2048, spare),
    }
    return [
        (name, family, lambda d=device, m=m, n=n, k=k, g=grid: tiled_gemm(d, m, n, k, g),
         _gemm_bytes(m, n, k))
        for name, (family, m, n, k, grid) in shapes.items()
    ]  # fmt: skip


def _library_gemm(device: torch.device, rows: int, columns: int, inner: int) -> Callable[[], Any]:
    env = Env(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    a, b = env.normal(rows, inner), env.normal(columns, inner, salt=1)
    c = torch.empty(rows, columns, device=device, dtype=a.dtype)
    return lambda: torch.mm(a, b.t(), out=c)


def _grouped_gemm(device: torch.device, rows: int, hidden: int, ffn: int) -> Callable[[], Any]:
    from mhcplan.kernels.layers_triton_moe import grouped_linear

    env, experts = Env(device), 8
    x, weight = env.normal(rows, hidden), env.normal(experts, ffn, hidden, salt=1)
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)
    return lambda: grouped_linear(x, weight, ends)


def _attention(device: torch.device, backend: str, pass_: str, seq: int, heads: int) -> Any:  # noqa: ANN401
    """One sequence at DeepSeek's MLA head sizes: 192 for query and key, 128 for value."""
    env = Env(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    q, k = (env.normal(1, seq, heads, 192, salt=i) for i in (0, 1))
    v, dout = (env.normal(1, seq, heads, 128, salt=i) for i in (2, 3))
    scale = 192**-0.5
    forward, backward = BACKENDS[backend]
    if pass_ == "F":
        return lambda: forward(q, k, v, scale)
    out, stats = forward(q, k, v, scale)
    return lambda: backward(dout, q, k, v, out, stats, scale)


def _mhc(device: torch.device, kind: str, pass_: str, shape: dict[str, int]) -> Callable[[], Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return make_case(kind, shape, Env(device, dtype)).prepare(pass_)


def _projection(device: torch.device, shape: dict[str, int]) -> Callable[[], object]:
    from mhcplan.kernels.mhc_forward import project

    n, hidden = shape["n"], shape["hidden"]
    env = Env(device)
    x = env.normal(shape["tokens"], n, hidden)
    phi = env.normal(n * n + 2 * n, n * hidden, salt=1).float()
    return lambda: project(x, phi)


def _add(device: torch.device, count: int) -> Callable[[], object]:
    env = Env(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    a, b = env.normal(count), env.normal(count, salt=1)
    c = torch.empty_like(a)
    return lambda: torch.add(a, b, out=c)


def _gpu_cases(device: torch.device) -> list[tuple[str, str, Any, int]]:
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    seq, heads, count = 4096, 16, 32 * 1024**2
    state = 2 * _MHC["tokens"] * _MHC["hidden"]
    scores = 2 * seq * heads * (2 * 192 + 2 * 128)
    grouped = (8192, 2560, 3072)
    cases = _tiled(device, num_sms)
    for name, shape in (
        ("gemm_library", (4096, 4096, 4096)),
        ("gemm_library_big", (8192, 7168, 2560)),
    ):
        cases.append(
            (name, "gemm_library", lambda s=shape: _library_gemm(device, *s), _gemm_bytes(*shape))
        )
    cases.append(
        ("grouped_gemm", "grouped_gemm", lambda: _grouped_gemm(device, *grouped),
         2 * (8192 * (2560 + 3072) + 8 * 2560 * 3072))
    )  # fmt: skip
    for backend in ("cudnn", "flash"):
        for pass_ in "FI":
            cases.append(
                (f"attention_{backend}_{pass_}", "attention",
                 lambda b=backend, p=pass_: _attention(device, b, p, seq, heads),
                 scores * (1 if pass_ == "F" else 2))
            )  # fmt: skip
    cases += [
        ("mhc_project", "projection", lambda: _projection(device, _MHC), 4 * state),
        ("mhc_post_F", "post_res", lambda: _mhc(device, "mhc_post", "F", _MHC), 9 * state),
        ("mhc_post_I", "post_res", lambda: _mhc(device, "mhc_post", "I", _MHC), 10 * state),
        ("elementwise", "elementwise", lambda: _add(device, count), 6 * count),
        ("elementwise_big", "elementwise", lambda: _add(device, 4 * count), 24 * count),
    ]
    return cases


def _cpu_cases(device: torch.device) -> list[tuple[str, str, Any, int]]:
    """Tiny stand-ins, for tests of the machinery."""
    return [
        (
            "gemm_library",
            "gemm_library",
            lambda: _library_gemm(device, 64, 64, 64),
            3 * 64 * 64 * 4,
        ),
        ("attention_math_F", "attention", lambda: _attention(device, "math", "F", 16, 2), 81920),
        ("mhc_post_F", "post_res", lambda: _mhc(device, "mhc_post", "F", _TINY_MHC), 20480),
        ("elementwise", "elementwise", lambda: _add(device, 4096), 3 * 4096 * 4),
    ]


def makers(device: torch.device) -> dict[str, Callable[[], Compute]]:
    """Every case by name; calling one allocates its tensors.

    The call may raise RuntimeError where a library has no such kernel.
    """
    found = _gpu_cases(device) if device.type == "cuda" else _cpu_cases(device)
    return {
        name: lambda n=name, f=family, b=build, s=size: Compute(n, f, b(), s)
        for name, family, build, size in found
    }
