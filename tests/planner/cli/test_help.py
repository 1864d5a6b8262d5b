"""Help that can be trusted: every example parses, completion is written for every shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mhcplan.planner.cli import build_app, main
from mhcplan.planner.cli.app import _GROUPS
from mhcplan.planner.cli.examples import EXAMPLES

ROOT = Path(__file__).parents[3]
LINES = [line for lines in EXAMPLES.values() for line in lines]


def test_every_example_is_of_a_command_that_there_is() -> None:
    app = build_app()
    names = set(app) | set(app["profile"])
    assert set(EXAMPLES) <= names


@pytest.mark.parametrize("line", LINES)
def test_example_parses(line: str) -> None:
    assert len(line) <= 78
    program, *words = shlex.split(line)
    assert program == "mhcplan"
    command, bound, _ = build_app().parse_args(words, exit_on_error=False, print_error=False)
    assert callable(command)
    assert bool(bound.arguments) == (len(words) > 1)


@pytest.mark.parametrize("command", ["predict", "compare", "explain"])
def test_help_ends_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    tail = " ".join(out.split("Examples:")[1].split())
    assert tail == " ".join(EXAMPLES[command])


def test_help_begins_with_what_one_asks_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    places = [out.index(f"│ {name} ") for name in ("predict", "explain", "init", "run", "--help")]
    assert places == sorted(places)
    assert set(build_app()) == {name for names in _GROUPS.values() for name in names} | {
        "--help", "-h", "--version", "--install-completion"
    }  # fmt: skip


@pytest.mark.parametrize("command", ["predict", "sweep", "plan", "run"])
def test_defaults_that_say_nothing_are_not_shown(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert not any(f"[default: {value}]" in out for value in ("False", "None", "[]"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZDOTDIR", str(tmp_path))
    monkeypatch.delenv("ZSH_CUSTOM", raising=False)
    with pytest.raises(SystemExit) as exit_:
        main(["--install-completion", "--shell", shell])
    assert exit_.value.code == 0
    written = [file for file in tmp_path.rglob("*mhcplan*") if file.is_file()]
    assert any("--schedule" in file.read_text(encoding="utf-8") for file in written)


def test_shell_that_is_unknown_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--install-completion", "--shell", "tcsh"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_layouts_that_are_not_modelled_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, what in (("--tp", "tensor"), ("--cp", "context"), ("--fsdp", "fully sharded data")):
        with pytest.raises(SystemExit) as exit_:
            main(["predict", "mhc-27b", flag, "2"])
        said = capsys.readouterr().err
        assert (exit_.value.code, said.count("\n")) == (2, 1)
        assert f"{what} parallelism is not modelled" in said


def test_commands_are_listed_where_no_extra_is_installed() -> None:
    """Help, completion and the hint at an unknown command load every command's module."""
    extras = (
        "torch", "triton", "fastapi", "starlette", "uvicorn", "pebble", "optuna", "pyarrow",
        "dask", "distributed", "ray",
    )  # fmt: skip
    code = f"""
import sys
sys.modules.update(dict.fromkeys({extras}))
from mhcplan.planner.cli import build_app, main
from mhcplan.planner.cli.app import _GROUPS
assert "--schedule" in build_app().generate_completion(shell="bash")
main(["forecast"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('mhcplan: Unknown command "forecast"')
