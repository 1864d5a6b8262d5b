"""Why each op of a simulated step started when it did, worked out after the fact.

The start of an op is the last of a few instants: the host has issued it, the op before it on its
stream has ended, the ops it waits for have ended, its peers are there, links or SMs are free. The
reason is the one that came last; on a tie the first of start, stream, event, host, then peer. A
stream that shares a hardware queue waits for the other one's ops as for its own. As only times
decide, every engine gets the same causes from the same times.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.sim.device import links_of_transfers
from mhcplan.sim.jit import Ints, compiled, ints
from mhcplan.sim.order import NO_OP
from mhcplan.sim.timeline import REASONS, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mhcplan.sim.order import Order
    from mhcplan.sim.program import Program

    Array = NDArray[np.int64]

_START, _HOST, _STREAM, _EVENT, _PEER, _LINK, _PRIORITY, _SMS = range(len(REASONS))


def timeline_of(
    program: Program, order: Order, issue_ns: Array, start_ns: Array, end_ns: Array,
    release_ns: Array, placed_ns: Array, behind: Array,
) -> Timeline:  # fmt: skip
    """Make the Timeline of a step from its times.

    Args:
        program, order: what was played.
        issue_ns: when the host had issued each op.
        start_ns, end_ns: when each op ran.
        release_ns: when each transfer freed its links: before ``end_ns`` where a batch went on.
            Other ops have any lower number.
        placed_ns: when each transfer's CTAs had SMs on its rank; negative where none were needed.
        behind: the op that is before each one in a hardware queue, or NO_OP.
    """
    causes = partial(
        _causes, program, order, issue_ns, start_ns, end_ns, release_ns, placed_ns, behind
    )
    return _Played(issue_ns, start_ns, end_ns, causes)


class _Played(Timeline):
    """A Timeline whose causes are worked out when they are first asked for: that takes a fifth as
    long as the step took to play, and how long a step is needs none of them."""

    _causes: Callable[[], _Causes]

    def __init__(
        self, issue_ns: Array, start_ns: Array, end_ns: Array, causes: Callable[[], _Causes]
    ) -> None:
        vars(self).update(issue_ns=issue_ns, start_ns=start_ns, end_ns=end_ns, _causes=causes)

    def __getattr__(self, name: str) -> object:
        if name not in _Causes._fields:
            raise AttributeError(name)
        vars(self).update(self._causes()._asdict())
        return vars(self)[name]


class _Causes(NamedTuple):
    """The columns of a Timeline that are worked out."""

    cause: Array
    reason: NDArray[np.int8]


def _causes(
    program: Program, order: Order, issue_ns: Array, start_ns: Array, end_ns: Array,
    release_ns: Array, placed_ns: Array, behind: Array,
) -> _Causes:  # fmt: skip
    search = _Search(program, order, start_ns, end_ns, release_ns)
    search.own_rank(issue_ns, np.where(order.meeting >= 0, placed_ns, start_ns), behind)
    if (placed_ns >= 0).any():
        search.places(placed_ns)
        search.peers()
    else:
        search.peers()
        search.links()
    search.sms()
    at_start = start_ns == 0
    search.reason[at_start], search.cause[at_start] = _START, NO_OP
    return _Causes(search.cause, search.reason.astype(np.int8))


class _Search:
    """Goes through the instants that a start may have waited for, in the order they come.

    ``ready`` is when the ones so far had come, ``cause`` and ``reason`` tell the last of them.
    """

    def __init__(
        self, program: Program, order: Order, start_ns: Array, end_ns: Array, release_ns: Array
    ) -> None:
        self.program, self.order = program, order
        self.start, self.end, self.release = start_ns, end_ns, release_ns
        self.ready = np.zeros(program.num_ops, np.int64)
        self.cause = np.full(program.num_ops, NO_OP, np.int64)
        self.reason = np.zeros(program.num_ops, np.int64)
        self.transfers = np.flatnonzero(order.meeting >= 0)

    def own_rank(self, issue_ns: Array, begun_ns: Array, behind: Array) -> None:
        """What a kernel waits for on its own rank."""
        order = self.order
        own = _OwnRank(
            *map(ints, (order.first, order.previous, order.waited.offsets, order.waited.values)),
            *map(ints, (order.sync, behind, issue_ns, begun_ns, self.end, self.release)),
        )
        last = ints(np.arange(len(order.first)))
        _own_rank(own, self.ready, self.reason, self.cause)
        _whole_kernels(own.first, own.release_ns, last, self.ready, self.reason, self.cause)

    def places(self, placed_ns: Array) -> None:
        """Where its CTAs found no SM, the compute op that had begun last is the cause."""
        waits = self.transfers[placed_ns[self.transfers] > self.ready[self.transfers]]
        ran = np.flatnonzero((self.order.meeting < 0) & (self.end > self.start))
        begun = _Lookup(self.program.rank[ran], self.start[ran], ran)
        self.cause[waits] = begun.find_last(self.program.rank[waits], placed_ns[waits])
        self.reason[waits] = _SMS
        self.ready[waits] = placed_ns[waits]

    def peers(self) -> None:
        """Where another member came later, what let the last one arrive is the cause."""
        meeting = self.order.meeting[self.transfers]
        all_ready, last_member = self._by_meeting(), self._by_meeting()
        np.maximum.at(all_ready, meeting, self.ready[self.transfers])
        came_last = self.ready[self.transfers] == all_ready[meeting]
        # written from the highest op to the lowest, which stays
        last_member[meeting[came_last][::-1]] = self.transfers[came_last][::-1]
        waits = self.transfers[~came_last]
        self.cause[waits] = self.cause[last_member[self.order.meeting[waits]]]
        self.reason[waits] = _PEER
        self.ready[self.transfers] = all_ready[meeting]

    def links(self) -> None:
        """Where a link was taken, the transfer that freed it at the start is the cause."""
        meeting = self.order.meeting
        waits = self.transfers[self.start[self.transfers] > self.ready[self.transfers]]
        member = self._by_meeting()
        member[meeting[self.transfers]] = self.transfers
        links = links_of_transfers(self.program, meeting)
        holder = member[links.owners]
        held = self.release[holder] > self.start[holder]
        freed_by = _Lookup(links.values[held], self.release[holder[held]], holder[held])
        cause = self._by_meeting()
        np.maximum.at(cause, links.owners, freed_by.find(links.values, self.start[holder]))
        self.cause[waits] = cause[meeting[waits]]
        self.reason[waits] = _LINK

    def sms(self) -> None:
        """Where the SMs were taken, the compute op that ended at the start is the cause."""
        alone = self.order.meeting < 0
        waits = np.flatnonzero(alone & (self.start > self.ready))
        ran = np.flatnonzero(alone & (self.end > self.start))
        ended_by = _Lookup(self.program.rank[ran], self.end[ran], ran)
        self.cause[waits] = ended_by.find(self.program.rank[waits], self.start[waits])
        self.reason[waits] = _PRIORITY
        resident = waits[self.cause[waits] == NO_OP]  # only CTAs of an op had ended, not the op
        begun = _Lookup(self.program.rank[ran], self.start[ran], ran)
        self.cause[resident] = begun.find_last(self.program.rank[resident], self.start[resident])
        self.reason[resident] = _SMS

    def _by_meeting(self) -> Array:
        return np.full(int(self.order.meeting.max(initial=-1)) + 1, NO_OP, np.int64)


class _OwnRank(NamedTuple):
    """What :func:`_own_rank` reads: columns of Order and of the times, by op."""

    first: Ints
    previous: Ints
    wait_begin: Ints
    waited: Ints
    sync: Ints
    behind: Ints
    issue_ns: Ints
    begun_ns: Ints
    end_ns: Ints
    release_ns: Ints


@compiled
def _own_rank(own: _OwnRank, ready: Ints, reason: Ints, cause: Ints) -> None:
    """Fill what each op's kernel waited for last on its own rank."""
    ops = range(len(own.first))
    for op in ops:
        kernel = own.first[op]
        instant = max(ready[kernel], own.issue_ns[op])
        if kernel == op and own.previous[op] != NO_OP:
            instant = max(instant, own.end_ns[own.previous[op]])
        if own.behind[op] != NO_OP:
            instant = max(instant, own.begun_ns[own.behind[op]])
        for i in range(own.wait_begin[op], own.wait_begin[op + 1]):
            instant = max(instant, own.end_ns[own.waited[i]])
        ready[kernel] = instant
    # From the weakest claim to the strongest: on a tie the last one written stays.
    for op in ops:
        if own.behind[op] != NO_OP and own.begun_ns[own.behind[op]] == ready[op]:
            reason[op], cause[op] = _STREAM, own.behind[op]
    for op in ops:
        kernel = own.first[op]
        if own.issue_ns[op] == ready[kernel]:
            reason[kernel], cause[kernel] = _HOST, own.sync[op]
    for op in ops:
        kernel = own.first[op]
        for i in range(own.wait_begin[op], own.wait_begin[op + 1]):
            if own.end_ns[own.waited[i]] == ready[kernel]:
                reason[kernel], cause[kernel] = _EVENT, own.waited[i]
    for op in ops:
        before = own.previous[op]
        if own.first[op] == op and before != NO_OP and own.end_ns[before] == ready[op]:
            reason[op], cause[op] = _STREAM, before


