"""How far predictions were off: what was claimed before a run, and what the run measured.

``data/predictions.jsonl`` has a line for every claim, ``data/accuracy.jsonl`` one for every run.
A measurement names its claim by digest, so a run without a claim that was there before cannot be in
the file; a test looks the order up in git. Lines are only ever added: of claims with one name the
last counts for the next run, and measured ones stay what they were measured against.

Step times come in two modes: ``issued``, op by op from the hosts, and ``captured``, as CUDA graphs,
in which hosts take no time. A row is judged by the captured one where it is there.

*Anchors* are measured on the same machine just before the rows: how much longer than in the profile
things take there, by resource (:func:`resource_of`). A claim says how its step time follows each
(its elasticity), so the step expected on that machine is fixed before any row runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from mhcplan.profiles.schema import ProfileError
from mhcplan.profiles.specs import Spec
from mhcplan.profiles.vocabulary import MEASURABLE, NO_COST
from mhcplan.sim.breakdown import CLASSES, TRAFFIC, breakdown, overlap

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet
    from importlib.resources.abc import Traversable
    from pathlib import Path

    from mhcplan.profiles.schema import OpTiming, Profile
    from mhcplan.sim.program import Program
    from mhcplan.sim.timeline import Timeline

Mode = Literal["issued", "captured"]
Resource = Literal["memory", "matrix"]
RESOURCES: tuple[Resource, ...] = ("memory", "matrix")
# sets of rows that try settings one by one: they judge those, not the model
ABLATIONS = ("ablation", "ctas-1f1b", "ctas-dualpipe", "ctas-eager")
BLOCK = "block"  # anchor of whole blocks: what the resources' own scales leave over
MHC, BASELINE = (
    "mhc",
    "baseline",
)  # the two programs of a row; n = 1 has the second only as the first


class StepClaim(Spec):
    """A predicted step in one mode.

    ``elasticity``: relative change of the step over that of all durations bound by a resource.
    """

    step_ns: PositiveInt
    elasticity: dict[Resource, float]

    def on(self, anchors: dict[str, float]) -> float:
        """The step in ns on a machine with these anchors."""
        scales = (anchors.get(r, 1.0) * anchors.get(BLOCK, 1.0) for r in RESOURCES)
        powers = (self.elasticity.get(r, 0.0) for r in RESOURCES)
        return self.step_ns * prod(s**e for s, e in zip(scales, powers, strict=True))


class TimelineFigures(Spec):
    """A timeline in figures: time by class and, by kind of traffic, the share of it that compute
    hides, of every rank; median duration of the ops of every cost key."""

    breakdown_ns: dict[str, tuple[NonNegativeInt, ...]]
    hidden_percent: dict[str, tuple[float, ...]]
    ops_ns: dict[str, NonNegativeInt]

    def shares_percent(self, name: str) -> list[float]:
        """A class's share of the step, of every rank."""
        steps = (sum(of_rank) for of_rank in zip(*self.breakdown_ns.values(), strict=True))
        return [100 * ns / step for ns, step in zip(self.breakdown_ns[name], steps, strict=True)]


class ProgramClaim(Spec):
    """What is claimed of one program of a row.

    ``program_digest``: of its file, so that what ran is what was predicted; memory: of every rank;
    ``timeline``: of the captured step.
    """

    program_digest: str
    steps: dict[Mode, StepClaim]
    peak_bytes: tuple[NonNegativeInt, ...]
    reserved_bytes: tuple[NonNegativeInt, ...]
    timeline: TimelineFigures


class Claim(Spec):
    """A prediction, made before its run; ``plan`` is the resolved plan as JSON has it."""

    format: Literal["mhcplan.prediction"] = "mhcplan.prediction"
    format_version: Literal[1] = 1
    row: str
    set: str
    gpus: PositiveInt
    plan: dict[str, Any]
    plan_digest: str
    profile: str
    profile_digest: str
    mhcplan_version: str
    written: str
    programs: dict[str, ProgramClaim]

    @property
    def digest(self) -> str:
        """sha256 of the line."""
        return _digest(claim_line(self))


class Times(Spec):
    """Step times of one mode: median, interquartile range over it, how many, host time a step."""

    step_ns: PositiveInt
    spread_percent: Annotated[float, Field(ge=0)]
    steps: PositiveInt
    issue_ns: NonNegativeInt


