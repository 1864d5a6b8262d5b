"""What is worked out once and kept for the next that ask for it, within a limit of size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Value = TypeVar("Value")


def _one(_: object) -> int:
    return 1


class Kept(Generic[Value]):
    """Values by key; those unused for longest go when all together are larger than ``limit``, which
    counts values where nothing says how large they are.

    Two threads that ask for the same at once may both make it.
    """

    def __init__(self, limit: int, size_of: Callable[[Value], int] = _one) -> None:
        self._limit, self._size_of = limit, size_of
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._size = 0  # of all together
        self._lock = threading.Lock()

    def find(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value that was kept, or else is made now."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            if key in self._values:
                self._size -= self._size_of(self._values.pop(key))
            self._values[key] = made
            self._size += self._size_of(made)
            while self._size > self._limit:
                self._size -= self._size_of(self._values.popitem(last=False)[1])
        return made

    def forget(self) -> None:
        """Keep nothing of what there is."""
        with self._lock:
            self._values.clear()
            self._size = 0
