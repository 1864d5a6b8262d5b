"""Replay of a published trace of one overlapped F&B pair, alone and with mHC put into it.

DeepSeek published a profile of DeepSeek-V3's training (deepseek-ai/profile-data): an overlapped
pair of four MoE layers, expert parallel over 64 H800, without pipeline messages. Its phases are the
boxes of figure 4; here they become a Program in the planner's own order
(:mod:`mhcplan.planner.schedules.phase_orders`), which tests that order and the engine: durations
are the trace's, so contention between kernels and traffic is in them already, and must not be
added.

With :class:`MhcTimes` the boxes of the mHC paper's figure 4 join, and with ``message_ns`` the
pipeline messages, as they are in the steady state: all ranks do the same at the same time, so what
a pair waits for is what its own rank sent after the pair before. Expert traffic and messages share
a stream, as in the figure. Only times are modelled: no buffer has a size, the host takes no time.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.planner.predict import simulate
from mhcplan.planner.schedules.phase_orders import overlapped_layers
from mhcplan.sim.breakdown import breakdown
from mhcplan.sim.build import (
    COMPUTE,
    DATA,
    EXPERT,
    HIGH,
    NUM_ROLES,
    ChunkShape,
    ChunkState,
    Labels,
    New,
    TemplateBuilder,
)
from mhcplan.sim.program import (
    COMPONENTS,
    HIGH_PRIORITY,
    NORMAL_PRIORITY,
    CostTable,
    Group,
    Program,
    Stream,
)
from mhcplan.sim.tiling import Places, Stamps, tile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mhcplan.planner.plan.spec import Engine
    from mhcplan.sim.timeline import Timeline

MICROSECOND_NS = 1000
_SIDE_STREAM = "wgrad_side"  # runs half of MLP(W)'s GEMMs inside the span of the other half
_EP_RANKS = 64


class Phase(NamedTuple):
    """A box of one layer of the trace: when it ran, and for how long its kernels did."""

    layer: int
    name: str
    stream: str
    busy_ns: int
    start_ns: int
    end_ns: int


class MhcTimes(NamedTuple):
    """What mHC adds to a pair, in ns: per site, and ``recompute`` of a stage's sites at once."""

    pre_forward: int
    post_forward: int
    post_backward: int
    pre_backward: int
    recompute: int


@dataclass(frozen=True)
class Measures:
    """Which of the paper's measures (section 4.3.3) are taken beside fused kernels.

    Attributes:
        priority: F_post,res of FFN sites runs on the high-priority stream.
        decoupled: recompute starts from what is stored, before the pipeline message is here.
    """

    priority: bool = True
    decoupled: bool = True


@dataclass(frozen=True)
class Replay:
    """A number of pairs in a row, played."""

    program: Program
    timeline: Timeline
    breakdown_ns: dict[str, int]


