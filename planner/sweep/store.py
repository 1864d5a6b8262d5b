"""Finished points on disk, so that no point is worked out twice: not after Ctrl-C, nor next week.

A SQLite file, because points arrive one batch at a time, from several sweeps at once, and must be
there after a kill: SQLite commits each batch whole, lets writers take turns, and comes with Python.
(Parquet files cannot be added to, and DuckDB lets in one process only; both read what a sweep
exports.) A point is known by the digests of its plan and its profile, by the method, and by the
digest of the code that worked it out: change any and it is another point.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import ValidationError

from mhcplan.planner.output import OutputError
from mhcplan.planner.sweep.row import Outcome

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from importlib.resources.abc import Traversable
    from types import TracebackType

    from mhcplan.planner.sweep.row import Method

LOCK_SECONDS = 10.0  # how long to wait for another sweep's turn
STORE_VERSION = 1

_APPLICATION_ID = 0x6D686370  # "mhcp", in SQLite's header
_CREATE = """
CREATE TABLE IF NOT EXISTS outcomes (
    plan_digest TEXT, profile_digest TEXT, method TEXT, code_digest TEXT,
    plan TEXT NOT NULL, outcome TEXT NOT NULL,
    UNIQUE (plan_digest, profile_digest, method, code_digest)
)
"""
_READ = """
SELECT outcome FROM outcomes
WHERE plan_digest = ? AND profile_digest = ? AND method = ? AND code_digest = ?
"""
_WRITE = "INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?, ?, ?)"


class StoreError(OutputError):
    """A store that cannot be used; the message is one line."""


class PointKey(NamedTuple):
    """What a stored point is known by, beside the code."""

    plan_digest: str
    profile_digest: str
    method: Method


class SweepStore:
    """An open store. What cannot be written for now is kept and tried again with the next batch."""

    def __init__(self, path: Path) -> None:
        """Open or create the store.

        Raises:
            StoreError: no permission, another kind of file, damaged, newer, or locked for long.
        """
        self.path = path
        with self._named_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
            self._prepare()
        self._unwritten: dict[PointKey, tuple[str, Outcome]] = {}

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def read(self, keys: Iterable[PointKey]) -> dict[PointKey, Outcome]:
        """Outcomes of those of ``keys`` that are stored; one that cannot be read is not.

        Raises:
            StoreError: the file is damaged, or locked for long.
        """
        found: dict[PointKey, Outcome] = {}
        with self._named_errors():
            for key in keys:
                row = self._file.execute(_READ, (*key, code_digest())).fetchone()
                try:
                    if row is not None:
                        found[key] = Outcome.model_validate_json(row[0])
                except ValidationError:
                    continue
        return found

    def write(self, outcomes: Iterable[tuple[PointKey, str, Outcome]]) -> None:
        """Store outcomes, with their plans as JSON, in one transaction; or keep them for the next.

        That the disk is full or the file locked is no reason to stop working out points:
        :meth:`flush` says so at the end.
        """
        self._unwritten |= {key: (plan, outcome) for key, plan, outcome in outcomes}
        self.flush()

    def flush(self) -> str | None:
        """Store what could not be stored yet; returns why that fails, None if nothing is left."""
        rows = [
            (*key, code_digest(), plan, outcome.model_dump_json())
            for key, (plan, outcome) in self._unwritten.items()
        ]
        if not rows:
            return None
        try:
            with self._named_errors(), self._transaction():
                self._file.executemany(_WRITE, rows)
        except StoreError as error:
            return str(error)
        self._unwritten.clear()
        return None

    def _prepare(self) -> None:
        """Check whose file it is, and that it can be written."""
        with self._transaction():
            # SQLite's schema is read and the file is locked for writing by now
            application, version = (
                self._pragma(name) for name in ("application_id", "user_version")
            )
            empty = self._pragma("page_count") <= 1
            if not empty and application != _APPLICATION_ID:
                raise StoreError(f"{self.path}: is a database, but not a store of mhcplan sweep")
            if version > STORE_VERSION:
                raise StoreError(
                    f"{self.path}: version {version} is newer than this mhcplan reads"
                    f" (up to {STORE_VERSION}); upgrade mhcplan"
                )
            self._file.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._file.execute(f"PRAGMA user_version = {STORE_VERSION}")
            self._file.execute(_CREATE)

    def _pragma(self, name: str) -> int:
        return self._file.execute(f"PRAGMA {name}").fetchone()[0]

    @contextmanager
    def _transaction(self) -> Generator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        except BaseException:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise

    @contextmanager
    def _named_errors(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {_reason(error)}") from None
        except OSError as error:
            raise StoreError(f"{error.filename or self.path}: {error.strerror}") from None


def default_store() -> Path:
    """The store of a user who names none: in the folder for caches (``XDG_CACHE_HOME``)."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "mhcplan" / "sweeps.sqlite"


@cache
def code_digest() -> str:
    """sha256 of the code that works out points: other code may give other figures."""
    digest = hashlib.sha256()
    for folder in ("planner", "profiles", "sim"):
        for name, code in _modules_of(files("mhcplan").joinpath(folder), folder):
            digest.update(name.encode() + b"\0" + code)
    return digest.hexdigest()


def _modules_of(folder: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    """Path and code of every module in a folder and its folders, in one order on any machine."""
    for entry in sorted(folder.iterdir(), key=_name):
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            yield from _modules_of(entry, path)
        elif path.endswith(".py"):
            yield path, entry.read_bytes()


def _name(entry: Traversable) -> str:
    return entry.name


def _reason(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the primary code
    match code:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return f"is locked by another process for more than {LOCK_SECONDS:.0f} s"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return f"is damaged or no sweep store ({error}); move it away, or name another --store"
        case sqlite3.SQLITE_FULL:
            return "no space left on the disk"
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return "cannot be written (no permission, or a folder); name another --store"
        case _:
            return str(error)
