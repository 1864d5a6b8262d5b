"""The answer to a what-if, as data: the JSON contract of ``mhcplan predict --json``.

:class:`PlanReport` is all that the text, the JSON, the HTML page and a comparison read. Times are
integer nanoseconds, sizes integer bytes; every key's meaning is in its description, and the JSON
Schema made of them is ``docs/schemas/report.schema.json``. A report whose figures do not add up
(classes to the step, components to the peak, sources to 100 %) cannot be made.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from mhcplan.planner.plan.spec import PlanSpec
from mhcplan.profiles.specs import Spec

REPORT_FORMAT = "mhcplan.report"
REPORT_VERSION = 1

Percent = Annotated[float, Field(ge=0, le=100)]


class BreakdownNs(Spec):
    """Nanoseconds of one rank's step by class; they sum to the step."""

    compute: Annotated[NonNegativeInt, Field(description="a compute op of the model runs")]
    mhc: Annotated[NonNegativeInt, Field(description="an op of the residual wrap runs")]
    recompute: Annotated[NonNegativeInt, Field(description="recompute of a block's states runs")]
    optimizer: Annotated[NonNegativeInt, Field(description="optimizer and other work on weights")]
    exposed_ep: Annotated[NonNegativeInt, Field(description="waits for expert traffic")]
    exposed_pp: Annotated[
        NonNegativeInt, Field(description="waits for a pipeline message whose sender is ready")
    ]
    exposed_dp: Annotated[NonNegativeInt, Field(description="waits for gradient reduction")]
    host: Annotated[NonNegativeInt, Field(description="waits for the host to issue the next op")]
    bubble: Annotated[NonNegativeInt, Field(description="waits for another rank's work")]

    @property
    def total(self) -> int:
        """The step, in ns."""
        return sum(getattr(self, name) for name in type(self).model_fields)


class RankMemory(Spec):
    """Memory of one rank; components are those at the instant of the peak and sum to it."""

    parameters_bytes: NonNegativeInt
    gradients_bytes: NonNegativeInt
    optimizer_bytes: NonNegativeInt
    activations_bytes: NonNegativeInt
    recompute_bytes: NonNegativeInt
    communication_bytes: NonNegativeInt
    logits_bytes: NonNegativeInt
    workspace_bytes: NonNegativeInt
    peak_bytes: Annotated[NonNegativeInt, Field(description="most that is allocated at once")]
    reserved_bytes: Annotated[NonNegativeInt, Field(description="peak and the allocator's margin")]
    device_bytes: Annotated[
        NonNegativeInt, Field(description="reserved, NCCL's buffers and the CUDA context")
    ]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = sum(getattr(self, name) for name in COMPONENT_FIELDS)
        if total != self.peak_bytes:
            raise ValueError(f"components sum to {total}, not to peak_bytes={self.peak_bytes}")
        return self


COMPONENT_FIELDS = tuple(RankMemory.model_fields)[:-3]  # without peak, reserved and device


class SourcesPercent(Spec):
    """Share of summed op durations, all ranks, by where the duration comes from."""

    measured: Annotated[Percent, Field(description="this shape on this device")]
    interpolated: Annotated[Percent, Field(description="between measured shapes")]
    extrapolated: Annotated[Percent, Field(description="up to 4x outside the measured shapes")]
    assumed: Annotated[Percent, Field(description="a published figure, cited in the profile")]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = self.measured + self.interpolated + self.extrapolated + self.assumed
        if abs(total - 100) > 1e-9:
            raise ValueError(f"shares sum to {total}, not to 100")
        return self


class Intervals(Spec):
    """How sure the figures are: the middle of drawn runs, [low, high]."""

    coverage_percent: Annotated[Percent, Field(description="of the drawn runs are inside")]
    num_samples: Annotated[PositiveInt, Field(description="runs drawn")]
    num_measured_runs: Annotated[
        NonNegativeInt,
        Field(description="measured runs that give the model's own error; 0: it is not in it"),
    ]
    step_time_ns: tuple[PositiveInt, PositiveInt]
    overhead_percent: tuple[float, float]
    device_memory_bytes: Annotated[
        tuple[PositiveInt, PositiveInt] | None,
        Field(description="of the fullest rank; null: no memory was predicted and then measured"),
    ]
    out_of_memory_percent: Annotated[
        Percent | None, Field(description="probability; null as device_memory_bytes")
    ]
    notes: Annotated[tuple[str, ...], Field(description="what is assumed, and what is missing")]


