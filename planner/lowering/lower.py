"""From a plan to its stream program: schedule actions become ops on streams.

Each rank's row of actions is lowered in order. An action is a template (its phases in the order of
the paper's figure 4, :mod:`mhcplan.planner.lowering.chunks`) that :mod:`mhcplan.sim.build` stamps
out for each microbatch. Around the actions, in host issue order:

* with ``p2p = eager`` a send is posted right after its action and the receive at that point of the
  peer's row, so both ends agree on the order and nothing can hang; but no later than before the
  action ahead of the one that needs it, so that the message travels while that action computes.
  What was sent is released one action later, where its handle is waited for;
* with ``p2p = grouped``, as in DeepSeek's DualPipe, the sends of one action and the receives of the
  next are one batched call between them, and the next action waits for all of it.

Every flow (forward or backward, source, destination) has a process group and so a stream of its
own: messages of one flow are produced and consumed in the same order, so neither side waits for
the wrong one. With ``comm_streams = one`` all traffic of a rank shares one stream, which needs
``grouped``.

After the last action: gradient reduction of every stage held (over ep x dp for what experts do
not split, over dp for experts; the second copy of a DualPipe stage belongs to both), ZeRO-1 AdamW
on the own shard, the gather of the updated weights. DualPipe reduces both stages at the end and in
depth order, since its two holders finish them in opposite order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.planner.lowering.placement import placement_of, tables_of
from mhcplan.planner.lowering.stage_templates import (
    Shard,
    StageTemplates,
    optimizer_template,
    pair_template,
    reduce_template,
    stage_templates,
)
from mhcplan.planner.lowering.stamp_rows import Bundle, RowKey, stamp_rows
from mhcplan.planner.lowering.work import StageShape, Work
from mhcplan.planner.plan.spec import schedule_of
from mhcplan.profiles.parameters import (
    ParameterCounts,
    entry_parameters,
    mtp_parameters,
    stage_parameters,
)
from mhcplan.profiles.vocabulary import BF16, FP32
from mhcplan.sim.build import DATA, DATA_EXPERTS, HIGH, Labels, Template
from mhcplan.sim.program import COMPONENTS
from mhcplan.sim.tiling import Places, tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.planner.lowering.placement import Tables
    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.sim.program import Program

_OPTIMIZER_BYTES = 3 * FP32  # of a parameter: master weight and AdamW's two moments


def lower(plan: PlanSpec, recompute_block: int | None) -> Program:
    """Lower a plan to the Program of one replica's pipeline ranks.

    Args:
        plan: what to run.
        recompute_block: L_r in sites, already resolved; None for no recompute.
    """
    return _Lowering(plan, recompute_block).program()


def work_of(plan: PlanSpec, recompute_block: int | None) -> Work:
    """What decides the ops of every chunk of a plan."""
    placement = placement_of(plan)
    return Work(
        model=plan.model, residual=plan.residual, tokens=plan.tokens, seq_len=plan.seq_len,
        ep=plan.layout.ep, expert_ranks_per_node=placement.ranks[0].experts.per_node,
        priority=plan.priority, recompute_block=recompute_block,
        overlap_recompute=plan.overlap_recompute,
        pipe_ranks_per_node=placement.pipe.per_node, overlap_order=plan.overlap_order,
        recompute_layers=plan.recompute_layers, receive_buffers=plan.receive_buffers,
        mtp=plan.mtp,
    )  # fmt: skip


def stage_shapes(plan: PlanSpec) -> tuple[StageShape, ...]:
    """Shape of every stage, in depth order."""
    schedule = schedule_of(plan)
    ranks = [schedule.rank_of(stage, 0) for stage in range(schedule.num_stages)]
    last = schedule.num_stages - 1
    return tuple(
        StageShape(
            moe=tuple(plan.model.is_moe_block(block) for block in blocks),
            first=stage == 0,
            last=stage == last,
            input_local=stage > 0 and ranks[stage - 1] == ranks[stage],
            output_local=stage < last and ranks[stage + 1] == ranks[stage],
        )
        for stage, blocks in enumerate(plan.stages)
    )


class _Lowering:
    def __init__(self, plan: PlanSpec, recompute_block: int | None) -> None:
        self.plan, self.schedule = plan, schedule_of(plan)
        self.work = work_of(plan, recompute_block)
        self.labels = Labels()
        self.shapes = stage_shapes(plan)
        self.placement = placement_of(plan)
        self._held = [
            sorted(set(self.schedule.stages_of(rank))) for rank in range(self.schedule.num_ranks)
        ]
        last_rank = self.schedule.rank_of(self.schedule.num_stages - 1, 0)
        counts = _counts(self.work, plan.stages, 0 in self._held[last_rank])
        self._shards = {
            (rank, stage): self._shards_of(counts[stage], rank)
            for rank, stages in enumerate(self._held)
            for stage in stages
        }
        self._stages = {shape: stage_templates(self.work, shape) for shape in self.shapes}
        # The holders of a DualPipe stage finish it in opposite order. Where weight gradients come
        # from the high-priority stream, the last releases order the compute stream after it.
        on_high = self.work.form.pre_stream == HIGH
        self._reduces_at_end = on_high or self.schedule.num_directions > 1

    def program(self) -> Program:
        rows = stamp_rows(self._row_key())
        bundles = {bundle: self._bundle(bundle) for bundle in rows.bundles}
        templates = [_template(bundles[name.bundle], name.part) for name in rows.names]
        tables = tables_of(self.plan)
        meta: dict[str, object] = {
            "schedule": self.schedule.name,
            "num_microbatches": self.schedule.num_microbatches,
            "recompute_block": self.work.recompute_block,
            "plan_digest": self.plan.digest(),
        }
        return tile(
            templates, rows.stamps, rows.cells, self._places(tables), self.labels,
            tuple(tables.streams), tuple(tables.groups), self._static_bytes(), meta,
        )  # fmt: skip

    def _row_key(self) -> RowKey:
        schedule = self.schedule
        reduced = {
            held for held, shards in self._shards.items() if any(s.is_shared for s in shards)
        }
        return RowKey(
            self.plan.schedule, schedule.num_ranks, schedule.num_microbatches, self.plan.p2p,
            self.shapes, tuple(frozenset(self._stages[shape].messages) for shape in self.shapes),
            self._reduces_at_end, frozenset(reduced),
        )  # fmt: skip

    def _bundle(self, bundle: Bundle) -> StageTemplates | Template:
        """Templates by what the rows call them; their labels are known from then on."""
        found = self._recorded(bundle)
        self.labels.adopt(found.labels)
        return found

    def _recorded(self, bundle: Bundle) -> StageTemplates | Template:
        match bundle:
            case ("stage", StageShape() as shape):
                return self._stages[shape]
            case ("pair", StageShape() as forward, StageShape() as backward):
                return pair_template(self.work, forward, backward)
            case ("reduce", int(rank), int(stage)):
                shards = self._shards[rank, stage]
                return reduce_template(self.work, self.shapes[stage], shards)
            case ("optimizer", int(rank)):
                stages = self._held[rank]
                shapes = tuple(self.shapes[stage] for stage in stages)
                shards = tuple(self._shards[rank, stage] for stage in stages)
                return optimizer_template(self.work, shapes, shards)
            case _:
                raise AssertionError(f"no bundle is called {bundle}")

    def _shards_of(self, counts: ParameterCounts, rank: int) -> tuple[Shard, ...]:
        """The weights of a stage that one GPU of a rank holds, by the team that holds the same."""
        teams = self.placement.ranks[rank]
        experts = counts.routed_experts // self.plan.layout.ep
        return (
            Shard("dense", DATA, counts.replicated, teams.dense),
            Shard("experts", DATA_EXPERTS, experts, teams.expert_copies),
        )

    def _static_bytes(self) -> NDArray[np.int64]:
        """[rank, component]: weights and gradients of every stage held, the optimizer's shard, and
        receive buffers that are not pooled."""
        static = np.zeros((self.schedule.num_ranks, len(COMPONENTS)), np.int64)
        for rank, stages in enumerate(self._held):
            shards = [shard for stage in stages for shard in self._shards[rank, stage]]
            held, own = sum(s.elements for s in shards), sum(s.own_elements for s in shards)
            static[rank, COMPONENTS.index("parameters")] = BF16 * held
            static[rank, COMPONENTS.index("gradients")] = FP32 * held
            static[rank, COMPONENTS.index("optimizer")] = _OPTIMIZER_BYTES * own
            if self.work.receive_buffers == "per_microbatch":
                shapes = [self.shapes[stage] for stage in stages]
                buffers = sum((not shape.first) + (not shape.last) for shape in shapes)
                buffers *= self.schedule.num_microbatches // self.schedule.num_directions
                static[rank, COMPONENTS.index("communication")] = buffers * self.work.state_bytes
        return static

    def _places(self, tables: Tables) -> Places:
        m = self.schedule.num_microbatches
        first = np.array([2 * blocks.start for blocks in self.plan.stages], np.int64)
        directions = [self.schedule.direction_of(b) for b in range(m)]
        rank_of = np.array(self.schedule.placement, np.int64)[directions].T
        shapes = [self._stages[shape].chunk for shape in self.shapes]
        return Places(m, shapes, first, rank_of, tables.role_stream, tables.role_group,
                      tables.pipe_stream, tables.pipe_group)  # fmt: skip


@lru_cache(maxsize=256)
def _counts(
    work: Work, stages: tuple[range, ...], embedding_beside_head: bool
) -> tuple[ParameterCounts, ...]:
    """Parameters of every stage; whether one rank holds both ends of the model matters to MTP."""
    counts = [stage_parameters(work.model, work.residual, blocks) for blocks in stages]
    if work.mtp:
        counts[-1] += mtp_parameters(work.model, work.residual)
        if not embedding_beside_head:
            counts[-1] += entry_parameters(work.model)
    return tuple(counts)


def _template(bundle: StageTemplates | Template, part: str) -> Template:
    if isinstance(bundle, Template):
        return bundle
    return bundle.actions.get(part) or bundle.messages[part]
