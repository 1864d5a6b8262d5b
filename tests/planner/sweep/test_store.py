"""The store of a sweep: what is in it stays, and trouble with the file is one line."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mhcplan.planner.sweep import store as sweep_store
from mhcplan.planner.sweep.row import Figures, Outcome
from mhcplan.planner.sweep.store import PointKey, StoreError, SweepStore

ROOT = Path(__file__).parents[3]
KEY = PointKey("plan", "profile", "engine")
UNPRICED = Outcome(figures=None, reason="never measured")


def outcome(step_time_ns: int = 1000) -> Outcome:
    figures = Figures(
        recompute_block=4, step_time_ns=step_time_ns, baseline_step_time_ns=900,
        overhead_percent=100 / 9, tokens_per_second=5, peak_memory_bytes=7, device_memory_bytes=8,
        memory_limit_bytes=9, fits=True,
    )  # fmt: skip
    return Outcome(figures=figures)


def key(number: int) -> PointKey:
    return PointKey(f"plan {number}", "profile", "engine")


def test_what_was_written_is_read_by_the_next_sweep(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "store.sqlite"
    with SweepStore(file) as store:
        store.write([(KEY, "{}", outcome()), (key(1), "{}", UNPRICED)])
    with SweepStore(file) as store:
        assert store.read([KEY, key(1), key(2)]) == {KEY: outcome(), key(1): UNPRICED}


@pytest.mark.parametrize(
    "other",
    [
        PointKey("other plan", "profile", "engine"),
        PointKey("plan", "other profile", "engine"),
        PointKey("plan", "profile", "estimate"),
    ],
)
def test_point_of_another_plan_profile_or_method_is_another_point(
    tmp_path: Path, other: PointKey
) -> None:
    with SweepStore(tmp_path / "store") as store:
        store.write([(KEY, "{}", outcome())])
        assert store.read([other]) == {}


def test_point_of_other_code_is_another_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SweepStore(tmp_path / "store") as store:
        store.write([(KEY, "{}", outcome())])
        monkeypatch.setattr(sweep_store, "code_digest", lambda: "another version")
        assert store.read([KEY]) == {}


def test_digest_of_the_code_has_every_module_in_every_folder() -> None:
    digest = hashlib.sha256()
    for folder in ("planner", "profiles", "sim"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    assert sweep_store.code_digest() == digest.hexdigest()


def test_two_sweeps_share_a_store(tmp_path: Path) -> None:
    with SweepStore(tmp_path / "store") as one, SweepStore(tmp_path / "store") as two:
        for number in range(20):
            (one, two)[number % 2].write([(key(number), "{}", outcome(number + 1))])
        keys = [key(number) for number in range(20)]
        assert one.read(keys) == two.read(keys) == {k: outcome(i + 1) for i, k in enumerate(keys)}


def test_points_wait_while_another_process_holds_the_file_and_go_in_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_store, "LOCK_SECONDS", 0.05)
    file = tmp_path / "store"
    with SweepStore(file) as store:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        store.write([(KEY, "{}", outcome())])
        assert store.flush() == f"{file}: is locked by another process for more than 0 s"
        with pytest.raises(StoreError, match="locked"):
            SweepStore(file)
        other.execute("ROLLBACK")
        assert store.flush() is None
        assert store.read([KEY]) == {KEY: outcome()}
        other.close()


def test_disk_that_is_full_loses_no_point_that_was_stored(tmp_path: Path) -> None:
    """A limit on the size of files, so that SQLite meets it as it meets a full disk."""
    file = tmp_path / "store"
    with SweepStore(file) as store:
        store.write([(KEY, "{}", outcome())])
    code = (
        "import resource, sys\n"
        "from tests.planner.sweep.test_store import *\n"
        f"store = SweepStore(Path({str(file)!r}))\n"
        "most = 20_000 + store.path.stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))\n"
        "store.write([(key(n), 'x' * 1000, outcome()) for n in range(100)])\n"
        "print(store.flush())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True
    )
    assert done.stdout.startswith(f"{file}: ")
    assert done.stdout.count("\n") == 1
    with SweepStore(file) as store:
        assert store.read([KEY, *(key(n) for n in range(100))]) == {KEY: outcome()}


def test_full_database_is_said_so(tmp_path: Path) -> None:
    with SweepStore(tmp_path / "store") as store:
        store._file.execute("PRAGMA max_page_count = 4")  # pyright: ignore[reportPrivateUsage]
        store.write([(key(n), "x" * 1000, outcome()) for n in range(100)])
        assert store.flush() == f"{tmp_path / 'store'}: no space left on the disk"


def test_outcome_that_cannot_be_read_is_worked_out_again(tmp_path: Path) -> None:
    with SweepStore(tmp_path / "store") as store:
        store.write([(KEY, "{}", outcome())])
        store._file.execute("UPDATE outcomes SET outcome = '{\"figures\": 5}'")  # pyright: ignore[reportPrivateUsage]
        assert store.read([KEY]) == {}


def test_file_of_another_kind_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    text = "not a database, but somebody's notes\n" * 200
    file.write_text(text, encoding="utf-8")
    with pytest.raises(StoreError, match=r"notes\.txt: is damaged or no sweep store"):
        SweepStore(file)
    assert file.read_text(encoding="utf-8") == text


def test_somebody_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "theirs.sqlite"
    with sqlite3.connect(file) as theirs:
        theirs.execute("CREATE TABLE outcomes (theirs TEXT)")
    before = file.read_bytes()
    with pytest.raises(StoreError, match="not a store of mhcplan sweep"):
        SweepStore(file)
    assert file.read_bytes() == before


def test_damaged_store_is_said_so(tmp_path: Path) -> None:
    file = tmp_path / "store"
    with SweepStore(file) as store:
        store.write([(key(n), "x" * 2000, outcome()) for n in range(50)])
    data = bytearray(file.read_bytes())
    data[4096:] = b"\x55" * (len(data) - 4096)
    file.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"), SweepStore(file) as store:
        store.read([key(n) for n in range(50)])


def test_newer_store_is_refused_by_its_version(tmp_path: Path) -> None:
    file = tmp_path / "store"
    SweepStore(file).__exit__(None, None, None)
    with sqlite3.connect(file) as newer:
        newer.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match="version 7 is newer"):
        SweepStore(file)


def test_folder_in_the_place_of_the_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        SweepStore(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        SweepStore(tmp_path / "store")


def test_place_where_no_file_can_be_made_is_refused() -> None:
    with pytest.raises(StoreError, match=r"/proc/.*: "):
        SweepStore(Path("/proc/mhcplan/store"))
