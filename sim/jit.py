"""Machine code from plain functions: made once by numba, kept on disk, called as C is called.

:func:`compiled` makes a function run as machine code; :func:`usable_in_compiled` lets compiled
functions call a plain one, which stays plain for everybody else. Both leave what the function does
unchanged: they are written in the part of Python that numba knows, over integers and arrays.

What numba makes (:mod:`mhcplan.sim.jit_numba`) is object code that needs nothing of numba: a later
process hands it to LLVM and never loads numba, which takes longer than to play a step. It is kept
in a folder named after all that it was made from and for, so that no stale code is ever run. The
folder is in ``NUMBA_CACHE_DIR``, else in the user's cache, else beside this file; where none can be
written to, code is made anew in each process.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
from contextlib import suppress
from ctypes import CFUNCTYPE, addressof, c_int64, c_void_p
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import ArrayLike, NDArray

    P = ParamSpec("P")
    R = TypeVar("R")

MISSING_NUMBA = "numba is missing, add it with: pip install numba"
ENTRY = "entry"
"""The symbol of a compiled function in its object code."""
_FOLDER = Path(__file__).parent
_Start = c_int64 * 0


class Ints(Protocol):
    """What compiled code sees of an int64 array; a list will do in plain Python."""

    def __getitem__(self, i: int, /) -> int: ...  # noqa: D105
    def __setitem__(self, i: int, value: int, /) -> None: ...  # noqa: D105
    def __len__(self) -> int: ...  # noqa: D105


class NumbaError(ValueError):
    """Code that is not kept cannot be made; the message is one line."""


_helpers: list[Callable[..., Any]] = []
_engines: list[Any] = []  # machine code lives as long as the engine that loaded it
_lock = threading.Lock()


@cache
def has_numba() -> bool:
    """Whether compiled functions are compiled; without numba they run as plain Python, slowly."""
    try:
        folder = _cache_folder()
        if folder is None or not any(folder.glob("*.o")):
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

    Arguments are integers, contiguous and writable arrays of them, and named tuples of both; of the
    same types in every call, and not by keyword. The result is None, an integer, or 1 or 0 for true
    or false. The function must not raise nor make arrays nor use an index below 0, and must be free
    to run without the GIL. A call raises :class:`NumbaError` where other code was found on disk,
    this is not there, and numba cannot be imported.
    """
    code: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: object) -> object:
        if not code:
            with _lock:
                if not code:  # another thread may have made it while this one waited
                    code.append(_machine_code(function, args))
        return code[0](*args)

    return cast("Callable[P, R]", call)


def ints(values: ArrayLike) -> NDArray[np.int64]:
    """The one kind of array that compiled functions take: int64, contiguous, aligned, writable."""
    return np.require(values, np.int64, ["C", "A", "W"])


def _machine_code(function: Callable[..., Any], args: tuple[object, ...]) -> Callable[..., Any]:
    """What does the same as ``function``, fast, for arguments of the types of ``args``."""
    if not has_numba():
        return function
    _, kinds = _laid_out(args)
    object_code = _object_code(function, args, ",".join(kinds))
    entry = _load(object_code, None if returns_nothing(function) else c_int64)

    def call(*args: object) -> object:
        words, given = _laid_out(args)
        if given != kinds:
            raise TypeError(f"{function.__name__} is compiled for {kinds}, not for {given}")
        return entry((c_int64 * len(words))(*words))

    return call


def _object_code(function: Callable[..., Any], args: tuple[object, ...], kinds: str) -> bytes:
    folder = _cache_folder()
    name = f"{function.__module__}.{function.__qualname__}"
    file = folder and folder / f"{name}-{_digest(kinds.encode())[:8].decode()}.o"
    object_code = file and _kept(file)
    if object_code is None:
        try:
            numba = import_module("mhcplan.sim.jit_numba")
        except ImportError as error:  # what is kept had stood in for it so far
            raise NumbaError(
                f"numba cannot be imported ({error}), mend it with: pip install --force-reinstall"
                " numba"
            ) from None
        made = numba.compile_function(function, _helpers, args)
        object_code = made.object_code
        if file and made.stands_alone:
            _keep(file, object_code)
    return object_code


def returns_nothing(function: Callable[..., Any]) -> bool:
    """Whether a compiled function returns None, by its annotation."""
    return function.__annotations__["return"] in {None, "None"}


def _laid_out(args: tuple[object, ...]) -> tuple[list[int], list[str]]:
    """What an entry is told of arguments: of a tuple its parts, of an array where it begins and its
    shape, or an integer; and of which kind each was.

    Raises:
        TypeError: an array is read-only or not contiguous.
    """
    words: list[int] = []
    kinds: list[str] = []

    def add(value: Any) -> None:  # noqa: ANN401
        if isinstance(value, tuple):
            for part in cast("tuple[object, ...]", value):
                add(part)
        elif isinstance(value, (int, np.integer)):
            words.append(int(cast("int", value)))
            kinds.append("int")
        else:
            words.extend((addressof(_Start.from_buffer(value)), *value.shape))
            kinds.append(value.dtype.char * value.ndim)

    add(args)
    return words, kinds


def _load(object_code: bytes, result: type[c_int64] | None) -> Callable[..., Any]:
    """The entry of object code, as a function of an array of words; it runs without the GIL."""
    llvm: Any = import_module("llvmlite.binding")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
    engine.finalize_object()
    _engines.append(engine)
    return CFUNCTYPE(result, c_void_p)(engine.get_function_address(ENTRY))


def _kept(file: Path) -> bytes | None:
    """Object code that :func:`_keep` wrote; LLVM is not to see any that is cut short or foreign."""
    try:
        digest, object_code = file.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return object_code if digest == _digest(object_code) else None


def _keep(file: Path, object_code: bytes) -> None:
    """Write whole or not at all: other processes do so at the same time, and disks are full."""
    with suppress(OSError), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        written = Path(folder, file.name)
        written.write_bytes(_digest(object_code) + b"\n" + object_code)
        written.replace(file)


@cache
def _cache_folder() -> Path | None:
    """A folder for machine code that can be written to, or None.

    Raises:
        ImportError: numba or LLVM are not installed.
    """
    name = f"code-{_digest(*_origin())[:16].decode()}"
    for base in _cache_bases():
        folder = base / name
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


def _origin() -> Iterator[bytes]:
    """What machine code depends on: this processor, who made it, and everything in this folder, as
    compiled functions call each other across files."""
    llvm: Any = import_module("llvmlite.binding")
    yield llvm.get_host_cpu_name().encode()
    yield llvm.get_host_cpu_features().flatten().encode()
    for text in (sys.version, version("numba"), version("llvmlite")):
        yield text.encode()
    for file in sorted(_FOLDER.glob("*.py")):
        yield file.read_bytes()


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"\n".join(parts)).hexdigest().encode()
