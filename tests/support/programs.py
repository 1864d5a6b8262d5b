"""Programs made by hand or by hypothesis, small enough to reason about.

``Maker`` appends ops in host issue order, each to its rank; ranks may be mixed. What an op waits
for is given as ops; the events are made from that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from mhcplan.sim.program import COMPONENTS, CostTable, Csr, Group, Program, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hypothesis.strategies import DrawFn

    from mhcplan.sim.timeline import Timeline


def assert_same(a: Program | Timeline, b: Program | Timeline) -> None:
    """Every field is equal, down to the types of arrays."""
    for each in fields(a):
        ours, theirs = getattr(a, each.name), getattr(b, each.name)
        if isinstance(ours, Csr):
            assert np.array_equal(ours.offsets, theirs.offsets), each.name
            assert np.array_equal(ours.values, theirs.values), each.name
        elif isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype, each.name
            assert np.array_equal(ours, theirs), each.name
        else:
            assert ours == theirs, each.name


@dataclass
class _Row:
    number: int
    rank: int
    stream: int
    duration_ns: int
    host_ns: int
    waits: tuple[int, ...]
    columns: dict[str, object] = field(default_factory=dict)
    lists: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Maker:
    """Collects ops; ``build`` makes the Program. Numbers it hands out are those of ``index_of``."""

    def __init__(self, num_ranks: int = 1) -> None:
        self.num_ranks = num_ranks
        self.streams: list[Stream] = []
        self.groups: list[Group] = []
        self.rows: list[_Row] = []
        self.buffer_bytes: list[int] = []
        self.buffer_component: list[int] = []
        self.static_bytes = np.zeros((num_ranks, len(COMPONENTS)), np.int64)
        self.extra_waits: dict[int, list[int]] = {}

    def stream(self, rank: int, name: str, priority: int = 0, group: int = -1) -> int:
        wanted = Stream(rank, name, priority, group)
        if wanted not in self.streams:
            self.streams.append(wanted)
        return self.streams.index(wanted)

    def group(self, name: str, *members: int, size: int = 0, medium: str = "intra_node") -> int:
        self.groups.append(Group(name, members, size or len(members), medium))
        return len(self.groups) - 1

    def buffer(self, num_bytes: int, component: str = "activations") -> int:
        self.buffer_bytes.append(num_bytes)
        self.buffer_component.append(COMPONENTS.index(component))
        return len(self.buffer_bytes) - 1

    def op(
        self,
        rank: int,
        duration_ns: int,
        *,
        stream: str = "compute",
        priority: int = 0,
        waits: Iterable[int] = (),
        host_ns: int = 0,
        **rest: object,
    ) -> int:
        """A compute op. ``rest``: columns (kind, category, ...) and lists (reads, writes, ...)."""
        return self._add(
            rank, self.stream(rank, stream, priority), duration_ns, host_ns, waits, rest
        )

    def transfer(
        self,
        rank: int,
        group: int,
        duration_ns: int,
        *,
        to: int = -1,
        source: int = -1,
        priority: int = 0,
        waits: Iterable[int] = (),
        host_ns: int = 0,
        **rest: object,
    ) -> int:
        """A send (``to``), a receive (``source``) or else a collective of ``group``."""
        stream = self.stream(rank, self.groups[group].name, priority, group)
        peer = to if to >= 0 else source
        rest = {"kind": "transfer", "category": "transfer", "payload_bytes": 8} | rest
        rest |= {"group": group, "peer": peer, "is_send": to >= 0}
        return self._add(rank, stream, duration_ns, host_ns, waits, rest)

    def wait(self, op: int, *others: int) -> None:
        """Let ``op`` wait for more ops."""
        self.rows[op].waits += others

    def _add(
        self,
        rank: int,
        stream: int,
        duration_ns: int,
        host_ns: int,
        waits: Iterable[int],
        rest: dict[str, object],
    ) -> int:
        lists = {
            name: tuple(rest.pop(name, ()))  # type: ignore[arg-type]
            for name in ("reads", "writes", "allocs", "frees")
        }
        number = len(self.rows)
        self.rows.append(
            _Row(number, rank, stream, duration_ns, host_ns, tuple(waits), rest, lists)
        )
        return number

    @property
    def index_of(self) -> list[int]:
        """For every number handed out, the op's index in the Program."""
        by_rank = sorted(range(len(self.rows)), key=lambda i: self.rows[i].rank)
        index = [0] * len(by_rank)
        for place, number in enumerate(by_rank):
            index[number] = place
        return index

    def build(
        self, *, workspace_bytes: Sequence[int] = (), scale: int = 1
    ) -> tuple[Program, CostTable]:
        """The Program and its costs: a cost key an op, times ``scale``."""
        index = self.index_of
        rows = sorted(self.rows, key=lambda row: index[row.number])
        awaited = sorted({index[w] for row in rows for w in row.waits})
        event = {op: i for i, op in enumerate(awaited)}
        tables: dict[str, dict[object, int]] = {"kind": {}, "category": {}, "cell": {}}
        defaults = {"kind": "work", "category": "compute", "cell": ""}

        def labels(name: str) -> np.ndarray:
            table = tables[name]
            values = (row.columns.get(name, defaults[name]) for row in rows)
            return np.array([table.setdefault(v, len(table)) for v in values], np.int32)

        def column(name: str, dtype: type, default: object = -1) -> np.ndarray:
            return np.array([row.columns.get(name, default) for row in rows], dtype)

        columns = {name: labels(name) for name in tables}
        names = {name: tuple(str(label) for label in table) for name, table in tables.items()}
        program = Program(
            num_ranks=self.num_ranks,
            streams=tuple(self.streams),
            groups=tuple(self.groups),
            kinds=names["kind"],
            categories=names["category"],
            cells=names["cell"],
            cost_keys=tuple(str(i) for i in range(len(rows))),
            buffer_bytes=np.array(self.buffer_bytes, np.int64),
            buffer_component=np.array(self.buffer_component, np.int8),
            static_bytes=self.static_bytes,
            num_events=len(awaited),
            rank=np.array([row.rank for row in rows], np.int32),
            stream=np.array([row.stream for row in rows], np.int32),
            **columns,
            pass_=np.array([ord(str(row.columns.get("pass_", "F"))) for row in rows], np.uint8),
            cost=np.arange(len(rows), dtype=np.int32),
            stage=column("stage", np.int32),
            site=column("site", np.int32),
            microbatch=column("microbatch", np.int32),
            record=np.array([event.get(i, -1) for i in range(len(rows))], np.int64),
            host_sync=column("host_sync", np.bool_, default=False),
            group=column("group", np.int32),
            peer=column("peer", np.int32),
            is_send=column("is_send", np.bool_, default=False),
            payload_bytes=column("payload_bytes", np.int64, default=0),
            batch=column("batch", np.int32),
            waits=Csr.from_lists([[event[index[w]] for w in row.waits] for row in rows]),
            **{
                name: Csr.from_lists([row.lists[name] for row in rows])
                for name in ("reads", "writes", "allocs", "frees")
            },
        )
        workspace = np.zeros(len(rows), np.int64)
        workspace[: len(workspace_bytes)] = workspace_bytes
        costs = CostTable(
            np.array([row.duration_ns * scale for row in rows], np.int64),
            np.array([row.host_ns * scale for row in rows], np.int64),
            workspace,
        )
        return program, costs