def read_phases(path: Path) -> tuple[Phase, ...]:
    """Phases of the trace, in order of their start.

    The weight gradients that ran on a side stream lie within the span of MLP(W) and count there.
    """
    with path.open(encoding="utf-8", newline="") as file:
        phases = [
            Phase(
                int(row["layer"]), row["phase"], row["stream"],
                *(int(row[name]) * MICROSECOND_NS for name in ("busy_us", "start_us", "end_us")),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip
    return tuple(sorted((p for p in phases if p.stream != _SIDE_STREAM), key=lambda p: p.start_ns))


def exposed_ns(phases: Sequence[Phase]) -> int:
    """Time in which the trace communicates and computes nothing, by the spans of its phases."""
    compute = [p for p in phases if p.stream == "compute"]
    ends = np.maximum.accumulate([0, *(p.end_ns for p in compute)])
    gaps = zip(ends, [p.start_ns for p in compute], strict=False)
    traffic = [(p.start_ns, p.end_ns) for p in phases if p.stream == "comm"]
    return sum(
        max(min(end, until) - max(begin, since), 0)
        for since, until in gaps
        for begin, end in traffic
    )


def replay(
    phases: Sequence[Phase],
    *,
    busy: bool = False,
    pairs: int = 1,
    mhc: MhcTimes | None = None,
    measures: Measures = Measures(),
    message_ns: int = 0,
    engine: Engine = "compiled",
) -> Replay:
    """Play the trace's pair ``pairs`` times in a row.

    Args:
        phases: of the trace.
        busy: let a phase take the time of its kernels, without the gaps between them.
        pairs: how often; from the second on, a pair is in the steady state.
        mhc: what mHC's boxes take; None leaves them out.
        measures: how mHC is scheduled.
        message_ns: a pipeline message, of which a pair waits for two; 0 leaves them out.
        engine: plays it.
    """
    durations = {(p.name, p.layer): p.busy_ns if busy else p.end_ns - p.start_ns for p in phases}
    layers = 1 + max(p.layer for p in phases)
    labels, shape = Labels(), ChunkShape()
    builder = TemplateBuilder(labels, ChunkState(shape))
    costs = _Costs(durations, mhc, message_ns)
    sent = "", ""
    for number in range(pairs):
        sent = _Pair(builder, costs, measures, number).record(layers, sent)
    program = _program(builder, shape, labels)
    table = costs.table(program)
    timeline = simulate(program, table, engine)
    return Replay(program, timeline, breakdown(program, timeline).reported)


def period_ns(
    phases: Sequence[Phase],
    mhc: MhcTimes | None,
    measures: Measures,
    message_ns: int,
) -> tuple[int, dict[str, int]]:
    """Length of a pair in the steady state, and what its time is spent on."""
    three, four = (
        replay(phases, pairs=pairs, mhc=mhc, measures=measures, message_ns=message_ns)
        for pairs in (3, 4)
    )
    spent = {name: ns - three.breakdown_ns[name] for name, ns in four.breakdown_ns.items()}
    return four.timeline.step_ns - three.timeline.step_ns, spent


class _Costs:
    """Durations by cost key: of the trace's boxes, of mHC's, of messages."""

    def __init__(
        self, durations: dict[tuple[str, int], int], mhc: MhcTimes | None, message_ns: int
    ) -> None:
        self.mhc, self.message_ns = mhc, message_ns
        self.by_key = {f"{name} {layer}": ns for (name, layer), ns in durations.items()}
        if mhc is not None:
            self.by_key |= mhc._asdict()
        self.by_key["message"] = message_ns

    def table(self, program: Program) -> CostTable:
        zero = np.zeros(len(program.cost_keys), np.int64)
        return CostTable(
            np.array([self.by_key[key] for key in program.cost_keys], np.int64), zero, zero
        )


class _Pair:
    """Puts the ops of one pair into the template; names carry the pair's number."""

    def __init__(
        self, builder: TemplateBuilder, costs: _Costs, measures: Measures, number: int
    ) -> None:
        self._builder, self.costs, self.measures, self._number = builder, costs, measures, number

    def record(self, num_layers: int, arrived: tuple[str, str]) -> tuple[str, str]:
        """Record F beside B; takes and returns names of what F and B hand to the next pair."""
        f, b = (_Chunk(self, name, num_layers) for name in arrived)
        overlapped_layers(f, num_layers, b, num_layers, "mhc")
        return self._message("F", f.last), self._message("I", b.last)

    def box(self, name: str, pass_: str, stream: int, layer: int, read: str) -> str:
        """A box of the trace; returns the name of what it makes, as all of these do."""
        category = "compute" if stream == COMPUTE else "ep"
        return self._op(name, pass_, stream, f"{name} {layer}", [read], layer, category)

    def mhc(self, part: str, letter: str, layer: int, *reads: str) -> str:
        """A box of mHC (``part`` a field of :class:`MhcTimes`) at site ``letter``, if there is."""
        if self.costs.mhc is None:
            return reads[0]
        urgent = letter == "M" and part.startswith("post") and self.measures.priority
        pass_ = "F" if part.endswith("forward") else "I"
        stream = HIGH if urgent else COMPUTE
        return self._op(f"{part} {letter}", pass_, stream, part, reads, layer, "mhc")

    def recompute(self, layer: int, arrived: str) -> str:
        """The recompute of the whole stage, if there is one."""
        if self.costs.mhc is None:
            return ""
        reads = "" if self.measures.decoupled else arrived
        return self._op("recompute", "R", COMPUTE, "recompute", [reads], layer, "recompute")

    def _message(self, pass_: str, read: str) -> str:
        """A pipeline message; without one its content is there at once."""
        if not self.costs.message_ns:
            return read
        return self._op("pp_send", pass_, DATA, "message", [read], -1, "pp")

    def _op(
        self, kind: str, pass_: str, stream: int, key: str, reads: Sequence[str], layer: int,
        category: str,
    ) -> str:  # fmt: skip
        made = f"{kind} {pass_}{layer} #{self._number}"
        self._builder.op(
            0, kind, pass_, stream, key, category=category, site=layer, name=made,
            reads=[name for name in reads if name], new=[New(made, 0)],
        )  # fmt: skip
        return made


class _Chunk:
    """Phases of a pair's F, or of its B: a box reads what the box before it made."""

    def __init__(self, pair: _Pair, arrived: str, num_layers: int) -> None:
        self._pair, self._top = pair, num_layers - 1
        self.last = arrived
        self._rebuilt = self._deferred = ""

    def attention_forward(self, block: int) -> None:
        self.last = self._pair.mhc("pre_forward", "A", block, self.last)
        self.last = self._pair.box("attn(F)", "F", COMPUTE, block, self.last)
        self.last = self._pair.mhc("post_forward", "A", block, self.last)

    def ffn_enter_forward(self, block: int) -> None:
        self.last = self._pair.mhc("pre_forward", "M", block, self.last)

    def dispatch_forward(self, block: int) -> None:
        self.last = self._pair.box("dispatch(F)", "F", EXPERT, block, self.last)

    def ffn_forward(self, block: int) -> None:
        self.last = self._pair.box("mlp(F)", "F", COMPUTE, block, self.last)

    def combine_forward(self, block: int) -> None:
        self.last = self._pair.box("combine(F)", "F", EXPERT, block, self.last)

    def ffn_leave_forward(self, block: int) -> None:
        self.last = self._pair.mhc("post_forward", "M", block, self.last)

    def recompute(self, block: int, *, of_ffn: bool) -> None:
        if of_ffn and block == self._top:
            self._rebuilt = self._pair.recompute(block, self.last)

    def ffn_leave_backward(self, block: int) -> None:
        self.last = self._pair.mhc("post_backward", "M", block, self.last, self._rebuilt)

    def combine_backward(self, block: int) -> None:
        self.last = self._pair.box("combine(B)", "I", EXPERT, self._of_trace(block), self.last)

    def ffn_backward(self, block: int) -> None:
        self.last = self._pair.box("mlp(B)", "I", COMPUTE, self._of_trace(block), self.last)
        self._deferred = self.last

    def dispatch_backward(self, block: int) -> None:
        self.last = self._pair.box("dispatch(B)", "I", EXPERT, self._of_trace(block), self.last)

    def ffn_weights(self, block: int) -> None:
        self._pair.box("mlp(W)", "W", COMPUTE, self._of_trace(block), self._deferred)

    def ffn_enter_backward(self, block: int) -> None:
        self.last = self._pair.mhc("pre_backward", "M", block, self.last)

    def attention_backward(self, block: int) -> None:
        self.last = self._pair.mhc("post_backward", "A", block, self.last)
        self.last = self._pair.box("attn(B)", "I", COMPUTE, self._of_trace(block), self.last)
        self._deferred = self.last
        self.last = self._pair.mhc("pre_backward", "A", block, self.last)

    def attention_weights(self, block: int) -> None:
        self._pair.box("attn(W)", "W", COMPUTE, self._of_trace(block), self._deferred)

    def _of_trace(self, block: int) -> int:
        """The trace counts layers in order of time; the backward begins with the last."""
        return self._top - block


def _program(builder: TemplateBuilder, shape: ChunkShape, labels: Labels) -> Program:
    """One rank that runs the recorded ops once."""
    streams = (
        Stream(0, "compute", NORMAL_PRIORITY),
        Stream(0, "high", HIGH_PRIORITY),
        Stream(0, "comm", NORMAL_PRIORITY),
    )
    groups = Group("ep", (0,), _EP_RANKS, "inter_node"), Group("pp", (0,), 2, "inter_node")
    role_stream, role_group = (np.full((1, NUM_ROLES), -1, np.int64) for _ in range(2))
    role_stream[0, [COMPUTE, HIGH, EXPERT, DATA]] = [0, 1, 2, 2]
    role_group[0, [EXPERT, DATA]] = [0, 1]
    none = np.full((2, 1, 1), -1, np.int64)
    one = np.zeros(1, np.int64)
    chunk = np.zeros((1, 2), np.int64)
    places = Places(
        1, [shape], one, np.zeros((1, 1), np.int64), role_stream, role_group, none[..., None], none
    )
    return tile(
        [builder.finish()], Stamps(one, one, chunk, chunk, one - 1, one), ("OVERLAP_F_B",), places,
        labels, streams, groups, np.zeros((1, len(COMPONENTS)), np.int64), {},
    )  # fmt: skip
