"""The wheel holds exactly what git tracks, and runs from an empty environment.

Builds sdist and wheel (the wheel from the sdist, as an installer would), compares the wheel's files
with git's, installs it into a fresh virtual environment without torch and runs the command there,
far from the checkout. Exits 1 with one line on the first difference.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("sim", "kernels", "profiles", "planner", "runtime", "web")


def main() -> None:
    """Build, compare, install and run."""
    with tempfile.TemporaryDirectory(prefix="mhcplan-wheel-") as name:
        scratch = Path(name)
        wheel = build(scratch)
        compare(wheel)
        run_installed(wheel, scratch)
    print(f"wheel: {wheel.name} holds what git tracks and runs from an empty environment")


def build(scratch: Path) -> Path:
    """Build the sdist, and the wheel from it."""
    run([sys.executable, "-m", "build", "--outdir", str(scratch / "dist"), str(ROOT)], cwd=ROOT)
    (wheel,) = (scratch / "dist").glob("*.whl")
    return wheel


def compare(wheel: Path) -> None:
    """Compare the wheel's files under mhcplan/ with git's."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if n.startswith("mhcplan/")}
    listed = run(["git", "ls-files", "-z", *FOLDERS, "src/mhcplan"], cwd=ROOT).split("\0")
    tracked = {
        f"mhcplan/{path.removeprefix('src/mhcplan/')}"
        for path in listed
        if path and not (ROOT / path).is_symlink() and (ROOT / path).exists()
    }
    if packed != tracked:
        sys.exit(
            f"wheel: missing {sorted(tracked - packed)}, not in git {sorted(packed - tracked)};"
            " package-data in pyproject.toml says which files besides modules are packed"
        )


def run_installed(wheel: Path, scratch: Path) -> None:
    """Install the wheel alone and run it: the command works, no folder is importable bare."""
    empty = scratch / "empty"
    venv.create(empty, with_pip=True)
    python = empty / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--constraint", str(ROOT / "constraints.txt"), str(wheel)], cwd=scratch)
    command = str(empty / "bin" / "mhcplan")
    run([command, "--version"], cwd=scratch)
    run([command, "predict", "mhc-3b", "--pp", "2", "--microbatches", "4", "--json"], cwd=scratch)
    bare = ", ".join(repr(name) for name in (*FOLDERS, "torch"))
    check = f"import importlib.util as u; print([n for n in ({bare},) if u.find_spec(n)])"
    importable = run([str(python), "-c", check], cwd=scratch).strip()
    if importable != "[]":
        sys.exit(f"wheel: importable bare, where only mhcplan should be: {importable}")


def run(command: list[str], cwd: Path) -> str:
    """Run a command; if it fails, show what it said and exit 1."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        sys.exit(f"wheel: exit code {done.returncode} of {' '.join(command)}")
    return done.stdout


if __name__ == "__main__":
    main()
