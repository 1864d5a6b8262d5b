"""One point of a sweep as data: the line of ``mhcplan sweep --json`` and the row of its tables.

Times are integer nanoseconds, sizes integer bytes. The JSON Schema made of :class:`SweepRow` is
``docs/schemas/sweep.schema.json``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt

from mhcplan.profiles.specs import Spec

SWEEP_FORMAT = "mhcplan.sweep"
SWEEP_VERSION = 1

Method = Literal["engine", "estimate"]


class Figures(Spec):
    """What a plan takes; with the method ``estimate`` the two times are lower bounds."""

    recompute_block: Annotated[
        PositiveInt | None, Field(description="L_r in sites; null: nothing is recomputed")
    ]
    step_time_ns: PositiveInt
    baseline_step_time_ns: Annotated[
        PositiveInt, Field(description="the same plan with the plain residual")
    ]
    overhead_percent: Annotated[float, Field(description="step over baseline, minus 1")]
    tokens_per_second: Annotated[NonNegativeInt, Field(description="of the whole job")]
    peak_memory_bytes: Annotated[
        NonNegativeInt, Field(description="largest peak_bytes of all ranks")
    ]
    device_memory_bytes: Annotated[
        NonNegativeInt, Field(description="most that a GPU needs, all included")
    ]
    memory_limit_bytes: PositiveInt
    fits: Annotated[bool, Field(description="device_memory_bytes are within the limit")]


class Outcome(Spec):
    """What is known of a plan: its figures, or why the profile cannot price it."""

    figures: Figures | None
    reason: str | None = None


class SweepRow(Spec):
    """A combination of a sweep's values and what came of it."""

    format: Literal["mhcplan.sweep"] = SWEEP_FORMAT
    format_version: Literal[1] = SWEEP_VERSION
    values: Annotated[
        dict[str, JsonValue], Field(description="what this combination sets, by field path")
    ]
    status: Annotated[
        Literal["predicted", "illegal", "unpriced"],
        Field(
            description="illegal: no such plan can run; unpriced: the profile lacks a measurement"
        ),
    ]
    reason: Annotated[str | None, Field(description="why it is not predicted, in one line")]
    method: Annotated[
        Method, Field(description="engine: simulated; estimate: longest path, a lower bound")
    ]
    plan_digest: Annotated[str | None, Field(description="sha256 of the plan's canonical JSON")]
    profile_digest: str | None
    gpus: PositiveInt | None
    figures: Figures | None

    @property
    def fits(self) -> bool:
        """Whether the plan can run on its GPUs."""
        return self.figures is not None and self.figures.fits
