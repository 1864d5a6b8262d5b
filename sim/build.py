"""How a :class:`~mhcplan.sim.program.Program` is made: op templates, tiled by numpy.

A pipeline step repeats few patterns: the forward of a stage, its backward, an overlapped pair.
:class:`TemplateBuilder` records such a pattern once, in host issue order. It is told which buffers
an op reads and writes; **the waits follow from that**, and so does the op that may allocate and
free each buffer (rules in :mod:`mhcplan.sim.program`). :mod:`mhcplan.sim.tiling` then stamps the
template out for every microbatch, on every rank.

Names inside a template are local to a *chunk* (one stage's layers for one microbatch). An
overlapped pair has two chunks, slot 0 (the forward's) and slot 1 (the backward's). The chunk at hop
+1 is the next stage's for the same microbatch, at hop -1 the previous stage's.
"""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.program import COMPONENTS
from mhcplan.sim.tiling import OP_COLUMNS, TAIL_SLOT

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from numpy.typing import NDArray

# Roles of streams; PIPE becomes a stream per flow when a template is stamped.
COMPUTE, HIGH, EXPERT, PIPE, DATA, DATA_EXPERTS = range(6)
NUM_ROLES = 6
OUT, GRAD_OUT = "out", "grad_out"  # what a chunk hands to the next and to the previous stage
_RESERVED = (OUT, GRAD_OUT)
_KIND, _CATEGORY, _COST, _ROLE, _BYTES = map(
    OP_COLUMNS.index, ("kind", "category", "cost", "role", "payload_bytes")
)


class New(NamedTuple):
    """A buffer that an op makes: its name in the chunk, size (or what will be filled in for it) and
    component of the memory report."""

    name: str
    num_bytes: Hashable
    component: str = "activations"


class ChunkShape:
    """Names of a chunk's ops and buffers, numbered. Stages of equal shape share one."""

    def __init__(self) -> None:
        self.symbols: dict[str, int] = {name: i for i, name in enumerate(_RESERVED)}
        self.buffers: dict[str, int] = {name: i for i, name in enumerate(_RESERVED)}
        self.sizes: list[Hashable] = [0, 0]
        self.buffer_component: list[int] = [0, 0]

    def filled(self, num_bytes: Callable[[Hashable], int]) -> ChunkShape:
        """The same names, with the sizes that were declared replaced by what they stand for."""
        other = copy(self)
        other.sizes = [num_bytes(size) for size in self.sizes]
        return other

    @cached_property
    def buffer_bytes(self) -> NDArray[np.int64]:
        """Sizes of the buffers, once all are filled in."""
        return np.array(self.sizes, np.int64)

    @property
    def size(self) -> tuple[int, int]:
        """Number of ops and of buffers."""
        return len(self.symbols), len(self.buffers)

    def symbol(self, name: str) -> int:
        """Number of the op called ``name``."""
        return self.symbols.setdefault(name, len(self.symbols))

    def declare(self, new: New) -> int:
        """Number of a buffer, with its size. Declaring it again with another size is a bug."""
        number = self.buffers.get(new.name)
        component = _NUMBER_OF_COMPONENT[new.component]
        if number is None:
            number = self.buffers[new.name] = len(self.buffers)
            self.sizes.append(new.num_bytes)
            self.buffer_component.append(component)
        elif number < len(_RESERVED) and self.sizes[number] == 0:
            self.sizes[number], self.buffer_component[number] = new.num_bytes, component
        assert self.sizes[number] == new.num_bytes, f"{new} declared with another size"
        return number


_NUMBER_OF_COMPONENT = {name: number for number, name in enumerate(COMPONENTS)}


class _Done(NamedTuple):
    """An op as others depend on it: ``seq`` counts the ops of its chunk over all its actions."""

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
        self.producer[name] = _Done(stream, 0, number, hop)


