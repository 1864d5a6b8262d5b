"""PlanReport: the keys of the contract, figures that must add up, and what people read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.report.schema import (
    COMPONENT_FIELDS,
    BreakdownNs,
    Intervals,
    PlanReport,
    json_schema,
    overhead_percent,
    tokens_per_second,
)
from mhcplan.planner.report.text import headline, print_report, sections
from mhcplan.sim.breakdown import CLASSES
from mhcplan.sim.program import COMPONENTS
from tests.support.reports import GB, breakdown, make_report, rank_memory

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMAS = Path(__file__).parents[3] / "docs" / "schemas"

CONTRACT = [
    "format",
    "format_version",
    "mhcplan_version",
    "plan",
    "plan_digest",
    "profile_digest",
    "command",
    "gpus",
    "step_time_ns",
    "baseline_step_time_ns",
    "overhead_percent",
    "tokens_per_second",
    "bubble_percent",
    "breakdown_ns",
    "recompute_block",
    "fits",
    "memory_limit_bytes",
    "peak_memory_bytes",
    "memory",
    "sources_percent",
    "num_ops",
    "engine",
    "warnings",
]
CONTRACT_MEMORY = [
    "parameters_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "recompute_bytes",
    "communication_bytes",
    "logits_bytes",
    "workspace_bytes",
    "peak_bytes",
    "reserved_bytes",
    "device_bytes",
]


def test_json_has_every_key_of_the_contract_and_starts_with_its_format() -> None:
    data = json.loads(make_report().to_json())
    assert set(CONTRACT) <= set(data)
    assert list(data)[:2] == ["format", "format_version"]
    assert (data["format"], data["format_version"]) == ("mhcplan.report", 1)
    assert list(data["memory"][0]) == CONTRACT_MEMORY
    assert tuple(data["breakdown_ns"]) == CLASSES
    assert set(data["sources_percent"]) == {"measured", "interpolated", "extrapolated", "assumed"}
    assert PlanSpec.model_validate(data["plan"]) == make_plan({"model": "mhc-27b"})


def test_components_are_those_of_the_simulator() -> None:
    assert tuple(f"{name}_bytes" for name in COMPONENTS) == COMPONENT_FIELDS


def test_read_back_is_the_same_report() -> None:
    report = make_report()
    assert PlanReport.model_validate_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"breakdown_ns": breakdown({"compute": 1})}, "breakdown_ns sums to 1000000"),
        ({"baseline_breakdown_ns": breakdown({"mhc": 1})}, "baseline_breakdown_ns sums to"),
        ({"fits": False}, "fits=False does not follow"),
        ({"memory_limit_bytes": 62 * GB}, "fits=True does not follow"),
        (
            {"sources_percent": {"measured": 99, "interpolated": 0, "extrapolated": 0,
                                 "assumed": 0}},
            "shares sum to 99",
        ),
        ({"memory": [rank_memory(GB).model_dump() | {"peak_bytes": 5}]}, "not to peak_bytes=5"),
    ],
)  # fmt: skip
def test_figures_that_do_not_add_up_make_no_report(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make_report(**changes)


@pytest.mark.parametrize(
    ("name", "model"), [("report", PlanReport), ("plan", PlanSpec)], ids=["report", "plan"]
)
def test_published_schema_is_current(
    name: str, model: type[PlanReport | PlanSpec], published: Callable[[str, str], None]
) -> None:
    published(name, json_schema(model, f"mhcplan {name}, version 1"))


def test_report_and_plan_satisfy_their_schemas() -> None:
    report = json.loads(make_report().to_json())
    for name, data in (("report", report), ("plan", report["plan"]), ("plan", {"model": "mhc-9b"})):
        schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator(schema).validate(data)


def test_headline_answers_overhead_recompute_memory_and_fit() -> None:
    assert headline(make_report()) == (
        "mHC n=4: +10.00 % step time (1,100.00 ms against 1,000.00 ms); recompute block 6 sites;"
        " peak memory 60.00 GB, with allocator, NCCL and context 63.00 of 80.00 GB:"
        " fits with 17.00 GB to spare"
    )
    too_large = headline(make_report(memory_limit_bytes=60 * GB, fits=False, recompute_block=None))
    assert too_large.endswith("does NOT fit: 3.00 GB over")
    assert "no recompute" in too_large


@pytest.mark.parametrize(("percent", "said"), [(0.0, ""), (4.9, ""), (97.0, "97 % risk")])
def test_a_plan_that_fits_by_a_hair_says_its_risk_at_once(percent: float, said: str) -> None:
    intervals = Intervals(
        coverage_percent=90, num_samples=9, notes=(), step_time_ns=(1, 2), overhead_percent=(1, 2),
        device_memory_bytes=(79 * GB, 81 * GB), out_of_memory_percent=percent, num_measured_runs=9,
    )  # fmt: skip
    report = make_report(memory_limit_bytes=63 * GB, intervals=intervals)
    assert headline(report).endswith(
        f"fits with 0.00 GB to spare{f', but {said} of running out of memory' if said else ''}"
    )


def test_plain_residual_has_no_overhead_to_report() -> None:
    plain = make_report(
        plan=make_plan({"model": "mhc-27b", "residual": {"kind": "plain"}}), recompute_block=None
    )
    assert headline(plain).startswith("plain residual: 1,100.00 ms a step; peak memory")
    assert "baseline ms" not in sections(plain)[1].columns


def test_sections_hold_every_class_component_and_source() -> None:
    run, time, memory, sources = sections(make_report())
    assert [row[0] for row in run.rows][:2] == ["model", "GPUs"]
    assert len(time.rows) == len(CLASSES) + 1
    assert time.rows[1] == ("mHC kernels", "100.00", "9.09", "0.00", "100.00", "+10.00")
    assert time.rows[-1] == ("step", "1,100.00", "100.00", "1,000.00", "100.00", "+10.00")
    assert "rank 1" in time.title
    assert len(memory.rows) == len(COMPONENTS) + 3
    assert memory.rows[0] == ("parameters", "30.00", "20.00", "30.00")
    assert [row[1] for row in sources.rows] == ["75.00", "15.00", "0.00", "10.00"]


@pytest.mark.parametrize(
    ("slower", "baseline", "kind", "words"),
    [
        (4.06, 5.2, "mhc", "arithmetic takes 4.1 % longer, the baseline's 5.2 %"),
        (0.0, 0.3, "mhc", "arithmetic takes 0.0 % longer, the baseline's 0.3 %"),
        (5.2, 5.2, "plain", "arithmetic takes 5.2 % longer"),
        (0.0, 0.0, "mhc", "not reached: full clock"),
        (None, None, "mhc", "left out: full clock"),
    ],
)
def test_run_says_what_the_power_limit_does(
    slower: float | None, baseline: float | None, kind: str, words: str
) -> None:
    report = make_report(
        plan=make_plan({"model": "mhc-27b", "residual": {"kind": kind}}),
        power_slowdown_percent=slower, baseline_power_slowdown_percent=baseline,
    )  # fmt: skip
    assert ("power limit", words) in sections(report)[0].rows


@pytest.mark.parametrize("width", [60, 100, 200])
def test_text_starts_with_the_answer_and_ends_with_the_command(width: int) -> None:
    out = io.StringIO()
    report = make_report(command="mhcplan predict mhc-27b --set 'profile=[b]x[/b].json'")
    print_report(report, Console(file=out, width=width, color_system=None))
    lines = out.getvalue().rstrip("\n").split("\n")
    assert lines[0] == headline(report)
    assert lines[-1] == "Again: mhcplan predict mhc-27b --set 'profile=[b]x[/b].json'"
    assert "- nothing here is real" in lines


@given(st.integers(1, 10**15), st.integers(1, 10**15))
def test_tokens_per_second_is_rounded_to_the_nearest(tokens: int, step_ns: int) -> None:
    rate = tokens_per_second(tokens, step_ns)
    assert abs(rate * step_ns - tokens * 10**9) * 2 <= step_ns


def test_overhead_is_zero_where_the_steps_are_equal() -> None:
    assert overhead_percent(7, 7) == 0
    assert overhead_percent(3, 4) == -25


def test_breakdown_total_is_the_sum_of_its_classes() -> None:
    assert BreakdownNs(**dict.fromkeys(CLASSES, 3)).total == 3 * len(CLASSES)
