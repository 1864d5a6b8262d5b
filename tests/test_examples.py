"""Examples in docstrings are true."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(("mhcplan", *file.relative_to(ROOT).with_suffix("").parts))
    for folder in ("planner", "profiles", "sim", "web")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_a_module(module: str) -> None:
    if "capture" in module:
        pytest.importorskip("torch")
    failed, tried = doctest.testmod(import_module(module))
    assert tried
    assert not failed
