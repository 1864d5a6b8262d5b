"""How a :class:`~mhcplan.sim.program.Program` is made: op templates, tiled by numpy.

A pipeline step repeats few patterns: the forward of a stage, its backward, an overlapped pair.
:class:`TemplateBuilder` records such a pattern once, in host issue order. It is told which buffers
an op reads and writes; **the waits follow from that**, and so does the op that may allocate and
free each buffer (rules in :mod:`mhcplan.sim.program`). :func:`tile` then stamps the template out
for every microbatch, on every rank, without a Python loop over ops.

Names inside a template are local to a *chunk* (one stage's layers for one microbatch). An
overlapped pair has two chunks, slot 0 (the forward's) and slot 1 (the backward's). The chunk at hop
+1 is the next stage's for the same microbatch, at hop -1 the previous stage's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mhcplan.sim.program import COMPONENTS, Csr, Program

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from mhcplan.sim.program import Group, Stream

# Roles of streams; PIPE becomes a stream per flow when a template is stamped.
COMPUTE, HIGH, EXPERT, PIPE, DATA, DATA_EXPERTS = range(6)
NUM_ROLES = 6
OUT, GRAD_OUT = "out", "grad_out"  # what a chunk hands to the next and to the previous stage
_RESERVED = (OUT, GRAD_OUT)
_TAIL_SLOT = -1


class New(NamedTuple):
    """A buffer that an op makes: its name in the chunk, size and component of the memory report."""

    name: str
    num_bytes: int
    component: str = "activations"


class ChunkShape:
    """Names of a chunk's ops and buffers, numbered. Stages of equal shape share one."""

    def __init__(self) -> None:
        self.symbols: dict[str, int] = {name: i for i, name in enumerate(_RESERVED)}
        self.buffers: dict[str, int] = {name: i for i, name in enumerate(_RESERVED)}
        self.buffer_bytes: list[int] = [0, 0]
        self.buffer_component: list[int] = [0, 0]

    def symbol(self, name: str) -> int:
        """Number of the op called ``name``."""
        return self.symbols.setdefault(name, len(self.symbols))

    def declare(self, new: New) -> int:
        """Number of a buffer, with its size. Declaring it again with another size is a bug."""
        number = self.buffers.get(new.name)
        component = COMPONENTS.index(new.component)
        if number is None:
            number = self.buffers[new.name] = len(self.buffers)
            self.buffer_bytes.append(new.num_bytes)
            self.buffer_component.append(component)
        elif number < len(_RESERVED) and self.buffer_bytes[number] == 0:
            self.buffer_bytes[number], self.buffer_component[number] = new.num_bytes, component
        assert self.buffer_bytes[number] == new.num_bytes, f"{new} declared with another size"
        return number


class _Done(NamedTuple):
    """An op as others depend on it: ``seq`` counts the ops of its chunk over all its actions."""

    slot: int
    stream: int
    seq: int
    symbol: int
    hop: int = 0


@dataclass
class ChunkState:
    """What is known of a chunk between its actions; F leaves it to I, I to W."""

    shape: ChunkShape
    producer: dict[str, _Done] = field(default_factory=dict[str, _Done])
    users: dict[str, list[_Done]] = field(default_factory=dict[str, list[_Done]])
    clock: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    seq: int = 0
    pending: list[str] = field(default_factory=list[str])
    foreign: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    def adopt(self, name: str, hop: int, symbol: str, stream: int) -> None:
        """Let ``name`` stand for the ``symbol`` buffer of the chunk at ``hop`` (same rank).

        ``stream``: the stream that writes it there.
        """
        number = _RESERVED.index(symbol)
        self.foreign[name] = (hop, number)
        self.producer[name] = _Done(0, stream, 0, number, hop)


@dataclass(frozen=True)
class Template:
    """A recorded pattern: columns of m ops, and references that tiling resolves."""

    columns: dict[str, NDArray[np.int64]]
    waits: NDArray[np.int64]  # rows (op, slot, hop, symbol); slot -1: the compute op before
    buffers: dict[str, NDArray[np.int64]]  # reads, writes, allocs, frees: (op, slot, hop, number)
    symbols: NDArray[np.int64]  # rows (op, slot, symbol)
    tail: int  # last op on the compute stream, or -1

    @property
    def num_ops(self) -> int:
        """Ops of one stamp."""
        return len(self.columns["kind"])


