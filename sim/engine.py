"""The reference engine: plays a Program in virtual time, written with SimPy to be read.

Every stream is a process that runs its ops in order; every rank's host thread is a process that
issues them. At one instant, in this order:

1. completions: ops whose work is done end;
2. wake-ups: streams and hosts that waited for those ends go on, ops of no duration begin and end;
3. decisions: links are granted to transfers that all members have reached, then each rank where
   something changed is shared anew (:mod:`mhcplan.sim.device`). Transfers of no duration end in a
   next round of the instant.

So only what is true at an instant matters, never the order in which SimPy happens to handle it: the
result is deterministic. Times are integer nanoseconds; 0 is when the hosts begin to issue.

Ops of one batched call are one kernel. It has reached its transfers when all its ops could start;
each transfer starts when its other end is there too, and the kernel ends with the last of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import simpy
from simpy.events import EventPriority

from mhcplan.sim import device, device_sms, device_state
from mhcplan.sim.causes import timeline_of
from mhcplan.sim.device_tables import gpu_of, queued_behind
from mhcplan.sim.order import NO_OP, describe, order_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from mhcplan.sim.order import Order
    from mhcplan.sim.program import CostTable, Program
    from mhcplan.sim.timeline import Timeline

    Process = Generator[simpy.Event, None, None]
    # The ops of one kernel, and the ops that it waits for through events.
    Launch = tuple[tuple[int, ...], tuple[int, ...]]

NEVER = -1
_AFTER_ALL_ELSE = EventPriority(2)  # completions and wake-ups are 1
_NAME_AT_MOST = 12


class DeadlockError(RuntimeError):
    """No op can go on, though some have not ended; the message names them."""


def simulate(program: Program, costs: CostTable) -> Timeline:
    """Play one step.

    Raises:
        MeetError: a transfer lacks an end or a member.
        DeadlockError: ops wait for each other.
    """
    step = _Step(program, costs)
    step.play()
    return timeline_of(
        program,
        step.order,
        issue_ns=np.array(step.issue, np.int64),
        start_ns=np.array(step.start, np.int64),
        end_ns=np.array(step.end[:-1], np.int64),
        release_ns=np.array(step.release, np.int64),
        placed_ns=np.array(step.placed, np.int64),
        behind=np.array(step.behind, np.int64),
    )


class _Clock(simpy.Environment):
    """An environment in which all delays are integers, and so is the time."""

    if TYPE_CHECKING:

        @property
        def now(self) -> int: ...


class _Decision(simpy.Event):
    """Comes after everything else at this instant."""

    def __init__(self, env: simpy.Environment) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        env.schedule(self, _AFTER_ALL_ELSE)


class _Step:
    """One step being played. Lists are indexed by op unless said otherwise."""

    def __init__(self, program: Program, costs: CostTable) -> None:
        self.program = program
        self.order = order_of(program)
        self.launches = _launches_by_stream(program, self.order)
        n = program.num_ops
        self.issue, self.start, self.release, self.placed = ([NEVER] * n for _ in range(4))
        self.end = [NEVER] * (n + 1)  # the last entry stands for NO_OP, which never ends
        self.env = _Clock()
        self._rank: list[int] = program.rank.tolist()
        self._first: list[int] = self.order.first.tolist()
        self.meeting: list[int] = self.order.meeting.tolist()
        self._ends: dict[int, simpy.Event] = {}  # of the ops that somebody waits for
        self._begins: dict[int, simpy.Event] = {}  # likewise
        self.behind: list[int] = queued_behind(program, costs).tolist()
        self._decision_is_due = False
        self._prepare_hosts(costs)
        self._prepare_work(costs)
        self._prepare_device(costs)
        self._prepare_transfers()

    def _prepare_hosts(self, costs: CostTable) -> None:
        ranks = range(self.program.num_ranks)
        self._host_ns = costs.host_ns[self.program.cost]
        self._host_goes_on = [self.env.event() for _ in ranks]
        self.host_waits_for = [NO_OP for _ in ranks]

    def _prepare_work(self, costs: CostTable) -> None:
        """Work of each op; a transfer's members all have that of the longest."""
        duration = costs.duration_ns[self.program.cost].copy()
        ops = np.flatnonzero(self.order.meeting >= 0)
        meeting = self.order.meeting[ops]
        longest = np.zeros(int(meeting.max(initial=-1)) + 1, np.int64)
        np.maximum.at(longest, meeting, duration[ops])
        duration[ops] = longest[meeting]
        self._work = [device.work_of(ns) for ns in duration.tolist()]
        self._rate = [0] * len(self._work)
        self._rated_at = [0] * len(self._work)
        self._deadline = [NEVER] * len(self._work)

    def _prepare_device(self, costs: CostTable) -> None:
        """What is on each rank: ops free to run, and transfers under way."""
        n = self.program.num_ops
        traits = device.traits_of(self.program)
        self._traits = device.Traits(*(column.tolist() for column in map(np.asarray, traits)))
        gpu = gpu_of(self.program, costs)
        self._gpu = device_state.Gpu(*(column.tolist() for column in map(np.asarray, gpu)))
        self._has_contention = costs.loads is not None
        self._state = device_state.State(
            self.start,
            self._work,
            self._rate,
            self._rated_at,
            [0] * n,
            [NEVER] * n,
            self.placed,
            [0] * n,
            [NEVER] * (2 * device_state.KNOWN),
        )
        self._watch = [device_state.FAR] * n  # when the op's rank is to be looked at again
        self._running: list[list[int]] = [[] for _ in range(self.program.num_ranks)]
        self._given_rate = [device_state.NOT_PLACED] * n  # by the op's rank
        self._changed_ranks: set[int] = set()

    def _prepare_transfers(self) -> None:
        """Links and transfers."""
        meeting = self.order.meeting
        links = device.links_of_transfers(self.program, meeting)
        self._links: list[int] = links.values.tolist()
        self._link_begin: list[int] = links.offsets.tolist()
        self._link_taken = [0] * (max(self._links, default=-1) + 1)
        self._link_watchers: list[list[int]] = [[] for _ in self._link_taken]
        self._turn: list[int] = device.turns_of_transfers(self.program, meeting).tolist()
        self._candidates: list[int] = []  # transfers whose links may be free now
        self.members: list[list[int]] = [[] for _ in self._turn]
        self._under_way = [0] * len(self.meeting)  # transfers of a kernel, at its first op
        for op in np.flatnonzero(meeting >= 0).tolist():
            self.members[self.meeting[op]].append(op)
            self._under_way[self._first[op]] += 1
        self._absent = [len(members) for members in self.members]
        self.reached = [False] * len(self.meeting)
        self._batches = {
            ops[0]: ops for launches in self.launches for ops, _ in launches if len(ops) > 1
        }

    def play(self) -> None:
        """Run until nothing happens any more."""
        for rank in range(self.program.num_ranks):
            self.env.process(self._host(rank))
        for stream, launches in zip(self.program.streams, self.launches, strict=True):
            if launches:
                self.env.process(self._run_stream(stream.rank, launches))
        self.env.run()
        if NEVER in self.end[:-1]:
            raise DeadlockError(_name_the_stuck(self))

    # -- processes -------------------------------------------------------------------------------

    def _host(self, rank: int) -> Process:
        """Issues the rank's ops; between two ``host_sync`` ops all times are known at once."""
        begin, end = self.program.rank_offsets[rank : rank + 2].tolist()
        syncs = np.flatnonzero(self.program.host_sync[begin:end]) + begin
        for stop in [*(syncs + 1).tolist(), end]:
            times = np.cumsum(self._host_ns[begin:stop]) + self.env.now
            self.issue[begin:stop] = times.tolist()
            self._host_goes_on[rank].succeed()
            self._host_goes_on[rank] = self.env.event()
            if stop > begin and self.program.host_sync[stop - 1]:
                self.host_waits_for[rank] = stop - 1
                yield self._end_of(stop - 1)
            begin = stop

    def _run_stream(self, rank: int, launches: Sequence[Launch]) -> Process:
        """Runs the kernels of one stream, each after the end of the one before."""
        env, issue, end = self.env, self.issue, self.end
        for ops, recorders in launches:
            op = ops[-1]
            while issue[op] == NEVER:
                yield self._host_goes_on[rank]
            if issue[op] > env.now:
                yield env.timeout(issue[op] - env.now)
            for recorder in recorders:
                if end[recorder] == NEVER:
                    yield self._end_of(recorder)
            behind = self.behind[ops[0]]
            if behind != NO_OP and not self._has_begun(behind):
                yield self._begins.setdefault(behind, env.event())
            if self.meeting[op] >= 0:
                self._reach_transfers(ops)
            elif self._work[op]:
                self._put_on_rank(op)
                self._decide_soon()
            else:
                self._begin(op)
                self._finish(op)
                continue
            yield self._end_of(op)

    def _has_begun(self, op: int) -> bool:
        return self.start[op] != NEVER or self.placed[op] != NEVER

    def _begin(self, op: int) -> None:
        self.start[op] = self.env.now
        self._wake_behind(op)

    def _wake_behind(self, op: int) -> None:
        """Let go on what is behind an op in its hardware queue, now that it has begun."""
        event = self._begins.pop(op, None)
        if event is not None:
            event.succeed()

    def _end_of(self, op: int) -> simpy.Event:
        """The event that an op ends which has not ended yet."""
        event = self._ends.get(op)
        if event is None:
            event = self._ends[op] = simpy.Event(self.env)
        return event

    def _finish(self, op: int) -> None:
        self.end[op] = self.env.now
        event = self._ends.pop(op, None)
        if event is not None:
            event.succeed()

    # -- decisions -------------------------------------------------------------------------------

    def _decide_soon(self) -> None:
        if not self._decision_is_due:
            self._decision_is_due = True
            decision = _Decision(self.env)
            decision.callbacks.append(self._decide)  # pyright: ignore[reportUnknownMemberType]

    def _decide(self, _event: simpy.Event) -> None:
        self._decision_is_due = False
        candidates, self._candidates = self._candidates, []
        for meeting in sorted(candidates, key=self._turn.__getitem__):
            self._try_to_start_transfer(meeting)
        changed, self._changed_ranks = self._changed_ranks, set()
        for rank in changed:
            self._share(rank)
        for op in (op for rank in changed for op in self._running[rank]):
            self._go_on(op)

    def _share(self, rank: int) -> None:
        running = self._running[rank]
        end, rates, watch = len(running), [0] * len(running), [device_state.FAR] * len(running)
        if self._has_contention:
            now = self.env.now
            device_sms.share_gpu(0, end, running, now, self._gpu, self._state, rates, watch)
        else:
            device.share_device(0, end, running, self.start, self._traits, rates)
        for op, rate, at in zip(running, rates, watch, strict=True):
            self._given_rate[op], self._watch[op] = rate, at
            if self.placed[op] != NEVER:
                self._wake_behind(op)

    def _go_on(self, op: int) -> None:
        """Go on at the rate that the device gives now: to a transfer, the least of its ranks'."""
        meeting = self.meeting[op]
        if meeting >= 0:
            members = self.members[meeting]
            rate = min(self._given_rate[member] for member in members)
            if rate < 0:
                return  # a member waits for SMs
            if self.start[op] == NEVER:
                self._start_transfer(members)
            self._set_rate(members[0], rate)
            return
        rate = self._given_rate[op]
        if rate and self.start[op] == NEVER:
            self._begin(op)
        self._set_rate(op, rate)

    def _start_transfer(self, members: Sequence[int]) -> None:
        """All members have SMs: it moves bytes from now on, which their ranks will feel."""
        for op in members:
            self.start[op] = self.env.now
            self._changed_ranks.add(self._rank[op])
        self._decide_soon()

    def _put_on_rank(self, op: int) -> None:
        self._running[self._rank[op]].append(op)
        self._changed_ranks.add(self._rank[op])

    def _take_off_rank(self, op: int) -> None:
        self._running[self._rank[op]].remove(op)
        self._changed_ranks.add(self._rank[op])
        self._decide_soon()

    def _reach_transfers(self, ops: Sequence[int]) -> None:
        for op in ops:
            meeting = self.meeting[op]
            self.reached[op] = True
            if self._has_contention:  # its CTAs wait for SMs, here and now
                self._state.here_ns[op] = self.env.now
                self._put_on_rank(op)
                self._decide_soon()
                continue
            self._absent[meeting] -= 1
            if not self._absent[meeting]:
                self._candidates.append(meeting)
                self._decide_soon()

    def _try_to_start_transfer(self, meeting: int) -> None:
        begin, end = self._link_begin[meeting], self._link_begin[meeting + 1]
        taken = device.first_taken_link(begin, end, self._links, self._link_taken)
        if taken >= 0:  # nothing to try again before that link is free
            self._link_watchers[taken].append(meeting)
            return
        device.hold_links(begin, end, self._links, self._link_taken, 1)
        for op in self.members[meeting]:
            self.start[op] = self.env.now
            self._put_on_rank(op)

    # -- work ------------------------------------------------------------------------------------

    def _set_rate(self, op: int, rate: int) -> None:
        """Go on at another rate; moves the deadline, at which work is done or to be looked at."""
        now = self.env.now
        if rate != self._rate[op]:
            elapsed_ns = now - self._rated_at[op]
            self._work[op] = device.work_left(self._work[op], self._rate[op], elapsed_ns)
            self._rate[op], self._rated_at[op] = rate, now
        deadline = NEVER
        if rate:
            deadline = self._rated_at[op] + device.time_to_finish_ns(self._work[op], rate)
            deadline = min(deadline, self._watch[op])
        if deadline == self._deadline[op]:
            return
        self._deadline[op] = deadline
        if deadline != NEVER:
            done = simpy.Timeout(self.env, deadline - now, op)
            done.callbacks.append(self._on_deadline)  # pyright: ignore[reportUnknownMemberType]

    def _on_deadline(self, event: simpy.Event) -> None:
        op = cast("int", event.value)
        if self._deadline[op] != self.env.now:
            return  # the deadline has moved since
        self._deadline[op] = NEVER
        if self.meeting[op] >= 0:
            self._end_transfer(self.meeting[op])
        elif device.work_left(self._work[op], self._rate[op], self.env.now - self._rated_at[op]):
            self._changed_ranks.add(self._rank[op])
            self._decide_soon()
        else:
            self._take_off_rank(op)
            self._finish(op)

    def _end_transfer(self, meeting: int) -> None:
        begin, end = self._link_begin[meeting], self._link_begin[meeting + 1]
        device.hold_links(begin, end, self._links, self._link_taken, 0)
        for link in self._links[begin:end]:
            self._candidates += self._link_watchers[link]
            self._link_watchers[link] = []
        for member in self.members[meeting]:
            self._take_off_rank(member)
            self.release[member] = self.env.now
            first = self._first[member]
            self._under_way[first] -= 1
            if not self._under_way[first]:  # a batch ends with its last transfer
                for op in self._batches.get(first, (first,)):
                    self._finish(op)


