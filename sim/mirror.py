"""Steps whose ranks are mirror images, and the half of one that tells the whole.

DualPipe runs a model both ways at once: rank P - 1 - r does for one direction what rank r does for
the other, op by op. They wait for the same and so keep step to the nanosecond, and an engine needs
to play the first P / 2 ranks only. There, what goes to a rank beyond the middle comes back from it:
the message meets its own mirror image.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.order import NO_OP, order_of
from mhcplan.sim.program import Csr

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.program import CostTable, Group, Program

    Array = NDArray[np.int64]

_OP_COLUMNS = ("rank", "kind", "category", "pass_", "cell", "cost", "stage", "site", "microbatch",
               "record", "host_sync", "is_send", "payload_bytes", "batch")  # fmt: skip
_OP_LISTS = ("waits", "reads", "writes", "allocs", "frees")


def half_of(program: Program, costs: CostTable) -> Program | None:
    """The first half of the ranks, which tells when all ops run: those of rank P - 1 - r when those
    of rank r do. None if the ranks are no mirror images.

    Without contention transfers take turns on links, where op numbers decide between equals: these
    are no mirror images, so there is no half.

    Raises:
        MeetError: a transfer lacks an end or a member.
    """
    half = None if costs.loads is None else program.shared(_half_of)
    if half is None or not np.array_equal(program.cost[half.image], program.cost):
        return None
    cost = program.cost[: half.program.num_ops]
    return half.program.renumbered(cost=cost, cost_keys=program.cost_keys)


class _Half(NamedTuple):
    """The first half of the ranks, and for every op of the whole the one that mirrors it."""

    program: Program
    image: Array


def _half_of(program: Program) -> _Half | None:
    """The half by all but what ops cost."""
    lengths = np.diff(program.rank_offsets)
    if program.num_ranks % 2 or not program.num_ops or (lengths != lengths[::-1]).any():
        return None
    image = _last_first(program.rank_offsets)
    twin = _twins(program.group, image, len(program.groups))
    if twin is None or not _is_mirrored(program, twin, image):
        return None
    first = _first_half(program, twin)
    return _Half(first, image) if _meets_alike(program, first, image) else None


def _last_first(offsets: Array) -> Array:
    """Numbers of consecutive pieces, the last piece first."""
    ends: list[int] = offsets.tolist()
    return np.concatenate([np.arange(begin, end) for begin, end in pairwise(ends)][::-1])


def _twins(of_op: NDArray[np.integer], image: Array, count: int) -> Array | None:
    """What number belongs to the images of ops with each number below ``count``; -1 (the last
    entry) to those with none. None if a number belongs to images with different ones."""
    twin = np.full(count + 1, -1, np.int64)
    twin[of_op] = of_op[image]
    return twin if twin[-1] < 0 and np.array_equal(twin[of_op], of_op[image]) else None


def _is_mirrored(program: Program, twin: Array, image: Array) -> bool:
    """Whether each op waits for the image of what its image waits for."""
    order = order_of(program)
    streams = _mirrored_streams(program)
    media = [group.medium for group in program.groups]
    others = np.where(twin < 0, np.arange(len(twin)), twin)[:-1].tolist()
    waited, rank_offsets = order.waited, program.rank_offsets

    def image_of(ops: Array) -> Array:
        return np.where(ops == NO_OP, NO_OP, image[ops])

    counts = np.diff(waited.offsets)
    return (
        streams is not None
        and media == [media[i] for i in others]
        and np.array_equal(streams[program.stream], program.stream[image])
        and np.array_equal(program.host_sync, program.host_sync[image])
        and np.array_equal(program.is_send, program.is_send[image])
        and np.array_equal(image_of(order.first), order.first[image])
        and np.array_equal(counts, counts[image])
        and np.array_equal(
            image_of(waited.values), waited.values[_last_first(waited.offsets[rank_offsets])]
        )
    )


def _mirrored_streams(program: Program) -> Array | None:
    """Of every stream the one on the mirrored rank with the same number there, which is dealt to
    the same hardware queue; None if their priorities differ."""
    own: list[list[int]] = [[] for _ in range(program.num_ranks)]
    for i, stream in enumerate(program.streams):
        own[stream.rank].append(i)
    priorities = [[program.streams[i].priority for i in streams] for streams in own]
    if priorities != priorities[::-1]:
        return None
    mirrored = np.zeros(len(program.streams), np.int64)
    for streams, others in zip(own, reversed(own), strict=True):
        mirrored[streams] = others
    return mirrored


def _first_half(program: Program, twin: Array) -> Program:
    """The first half of the ranks, each of which stands for the rank that mirrors it as well."""
    last, half, count = program.num_ranks - 1, program.num_ranks // 2, program.num_ops // 2

    def folded(group: Group) -> Group:
        members = {min(member, last - member) for member in group.members}
        return group._replace(members=tuple(sorted(members)))

    is_kept = np.array([stream.rank < half for stream in program.streams])
    stream, group, peer = (
        column[:count] for column in (program.stream, program.group, program.peer)
    )
    return replace(
        program,
        num_ranks=half,
        streams=tuple(stream for stream in program.streams if stream.rank < half),
        groups=tuple(map(folded, program.groups)),
        stream=(np.cumsum(is_kept) - 1)[stream],
        group=np.minimum(group, twin[group]),
        peer=np.minimum(peer, last - peer),
        **{name: getattr(program, name)[:count] for name in _OP_COLUMNS},
        **{name: _first_lists(getattr(program, name), count) for name in _OP_LISTS},
    )


def _first_lists(lists: Csr, count: int) -> Csr:
    return Csr(lists.offsets[: count + 1], lists.values[: lists.offsets[count]])


def _meets_alike(program: Program, first: Program, image: Array) -> bool:
    """Whether ops meet in the half just if, of the whole, one meets the other or its image."""
    whole, half = order_of(program).meeting, order_of(first).meeting
    twin = _twins(whole, image, int(whole.max(initial=-1)) + 1)
    if twin is None:
        return False
    either = np.minimum(whole, twin[whole])[: len(half)]
    met = np.full(int(half.max(initial=-1)) + 2, -1, np.int64)
    met[half] = either
    return np.array_equal(met[half], either) and len(np.unique(met)) == len(met)
