"""The answer's figures in words: what stands at the top of the page.

Where a plan is pinned, every figure has the pinned plan's value and what changed from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mhcplan.planner.report.text import gb, ms, residual_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.planner.report.schema import PlanReport


class Fact(NamedTuple):
    """A figure; ``pinned`` and ``change`` are empty where no plan is pinned."""

    label: str
    value: str
    note: str
    pinned: str
    change: str


@dataclass(frozen=True)
class _Figure:
    """How a figure is said of a report, and how its change from one to another."""

    label: str
    value: Callable[[PlanReport], str]
    note: Callable[[PlanReport], str]
    change: Callable[[PlanReport, PlanReport], str]


def facts(report: PlanReport, pinned: PlanReport | None) -> list[Fact]:
    """The figures of ``report``, the first ones first."""
    return [
        Fact(
            figure.label,
            figure.value(report),
            figure.note(report),
            figure.value(pinned) if pinned else "",
            figure.change(pinned, report) if pinned else "",
        )
        for figure in _FIGURES
    ]


def _of_what(report: PlanReport) -> str:
    name = residual_name(report.plan)
    return f"{name} itself" if report.plan.residual.is_plain else f"of {name} over plain"


def _plain_and_power(report: PlanReport) -> str:
    plain, slower = f"plain {ms(report.baseline_step_time_ns)}", report.power_slowdown_percent
    return f"{plain}; power limit: arithmetic +{slower:.1f} %" if slower else plain


def _fits(report: PlanReport) -> str:
    spare = report.memory_limit_bytes - report.device_memory_bytes
    limit = f"{gb(report.memory_limit_bytes)} GB"
    if spare < 0:
        return f"does NOT fit {limit}: {gb(-spare)} over"
    return f"fits {limit}, {gb(spare)} to spare"


def _other_sources(report: PlanReport) -> str:
    shares = report.sources_percent.model_dump(exclude={"measured"})
    return ", ".join(f"{name} {share:.1f}" for name, share in shares.items() if share)


_FIGURES = (
    _Figure(
        "overhead",
        lambda report: f"{report.overhead_percent:+.2f} %",
        _of_what,
        lambda a, b: f"{b.overhead_percent - a.overhead_percent:+.2f} points",
    ),
    _Figure(
        "step",
        lambda report: f"{ms(report.step_time_ns)} ms",
        _plain_and_power,
        lambda a, b: f"{100 * (b.step_time_ns / a.step_time_ns - 1):+.2f} %",
    ),
    _Figure(
        "memory of a GPU",
        lambda report: f"{gb(report.device_memory_bytes)} GB",
        _fits,
        lambda a, b: f"{(b.device_memory_bytes - a.device_memory_bytes) / 1e9:+,.2f} GB",
    ),
    _Figure(
        "tokens/s",
        lambda report: f"{report.tokens_per_second:,}",
        lambda report: f"of all {report.gpus:,} GPUs" if report.gpus > 1 else "of 1 GPU",
        lambda a, b: f"{b.tokens_per_second - a.tokens_per_second:+,}",
    ),
    _Figure(
        "recompute block",
        lambda report: f"{report.recompute_block or 'none'}",
        lambda report: "sites" if report.recompute_block else "",
        lambda a, b: "",
    ),
    _Figure(
        "bubble",
        lambda report: f"{report.bubble_percent:.2f} %",
        lambda report: f"of rank {report.reported_rank}",
        lambda a, b: f"{b.bubble_percent - a.bubble_percent:+.2f} points",
    ),
    _Figure(
        "measured op time",
        lambda report: f"{report.sources_percent.measured:.1f} %",
        _other_sources,
        lambda a, b: f"{b.sources_percent.measured - a.sources_percent.measured:+.1f} points",
    ),
)
