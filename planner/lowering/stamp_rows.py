"""What stands on every rank of a schedule, in host issue order: which template, for which chunks.

Only names of templates stand here, so the rows depend on the schedule, on which stages look alike
and on which of them send and release what; the numbers of a model are in the templates. So rows
are shared by all plans that differ in those numbers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.planner.schedules.catalogue import build_schedule
from mhcplan.planner.schedules.p2p import P2P, MessageTable, place_messages
from mhcplan.sim.tiling import Stamps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.planner.lowering.work import StageShape
    from mhcplan.planner.schedules.actions import Action, Message
    from mhcplan.planner.schedules.catalogue import Schedule

# What is recorded together, and numbers its labels together: ("stage", shape), ("pair", forward,
# backward), ("reduce", rank, stage) or ("optimizer", rank).
Bundle = tuple[object, ...]


class TemplateName(NamedTuple):
    """A template: an action of a stage or what belongs to it (``part``), or a bundle of one."""

    bundle: Bundle
    part: str = ""


class RowKey(NamedTuple):
    """All that decides the rows.

    Attributes:
        schedule, num_ranks, num_microbatches, p2p: as in the plan.
        shapes: of every stage.
        messages: of every stage, which messages and releases it has.
        reduces_at_end: whether gradients are reduced after all actions of a rank.
        reduced: (rank, stage) whose gradients are reduced.
    """

    schedule: str
    num_ranks: int
    num_microbatches: int
    p2p: P2P
    shapes: tuple[StageShape, ...]
    messages: tuple[frozenset[str], ...]
    reduces_at_end: bool
    reduced: frozenset[tuple[int, int]]


class Rows(NamedTuple):
    """The rows of all ranks.

    Attributes:
        names: templates, as ``stamps.template`` numbers them.
        bundles: theirs, in the order in which they are first asked for.
        stamps, cells: see :mod:`mhcplan.sim.tiling`.
    """

    names: tuple[TemplateName, ...]
    bundles: tuple[Bundle, ...]
    stamps: Stamps
    cells: tuple[str, ...]


@lru_cache(maxsize=64)
def stamp_rows(key: RowKey) -> Rows:
    """Work the rows out."""
    return _Rows(key).rows()


Chunk = tuple[int, int]  # (stage, microbatch)


class _Rows:
    def __init__(self, key: RowKey) -> None:
        self.key = key
        self.schedule = build_schedule(key.schedule, key.num_ranks, key.num_microbatches)
        self._messages = _messages(self.schedule, key.p2p)
        self._grouped = key.p2p == "grouped"
        self._release_after = 0 if self._grouped else 1  # slots between a send and its release
        self._bundles: dict[Bundle, None] = {}
        self._names: dict[TemplateName, int] = {}
        self._cells: dict[str, int] = {}
        self._stage_templates: dict[tuple[int, str], int] = {}
        self._pair_templates: dict[tuple[int, int], int] = {}
        # template, rank, stages and microbatches of slots 0 and 1, batch and cell of every stamp
        self._stamps: list[tuple[int, int, int, int, int, int, int, int]] = []
        self._batch = -1

    def rows(self) -> Rows:
        for rank in range(self.key.num_ranks):
            self._rank(rank)
        table = np.array(self._stamps, np.int64)
        columns = Stamps(
            template=table[:, 0], rank=table[:, 1], stages=table[:, 2:4],
            microbatches=table[:, 4:6], batch=table[:, 6], cell=table[:, 7],
        )  # fmt: skip
        columns = Stamps(*map(np.ascontiguousarray, columns))
        for column in columns:
            column.flags.writeable = False  # shared
        return Rows(tuple(self._names), tuple(self._bundles), columns, tuple(self._cells))

    def _rank(self, rank: int) -> None:
        row = self.schedule.actions[rank]
        parts_of = [action.parts for action in row]
        last_use = {part.stage: i for i, parts in enumerate(parts_of) for part in parts}
        for i, (action, parts) in enumerate(zip(row, parts_of, strict=True)):
            self._before(rank, i, parts_of)
            chunks = [(part.stage, part.microbatch) for part in parts]
            self._stamp(self._action(parts), rank, str(action), chunks[0], chunks[-1])
            if not self.key.reduces_at_end:
                for stage in sorted({part.stage for part in parts if last_use[part.stage] == i}):
                    self._reduce(rank, stage)
        for slot in range(len(row), len(row) + 1 + self._release_after):
            self._before(rank, slot, parts_of)
        stages = sorted(set(self.schedule.stages_of(rank)))
        if self.key.reduces_at_end:
            for stage in stages:
                self._reduce(rank, stage)
        cell = f"{stages[0]}OPTIMIZER" if len(stages) == 1 else "OPTIMIZER"
        chunks = [self._first_chunk(rank, stage) for stage in stages]
        self._stamp(self._number("optimizer", rank), rank, cell, chunks[0], chunks[-1])

    def _before(self, rank: int, slot: int, parts_of: Sequence[tuple[Action, ...]]) -> None:
        """What stands between action ``slot`` - 1 and the next: messages, waits and releases."""
        posted = self._messages[rank]
        messages = posted[slot] if slot < len(posted) else ()
        batch = -1
        if self._grouped:
            batch = self._batch = self._batch + 1
        for kind, stage, microbatch, _ in messages:
            self._message(rank, kind, stage, microbatch, batch)
        if self._grouped:
            for kind, stage, microbatch, _ in messages:
                if kind.startswith("RECV"):
                    self._message(rank, f"AWAIT{kind[4:]}", stage, microbatch)
        # Dead buffers go once what was posted after an action is done: those of chunks sent there,
        # and of the action's own chunks that are sent nowhere.
        done = slot - self._release_after
        if not 0 <= done <= len(parts_of):
            return
        for kind, stage, microbatch, _ in posted[done]:
            if kind.startswith("SEND"):
                self._message(rank, f"RELEASE_{kind[-1]}", stage, microbatch)
        for part in parts_of[done - 1] if done else ():
            letter = "F" if part.kind == "F" else "B"
            if part.kind != "W" and f"SEND_{letter}" not in self.key.messages[part.stage]:
                self._message(rank, f"RELEASE_{letter}", part.stage, part.microbatch)

    def _message(self, rank: int, what: str, stage: int, microbatch: int, batch: int = -1) -> None:
        if what in self.key.messages[stage]:
            template, chunk = self._of_stage(stage, what), (stage, microbatch)
            self._stamp(template, rank, f"{stage}{what}{microbatch}", chunk, chunk, batch)

    def _reduce(self, rank: int, stage: int) -> None:
        if (rank, stage) in self.key.reduced:
            chunk = self._first_chunk(rank, stage)
            template = self._number("reduce", rank, stage)
            self._stamp(template, rank, f"{stage}REDUCE_GRAD", chunk, chunk)

    def _stamp(
        self, template: int, rank: int, cell: str, chunk: Chunk, other: Chunk, batch: int = -1
    ) -> None:
        number = self._cells.setdefault(cell, len(self._cells))
        stamp = template, rank, chunk[0], other[0], chunk[1], other[1], batch, number
        self._stamps.append(stamp)

    def _action(self, parts: tuple[Action, ...]) -> int:
        if len(parts) == 1:
            return self._of_stage(parts[0].stage, parts[0].kind)
        forward, backward = (part.stage for part in parts)
        if (forward, backward) not in self._pair_templates:
            shapes = [self.key.shapes[stage] for stage in (forward, backward)]
            for shape in shapes:
                self._bundles.setdefault(("stage", shape))
            self._pair_templates[forward, backward] = self._number("pair", *shapes)
        return self._pair_templates[forward, backward]

    def _of_stage(self, stage: int, part: str) -> int:
        """Number of an action or a message of a stage."""
        if (stage, part) not in self._stage_templates:
            number = self._number("stage", self.key.shapes[stage], part=part)
            self._stage_templates[stage, part] = number
        return self._stage_templates[stage, part]

    def _number(self, *bundle: object, part: str = "") -> int:
        """Number of a template, in the order in which they are first asked for."""
        self._bundles.setdefault(bundle)
        return self._names.setdefault(TemplateName(bundle, part), len(self._names))

    def _first_chunk(self, rank: int, stage: int) -> Chunk:
        """The chunk of the first microbatch that a rank runs of a stage."""
        parts = (part for action in self.schedule.actions[rank] for part in action.parts)
        return stage, min(part.microbatch for part in parts if part.stage == stage)


def _messages(schedule: Schedule, p2p: P2P) -> MessageTable:
    """Where messages are posted; eager receives at least one action ahead of their need.

    A receive that is posted earlier cannot block: its flow has a stream of its own, and messages of
    a flow keep their order. For the same reason the two middle ranks of a DualPipe, which send to
    each other at once, may both post the send first.
    """
    placed = place_messages(schedule, p2p)
    if p2p == "grouped":
        return placed
    table: list[tuple[tuple[Message, ...], ...]] = []
    for row, slots in zip(schedule.actions, placed, strict=True):
        needed = {
            ("F" if part.kind == "F" else "B", part.stage, part.microbatch): i
            for i, action in enumerate(row)
            for part in action.parts
            if part.kind != "W"
        }
        moved: list[list[Message]] = [[] for _ in slots]
        for slot, messages in enumerate(slots):
            for message in messages:
                at = slot
                if message.kind.startswith("RECV"):
                    use = needed[message.kind[-1], message.stage, message.microbatch]
                    at = min(slot, max(use - 1, 0))
                moved[at].append(message)
        if schedule.num_directions > 1:
            for messages in moved:
                messages.sort(key=lambda message: message.kind.startswith("RECV"))
        table.append(tuple(map(tuple, moved)))
    return tuple(table)
