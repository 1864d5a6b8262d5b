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

from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.planner.chunks import Chunk, StageShape, Work, optimizer_bytes_per_parameter
from mhcplan.planner.schedule_p2p import P2P, MessageTable, place_messages
from mhcplan.planner.spec import PlanSpec, schedule_of
from mhcplan.profiles.parameters import ParameterCounts, stage_parameters
from mhcplan.profiles.vocabulary import BF16, FP32, NO_COST, TransferKey, op_key
from mhcplan.sim.build import (
    COMPUTE,
    DATA,
    DATA_EXPERTS,
    EXPERT,
    GRAD_OUT,
    HIGH,
    NUM_ROLES,
    OUT,
    ChunkShape,
    ChunkState,
    Labels,
    Places,
    Stamp,
    Template,
    TemplateBuilder,
    tile,
)
from mhcplan.sim.program import (
    COMPONENTS,
    HIGH_PRIORITY,
    NORMAL_PRIORITY,
    Group,
    Stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from mhcplan.planner.actions import Action, Message
    from mhcplan.planner.schedules import Schedule
    from mhcplan.sim.program import Program

_LETTER = {"F": "F", "I": "B"}  # a message's pass, as its cell names it


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
        pipe_ranks_per_node=placement.pipe_ranks_per_node,
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


@dataclass(frozen=True)
class _StageTemplates:
    """Everything that stages of one shape do; ``before_*``: its states for a pair.

    ``left_by_*``: what is dead after an F, or an I or B, but freed only by the release.
    ."""

    messages: dict[str, Template]
    before_f: ChunkState
    before_i: ChunkState
    left_by_f: frozenset[str]
    left_by_i: frozenset[str]
    actions: dict[str, Template]


class _Lowering:
    def __init__(self, plan: PlanSpec, recompute_block: int | None) -> None:
        self.plan, self.schedule = plan, schedule_of(plan)
        self.work = work_of(plan, recompute_block)
        self.labels = Labels()
        self.shapes = stage_shapes(plan)
        self.placement = _Placement(plan)
        self._chunk_shapes = {shape: ChunkShape() for shape in self.shapes}
        self._stages: dict[StageShape, _StageTemplates] = {}
        self._pairs: dict[tuple[StageShape, StageShape], Template] = {}
        self._messages = _messages(self.schedule, plan.p2p)
        self._grouped = plan.p2p == "grouped"
        self._release_after = 0 if self._grouped else 1  # slots between a send and its release
        # The holders of a DualPipe stage finish it in opposite order. Where weight gradients come
        # from the high-priority stream, the last releases order the compute stream after it.
        on_high = self.work.pre_stream == HIGH
        self._reduces_at_end = on_high or self.schedule.num_directions > 1
        self._batch = -1

    def program(self) -> Program:
        stamps = [stamp for rank in range(self.schedule.num_ranks) for stamp in self._rank(rank)]
        streams, groups, places = self._places()
        meta: dict[str, object] = {
            "schedule": self.schedule.name,
            "num_microbatches": self.schedule.num_microbatches,
            "recompute_block": self.work.recompute_block,
            "plan_digest": self.plan.digest(),
        }
        return tile(stamps, places, self.labels, streams, groups, self._static_bytes(), meta)

    # -- a rank's row

    def _rank(self, rank: int) -> Iterator[Stamp]:
        row = self.schedule.actions[rank]
        last_use = {part.stage: i for i, action in enumerate(row) for part in action.parts}
        for i, action in enumerate(row):
            yield from self._before(rank, i)
            chunks = tuple((part.stage, part.microbatch) for part in action.parts)
            yield Stamp(self._action(action), rank, str(action), chunks)
            if not self._reduces_at_end:
                for stage in sorted({p.stage for p in action.parts if last_use[p.stage] == i}):
                    yield from self._reduce(rank, stage)
        for slot in range(len(row), len(row) + 1 + self._release_after):
            yield from self._before(rank, slot)
        if self._reduces_at_end:
            for stage in sorted(set(self.schedule.stages_of(rank))):
                yield from self._reduce(rank, stage)
        yield self._optimizer(rank)

    def _before(self, rank: int, slot: int) -> Iterator[Stamp]:
        """What stands between action ``slot`` - 1 and the next: messages, waits and releases."""
        messages = self._messages[rank][slot] if slot < len(self._messages[rank]) else ()
        batch = -1
        if self._grouped:
            batch = self._batch = self._batch + 1
        for kind, stage, microbatch, _ in messages:
            yield from self._message(rank, kind, stage, microbatch, batch)
        if self._grouped:
            for kind, stage, microbatch, _ in messages:
                if kind.startswith("RECV"):
                    yield from self._message(rank, f"AWAIT{kind[4:]}", stage, microbatch)
        for letter, stage, microbatch in self._released(rank, slot - self._release_after):
            yield from self._message(rank, f"RELEASE_{letter}", stage, microbatch)

    def _released(self, rank: int, slot: int) -> Iterator[tuple[str, int, int]]:
        """Chunks whose dead buffers can go once what was posted in ``slot`` is done: those sent
        there, and those of the action before it that are sent nowhere."""
        if not 0 <= slot <= len(self.schedule.actions[rank]):
            return
        for kind, stage, microbatch, _ in self._messages[rank][slot]:
            if kind.startswith("SEND"):
                yield kind[-1], stage, microbatch
        for part in self.schedule.actions[rank][slot - 1].parts if slot else ():
            letter = "F" if part.kind == "F" else "B"
            templates = self._templates(self.shapes[part.stage]).messages
            if part.kind != "W" and f"SEND_{letter}" not in templates:
                yield letter, part.stage, part.microbatch

    def _message(
        self, rank: int, what: str, stage: int, microbatch: int, batch: int = -1
    ) -> Iterator[Stamp]:
        template = self._templates(self.shapes[stage]).messages.get(what)
        if template is not None:
            cell = f"{stage}{what}{microbatch}"
            yield Stamp(template, rank, cell, ((stage, microbatch),), batch)

    def _action(self, action: Action) -> Template:
        parts = action.parts
        if len(parts) == 1:
            return self._templates(self.shapes[parts[0].stage]).actions[parts[0].kind]
        forward, backward = (self.shapes[part.stage] for part in parts)
        pair = self._pairs.get((forward, backward))
        if pair is None:
            pair = self._pairs[forward, backward] = self._overlapped(forward, backward)
        return pair

    # -- templates

    def _record(
        self,
        state: ChunkState,
        shape: StageShape,
        emit: Callable[[Chunk], None],
        hold: frozenset[str] = frozenset(),
    ) -> tuple[Template, ChunkState]:
        builder = TemplateBuilder(self.labels, state, hold=(hold,))
        emit(Chunk(self.work, shape, builder, 0))
        return builder.finish(), builder.states[0]

    def _release(self, state: ChunkState) -> Template | None:
        builder = TemplateBuilder(self.labels, state)
        return builder.finish() if builder.release(0, NO_COST) else None

    def _templates(self, shape: StageShape) -> _StageTemplates:
        if shape not in self._stages:
            self._stages[shape] = self._make_templates(shape)
        return self._stages[shape]

    def _make_templates(self, shape: StageShape) -> _StageTemplates:
        messages: dict[str, Template] = {}
        actions: dict[str, Template] = {}
        state = ChunkState(self._chunk_shapes[shape])
        if shape.input_local:
            state.adopt("x0", -1, OUT, self.work.post_stream(is_ffn=True))
        elif not shape.first:
            state = self._receive(state, shape, "F", messages)
        before_f = state
        actions["F"], state = self._record(state, shape, _forward)
        left_by_f = frozenset(state.pending)
        state = self._hand_over(state, shape, "F", messages, needed=not shape.last)
        if shape.output_local:
            stream = COMPUTE if self.work.residual.is_plain else self.work.pre_stream
            state.adopt(f"g{shape.num_sites}", 1, GRAD_OUT, stream)
        elif not shape.last:
            state = self._receive(state, shape, "I", messages)
        before_i = state
        actions["I"], state = self._record(before_i, shape, lambda c: _backward(c, weights=False))
        left_by_i = frozenset(state.pending)
        actions["B"], after_b = self._record(
            before_i, shape, lambda c: _backward(c, weights=True), hold=left_by_i
        )
        assert frozenset(after_b.pending) == left_by_i
        actions["W"], _ = self._record(state, shape, _weights, hold=left_by_i)
        self._hand_over(state, shape, "I", messages, needed=not shape.first)
        return _StageTemplates(messages, before_f, before_i, left_by_f, left_by_i, actions)

    def _receive(
        self, state: ChunkState, shape: StageShape, pass_: str, messages: dict[str, Template]
    ) -> ChunkState:
        """The receive of an action's input, and a wait for it that a batched call needs."""
        receive, state = self._record(state, shape, lambda c: c.receive(pass_))
        messages[f"RECV_{_LETTER[pass_]}"] = receive
        messages[f"AWAIT_{_LETTER[pass_]}"], _ = self._record(
            state, shape, lambda c: c.await_message(pass_)
        )
        return state

    def _hand_over(
        self,
        state: ChunkState,
        shape: StageShape,
        pass_: str,
        messages: dict[str, Template],
        *,
        needed: bool,
    ) -> ChunkState:
        """Send of what an action made, and the release of all that is dead by then.

        The release runs later, so what it knows of other streams is not handed on.
        """
        local = shape.output_local if pass_ == "F" else shape.input_local
        sent = state
        if needed and not local:
            send, sent = self._record(state, shape, lambda c: c.send(pass_))
            messages[f"SEND_{_LETTER[pass_]}"] = send
        released = self._release(sent)
        if released is not None:
            messages[f"RELEASE_{_LETTER[pass_]}"] = released
        sent.clock = dict(state.clock)
        sent.pending = []
        return sent

    def _overlapped(self, forward: StageShape, backward: StageShape) -> Template:
        """F of one chunk beside B of another, layer by layer in the order of figure 4."""
        first, second = self._templates(forward), self._templates(backward)
        hold = first.left_by_f, second.left_by_i
        builder = TemplateBuilder(self.labels, first.before_f, second.before_i, hold=hold)
        f = Chunk(self.work, forward, builder, 0)
        b = Chunk(self.work, backward, builder, 1)
        layers_f, layers_b = range(len(forward.moe)), reversed(range(len(backward.moe)))
        f.enter()
        b.enter_backward()
        for k, m in zip_longest(layers_f, layers_b):
            _overlapped_layer(f, k, b, m)
        f.leave()
        b.leave_backward()
        b.enter_weights()
        b.leave_weights()
        assert tuple(frozenset(state.pending) for state in builder.states) == hold
        return builder.finish()

    # -- the end of a step

    def _reduce(self, rank: int, stage: int) -> Iterator[Stamp]:
        """Reduce a stage's gradients over the GPUs that hold the same weights."""
        shared = self._shared(rank, stage)
        if not shared:
            return
        builder = TemplateBuilder(self.labels, self._end_state(stage))
        for name, role, elements, gpus in shared:
            per_node = self.placement.ranks_per_node(gpus)
            key = TransferKey("reduce_scatter", len(gpus), per_node, FP32 * elements)
            builder.op(0, "grad_reduce", "O", role, key, category="dp", name=f"grad_reduce.{name}",
                       payload_bytes=key.num_bytes, after_compute=True)  # fmt: skip
        yield self._end_stamp(builder, rank, (stage,), "REDUCE_GRAD")

    def _optimizer(self, rank: int) -> Stamp:
        """AdamW on the own shard of every stage held, then the gather of the new weights."""
        stages = tuple(sorted(set(self.schedule.stages_of(rank))))
        builder = TemplateBuilder(self.labels, *map(self._end_state, stages))
        counts = [self._counts(stage) for stage in stages]
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
        return self._end_stamp(builder, rank, stages, "OPTIMIZER")

    def _end_state(self, stage: int) -> ChunkState:
        return ChunkState(self._chunk_shapes[self.shapes[stage]])

    def _end_stamp(
        self, builder: TemplateBuilder, rank: int, stages: tuple[int, ...], cell: str
    ) -> Stamp:
        """A stamp in the chunk of the first microbatch that this rank runs of each stage."""
        row = self.schedule.actions[rank]
        first = {
            stage: min(p.microbatch for a in row for p in a.parts if p.stage == stage)
            for stage in stages
        }
        label = f"{stages[0]}{cell}" if len(stages) == 1 else cell
        return Stamp(builder.finish(), rank, label, tuple((s, first[s]) for s in stages))

    def _counts(self, stage: int) -> ParameterCounts:
        return stage_parameters(self.plan.model, self.plan.residual, self.plan.stages[stage])

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
        shards = self._shards(rank, self._counts(stage))
        return [shard for shard in shards if shard[2] and len(shard[3]) > 1]

    def _static_bytes(self) -> NDArray[np.int64]:
        """[rank, component]: weights and gradients of every stage held, the optimizer's shard."""
        static = np.zeros((self.schedule.num_ranks, len(COMPONENTS)), np.int64)
        for rank in range(self.schedule.num_ranks):
            for stage in set(self.schedule.stages_of(rank)):
                counts = self._counts(stage)
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
        stages = range(self.schedule.num_stages)
        first = np.array([2 * blocks.start for blocks in self.plan.stages], np.int64)
        rank_of = np.array(
            [[self.schedule.rank_of(stage, b) for b in range(m)] for stage in stages], np.int64
        )
        shapes = [self._chunk_shapes[shape] for shape in self.shapes]
        places = Places(m, shapes, first, rank_of, table.role_stream, table.role_group,
                        table.pipe_stream, table.pipe_group)  # fmt: skip
        return tuple(table.streams), tuple(table.groups), places


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


def _messages(schedule: Schedule, p2p: P2P) -> MessageTable:
    """Where messages are posted; eager receives at least one action ahead of their need.

    A receive that is posted earlier cannot block: its flow has a stream of its own, and messages of
    a flow keep their order.
    """
    placed = place_messages(schedule, p2p)
    if p2p == "grouped":
        return placed
    table: list[tuple[tuple[Message, ...], ...]] = []
    for row, slots in zip(schedule.actions, placed, strict=True):
        needed = {
            ("F" if part.kind == "F" else "B", part.stage, part.microbatch): i
            for i, action in enumerate(row)
            for part in action.parts
            if part.kind != "W"
        }
        moved: list[list[Message]] = [[] for _ in slots]
        for slot, messages in enumerate(slots):
            for message in messages:
                at = slot
                if message.kind.startswith("RECV"):
                    use = needed[message.kind[-1], message.stage, message.microbatch]
                    at = min(slot, max(use - 1, 0))
                moved[at].append(message)
        table.append(tuple(map(tuple, moved)))
    return tuple(table)


# -- orders of phases


def _forward(c: Chunk) -> None:
    c.enter()
    for k in range(len(c.shape.moe)):
        c.attention_forward(k)
        c.ffn_enter_forward(k)
        c.dispatch_forward(k)
        c.ffn_forward(k)
        c.combine_forward(k)
        c.ffn_leave_forward(k)
    c.leave()


def _backward(c: Chunk, *, weights: bool) -> None:
    """B, or with ``weights`` False I. DISPATCH(B) runs beside MLP(W)."""
    c.recompute(len(c.shape.moe) - 1, of_ffn=True)
    c.enter_backward()
    for k in reversed(range(len(c.shape.moe))):
        c.recompute(k, of_ffn=True) if k < len(c.shape.moe) - 1 else None
        c.ffn_leave_backward(k)
        c.combine_backward(k)
        c.ffn_backward(k)
        c.dispatch_backward(k)
        if weights:
            c.ffn_weights(k)
        c.ffn_enter_backward(k)
        c.recompute(k, of_ffn=False)
        c.attention_backward(k)
        if weights:
            c.attention_weights(k)
    c.leave_backward()
    if weights:
        c.enter_weights()
        c.leave_weights()


def _weights(c: Chunk) -> None:
    c.enter_weights()
    for k in reversed(range(len(c.shape.moe))):
        c.ffn_weights(k)
        c.attention_weights(k)
    c.leave_weights()


def _overlapped_layer(f: Chunk, k: int | None, b: Chunk, m: int | None) -> None:
    """Block k of the forward beside block m of the backward, in the order of figure 4; a chunk that
    has no block left (None) sits out.

    One period of the figure, from the recompute at its right end to ATTN(W): on the compute stream
    Recompute(B) F_pre^A(F) ATTN(F) F_post^A(F) F_pre^M(F) MLP(B) MLP(W) MLP(F) F_pre^M(B)
    F_post^A(B) ATTN(B) F_pre^A(B) ATTN(W); on the expert stream COMBINE(B) DISPATCH(F) DISPATCH(B)
    COMBINE(F); F_post^M(B) and F_post^M(F) on the high-priority stream, each between two of these.
    """
    if m is not None:
        b.recompute(m, of_ffn=True)
        b.ffn_leave_backward(m)
        b.combine_backward(m)
    if k is not None:
        f.attention_forward(k)
        f.ffn_enter_forward(k)
        f.dispatch_forward(k)
    if m is not None:
        b.ffn_backward(m)
        b.dispatch_backward(m)
        b.ffn_weights(m)
    if k is not None:
        f.ffn_forward(k)
        f.combine_forward(k)
    if m is not None:
        b.ffn_enter_backward(m)
        b.recompute(m, of_ffn=False)
        b.attention_backward(m)
    if k is not None:
        f.ffn_leave_forward(k)
    if m is not None:
        b.attention_weights(m)
