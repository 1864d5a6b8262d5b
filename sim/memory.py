"""Memory of each rank through a step, as torch's caching allocator sees it.

The allocator hands memory out when the host asks for it, so memory is counted in host issue order,
whatever the streams do meanwhile. While op i is issued, its rank holds

    static bytes + buffers allocated by ops up to i and not freed before i + the workspace of op i.

The peak is the most of that, and the figures by component are those at that op, so they sum to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.jit import compiled, ints
from mhcplan.sim.order import COMPUTE_STREAM, NO_OP, describe
from mhcplan.sim.program import COMPONENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.program import CostTable, Csr, Program
    from mhcplan.sim.timeline import Timeline

    Ints = NDArray[np.int64]

_WORKSPACE = COMPONENTS.index("workspace")


class AllocationError(ValueError):
    """A buffer that is allocated or freed twice, or freed without having been allocated."""


@dataclass(frozen=True)
class Memory:
    """Bytes that ranks hold; components as in :data:`mhcplan.sim.program.COMPONENTS`.

    Attributes:
        peak_op: [rank], the first op at which the rank holds most, or -1 in a rank without ops.
        peak_bytes: [rank, component], held at that op.
        left_bytes: [rank, component], held after the last op.
    """

    peak_op: Ints
    peak_bytes: Ints
    left_bytes: Ints
    _program: Program
    _costs: CostTable

    @cached_property
    def held_bytes(self) -> Ints:
        """[op, component], held by the op's rank while the op is issued."""
        held = np.empty((self._program.num_ops, len(COMPONENTS)), np.int64)
        _play(self._program, self._costs, held)
        return held


def memory_of(program: Program, costs: CostTable) -> Memory:
    """Count the memory of all ranks.

    Raises:
        AllocationError: a buffer is allocated or freed twice, or freed before it is allocated.
    """
    program.shared(_check)
    nothing = np.empty((0, len(COMPONENTS)), np.int64)
    return Memory(*_play(program, costs, nothing), program, costs)


def _play(program: Program, costs: CostTable, held: Ints) -> tuple[Ints, Ints, Ints]:
    """Peak op, peak and rest of each rank; fills ``held`` if it has room."""
    left = np.array(program.static_bytes, np.int64)
    peak, peak_op = left.copy(), np.full(program.num_ranks, NO_OP, np.int64)
    lists = program.allocs, program.frees
    buffers = _Buffers(
        *(ints(part) for csr in lists for part in (csr.offsets, csr.values)),
        component=program.shared(_components), num_bytes=ints(program.buffer_bytes),
    )  # fmt: skip
    workspace = ints(costs.workspace_bytes[program.cost])
    _count(buffers, workspace, ints(program.rank_offsets), left, peak, peak_op, held)
    return peak_op, peak, left


def _components(program: Program) -> Ints:
    return ints(program.buffer_component)


class _Buffers(NamedTuple):
    """Lists of what ops allocate and free, and what each buffer is."""

    alloc_begin: Ints
    allocs: Ints
    free_begin: Ints
    frees: Ints
    component: Ints
    num_bytes: Ints


@compiled
def _count(
    buffers: _Buffers,
    workspace: Ints,
    rank_begin: Ints,
    alive: Ints,
    peak: Ints,
    peak_op: Ints,
    held: Ints,
) -> None:
    """Go through each rank's ops; ``alive`` [rank, component] begins with the static bytes."""
    components = alive.shape[1]
    for rank in range(len(alive)):
        total = 0
        for c in range(components):
            total += alive[rank, c]
        most = -1
        for op in range(rank_begin[rank], rank_begin[rank + 1]):
            for i in range(buffers.alloc_begin[op], buffers.alloc_begin[op + 1]):
                buffer = buffers.allocs[i]
                alive[rank, buffers.component[buffer]] += buffers.num_bytes[buffer]
                total += buffers.num_bytes[buffer]
            if total + workspace[op] > most:
                most, peak_op[rank] = total + workspace[op], op
                for c in range(components):
                    peak[rank, c] = alive[rank, c]
                peak[rank, _WORKSPACE] += workspace[op]
            if len(held):
                for c in range(components):
                    held[op, c] = alive[rank, c]
                held[op, _WORKSPACE] += workspace[op]
            for i in range(buffers.free_begin[op], buffers.free_begin[op + 1]):
                buffer = buffers.frees[i]
                alive[rank, buffers.component[buffer]] -= buffers.num_bytes[buffer]
                total -= buffers.num_bytes[buffer]