class ProgramMeasured(Spec):
    """What was measured of one program.

    ``losses``: of the first steps; memory: of every process, the allocator's; ``timeline``: of the
    traced step, which took ``traced_step_ns``.
    """

    times: dict[Mode, Times]
    losses: tuple[float, ...]
    allocated_bytes: tuple[NonNegativeInt, ...]
    reserved_bytes: tuple[NonNegativeInt, ...]
    traced_step_ns: PositiveInt
    timeline: TimelineFigures


class Measurement(Spec):
    """A run of a row; ``prediction`` is the digest of its claim, ``environment`` what was set for
    CUDA and NCCL."""

    format: Literal["mhcplan.measurement"] = "mhcplan.measurement"
    format_version: Literal[1] = 1
    row: str
    prediction: str
    measured: str
    command: str
    device: str
    versions: dict[str, str]
    environment: Annotated[dict[str, str], Field(default_factory=dict)]
    anchors: dict[str, float]
    programs: dict[str, ProgramMeasured]


SomeLine = TypeVar("SomeLine", Claim, Measurement)


@dataclass(frozen=True)
class Row:
    """A claim beside its measurement; errors are predicted over measured, minus 1."""

    claim: Claim
    measured: Measurement

    @property
    def mode(self) -> Mode:
        """What the row is judged by."""
        times = (program.times for program in self.measured.programs.values())
        return "captured" if all("captured" in modes for modes in times) else "issued"

    @property
    def machine(self) -> str:
        """The machine of the run, named by its anchors, which are taken once however often the run
        is interrupted; by its command where it has none."""
        anchors = self.measured.anchors
        return json.dumps(anchors, sort_keys=True) if anchors else self.measured.command

    @property
    def machine_factor(self) -> float:
        """How long the claimed step takes on that machine, over the profile's."""
        return self._claimed_ns(MHC, anchored=True) / self._claimed_ns(MHC, anchored=False)

    def step_error_percent(self, *, anchored: bool = True, program: str = MHC) -> float:
        """Of the step time, on this machine (``anchored``) or as claimed."""
        return 100 * (self._claimed_ns(program, anchored) / self._measured_ns(program) - 1)

    @property
    def overhead_percent(self) -> float | None:
        """Measured: mHC's step over the baseline's; None where there is no baseline."""
        if BASELINE not in self.measured.programs:
            return None
        return 100 * (self._measured_ns(MHC) / self._measured_ns(BASELINE) - 1)

    def overhead_error_points(self, *, anchored: bool = True) -> float | None:
        """Predicted less measured overhead, in percentage points."""
        found = self.overhead_percent
        if found is None:
            return None
        claimed = self._claimed_ns(MHC, anchored) / self._claimed_ns(BASELINE, anchored)
        return 100 * (claimed - 1) - found

    def memory_error_percent(self, kind: Literal["allocated", "reserved"]) -> float:
        """Of the process that is farthest off."""
        claim, found = self.claim.programs[MHC], self.measured.programs[MHC]
        claimed, bytes_ = (
            (claim.peak_bytes, found.allocated_bytes)
            if kind == "allocated"
            else (claim.reserved_bytes, found.reserved_bytes)
        )
        replicas = len(bytes_) // len(claimed)
        errors = [
            100 * (claimed[p // replicas] / n - 1) if n else 0.0 for p, n in enumerate(bytes_)
        ]
        return max(errors, key=abs)

    def bubble_error_points(self) -> float:
        """Of the rank whose bubble, as a share of its step, is farthest off."""
        sides = self.claim.programs[MHC].timeline, self.measured.programs[MHC].timeline
        claimed, found = (side.shares_percent("bubble") for side in sides)
        return max((c - f for c, f in zip(claimed, found, strict=True)), key=abs)

    def op_errors_percent(self, events_ns: float = 0.0) -> dict[str, float]:
        """By cost key, of the median duration in the traced step less ``events_ns``; ops that take
        no more than twice that are left out."""
        claimed = self.claim.programs[MHC].timeline.ops_ns
        found = self.measured.programs[MHC].timeline.ops_ns
        return {
            key: 100 * (claimed[key] / (ns - events_ns) - 1)
            for key, ns in found.items()
            if ns > 2 * events_ns
        }

    def _claimed_ns(self, program: str, anchored: bool) -> float:
        return (
            self.claim.programs[program]
            .steps[self.mode]
            .on(self.measured.anchors if anchored else {})
        )

    def _measured_ns(self, program: str) -> int:
        return self.measured.programs[program].times[self.mode].step_ns


def resource_of(row: OpTiming, profile: Profile) -> Resource:
    """What bounds an op by the vocabulary's work: moving bytes or the matrix units."""
    rates = {rate.name: rate.per_second for rate in profile.rates}
    kind = MEASURABLE[row.kind]
    flops_s = kind.flops(row.shape, row.pass_) / rates["gemm_bf16_flops"]
    return (
        "matrix" if flops_s > kind.bytes(row.shape, row.pass_) / rates["copy_bytes"] else "memory"
    )


def scaled(profile: Profile, resource: Resource, factor: float) -> Profile:
    """The profile of a machine on which ops bound by ``resource`` take ``factor`` times as long."""
    ops = tuple(
        _longer(row, factor) if resource_of(row, profile) == resource else row
        for row in profile.ops
    )
    return profile.model_copy(update={"ops": ops})


def _longer(row: OpTiming, factor: float) -> OpTiming:
    segments = tuple(
        segment.model_copy(
            update={
                "duration_ns": round(segment.duration_ns * factor),
                "cta_ns": round(segment.cta_ns * factor),
            }
        )
        for segment in row.segments
    )
    longer_ns = round(row.duration_ns * factor)
    return row.model_copy(update={"duration_ns": longer_ns, "segments": segments})


def figures_of(program: Program, line: Timeline) -> TimelineFigures:
    """A timeline, predicted or measured, in the figures that rows are compared by."""
    ns, traffic = breakdown(program, line).ns, overlap(program, line)
    duration = line.end_ns - line.start_ns
    hidden = 100 * traffic.hidden_ns / np.maximum(traffic.traffic_ns, 1)
    return TimelineFigures(
        breakdown_ns={name: tuple(ns[:, i].tolist()) for i, name in enumerate(CLASSES)},
        hidden_percent={
            name: tuple(hidden[:, i].round(2).tolist())
            for i, name in enumerate(TRAFFIC)
            if traffic.traffic_ns[:, i].any()
        },
        ops_ns={
            key: int(np.median(duration[ops]))
            for number, key in enumerate(program.cost_keys)
            if key != NO_COST and len(ops := np.flatnonzero(program.cost == number))
        },
    )


# -- files -----------------------------------------------------------------------------------------


def shipped_claims() -> list[Claim]:
    """All claims that come with mhcplan, oldest first."""
    return read_lines(_shipped("predictions.jsonl"), Claim)


@cache
def shipped_rows() -> tuple[Row, ...]:
    """All measured rows that come with mhcplan; empty where none has run yet.

    Raises:
        ProfileError: a measurement whose claim is not there.
    """
    found = read_lines(_shipped("accuracy.jsonl"), Measurement)
    named = {measurement.prediction for measurement in found}
    return tuple(joined(found, read_lines(_shipped("predictions.jsonl"), Claim, named)))


def joined(measurements: Iterable[Measurement], claims: Iterable[Claim]) -> list[Row]:
    """Put measurements beside their claims; raises ProfileError where there is none."""
    by_digest = {claim.digest: claim for claim in claims}
    rows: list[Row] = []
    for found in measurements:
        claim = by_digest.get(found.prediction)
        if claim is None:
            raise ProfileError(f"row {found.row}: prediction {found.prediction[:12]} is not there")
        rows.append(Row(claim, found))
    return rows


def latest(claims: Iterable[Claim]) -> dict[str, Claim]:
    """The claim that counts for the next run of each row."""
    return {claim.row: claim for claim in claims}


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest measurement of each row. Where a row is run again, the model was mended: an older
    error is no error of the model that there is."""
    return list({row.claim.row: row for row in rows}.values())


def read_lines(
    path: Path | Traversable, kind: type[SomeLine], digests: AbstractSet[str] | None = None
) -> list[SomeLine]:
    """Read a file of lines, or those of some digests; none where there is no file. A last line cut
    short is left out.

    Raises:
        ProfileError: a line that is none of this kind; line and field are named.
    """
    if not path.is_file():
        return []
    found: list[SomeLine] = []
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        if digests is not None and _digest(line.rstrip("\n")) not in digests:
            continue
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ProfileError(f"{path}: line {number}: {field}: {first['msg']}") from None
    return found


def append_lines(path: Path, lines: Sequence[Claim] | Sequence[Measurement]) -> None:
    """Add lines to a file; what a kill left of a line at its end goes."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(_line(line) + "\n" for line in lines)


def claim_line(claim: Claim) -> str:
    """A claim as its file has it."""
    return _line(claim)


def _line(line: Claim | Measurement) -> str:
    return json.dumps(line.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _shipped(name: str) -> Traversable:
    return files("mhcplan.profiles").joinpath("data", name)
