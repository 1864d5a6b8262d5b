"""A sound program passes, and every way to break one is found."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.sim.check import check
from mhcplan.sim.check_buffers import Before
from mhcplan.sim.deadlock import find_cycle
from mhcplan.sim.engine import DeadlockError, simulate
from mhcplan.sim.order import order_of
from mhcplan.sim.program import Csr, Group, Program, Stream
from tests.support.programs import Maker, add_buffers, makers

if TYPE_CHECKING:
    from collections.abc import Callable

    Mutation = Callable[[Program], Program]


def sound() -> tuple[Program, dict[str, int]]:
    """Two ranks that exchange an activation, with no wait too many; ops by name."""
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    ep = maker.group("ep", 0, 1)
    b = {name: maker.buffer(10) for name in ("x", "y", "z", "got", "used", "side", "copy", "warm")}
    names: dict[str, int] = {}

    def compute(name: str, rank: int = 0, stream: str = "compute", **rest: object) -> int:
        names[name] = maker.op(rank, 5, stream=stream, kind=name, **rest)  # type: ignore[arg-type]
        return names[name]

    def transfer(name: str, rank: int, group: int, kind: str, **rest: object) -> int:
        names[name] = maker.transfer(rank, group, 5, kind=kind, **rest)  # type: ignore[arg-type]
        return names[name]

    make = compute("make", allocs=[b["x"], b["y"]], writes=[b["x"]])
    dispatch = transfer(
        "dispatch", 0, ep, "dispatch", waits=[make], reads=[b["x"]], writes=[b["y"]]
    )
    use = compute(
        "use", waits=[dispatch], reads=[b["y"]], allocs=[b["z"]], writes=[b["z"]], frees=[b["x"]]
    )
    send = transfer("send", 0, pp, "pp_send", to=1, waits=[use], reads=[b["z"]], batch=3)
    transfer("back", 0, pp, "pp_recv", source=1, batch=3)
    transfer("back again", 0, pp, "pp_recv", source=1)
    side = compute("side", 0, "side", waits=[use], allocs=[b["side"]], writes=[b["side"]])
    compute("copy", waits=[side], reads=[b["side"]], allocs=[b["copy"]], writes=[b["copy"]],
            frees=[b["y"]])  # fmt: skip
    compute("free", waits=[send], frees=[b["z"], b["side"], b["copy"]])
    compute("warm", 1, allocs=[b["warm"]], writes=[b["warm"]], frees=[b["warm"]])
    room = compute("room", 1, allocs=[b["got"]])
    transfer("dispatch 1", 1, ep, "dispatch")
    transfer("receive", 1, pp, "pp_recv", source=0, waits=[room], writes=[b["got"]])
    answer = transfer("return", 1, pp, "pp_send", to=0, reads=[b["got"]])
    transfer("return again", 1, pp, "pp_send", to=0)
    compute("last", 1, waits=[answer], reads=[b["got"]], allocs=[b["used"]],
            writes=[b["used"]], frees=[b["used"], b["got"]])  # fmt: skip
    program, _ = maker.build()
    index = maker.index_of
    return program, {name: index[number] for name, number in names.items()}


PROGRAM, OP = sound()
NOT_OF_OPS = {"buffer_bytes", "buffer_component", "static_bytes"}


def edited(**columns: dict[int, object]) -> Mutation:
    """Change entries of columns: ``edited(peer={3: 0})``."""

    def mutate(program: Program) -> Program:
        changed = {}
        for name, entries in columns.items():
            column = getattr(program, name).copy()
            for place, value in entries.items():
                column[place] = value
            changed[name] = column
        return replace(program, **changed)

    return mutate


def relisted(name: str, change: Callable[[list[list[int]]], object]) -> Mutation:
    """Change the lists of ops."""

    def mutate(program: Program) -> Program:
        csr = getattr(program, name)
        lists = [csr[i].tolist() for i in range(program.num_ops)]
        change(lists)
        return replace(program, **{name: Csr.from_lists(lists)})

    return mutate


def moved(name: str, source: str, target: str) -> Mutation:
    """Move the whole list of one op to another."""

    def change(lists: list[list[int]]) -> None:
        lists[OP[target]] += lists[OP[source]]
        lists[OP[source]] = []

    return relisted(name, change)


def reissued(choose: Callable[[list[int]], list[int]]) -> Mutation:
    """Put the ops in another order, or leave some out."""

    def mutate(program: Program) -> Program:
        order = choose(list(range(program.num_ops)))
        changed: dict[str, object] = {}
        for field in fields(program):
            value = getattr(program, field.name)
            if isinstance(value, Csr):
                changed[field.name] = Csr.from_lists([value[i].tolist() for i in order])
            elif isinstance(value, np.ndarray) and field.name not in NOT_OF_OPS:
                changed[field.name] = value[order]
        return replace(program, **changed)  # type: ignore[arg-type]

    return mutate


def without(name: str) -> Mutation:
    return reissued(lambda ops: [op for op in ops if op != OP[name]])


def swapped(a: str, b: str) -> Mutation:
    exchange = {OP[a]: OP[b], OP[b]: OP[a]}
    return reissued(lambda ops: [exchange.get(op, op) for op in ops])


def both(first: Mutation, second: Mutation) -> Mutation:
    return lambda program: second(first(program))


def with_field(**fields: object) -> Mutation:
    return lambda program: replace(program, **fields)  # type: ignore[arg-type]


def event_of(name: str) -> int:
    return int(PROGRAM.record[OP[name]])


MUTATIONS: dict[str, tuple[str, str, Mutation]] = {
    # structure
    "ranks out of order": ("structure", "lower rank", edited(rank={0: 1})),
    "no such stream": ("structure", "stream of entry 2", edited(stream={2: 99})),
    "no such kind": ("structure", "kind of entry 0", edited(kind={0: -1})),
    "no such event": ("structure", "waits of entry", relisted("waits", lambda w: w[2].append(99))),
    "no such buffer": ("structure", "reads of entry", relisted("reads", lambda r: r[2].append(77))),
    "a column too short": (
        "structure",
        "host_sync has 3 entries",
        with_field(host_sync=np.zeros(3, np.bool_)),
    ),
    "offsets that cut nothing": (
        "structure",
        "frees: its offsets",
        with_field(frees=Csr(PROGRAM.frees.offsets[:-1], PROGRAM.frees.values)),
    ),
    "no such component": ("structure", "buffer_component", edited(buffer_component={0: 8})),
    "a negative size": ("structure", "buffer_bytes", edited(buffer_bytes={0: -1})),
    "static bytes of another shape": (
        "structure",
        "static_bytes has shape",
        with_field(static_bytes=np.zeros((2, 3), np.int64)),
    ),
    "a stream of no rank": (
        "structure",
        "no such rank",
        with_field(streams=(*PROGRAM.streams, Stream(2, "compute", 0))),
    ),
    "a member that is no rank": (
        "structure",
        "no rank",
        with_field(groups=(*PROGRAM.groups, Group("dp", (0, 5), 2, "intra_node"))),
    ),
    "a member twice": (
        "structure",
        "twice",
        with_field(groups=(*PROGRAM.groups, Group("dp", (1, 1), 2, "intra_node"))),
    ),
    # streams
    "a stream of another rank": (
        "streams",
        "another rank",
        edited(stream={OP["room"]: PROGRAM.stream[OP["make"]]}),
    ),
    "compute on a group's stream": (
        "streams",
        "internal stream of group pp",
        edited(stream={OP["copy"]: PROGRAM.stream[OP["send"]]}),
    ),
    "a transfer on another group's stream": (
        "streams",
        "internal stream of group ep",
        edited(stream={OP["send"]: PROGRAM.stream[OP["dispatch"]]}),
    ),
    "one group on two streams": (
        "streams",
        "two streams",
        edited(stream={OP["send"]: PROGRAM.stream[OP["side"]]}),
    ),
    # events
    "an event recorded twice": (
        "events",
        "recorded by 2 ops",
        edited(record={OP["copy"]: event_of("make")}),
    ),
    "an event never recorded": ("events", "no op records", edited(record={OP["use"]: -1})),
    "an event of another rank": (
        "events",
        "of another rank",
        relisted("waits", lambda w: w[OP["last"]].append(event_of("make"))),
    ),
    "a wait before its record": (
        "events",
        "not issued before it",
        relisted("waits", lambda w: w[OP["make"]].append(event_of("use"))),
    ),
    "a wait for itself": (
        "events",
        "not issued before it",
        relisted("waits", lambda w: w[OP["use"]].append(event_of("use"))),
    ),
    # transfers
    "its own peer": ("transfers", "its own peer", edited(peer={OP["send"]: 0})),
    "a peer outside the group": (
        "transfers",
        "lacks one of the ranks",
        with_field(groups=(PROGRAM.groups[0]._replace(members=(0,)), PROGRAM.groups[1])),
    ),
    "a collective called by a stranger": (
        "transfers",
        "group ep lacks one of the ranks {1}",
        with_field(groups=(PROGRAM.groups[0], PROGRAM.groups[1]._replace(members=(0,)))),
    ),
    "a send to nobody": ("transfers", "send to nobody", edited(peer={OP["send"]: -1})),
    "a receive left out": ("transfers", "pp 0 -> 1", without("receive")),
    "a send turned round": ("transfers", "pp 1 -> 0", edited(is_send={OP["send"]: False})),
    "a member that stays away": ("transfers", "group ep", without("dispatch 1")),
    "ends of unequal size": (
        "transfers",
        "their sizes differ",
        edited(payload_bytes={OP["receive"]: 9}),
    ),
    "a collective of two kinds": (
        "transfers",
        "their kinds differ",
        edited(kind={OP["dispatch 1"]: PROGRAM.kind[OP["send"]]}),
    ),
    "compute in a batch": ("transfers", "neither sends nor", edited(batch={OP["copy"]: 7})),
    "a collective in a batch": ("transfers", "neither sends nor", edited(batch={1: 7})),
    "a batch torn apart": (
        "transfers",
        "stand between",
        edited(batch={OP["back"]: -1, OP["back again"]: 3}),
    ),
    # deadlock
    "a message sent behind its answer": (
        "deadlock",
        "pp_send",
        both(swapped("receive", "return"), edited(batch={OP["send"]: -1, OP["back"]: -1})),
    ),
    "a host that waits for what it has yet to issue": (
        "deadlock",
        "deadlock: ",
        both(edited(host_sync={OP["receive"]: True}), swapped("receive", "dispatch 1")),
    ),
    # buffers
    "allocated twice": (
        "buffers",
        "allocated by 2 ops",
        relisted("allocs", lambda a: a[OP["copy"]].append(0)),
    ),
    "freed twice": (
        "buffers",
        "freed by 2 ops",
        relisted("frees", lambda f: f[OP["copy"]].append(0)),
    ),
    "freed off the compute stream": (
        "buffers",
        "not on the stream 'compute'",
        relisted("frees", lambda f: (f[OP["free"]].remove(2), f[OP["send"]].append(2))),
    ),
    "freed but never allocated": (
        "buffers",
        "not allocated before it",
        relisted("allocs", lambda a: a[OP["copy"]].clear()),
    ),
    "never allocated": (
        "buffers",
        "before it is allocated",
        both(
            relisted("allocs", lambda a: a[OP["use"]].clear()),
            relisted("frees", lambda f: f[OP["free"]].remove(2)),
        ),
    ),
    "used before it is allocated": (
        "buffers",
        "before it is allocated",
        relisted("reads", lambda r: r[OP["make"]].append(2)),
    ),
    "used after it is freed": (
        "buffers",
        "after it is freed",
        relisted("reads", lambda r: r[OP["copy"]].append(0)),
    ),
    "used on another rank": (
        "buffers",
        "before it is allocated",
        relisted("reads", lambda r: r[OP["last"]].append(0)),
    ),
    "freed on another rank": (
        "buffers",
        "not allocated before it",
        moved("frees", "use", "last"),
    ),
    "freed before its last use": ("buffers", "after it is freed", moved("frees", "free", "use")),
    "read but never written": (
        "buffers",
        "not yet written",
        relisted("writes", lambda w: w[OP["make"]].clear()),
    ),
    "written where another stream still reads": (
        "buffers",
        "may run before the read",
        relisted("writes", lambda w: w[OP["copy"]].append(2)),
    ),
    "memory taken before its former user is done": (
        "buffers",
        "has freed its memory",
        relisted("waits", lambda w: w.__setitem__(OP["side"], [event_of("make")])),
    ),
}  # fmt: skip


def test_a_sound_program_passes() -> None:
    assert check(PROGRAM) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_program_is_found_out(name: str) -> None:
    rule, words, mutate = MUTATIONS[name]
    findings = check(mutate(PROGRAM))
    assert {finding.rule for finding in findings} == {rule}
    assert any(words in finding.message for finding in findings), findings


@pytest.mark.parametrize(
    ("op", "awaited"),
    [
        (op, int(PROGRAM.recorder[event]))
        for op in range(PROGRAM.num_ops)
        for event in PROGRAM.waits[op].tolist()
    ],
)
def test_no_wait_of_the_sound_program_can_be_left_out(op: int, awaited: int) -> None:
    """Each orders some use of a buffer, so each one missing is a race that must be found."""
    event = int(PROGRAM.record[awaited])
    findings = check(relisted("waits", lambda w: w[op].remove(event))(PROGRAM))
    assert {finding.rule for finding in findings} == {"buffers"}


def test_a_wait_that_a_host_sync_makes_needless() -> None:
    """After a host sync all later ops come after the synced op, on whatever stream."""
    event = event_of("dispatch")
    no_wait = relisted("waits", lambda w: w[OP["use"]].remove(event))(PROGRAM)
    assert check(no_wait) != []
    assert check(edited(host_sync={OP["dispatch"]: True})(no_wait)) == []


def test_a_batch_ends_with_its_last_transfer_and_not_before() -> None:
    """What rank 2 sends waits for what rank 0 sends after the batch that receives it."""
    maker = Maker(3)
    pp = maker.group("pp", 0, 1, 2)
    maker.transfer(0, pp, 1, to=1, batch=0)
    maker.transfer(0, pp, 1, source=2, batch=0)
    maker.transfer(0, pp, 1, to=2)
    maker.transfer(1, pp, 1, source=0)
    maker.transfer(2, pp, 1, source=0)
    maker.transfer(2, pp, 1, to=0)
    (finding,) = check(maker.build()[0])
    assert finding.rule == "deadlock"
    assert "op 5 (rank 2, stream pp, transfer)" in finding.message


def test_many_findings_are_counted() -> None:
    maker = Maker()
    for _ in range(50):
        maker.op(0, 1, reads=[0])
    maker.buffer(1)
    findings = check(maker.build()[0])
    assert len(findings) == 21
    assert findings[-1].message == "and 30 more findings of this rule"


@settings(max_examples=60, deadline=None)
@given(makers())
def test_random_sound_programs_pass(maker: Maker) -> None:
    assert check(maker.build()[0]) == []
    assert check(add_buffers(maker).build()[0]) == []


@settings(max_examples=60, deadline=None)
@given(makers())
def test_before_is_what_streams_events_and_host_syncs_force(maker: Maker) -> None:
    """Vector clocks against reachability, for every pair of ops of a rank."""
    program, _ = maker.build()
    order = order_of(program)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(program.num_ops))
    awaited = zip(order.waited.values, order.waited.owners, strict=True)
    pairs = [*awaited, *enumerate_back(program.previous_on_stream), *enumerate_back(order.sync)]
    graph.add_edges_from((int(a), int(b)) for a, b in pairs if a >= 0)
    before = Before(program)
    for rank in range(program.num_ranks):
        ops = np.arange(*program.rank_offsets[rank : rank + 2])
        a, b = (side.ravel() for side in np.meshgrid(ops, ops))
        forced = [x == y or y in nx.descendants(graph, x) for x, y in zip(a, b, strict=True)]
        assert before(a, b).tolist() == forced


def enumerate_back(before: np.ndarray) -> list[tuple[int, int]]:
    return [(int(a), b) for b, a in enumerate(before)]


@settings(max_examples=150, deadline=None)
@given(makers(max_steps=12), st.data())
def test_the_check_finds_a_deadlock_where_the_engine_does(
    maker: Maker, data: st.DataObject
) -> None:
    """Ops of sound programs, issued in another order; most of what has a peer then locks up."""
    rows = maker.rows
    for _ in range(data.draw(st.integers(1, 3))):
        a, b = (data.draw(st.integers(0, len(rows) - 1)) for _ in range(2))
        if rows[a].rank == rows[b].rank:
            rows[a].lists, rows[b].lists = rows[b].lists, rows[a].lists
            for name in ("stream", "duration_ns", "waits", "columns"):
                x, y = getattr(rows[a], name), getattr(rows[b], name)
                setattr(rows[a], name, y)
                setattr(rows[b], name, x)
    program, costs = maker.build()
    cycle = find_cycle(program, order_of(program))
    if cycle:
        with pytest.raises(DeadlockError):
            simulate(program, costs)
    else:
        assert simulate(program, costs).step_ns >= 0
