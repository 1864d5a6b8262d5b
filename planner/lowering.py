"""From a plan to its stream program: schedule actions become ops on streams.

Each rank's row of actions is lowered in order. An action is a template (its phases in the order
of the paper's figure 4, :mod:`mhcplan.planner.chunks`) that :mod:`mhcplan.sim.build` stamps out for
each microbatch. Around the actions, in host issue order:

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

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.planner.chunks import optimizer_bytes_per_parameter
from mhcplan.planner.spec import PlanSpec, schedule_of
from mhcplan.planner.stage_templates import StageTemplates, pair_template, stage_templates
from mhcplan.planner.stamp_rows import Bundle, RowKey, stamp_rows
from mhcplan.planner.work import StageShape, Work
from mhcplan.profiles.parameters import ParameterCounts, stage_parameters
from mhcplan.profiles.vocabulary import BF16, FP32, TransferKey, op_key
from mhcplan.sim.build import (
    COMPUTE,
    DATA,
    DATA_EXPERTS,
    EXPERT,
    HIGH,
    NUM_ROLES,
    ChunkState,
    Labels,
    Template,
    TemplateBuilder,
)
from mhcplan.sim.program import (
    COMPONENTS,
    HIGH_PRIORITY,
    NORMAL_PRIORITY,
    Group,
    Stream,
)
from mhcplan.sim.tiling import Places, tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.planner.schedules import Schedule
    from mhcplan.sim.program import Program


def lower(plan: PlanSpec, recompute_block: int | None) -> Program:
    """Lower a plan to the Program of one replica's pipeline ranks.

    Args:
        plan: what to run.
        recompute_block: L_r in sites, already resolved; None for no recompute.
    """
    return _Lowering(plan, recompute_block).program()


def work_of(plan: PlanSpec, recompute_block: int | None) -> Work:
    """What decides the ops of every chunk of a plan."""
    placement = _Placement(plan)
    return Work(
        model=plan.model, residual=plan.residual, tokens=plan.tokens, seq_len=plan.seq_len,
        ep=plan.layout.ep, expert_ranks_per_node=placement.ranks_per_node(placement.experts(0)),
        priority=plan.priority, recompute_block=recompute_block,
        overlap_recompute=plan.overlap_recompute,
        pipe_ranks_per_node=placement.pipe_ranks_per_node, overlap_order=plan.overlap_order,
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


class _Placement:
    """GPU numbers: ep fastest, then dp, then pp (design: "Definitions")."""

    def __init__(self, plan: PlanSpec) -> None:
        self._layout = plan.layout
        self._schedule = schedule_of(plan)

    def experts(self, rank: int) -> list[int]:
        """GPUs of an expert-parallel group."""
        first = rank * self._layout.replicas
        return list(range(first, first + self._layout.ep))

    def dense(self, rank: int) -> list[int]:
        """GPUs that hold the same dense weights as ``rank``."""
        replicas = self._layout.replicas
        return [r * replicas + i for r in self.holders(rank) for i in range(replicas)]

    def expert_copies(self, rank: int) -> list[int]:
        """GPUs that hold the same experts as the first GPU of ``rank``."""
        replicas, ep = self._layout.replicas, self._layout.ep
        return [r * replicas + i for r in self.holders(rank) for i in range(0, replicas, ep)]

    def holders(self, rank: int) -> list[int]:
        """Ranks that hold the stages of ``rank``: with two copies, rank P-1-r as well."""
        if self._schedule.num_directions == 1:
            return [rank]
        return sorted({rank, self._schedule.num_ranks - 1 - rank})

    def ranks_per_node(self, gpus: list[int]) -> int:
        """Most members of a group on one node."""
        nodes = [gpu // self._layout.gpus_per_node for gpu in gpus]
        return max(nodes.count(node) for node in set(nodes))

    @property
    def pipe_ranks_per_node(self) -> int:
        """2 if every message between neighbours stays in its node, else 1 (the slowest counts)."""
        replicas, nodes = self._layout.replicas, self._layout.gpus_per_node
        ranks = range(self._schedule.num_ranks)
        same = all(a * replicas // nodes == b * replicas // nodes for a, b in pairwise(ranks))
        return 2 if same else 1


class _Lowering:
    def __init__(self, plan: PlanSpec, recompute_block: int | None) -> None:
        self.plan, self.schedule = plan, schedule_of(plan)
        self.work = work_of(plan, recompute_block)
        self.labels = Labels()
        self.shapes = stage_shapes(plan)
        self.placement = _Placement(plan)
        self._counts = [
            stage_parameters(plan.model, plan.residual, blocks) for blocks in plan.stages
        ]
        self._ends: dict[object, Template] = {}  # by what decides them; many ranks share theirs
        self._stages = {shape: stage_templates(self.work, shape) for shape in self.shapes}
        # copies, as the end of a step names ops of its own
        self._chunk_shapes = {shape: kept.chunk.copy() for shape, kept in self._stages.items()}
        # The holders of a DualPipe stage finish it in opposite order. Where weight gradients come
        # from the high-priority stream, the last releases order the compute stream after it.
        on_high = self.work.pre_stream == HIGH
        self._reduces_at_end = on_high or self.schedule.num_directions > 1

    def program(self) -> Program:
        rows = stamp_rows(self._row_key())
        bundles = {bundle: self._bundle(bundle) for bundle in rows.bundles}
        templates = [_template(bundles[name.bundle], name.part) for name in rows.names]
        streams, groups, places = self._places()
        meta: dict[str, object] = {
            "schedule": self.schedule.name,
            "num_microbatches": self.schedule.num_microbatches,
            "recompute_block": self.work.recompute_block,
            "plan_digest": self.plan.digest(),
        }
        return tile(
            templates, rows.stamps, rows.cells, places, self.labels, streams, groups,
            self._static_bytes(), meta,
        )  # fmt: skip

    def _row_key(self) -> RowKey:
        schedule = self.schedule
        held = [(r, s) for r in range(schedule.num_ranks) for s in set(schedule.stages_of(r))]
        return RowKey(
            self.plan.schedule, schedule.num_ranks, schedule.num_microbatches, self.plan.p2p,
            self.shapes, tuple(frozenset(self._stages[shape].messages) for shape in self.shapes),
            self._reduces_at_end, frozenset(place for place in held if self._shared(*place)),
        )  # fmt: skip

    def _bundle(self, bundle: Bundle) -> StageTemplates | Template:
        """Templates by what the rows call them; their labels are known from then on."""
        match bundle:
            case ("reduce", int(rank), int(stage)):
                return self._end(rank, stage)
            case ("optimizer", int(rank)):
                return self._end(rank, *sorted(set(self.schedule.stages_of(rank))), last=True)
            case ("pair", StageShape() as forward, StageShape() as backward):
                found = pair_template(self.work, forward, backward)
            case ("stage", StageShape() as shape):
                found = self._stages[shape]
            case _:
                raise AssertionError(f"no bundle is called {bundle}")
        self.labels.adopt(found.labels)
        return found

    # -- the end of a step

    def _end(self, rank: int, *stages: int, last: bool = False) -> Template:
        """Reduction of a stage's gradients, or (``last``) the optimizer step of the rank's stages.

        Ranks whose stages look alike and are held by groups of one size and medium share theirs.
        """
        parts = [
            (name, elements, len(gpus), self.placement.ranks_per_node(gpus))
            for stage in stages
            for name, _, elements, gpus in self._shards(rank, self._counts[stage])
        ]
        key = last, tuple(self.shapes[stage] for stage in stages), tuple(parts)
        if key not in self._ends:
            self._ends[key] = (
                self._optimizer(rank, stages) if last else self._reduce(rank, stages[0])
            )
        return self._ends[key]

    def _reduce(self, rank: int, stage: int) -> Template:
        """Reduce a stage's gradients over the GPUs that hold the same weights."""
        builder = TemplateBuilder(self.labels, self._end_state(stage))
        for name, role, elements, gpus in self._shared(rank, stage):
            per_node = self.placement.ranks_per_node(gpus)
            key = TransferKey("reduce_scatter", len(gpus), per_node, FP32 * elements)
            builder.op(0, "grad_reduce", "O", role, key, category="dp", name=f"grad_reduce.{name}",
                       payload_bytes=key.num_bytes, after_compute=True)  # fmt: skip
        return builder.finish()

    def _optimizer(self, rank: int, stages: tuple[int, ...]) -> Template:
        """AdamW on the own shard of every stage held, then the gather of the new weights."""
        builder = TemplateBuilder(self.labels, *map(self._end_state, stages))
        counts = [self._counts[stage] for stage in stages]
        own = sum(-(-e // len(gpus)) for c in counts for _, _, e, gpus in self._shards(rank, c))
        builder.op(0, "adamw", "O", COMPUTE, op_key("adamw", "O", parameters=own),
                   category="optimizer", name="adamw")  # fmt: skip
        for slot, stage in enumerate(stages):
            for name, role, _, _ in self._shared(rank, stage):
                builder.wait(slot, f"grad_reduce.{name}", role)
        for slot, stage in enumerate(stages):
            for name, role, elements, gpus in self._shared(rank, stage):
                per_node = self.placement.ranks_per_node(gpus)
                key = TransferKey("all_gather", len(gpus), per_node, BF16 * elements)
                builder.op(slot, "param_gather", "O", role, key, category="dp",
                           name=f"param_gather.{name}", payload_bytes=key.num_bytes,
                           after_compute=True)  # fmt: skip
        key = op_key("zero_gradients", "O", parameters=sum(map(self._held, counts)))
        builder.op(0, "zero_gradients", "O", COMPUTE, key, category="optimizer",
                   name="zero_gradients")  # fmt: skip
        return builder.finish()

    def _end_state(self, stage: int) -> ChunkState:
        return ChunkState(self._chunk_shapes[self.shapes[stage]])

    def _held(self, counts: ParameterCounts) -> int:
        """Parameters of a stage on one GPU."""
        experts = counts.routed_experts
        return counts.total - experts + experts // self.plan.layout.ep

    def _shards(self, rank: int, counts: ParameterCounts) -> list[tuple[str, int, int, list[int]]]:
        """(name, stream role, parameters on one GPU, GPUs that hold the same ones) by part."""
        dense = counts.total - counts.routed_experts
        experts = counts.routed_experts // self.plan.layout.ep
        return [
            ("dense", DATA, dense, self.placement.dense(rank)),
            ("experts", DATA_EXPERTS, experts, self.placement.expert_copies(rank)),
        ]

    def _shared(self, rank: int, stage: int) -> list[tuple[str, int, int, list[int]]]:
        """The parts of a stage that several GPUs hold, which need reduction and gather."""
        shards = self._shards(rank, self._counts[stage])
        return [shard for shard in shards if shard[2] and len(shard[3]) > 1]

    def _static_bytes(self) -> NDArray[np.int64]:
        """[rank, component]: weights and gradients of every stage held, the optimizer's shard."""
        static = np.zeros((self.schedule.num_ranks, len(COMPONENTS)), np.int64)
        for rank in range(self.schedule.num_ranks):
            for stage in set(self.schedule.stages_of(rank)):
                counts = self._counts[stage]
                held = self._held(counts)
                shard = sum(-(-e // len(gpus)) for _, _, e, gpus in self._shards(rank, counts))
                static[rank, COMPONENTS.index("parameters")] += BF16 * held
                static[rank, COMPONENTS.index("gradients")] += FP32 * held
                static[rank, COMPONENTS.index("optimizer")] += (
                    optimizer_bytes_per_parameter() * shard
                )
        return static

    # -- streams and groups

    def _places(self) -> tuple[tuple[Stream, ...], tuple[Group, ...], Places]:
        table = _Tables(self.plan, self.schedule, self.placement)
        m = self.schedule.num_microbatches
        first = np.array([2 * blocks.start for blocks in self.plan.stages], np.int64)
        directions = [self.schedule.direction_of(b) for b in range(m)]
        rank_of = np.array(self.schedule.placement, np.int64)[directions].T
        shapes = [self._chunk_shapes[shape] for shape in self.shapes]
        places = Places(m, shapes, first, rank_of, table.role_stream, table.role_group,
                        table.pipe_stream, table.pipe_group)  # fmt: skip
        return tuple(table.streams), tuple(table.groups), places


def _template(bundle: StageTemplates | Template, part: str) -> Template:
    if isinstance(bundle, Template):
        return bundle
    return bundle.actions.get(part) or bundle.messages[part]


class _Tables:
    """Streams and process groups of every rank."""

    def __init__(self, plan: PlanSpec, schedule: Schedule, placement: _Placement) -> None:
        self.streams: list[Stream] = []
        self.groups: list[Group] = []
        self._placement = placement
        ranks = range(schedule.num_ranks)
        self.role_stream = np.full((len(ranks), NUM_ROLES), -1, np.int64)
        self.role_group = np.full((len(ranks), NUM_ROLES), -1, np.int64)
        self.pipe_stream = np.full((2, len(ranks), len(ranks), 2), -1, np.int64)
        self.pipe_group = np.full((2, len(ranks), len(ranks)), -1, np.int64)
        for rank in ranks:
            self.role_stream[rank, COMPUTE] = self._stream(rank, "compute", NORMAL_PRIORITY)
            self.role_stream[rank, HIGH] = self._stream(rank, "high", HIGH_PRIORITY)
        medium = "intra_node" if placement.pipe_ranks_per_node == 2 else "inter_node"
        if plan.comm_streams == "one":
            self._one_communication_stream(ranks, medium)
        else:
            for rank in ranks:
                self._role(EXPERT, "ep", (rank,), placement.experts(rank))
            if plan.p2p == "grouped":
                self._one_pipe_group(ranks, medium)
            else:
                self._flows(schedule, medium)
        for rank in ranks:
            holders = tuple(placement.holders(rank))
            if rank == holders[0]:
                self._role(DATA, "dp", holders, placement.dense(rank))
                self._role(DATA_EXPERTS, "dp_experts", holders, placement.expert_copies(rank))

    def _stream(self, rank: int, name: str, priority: int, group: int = -1) -> int:
        self.streams.append(Stream(rank, name, priority, group))
        return len(self.streams) - 1

    def _group(self, name: str, members: tuple[int, ...], gpus: list[int]) -> int:
        per_node = self._placement.ranks_per_node(gpus)
        medium = "intra_node" if per_node == len(gpus) else "inter_node"
        self.groups.append(Group(name, members, len(gpus), medium))
        return len(self.groups) - 1

    def _role(self, role: int, name: str, members: tuple[int, ...], gpus: list[int]) -> None:
        """A group, and its internal stream on each member, where more than one GPU is in it."""
        if len(gpus) < 2:
            return
        number = self._group(f"{name}:{'-'.join(map(str, members))}", members, gpus)
        for rank in members:
            self.role_group[rank, role] = number
            self.role_stream[rank, role] = self._stream(rank, name, NORMAL_PRIORITY, number)

    def _flows(self, schedule: Schedule, medium: str) -> None:
        """A group and its two streams for every flow that the schedule has."""
        for row in schedule.placement:
            for below, above in pairwise(row):
                for forward, source, target in ((1, below, above), (0, above, below)):
                    if source == target or self.pipe_group[forward, source, target] >= 0:
                        continue
                    name = f"pp_{'f' if forward else 'b'}:{source}>{target}"
                    self.groups.append(Group(name, (source, target), 2, medium))
                    number = self.pipe_group[forward, source, target] = len(self.groups) - 1
                    for end, rank in enumerate((source, target)):
                        stream = self._stream(rank, name, NORMAL_PRIORITY, number)
                        self.pipe_stream[forward, source, target, end] = stream

    def _one_pipe_group(self, ranks: range, medium: str) -> None:
        """One group over all ranks, as DeepSeek's DualPipe has it; messages go in batches."""
        self.groups.append(Group("pp", tuple(ranks), len(ranks), medium))
        self.pipe_group[:] = number = len(self.groups) - 1
        for rank in ranks:
            self._pipe_on(rank, self._stream(rank, "pp", NORMAL_PRIORITY, number))

    def _one_communication_stream(self, ranks: range, medium: str) -> None:
        """Expert and pipeline traffic on one CUDA stream: each group's calls are made on it
        (``async_op=False``), so it is no group's internal stream."""
        self.groups.append(Group("pp", tuple(ranks), len(ranks), medium))
        self.pipe_group[:] = len(self.groups) - 1
        for rank in ranks:
            stream = self._stream(rank, "comm", NORMAL_PRIORITY)
            self._pipe_on(rank, stream)
            gpus = self._placement.experts(rank)
            if len(gpus) > 1:
                self.role_group[rank, EXPERT] = self._group(f"ep:{rank}", (rank,), gpus)
                self.role_stream[rank, EXPERT] = stream

    def _pipe_on(self, rank: int, stream: int) -> None:
        self.pipe_stream[:, rank, :, 0] = stream
        self.pipe_stream[:, :, rank, 1] = stream
