"""Stamping templates out into a Program: one pass over stamps and their ops, as machine code.

:mod:`mhcplan.sim.build` says what templates and chunks are. Symbols (ops that others wait for) and
buffers are numbered through: stage by stage, within it microbatch by microbatch, within that as the
chunk's shape numbers them.

Programs that differ only in what their ops cost and how large their buffers are (another n, other
sizes of the model) have one *skeleton*: it is kept, and the next of them takes its arrays over.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mhcplan.sim.jit import Ints, compiled, ints, usable_in_compiled
from mhcplan.sim.kept import Kept
from mhcplan.sim.program import Csr, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mhcplan.sim.build import ChunkShape, Labels, Template
    from mhcplan.sim.program import Group, Stream

    Array = NDArray[np.int64]

# Columns of a template's table of ops; ``hop`` is the stage of a message's other end, from here.
OP_COLUMNS = ("slot", "kind", "category", "pass_", "cost", "role", "site", "hop", "is_send",
              "payload_bytes", "group", "host_sync")  # fmt: skip
_SLOT, _KIND, _CATEGORY, _PASS, _COST, _ROLE, _SITE, _HOP, _IS_SEND, _BYTES, _GROUP, _SYNC = range(
    len(OP_COLUMNS)
)
TAIL_SLOT = -1  # stands for the last op of the compute stream before the stamp
_FORWARD = ord("F")


class Stamps(NamedTuple):
    """Uses of templates, rank by rank in host issue order; a column each.

    Attributes:
        template: which one, see :func:`tile`.
        rank: where.
        stages, microbatches: [stamp, slot], the chunks; those of slot 0 again where there is one.
        batch: number >= 0 that makes its transfers one batched call with others of that number.
        cell: what action it is part of, see :func:`tile`.
    """

    template: Array
    rank: Array
    stages: Array
    microbatches: Array
    batch: Array
    cell: Array


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
    first_site: Array
    rank_of: Array
    role_stream: Array
    role_group: Array
    pipe_stream: Array
    pipe_group: Array


def tile(
    templates: Sequence[Template],
    stamps: Stamps,
    cells: tuple[str, ...],
    places: Places,
    labels: Labels,
    streams: tuple[Stream, ...],
    groups: tuple[Group, ...],
    static_bytes: Array,
    meta: dict[str, object],
) -> Program:
    """Stamp templates out into a Program; ``labels`` must know the labels of all of them."""
    tiling = _Tiling(templates, stamps, places, labels)
    skeleton = _kept.find(tiling.digest(streams, groups), lambda: tiling.skeleton(streams, groups))
    return skeleton.renumbered(
        streams=streams, groups=groups, cells=cells, cost_keys=tuple(labels.costs),
        cost=tiling.cost_of_rows()[skeleton.cost],
        payload_bytes=tiling.rows(_BYTES)[skeleton.cost],
        buffer_bytes=tiling.buffer_bytes(), static_bytes=static_bytes, meta=meta,
    )  # fmt: skip


# an op takes about 500 bytes with what is worked out from it
_kept: Kept[Program] = Kept(1 << 18, lambda skeleton: skeleton.num_ops)


def forget() -> None:
    """Keep no skeleton."""
    _kept.forget()


class _Rows(NamedTuple):
    """Tables of all templates one below the other: those of template t begin at ``begin[t]``."""

    begin: Array
    rows: Array

    @staticmethod
    def of(tables: Sequence[Array]) -> _Rows:
        begin = np.zeros(len(tables) + 1, np.int64)
        np.cumsum([len(table) for table in tables], out=begin[1:])
        return _Rows(begin, np.concatenate(tables))


class _Numbering(NamedTuple):
    """Where the symbols, or the buffers, of a stage begin, and how many a microbatch has."""

    base: Array
    stride: Array


class _Map(NamedTuple):
    """The arrays of :class:`Places`."""

    first_site: Array
    rank_of: Array
    role_stream: Array
    role_group: Array
    pipe_stream: Array
    pipe_group: Array


class _Columns(NamedTuple):
    """Columns of the Program that are filled op by op."""

    rank: NDArray[np.int32]
    stream: NDArray[np.int32]
    kind: NDArray[np.int32]
    category: NDArray[np.int32]
    pass_: NDArray[np.uint8]
    cell: NDArray[np.int32]
    cost: NDArray[np.int32]
    stage: NDArray[np.int32]
    site: NDArray[np.int32]
    microbatch: NDArray[np.int32]
    host_sync: NDArray[np.bool_]
    group: NDArray[np.int32]
    peer: NDArray[np.int32]
    is_send: NDArray[np.bool_]
    batch: NDArray[np.int32]


_DTYPES = {"pass_": np.uint8, "host_sync": np.bool_, "is_send": np.bool_}


class _Tiling:
    """One call of :func:`tile`."""

    def __init__(
        self, templates: Sequence[Template], stamps: Stamps, places: Places, labels: Labels
    ) -> None:
        self._templates, self._stamps, self._places = templates, stamps, places
        self._labels = labels
        owners = {id(template.labels): template.labels for template in templates}
        # kinds, categories and costs as ``labels`` numbers them, by the numbers of each owner
        self._numbers = {key: labels.numbers_of(owner) for key, owner in owners.items()}

    def digest(self, streams: tuple[Stream, ...], groups: tuple[Group, ...]) -> bytes:
        """Of all that decides the skeleton."""
        places, labels = self._places, self._labels
        arrays = [*self._stamps, *(getattr(places, name) for name in _Map._fields)]
        shapes = [(len(shape.symbols), bytes(shape.buffer_component)) for shape in places.shapes]
        members = [(group.members, group.medium) for group in groups]
        small = (places.num_microbatches, shapes, [array.shape for array in arrays], streams,
                 members, list(labels.kinds), list(labels.categories))  # fmt: skip
        digest = hashlib.blake2b(repr(small).encode())
        for template in self._templates:
            digest.update(template.digest)
        for array in arrays:
            digest.update(ints(array).data)
        return digest.digest()

    def cost_of_rows(self) -> NDArray[np.int32]:
        """Cost key of every op of every template, one template after the other."""
        costs = [self._numbers[id(t.labels)][2][t.ops[:, _COST]] for t in self._templates]
        return np.concatenate(costs).astype(np.int32)

    def rows(self, column: int) -> Array:
        """A column of the ops of all templates, one template after the other."""
        return np.concatenate([template.ops[:, column] for template in self._templates])

    def buffer_bytes(self) -> Array:
        """Sizes of all buffers."""
        m = self._places.num_microbatches
        return np.concatenate([np.tile(ints(s.buffer_bytes), m) for s in self._places.shapes])

    def skeleton(self, streams: tuple[Stream, ...], groups: tuple[Group, ...]) -> Program:
        """The Program without what it costs: its cost keys are the rows of the templates."""
        labels, shapes = self._labels, self._places.shapes
        passes = _Passes(self._templates, self._stamps, self._places, self._ops())
        columns = passes.columns()
        waits = passes.waits()
        record, num_events = _record(waits, passes.num_ops)
        m = self._places.num_microbatches
        component = [np.tile(np.array(shape.buffer_component, np.int8), m) for shape in shapes]
        none = np.zeros(0, np.int64)
        return Program(
            num_ranks=len(self._places.role_stream), streams=streams, groups=groups,
            kinds=tuple(labels.kinds), categories=tuple(labels.categories), cells=(), cost_keys=(),
            buffer_bytes=none, buffer_component=np.concatenate(component), static_bytes=none,
            num_events=num_events, record=record, waits=Csr(waits.offsets, record[waits.values]),
            reads=passes.buffers("reads"), writes=passes.buffers("writes"),
            allocs=passes.buffers("allocs"), frees=passes.buffers("frees"),
            payload_bytes=none, meta={}, **columns,
        )  # fmt: skip

    def _ops(self) -> _Rows:
        """Ops of all templates: kinds and categories numbered as in the Program, costs by row."""
        tables = _Rows.of([template.ops for template in self._templates])
        for i, template in enumerate(self._templates):
            numbers = self._numbers[id(template.labels)]
            mine = tables.rows[tables.begin[i] : tables.begin[i + 1]]
            for column, here in zip((_KIND, _CATEGORY), numbers, strict=False):
                mine[:, column] = here[mine[:, column]]
        tables.rows[:, _COST] = np.arange(len(tables.rows))
        return tables


class _Passes:
    """Arrays that the passes over the stamps share."""

    def __init__(
        self, templates: Sequence[Template], stamps: Stamps, places: Places, ops: _Rows
    ) -> None:
        self._templates, self._stamps = templates, Stamps(*map(ints, stamps))
        self._map = _Map(*(ints(getattr(places, name)) for name in _Map._fields))
        self._ops = ops
        lengths = np.diff(self._ops.begin)[stamps.template]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self.num_ops = int(self._starts[-1])
        m = places.num_microbatches
        self._symbols = _numbering([len(shape.symbols) for shape in places.shapes])
        self._buffers = _numbering([len(shape.buffers) for shape in places.shapes])
        for numbering in (self._symbols, self._buffers):
            numbering.base[:] *= m
        num_symbols = int(self._symbols.stride.sum()) * m
        self._op_of_symbol = np.full(num_symbols, -1, np.int64)
        self._tails = np.full(len(stamps.rank), -1, np.int64)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Columns that are filled op by op; notes on the way which op each symbol is."""
        empty: dict[str, NDArray[Any]] = {
            name: np.empty(self.num_ops, _DTYPES.get(name, np.int32)) for name in _Columns._fields
        }
        columns = _Columns(**empty)
        _stamp_ops(self._ops, self._stamps, self._map, self._starts, columns)
        tails = ints([template.tail for template in self._templates])
        _note_tails(tails, self._stamps, self._starts, self._tails)
        symbols = _Rows.of([template.symbols for template in self._templates])
        _note_symbols(symbols, self._stamps, self._symbols, self._starts, self._op_of_symbol)
        return empty

    def waits(self) -> Csr:
        """For each op, the ops that it waits for; once :meth:`columns` knows the symbols."""
        rows = _Rows.of([template.waits for template in self._templates])
        csr = self._lists(rows)
        count = _resolve_waits(
            rows, self._stamps, self._symbols, self._starts, self._op_of_symbol, self._tails,
            csr.offsets, csr.values,
        )  # fmt: skip
        assert count >= 0, "a template waits for an op that no stamp made"
        return Csr(csr.offsets, csr.values[:count])

    def buffers(self, use: str) -> Csr:
        """For each op, the buffers of one use."""
        rows = _Rows.of([template.buffers[use] for template in self._templates])
        csr = self._lists(rows)
        _resolve_buffers(rows, self._stamps, self._buffers, self._starts, csr.offsets, csr.values)
        return csr

    def _lists(self, rows: _Rows) -> Csr:
        """Lists of ops, as large as these rows make them, not filled."""
        count = int(np.diff(rows.begin)[self._stamps.template].sum())
        return Csr(np.zeros(self.num_ops + 1, np.int64), np.empty(count, np.int64))