@dataclass(frozen=True)
class Template:
    """A recorded pattern: columns of m ops, and references that tiling resolves.

    Attributes:
        labels: what the numbers in the columns kind, category and cost stand for.
        ops: [op, column], columns as in :data:`mhcplan.sim.tiling.OP_COLUMNS`.
        waits: rows (op, slot, hop, symbol), by op; slot -1 is the compute op before the stamp.
        buffers: of reads, writes, allocs and frees rows (op, slot, hop, buffer), by op.
        symbols: rows (op, slot, symbol), by op.
        tail: last op on the compute stream, or -1.
    """

    labels: Labels
    ops: NDArray[np.int64]
    waits: NDArray[np.int64]
    buffers: dict[str, NDArray[np.int64]]
    symbols: NDArray[np.int64]
    tail: int

    @cached_property
    def digest(self) -> bytes:
        """Of all but what its ops cost and how many bytes they move."""
        columns = (self.labels.kinds, _KIND), (self.labels.categories, _CATEGORY)
        names = [np.array(list(labels))[self.ops[:, column]].tolist() for labels, column in columns]
        digest = hashlib.blake2b(repr((names, self.tail)).encode())
        kept = [i for i in range(len(OP_COLUMNS)) if i not in (_KIND, _CATEGORY, _COST, _BYTES)]
        for table in (self.ops[:, kept], self.waits, *self.buffers.values(), self.symbols):
            digest.update(repr(table.shape).encode())
            digest.update(table.tobytes())
        return digest.digest()

    def filled(self, meaning: Meaning) -> Template:
        """The same pattern with the cost keys that its own stand for."""
        ops = self.ops.copy()
        ops[:, _COST] = meaning.cost[self.ops[:, _COST]]
        ops[:, _BYTES] = meaning.payload_bytes[self.ops[:, _COST]]
        other = replace(self, labels=meaning.labels, ops=ops)
        vars(other)["digest"] = self.digest  # none of this is in it
        return other


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
        self._rows: list[tuple[int, ...]] = []
        self._waits: dict[tuple[int, int, int, int], None] = {}  # in order, each once
        self._lists: dict[str, list[tuple[int, int, int, int]]] = {
            name: [] for name in ("reads", "writes", "allocs", "frees")
        }
        self._clocks: dict[int, dict[tuple[int, int], int]] = {}
        for slot, state in enumerate(self.states):
            for (stream, other), seq in state.clock.items():
                self._clocks.setdefault(stream, {})[slot, other] = seq
        self._snapshots: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        self._compute_ops: dict[tuple[int, int], int] = {}
        self._symbols: list[tuple[int, int, int]] = []
        self._tail: tuple[int, int, _Done] | None = None  # last on the compute stream: op, slot

    def op(
        self,
        slot: int,
        kind: str,
        pass_: str,
        stream: int,
        cost: Hashable,
        *,
        category: str,
        site: int = -1,
        name: str = "",
        reads: Sequence[str] = (),
        writes: Sequence[str] = (),
        new: Sequence[New] = (),
        dead: Iterable[str] = (),
        after_compute: bool = False,
        hop: int = 0,
        is_send: int = 0,
        payload_bytes: int = 0,
        group: int = -1,
        host_sync: int = 0,
    ) -> None:
        """Append an op of the chunk in ``slot``.

        Args:
            cost: cost key; its ``str`` is the Program's label.
            name: symbol of the op, unique in its chunk; default kind, pass and site.
            reads, writes: buffers used; ``new``: buffers made here; ``dead``: no use follows.
            after_compute: order it after all compute ops issued before it.
            hop: of a message, stages from here to its other end.
            is_send, payload_bytes, group, host_sync: as in the Program.
        """
        state, index, labels, lists = self.states[slot], len(self._rows), self._labels, self._lists
        shape, producer, users = state.shape, state.producer, state.users
        foreign, numbers = state.foreign, shape.buffers
        symbol = shape.symbol(name or f"{kind}.{pass_}{site}")
        done = _Done(stream, state.seq, symbol)
        state.seq += 1
        used = (*reads, *writes)
        for buffer in used:
            self._wait_for(index, stream, slot, producer.get(buffer))
        made = [(it.name, shape.declare(it)) for it in new]
        if (made or after_compute) and stream != COMPUTE:
            self._order_after_compute(index, stream)
        clock = self._clocks.setdefault(stream, {})
        owner = index if stream == COMPUTE else self._compute_before(clock, index)
        for buffer in reads:
            at, number = foreign.get(buffer) or (0, numbers[buffer])
            lists["reads"].append((index, slot, at, number))
            users.setdefault(buffer, []).append(done)
        for buffer in (*writes, *(buffer for buffer, _ in made)):
            at, number = foreign.get(buffer) or (0, numbers[buffer])
            lists["writes"].append((index, slot, at, number))
            users.setdefault(buffer, []).append(done)
            producer[buffer] = done
        lists["allocs"] += [(owner, slot, 0, number) for _, number in made]
        clock[slot, stream] = done.seq
        self._snapshots[slot, done.seq] = clock.copy()
        self._symbols.append((index, slot, symbol))
        self._rows.append((
            slot, labels.kind(kind), labels.category(category), ord(pass_), labels.cost(cost),
            stream, site, hop, is_send, payload_bytes, group, host_sync,
        ))  # fmt: skip
        state.pending += dead
        if stream == COMPUTE:
            self._compute_ops[slot, done.seq] = index
            self._tail = index, slot, done
            self._free_what_is_dead(index)

    def release(self, slot: int, cost: Hashable) -> bool:
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
                self._wait_for(index, COMPUTE, slot, user)
        state.pending = pending
        self._free_what_is_dead(index)
        assert not state.pending
        return True

    def wait(self, slot: int, name: str, stream: int) -> None:
        """Let the last op wait for op ``name`` that an earlier template put on ``stream``."""
        symbol = self.states[slot].shape.symbol(name)
        self._waits[len(self._rows) - 1, slot, 0, symbol] = None
        assert self._rows[-1][_ROLE] != stream

    def finish(self) -> Template:
        """The template; :attr:`states` are then what the next action of each chunk starts from."""
        for slot, state in enumerate(self.states):
            for stream, clock in self._clocks.items():
                for (owner, other), seq in clock.items():
                    if owner == slot:
                        state.clock[stream, other] = seq
        ops = np.array(self._rows, np.int64).reshape(-1, len(OP_COLUMNS))
        lists = {name: _table(rows, 4) for name, rows in self._lists.items()}
        # OUT and GRAD_OUT name whatever op writes those buffers
        handed_on = [
            (op, slot, number)
            for op, slot, hop, number in lists["writes"].tolist()
            if number < len(_RESERVED) and hop == 0
        ]
        symbols = _table([*self._symbols, *handed_on], 3)
        tail = self._tail[0] if self._tail else -1
        return Template(self._labels, ops, _table([*self._waits], 4), lists, symbols, tail)

    def _number(self, state: ChunkState, buffer: str) -> tuple[int, int]:
        """(hop, number) of a buffer."""
        return state.foreign.get(buffer) or (0, state.shape.buffers[buffer])

    def _wait_for(self, index: int, stream: int, slot: int, done: _Done | None) -> None:
        """Order op ``index`` after ``done``, of the chunk in ``slot``, unless its stream is."""
        if done is None or done.stream == stream:
            return
        clock = self._clocks.setdefault(stream, {})
        if done.hop == 0:
            if clock.get((slot, done.stream), -1) >= done.seq:
                return
            clock[slot, done.stream] = done.seq
            for key, seq in self._snapshots.get((slot, done.seq), {}).items():
                if clock.get(key, -1) < seq:
                    clock[key] = seq
        self._waits[index, slot, done.hop, done.symbol] = None

    def _order_after_compute(self, index: int, stream: int) -> None:
        """Memory rule: an off-compute op that allocates is ordered after an op of the compute
        stream. Where its inputs do not imply one of this template, it waits for the last before."""
        if self._compute_before(self._clocks.setdefault(stream, {}), -1) >= 0:
            return
        if self._tail is not None:
            _, slot, done = self._tail
            self._wait_for(index, stream, slot, done)
        else:
            self._waits[index, TAIL_SLOT, 0, 0] = None

    def _compute_before(self, clock: dict[tuple[int, int], int], default: int) -> int:
        """Last compute op of this template that a stream with ``clock`` is ordered after."""
        found = [
            self._compute_ops.get((slot, clock.get((slot, COMPUTE), -1)), -1)
            for slot in range(len(self.states))
        ]
        return max(found) if max(found) >= 0 else default

    def _free_what_is_dead(self, index: int) -> None:
        clock, frees = self._clocks[COMPUTE], self._lists["frees"]
        for slot, state in enumerate(self.states):
            if not state.pending:
                continue
            kept: list[str] = []
            for buffer in state.pending:
                if buffer in self._hold[slot] or not _is_past(
                    clock, slot, state.users.get(buffer, ())
                ):
                    kept.append(buffer)
                else:
                    frees.append((index, slot, *self._number(state, buffer)))
            state.pending = kept


