"""The physics: what ops that run at the same time do to each other.

Every engine calls these functions, plainly or compiled, and holds no physics of its own; a better
model of the GPU replaces this file only. They take and fill plain sequences of integers.

Work and rates. An op that takes d ns alone is ``d * FULL_RATE`` units of work. Whenever something
on a rank begins or ends, :func:`share_device` says how many units a nanosecond everything on that
rank does from then on, 0 .. FULL_RATE; a transfer goes at the least of what its members' ranks give
it. The time to the end is rounded up to a whole nanosecond. So any slow-down that a model of
contention finds is an integer rate here.

What is modelled:

* **SMs.** A rank's compute ops (all that are no transfers) share its SMs by priority. While an op
  of a more urgent stream runs, those of less urgent streams make no progress, as if thread blocks
  were short: pre-emption between blocks. Ops of equally urgent streams run one at a time: the op
  that has begun first, then in issue order. A kernel that fills the GPU leaves no room for another,
  and a gain from two that do not fill it would have to be measured; without a measurement none is
  given. An op of no duration (bookkeeping) takes no SMs and waits for none.
* **Links.** Each rank has, for each medium, one link out and one link in. A transfer holds ``out``
  at every member that sends and ``in`` at every member that receives (both, in a collective) from
  its start to its end, alone. It gets all of them at one instant or none. Transfers that could
  start at the same instant are served by (most urgent stream priority of its members, lowest issue
  number of its members, lowest op number); one that finds a link taken does not keep others off
  its free links.

Kernels and communication do not disturb each other here; where costs say what ops put on a GPU,
:mod:`mhcplan.sim.device_sms` takes the place of :func:`share_device` and of the links.
:data:`NOT_MODELLED` says what is missing; reports print it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.jit import Ints, ints, usable_in_compiled
from mhcplan.sim.program import Csr

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mhcplan.sim.program import Program

    Array = NDArray[np.int64]

NOT_MODELLED: tuple[str, ...] = (
    "communication takes no SMs and no memory bandwidth from compute, and loses none to it",
    "a more urgent kernel starts at once: the residual life of resident thread blocks, and "
    "kernels that are persistent, do not delay it",
    "kernels of equally urgent streams of one GPU run one after another",
    "transfers over one link take turns and do not share its bandwidth",
    "streams never share a hardware queue (CUDA_DEVICE_MAX_CONNECTIONS)",
    "the queue of launched kernels has no limit, so the host never waits for room in it",
)

# Units of work a nanosecond of an op that has the device to itself. int64 holds 39 hours of it.
FULL_RATE = 1 << 16


class Traits(NamedTuple):
    """What the device knows of each op; a better model adds to it.

    Attributes:
        number: in the order of issue; engines may index ops in another way.
        priority: of the op's stream; lower is more urgent.
        is_transfer: 1 for a transfer, 0 for a compute op.
    """

    number: Ints
    priority: Ints
    is_transfer: Ints


def traits_of(program: Program) -> Traits:
    """The traits of a Program's ops, as arrays."""
    priority = np.array([stream.priority for stream in program.streams], np.int64)
    number = np.arange(program.num_ops)
    return Traits(ints(number), ints(priority[program.stream]), ints(program.group >= 0))


@usable_in_compiled
def work_of(duration_ns: int) -> int:
    """Work of an op that takes ``duration_ns`` alone."""
    return duration_ns * FULL_RATE


@usable_in_compiled
def work_left(work: int, rate: int, elapsed_ns: int) -> int:
    """Work left after ``elapsed_ns`` at ``rate``; never below 0, as ends are rounded up."""
    return max(work - rate * elapsed_ns, 0)


@usable_in_compiled
def time_to_finish_ns(work: int, rate: int) -> int:
    """Nanoseconds that ``work`` takes at ``rate`` > 0, rounded up."""
    return (work + rate - 1) // rate


@usable_in_compiled
def share_device(
    begin: int,
    end: int,
    running: Ints,
    start_ns: Ints,
    traits: Traits,
    rate: Ints,
) -> None:
    """Set the rates of what is on one rank.

    Args:
        begin, end: the rank's ops are ``running[begin : end]``: of each compute stream the one that
            is free to run, and every transfer under way. Lower numbers were issued earlier.
        running: ops, in no order that means anything.
        start_ns: when each op has begun, or a negative number.
        traits: of every op.
        rate: filled in the places of ``running``; a transfer's is what this rank gives it.
    """
    chosen = -1
    for i in range(begin, end):
        op = running[i]
        if traits.is_transfer[op]:
            rate[i] = FULL_RATE
            continue
        rate[i] = 0
        if chosen < 0 or _goes_first(op, running[chosen], start_ns, traits):
            chosen = i
    if chosen >= 0:
        rate[chosen] = FULL_RATE


@usable_in_compiled
def _goes_first(op: int, other: int, start_ns: Ints, traits: Traits) -> bool:
    """Whether compute op ``op`` gets the SMs and not ``other``."""
    if traits.priority[op] != traits.priority[other]:
        return traits.priority[op] < traits.priority[other]
    if (start_ns[op] >= 0) != (start_ns[other] >= 0):
        return start_ns[op] >= 0
    return traits.number[op] < traits.number[other]


@usable_in_compiled
def first_taken_link(begin: int, end: int, links: Ints, taken: Ints) -> int:
    """The first of ``links[begin : end]`` that another transfer holds, or -1."""
    for i in range(begin, end):
        if taken[links[i]]:
            return links[i]
    return -1


@usable_in_compiled
def hold_links(begin: int, end: int, links: Ints, taken: Ints, held: int) -> None:
    """Take (``held`` 1) or free (0) ``links[begin : end]``."""
    for i in range(begin, end):
        taken[links[i]] = held


def links_of_transfers(program: Program, meeting: Array) -> Csr:
    """Links of each transfer, numbered (rank x media + medium) x 2, and 1 more for the way in."""
    media = {medium: i for i, medium in enumerate(dict.fromkeys(g.medium for g in program.groups))}
    medium = np.array([media[group.medium] for group in program.groups], np.int64)
    ops = np.flatnonzero(meeting >= 0)
    out = (program.rank[ops] * len(media) + medium[program.group[ops]]) * 2
    collective = program.peer[ops] < 0
    sends, receives = program.is_send[ops] | collective, ~program.is_send[ops] | collective
    owner = np.concatenate([meeting[ops[sends]], meeting[ops[receives]]])
    link = np.concatenate([out[sends], out[receives] + 1])
    by_link = Csr.grouped(link, int(link.max(initial=-1)) + 1).values
    of_owner = Csr.grouped(owner[by_link], int(meeting.max(initial=-1)) + 1)
    return Csr(of_owner.offsets, link[by_link][of_owner.values])


def turns_of_transfers(program: Program, meeting: Array) -> Array:
    """For every transfer a number; links are granted to those that wait from the lowest on."""
    ops = np.flatnonzero(meeting >= 0)
    count = int(meeting.max(initial=-1)) + 1
    stream_priority = np.array([stream.priority for stream in program.streams], np.int64)
    highest = np.iinfo(np.int64).max
    priority, issue, lowest_op = (np.full(count, highest) for _ in range(3))
    np.minimum.at(priority, meeting[ops], stream_priority[program.stream[ops]])
    np.minimum.at(issue, meeting[ops], ops - program.rank_offsets[program.rank[ops]])
    np.minimum.at(lowest_op, meeting[ops], ops)
    priority -= priority.min(initial=0)
    # one number to compare: op and issue numbers are below the number of ops
    return (priority * program.num_ops + issue) * program.num_ops + lowest_op
