"""A report for people: one line that answers, then tables. The terminal and the HTML page share it.

:func:`headline` and :func:`sections` say everything; :func:`print_report` writes it.
Times are shown in ms, sizes in GB (10^9 bytes, as GPUs are sold).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.planner.report.schema import BreakdownNs, RankMemory
from mhcplan.planner.report.table import Section, print_section

if TYPE_CHECKING:
    from rich.console import Console

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.report.schema import PlanReport

CLASS_NAMES = {
    "compute": "model compute",
    "mhc": "mHC kernels",
    "recompute": "recompute",
    "optimizer": "optimizer",
    "exposed_ep": "waiting for experts' traffic",
    "exposed_pp": "waiting for pipeline messages",
    "exposed_dp": "waiting for gradient reduction",
    "host": "waiting for the host",
    "bubble": "pipeline bubble",
}


def ms(ns: int) -> str:
    """Nanoseconds as milliseconds.

    >>> ms(1_234_567_890)
    '1,234.57'
    """
    return f"{ns / 1e6:,.2f}"


def gb(num_bytes: int) -> str:
    """Bytes as GB.

    >>> gb(79_500_000_000)
    '79.50'
    """
    return f"{num_bytes / 1e9:,.2f}"


_RISKY_PERCENT = 5.0  # of drawn runs that run out of memory, from which on the answer says so
_RESIDUAL_NAMES = {
    "mhc": "mHC",
    "hc": "HC",
    "identity": "identity HC",
    "mhc-lite": "mHC-lite",
    "mhc-single-pass": "single-pass mHC",
}


def residual_name(plan: PlanSpec) -> str:
    """The residual in a word: ``mHC n=4``, ``HC n=2``, ``plain residual``."""
    residual = plan.residual
    if residual.is_plain:
        return "plain residual"
    return f"{_RESIDUAL_NAMES[residual.kind]} n={residual.expansion_rate}"


def headline(report: PlanReport) -> str:
    """The answer in one line: overhead, recompute block, peak memory, and whether it fits."""
    spare = report.memory_limit_bytes - report.device_memory_bytes
    verdict = (
        f"fits with {gb(spare)} GB to spare"
        if spare >= 0
        else f"does NOT fit: {gb(-spare)} GB over"
    )
    if spare >= 0 and is_risky(report):
        verdict += f", but {_risk(report)}"
    memory = (
        f"peak memory {gb(report.peak_memory_bytes)} GB, with allocator, NCCL and context"
        f" {gb(report.device_memory_bytes)} of {gb(report.memory_limit_bytes)} GB: {verdict}"
    )
    return f"{_time_line(report)}; {memory}"


def is_risky(report: PlanReport) -> bool:
    """Whether a plan that fits as predicted may well run out of memory."""
    found = report.intervals
    return found is not None and (found.out_of_memory_percent or 0) >= _RISKY_PERCENT


def _risk(report: PlanReport) -> str:
    assert report.intervals is not None
    return f"{report.intervals.out_of_memory_percent:.0f} % risk of running out of memory"


def _time_line(report: PlanReport) -> str:
    if report.plan.residual.is_plain:
        return f"plain residual: {ms(report.step_time_ns)} ms a step"
    block = report.recompute_block
    recompute = f"recompute block {block} sites" if block else "no recompute"
    return (
        f"{residual_name(report.plan)}: {report.overhead_percent:+.2f} % step time"
        f" ({ms(report.step_time_ns)} ms against {ms(report.baseline_step_time_ns)} ms);"
        f" {recompute}"
    )


def certainty(report: PlanReport) -> str:
    """How sure the answer is, in one line; empty where nobody asked."""
    found = report.intervals
    if found is None:
        return ""
    low, high = found.step_time_ns
    parts = [f"step {ms(low)} to {ms(high)} ms"]
    if not report.plan.residual.is_plain:
        parts.append("overhead {:+.2f} to {:+.2f} %".format(*found.overhead_percent))
    if found.device_memory_bytes is not None and found.out_of_memory_percent is not None:
        least, most = found.device_memory_bytes
        parts.append(f"memory {gb(least)} to {gb(most)} GB, {_risk(report)}")
    of_what = (
        f"op times' spread and the model's error, measured in {_runs(found.num_measured_runs)}"
        if found.num_measured_runs
        else "op times' spread only, the model's own error is not measured yet"
    )
    return f"{found.coverage_percent:.0f} % interval: {', '.join(parts)} ({of_what})"


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count > 1)}"


def remarks(report: PlanReport) -> tuple[str, ...]:
    """What is assumed, simplified and missing."""
    notes = report.intervals.notes if report.intervals else ()
    return (*report.warnings, *(f"intervals: {note}" for note in notes))


def sections(report: PlanReport) -> tuple[Section, ...]:
    """The tables below the headline."""
    return (_run(report), _time(report), _memory(report), _sources(report))


def _run(report: PlanReport) -> Section:
    plan, layout = report.plan, report.plan.layout
    rows = (
        ("model", f"{plan.model.name}, {residual_name(plan)}"),
        ("GPUs", f"{report.gpus} = pp {layout.pp} x ep {layout.ep} x dp {layout.dp}"),
        (
            "schedule",
            f"{plan.schedule}, {plan.microbatches} microbatches of {plan.tokens:,} tokens",
        ),
        ("throughput", f"{report.tokens_per_second:,} tokens/s of the whole job"),
        ("pipeline bubble", f"{report.bubble_percent:.2f} % of the busiest rank's step"),
        ("power limit", power_words(report)),
        ("simulated", f"{report.num_ops:,} ops, {report.engine} engine, profile {plan.profile}"),
    )
    return Section("Run", ("", ""), rows)


def power_words(report: PlanReport) -> str:
    """What the GPU's power limit does to the step and to its baseline."""
    slower, baseline = report.power_slowdown_percent, report.baseline_power_slowdown_percent
    if slower is None or baseline is None:
        return "left out: full clock"
    if not slower and not baseline:
        return "not reached: full clock"
    words = f"arithmetic takes {slower:.1f} % longer"
    return words if report.plan.residual.is_plain else f"{words}, the baseline's {baseline:.1f} %"


