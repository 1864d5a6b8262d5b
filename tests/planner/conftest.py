"""What tests of the planner share: golden files, a profile of made-up times, the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mhcplan.planner.cli import main
from mhcplan.profiles.schema import profile_text
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.commands import Run

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` asserts that the file holds the text, or writes it there if asked."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden", default=False):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"differs from golden/{name}"

    return check


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a profile file."""
    file = tmp_path_factory.mktemp("profile") / "synthetic.json"
    file.write_text(profile_text(synthetic_profile()), encoding="utf-8")
    return str(file)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(list(words))
        said = capfd.readouterr()
        return int(exit_.value.code or 0), said.out, said.err

    return call
