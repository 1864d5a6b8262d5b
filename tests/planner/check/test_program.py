"""The checker of stream programs: lowered plans are sound, every way of breaking one is found."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mhcplan.planner.check import program as check_program
from mhcplan.planner.check.program import check_step
from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.schedules.catalogue import SCHEDULES
from mhcplan.sim.program import Csr, Program, Stream

if TYPE_CHECKING:
    from collections.abc import Callable


@cache
def lowered(schedule: str, microbatches: int = 4, **more: Any) -> Program:  # noqa: ANN401
    plan = make_plan({
        "model": "mhc-3b", "schedule": schedule, "microbatches": microbatches,
        "layout": {"pp": 2, "ep": 2, "dp": 2}, **more,
    })  # fmt: skip
    return lower(plan, 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lowered_plans_are_sound(schedule: str) -> None:
    assert check_step(lowered(schedule)) == []
    assert check_step(lowered(schedule, priority="all")) == []


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_plans_with_batched_messages_are_sound(schedule: str) -> None:
    assert check_step(lowered(schedule, p2p="grouped", comm_streams="one")) == []


def find(program: Program, kind: str, nth: int = 0) -> int:
    """The ``nth`` op of this kind."""
    ops = np.flatnonzero(program.kind == program.kinds.index(kind))
    return int(ops[nth])


def without(lists: Csr, op: int) -> Csr:
    entries = [lists[i].tolist() for i in range(len(lists.offsets) - 1)]
    entries[op] = []
    return Csr.from_lists(entries)


def moved(program: Program, source: int, target: int) -> Program:
    """The program whose op ``source`` is issued right before op ``target``."""
    order = [i for i in range(program.num_ops) if i != source]
    order.insert(order.index(target), source)
    columns = {name: getattr(program, name)[order] for name in (
        "rank", "stream", "kind", "category", "pass_", "cell", "cost", "stage", "site",
        "microbatch", "record", "host_sync", "group", "peer", "is_send", "payload_bytes", "batch",
    )}  # fmt: skip
    lists = {
        name: Csr.from_lists([getattr(program, name)[i].tolist() for i in order])
        for name in ("waits", "reads", "writes", "allocs", "frees")
    }
    return replace(program, **columns, **lists)


def changed(program: Program, column: str, op: int, value: int) -> Program:
    values = getattr(program, column).copy()
    values[op] = value
    return replace(program, **{column: values})


def no_wait_for_a_message(program: Program) -> Program:
    """A block reads what a receive writes, without waiting for it."""
    receive = find(program, "pp_recv")
    waits = [i for i in range(program.num_ops) if program.record[receive] in program.waits[i]]
    return replace(program, waits=without(program.waits, waits[0]))


def record_dropped(program: Program) -> Program:
    return changed(program, "record", find(program, "pp_recv"), -1)


def message_of_two_sizes(program: Program) -> Program:
    send = find(program, "pp_send")
    return changed(program, "payload_bytes", send, int(program.payload_bytes[send]) + 1)


def send_missing(program: Program) -> Program:
    send = find(program, "pp_send")
    return changed(changed(program, "peer", send, -1), "is_send", send, False)


def freed_before_its_use(program: Program) -> Program:
    release = find(program, "release")
    buffer, rank = int(program.frees[release][0]), program.rank[release]
    uses = [i for i in range(program.num_ops) if buffer in program.reads[i]]
    born = next(i for i in range(program.num_ops) if buffer in program.allocs[i])
    entries = [program.frees[i].tolist() for i in range(program.num_ops)]
    entries[release].remove(buffer)
    stream = next(i for i, s in enumerate(program.streams) if s[:2] == (rank, "compute"))
    compute = next(i for i in range(born + 1, uses[-1]) if program.stream[i] == stream)
    entries[compute].append(buffer)
    return replace(program, frees=Csr.from_lists(entries))


def too_many_streams(program: Program) -> Program:
    extra = tuple(Stream(0, f"extra {i}", -1) for i in range(32))
    return replace(program, streams=(*program.streams, *extra))


def losses_out_of_order(program: Program) -> Program:
    heads = (program.kind == program.kinds.index("head")) & (program.pass_ == ord("F"))
    first, second = np.flatnonzero(heads)[:2].tolist()
    microbatch = program.microbatch.copy()
    microbatch[[first, second]] = microbatch[[second, first]]
    return replace(program, microbatch=microbatch)


def reduced_twice(program: Program) -> Program:
    """The second reduction of a rank claims the stage of the first."""
    first, second = find(program, "grad_reduce"), find(program, "grad_reduce", 1)
    program = changed(program, "group", second, int(program.group[first]))
    return changed(program, "stream", second, int(program.stream[first]))


def never_reduced(program: Program) -> Program:
    kinds = program.kind.copy()
    ops = np.flatnonzero((kinds == program.kinds.index("grad_reduce")) & (program.rank == 0))
    kinds[ops] = program.kinds.index("param_gather")
    return replace(program, kind=kinds)


MUTATIONS: dict[str, tuple[str, Callable[[Program], Program]]] = {
    "a wait dropped": ("buffers", no_wait_for_a_message),
    "a record dropped": ("events", record_dropped),
    "a message of two sizes": ("transfers", message_of_two_sizes),
    "a receive without a send": ("transfers", send_missing),
    "freed before its use": ("buffers", freed_before_its_use),
    "more streams than torch has": ("pool", too_many_streams),
    "losses out of order": ("losses", losses_out_of_order),
    "gradients reduced twice": ("reduction", reduced_twice),
    "gradients never reduced": ("reduction", never_reduced),
}


@pytest.mark.parametrize(("rule", "change"), MUTATIONS.values(), ids=MUTATIONS)
def test_every_mutation_is_found(rule: str, change: Callable[[Program], Program]) -> None:
    program = lowered("1f1b")
    findings = check_step(change(program))
    assert {finding.rule for finding in findings} == {rule}, findings[:3]
    assert all("\n" not in finding.message for finding in findings)


def test_reduction_before_the_last_backward_is_found() -> None:
    program = lowered("dualpipev")
    reduce = find(program, "grad_reduce")
    stage, rank = program.stage[reduce], program.rank[reduce]
    backward = [i for i in range(program.num_ops) if program.stage[i] == stage
                and program.rank[i] == rank and chr(program.pass_[i]) in "BIW"
                and program.category[i] == program.categories.index("compute")]  # fmt: skip
    rules = dict(check_program._RULES)
    assert list(rules["reduction"](program)) == []
    faults = list(rules["reduction"](moved(program, reduce, backward[-2])))
    assert len(faults) == 1
    assert "comes before" in faults[0][1]


def two_collectives(first_of_rank_1: int) -> Program:
    """Two ranks that each run a collective, a kernel that waits for it, and another collective.

    Each collective has a group and a stream of its own. Rank 0 begins with that of group 0.
    """
    base = lowered("1f1b")
    streams = [Stream(rank, "compute", 0) for rank in range(2)]
    streams += [Stream(rank, f"g{group}", 0, group) for rank in range(2) for group in range(2)]
    groups = tuple(base.groups[0]._replace(name=f"g{g}", members=(0, 1), size=2) for g in range(2))
    issued = [
        (rank, group) for rank, first in enumerate((0, first_of_rank_1))
        for group in (first, -1, 1 - first)
    ]  # fmt: skip
    n, waits = len(issued), Csr.from_lists([[], [0], [], [], [1], []])
    none, zero, empty = np.full(n, -1, np.int32), np.zeros(n, np.int32), Csr.from_lists([[]] * n)
    kinds = [base.kinds.index("dispatch" if group >= 0 else "norm") for _, group in issued]
    return replace(
        base, num_ranks=2, streams=tuple(streams), groups=groups, num_events=2,
        buffer_bytes=np.zeros(0, np.int64), buffer_component=np.zeros(0, np.int8),
        static_bytes=np.zeros_like(base.static_bytes),
        rank=np.array([rank for rank, _ in issued], np.int32),
        stream=np.array([2 + 2 * r + g if g >= 0 else r for r, g in issued], np.int32),
        kind=np.array(kinds, np.int32), category=zero, cell=zero, cost=zero,
        pass_=np.full(n, ord("O"), np.uint8), stage=none, site=none, microbatch=none,
        record=np.array([0, -1, -1, 1, -1, -1]), host_sync=np.zeros(n, np.bool_),
        group=np.array([group for _, group in issued], np.int32), peer=none,
        is_send=np.zeros(n, np.bool_), payload_bytes=np.ones(n, np.int64), batch=none,
        waits=waits, reads=empty, writes=empty, allocs=empty, frees=empty,
    )  # fmt: skip


def test_communicators_launched_in_different_orders_are_found() -> None:
    """On queues of their own both collectives come to an end; in one queue the second collective of
    each rank stands behind a kernel that waits for the first, which is the other rank's second."""
    assert check_step(two_collectives(first_of_rank_1=0)) == []
    findings = check_step(two_collectives(first_of_rank_1=1))
    assert [finding.rule for finding in findings] == ["queues"]
    assert findings[0].message.startswith("with 1 hardware queues these wait for ever")
    assert check_program._play(two_collectives(first_of_rank_1=1), 8) == []
