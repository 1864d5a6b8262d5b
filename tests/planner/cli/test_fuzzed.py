"""Plan files that somebody broke: an answer, or exit code 2 and one line, never a traceback."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhcplan.planner.cli import main
from mhcplan.planner.plan.file import commented_plan_text, plan_text
from mhcplan.planner.plan.spec import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLAN = make_plan({"model": "mhc-3b", "layout": {"pp": 2, "ep": 8}, "microbatches": 4})
TEXTS = (plan_text(PLAN), commented_plan_text(PLAN))
VALUES = (
    "0", "-1", "7", "1.5", "nan", "inf", "1e400", "9" * 30, '""', '"x"', '"auto"', "[]", "[1]",
    "{}", "true", '"\\u0000"', "1979-05-27", "0x10", '"80GB"', '"1e999GB"', "9223372036854775808",
)  # fmt: skip
LINES = (
    "zzz = 1", "[layout]", "[[model]]", "tp = 2", "a.b.c = 1", "model.x = 1", "[model.residual]"
)  # fmt: skip
MARKS = ('"', "[", "=", "\x00", "\x7f", "\xe9", "#", "\n", ".")


def replace_value(lines: list[str], at: int, value: str) -> None:
    name, equals, _ = lines[at].partition("=")
    lines[at] = f"{name}{equals} {value}"


def insert_mark(lines: list[str], at: int, mark: str) -> None:
    middle = len(lines[at]) // 2
    lines[at] = lines[at][:middle] + mark + lines[at][middle:]


def edits() -> st.SearchStrategy[Callable[[list[str], int], None]]:
    """Ways to break a line of a file."""
    return st.one_of(
        st.sampled_from(VALUES).map(lambda v: lambda lines, at: replace_value(lines, at, v)),
        st.sampled_from(LINES).map(lambda line: lambda lines, at: lines.insert(at, line)),
        st.sampled_from(MARKS).map(lambda mark: lambda lines, at: insert_mark(lines, at, mark)),
        st.just(lambda lines, at: lines.insert(at, lines[at])),
        st.just(lambda lines, at: lines.pop(at)),
        st.just(lambda lines, at: lines.__setitem__(slice(at, None), [])),
    )


@given(
    st.sampled_from(TEXTS),
    st.lists(st.tuples(edits(), st.integers(0, 10**6)), min_size=1, max_size=3),
)
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_broken_plan_file_is_a_plan_or_one_line(
    tmp_path: Path, text: str, broken: list[tuple[Callable[[list[str], int], None], int]]
) -> None:
    lines = text.splitlines()
    for edit, place in broken:
        if lines:
            edit(lines, place % len(lines))
    file, out, err = tmp_path / "plan.toml", io.StringIO(), io.StringIO()
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    words = ["init", str(file), "--force", "-o", str(tmp_path / "again.toml")]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit_,
    ):
        main(words)
    assert exit_.value.code in (0, 2)
    assert err.getvalue().count("\n") == 1
    assert out.getvalue() == ""
    if exit_.value.code == 2:
        assert err.getvalue().startswith("mhcplan: ")
        assert len(err.getvalue()) < 1000