class TemplateBuilder:
    """Records ops in host issue order and derives waits, allocations and frees.

    Args:
        labels: tables of kinds, categories and cost keys that the Program will share.
        states: the chunks of slot 0 and, for a pair, slot 1; copied, see :attr:`states`.
        hold: buffers a slot that stay pending whatever is known to be done: one release frees
            them after whichever template ran (alone or in a pair).
    """

    def __init__(
        self, labels: Labels, *states: ChunkState, hold: Sequence[Iterable[str]] = ()
    ) -> None:
        self._labels = labels
        self._hold = [frozenset(names) for names in hold] or [frozenset[str]()] * len(states)
        self.states = [_copy(state) for state in states]
        self._rows: list[dict[str, int]] = []
        self._lists: dict[str, list[tuple[int, int, int, int]]] = {
            name: [] for name in ("waits", "reads", "writes", "allocs", "frees")
        }
        self._clocks: dict[int, dict[tuple[int, int], int]] = {}
        for slot, state in enumerate(self.states):
            for (stream, other), seq in state.clock.items():
                self._clocks.setdefault(stream, {})[slot, other] = seq
        self._snapshots: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        self._compute_ops: dict[tuple[int, int], int] = {}
        self._symbols: list[tuple[int, int, int]] = []
        self._tail = -1

    def op(
        self,
        slot: int,
        kind: str,
        pass_: str,
        stream: int,
        cost: object,
        *,
        category: str,
        site: int = -1,
        name: str = "",
        reads: Iterable[str] = (),
        writes: Iterable[str] = (),
        new: Sequence[New] = (),
        dead: Iterable[str] = (),
        after_compute: bool = False,
        **transfer: int,
    ) -> None:
        """Append an op of the chunk in ``slot``.

        Args:
            cost: cost key; its ``str`` is the Program's label.
            name: symbol of the op, unique in its chunk; default kind, pass and site.
            reads, writes: buffers used; ``new``: buffers made here; ``dead``: no use follows.
            after_compute: order it after all compute ops issued before it.
            transfer: ``hop`` (stage of the other end), ``is_send``, ``payload_bytes``, ``group``.
        """
        state, shape, index = self.states[slot], self.states[slot].shape, len(self._rows)
        symbol = shape.symbol(name or f"{kind}.{pass_}{site}")
        done = _Done(slot, stream, state.seq, symbol)
        state.seq += 1
        reads, writes = list(reads), list(writes)
        for buffer in (*reads, *writes):
            self._wait(index, stream, state, slot, buffer)
        numbers = [shape.declare(made) for made in new]
        if (new or after_compute) and stream != COMPUTE:
            self._order_after_compute(index, stream)
        clock = self._clocks.setdefault(stream, {})
        owner = index if stream == COMPUTE else self._compute_before(clock, index)
        for made, number in zip(new, numbers, strict=True):
            self._lists["allocs"].append((owner, slot, 0, number))
            state.producer[made.name] = done
            state.users.setdefault(made.name, []).append(done)
        for buffer in (*reads, *writes):
            state.users.setdefault(buffer, []).append(done)
        for buffer in writes:
            state.producer[buffer] = done
        for use, names in (("reads", reads), ("writes", [*writes, *(made.name for made in new)])):
            self._lists[use] += [(index, slot, *self._number(state, b)) for b in names]
        clock[slot, stream] = done.seq
        self._snapshots[slot, done.seq] = dict(clock)
        self._symbols.append((index, slot, symbol))
        self._rows.append(
            {
                "slot": slot, "kind": self._labels.kind(kind),
                "category": self._labels.category(category), "pass_": ord(pass_),
                "cost": self._labels.cost(str(cost)), "role": stream, "site": site,
                "hop": 0, "is_send": 0, "payload_bytes": 0, "group": -1, "host_sync": 0,
            }
            | transfer
        )  # fmt: skip
        state.pending += dead
        if stream == COMPUTE:
            self._compute_ops[slot, done.seq] = self._tail = index
            self._free_what_is_dead(index)

    def release(self, slot: int, cost: object) -> bool:
        """Append a bookkeeping op that waits for the users of what is dead and frees it.

        Returns whether there was anything to free.
        """
        state = self.states[slot]
        if not state.pending:
            return False
        pending, state.pending = state.pending, []
        self.op(
            slot, "release", "F", COMPUTE, cost, category="compute",
            name=f"release{state.seq}", reads=(), dead=(),
        )  # fmt: skip
        index = len(self._rows) - 1
        for buffer in pending:
            for user in state.users.get(buffer, []):
                self._wait_for(index, COMPUTE, user)
        state.pending = pending
        self._free_what_is_dead(index)
        assert not state.pending
        return True

    def wait(self, slot: int, name: str, stream: int) -> None:
        """Let the last op wait for op ``name`` that an earlier template put on ``stream``."""
        symbol = self.states[slot].shape.symbol(name)
        self._lists["waits"].append((len(self._rows) - 1, slot, 0, symbol))
        assert self._rows[-1]["role"] != stream

    def finish(self) -> Template:
        """The template; :attr:`states` are then what the next action of each chunk starts from."""
        for slot, state in enumerate(self.states):
            for stream, clock in self._clocks.items():
                for (owner, other), seq in clock.items():
                    if owner == slot:
                        state.clock[stream, other] = seq
        columns = {
            name: np.array([row[name] for row in self._rows], np.int64) for name in self._rows[0]
        }
        lists = {name: _table(rows, 4) for name, rows in self._lists.items()}
        waits = lists.pop("waits")
        return Template(columns, waits, lists, _table(self._symbols, 3), self._tail)

    def _number(self, state: ChunkState, buffer: str) -> tuple[int, int]:
        """(hop, number) of a buffer."""
        return state.foreign.get(buffer) or (0, state.shape.buffers[buffer])

    def _wait(self, index: int, stream: int, state: ChunkState, slot: int, buffer: str) -> None:
        producer = state.producer.get(buffer)
        if producer is not None:
            self._wait_for(index, stream, producer._replace(slot=slot))

    def _wait_for(self, index: int, stream: int, done: _Done) -> None:
        """Order op ``index`` after ``done`` unless its stream already is."""
        clock = self._clocks.setdefault(stream, {})
        if done.stream == stream:
            return
        known = clock.get((done.slot, done.stream), -1)
        if done.hop == 0 and known >= done.seq:
            return
        wait = (index, done.slot, done.hop, done.symbol)
        if wait not in self._lists["waits"]:
            self._lists["waits"].append(wait)
        if done.hop == 0:
            clock[done.slot, done.stream] = done.seq
            for key, seq in self._snapshots.get((done.slot, done.seq), {}).items():
                clock[key] = max(clock.get(key, -1), seq)

    def _order_after_compute(self, index: int, stream: int) -> None:
        """Memory rule: an off-compute op that allocates is ordered after an op of the compute
        stream. Where its inputs do not imply one of this template, it waits for the last before."""
        clock = self._clocks.setdefault(stream, {})
        if self._compute_before(clock, -1) >= 0:
            return
        if self._tail >= 0:
            slot, seq = next(key for key, op in self._compute_ops.items() if op == self._tail)
            symbol = next(s for op, _, s in self._symbols if op == self._tail)
            self._wait_for(index, stream, _Done(slot, COMPUTE, seq, symbol))
        else:
            self._lists["waits"].append((index, _TAIL_SLOT, 0, 0))

    def _compute_before(self, clock: dict[tuple[int, int], int], default: int) -> int:
        """Last compute op of this template that a stream with ``clock`` is ordered after."""
        found = [
            self._compute_ops.get((slot, clock.get((slot, COMPUTE), -1)), -1)
            for slot in range(len(self.states))
        ]
        return max(found) if max(found) >= 0 else default

    def _free_what_is_dead(self, index: int) -> None:
        clock = self._clocks[COMPUTE]
        for slot, state in enumerate(self.states):
            kept: list[str] = []
            for buffer in state.pending:
                users = state.users.get(buffer, [])
                if buffer not in self._hold[slot] and all(
                    user.stream == COMPUTE or clock.get((slot, user.stream), -1) >= user.seq
                    for user in users
                ):
                    self._lists["frees"].append((index, slot, *self._number(state, buffer)))
                else:
                    kept.append(buffer)
            state.pending = kept


