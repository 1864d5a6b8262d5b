"""Machine code is kept on disk where that is possible, and nothing breaks where it is not."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import forget_baselines, predict
from mhcplan.sim import jit, tiling
from mhcplan.sim.longest_path import StepGraph

if TYPE_CHECKING:
    from collections.abc import Callable

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


def test_threads_that_start_together_make_the_code_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    begin = Barrier(2)

    def machine_code(function: Callable[..., Any], *, cached: bool) -> Callable[..., Any]:
        made.append(function.__name__)
        return function

    def double(values: list[int]) -> int:
        return 2 * values[0]

    def call(value: int) -> int:
        begin.wait()
        return doubled([value])

    monkeypatch.setattr(jit, "_machine_code", machine_code)
    for _ in range(20):
        doubled = jit.compiled(double)
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(call, (3, 4))) == [6, 8]
    assert made == ["double"] * 20


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


def test_a_numba_whose_inside_changed_makes_slower_code_and_no_error(tmp_path: Path) -> None:
    # the stand-in that jit puts in takes five arguments; this numba gives it six
    changed = """
import numba.np.arrayobj as arrays
usual = arrays.fix_integer_index
class Changed(type(arrays)):
    def __setattr__(self, name, value):
        if name == "fix_integer_index" and value is not usual:
            value = lambda *args, made=value: made(*args, None)
        super().__setattr__(name, value)
arrays.__class__ = Changed
"""
    output, errors = run_python(changed + SORT, NUMBA_CACHE_DIR=str(tmp_path)).communicate(
        timeout=300
    )
    assert output.split()[:3] == SORTED, errors


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


class FromZeroOn(np.ndarray[tuple[int, ...], np.dtype[np.int64]]):
    """An array that is not read from its end: machine code does not look whether it should be."""

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401
        assert (min(key) if type(key) is tuple else key) >= 0, key
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:  # noqa: ANN401
        assert (min(key) if type(key) is tuple else key) >= 0, key
        super().__setitem__(key, value)


def watched(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, np.ndarray):
        return value.view(FromZeroOn)
    if isinstance(value, tuple):
        return type(value)(*map(watched, value))
    return value


def test_no_compiled_function_counts_from_the_end_of_an_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: set[str] = set()

    def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object) -> object:
            called.add(function.__name__)
            return function(*map(watched, args))

        return call

    known: set[str] = set()
    for file in Path(jit.__file__).parent.glob("*.py"):
        module = import_module(f"mhcplan.sim.{file.stem}")
        for name, found in vars(module).copy().items():
            code = getattr(found, "__code__", None)
            if code is not None and code.co_qualname == "compiled.<locals>.call":
                known.add(name)
                monkeypatch.setattr(module, name, plainly(found.__wrapped__))
    tiling.forget()
    forget_baselines()
    for schedule, contention in (("dualpipe", "on"), ("1f1b", "off")):
        plan = make_plan({
            "model": "mhc-3b", "layout": {"pp": 2}, "microbatches": 4, "schedule": schedule,
            "contention": contention, "power": "unlimited",
        })  # fmt: skip
        step = predict(plan).step
        assert step.timeline.cause.max() > 0
        assert step.memory.held_bytes.max() > 0
        assert StepGraph(step.program).step_ns([step.table])[0] > 0
    tiling.forget()
    assert called == known
