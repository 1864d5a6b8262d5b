"""The commands that look into steps: compare, explain."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from mhcplan.planner.cli.flags import PlanFlags
from mhcplan.planner.cli.terminal import COMPILES, note, output, progress
from mhcplan.planner.output import write_files
from mhcplan.planner.plan.spec import PlanSpec

COMPARISON_NAME, PAGE_NAME = "comparison.json", "compare.html"

SideText = Annotated[
    str,
    Parameter(
        help="a preset or a plan file, with flags in one quoted word; or a report or a trace"
        " (.json)",
        allow_leading_hyphen=False,
    ),
]
Json = Annotated[bool, Parameter(negative=(), help="print one JSON object instead of text")]


def compare(a: SideText, b: SideText, /, *, json: Json = False, out: Path | None = None) -> None:
    """Lay two steps side by side: what changed, and what it did, op class by op class.

    Args:
        a: a preset or a plan file, with flags in one quoted word; or a report or a trace (.json)
        b: the same
        json: print one JSON object instead of text
        out: folder for comparison.json and compare.html, with both timelines
    """
    from mhcplan.planner.compare.comparison import compare_sides
    from mhcplan.planner.compare.sides import read_side
    from mhcplan.planner.compare.text import print_comparison

    with progress(f"simulating {a} and {b}", COMPILES):
        sides = read_side(a, plan_of_words), read_side(b, plan_of_words)
        comparison = compare_sides(*sides, shlex.join(["mhcplan", "compare", a, b]))
    try:
        if json:
            print(comparison.to_json())
        else:
            print_comparison(comparison, output())
    finally:
        if out is not None:
            from mhcplan.planner.compare.page import compare_page

            with progress("writing the timelines"):
                page = compare_page(comparison, *sides)
                write_files(out, {COMPARISON_NAME: comparison.to_json() + "\n", PAGE_NAME: page})
            note(f"wrote {out}; open {out / PAGE_NAME} in a browser")


def explain(
    source: Annotated[str, Parameter(name="MODEL|PLAN", allow_leading_hyphen=False)],
    /,
    *,
    flags: PlanFlags | None = None,
    json: Json = False,
) -> None:
    """Say in words why a step takes as long as it does, and simulate what would help.

    Args:
        source: a model preset, or a plan file (.toml)
        flags: what to change in it
        json: print one JSON object instead of text
    """
    from mhcplan.planner.explain.explanation import explain as explain_step
    from mhcplan.planner.explain.text import print_explanation
    from mhcplan.planner.predict import predict

    flags = flags or PlanFlags()
    plan = flags.plan(source)
    command = shlex.join(["mhcplan", "explain", source, *flags.arguments()])
    with progress(f"simulating {plan.model.name} and what would help it", COMPILES):
        explanation = explain_step(predict(plan), command)
    if json:
        print(explanation.to_json())
    else:
        print_explanation(explanation, output())


def plan_of_words(words: list[str]) -> PlanSpec:
    """The plan that a command line's words say: a source and flags.

    Raises:
        SpecError, CycloptsError: no such plan or flag.
    """
    app = App(default_command=_plan, help_flags=[], version_flags=[])
    plan: PlanSpec = app(
        words, exit_on_error=False, print_error=False, result_action="return_value"
    )
    return plan


def _plan(source: str, /, *, flags: PlanFlags | None = None) -> PlanSpec:
    return (flags or PlanFlags()).plan(source)