@st.composite
def makers(draw: DrawFn, max_steps: int = 30, host: bool = True) -> Maker:
    """Random sound programs without buffers.

    Ops are appended in one order over all ranks in which each waits for earlier ones only, so
    nothing deadlocks: compute ops on three streams (two equally urgent) that wait for any earlier
    ops of their rank, sends and receives alone and in batches, and collectives.
    """
    num_ranks = draw(st.integers(1, 4))
    maker = Maker(num_ranks)
    everyone = range(num_ranks)
    pp = maker.group("pp", *everyone, medium=draw(st.sampled_from(["intra_node", "inter_node"])))
    ep = maker.group("ep", *everyone)
    dp = maker.group("dp", 0, size=8, medium="inter_node")
    done: list[list[int]] = [[] for _ in everyone]
    duration = st.integers(0, 20)
    host_ns = st.integers(0, 4) if host else st.just(0)

    def rest(rank: int) -> dict[str, object]:
        earlier = done[rank]
        waits = draw(st.lists(st.sampled_from(earlier), max_size=3)) if earlier else []
        return {"waits": waits, "host_ns": draw(host_ns)}

    def add_batches(batch: int, pairs: list[tuple[int, int]]) -> None:
        """Every rank's ends of the pairs are one batched call."""
        ends = [(r, p, True) for r, p in pairs] + [(p, r, False) for r, p in pairs]
        times = {pair: draw(duration) for pair in pairs}
        waits = {rank: rest(rank) for rank in everyone}
        for rank, peer, sends in ends:
            pair = (rank, peer) if sends else (peer, rank)
            where = {"to": peer} if sends else {"source": peer}
            number = maker.transfer(rank, pp, times[pair], batch=batch, **where, **waits[rank])
            done[rank].append(number)

    for step in range(draw(st.integers(1, max_steps))):
        choice = draw(st.sampled_from(["compute"] * 4 + ["pair", "batches", "ep", "dp"]))
        if choice == "compute" or (num_ranks == 1 and choice in {"pair", "batches"}):
            rank = draw(st.sampled_from(everyone))
            stream, priority = draw(st.sampled_from([("compute", 0), ("side", 0), ("high", -1)]))
            sync = draw(st.sampled_from([False] * 7 + [True])) if host else False
            number = maker.op(
                rank, draw(duration), stream=stream, priority=priority, host_sync=sync, **rest(rank)
            )
            done[rank].append(number)
        elif choice == "ep":
            time = draw(duration)
            for rank in everyone:
                done[rank].append(maker.transfer(rank, ep, time, **rest(rank)))
        elif choice == "dp":
            done[0].append(maker.transfer(0, dp, draw(duration), **rest(0)))
        else:
            pairs = draw(
                st.lists(
                    st.tuples(st.sampled_from(everyone), st.sampled_from(everyone)).filter(
                        lambda pair: pair[0] != pair[1]
                    ),
                    min_size=1,
                    max_size=1 if choice == "pair" else 4,
                    unique=True,
                )
            )
            add_batches(-1 if choice == "pair" else step, pairs)
    return maker


