"""The house: how it is packed, pinned requirements, the gates."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mhcplan

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
FOLDERS = ("sim", "kernels", "profiles", "planner", "runtime", "web")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# -- package ---------------------------------------------------------------------------------------


def test_every_folder_imports_under_the_package_only() -> None:
    for folder in FOLDERS:
        link = ROOT / "src" / "mhcplan" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..", "..", folder)
        assert (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "src" / "mhcplan" / "py.typed").exists()


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = "import sys, mhcplan; print(*[m for m in sys.modules if m.startswith('mhcplan.')])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_public_names_are_there_and_no_others() -> None:
    assert sorted(mhcplan.__all__) == dir(mhcplan)
    for name in mhcplan.__all__:
        assert getattr(mhcplan, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'forecast'"):
        mhcplan.forecast  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_every_requirement_is_pinned_to_what_was_tested() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {_name(line) for line in text.splitlines() if "==" in line}
    project = PYPROJECT["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert {_name(requirement) for requirement in needed} <= pinned


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


# -- gates -----------------------------------------------------------------------------------------


def test_ci_is_executable_and_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "make test" in script.read_text(encoding="utf-8")


def test_no_module_is_longer_than_600_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {count}"
        for folder in (*FOLDERS, "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 600
    ]
    assert not long


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sim/_broken.py", "import mhcplan.profiles.specs"),
        ("kernels/_broken.py", "import mhcplan.sim.program"),
        ("profiles/_broken.py", "import mhcplan.planner.plan.spec"),
        ("profiles/_broken.py", "import mhcplan.kernels"),
        ("planner/_broken.py", "import torch"),
        ("planner/_broken.py", "import mhcplan.profiles.capture"),
        ("web/_broken.py", "import mhcplan.runtime"),
        ("runtime/_broken.py", "import mhcplan.planner.plan.spec"),
    ],
)
def test_import_contracts_catch(
    module: str, line: str, tmp_path: Path, copy_of_tree: Callable[[Path], None]
) -> None:
    copy_of_tree(tmp_path)
    (tmp_path / module).write_text(f"{line}\n")
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")}, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout


@pytest.fixture
def copy_of_tree() -> Callable[[Path], None]:
    """Copies the package, its symlinks and its configuration, modules only."""

    def copy(to: Path) -> None:
        for folder in FOLDERS:
            for path in (ROOT / folder).rglob("*.py"):
                target = to / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        package = to / "src" / "mhcplan"
        package.mkdir(parents=True)
        for folder in FOLDERS:
            (package / folder).symlink_to(Path("..", "..", folder))
        (package / "__init__.py").write_bytes((ROOT / "src/mhcplan/__init__.py").read_bytes())
        (to / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())

    return copy
