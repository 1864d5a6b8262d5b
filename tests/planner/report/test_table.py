"""Tables on terminals of any width: figures stand whole, and 80 columns are enough."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mhcplan.planner.report.table import Section, print_section
from mhcplan.planner.report.text import sections
from tests.support.reports import make_report

CHOICES = Section(
    "Best plans",
    ("pp", "ep", "dp", "micro", "M", "schedule", "L_r", "priority", "step ms", "overhead %", "GB"),
    (
        ("2", "8", "4", "2", "8", "zbv", "2", "recompute", "2,621.12", "+8.49", "81.64"),
        ("16", "8", "1", "1", "64", "interleaved-1f1b", "stage", "post", "12,657.99", "-0.49", "-"),
    ),
)


def printed(section: Section, width: int) -> list[str]:
    """The lines of a table on a terminal of ``width`` columns."""
    text = io.StringIO()
    print_section(section, Console(file=text, width=width, highlight=False))
    return [line.rstrip() for line in text.getvalue().splitlines()]


@given(st.integers(10, 200))
def test_figures_are_never_cut(width: int) -> None:
    words = " ".join(printed(CHOICES, width)).split()
    for row in CHOICES.rows:
        for figure in (*row[:5], *row[8:]):
            assert figure in words


def test_eighty_columns_hold_the_tables_of_a_search_and_of_a_report() -> None:
    for section in (CHOICES, *sections(make_report())):
        lines = printed(section, 80)
        assert max(map(len, lines)) <= 80
        for row in section.rows:
            assert any(
                line.split()[0] == row[0].split()[0] and line.endswith(row[-1])
                for line in lines
                if line
            )


def test_names_stand_in_one_line_where_there_is_room() -> None:
    narrow, wide = (printed(CHOICES, width) for width in (80, 120))
    assert len(narrow) == len(wide) + 1
    assert "overhead %" in wide[2]


def test_words_stand_left_and_figures_right() -> None:
    lines = printed(Section("", ("name", "ms"), (("a", "1.00"), ("b", "10.00"), ("c", ""))), 80)
    assert lines == ["", "name     ms", "───────────", "a      1.00", "b     10.00", "c"]


@given(st.integers(70, 120))
def test_a_table_that_fits_folds_no_word(width: int) -> None:
    rows = (("1", "interleaved-1f1b", "1.00", ""), ("2", "zbv", "12,345.67", ""))
    lines = printed(Section("", ("n", "schedule", "step ms", ""), rows), width)
    assert lines[-2:] == ["1  interleaved-1f1b       1.00", "2  zbv               12,345.67"]


def test_what_is_too_wide_stays_whole_or_wraps_between_words() -> None:
    rows = (("a rather long name of something", "1.00"),)
    lines = printed(Section("", ("", "ms"), rows), 24)
    assert [line.split() for line in lines[3:]] == [
        ["a", "rather", "long", "name", "1.00"], ["of", "something"]
    ]  # fmt: skip