def _launches_by_stream(program: Program, order: Order) -> list[list[Launch]]:
    launches: list[list[Launch]] = [[] for _ in program.streams]
    waited, offsets = order.waited.values.tolist(), order.waited.offsets.tolist()
    streams: list[int] = program.stream.tolist()
    first = order.first.tolist()
    for op, stream in enumerate(streams):
        recorders = tuple(waited[offsets[op] : offsets[op + 1]])
        if first[op] == op:
            launches[stream].append(((op,), recorders))
        else:
            ops, before = launches[stream][-1]
            launches[stream][-1] = ((*ops, op), before + recorders)
    return launches


def _name_the_stuck(step: _Step) -> str:
    """Name the op at which each stream stands, and what it waits for."""
    heads = [
        next((kernel for kernel in launches if step.end[kernel[0][0]] == NEVER), None)
        for launches in step.launches
    ]
    stuck = [
        f"{describe(step.program, head[0][-1])} waits for {_obstacle(step, *head)}"
        for head in heads
        if head
    ]
    more = [f"and {len(stuck) - _NAME_AT_MOST} more"] if len(stuck) > _NAME_AT_MOST else []
    left = step.end[:-1].count(NEVER)
    return f"deadlock, {left} ops never end: " + "; ".join(stuck[:_NAME_AT_MOST] + more)


def _obstacle(step: _Step, ops: Sequence[int], recorders: Sequence[int]) -> str:
    program, op = step.program, ops[-1]
    if step.issue[op] == NEVER:
        sync = step.host_waits_for[int(program.rank[op])]
        return f"the host, which waits for {describe(program, sync)}"
    if NO_OP in recorders:
        return "an event that no op records"
    for recorder in recorders:
        if step.end[recorder] == NEVER:
            return describe(program, recorder)
    behind = step.behind[ops[0]]
    if behind != NO_OP and step.start[behind] == NEVER and step.placed[behind] == NEVER:
        return f"{describe(program, behind)}, which is before it in a hardware queue"
    peers = (peer for op in ops for peer in step.members[step.meeting[op]])
    absent = next((peer for peer in peers if not step.reached[peer]), None)
    if absent is None:
        return "SMs, which transfers hold that wait for others"
    return f"its peer, {describe(program, absent)}"