def _numbering(counts: list[int]) -> _Numbering:
    stride = ints(counts)
    return _Numbering(np.cumsum(stride) - stride, stride)


def _record(waits: Csr, num_ops: int) -> tuple[Array, int]:
    """Events, numbered in the order of the ops that record them; an op's event, or -1."""
    record = np.full(num_ops, -1, np.int64)
    return record, _number_events(waits.values, record)


# -- machine code


@usable_in_compiled
def _number(numbering: _Numbering, stamps: Stamps, s: int, slot: int, hop: int, local: int) -> int:
    """Number of a symbol or buffer of the chunk in ``slot``, or at ``hop`` from it."""
    stage = stamps.stages[s, slot] + hop
    return numbering.base[stage] + stamps.microbatches[s, slot] * numbering.stride[stage] + local


@compiled
def _stamp_ops(ops: _Rows, stamps: Stamps, places: _Map, starts: Array, columns: _Columns) -> None:
    for s in range(len(stamps.rank)):
        template, rank = stamps.template[s], stamps.rank[s]
        at = starts[s]
        for i in range(ops.begin[template], ops.begin[template + 1]):
            row, slot = ops.rows[i], ops.rows[i, _SLOT]
            stage, microbatch = stamps.stages[s, slot], stamps.microbatches[s, slot]
            columns.rank[at] = rank
            columns.kind[at] = row[_KIND]
            columns.category[at] = row[_CATEGORY]
            columns.pass_[at] = row[_PASS]
            columns.cell[at] = stamps.cell[s]
            columns.cost[at] = row[_COST]
            columns.stage[at] = stage
            columns.microbatch[at] = microbatch
            columns.site[at] = places.first_site[stage] + row[_SITE] if row[_SITE] >= 0 else -1
            columns.host_sync[at] = row[_SYNC] != 0
            columns.is_send[at] = row[_IS_SEND] != 0
            _place_op(row, rank, stage, microbatch, stamps.batch[s], at, places, columns)
            at += 1


