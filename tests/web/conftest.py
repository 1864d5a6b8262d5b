"""A real server in a process of its own, as ``mhcplan web`` starts it, and a real browser."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mhcplan.planner.cli import main
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SMALL = "model=mhc-3b&pp=2&microbatches=4"  # a step that is played at once


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The address of a server that runs with these options; it is interrupted at the end."""
    command = [sys.executable, "-c", "from mhcplan.planner.cli import main; main()", "web"]
    with subprocess.Popen(
        [*command, "--no-open", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    ) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        try:
            address = re.search(r"http://[^/]+", said)
            assert address, said
            yield address[0]
        finally:
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
    assert "Traceback" not in said, said


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile file that prices everything, also with n = 16."""
    path = tmp_path_factory.mktemp("profiles") / "made-up.json"
    path.write_text(synthetic_profile().model_dump_json(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def server(profile: Path) -> Iterator[str]:
    """A server's address, shared by the tests of a worker."""
    with serving("--profiles", str(profile)) as address:
        yield address


def refused(*words: str) -> str:
    """What ``mhcplan`` says on standard error when it refuses these words: one line."""
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert said.getvalue().count("\n") == 1
    return said.getvalue()


def chromium() -> str:
    """The browser of the system, or the reason to skip."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return found