def memory_report(program: Program, costs: CostTable, memory: Memory) -> list[dict[str, int]]:
    """Per rank: bytes by component at the peak, the peak, and what allocator and device add.

    ``reserved_bytes`` adds the allocator's margin to the peak; ``device_bytes`` adds the CUDA
    context and a communicator for each of the rank's groups that has other members.
    """
    report: list[dict[str, int]] = []
    for rank, components in enumerate(memory.peak_bytes.tolist()):
        peak = sum(components)
        reserved = peak + math.ceil(peak * costs.margin_percent / 100)
        groups = sum(rank in group.members and group.size > 1 for group in program.groups)
        row = {f"{name}_bytes": n for name, n in zip(COMPONENTS, components, strict=True)}
        row["peak_bytes"] = peak
        row["reserved_bytes"] = reserved
        row["device_bytes"] = reserved + costs.context_bytes + groups * costs.communicator_bytes
        report.append(row)
    return report


def memory_times_ns(program: Program, timeline: Timeline) -> Ints:
    """For every op, the instant at which a memory curve over time draws ``held_bytes``.

    All memory belongs to the rank's stream "compute", so an op's memory changes hands when that
    stream comes to the op's place in issue order. Within a rank the times never go back.
    """
    is_owner = np.array([stream.name == COMPUTE_STREAM for stream in program.streams], np.bool_)
    span = timeline.step_ns + 1
    shift = program.rank.astype(np.int64) * span
    times = np.where(is_owner[program.stream], timeline.start_ns, 0) + shift
    return np.maximum.accumulate(times) - shift


def _only_op(program: Program, lists: Csr, verb: str) -> Ints:
    """For every buffer the one op that has it in its list, or NO_OP."""
    op_of = np.full(program.num_buffers, NO_OP, np.int64)
    buffer = _note_owners(ints(lists.offsets), ints(lists.values), op_of)
    if buffer >= 0:
        ops = lists.owners[lists.values == buffer][:2].tolist()
        names = " and ".join(describe(program, op) for op in ops)
        raise AllocationError(f"buffer {buffer}: more than one op {verb} it: {names}")
    return op_of


@compiled
def _note_owners(offsets: Ints, values: Ints, op_of: Ints) -> int:
    """Fill ``op_of``; returns the lowest buffer that is in more than one list, or -1."""
    twice = -1
    for op in range(len(offsets) - 1):
        for i in range(offsets[op], offsets[op + 1]):
            buffer = values[i]
            if op_of[buffer] >= 0 and (twice < 0 or buffer < twice):
                twice = buffer
            op_of[buffer] = op
    return twice


def _check(program: Program) -> None:
    allocated_by = _only_op(program, program.allocs, "allocates")
    freed_by = _only_op(program, program.frees, "frees")
    freed = np.flatnonzero(freed_by != NO_OP)
    by, of = freed_by[freed], allocated_by[freed]
    wrong = (of == NO_OP) | (of > by) | (program.rank[of] != program.rank[by])
    if wrong.any():
        i = int(np.argmax(wrong))
        why = "nobody allocates it" if of[i] == NO_OP else (
            f"it is allocated by {describe(program, int(of[i]))}"
        )  # fmt: skip
        name = describe(program, int(by[i]))
        raise AllocationError(f"buffer {int(freed[i])}: {name} frees it, but {why}")