@usable_in_compiled
def _place_op(
    row: Array,
    rank: int,
    stage: int,
    microbatch: int,
    batch: int,
    at: int,
    places: _Map,
    columns: _Columns,
) -> None:
    """Stream, group and peer: of the op's role, or of the flow that a message is in."""
    role, hop = row[_ROLE], row[_HOP]
    if hop == 0:
        group = row[_GROUP]
        columns.stream[at] = places.role_stream[rank, role]
        columns.group[at] = group if group >= 0 else places.role_group[rank, role]
        columns.peer[at] = columns.batch[at] = -1
        return
    peer = places.rank_of[stage + hop, microbatch]
    forward, sends = int(row[_PASS] == _FORWARD), row[_IS_SEND] != 0
    source = rank if sends else peer
    target = peer if sends else rank
    columns.stream[at] = places.pipe_stream[forward, source, target, 0 if sends else 1]
    columns.group[at] = places.pipe_group[forward, source, target]
    columns.peer[at] = peer
    columns.batch[at] = batch


@compiled
def _note_tails(tail: Array, stamps: Stamps, starts: Array, tail_before: Array) -> None:
    """For every stamp, the last compute op of its rank before it, or -1."""
    last = -1
    for s in range(len(stamps.rank)):
        if s and stamps.rank[s] != stamps.rank[s - 1]:
            last = -1
        tail_before[s] = last
        if tail[stamps.template[s]] >= 0:
            last = starts[s] + tail[stamps.template[s]]