@st.composite
def mirror_images(draw: DrawFn, max_steps: int = 20) -> tuple[Program, CostTable]:
    """Random sound programs in which rank P - 1 - r does what rank r does, the other way round.

    Made as those of :func:`makers`, each op with its image, which costs the same. Messages go to
    any rank; what a rank and its image send each other is one batch on both.
    """
    half = draw(st.integers(1, 3))
    last = 2 * half - 1
    maker = Maker(last + 1)
    pp = maker.group("pp", *range(last + 1))
    ep = maker.group("ep", *range(half)), maker.group("ep", *range(half, last + 1))
    dp = maker.group("dp", 0, last, size=8, medium="inter_node")
    done: list[list[tuple[int, int]]] = [[] for _ in range(half)]  # ops and their images
    duration, ranks = st.integers(0, 20), st.integers(0, last)

    def add(rank: int, groups: tuple[int, int] | None, duration_ns: int, **rest: Any) -> None:  # noqa: ANN401
        """An op and its image; ``groups`` are the two's."""
        awaited = draw(st.lists(st.sampled_from(done[rank]), max_size=3)) if done[rank] else []
        host_ns = draw(st.integers(0, 4))
        numbers: list[int] = []
        for image in (0, 1):
            on = last - rank if image else rank
            common = {"waits": [pair[image] for pair in awaited], "host_ns": host_ns} | rest
            if image:
                common |= {k: last - rest[k] for k in ("to", "source") if k in rest}
            if groups is None:
                numbers.append(maker.op(on, duration_ns, **common))
            else:
                numbers.append(maker.transfer(on, groups[image], duration_ns, **common))
        added.append((rank, (numbers[0], numbers[1])))

    for step in range(draw(st.integers(1, max_steps))):
        added: list[tuple[int, tuple[int, int]]] = []
        match draw(st.sampled_from(["compute"] * 4 + ["message", "batch", "ep", "dp"])):
            case "compute":
                stream = draw(st.sampled_from([("compute", 0), ("side", 0), ("high", -1)]))
                sync = draw(st.sampled_from([False] * 7 + [True]))
                add(draw(st.integers(0, half - 1)), None, draw(duration), stream=stream[0],
                    priority=stream[1], host_sync=sync)  # fmt: skip
            case "ep":
                duration_ns = draw(duration)
                for rank in range(half):
                    add(rank, ep, duration_ns)
            case "dp":
                add(0, (dp, dp), draw(duration))
            case kind:
                pair = st.tuples(st.integers(0, half - 1), ranks).filter(lambda p: p[0] != p[1])
                pairs = draw(st.lists(pair, min_size=1, max_size=1 if kind == "message" else 3))
                alone = kind == "message" and sum(pairs[0]) != last
                ends = [
                    (end, way, duration_ns)
                    for a, b in pairs
                    for duration_ns in [draw(duration)]
                    for end, way in ((a, {"to": b}), (b, {"source": a}))
                ]
                for end, way, duration_ns in ends:
                    if end >= half:
                        end, way = last - end, {k: last - peer for k, peer in way.items()}
                    add(end, (pp, pp), duration_ns, batch=-1 if alone else step, **way)
        for rank, pair in added:
            done[rank].append(pair)
    return build_mirrored(maker)


