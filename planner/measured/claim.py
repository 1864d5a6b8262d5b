"""What is claimed of a plan before it runs: the figures that a measured run is held against.

A claim has both programs of a plan (mHC and baseline), each played with the hosts' time and without
(``issued`` and ``captured``, see :mod:`mhcplan.profiles.accuracy`), and the elasticities of its
step times, found by playing once more with the profile's durations a little longer.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

import mhcplan
from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import resolve_recompute_block
from mhcplan.planner.predict import play, settle
from mhcplan.profiles.accuracy import (
    BASELINE,
    MHC,
    RESOURCES,
    Claim,
    ProgramClaim,
    Resource,
    StepClaim,
    figures_of,
    scaled,
)
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.store import find_profile
from mhcplan.sim.files import program_json
from mhcplan.sim.memory import memory_report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.predict import Step
    from mhcplan.profiles.schema import Profile
    from mhcplan.sim.program import Program
    from mhcplan.sim.timeline import Timeline

    Lines = dict[Resource | None, Timeline]  # by what took longer; None: nothing did

_NUDGE = 1.02  # factor on durations that elasticities are taken over


def programs_of(plan: PlanSpec) -> dict[str, Program]:
    """The programs of a row: the plan's, and its baseline's where that is another."""
    found = {MHC: lower(plan, resolve_recompute_block(plan))}
    if not plan.residual.is_plain:
        found[BASELINE] = lower(plan.baseline(), None)
    return found


def program_digest(program: Program) -> str:
    """sha256 of the program's file, whatever is noted beside its ops."""
    return hashlib.sha256(program_json(replace(program, meta={})).encode()).hexdigest()


def claim(plan: PlanSpec, row: str, set_: str, profile: Profile | None = None) -> Claim:
    """Predict a row.

    Args:
        plan: what will run.
        row: its name; ``set_``: of the rows it belongs to.
        profile: what ops cost; None is the one that the plan names.

    Raises:
        ProfileError: an op cannot be priced.
    """
    profile = profile or find_profile(plan.profile)
    models: dict[Resource | None, CostModel] = {None: CostModel(profile)}
    models |= {r: CostModel(scaled(profile, r, _NUDGE)) for r in RESOURCES}
    plans = {MHC: plan} if plan.residual.is_plain else {MHC: plan, BASELINE: plan.baseline()}
    return Claim(
        row=row, set=set_, gpus=plan.layout.gpus, plan=plan.model_dump(mode="json"),
        plan_digest=plan.digest(), profile=profile.name, profile_digest=profile.digest,
        mhcplan_version=mhcplan.__version__,
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        programs={name: _program_claim(plan, models) for name, plan in plans.items()},
    )  # fmt: skip


def _program_claim(plan: PlanSpec, models: dict[Resource | None, CostModel]) -> ProgramClaim:
    block = resolve_recompute_block(plan)
    played: dict[Resource | None, Step] = {
        name: play(plan, model, block) for name, model in models.items()
    }
    step = played[None]
    issued: Lines = {name: of.timeline for name, of in played.items()}
    captured: Lines = {name: _captured(of, plan, models[name]) for name, of in played.items()}
    memory = memory_report(step.program, step.table, step.memory)
    return ProgramClaim(
        program_digest=program_digest(step.program),
        steps={"issued": _step_claim(issued), "captured": _step_claim(captured)},
        peak_bytes=tuple(rank["peak_bytes"] for rank in memory),
        reserved_bytes=tuple(rank["reserved_bytes"] for rank in memory),
        timeline=figures_of(step.program, captured[None]),
    )


def _captured(step: Step, plan: PlanSpec, model: CostModel) -> Timeline:
    """The step from CUDA graphs."""
    prices, program = model.with_network(plan.network_speed), step.program
    num_keys = len(program.cost_keys)
    begun = np.bincount(program.cost[begins_graph(program)], minlength=num_keys)
    each = np.bincount(program.cost, minlength=num_keys)
    begun_each = (begun / np.maximum(each, 1)).tolist()
    table = prices.table(program.cost_keys, plan.gpu, begun_each)
    return settle(plan, step.program, table, model.profile)[2]


def begins_graph(program: Program) -> NDArray[np.bool_]:
    """Of each op, whether the runtime begins a CUDA graph with it.

    A graph is of one stream: it ends before an op that waits or transfers and after one that others
    wait for or that transfers (:func:`mhcplan.runtime.captured.parts_of`).
    """
    is_transfer = program.group >= 0
    waits = np.diff(program.waits.offsets) > 0
    begins = waits | is_transfer
    begins[1:] |= np.diff(program.stream) != 0
    begins[1:] |= (program.record[:-1] >= 0) | is_transfer[:-1]
    begins[program.rank_offsets[:-1]] = True
    batched = (program.batch[1:] >= 0) & (program.batch[1:] == program.batch[:-1])
    begins[1:] &= ~batched
    return begins


def _step_claim(lines: Lines) -> StepClaim:
    step_ns = lines[None].step_ns
    elasticity: dict[Resource, float] = {
        resource: math.log(lines[resource].step_ns / step_ns) / math.log(_NUDGE)
        for resource in RESOURCES
    }
    return StepClaim(step_ns=step_ns, elasticity=elasticity)
