"""Machine code is kept on disk where that is possible, and nothing breaks where it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SORT = """
import numpy as np
from mhcplan.sim import jit
from mhcplan.sim.program import Csr
print(*Csr.grouped(np.array([1, 0, -1, 1]), 2).values, jit._cache_folder())
"""
SORTED = ["1", "0", "3"]


def run_python(code: str, **environment: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": f"{root / 'src'}:{root}", "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=paths | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root,
    )  # fmt: skip


def test_processes_that_start_together_share_one_cache(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = [run_python(SORT, NUMBA_CACHE_DIR=cache) for _ in range(2)]
    for process in first:
        output, errors = process.communicate(timeout=300)
        assert output.split()[:3] == SORTED, errors
        assert output.split()[3].startswith(cache)
    kept = sorted(Path(cache).rglob("*.nbc"))
    assert kept
    before = [(file, file.stat().st_mtime_ns) for file in kept]
    for damage in (None, b"cut short"):
        if damage is not None:
            for file in kept:
                file.write_bytes(damage)
        output, errors = run_python(SORT, NUMBA_CACHE_DIR=cache).communicate(timeout=300)
        assert output.split()[:3] == SORTED, errors
        if damage is None:
            assert before == [(file, file.stat().st_mtime_ns) for file in kept], "used, not remade"


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder can be made here")
    process = run_python(SORT, NUMBA_CACHE_DIR=str(file), XDG_CACHE_HOME=str(tmp_path / "user"))
    output, errors = process.communicate(timeout=300)
    assert output.split()[:3] == SORTED, errors
    assert output.split()[3].startswith(str(tmp_path / "user"))
    code = "from mhcplan.sim import jit\njit._cache_folder = lambda: None\n" + SORT
    output, errors = run_python(code).communicate(timeout=300)
    assert output.split() == [*SORTED, "None"], errors


def test_without_numba_the_same_comes_slowly() -> None:
    code = "import sys\nsys.modules['numba'] = None\n" + SORT
    output, errors = run_python(code).communicate(timeout=300)
    assert output.split()[:3] == SORTED, errors


def test_scipy_is_not_loaded_for_code_that_needs_none_and_is_there_for_code_that_does() -> None:
    pytest.importorskip("scipy")
    code = SORT + (
        "import sys\n"
        "from numba.np import arraymath\n"
        "print('scipy.linalg' in sys.modules, arraymath._HAVE_BLAS)\n"
        "import scipy.linalg.cython_blas\n"
        "print('dgemm' in scipy.linalg.cython_blas.__pyx_capi__)\n"
    )
    output, errors = run_python(code).communicate(timeout=300)
    assert output.split()[-3:] == ["False", "True", "True"], errors