class PlanReport(Spec):
    """What a plan takes: time and memory of a step, and what mHC adds to it."""

    format: Literal["mhcplan.report"] = REPORT_FORMAT
    format_version: Literal[1] = REPORT_VERSION
    mhcplan_version: str
    plan: Annotated[PlanSpec, Field(description="the plan, every field written out")]
    plan_digest: Annotated[str, Field(description="sha256 of the plan's canonical JSON")]
    profile_digest: Annotated[str, Field(description="sha256 of the profile's canonical JSON")]
    command: Annotated[str, Field(description="what to type to get this report again")]
    gpus: Annotated[PositiveInt, Field(description="pp x ep x dp")]
    step_time_ns: PositiveInt
    baseline_step_time_ns: Annotated[
        PositiveInt, Field(description="the same plan with the plain residual")
    ]
    overhead_percent: Annotated[float, Field(description="step over baseline, minus 1")]
    power_slowdown_percent: Annotated[
        NonNegativeFloat | None,
        Field(
            description="how much longer arithmetic takes at the clock that the GPU's power limit"
            " leaves it, on the rank that is slowed most; null: at the full clock, as the plan"
            " says, or as the profile says nothing of the limit"
        ),
    ] = None
    baseline_power_slowdown_percent: Annotated[
        NonNegativeFloat | None, Field(description="the same of the baseline")
    ] = None
    tokens_per_second: Annotated[NonNegativeInt, Field(description="of the whole job")]
    bubble_percent: Percent
    reported_rank: Annotated[
        NonNegativeInt, Field(description="the rank with most busy time: whose breakdown this is")
    ]
    breakdown_ns: BreakdownNs
    baseline_breakdown_ns: Annotated[
        BreakdownNs, Field(description="of the baseline's busiest rank")
    ]
    recompute_block: Annotated[
        PositiveInt | None, Field(description="L_r in sites; null: nothing is recomputed")
    ]
    fits: Annotated[bool, Field(description="every rank's device_bytes are within the limit")]
    memory_limit_bytes: PositiveInt
    peak_memory_bytes: Annotated[
        NonNegativeInt, Field(description="largest peak_bytes of all ranks")
    ]
    baseline_peak_memory_bytes: NonNegativeInt
    memory: Annotated[tuple[RankMemory, ...], Field(min_length=1, description="per rank")]
    sources_percent: SourcesPercent
    intervals: Annotated[
        Intervals | None, Field(description="how sure the figures are; null: not asked for")
    ] = None
    num_ops: Annotated[NonNegativeInt, Field(description="ops on all ranks of one replica")]
    engine: str
    warnings: Annotated[
        tuple[str, ...], Field(description="what is assumed, and what is simplified")
    ]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        for name, parts, step_ns in (
            ("breakdown_ns", self.breakdown_ns, self.step_time_ns),
            ("baseline_breakdown_ns", self.baseline_breakdown_ns, self.baseline_step_time_ns),
        ):
            if parts.total != step_ns:
                raise ValueError(f"{name} sums to {parts.total}, not to the step, {step_ns}")
        if self.fits != (self.memory_limit_bytes >= self.device_memory_bytes):
            raise ValueError(f"fits={self.fits} does not follow from memory and its limit")
        return self

    @property
    def device_memory_bytes(self) -> int:
        """Most memory that a GPU needs, all included: what has to fit."""
        return max(rank.device_bytes for rank in self.memory)

    @property
    def fullest_rank(self) -> int:
        """The rank that needs most memory, the lowest on a tie."""
        needs = [rank.device_bytes for rank in self.memory]
        return needs.index(max(needs))

    def to_json(self) -> str:
        """The report as one JSON object."""
        return self.model_dump_json(indent=2)


def overhead_percent(step_ns: int, baseline_ns: int) -> float:
    """Step time over the baseline's, minus 1, in percent.

    >>> overhead_percent(1067, 1000)
    6.7
    """
    return 100 * (step_ns - baseline_ns) / baseline_ns


def tokens_per_second(tokens: int, step_ns: int) -> int:
    """Tokens of a step over its time, rounded half up, in exact integers."""
    return (2 * tokens * 1_000_000_000 + step_ns) // (2 * step_ns)


def json_schema(model: type[Spec], title: str) -> str:
    """The JSON Schema of a file format, as kept in ``docs/schemas``."""
    schema = model.model_json_schema(mode="validation")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}
    return json.dumps(schema, indent=1) + "\n"
