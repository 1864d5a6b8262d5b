"""Where a schedule's transfers between ranks are posted.

A row of actions says who needs what; the order in which both ends post their sends and receives is
a choice of its own, and a wrong one hangs (NCCL and gloo match the messages of a pair of ranks
first in, first out, without tags). Two ways:

* ``eager``: a send is posted right after its action, and the receive at that same point of the
  peer's row. An action waits for its own input only. Both ends are placed at once, so their order
  agrees and nothing can hang; torch's pipelining runtime lowers schedules like this.
* ``grouped``: what is posted between two actions is one batch (``batch_isend_irecv``), and the next
  action waits for all of it. DualPipe and DualPipeV place their batches as deepseek-ai/DualPipe
  does, the other schedules as in ``eager``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mhcplan.planner.schedules.actions import Action, Message, Output, input_of, output_of
from mhcplan.planner.schedules.table import deadlock

if TYPE_CHECKING:
    from mhcplan.planner.schedules.table import Schedule

P2P = Literal["eager", "grouped"]

MessageTable = tuple[tuple[tuple[Message, ...], ...], ...]
"""``table[rank][k]`` is posted right before the rank's action k, the last entry after all."""

_Slots = list[list[list[Message]]]


def place_messages(schedule: Schedule, p2p: P2P = "eager") -> MessageTable:
    """Places both ends of every transfer between two ranks.

    Raises:
        ScheduleError: The table deadlocks: no rank can run its next action.
    """
    slots: _Slots = [[[] for _ in range(len(row) + 1)] for row in schedule.actions]
    if p2p == "grouped" and schedule.name in {"dualpipe", "dualpipev"}:
        for rank, row in enumerate(schedule.actions):
            _place_like_dualpipe(schedule, rank, row, slots[rank])
    else:
        _place_eagerly(schedule, slots)
    return tuple(tuple(tuple(slot) for slot in row) for row in slots)


def _transfer(schedule: Schedule, output: Output | None) -> tuple[Message, Message] | None:
    """The send and the receive that carry an output, or None if it stays on its rank."""
    if output is None:
        return None
    of, stage, microbatch = output
    target = stage + 1 if of == "F" else stage - 1
    if not 0 <= target < schedule.num_stages:
        return None
    sender = schedule.rank_of(stage, microbatch)
    receiver = schedule.rank_of(target, microbatch)
    if sender == receiver:
        return None
    return (
        Message("SEND_F" if of == "F" else "SEND_B", stage, microbatch, receiver),
        Message("RECV_F" if of == "F" else "RECV_B", target, microbatch, sender),
    )


def _place_eagerly(schedule: Schedule, slots: _Slots) -> None:
    """Lets the ranks run their rows in turns, an action a turn, and posts as outputs appear.

    Ranks that hold the same stages of a DualPipe take their turns together, so what one of them
    posts, the other posts as well.
    """
    done: set[Output | None] = {None}
    position = [0] * schedule.num_ranks

    def is_ready(rank: int) -> bool:
        row = schedule.actions[rank]
        return position[rank] < len(row) and all(
            input_of(part, schedule.num_stages) in done for part in row[position[rank]].parts
        )

    while any(k < len(row) for k, row in zip(position, schedule.actions, strict=True)):
        before = list(position)
        for ranks in _turns(schedule):
            ready = list(filter(is_ready, ranks))
            for rank in ready:
                position[rank] += 1
            for rank in ready:
                for output in map(output_of, schedule.actions[rank][position[rank] - 1].parts):
                    done.add(output)
                    if transfer := _transfer(schedule, output):
                        send, receive = transfer
                        slots[rank][position[rank]].append(send)
                        slots[send.peer][position[send.peer]].append(receive)
        if position == before:
            rows = zip(schedule.actions, position, strict=True)
            raise deadlock(schedule, [row[k] for row, k in rows if k < len(row)])


def _turns(schedule: Schedule) -> list[tuple[int, ...]]:
    """Ranks that hold the same stages, in the order of their first."""
    ranks_of: dict[tuple[int, ...], list[int]] = {}
    for rank in range(schedule.num_ranks):
        ranks_of.setdefault(tuple(sorted(schedule.stages_of(rank))), []).append(rank)
    return list(map(tuple, ranks_of.values()))


def _place_like_dualpipe(
    schedule: Schedule, rank: int, row: tuple[Action, ...], slots: list[list[Message]]
) -> None:
    """Posts an action's sends after it and its receives before it, but for the exceptions."""
    receive_slots, send_slots = _dualpipe_exceptions(schedule, rank)
    for k, action in enumerate(row):
        for part in action.parts:
            if part.kind == "W":
                continue
            if incoming := _transfer(schedule, input_of(part, schedule.num_stages)):
                slots[receive_slots.get(part, k)].append(incoming[1])
            if outgoing := _transfer(schedule, output_of(part)):
                slots[send_slots.get(part, k + 1)].append(outgoing[0])


def _dualpipe_exceptions(
    schedule: Schedule, rank: int
) -> tuple[dict[Action, int], dict[Action, int]]:
    """Forwards whose receive is posted early, and those whose send is held back, with their slots.

    They pair the batches of neighbours, which without them would wait for each other in a ring.
    The steps are those of ``schedules._dualpipe_row``.
    """
    near = min(schedule.stages_of(rank))
    far = schedule.num_stages - 1 - near
    to_middle = schedule.num_stages // 2 - 1 - near
    first = {
        stage: next(a.microbatch for a in schedule.actions[rank] if a[:2] == ("F", stage))
        for stage in (near, far)
    }

    def forward(stage: int, count: int) -> Action:
        return Action("F", stage, first[stage] + count)

    step_2, step_3 = 2 * to_middle, 2 * to_middle + 2 * (near + 1)
    receives: dict[Action, int] = {}
    sends: dict[Action, int] = {}
    for repeat in range(near + 1):  # Step 2: with F1's receive goes that of the F0 after it.
        receives[forward(near, step_2 + repeat + 1)] = step_2 + 2 * repeat + 1
        if to_middle:  # F0's send waits for F1's.
            sends[forward(near, step_2 + repeat)] = step_2 + 2 * repeat + 2
    for repeat in range(to_middle):  # Step 3: F1's receive is posted before W1.
        receives[forward(far, near + 1 + repeat)] = step_3 + 3 * repeat + 1
    if to_middle == 0:  # Step 4 in the middle, F0 B1: the send before each leaves after it.
        sends[forward(far, near)] = step_3 + 1
        sends[forward(near, near + 1)] = step_3 + 2
    return receives, sends
