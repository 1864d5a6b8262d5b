"""A comparison for people: one line that answers, then tables, ranked by effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.planner.report.table import Section, print_section
from mhcplan.planner.report.text import CLASS_NAMES, gb, ms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from mhcplan.planner.compare.comparison import Comparison, OpClassChange, OpClassTimes
    from mhcplan.planner.compare.sides import SideFigures

OPS_AT_MOST = 15  # rows of the table of ops; the JSON has them all
_NOTHING = "-"


def headline(comparison: Comparison) -> str:
    """The answer in one line: B's step against A's, then overhead, throughput and memory."""
    a, b = comparison.a, comparison.b
    percent = comparison.step_percent
    length = f"{abs(percent):.2f} % {'longer' if percent > 0 else 'shorter'} than A's"
    if a.step_time_ns == b.step_time_ns:
        length = "as long as A's"
    parts = [f"B's step is {length} ({ms(a.step_time_ns)} -> {ms(b.step_time_ns)} ms)"]
    if a.overhead_percent is not None and b.overhead_percent is not None:
        parts.append(f"overhead {a.overhead_percent:+.2f} -> {b.overhead_percent:+.2f} %")
    if a.tokens_per_second is not None and b.tokens_per_second is not None:
        parts.append(f"{a.tokens_per_second:,} -> {b.tokens_per_second:,} tokens/s")
    if a.device_memory_bytes is not None and b.device_memory_bytes is not None:
        parts.append(f"memory {gb(a.device_memory_bytes)} -> {gb(b.device_memory_bytes)} GB")
    return "; ".join(parts)


def sections(comparison: Comparison) -> tuple[Section, ...]:
    """The tables below the headline."""
    tables = (_sides(comparison), _fields(comparison), _classes(comparison), _ops(comparison))
    return tuple(table for table in tables if table is not None)


def remarks(comparison: Comparison) -> Iterator[str]:
    """What has to be said beside the figures."""
    a, b = comparison.a, comparison.b
    if comparison.fields is None:
        yield "a trace does not say its plan, so what changed in it is not known"
    if comparison.fields == ():
        yield "both have the same plan"
    if (same := comparison.matched) is not None:
        yield (
            f"both ran the same program: of its {same.num_ops:,} ops that take time, B's take"
            f" {same.median_ratio:.3f} times as long as A's at the median, eight in ten"
            f" {same.low_ratio:.3f} to {same.high_ratio:.3f} times"
        )
    if comparison.ops is None:
        yield "a report holds no ops: give its plan (plan.toml lies beside it) to compare them"
    for side in (a, b):
        if side.kind == "measured trace":
            yield f"{side.name} was measured while its ops were recorded, which slows a step down"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Write the comparison to a terminal, or as plain text to a file."""
    from rich.text import Text

    console.print(Text(headline(comparison), style="bold"), soft_wrap=True)
    for section in sections(comparison):
        print_section(section, console)
    console.print()
    for remark in remarks(comparison):
        console.print(Text(f"- {remark}"), soft_wrap=True)
    console.print(Text(f"Again: {comparison.command}"), soft_wrap=True)


def _sides(comparison: Comparison) -> Section:
    rows = tuple(
        (letter, f"{side.name} ({side.kind})")
        for letter, side in (("A", comparison.a), ("B", comparison.b))
    )
    return Section("Sides", ("", ""), rows)


def _fields(comparison: Comparison) -> Section | None:
    if not comparison.fields:
        return None
    rows = tuple((change.field, _plain(change.a), _plain(change.b)) for change in comparison.fields)
    return Section("What changed in the plan", ("", "A", "B"), rows)


def _plain(value: object) -> str:
    return _NOTHING if value is None else str(value)


def _classes(comparison: Comparison) -> Section:
    a, b = comparison.a, comparison.b
    rows = [
        _time_row(CLASS_NAMES[change.name], change.a_ns, change.b_ns, a)
        for change in comparison.classes
    ]
    total = _time_row("step", a.step_time_ns, b.step_time_ns, a)
    columns = ("", "A ms", "B ms", "difference ms", "% of A's step")
    return Section("What it did (busiest rank of each)", columns, (*rows, total))


def _time_row(name: str, a_ns: int, b_ns: int, a: SideFigures) -> tuple[str, ...]:
    share = 100 * (b_ns - a_ns) / a.step_time_ns
    return (name, ms(a_ns), ms(b_ns), _signed_ms(b_ns - a_ns), f"{share:+.2f}")


def _signed_ms(ns: int) -> str:
    return f"{ns / 1e6:+,.2f}"


def _ops(comparison: Comparison) -> Section | None:
    if not comparison.ops:
        return None
    shown = comparison.ops[:OPS_AT_MOST]
    rows = [_op_row(change) for change in shown]
    rest = comparison.ops[OPS_AT_MOST:]
    if rest:
        left = sum(change.difference_ns for change in rest)
        rows.append((f"{len(rest)} others", *[""] * 4, _signed_ms(left), "", ""))
    columns = ("", "ops A", "ops B", "A ms", "B ms", "difference ms", "% of A", "% of B")
    return Section("Ops of a rank, mean of all ranks, by effect", columns, tuple(rows))


def _op_row(change: OpClassChange) -> tuple[str, ...]:
    def cells(times: OpClassTimes | None) -> tuple[str, str, str]:
        if times is None:
            return _NOTHING, _NOTHING, _NOTHING
        return f"{times.count:,.0f}", ms(times.time_ns), f"{times.share_percent:.2f}"

    (count_a, ms_a, share_a), (count_b, ms_b, share_b) = cells(change.a), cells(change.b)
    return (
        f"{change.kind} {change.pass_}", count_a, count_b, ms_a, ms_b,
        _signed_ms(change.difference_ns), share_a, share_b,
    )  # fmt: skip
