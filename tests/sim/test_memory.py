"""Memory in host issue order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from mhcplan.sim.engine import simulate
from mhcplan.sim.memory import AllocationError, memory_of, memory_report, memory_times_ns
from mhcplan.sim.program import COMPONENTS
from tests.support.programs import Maker, add_buffers, makers

ACTIVATIONS, COMMUNICATION, WORKSPACE = (
    COMPONENTS.index(name) for name in ("activations", "communication", "workspace")
)


def two_ranks() -> Maker:
    maker = Maker(2)
    maker.static_bytes[0, COMPONENTS.index("parameters")] = 1000
    a, b = maker.buffer(100), maker.buffer(30, "communication")
    maker.op(0, 5, allocs=[a])
    maker.op(0, 5, stream="side", allocs=[b])
    maker.op(0, 5, frees=[a])
    maker.op(0, 5, frees=[b])
    maker.op(1, 5)
    maker.group("pp", 0, 1)
    maker.group("ep", 0, size=8)
    maker.group("dp", 0)
    return maker


def test_memory_counts_what_the_host_has_handed_out_by_then() -> None:
    memory = memory_of(*two_ranks().build(workspace_bytes=[0, 0, 7, 0, 2]))
    # an op's frees come after it, its workspace only while it runs
    assert memory.held_bytes.sum(axis=1).tolist() == [1100, 1130, 1137, 1030, 2]
    assert memory.peak_op.tolist() == [2, 4]
    peak = memory.peak_bytes[0]
    assert (peak[ACTIVATIONS], peak[COMMUNICATION], peak[WORKSPACE]) == (100, 30, 7)
    assert peak.sum() == 1137
    assert memory.left_bytes.sum(axis=1).tolist() == [1000, 0]


def test_the_report_adds_what_allocator_and_device_take() -> None:
    program, costs = two_ranks().build(workspace_bytes=[0, 0, 7])
    costs = replace(costs, margin_percent=10.0, context_bytes=500, communicator_bytes=40)
    first, second = memory_report(program, costs, memory_of(program, costs))
    assert list(first) == [
        *(f"{component}_bytes" for component in COMPONENTS),
        "peak_bytes",
        "reserved_bytes",
        "device_bytes",
    ]
    assert first["parameters_bytes"] == 1000
    assert first["peak_bytes"] == 1137
    assert first["reserved_bytes"] == 1251, "1137 x 1.1, rounded up"
    assert first["device_bytes"] == 1251 + 500 + 2 * 40, "a group of one needs no communicator"
    assert second["device_bytes"] == 500 + 40


def test_of_equal_peaks_the_first_counts() -> None:
    maker = Maker()
    a, b = maker.buffer(100), maker.buffer(100, "communication")
    maker.op(0, 5, allocs=[a], frees=[a])
    maker.op(0, 5, allocs=[b], frees=[b])
    memory = memory_of(*maker.build())
    assert memory.peak_op.tolist() == [0]
    assert memory.peak_bytes[0, ACTIVATIONS] == 100


def test_a_rank_without_ops_holds_its_static_bytes() -> None:
    maker = Maker(2)
    maker.static_bytes[1, 0] = 77
    maker.op(0, 1)
    memory = memory_of(*maker.build())
    assert memory.peak_op.tolist() == [0, -1]
    assert memory.peak_bytes[1].sum() == 77


def test_the_curve_moves_with_the_compute_stream() -> None:
    maker = Maker(2)
    ep = maker.group("ep", 0, size=8)
    maker.op(0, 10)
    late = maker.transfer(0, ep, 12)
    maker.op(0, 5)
    maker.op(0, 5, stream="high", priority=-1, waits=[late])
    maker.op(0, 5)
    maker.op(1, 3)
    maker.op(1, 3)
    program, costs = maker.build()
    times = memory_times_ns(program, simulate(program, costs))
    assert times.tolist() == [0, 0, 10, 10, 20, 0, 3]


@pytest.mark.parametrize(
    ("allocs", "frees", "words"),
    [
        ([[0], [0]], [[], [0]], r"buffer 0: more than one op allocates it: op 0 .* and op 1 "),
        ([[0], []], [[0], [0]], r"buffer 0: more than one op frees it: op 0 .* and op 1 "),
        ([[], []], [[], [0]], r"buffer 0: op 1 .* frees it, but nobody allocates it"),
        ([[], [0]], [[0], []], r"buffer 0: op 0 .* frees it, but it is allocated by op 1 "),
        ([[0, 0], []], [[], [0]], r"buffer 0: more than one op allocates it: op 0 "),
    ],
)
def test_a_buffer_has_one_life(allocs: list[list[int]], frees: list[list[int]], words: str) -> None:
    maker = Maker()
    maker.buffer(8)
    for alloc, free in zip(allocs, frees, strict=True):
        maker.op(0, 1, allocs=alloc, frees=free)
    with pytest.raises(AllocationError, match=words):
        memory_of(*maker.build())


def test_a_buffer_is_not_freed_by_another_rank() -> None:
    maker = Maker(2)
    buffer = maker.buffer(8)
    maker.op(0, 1, allocs=[buffer])
    maker.op(1, 1, frees=[buffer])
    with pytest.raises(AllocationError, match="it is allocated by op 0"):
        memory_of(*maker.build())


@settings(max_examples=40, deadline=None)
@given(makers(host=False))
def test_memory_ends_where_it_began_and_is_never_negative(maker: Maker) -> None:
    maker.static_bytes[:] = np.arange(len(COMPONENTS))
    program, costs = add_buffers(maker).build()
    memory = memory_of(program, costs)
    assert np.array_equal(memory.left_bytes, program.static_bytes)
    assert (memory.held_bytes >= program.static_bytes[program.rank]).all()
    # the same, counted one op at a time
    alive: list[dict[int, int]] = [{} for _ in range(program.num_ranks)]
    for op in range(program.num_ops):
        own = alive[program.rank[op]]
        own |= {b: int(program.buffer_bytes[b]) for b in program.allocs[op].tolist()}
        static = int(program.static_bytes[program.rank[op]].sum())
        assert memory.held_bytes[op].sum() == static + sum(own.values())
        for buffer in program.frees[op].tolist():
            del own[buffer]
