"""What stages of one shape do, recorded once: templates of their actions, messages and releases,
and of the end of a step.

What is recorded depends on a plan's :class:`~mhcplan.planner.lowering.form.Form` and on the shapes
of its stages only; filled with numbers, on its :class:`~mhcplan.planner.lowering.work.Work`. Plans
that share either share the templates, also from one what-if to the next. Each bundle numbers its
labels by itself; :mod:`mhcplan.planner.lowering.lower` puts them together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from mhcplan.planner.lowering.mtp import make_chunk
from mhcplan.planner.lowering.numbers import Numbers, op_key
from mhcplan.planner.schedules.phase_orders import backward_layer, forward_layer, overlapped_layers
from mhcplan.profiles.vocabulary import BF16, FP32, NO_COST, TransferKey
from mhcplan.sim.build import (
    COMPUTE,
    GRAD_OUT,
    OUT,
    ChunkShape,
    ChunkState,
    Labels,
    Template,
    TemplateBuilder,
)
from mhcplan.sim.kept import Kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.planner.lowering.chunks import Chunk
    from mhcplan.planner.lowering.form import Form
    from mhcplan.planner.lowering.placement import Team
    from mhcplan.planner.lowering.work import StageShape, Work

_LETTER = {"F": "F", "I": "B"}  # a message's pass, as its cell names it
# Ops at the end of a step, which no action has.
_END_OPS = ("adamw", "zero_gradients", "grad_reduce.dense", "grad_reduce.experts",
            "param_gather.dense", "param_gather.experts")  # fmt: skip
_KEPT = 256  # bundles filled with numbers
# Ops of recorded bundles, at about half a kilobyte each. A search for a plan comes back to what it
# recorded for other layouts: with 256 bundles it had 254 answers in 30 CPU seconds, with these 434.
_KEPT_OPS = 1 << 18


@dataclass(frozen=True)
class StageTemplates:
    """Everything that stages of one shape do.

    Attributes:
        labels: labels of all templates, in the order of their first use.
        chunk: names of ops and buffers.
        messages, actions: templates, by names such as SEND_F, AWAIT_B, RELEASE_F and F, I, B, W.
        before_f, before_i: states of the chunk before these actions, for a pair.
        left_by_f, left_by_i: what is dead after an F, or an I or B, but freed only by the release.
    """

    labels: Labels
    chunk: ChunkShape
    messages: dict[str, Template]
    before_f: ChunkState
    before_i: ChunkState
    left_by_f: frozenset[str]
    left_by_i: frozenset[str]
    actions: dict[str, Template]

    @property
    def num_ops(self) -> int:
        """Ops of all templates."""
        return sum(len(some.ops) for some in (*self.actions.values(), *self.messages.values()))


@lru_cache(maxsize=_KEPT)
def stage_templates(work: Work, shape: StageShape) -> StageTemplates:
    """What stages of ``shape`` do."""
    recorded, numbers = _recorded_stage(work.form, shape), Numbers(work)
    meaning = recorded.labels.meaning(numbers.key, numbers.payload_bytes)

    def filled(templates: dict[str, Template]) -> dict[str, Template]:
        return {name: template.filled(meaning) for name, template in templates.items()}

    return replace(
        recorded, labels=meaning.labels, chunk=recorded.chunk.filled(numbers.num_bytes),
        messages=filled(recorded.messages), actions=filled(recorded.actions),
    )  # fmt: skip


@lru_cache(maxsize=_KEPT)
def pair_template(work: Work, forward: StageShape, backward: StageShape) -> Template:
    """F of one chunk beside B of another, layer by layer in the order of figure 4."""
    recorded, numbers = _recorded_pair(work.form, forward, backward), Numbers(work)
    return recorded.filled(recorded.labels.meaning(numbers.key, numbers.payload_bytes))


def _recorded_stage(form: Form, shape: StageShape) -> StageTemplates:
    return _stages.find((form, shape), lambda: _Recorder(form, shape).templates())


def _recorded_pair(form: Form, forward: StageShape, backward: StageShape) -> Template:
    return _pairs.find((form, forward, backward), lambda: _record_pair(form, forward, backward))


_stages: Kept[StageTemplates] = Kept(_KEPT_OPS, lambda stage: stage.num_ops)
_pairs: Kept[Template] = Kept(_KEPT_OPS, lambda pair: len(pair.ops))


def _record_pair(form: Form, forward: StageShape, backward: StageShape) -> Template:
    first, second = _recorded_stage(form, forward), _recorded_stage(form, backward)
    hold = first.left_by_f, second.left_by_i
    builder = TemplateBuilder(Labels(), first.before_f, second.before_i, hold=hold)
    f = make_chunk(form, forward, builder, 0)
    b = make_chunk(form, backward, builder, 1)
    known = first.chunk.size, second.chunk.size
    f.enter()
    b.enter_backward()
    overlapped_layers(f, len(forward.moe), b, len(backward.moe), form.overlap_order)
    f.leave()
    b.leave_backward()
    b.enter_weights()
    b.leave_weights()
    assert tuple(frozenset(state.pending) for state in builder.states) == hold
    assert known == (first.chunk.size, second.chunk.size), "a pair names nothing new"
    return builder.finish()


class Shard(NamedTuple):
    """Weights on one GPU: ``elements`` of them, held by each of a team, which traffic of stream
    role ``role`` reduces and gathers."""

    name: str
    role: int
    elements: int
    team: Team

    @property
    def is_shared(self) -> bool:
        """Whether there is anything to reduce and gather."""
        return self.elements > 0 and self.team.gpus > 1

    @property
    def own_elements(self) -> int:
        """What the GPU's optimizer updates (ZeRO-1)."""
        return -(-self.elements // self.team.gpus)

    def key(self, pattern: str, bytes_per_element: int) -> TransferKey:
        """Cost of a collective over the shard."""
        num_bytes = bytes_per_element * self.elements
        return TransferKey(pattern, self.team.gpus, self.team.per_node, num_bytes)


@lru_cache(maxsize=_KEPT)
def reduce_template(work: Work, shape: StageShape, shards: tuple[Shard, ...]) -> Template:
    """Reduce a stage's gradients over the GPUs that hold the same weights."""
    builder = TemplateBuilder(Labels(), ChunkState(_recorded_stage(work.form, shape).chunk))
    for shard in shards:
        if shard.is_shared:
            key = shard.key("reduce_scatter", FP32)
            builder.op(0, "grad_reduce", "O", shard.role, key, category="dp",
                       name=f"grad_reduce.{shard.name}", payload_bytes=key.num_bytes,
                       after_compute=True)  # fmt: skip
    return builder.finish()


@lru_cache(maxsize=_KEPT)
def optimizer_template(
    work: Work, shapes: tuple[StageShape, ...], shards: tuple[tuple[Shard, ...], ...]
) -> Template:
    """AdamW on the own shards of every stage of a rank, then the gather of the new weights."""
    states = [ChunkState(_recorded_stage(work.form, shape).chunk) for shape in shapes]
    builder = TemplateBuilder(Labels(), *states)
    own = sum(shard.own_elements for of_stage in shards for shard in of_stage)
    builder.op(0, "adamw", "O", COMPUTE, op_key("adamw", "O", parameters=own),
               category="optimizer", name="adamw")  # fmt: skip
    shared = [(slot, s) for slot, of_stage in enumerate(shards) for s in of_stage if s.is_shared]
    for slot, shard in shared:
        builder.wait(slot, f"grad_reduce.{shard.name}", shard.role)
    for slot, shard in shared:
        key = shard.key("all_gather", BF16)
        builder.op(slot, "param_gather", "O", shard.role, key, category="dp",
                   name=f"param_gather.{shard.name}", payload_bytes=key.num_bytes,
                   after_compute=True)  # fmt: skip
    held = sum(shard.elements for of_stage in shards for shard in of_stage)
    builder.op(0, "zero_gradients", "O", COMPUTE, op_key("zero_gradients", "O", parameters=held),
               category="optimizer", name="zero_gradients")  # fmt: skip
    return builder.finish()


class _Recorder:
    def __init__(self, form: Form, shape: StageShape) -> None:
        self.form, self.shape = form, shape
        self.labels, self.chunk = Labels(), ChunkShape()
        self.messages: dict[str, Template] = {}

    def templates(self) -> StageTemplates:
        shape, actions = self.shape, dict[str, Template]()
        state = ChunkState(self.chunk)
        if shape.input_local:
            state.adopt("x0", -1, OUT, self.form.post_stream(is_ffn=True))
        elif not shape.first:
            state = self._receive(state, "F")
        before_f = state
        actions["F"], state = self._record(state, _forward)
        left_by_f = frozenset(state.pending)
        state = self._hand_over(state, "F", needed=not shape.last)
        if shape.output_local:
            stream = COMPUTE if self.form.is_plain else self.form.pre_stream
            state.adopt(f"g{shape.num_sites}", 1, GRAD_OUT, stream)
        elif not shape.last:
            state = self._receive(state, "I")
        before_i = state
        actions["I"], state = self._record(before_i, lambda c: _backward(c, weights=False))
        left_by_i = frozenset(state.pending)
        actions["B"], after_b = self._record(
            before_i, lambda c: _backward(c, weights=True), hold=left_by_i
        )
        assert frozenset(after_b.pending) == left_by_i
        actions["W"], _ = self._record(state, _weights, hold=left_by_i)
        self._hand_over(state, "I", needed=not shape.first)
        for name in _END_OPS:
            self.chunk.symbol(name)
        return StageTemplates(
            self.labels, self.chunk, self.messages, before_f, before_i, left_by_f, left_by_i,
            actions,
        )  # fmt: skip

    def _record(
        self,
        state: ChunkState,
        emit: Callable[[Chunk], None],
        hold: frozenset[str] = frozenset(),
    ) -> tuple[Template, ChunkState]:
        builder = TemplateBuilder(self.labels, state, hold=(hold,))
        emit(make_chunk(self.form, self.shape, builder, 0))
        return builder.finish(), builder.states[0]

    def _release(self, state: ChunkState) -> Template | None:
        builder = TemplateBuilder(self.labels, state)
        return builder.finish() if builder.release(0, NO_COST) else None

    def _receive(self, state: ChunkState, pass_: str) -> ChunkState:
        """The receive of an action's input, and a wait for it that a batched call needs."""
        receive, state = self._record(state, lambda c: c.receive(pass_))
        self.messages[f"RECV_{_LETTER[pass_]}"] = receive
        self.messages[f"AWAIT_{_LETTER[pass_]}"], _ = self._record(
            state, lambda c: c.await_message(pass_)
        )
        return state

    def _hand_over(self, state: ChunkState, pass_: str, *, needed: bool) -> ChunkState:
        """Send of what an action made, and the release of all that is dead by then.

        The release runs later, so what it knows of other streams is not handed on.
        """
        local = self.shape.output_local if pass_ == "F" else self.shape.input_local
        sent = state
        if needed and not local:
            send, sent = self._record(state, lambda c: c.send(pass_))
            self.messages[f"SEND_{_LETTER[pass_]}"] = send
        released = self._release(sent)
        if released is not None:
            self.messages[f"RELEASE_{_LETTER[pass_]}"] = released
        sent.clock = dict(state.clock)
        sent.pending = []
        return sent


# -- orders of phases


def _forward(c: Chunk) -> None:
    c.enter()
    for k in range(len(c.shape.moe)):
        forward_layer(c, k)
    c.leave()


def _backward(c: Chunk, *, weights: bool) -> None:
    """B, or with ``weights`` False I."""
    blocks = range(len(c.shape.moe))
    c.recompute(blocks[-1], of_ffn=True)
    c.enter_backward()
    for k in reversed(blocks):
        if k != blocks[-1]:
            c.recompute(k, of_ffn=True)
        backward_layer(c, k, weights=weights)
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
