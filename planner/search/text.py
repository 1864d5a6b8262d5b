"""A search's answer for people: the best plan in a line, what lost and why, and what was proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.planner.report.table import Section, print_section
from mhcplan.planner.report.text import gb, ms
from mhcplan.planner.search.branch_and_bound import BAND_PERCENT
from mhcplan.planner.search.report import plan_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from mhcplan.planner.search.report import Choice, SearchReport

_REASONS_SHOWN = 4


def search_headline(report: SearchReport) -> str:
    """The answer in one line."""
    if not report.best:
        left = (
            ""
            if not report.space.unknown
            else (f"; {report.space.unknown:,} not looked at: more --seconds may find one")
        )
        return (
            f"no plan for {report.gpus} GPUs of {gb(report.memory_limit_bytes)} GB and"
            f" {report.global_batch} sequences a step was found{left}"
        )
    first = report.best[0]
    figures = first.figures
    n = first.plan.residual.num_rows
    return (
        f"n={n} on {report.gpus} GPUs: {plan_words(first.plan, figures.recompute_block)}:"
        f" {ms(figures.step_time_ns)} ms a step ({figures.overhead_percent:+.2f} % over the plain"
        f" residual), {figures.tokens_per_second:,} tokens/s, {gb(figures.device_memory_bytes)} of"
        f" {gb(report.memory_limit_bytes)} GB"
    )


def print_search(report: SearchReport, console: Console) -> None:
    """Write the answer to a terminal, or as plain text to a file."""
    from rich.text import Text

    style = "bold green" if report.best else "bold red"
    console.print(Text(search_headline(report), style=style), soft_wrap=True)
    if report.best:
        title = "Best plans of different layouts or schedules"
        print_section(_choices(title, report.best), console)
        title = "Time against memory: no plan that was played beats these in both"
        print_section(_choices(title, report.front), console)
    if report.runner_up is not None:
        console.print(Text(f"\nWhy the second lost: {report.runner_up}"), soft_wrap=True)
    console.print(Text("\nWhat is proven:"))
    for line in (*_proof(report), *report.notes):
        console.print(Text(f"- {line}"), soft_wrap=True)
    console.print(Text(f"\nAgain: {report.command}"), soft_wrap=True)


def _proof(report: SearchReport) -> Iterator[str]:
    space = report.space
    yield (
        f"{space.plans:,} plans train {report.global_batch} sequences a step on {report.gpus} GPUs:"
        f" {space.played:,} played by the engine, {space.bounded:,} bounded away,"
        f" {space.too_large:,} too large, {space.unpriced:,} without measurements,"
        f" {space.unknown:,} unknown ({report.seconds:.0f} s)"
    )
    if report.method == "sampled":
        yield "the space is too large to be bounded: Optuna chose what was played"
    elif report.proven and space.unknown:
        yield "no other plan is faster; the front may lack some of the unknown plans"
    elif report.proven:
        yield f"no other plan is faster; the front is complete up to {BAND_PERCENT:.0f} % slower"
    if report.possible_gain_percent == 100:
        yield "some unknown plans were not looked at: more --seconds may find a faster one"
    elif report.possible_gain_percent is not None:
        yield f"an unknown plan could be faster by {report.possible_gain_percent:.2f} % at most"
    for reason, count in list(space.illegal.items())[:_REASONS_SHOWN]:
        yield f"no plan: {reason} ({count:,} combinations)"
    for reason, count in list(space.unpriced_reasons.items())[:1]:
        yield f"without measurements: {reason} ({count:,} plans)"


def _choices(title: str, choices: Sequence[Choice]) -> Section:
    """Plans and their figures; tokens/s are left out, as all train the same tokens a step."""
    columns = (
        "pp", "ep", "dp", "micro", "M", "schedule", "L_r", "priority", "step ms", "overhead %",
        "memory GB",
    )  # fmt: skip
    return Section(title, columns, tuple(map(_choice, choices)))


def _choice(choice: Choice) -> tuple[str, ...]:
    plan, figures = choice.plan, choice.figures
    layout = plan.layout
    return (
        str(layout.pp), str(layout.ep), str(layout.dp), str(plan.micro_batch_size),
        str(plan.microbatches), plan.schedule, str(figures.recompute_block or "none"),
        plan.priority, ms(figures.step_time_ns), f"{figures.overhead_percent:+.2f}",
        gb(figures.device_memory_bytes),
    )  # fmt: skip