def _time(report: PlanReport) -> Section:
    plain = report.plan.residual.is_plain
    columns = ("", "ms", "% of step") if plain else (
        "", "ms", "% of step", "baseline ms", "difference ms", "% of baseline",
    )  # fmt: skip
    rows = [_time_row(report, name, plain=plain) for name in BreakdownNs.model_fields]
    total = ("step", ms(report.step_time_ns), "100.00")
    if not plain:
        base = report.baseline_step_time_ns
        total += (ms(base), ms(report.step_time_ns - base), f"{report.overhead_percent:+.2f}")
    title = f"Where the step goes (rank {report.reported_rank}, the busiest)"
    return Section(title, columns, (*rows, total))


def _time_row(report: PlanReport, name: str, *, plain: bool) -> tuple[str, ...]:
    ns = _part(report.breakdown_ns, name)
    row = (CLASS_NAMES[name], ms(ns), f"{100 * ns / report.step_time_ns:.2f}")
    if plain:
        return row
    base = _part(report.baseline_breakdown_ns, name)
    share = 100 * (ns - base) / report.baseline_step_time_ns
    return (*row, ms(base), ms(ns - base), f"{share:+.2f}")


def _part(breakdown: BreakdownNs, name: str) -> int:
    return getattr(breakdown, name)


def _memory(report: PlanReport) -> Section:
    fullest = report.fullest_rank
    words = {
        "peak_bytes": "peak allocated",
        "reserved_bytes": "with the allocator's margin",
        "device_bytes": "with NCCL and CUDA context",
    }
    rows: list[tuple[str, ...]] = []
    for name in RankMemory.model_fields:
        ranks: list[int] = [getattr(rank, name) for rank in report.memory]
        word = words.get(name, name.removesuffix("_bytes"))
        rows.append((word, gb(ranks[fullest]), gb(min(ranks)), gb(max(ranks))))
    limit = gb(report.memory_limit_bytes)
    title = f"Memory of a GPU, GB (limit {limit}); components at the instant of the peak"
    columns = ("", f"rank {fullest}, the fullest", "least of all ranks", "most")
    return Section(title, columns, tuple(rows))


def _sources(report: PlanReport) -> Section:
    shares = report.sources_percent
    words = {
        "measured": "measured at this shape on this device",
        "interpolated": "between measured shapes",
        "extrapolated": "up to 4x outside the measured shapes",
        "assumed": "published or datasheet figures",
    }
    rows = tuple((words[name], f"{getattr(shares, name):.2f}") for name in words)
    return Section("Where durations come from", ("", "% of op time"), rows)


def print_report(report: PlanReport, console: Console) -> None:
    """Write the report to a terminal, or as plain text to a file."""
    from rich.text import Text

    style = "bold red" if not report.fits else "bold yellow" if is_risky(report) else "bold green"
    console.print(Text(headline(report), style=style), soft_wrap=True)
    if report.intervals:
        console.print(Text(certainty(report)), soft_wrap=True)
    for section in sections(report):
        print_section(section, console)
    said = remarks(report)
    if said:
        console.print(Text("\nAssumed and simplified:"))
        for remark in said:
            console.print(Text(f"- {remark}"), soft_wrap=True)
    console.print(Text(f"\nAgain: {report.command}"), soft_wrap=True)
