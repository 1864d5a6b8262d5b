"""The documents: their commands and their Python run, and what they show is what comes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mhcplan.planner.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = re.compile(r"^```text\n\$ (mhcplan .*)\n((?:.*\n)*?)```$", re.MULTILINE)
LIKE = 8  # letters by which a paragraph is known again when its figures change

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


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


def test_readme_shows_commands() -> None:
    assert len(lines("sh")) >= 8
    assert "make demo" in lines("sh make")


@every_document
def test_commands_of_a_document_run_in_order(
    document: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))  # sweeps keep a store there
    for block in blocks(document, "sh"):
        for line in block.splitlines():
            program, *words = shlex.split(line)
            assert program == "mhcplan", line
            with pytest.raises(SystemExit) as exit_:
                main(words)
            assert exit_.value.code == 0, f"{line}\n{capsys.readouterr().err}"


@every_document
def test_python_of_a_document_runs_in_order(document: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(document, "python"):
        exec(compile(block, str(document), "exec"), names)


@every_document
def test_answers_in_a_document_are_what_the_commands_say(
    document: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """A block that begins with ``$ mhcplan`` shows paragraphs of what the command says.

    ``--update-golden`` writes what it says today.
    """

    def today(found: re.Match[str]) -> str:
        command, shown = found.groups()
        with pytest.raises(SystemExit):
            main(shlex.split(command)[1:])
        said = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
        paragraphs = [_as_of_today(text, said) for text in shown.strip("\n").split("\n\n")]
        return "\n".join(["```text", f"$ {command}", "\n\n".join(paragraphs), "```"])

    text = document.read_text(encoding="utf-8")
    current = SHOWN.sub(today, text)
    if request.config.getoption("--update-golden"):
        document.write_text(current, encoding="utf-8")
    elif text != current:
        pairs = zip(text.splitlines(), current.splitlines(), strict=True)
        shown, said = next((a, b) for a, b in pairs if a != b)
        pytest.fail(
            f"{document.name} shows {shown!r}, now it is {said!r}; pytest"
            " tests/test_documents.py --update-golden writes what it is now"
        )


def _as_of_today(shown: str, said: str) -> str:
    """The paragraph of ``said`` that begins like ``shown``, as many lines of it."""
    begins = shown[:LIKE]
    found = next((text for text in said.split("\n\n") if text.startswith(begins)), None)
    assert found is not None, f"nothing in the output begins with {begins!r}"
    return "\n".join(found.splitlines()[: len(shown.splitlines())])


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
        launcher, command, words = line.partition("mhcplan profile measure ")
        assert command, line
        assert not launcher or launcher.startswith("torchrun "), line
        for word in shlex.split(words):
            assert not word.startswith("--") or word in options, line


@every_document
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert "://" in target or (document.parent / target).exists(), target


def test_site_is_built_without_a_warning_and_has_every_command(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "cli.html").read_text(encoding="utf-8")
    for name in ("predict", "compare", "explain", "profile measure"):
        assert f"mhcplan {name}" in commands
    functions = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("predict", "sweep", "plan", "compare", "export"):
        assert f'id="mhcplan.planner.api.{name}"' in functions