@compiled
def _whole_kernels(
    first: Ints, release_ns: Ints, last: Ints, ready: Ints, reason: Ints, cause: Ints
) -> None:
    """Give every op of a batch what its kernel has; a cause is the op that its kernel ended with.

    ``last`` comes as 0, 1, 2, ...; it is scratch.
    """
    for op in range(len(first)):
        if release_ns[op] >= release_ns[last[first[op]]]:
            last[first[op]] = op
    for op in range(len(first)):
        kernel = first[op]
        if kernel == op and cause[op] != NO_OP:
            cause[op] = last[first[cause[op]]]
        ready[op], reason[op], cause[op] = ready[kernel], reason[kernel], cause[kernel]


class _Lookup:
    """Finds an op by (place, instant): the lowest one, or NO_OP."""

    def __init__(self, place: NDArray[np.integer], instant_ns: Array, op: Array) -> None:
        self._span = int(instant_ns.max(initial=0)) + 1
        key = place.astype(np.int64) * self._span + instant_ns
        by_key = np.lexsort((op, key))
        self._key, self._op = key[by_key], op[by_key]

    def find(self, place: NDArray[np.integer], instant_ns: Array) -> Array:
        if not len(self._key):
            return np.full(len(place), NO_OP, np.int64)
        key = place.astype(np.int64) * self._span + instant_ns
        at = np.minimum(np.searchsorted(self._key, key), len(self._key) - 1)
        known = (self._key[at] == key) & (instant_ns < self._span)
        return np.where(known, self._op[at], NO_OP)

    def find_last(self, place: NDArray[np.integer], instant_ns: Array) -> Array:
        """The last op at a place before an instant, or NO_OP."""
        if not len(self._key):
            return np.full(len(place), NO_OP, np.int64)
        first = place.astype(np.int64) * self._span
        at = np.searchsorted(self._key, first + np.minimum(instant_ns, self._span - 1)) - 1
        known = (at >= 0) & (self._key[at] >= first)
        return np.where(known, self._op[at], NO_OP)