@compiled
def _note_symbols(
    symbols: _Rows, stamps: Stamps, numbering: _Numbering, starts: Array, op_of_symbol: Array
) -> None:
    for s in range(len(stamps.rank)):
        template = stamps.template[s]
        for i in range(symbols.begin[template], symbols.begin[template + 1]):
            op, slot, symbol = symbols.rows[i, 0], symbols.rows[i, 1], symbols.rows[i, 2]
            op_of_symbol[_number(numbering, stamps, s, slot, 0, symbol)] = starts[s] + op


@compiled
def _resolve_waits(
    waits: _Rows,
    stamps: Stamps,
    numbering: _Numbering,
    starts: Array,
    op_of_symbol: Array,
    tail_before: Array,
    offsets: Array,
    values: Array,
) -> int:
    """Fill the lists of awaited ops; returns how many there are, or -1 if one does not exist."""
    count = 0
    for s in range(len(stamps.rank)):
        template = stamps.template[s]
        for i in range(waits.begin[template], waits.begin[template + 1]):
            slot, hop, symbol = waits.rows[i, 1], waits.rows[i, 2], waits.rows[i, 3]
            if slot == TAIL_SLOT:
                awaited = tail_before[s]
                if awaited < 0:
                    continue
            else:
                awaited = op_of_symbol[_number(numbering, stamps, s, slot, hop, symbol)]
                if awaited < 0:
                    return -1
            values[count] = awaited
            count += 1
            offsets[starts[s] + waits.rows[i, 0] + 1] += 1
    _add_up(offsets)
    return count


@compiled
def _resolve_buffers(
    rows: _Rows,
    stamps: Stamps,
    numbering: _Numbering,
    starts: Array,
    offsets: Array,
    values: Array,
) -> None:
    count = 0
    for s in range(len(stamps.rank)):
        template, start = stamps.template[s], starts[s] + 1
        own = _number(numbering, stamps, s, 0, 0, 0)
        other = _number(numbering, stamps, s, 1, 0, 0)
        for i in range(rows.begin[template], rows.begin[template + 1]):
            slot, hop, buffer = rows.rows[i, 1], rows.rows[i, 2], rows.rows[i, 3]
            if hop:
                values[count] = _number(numbering, stamps, s, slot, hop, buffer)
            else:
                values[count] = buffer + (other if slot else own)
            count += 1
            offsets[start + rows.rows[i, 0]] += 1
    _add_up(offsets)


@usable_in_compiled
def _add_up(offsets: Ints) -> None:
    for i in range(1, len(offsets)):
        offsets[i] += offsets[i - 1]


@compiled
def _number_events(awaited: Array, record: Array) -> int:
    for op in awaited:
        record[op] = 0
    count = 0
    for op in range(len(record)):
        if record[op] == 0:
            record[op] = count
            count += 1
    return count
