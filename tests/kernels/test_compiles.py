"""The kernels compile for an H100, with the tiles of the table; no GPU is needed to see that."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_BYTES = 227 * 1024  # that a block may have, compute capability 9.0
WORKER = Path(__file__).with_name("hopper_worker.py")

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton._C.libtriton") is None, reason="triton has no compiler here"
)


def compiled(n: int, dtype: str, channels: int, cache: Path, *only: str) -> list[dict[str, Any]]:
    source = Path(__file__).parents[2] / "src"
    env = {**os.environ, "PYTHONPATH": str(source), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, WORKER, str(n), dtype, str(channels), *only],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def written_kernels() -> list[str]:
    folder = WORKER.parents[2] / "kernels"
    files = [*folder.glob("*hc_*.py"), folder / "triton_support.py"]
    text = "".join(path.read_text() for path in files)
    return re.findall(r"^def _(\w+_kernel)\(", text, re.MULTILINE)


def check(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert kernel["spilled_bytes"] <= 64, kernel  # registers that did not fit
        assert kernel["short_products"] == [], kernel
        assert kernel["overwritten_factors"] == [], kernel


@needs_compiler
def test_every_kernel_of_a_site_compiles_for_an_h100(tmp_path: Path) -> None:
    made = [kernel for n in (4, 8) for kernel in compiled(n, "bf16", 2560, tmp_path)]
    made += compiled(4, "bf16", 2560, tmp_path, "hc")
    made += compiled(2, "bf16", 2560, tmp_path, "products")
    assert {kernel["name"] for kernel in made} == set(written_kernels())
    check(made)


@needs_compiler
def test_fp32_products_have_rows_for_all_their_warps(tmp_path: Path) -> None:
    """Where they had not, an H100 read outside shared memory."""
    check([k for n in (4, 8) for k in compiled(n, "fp32", 640, tmp_path, "products")])
    check(compiled(8, "fp32", 640, tmp_path, "hc"))