def _copy(state: ChunkState) -> ChunkState:
    """A state of its own over the same shape."""
    return replace(
        state,
        producer=dict(state.producer),
        users={buffer: list(users) for buffer, users in state.users.items()},
        clock=dict(state.clock),
        pending=list(state.pending),
        foreign=dict(state.foreign),
    )


def _table(rows: list[Any], width: int) -> NDArray[np.int64]:
    return np.array(rows, np.int64).reshape(-1, width)


class Labels:
    """The label tables of a Program under construction."""

    def __init__(self) -> None:
        self.kinds: dict[str, int] = {}
        self.categories: dict[str, int] = {}
        self.costs: dict[str, int] = {}

    def kind(self, label: str) -> int:
        """Number of a kind."""
        return self.kinds.setdefault(label, len(self.kinds))

    def category(self, label: str) -> int:
        """Number of a category."""
        return self.categories.setdefault(label, len(self.categories))

    def cost(self, label: str) -> int:
        """Number of a cost key."""
        return self.costs.setdefault(label, len(self.costs))


class Stamp(NamedTuple):
    """One use of a template: on ``rank``, for a chunk a slot, as part of the action ``cell``.

    ``batch`` >= 0 makes its transfers one batched call with others of the same number.
    """

    template: Template
    rank: int
    cell: str
    chunks: tuple[tuple[int, int], ...]  # (stage, microbatch) of slot 0 and, for a pair, slot 1
    batch: int = -1


