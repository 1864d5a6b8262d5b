"""The house: documents whose commands run, pinned requirements, how it is packed, the gates."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mhcplan
from mhcplan.planner.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
FOLDERS = ("sim", "kernels", "profiles", "planner", "runtime", "web")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def blocks(document: Path, language: str) -> Iterator[str]:
    """Code blocks of a document whose info string is ``language``."""
    text = document.read_text(encoding="utf-8")
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lines(language: str) -> list[str]:
    """Lines of such blocks in all documents."""
    return [
        line
        for document in DOCUMENTS
        for block in blocks(document, language)
        for line in block.splitlines()
        if line and not line.startswith("#")
    ]


# -- documents -------------------------------------------------------------------------------------


def test_readme_shows_commands() -> None:
    assert len(lines("sh")) >= 8
    assert "make demo" in lines("sh make")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_a_document_run_in_order(
    document: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(document, "sh"):
        for line in block.splitlines():
            program, *words = shlex.split(line)
            assert program == "mhcplan", line
            with pytest.raises(SystemExit) as exit_:
                main(words)
            assert exit_.value.code == 0, f"{line}\n{capsys.readouterr().err}"


def test_answer_in_the_readme_is_what_the_command_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((command, shown),) = re.findall(r"^```text (mhcplan .*)\n(.*?)^```", text, re.M | re.S)
    with pytest.raises(SystemExit):
        main(shlex.split(command)[1:])
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for line in shown.splitlines():
        assert line in said, f"README.md shows {line!r}; now it is {said[0]!r} and so on"


def test_python_of_the_documents_runs() -> None:
    for document in DOCUMENTS:
        for block in blocks(document, "python"):
            exec(compile(block, str(document), "exec"), {})


def test_pip_lines_do_what_make_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = next(line for line in lines("sh pip") if "mhcplan predict" in line)
    assert demo.removeprefix(".venv/bin/") in makefile
    installs = [line for line in lines("sh pip") if "pip install" in line]
    assert [shlex.split(line)[-1] for line in installs] == [".", ".[test]"]


def test_make_targets_of_the_documents_exist() -> None:
    for line in lines("sh make"):
        done = subprocess.run(
            [*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == 0, line


def test_measure_options_of_the_documents_exist(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    with pytest.raises(SystemExit):
        main(["profile", "measure", "--help"])
    options = capsys.readouterr().out
    for line in lines("sh gpu"):
        assert line.startswith("mhcplan profile measure "), line
        for word in shlex.split(line):
            assert not word.startswith("--") or word in options, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert "://" in target or (document.parent / target).exists(), target


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
        ("profiles/_broken.py", "import mhcplan.planner.spec"),
        ("profiles/_broken.py", "import mhcplan.kernels"),
        ("planner/_broken.py", "import torch"),
        ("planner/_broken.py", "import mhcplan.profiles.capture"),
        ("web/_broken.py", "import mhcplan.runtime"),
        ("runtime/_broken.py", "import mhcplan.planner.spec"),
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
