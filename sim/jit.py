"""Machine code from plain functions, by numba: the one place where numba is seen.

:func:`compiled` makes a function run as machine code; :func:`usable_in_compiled` lets compiled
functions call a plain one, which stays plain for everybody else. Both leave what the function does
unchanged: they are written in the part of Python that numba knows, over integers and arrays.

Code is kept on disk, in a folder named after the content of every file that holds such functions,
so that no stale code is ever run: numba itself only looks at the file of the outermost function.
The folder is in ``NUMBA_CACHE_DIR``, else in the user's cache, else beside this file; where none
can be written to, code is made anew in each process.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import ArrayLike, NDArray

    P = ParamSpec("P")
    R = TypeVar("R")

MISSING_NUMBA = "numba is missing, add it with: pip install numba"
_FOLDER = Path(__file__).parent
# No reference counts: functions that make no arrays need none, and they took three quarters of the
# time. Divisions by zero give anything and stop nothing.
_OPTIONS: dict[str, Any] = {"_nrt": False, "error_model": "numpy"}
# Only machine code calls helpers; unpacking Python's named tuples for them took a quarter of the
# time that compiling takes.
_NO_WRAPPERS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class Ints(Protocol):
    """What compiled code sees of an int64 array; a list will do in plain Python."""

    def __getitem__(self, i: int, /) -> int: ...  # noqa: D105
    def __setitem__(self, i: int, value: int, /) -> None: ...  # noqa: D105
    def __len__(self) -> int: ...  # noqa: D105


_helpers: list[Callable[..., Any]] = []
_registered: set[Callable[..., Any]] = set()
_lock = threading.Lock()


@cache
def has_numba() -> bool:
    """Whether compiled functions are compiled; without numba they run as plain Python, slowly."""
    try:
        import_module("numba")
    except ImportError:
        return False
    return True


def usable_in_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let compiled functions call this one; it is returned as it is."""
    _helpers.append(function)
    return function


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` as machine code, made at its first call or taken from disk.

    Arguments are integers, int64 arrays (:func:`ints`) and named tuples of arrays, of the same
    types in every call. It must not raise nor make arrays nor use an index below 0, and must be
    free to run without the GIL.
    """
    code: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not code:
            return _first_call(function, code, *args, **kwargs)
        return code[0](*args, **kwargs)

    return call


def ints(values: ArrayLike) -> NDArray[np.int64]:
    """The one kind of array that compiled functions take: int64, contiguous, aligned, writable."""
    return np.require(values, np.int64, ["C", "A", "W"])


def _first_call(
    function: Callable[P, R], code: list[Callable[P, R]], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Make the machine code and call it; trouble with the cache must not stop the program."""
    with _lock:
        if not code:  # another thread may have made it while this one waited
            made = _machine_code(function, cached=True)
            _load_numba_alone()
            try:
                result = _compile_and_call(made, *args, **kwargs)
            except Exception:  # a full disk, a file cut short, a numba that is made otherwise:
                made = _machine_code(function, cached=False)  # again without cache and shortcut
                result = made(*args, **kwargs)
            code.append(made)
            return result
    return code[0](*args, **kwargs)


def _compile_and_call(made: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Make the machine code, where no index counts from the end of an array: to look whether one
    does, at every access, took a third of the engine's time.

    numba has no switch for that. The function that adds the look stands aside, for this thread.
    """
    if not has_numba():
        return made(*args, **kwargs)
    arrays: Any = import_module("numba.np.arrayobj")
    usual, thread = getattr(arrays, "fix_integer_index", None), threading.get_ident()
    if usual is None:  # another numba: slower
        return made(*args, **kwargs)

    def fix_integer_index(context: Any, builder: Any, kind: Any, index: Any, size: Any) -> Any:  # noqa: ANN401
        if threading.get_ident() != thread:
            return usual(context, builder, kind, index, size)
        return context.cast(builder, index, kind, import_module("numba").types.intp)

    arrays.fix_integer_index = fix_integer_index
    try:
        return made(*args, **kwargs)
    finally:
        arrays.fix_integer_index = usual


def _machine_code(function: Callable[P, R], *, cached: bool) -> Callable[P, R]:
    if not has_numba():
        return function
    numba: Any = import_module("numba")
    register_jitable: Any = import_module("numba.extending").register_jitable
    for helper in _helpers:
        if helper not in _registered:
            register_jitable(**_OPTIONS, **_NO_WRAPPERS, forceinline=True)(helper)
            _registered.add(helper)
    folder = _cache_folder() if cached else None
    if folder is None:
        return numba.njit(nogil=True, **_OPTIONS)(function)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        return numba.njit(nogil=True, cache=True, **_OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = before


@cache
def _load_numba_alone() -> None:
    """Load what numba loads at its first function, without scipy: it would import all of
    ``scipy.linalg``, in a third of a second, only to see that it is there.

    While that module is loaded a stand-in says so; code that calls BLAS imports the real one.
    """
    wanted = "scipy.linalg.cython_blas"
    if not has_numba() or wanted in sys.modules or find_spec("scipy") is None:
        return
    sys.modules[wanted] = ModuleType(wanted)
    try:
        import_module("numba.np.arraymath")
    finally:
        del sys.modules[wanted]


@cache
def _cache_folder() -> Path | None:
    """A folder for machine code that can be written to, or None."""
    for base in _cache_bases():
        folder = base / f"code-{_sources_digest()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    return None


def _cache_bases() -> Iterator[Path]:
    wanted = os.environ.get("NUMBA_CACHE_DIR")
    if wanted:
        yield Path(wanted) / "mhcplan"
    try:
        home = Path.home()
    except RuntimeError:  # no home folder can be found
        home = None
    users = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if users:
        yield Path(users) / "mhcplan"
    elif home is not None:
        yield home / ".cache" / "mhcplan"
    yield _FOLDER / "__pycache__"


def _sources_digest() -> str:
    """A digest of everything in this folder: compiled functions call each other across files."""
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(_FOLDER.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