def build_mirrored(maker: Maker) -> tuple[Program, CostTable]:
    """The Program of an even number of ranks, where an op of the second half costs what the one in
    its place on the mirrored rank does."""
    program, costs = maker.build()
    of_rank = np.split(np.arange(program.num_ops), program.rank_offsets[1:-1])
    cost = np.minimum(np.concatenate(of_rank), np.concatenate(of_rank[::-1])).astype(np.int32)
    count = program.num_ops // 2
    return program.renumbered(cost=cost, cost_keys=program.cost_keys[:count]), CostTable(
        costs.duration_ns[:count], costs.host_ns[:count], costs.workspace_bytes[:count]
    )


def add_buffers(maker: Maker) -> Maker:
    """Give every op an output that those who wait for it read, with the waits that this needs.

    Outputs of ops on the stream "compute" are allocated by themselves. Others take their memory
    after the last compute op before them. A compute op that comes after all users frees, and one
    more at the end of each rank frees the rest.
    """
    users: dict[int, list[int]] = {}
    compute = {rank: maker.stream(rank, "compute") for rank in range(maker.num_ranks)}
    last_compute: dict[int, int] = {}
    for row in list(maker.rows):
        on_compute = row.stream == compute[row.rank]
        if not on_compute and row.rank in last_compute:
            row.waits += (last_compute[row.rank],)
        output = maker.buffer(10 + row.number)
        inputs = tuple(dict.fromkeys(maker.rows[w].lists["writes"][0] for w in row.waits))
        row.lists = {"allocs": (output,), "writes": (output,), "reads": inputs, "frees": ()}
        users[row.number] = [row.number]
        for awaited in dict.fromkeys(row.waits):
            users[awaited].append(row.number)
        if on_compute:
            last_compute[row.rank] = row.number
    for rank in range(maker.num_ranks):
        _free(maker, rank, users, maker.op(rank, 0, kind="release"))
    return maker


def _free(maker: Maker, rank: int, users: dict[int, list[int]], last: int) -> None:
    """Let each output of a rank be freed by the first compute op issued after its users."""
    compute = maker.stream(rank, "compute")
    frees: dict[int, list[int]] = {}
    computes = [row.number for row in maker.rows if row.rank == rank and row.stream == compute]
    for number, using in users.items():
        row = maker.rows[number]
        if row.rank == rank:
            by = next(op for op in computes if op > max(using) or op == last)
            frees.setdefault(by, []).append(row.lists["writes"][0])
            maker.wait(by, *using)
    for by, buffers in frees.items():
        maker.rows[by].lists["frees"] = tuple(buffers)