@dataclass(frozen=True)
class Places:
    """Where chunks and streams are, for tiling.

    Attributes:
        num_microbatches: M; chunks are (stage, microbatch) with microbatch in 0 .. M - 1.
        shapes: chunk shape of every stage.
        first_site: number of every stage's first site in the model.
        rank_of: [stage, microbatch], the rank that runs the chunk.
        role_stream: [rank, role], stream of a role other than PIPE, or -1.
        role_group: [rank, role], process group of a role, or -1.
        pipe_stream, pipe_group: [pass is F, source, destination, end (0 source, 1 destination)] and
            [pass is F, source, destination]: the flow's stream at each end and its group.
    """

    num_microbatches: int
    shapes: Sequence[ChunkShape]
    first_site: NDArray[np.int64]
    rank_of: NDArray[np.int64]
    role_stream: NDArray[np.int64]
    role_group: NDArray[np.int64]
    pipe_stream: NDArray[np.int64]
    pipe_group: NDArray[np.int64]


def tile(
    stamps: Sequence[Stamp],
    places: Places,
    labels: Labels,
    streams: tuple[Stream, ...],
    groups: tuple[Group, ...],
    static_bytes: NDArray[np.int64],
    meta: dict[str, object],
) -> Program:
    """Stamp templates out into a Program; ``stamps`` are in host issue order within each rank."""
    return _Tiling(stamps, places, labels).program(streams, groups, static_bytes, meta)


