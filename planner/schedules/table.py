"""What a schedule is: a table of one row of actions per rank, and how rows are written.

A table says nothing about time; each rank runs its row in order, an action as soon as its input is
there. The schedules themselves are in :mod:`mhcplan.planner.schedules.catalogue`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mhcplan.planner.schedules.actions import Action

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Placement = tuple[tuple[int, ...], ...]
"""``placement[direction][stage]`` is the rank that holds the stage for that direction."""


class ScheduleError(ValueError):
    """A schedule that cannot be built as asked; the message is one line for the user."""


@dataclass(frozen=True)
class Schedule:
    """What every rank does in one step.

    Attributes:
        name: Key of ``SCHEDULES``.
        num_microbatches: M, of both directions together.
        placement: Rank of every stage, a row per direction (and so per copy of the model).
        write_row: Actions of a rank. They are written when first asked for: where stages are says
            whether a plan is legal, and most legal plans of a search are never lowered.
    """

    name: str
    num_microbatches: int
    placement: Placement
    write_row: Callable[[int], Sequence[Action]]

    @cached_property
    def actions(self) -> tuple[tuple[Action, ...], ...]:
        """A row of actions per rank, in the order in which the rank runs them."""
        return tuple(tuple(self.write_row(rank)) for rank in range(self.num_ranks))

    @property
    def num_ranks(self) -> int:
        """P, the ranks of one pipeline."""
        return max(self.placement[0]) + 1

    @property
    def num_stages(self) -> int:
        """Stages of the model, copies not counted."""
        return len(self.placement[0])

    @property
    def num_directions(self) -> int:
        """Directions in which microbatches travel: 2 for DualPipe, else 1."""
        return len(self.placement)

    def direction_of(self, microbatch: int) -> int:
        """Direction of a microbatch: the first M/2 of DualPipe travel in 0, the others in 1."""
        return microbatch * self.num_directions // self.num_microbatches

    def rank_of(self, stage: int, microbatch: int) -> int:
        """Rank that runs this chunk."""
        return self.placement[self.direction_of(microbatch)][stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages that the rank holds, by direction, then by depth."""
        return tuple(
            stage for row in self.placement for stage, holder in enumerate(row) if holder == rank
        )


def loop_placement(num_ranks: int, stages_per_rank: int = 1) -> Placement:
    """Stage s on rank s mod P: one way for all microbatches, ``stages_per_rank`` times around."""
    return (tuple(range(num_ranks)) * stages_per_rank,)


def v_placement(num_ranks: int) -> Placement:
    """Two stages a rank, down and back up: rank r holds stages r and 2P-1-r."""
    return (tuple(range(num_ranks)) + tuple(reversed(range(num_ranks))),)


def two_copy_placement(num_ranks: int) -> Placement:
    """Two copies of P stages in opposite directions: rank r holds stages r and P-1-r."""
    return tuple(range(num_ranks)), tuple(reversed(range(num_ranks)))


class RowWriter:
    """Writes the row of one rank; a call takes the next microbatch of its phase for that pass.

    A rank has one or two *phases*, numbered from 0: a stage together with the microbatches that
    run through it on this rank. Two stages of one model (loop and V placements) share all
    microbatches; DualPipe's two copies of the model split them into two directions.
    """

    def __init__(self, *phases: tuple[int, range]) -> None:
        """Starts an empty row of phases (stage, microbatches)."""
        self.actions: list[Action] = []
        self._stages = [stage for stage, _ in phases]
        self._forwards = [iter(microbatches) for _, microbatches in phases]
        self._backwards = [iter(microbatches) for _, microbatches in phases]
        self._queued: list[Action] = []

    def f(self, phase: int = 0) -> None:
        """F of the phase's next microbatch."""
        self.actions.append(self._forward(phase))

    def b(self, phase: int = 0) -> None:
        """B of the phase's next microbatch."""
        self.actions.append(self._backward(phase))

    def i(self, phase: int = 0) -> None:
        """I of the phase's next microbatch; its W is queued."""
        _, stage, microbatch, _ = self._backward(phase)
        self.actions.append(Action("I", stage, microbatch))
        self._queued.append(Action("W", stage, microbatch))

    def w(self, phase: int | None = None) -> None:
        """The oldest queued W, of any phase or of this one."""
        oldest = next(w for w in self._queued if phase is None or w.stage == self._stages[phase])
        self._queued.remove(oldest)
        self.actions.append(oldest)

    def drain(self, phase: int | None = None) -> None:
        """All queued W that are left, of any phase or of this one."""
        for queued in tuple(self._queued):
            if phase is None or queued.stage == self._stages[phase]:
                self.w(phase)

    def overlap(self, forward_phase: int, backward_phase: int) -> None:
        """F of one phase beside B of the other."""
        self.actions.append(
            Action.overlap(self._forward(forward_phase), self._backward(backward_phase))
        )

    def _forward(self, phase: int) -> Action:
        return Action("F", self._stages[phase], next(self._forwards[phase]))

    def _backward(self, phase: int) -> Action:
        return Action("B", self._stages[phase], next(self._backwards[phase]))


def deadlock(schedule: Schedule, waiting: list[Action]) -> ScheduleError:
    """The error of a table whose ranks stop before these actions, each waiting for another."""
    return ScheduleError(
        f"schedule={schedule.name!r} deadlocks before {', '.join(map(str, waiting))}"
    )
