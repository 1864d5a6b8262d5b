"""A plan's schedule for torchtitan: the CSV, the lines of its configuration, and the overlap.

torchtitan loads ``compute_only.csv`` and lowers it. Which rank holds which stage it does not take
from the file but from the *name* of a schedule: ``PipelineScheduleMulti`` means stages r, r + P on
rank r, also for a V. So a V is exported with the name of torch's own V schedule, which places
stages r and 2P-1-r; the CSV then overrides its order.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from mhcplan.planner.export.torch_csv import COMPUTE_ONLY, torch_files
from mhcplan.planner.plan.spec import SpecError, schedule_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.sim.program import Program
    from mhcplan.sim.timeline import Timeline

CONFIG, SETUP, OVERLAP = "torchtitan.toml", "mhcplan_setup.py", "mhcplan_overlap.py"

_PLACED_BY = {
    "1f1b": "PipelineScheduleMulti",
    "zb1p": "PipelineScheduleMulti",
    "interleaved-1f1b": "PipelineScheduleMulti",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}

_CONFIG = """\
# torchtitan: {schedule}, {stages} stages on {pp} ranks, {microbatches} microbatches.
# The schedule's name only decides which rank holds which stage; the order is the CSV's.
[parallelism]
pipeline_parallel_degree = {pp}
pipeline_parallel_schedule = "{name}"
pipeline_parallel_schedule_csv = "{csv}"
pipeline_parallel_microbatch_size = {micro_batch_size}
expert_parallel_degree = {ep}
module_fqns_per_model_part = [
{parts}
]

[training]
seq_len = {seq_len}
local_batch_size = {local_batch_size}  # {microbatches} microbatches of {micro_batch_size}
"""

_SETUP = '''\
"""Call setup(schedule) on what torchtitan's build_pipeline_schedule returns."""

from mhcplan_overlap import register_overlap


def setup(schedule):
    """Overlap the OVERLAP_F_B pairs; without it torch runs each as F, then B."""
    expected = {stages}
    held = sorted(stage.stage_index for stage in schedule._stages)
    if held not in expected:
        raise ValueError(f"this rank holds stages {{held}}, the CSV wants one of {{expected}}: "
                         "check pipeline_parallel_schedule")
    return register_overlap(schedule)
'''


def torchtitan_files(
    plan: PlanSpec,
    recompute_block: int | None,
    program: Program,
    timeline: Timeline,
    losses: tuple[str, ...],
) -> dict[str, str]:
    """The files by name.

    Raises:
        SpecError: dualpipe, whose stages live on two ranks.
    """
    if plan.schedule not in _PLACED_BY:
        raise SpecError(
            f"schedule={plan.schedule} cannot be exported to torchtitan, which loads one copy of a"
            " stage only: dualpipev can"
        )
    table = torch_files(plan, recompute_block, program, timeline, losses, (COMPUTE_ONLY,))
    schedule = schedule_of(plan)
    held = sorted({tuple(sorted(schedule.stages_of(r))) for r in range(schedule.num_ranks)})
    return table | {
        CONFIG: _CONFIG.format(
            schedule=plan.schedule, stages=schedule.num_stages, pp=plan.layout.pp,
            microbatches=plan.microbatches, name=_PLACED_BY[plan.schedule], csv=COMPUTE_ONLY,
            micro_batch_size=plan.micro_batch_size, ep=plan.layout.ep, seq_len=plan.seq_len,
            local_batch_size=plan.microbatches * plan.micro_batch_size,
            parts=",\n".join(_parts(plan)),
        ),
        SETUP: _SETUP.format(stages=[list(stages) for stages in held]),
        OVERLAP: overlap_source(),
    }  # fmt: skip


def overlap_source() -> str:
    """The module that overlaps pairs; it stands alone, so that it can be copied to a trainer."""
    return files("mhcplan.runtime").joinpath("torch_overlap.py").read_text(encoding="utf-8")


def _parts(plan: PlanSpec) -> Iterator[str]:
    """Modules of every stage, under the names that torchtitan's own models give them."""
    for stage, blocks in enumerate(plan.stages):
        names = [f"layers.{block}" for block in blocks]
        if stage == 0:
            names.insert(0, "tok_embeddings")
        if stage == plan.num_stages - 1:
            names += ["norm", "output"]
        yield "  [" + ", ".join(f'"{name}"' for name in names) + "]"
