"""Machine code is kept on disk where that is possible, and nothing breaks where it is not."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any, NamedTuple

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
    (file,) = Path(cache).rglob("*.o")
    kept, written_ns = file.read_bytes(), file.stat().st_mtime_ns
    output, errors = run_python(SORT, NUMBA_CACHE_DIR=cache).communicate(timeout=300)
    assert output.split()[:3] == SORTED, errors
    assert file.stat().st_mtime_ns == written_ns, "used, not remade"
    for damaged in (b"", b"cut short", kept[:-1], kept[:-9] + b"elsewhere"):
        file.write_bytes(damaged)
        output, errors = run_python(SORT, NUMBA_CACHE_DIR=cache).communicate(timeout=300)
        assert output.split()[:3] == SORTED, errors
        assert len(file.read_bytes()) == len(kept), "made anew"


PREDICT = """
from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import predict
from mhcplan.sim.jit import has_numba
plan = {"model": "mhc-3b", "layout": {"pp": 2}, "microbatches": 4}
print(predict(make_plan(plan)).step.timeline.step_ns, has_numba())
"""


def test_a_process_that_finds_code_on_disk_needs_no_numba(tmp_path: Path) -> None:
    said: list[str] = []
    for before in ("", "import sys; sys.modules['numba'] = None"):
        process = run_python(before + PREDICT, NUMBA_CACHE_DIR=str(tmp_path))
        output, errors = process.communicate(timeout=600)
        assert output.endswith("True\n"), errors
        said.append(output)
    assert said[0] == said[1]


def test_code_that_is_missing_where_numba_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    words = "predict", "mhc-3b", "--pp", "2", "--microbatches", "4"
    ask = f"from mhcplan.planner.cli import main; main({words})"
    first = run_python(ask, NUMBA_CACHE_DIR=str(tmp_path))
    _, errors = first.communicate(timeout=600)
    assert first.returncode == 0, errors
    next(tmp_path.rglob("*compiled_loop*.o")).unlink()
    broken = "import sys; sys.modules['numba'] = None\n"
    process = run_python(broken + ask, NUMBA_CACHE_DIR=str(tmp_path))
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("mhcplan: numba cannot be imported (")
    assert errors.endswith("), mend it with: pip install --force-reinstall numba\n")
    assert errors.count("\n") == 1


def test_threads_that_start_together_make_the_code_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    begin = Barrier(2)

    def machine_code(function: Callable[..., Any], _: object) -> Callable[..., Any]:
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


def test_a_full_disk_stops_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    process = run_python(full + SORT, NUMBA_CACHE_DIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    output, errors = process.communicate(timeout=300)
    assert output.split()[:3] == SORTED, errors
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


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


def test_without_numba_the_same_comes_slowly(tmp_path: Path) -> None:
    code = "import sys\nsys.modules['numba'] = None\n" + SORT + "print(jit.has_numba())"
    output, errors = run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).communicate(timeout=300)
    assert [*output.split()[:3], output.split()[-1]] == [*SORTED, "False"], errors


class Shelf(NamedTuple):
    rows: Any
    marks: Any


def weigh(shelf: Shelf, factor: int, sums: jit.Ints) -> bool:
    for row in range(shelf.rows.shape[0]):
        for column in range(shelf.rows.shape[1]):
            sums[row] += factor * shelf.rows[row, column] - shelf.marks[column]
    return sums[0] > sums[1]


def double(values: jit.Ints) -> None:
    for i in range(len(values)):
        values[i] *= 2


def at_most_nine(value: int) -> int:
    if value > 9:
        raise ValueError
    return value


def test_machine_code_does_what_python_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(jit, "has_numba", lambda: True)
    weighed, doubled = jit.compiled(weigh), jit.compiled(double)
    for rows in ([[1, 2, 3], [4, 5, 6]], [[9, 8, 7], [1, 1, 1]]):
        shelf = Shelf(np.array(rows, np.int32), np.array([True, False, True]))
        by_machine, by_python = jit.ints([10, 20]), jit.ints([10, 20])
        assert weighed(shelf, np.int64(3), by_machine) == weigh(shelf, 3, by_python)
        assert by_machine.tolist() == by_python.tolist()
        assert doubled(by_machine) is None
        assert by_machine.tolist() == (2 * by_python).tolist()
    doubled(jit.ints([]))
    with pytest.raises(TypeError, match=r"double is compiled for \['l'\], not for \['i'\]"):
        doubled(np.array([1], np.int32))
    with pytest.raises(TypeError, match="contiguous"):
        doubled(jit.ints([1, 2, 3, 4])[::2])
    assert len(list(tmp_path.iterdir())) == 2
    assert jit.compiled(at_most_nine)(7) == 7
    assert len(list(tmp_path.iterdir())) == 2, "it asks for numba, so it is not kept"


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
