"""An explanation for people: sentences, then tables."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from mhcplan.planner.report.table import Section, print_section
from mhcplan.planner.report.text import CLASS_NAMES, gb, ms

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console

    from mhcplan.planner.explain.explanation import Explanation, PathShare, Phase, WhatIf

_NAMED = 3  # parts of the path that a sentence names
_OPS_AT_MOST = 10
_NOTICEABLE_PERCENT = 0.005  # rounds to 0.01 %

# On the critical path traffic is no wait of one rank: it is what the whole step waits for.
_PATH_NAMES = CLASS_NAMES | {
    "exposed_ep": "experts' traffic",
    "exposed_pp": "pipeline messages",
    "exposed_dp": "gradient reduction",
    "host": "host threads",
}
_PHASES = {
    "warm-up": "until every rank computes",
    "steady": "until the first rank has done its microbatches",
    "drain": "until all ranks have",
    "update": "what is left of reduction, optimizer and gather",
}
_REASONS = {
    "stream": "the op before it on its stream",
    "event": "an op of another stream, through an event",
    "peer": "the other end of a transfer",
    "link": "a transfer that held its link",
    "priority": "a more urgent op, or one that held its SMs",
    "sms": "thread blocks of a kernel that were on the SMs it needs",
    "host": "the host to issue it",
    "start": "nothing: the step began",
    "end": "nothing: the step ended with it",
}


def sentences(explanation: Explanation) -> Iterator[str]:
    """The explanation in words: the path, what would help most, and the phases."""
    yield (
        f"The step takes {ms(explanation.step_time_ns)} ms: its critical path has"
        f" {explanation.path_pieces:,} pieces and changes rank {explanation.rank_changes} times;"
        f" it is {_list(explanation.path)}."
    )
    slowed_percent = 100 * explanation.slowed_ns / explanation.step_time_ns
    if slowed_percent > _NOTICEABLE_PERCENT:
        yield (
            f"{slowed_percent:.2f} % of the step is what kernels on it take longer than alone:"
            " beside traffic, or held up by more urgent ones."
        )
    yield from _help(explanation)
    for phase in explanation.phases:
        if phase.end_ns > phase.begin_ns:
            yield _phase(phase)


def _phase(phase: Phase) -> str:
    length = ms(phase.end_ns - phase.begin_ns)
    return f"{phase.name.capitalize()}, {_PHASES[phase.name]}, {length} ms: {_list(phase.path)}."


def _help(explanation: Explanation) -> Iterator[str]:
    """The best of each kind of what-if."""
    costs = next((w for w in explanation.what_ifs if w.kind != "plan"), None)
    if costs is not None and costs.time_percent < -_NOTICEABLE_PERCENT:
        yield f"With {costs.name} it would take {-costs.time_percent:.2f} % less time."
    plans = [w for w in explanation.what_ifs if w.kind == "plan"]
    fitting = [w for w in plans if w.fits]
    if not explanation.fits:
        yield "The plan does not fit in memory."
    if not fitting:
        if plans:
            yield "Of the plans one field away, none fits in memory."
    elif not explanation.fits or fitting[0].time_percent < -_NOTICEABLE_PERCENT:
        yield (
            f"Of the plans one field away that fit, {fitting[0].name} is the fastest:"
            f" {fitting[0].time_percent:+.2f} % time a token,"
            f" {gb(fitting[0].device_memory_bytes)} GB of memory."
        )
    else:
        yield "Of the plans one field away, none that fits is faster."


def _list(shares: tuple[PathShare, ...]) -> str:
    parts = [f"{share.percent:.2f} % {_PATH_NAMES[share.name]}" for share in shares[:_NAMED]]
    rest = sum(share.percent for share in shares[_NAMED:])
    return ", ".join([*parts, f"{rest:.2f} % other"] if rest else parts)


def sections(explanation: Explanation) -> tuple[Section, ...]:
    """The tables below the sentences."""
    return (
        _path(explanation),
        _shares("Ops on the critical path", islice(explanation.ops, _OPS_AT_MOST)),
        _waits(explanation),
        _what_ifs(explanation.what_ifs),
    )


def _path(explanation: Explanation) -> Section:
    phases = [phase for phase in explanation.phases if phase.end_ns > phase.begin_ns]
    times = [{share.name: share.time_ns for share in phase.path} for phase in phases]
    rows = [
        (
            _PATH_NAMES[share.name],
            *(ms(time.get(share.name, 0)) for time in times),
            ms(share.time_ns),
            f"{share.percent:.2f}",
        )
        for share in explanation.path
    ]
    lengths = (ms(phase.end_ns - phase.begin_ns) for phase in phases)
    total = ("step", *lengths, ms(explanation.step_time_ns), "100.00")
    columns = ("", *(f"{phase.name} ms" for phase in phases), "step ms", "% of step")
    return Section("The critical path", columns, (*rows, total))


def _shares(title: str, shares: Iterable[PathShare]) -> Section:
    rows = tuple((share.name, ms(share.time_ns), f"{share.percent:.2f}") for share in shares)
    return Section(title, ("", "ms", "% of step"), rows)


def _waits(explanation: Explanation) -> Section:
    rows = tuple(
        (
            _REASONS.get(wait.reason, wait.reason),
            f"{wait.count:,}",
            ms(wait.time_ns),
            f"{wait.percent:.2f}",
        )
        for wait in explanation.waits
    )
    columns = ("", "pieces", "ms", "% of step")
    return Section(
        "What the next piece of the path waited for, and how long it took", columns, rows
    )


def _what_ifs(what_ifs: tuple[WhatIf, ...]) -> Section:
    rows = tuple(
        (
            what_if.name,
            f"{what_if.time_percent:+.2f}",
            ms(what_if.step_time_ns),
            gb(what_if.device_memory_bytes),
            "" if what_if.fits else "does not fit",
        )
        for what_if in what_ifs
    )
    columns = ("", "time a token %", "step ms", "memory GB", "")
    return Section("What would help, each simulated", columns, rows)


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Write the explanation to a terminal, or as plain text to a file."""
    from rich.text import Text

    for number, sentence in enumerate(sentences(explanation)):
        console.print(Text(sentence, style="" if number else "bold"), soft_wrap=True)
    for section in sections(explanation):
        print_section(section, console)
    console.print(Text(f"\nAgain: {explanation.command}"), soft_wrap=True)
