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
    from collections.abc import Iterator

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


class _Stamp(NamedTuple):
    name: TemplateName
    rank: int
    cell: str
    chunks: tuple[tuple[int, int], ...]  # (stage, microbatch) of slot 0 and, for a pair, slot 1
    batch: int = -1


class _Rows:
    def __init__(self, key: RowKey) -> None:
        self.key = key
        self.schedule = build_schedule(key.schedule, key.num_ranks, key.num_microbatches)
        self._messages = _messages(self.schedule, key.p2p)
        self._grouped = key.p2p == "grouped"
        self._release_after = 0 if self._grouped else 1  # slots between a send and its release
        self._bundles: dict[Bundle, None] = {}
        self._batch = -1

    def rows(self) -> Rows:
        stamps = [stamp for rank in range(self.key.num_ranks) for stamp in self._rank(rank)]
        names, cells = dict[TemplateName, int](), dict[str, int]()
        columns = Stamps(
            template=np.array([names.setdefault(s.name, len(names)) for s in stamps], np.int64),
            rank=np.array([s.rank for s in stamps], np.int64),
            stages=np.array([_two(s.chunks, 0) for s in stamps], np.int64),
            microbatches=np.array([_two(s.chunks, 1) for s in stamps], np.int64),
            batch=np.array([s.batch for s in stamps], np.int64),
            cell=np.array([cells.setdefault(s.cell, len(cells)) for s in stamps], np.int64),
        )
        for column in columns:
            column.flags.writeable = False  # shared
        return Rows(tuple(names), tuple(self._bundles), columns, tuple(cells))

    def _rank(self, rank: int) -> Iterator[_Stamp]:
        row = self.schedule.actions[rank]
        last_use = {part.stage: i for i, action in enumerate(row) for part in action.parts}
        for i, action in enumerate(row):
            yield from self._before(rank, i)
            chunks = tuple((part.stage, part.microbatch) for part in action.parts)
            yield _Stamp(self._action(action), rank, str(action), chunks)
            if not self.key.reduces_at_end:
                for stage in sorted({p.stage for p in action.parts if last_use[p.stage] == i}):
                    yield from self._reduce(rank, stage)
        for slot in range(len(row), len(row) + 1 + self._release_after):
            yield from self._before(rank, slot)
        if self.key.reduces_at_end:
            for stage in sorted(set(self.schedule.stages_of(rank))):
                yield from self._reduce(rank, stage)
        yield self._optimizer(rank)

    def _before(self, rank: int, slot: int) -> Iterator[_Stamp]:
        """What stands between action ``slot`` - 1 and the next: messages, waits and releases."""
        messages = self._messages[rank][slot] if slot < len(self._messages[rank]) else ()
        batch = -1
        if self._grouped:
            batch = self._batch = self._batch + 1
        for kind, stage, microbatch, _ in messages:
            yield from self._message(rank, kind, stage, microbatch, batch)
        if self._grouped:
            for kind, stage, microbatch, _ in messages:
                if kind.startswith("RECV"):
                    yield from self._message(rank, f"AWAIT{kind[4:]}", stage, microbatch)
        for letter, stage, microbatch in self._released(rank, slot - self._release_after):
            yield from self._message(rank, f"RELEASE_{letter}", stage, microbatch)

    def _released(self, rank: int, slot: int) -> Iterator[tuple[str, int, int]]:
        """Chunks whose dead buffers can go once what was posted in ``slot`` is done: those sent
        there, and those of the action before it that are sent nowhere."""
        if not 0 <= slot <= len(self.schedule.actions[rank]):
            return
        for kind, stage, microbatch, _ in self._messages[rank][slot]:
            if kind.startswith("SEND"):
                yield kind[-1], stage, microbatch
        for part in self.schedule.actions[rank][slot - 1].parts if slot else ():
            letter = "F" if part.kind == "F" else "B"
            self._ask("stage", self.key.shapes[part.stage])
            sent = f"SEND_{letter}" in self.key.messages[part.stage]
            if part.kind != "W" and not sent:
                yield letter, part.stage, part.microbatch

    def _message(
        self, rank: int, what: str, stage: int, microbatch: int, batch: int = -1
    ) -> Iterator[_Stamp]:
        bundle = self._ask("stage", self.key.shapes[stage])
        if what in self.key.messages[stage]:
            name, cell = TemplateName(bundle, what), f"{stage}{what}{microbatch}"
            yield _Stamp(name, rank, cell, ((stage, microbatch),), batch)

    def _action(self, action: Action) -> TemplateName:
        shapes = [self.key.shapes[part.stage] for part in action.parts]
        bundles = [self._ask("stage", shape) for shape in shapes]
        if len(shapes) == 1:
            return TemplateName(bundles[0], action.parts[0].kind)
        return TemplateName(self._ask("pair", *shapes))

    def _ask(self, *bundle: object) -> Bundle:
        self._bundles.setdefault(bundle)
        return bundle

    def _reduce(self, rank: int, stage: int) -> Iterator[_Stamp]:
        if (rank, stage) in self.key.reduced:
            name = TemplateName(self._ask("reduce", rank, stage))
            yield _Stamp(name, rank, f"{stage}REDUCE_GRAD", self._first_chunks(rank, stage))

    def _optimizer(self, rank: int) -> _Stamp:
        stages = sorted(set(self.schedule.stages_of(rank)))
        cell = f"{stages[0]}OPTIMIZER" if len(stages) == 1 else "OPTIMIZER"
        name = TemplateName(self._ask("optimizer", rank))
        return _Stamp(name, rank, cell, self._first_chunks(rank, *stages))

    def _first_chunks(self, rank: int, *stages: int) -> tuple[tuple[int, int], ...]:
        """The chunk of the first microbatch that a rank runs of each stage."""
        parts = [part for action in self.schedule.actions[rank] for part in action.parts]
        return tuple(
            (stage, min(part.microbatch for part in parts if part.stage == stage))
            for stage in stages
        )


def _two(chunks: tuple[tuple[int, int], ...], i: int) -> tuple[int, int]:
    """Stages (``i`` 0) or microbatches (1) of both slots."""
    return chunks[0][i], chunks[-1][i]


def _messages(schedule: Schedule, p2p: P2P) -> MessageTable:
    """Where messages are posted; eager receives at least one action ahead of their need.

    A receive that is posted earlier cannot block: its flow has a stream of its own, and messages of
    a flow keep their order.
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
        table.append(tuple(map(tuple, moved)))
    return tuple(table)
