"""Made-up reports for tests of what shows them; the figures add up and mean nothing."""

from __future__ import annotations

from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.report.schema import (
    COMPONENT_FIELDS,
    BreakdownNs,
    PlanReport,
    RankMemory,
    SourcesPercent,
    overhead_percent,
)

GB = 10**9


def make_report(**changes: object) -> PlanReport:
    """A report of mhc-27b, 2 ranks: 1,100 ms against 1,000 ms, 60 GB at most, 80 GB allowed."""
    parts = {"compute": 700, "mhc": 100, "recompute": 50, "optimizer": 50, "bubble": 200}
    plain = {"compute": 700, "optimizer": 50, "bubble": 250}
    memory = (rank_memory(40 * GB), rank_memory(60 * GB))
    plan = make_plan({"model": "mhc-27b"})
    values: dict[str, object] = {
        "mhcplan_version": "0.0.0",
        "plan": plan,
        "plan_digest": plan.digest(),
        "profile_digest": "0" * 64,
        "command": "mhcplan predict mhc-27b",
        "gpus": 64,
        "step_time_ns": 1_100_000_000,
        "baseline_step_time_ns": 1_000_000_000,
        "overhead_percent": overhead_percent(1_100_000_000, 1_000_000_000),
        "tokens_per_second": 1_906_501,
        "bubble_percent": 100 * 200 / 1100,
        "reported_rank": 1,
        "breakdown_ns": breakdown(parts),
        "baseline_breakdown_ns": breakdown(plain),
        "recompute_block": 6,
        "fits": True,
        "memory_limit_bytes": 80 * GB,
        "peak_memory_bytes": 60 * GB,
        "baseline_peak_memory_bytes": 50 * GB,
        "memory": memory,
        "sources_percent": SourcesPercent(measured=75, interpolated=15, extrapolated=0, assumed=10),
        "num_ops": 123_456,
        "engine": "simpy",
        "warnings": ("nothing here is real",),
    }
    return PlanReport.model_validate(values | changes)


def breakdown(parts_ms: dict[str, int]) -> BreakdownNs:
    """Milliseconds by class; what is left out is 0."""
    filled = dict.fromkeys(BreakdownNs.model_fields, 0) | parts_ms
    return BreakdownNs(**{name: value * 1_000_000 for name, value in filled.items()})


def rank_memory(peak: int) -> RankMemory:
    """Half of the peak is activations, the rest parameters; 1 GB of margin, 2 GB of context."""
    parts = dict.fromkeys(COMPONENT_FIELDS, 0)
    parts |= {"activations_bytes": peak // 2, "parameters_bytes": peak - peak // 2}
    return RankMemory(
        **parts, peak_bytes=peak, reserved_bytes=peak + GB, device_bytes=peak + 3 * GB
    )
