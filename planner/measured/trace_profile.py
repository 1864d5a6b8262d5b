"""A profile from somebody's own run: "I already train this model; what will mHC add?"

    mhcplan profile measure --from-trace trace.json --plan plan.toml --out mine.json
    mhcplan predict plan.toml --profile mine.json --n 4

The trace has times of whole actions (:mod:`mhcplan.profiles.cell_times`), a step is made of ops.
The plan says which ops an action of the run has; each pass's ops get one factor over what they cost
in the base profile, so that together they take as long as was measured. Rows of those ops are
marked measured, and say how they were; mHC's own ops and all else stay the base profile's.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.output import write_file
from mhcplan.planner.plan.file import resolve_plan
from mhcplan.profiles.cell_times import Cell, CellTimes, read_cell_times
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.op_costs import scale_segments
from mhcplan.profiles.plausibility import implausible
from mhcplan.profiles.schema import OpTiming, Profile, ProfileError, Provenance, profile_text
from mhcplan.profiles.store import find_profile
from mhcplan.profiles.vocabulary import OpKey, parse_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.planner.plan.spec import PlanSpec

# passes of ops that a cell's letter stands for
_PARTS = {"F": "F", "B": "IRW", "I": "IR", "W": "W"}


def main(words: Sequence[str]) -> int:
    """The command; returns 0.

    Raises:
        ProfileError, SpecError, OutputError: bad input, one line.
    """
    parser = argparse.ArgumentParser(
        prog="mhcplan profile measure", description="A profile from a trace of your own plain run."
    )
    parser.add_argument("--from-trace", type=Path, nargs="+", required=True, metavar="TRACE",
                        help="torch profiler's, one a rank, with ranges PP:<cell>")  # fmt: skip
    parser.add_argument("--plan", required=True, help="what was run: a preset or a plan file")
    parser.add_argument("--set", action="append", default=[], help="field=value, as for predict")
    parser.add_argument("--base", default="h100-sxm", help="profile of all else")
    parser.add_argument("--out", type=Path, default=Path("profile.json"))
    given = parser.parse_args(words)
    plan = resolve_plan(given.plan, {}, given.set).baseline()
    times = read_cell_times(given.from_trace)
    found = profile_of(plan, times, find_profile(given.base), given.out.stem)
    write_file(given.out, profile_text(found.profile))
    for pass_, factor in found.factors.items():
        print(f"{pass_}: {factor:.3f} times as long as in {given.base}")
    for cell, percent in found.left_percent.items():
        print(f"stage {cell.stage} {cell.pass_}: {percent:+.1f} % left after that")
    if times.num_pairs:
        print(f"{times.num_pairs} overlapped pairs were left out")
    print(given.out)
    return 0


class TraceProfile:
    """A profile from a trace, and how well one factor a pass explains it.

    Attributes:
        profile: base with the layers' rows replaced.
        factors: by cell letter, measured over priced.
        left_percent: by cell, what the factor leaves: priced over measured, minus 1.
    """

    def __init__(
        self, profile: Profile, factors: dict[str, float], left_percent: dict[Cell, float]
    ) -> None:
        self.profile, self.factors, self.left_percent = profile, factors, left_percent


def profile_of(plan: PlanSpec, times: CellTimes, base: Profile, name: str) -> TraceProfile:
    """Share the measured times of actions among their ops.

    Args:
        plan: what ran; its residual is plain.
        times: of the run.
        base: what ops cost relative to each other, and all else.
        name: the new profile's.

    Raises:
        ProfileError: a cell of a stage that the plan has not, or one that takes no time; no times
            of F or of the backward, times that no machine can have, or an op that ``base`` cannot
            price.
    """
    model, ops = CostModel(base), _ops_of_stages(plan)
    medians = {cell: statistics.median(ns) for cell, ns in times.samples_ns.items()}
    priced: dict[Cell, int] = {}
    for cell in medians:
        if cell.stage not in ops:
            raise ProfileError(f"cell {cell.stage}{cell.pass_}: the plan has {len(ops)} stages")
        if not medians[cell]:
            raise ProfileError(
                f"cell {cell.stage}{cell.pass_}: no kernel was launched in most of its ranges"
            )
        priced[cell] = sum(
            count * model.op(key).duration_ns
            for key, count in ops[cell.stage].items()
            if key.pass_ in _PARTS[cell.pass_]
        )
    factors = _factors(medians, priced)
    rows = {row.key: row for row in base.ops}
    for key in dict.fromkeys(key for of_stage in ops.values() for key in of_stage):
        # where a run has B cells only, those are I and W
        letter = next((c for c in "FIWB" if c in factors and key.pass_ in _PARTS[c]), None)
        if letter is not None:
            rows[key] = _row(key, factors[letter], letter, model, times)
    profile = base.model_copy(
        update={
            "name": name,
            "ops": tuple(rows[key] for key in sorted(rows)),
            "provenance": (*base.provenance, _provenance(times)),
        }
    )
    for problem in implausible(profile):
        raise ProfileError(f"these times are of no machine: {problem}")
    left = {
        cell: 100 * (ns * factors[cell.pass_] / medians[cell] - 1) for cell, ns in priced.items()
    }
    return TraceProfile(profile, factors, dict(sorted(left.items())))


def _ops_of_stages(plan: PlanSpec) -> dict[int, Counter[OpKey]]:
    """Compute ops of one microbatch on every stage, with how often each runs."""
    program = lower(plan, None)
    found: dict[int, Counter[OpKey]] = defaultdict(Counter)
    first = program.microbatch == 0
    for i in (first & (program.group < 0)).nonzero()[0].tolist():
        key = parse_key(program.cost_keys[program.cost[i]])
        if isinstance(key, OpKey):
            found[int(program.stage[i])][key] += 1
    return found


def _factors(medians: dict[Cell, float], priced: dict[Cell, int]) -> dict[str, float]:
    """Measured over priced by letter, summed over stages."""
    found: dict[str, float] = {}
    for letter in sorted({cell.pass_ for cell in medians}):
        cells = [cell for cell in medians if cell.pass_ == letter]
        whole = sum(priced[cell] for cell in cells)
        if whole:
            found[letter] = sum(medians[cell] for cell in cells) / whole
    if "F" not in found or not {"B", "I"} & set(found):
        raise ProfileError("the trace needs cells of a forward (F) and of a backward (B, or I)")
    return found


def _row(key: OpKey, factor: float, letter: str, model: CostModel, times: CellTimes) -> OpTiming:
    cost = model.op(key)
    duration_ns = max(round(cost.duration_ns * factor), 1)
    samples = [ns for cell, ns in times.samples_ns.items() if cell.pass_ == letter]
    return OpTiming(
        source="measured",
        citation=f"{letter} cells of a torch profiler trace, shared among their ops as in"
        f" {model.profile.name} ({cost.source})",
        kind=key.kind, pass_=key.pass_, shape=dict(key.shape), duration_ns=duration_ns,
        spread_percent=max(map(_spread_percent, samples)), samples=sum(map(len, samples)),
        host_ns=cost.host_ns,
        segments=scale_segments(cost.segments, duration_ns / cost.duration_ns, 1.0),
        saved_bytes=cost.saved_bytes, deferred_bytes=cost.deferred_bytes,
        workspace_bytes=cost.workspace_bytes, run=len(model.profile.provenance),
    )  # fmt: skip


def _spread_percent(samples: list[int]) -> float:
    """Half the distance of the 10th and 90th percentile over the median."""
    if len(samples) < 2:
        return 0.0
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return round(50 * (deciles[-1] - deciles[0]) / statistics.median(samples), 2)


def _provenance(times: CellTimes) -> Provenance:
    return Provenance(
        device=times.device or "no GPU in the trace", num_devices=times.num_files,
        driver="not in the trace", sm_clock_mhz=0, power_watts=0.0, versions={}, environment={},
        measured_on=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        command="mhcplan profile measure --from-trace", code_sha256="",
    )  # fmt: skip