class _Tiling:
    def __init__(self, stamps: Sequence[Stamp], places: Places, labels: Labels) -> None:
        self.stamps = sorted(stamps, key=lambda stamp: stamp.rank)  # stable: order is kept
        self.places, self.labels = places, labels
        lengths = np.array([stamp.template.num_ops for stamp in self.stamps], np.int64)
        self.starts = np.concatenate(([0], np.cumsum(lengths)))
        self.num_ops = int(self.starts[-1])
        m = places.num_microbatches
        sizes = [(len(s.symbols), len(s.buffers)) for s in places.shapes]
        counts = np.array(sizes, np.int64).reshape(-1, 2)
        self.bases = np.concatenate((np.zeros((1, 2), np.int64), np.cumsum(counts * m, axis=0)))
        self.strides = counts
        self.op_of_symbol = np.full(int(self.bases[-1, 0]), -1, np.int64)
        self.cells: dict[str, int] = {}
        self.columns = {
            name: np.full(self.num_ops, -1, np.int64)
            for name in ("rank", "stream", "kind", "category", "pass_", "cell", "cost", "stage",
                         "site", "microbatch", "group", "peer", "is_send", "payload_bytes",
                         "batch", "host_sync")
        }  # fmt: skip
        self.tail_before = self._tails()

    def _tails(self) -> NDArray[np.int64]:
        """For every stamp, the last compute op of its rank before it, or -1."""
        tails = np.full(len(self.stamps), -1, np.int64)
        last, rank = -1, -1
        for i, stamp in enumerate(self.stamps):
            if stamp.rank != rank:
                last, rank = -1, stamp.rank
            tails[i] = last
            if stamp.template.tail >= 0:
                last = int(self.starts[i]) + stamp.template.tail
        return tails

    def program(
        self,
        streams: tuple[Stream, ...],
        groups: tuple[Group, ...],
        static_bytes: NDArray[np.int64],
        meta: dict[str, object],
    ) -> Program:
        by_template: dict[int, list[int]] = {}
        for i, stamp in enumerate(self.stamps):
            by_template.setdefault(id(stamp.template), []).append(i)
        uses = [np.array(use) for use in by_template.values()]
        for use in uses:
            self._stamp_columns(use)
        waits = _gather([self._resolve_waits(use) for use in uses], self.num_ops)
        buffers = {
            name: _gather([self._resolve_buffers(use, name) for use in uses], self.num_ops)
            for name in ("reads", "writes", "allocs", "frees")
        }
        recorded = np.unique(waits.values)
        record = np.full(self.num_ops, -1, np.int64)
        record[recorded] = np.arange(len(recorded))
        c = {name: column.astype(np.int32) for name, column in self.columns.items()}
        m = self.places.num_microbatches
        return Program(
            num_ranks=len(static_bytes), streams=streams, groups=groups,
            kinds=tuple(self.labels.kinds), categories=tuple(self.labels.categories),
            cells=tuple(self.cells), cost_keys=tuple(self.labels.costs),
            buffer_bytes=np.concatenate(
                [np.tile(np.array(s.buffer_bytes, np.int64), m) for s in self.places.shapes]),
            buffer_component=np.concatenate(
                [np.tile(np.array(s.buffer_component, np.int8), m) for s in self.places.shapes]),
            static_bytes=static_bytes, num_events=len(recorded),
            rank=c["rank"], stream=c["stream"], kind=c["kind"], category=c["category"],
            pass_=self.columns["pass_"].astype(np.uint8), cell=c["cell"], cost=c["cost"],
            stage=c["stage"], site=c["site"], microbatch=c["microbatch"], record=record,
            host_sync=c["host_sync"] > 0, group=c["group"], peer=c["peer"],
            is_send=c["is_send"] > 0, payload_bytes=self.columns["payload_bytes"],
            batch=c["batch"], waits=Csr(waits.offsets, record[waits.values]), **buffers, meta=meta,
        )  # fmt: skip

    def _chunks(self, use: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[use, slot] stage and microbatch."""
        chunks = np.array([self.stamps[i].chunks for i in use], np.int64)
        return chunks[..., 0], chunks[..., 1]

    def _stamp_columns(self, use: NDArray[np.int64]) -> None:
        template = self.stamps[use[0]].template
        columns, places = template.columns, self.places
        at = self.starts[use][:, None] + np.arange(template.num_ops)
        slot = columns["slot"]
        stages, microbatches = self._chunks(use)
        stage, microbatch = stages[:, slot], microbatches[:, slot]
        rank = np.array([self.stamps[i].rank for i in use])[:, None]
        for name in ("kind", "category", "pass_", "cost", "is_send", "payload_bytes", "host_sync"):
            self.columns[name][at] = columns[name]
        site = columns["site"]
        self.columns["rank"][at] = rank
        self.columns["stage"][at], self.columns["microbatch"][at] = stage, microbatch
        self.columns["site"][at] = np.where(site < 0, -1, places.first_site[stage] + site)
        cells = [self.cells.setdefault(self.stamps[i].cell, len(self.cells)) for i in use]
        self.columns["cell"][at] = np.array(cells)[:, None]
        batch = np.array([self.stamps[i].batch for i in use])[:, None]
        self.columns["batch"][at] = np.where(columns["hop"] != 0, batch, -1)
        role = columns["role"]
        self.columns["stream"][at] = places.role_stream[rank, role]
        group = np.where(columns["group"] >= 0, columns["group"], places.role_group[rank, role])
        self.columns["group"][at] = group
        for op in np.flatnonzero(columns["hop"]):
            self._stamp_pipe(at[:, op], rank[:, 0], stage[:, op], microbatch[:, op], columns, op)
        symbol = template.symbols
        of = self._locate(stages, microbatches, symbol[:, 1], 0, symbol[:, 2], table=0)
        self.op_of_symbol[of] = at[:, symbol[:, 0]]
        for number, name in enumerate(_RESERVED):
            self._note_reserved(use, template, at, number, name)

    def _note_reserved(
        self,
        use: NDArray[np.int64],
        template: Template,
        at: NDArray[np.int64],
        number: int,
        _name: str,
    ) -> None:
        """Symbols OUT and GRAD_OUT name whatever op writes those buffers."""
        writes = template.buffers["writes"]
        rows = writes[(writes[:, 3] == number) & (writes[:, 2] == 0)]
        stages, microbatches = self._chunks(use)
        for op, slot, _hop, _number in rows:
            of = self._locate(stages, microbatches, np.array([slot]), 0, number, table=0)
            self.op_of_symbol[of[:, 0]] = at[:, op]

    def _stamp_pipe(
        self,
        at: NDArray[np.int64],
        rank: NDArray[np.int64],
        stage: NDArray[np.int64],
        microbatch: NDArray[np.int64],
        columns: dict[str, NDArray[np.int64]],
        op: int,
    ) -> None:
        """Peer, stream and group of a send or receive: those of its flow."""
        peer = self.places.rank_of[stage + columns["hop"][op], microbatch]
        forward = int(columns["pass_"][op] == ord("F"))
        sends = bool(columns["is_send"][op])
        source, target = (rank, peer) if sends else (peer, rank)
        self.columns["peer"][at] = peer
        self.columns["stream"][at] = self.places.pipe_stream[forward, source, target, 1 - sends]
        self.columns["group"][at] = self.places.pipe_group[forward, source, target]

    def _locate(
        self,
        stages: NDArray[np.int64],
        microbatches: NDArray[np.int64],
        slot: NDArray[np.int64],
        hop: NDArray[np.int64] | int,
        number: NDArray[np.int64] | int,
        table: int,
    ) -> NDArray[np.int64]:
        """[use, reference] global number of symbols (table 0) or buffers (table 1)."""
        stage = stages[:, slot] + hop
        base = self.bases[stage, table] + microbatches[:, slot] * self.strides[stage, table]
        return base + number

    def _resolve_waits(self, use: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(op, awaited op) of every wait of the stamps in ``use``; called once all are stamped."""
        template = self.stamps[use[0]].template
        rows = template.waits
        tail = rows[:, 1] == _TAIL_SLOT
        stages, microbatches = self._chunks(use)
        slot = np.where(tail, 0, rows[:, 1])
        awaited = self.op_of_symbol[
            self._locate(stages, microbatches, slot, np.where(tail, 0, rows[:, 2]),
                         np.where(tail, 0, rows[:, 3]), table=0)
        ]  # fmt: skip
        awaited[:, tail] = self.tail_before[use][:, None]
        ops = self.starts[use][:, None] + rows[:, 0]
        missing = (awaited < 0) & ~tail
        assert not missing.any(), "a template waits for an op that no stamp made"
        keep = awaited >= 0
        return ops[keep], awaited[keep]

    def _resolve_buffers(
        self, use: NDArray[np.int64], name: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = self.stamps[use[0]].template.buffers[name]
        stages, microbatches = self._chunks(use)
        number = self._locate(stages, microbatches, rows[:, 1], rows[:, 2], rows[:, 3], table=1)
        ops = np.broadcast_to(self.starts[use][:, None] + rows[:, 0], number.shape)
        return ops.ravel(), number.ravel()


def _gather(pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]], num_ops: int) -> Csr:
    """CSR of (op, value) pairs."""
    ops = np.concatenate([op for op, _ in pairs])
    values = np.concatenate([value for _, value in pairs])
    order = np.argsort(ops, kind="stable")
    offsets = np.zeros(num_ops + 1, np.int64)
    np.cumsum(np.bincount(ops, minlength=num_ops), out=offsets[1:])
    return Csr(offsets, values[order])