def _is_past(clock: dict[tuple[int, int], int], slot: int, users: Iterable[_Done]) -> bool:
    """Whether the compute stream, at ``clock``, comes after all these ops of a chunk."""
    for user in users:
        if user.stream != COMPUTE and clock.get((slot, user.stream), -1) < user.seq:
            return False
    return True


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


def _table(rows: list[tuple[int, ...]], width: int) -> NDArray[np.int64]:
    """Rows that begin with an op, in the order of their ops."""
    in_order = sorted(rows, key=itemgetter(0))
    flat = np.fromiter(chain.from_iterable(in_order), np.int64, width * len(rows))
    return flat.reshape(-1, width)


class Labels:
    """The label tables of a Program under construction."""

    def __init__(self) -> None:
        self.kinds: dict[str, int] = {}
        self.categories: dict[str, int] = {}
        self.costs: dict[str, int] = {}
        self._keys: dict[Hashable, int] = {}  # the same by cost key: texts take long to make

    def kind(self, label: str) -> int:
        """Number of a kind."""
        return self.kinds.setdefault(label, len(self.kinds))

    def category(self, label: str) -> int:
        """Number of a category."""
        return self.categories.setdefault(label, len(self.categories))

    def cost(self, key: Hashable) -> int:
        """Number of a cost key; its ``str`` is the label."""
        number = self._keys.get(key)
        if number is None:
            number = self._keys[key] = self.costs.setdefault(str(key), len(self.costs))
        return number

    def meaning(
        self,
        key_of: Callable[[Hashable], Hashable],
        payload_bytes_of: Callable[[Hashable], int],
    ) -> Meaning:
        """What the cost keys of this table stand for; several may stand for one."""
        other = Labels()
        other.kinds, other.categories = self.kinds, self.categories
        keys = [key_of(key) for key in self._keys]
        return Meaning(
            other,
            np.array([other.cost(key) for key in keys], np.int64),
            np.array([payload_bytes_of(key) for key in keys], np.int64),
        )

    def adopt(self, others: Labels) -> None:
        """Number the labels of another table here, in their order."""
        for mine, theirs in zip(self._tables, others._tables, strict=True):
            for label in theirs:
                mine.setdefault(label, len(mine))

    def numbers_of(self, others: Labels) -> tuple[NDArray[np.int64], ...]:
        """Numbers here of the kinds, categories and costs of ``others``, by their numbers there."""
        return tuple(
            np.array([mine[label] for label in theirs], np.int64)
            for mine, theirs in zip(self._tables, others._tables, strict=True)
        )

    @property
    def _tables(self) -> tuple[dict[str, int], ...]:
        return self.kinds, self.categories, self.costs


class Meaning(NamedTuple):
    """What the cost keys of a table of labels stand for, by their numbers there.

    Attributes:
        labels: the same kinds and categories, and these cost keys.
        cost: numbers in it.
        payload_bytes: what an op of that cost moves.
    """

    labels: Labels
    cost: NDArray[np.int64]
    payload_bytes: NDArray[np.int64]
