"""Object code of compiled functions, by numba and LLVM, for :mod:`mhcplan.sim.jit`.

An *entry* is a C function of one argument: int64 words that say what the arguments are, in the
order in which ``jit`` lays them out. Everything that it calls is inlined.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate, count
from typing import TYPE_CHECKING, Any, NamedTuple

from mhcplan.sim.jit import ENTRY, returns_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

# both are typed in part only
llvm: Any = import_module("llvmlite.binding")
numba: Any = import_module("numba")
types: Any = numba.types
extending: Any = import_module("numba.extending")
# No reference counts: functions that make no arrays need none, and they took three quarters of the
# time. Divisions by zero give anything and stop nothing.
_OPTIONS: dict[str, Any] = {"_nrt": False, "error_model": "numpy"}
# Only machine code calls these; unpacking Python's named tuples for them took a quarter of the
# time that compiling takes.
_INLINED = _OPTIONS | {
    "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True
}  # fmt: skip
_registered: set[Callable[..., Any]] = set()


class Compiled(NamedTuple):
    """Object code, and whether it can be loaded where numba is not."""

    object_code: bytes
    stands_alone: bool


def compile_function(
    function: Callable[..., Any], helpers: Sequence[Callable[..., Any]], args: tuple[object, ...]
) -> Compiled:
    """Make an entry that calls ``function`` with arguments of the types of ``args``."""
    for called in (*helpers, function):
        if called not in _registered:
            extending.register_jitable(**_INLINED)(called)
            _registered.add(called)
    try:
        with _for_our_loops():
            entry = _entry(function, args)
    except Exception:  # a numba that is made otherwise: slower code
        entry = _entry(function, args)
    module = llvm.parse_assembly(entry.inspect_llvm())
    module.get_function(entry.native_name).name = ENTRY
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3,
        codemodel="jitdefault", jit=True,
    )  # fmt: skip
    symbols = (*module.functions, *module.global_variables)
    outside = [symbol.name for symbol in symbols if symbol.is_declaration]
    alone = all(name.startswith("llvm.") for name in outside)
    return Compiled(machine.emit_object(module), alone)


def _entry(function: Callable[..., Any], args: tuple[object, ...]) -> Any:  # noqa: ANN401
    kind = numba.typeof(args)

    @extending.intrinsic
    def arguments(_: Any, words: Any) -> Any:  # noqa: ANN401
        def build(context: Any, builder: Any, _: Any, given: Any) -> Any:  # noqa: ANN401
            place = count()

            def word() -> Any:  # noqa: ANN401
                at = context.get_constant(types.intp, next(place))
                return builder.load(builder.gep(given[0], [at]))

            def value(kind: Any) -> Any:  # noqa: ANN401
                if isinstance(kind, types.BaseTuple):
                    return context.make_tuple(builder, kind, [value(part) for part in kind])
                if not isinstance(kind, types.Array):
                    return word()
                array = context.make_array(kind)(context, builder)
                data = builder.inttoptr(word(), array.data.type)
                shape = [word() for _ in range(kind.ndim)]
                item = context.get_abi_sizeof(context.get_data_type(kind.dtype))
                size = context.get_constant(types.intp, item)
                strides = [*accumulate(reversed(shape[1:]), builder.mul, initial=size)][::-1]
                context.populate_array(
                    array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None
                )
                return array._getvalue()

            return value(kind)

        return kind(words), build

    def call(words: Any) -> Any:  # noqa: ANN401
        return function(*arguments(words))

    def call_only(words: Any) -> None:  # noqa: ANN401
        function(*arguments(words))

    nothing = returns_nothing(function)
    signature = (types.void if nothing else types.int64)(types.CPointer(types.int64))
    return numba.cfunc(signature, **_OPTIONS)(call_only if nothing else call)


@contextmanager
def _for_our_loops() -> Generator[None]:
    """Compile without a look whether an index counts from the end of an array, which at every
    access took a third of the engine's time, and without vectors, as most loops go over two or
    three ops: 0.93 of the time.

    numba has no switch for the look. The function that adds it stands aside, for this thread.
    """
    arrays: Any = import_module("numba.np.arrayobj")
    config = numba.config
    usual, vectors, thread = arrays.fix_integer_index, config.LOOP_VECTORIZE, threading.get_ident()

    def fix_integer_index(context: Any, builder: Any, kind: Any, index: Any, size: Any) -> Any:  # noqa: ANN401
        if threading.get_ident() != thread:
            return usual(context, builder, kind, index, size)
        return context.cast(builder, index, kind, types.intp)

    arrays.fix_integer_index, config.LOOP_VECTORIZE = fix_integer_index, 0
    try:
        yield
    finally:
        arrays.fix_integer_index, config.LOOP_VECTORIZE = usual, vectors
