"""A plan's schedule as CSV files for ``torch.distributed.pipelining`` (2.10 to 2.14).

torch reads two tables, a row per rank: ``compute_only.csv`` (it adds the communication itself) and
``compute_comms.csv`` (all of it is there). A cell can say no more than stage, letter and
microbatch; all else is in ``schedule.json`` beside them, keyed by (rank, index of the cell).

What torch's runtime needs and does not check is put right here: one REDUCE_GRAD a stage (without
it gradients are M times too large), sends and receives of a pair of ranks in one order at both
ends, forwards of the last stage in ascending order (losses are looked up by microbatch), and B in
place of I and W where a stage recomputes: torch's split backward under a checkpoint recomputes once
in I and once for *each parameter group* in W.

DualPipe keeps a stage on two ranks, which torch's tables cannot say. It becomes a V of 2P stages
(direction 0: stage s on rank s; direction 1: stage P+s on rank P-1-s) with M/2 microbatches each,
and as torch would wait for stage P-1 before it runs stage P, only ``compute_comms.csv`` is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from mhcplan.planner.lowering.recompute import recomputes
from mhcplan.planner.plan.spec import schedule_of
from mhcplan.planner.schedules.actions import Action, Message
from mhcplan.planner.schedules.p2p import place_messages
from mhcplan.planner.schedules.table import Schedule
from mhcplan.profiles.specs import Spec

if TYPE_CHECKING:
    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.sim.program import Program
    from mhcplan.sim.timeline import Timeline

TORCH_FORMAT = "mhcplan.torch_csv"
TORCH_VERSION = 1
COMPUTE_ONLY, COMPUTE_COMMS, SIDECAR = "compute_only.csv", "compute_comms.csv", "schedule.json"

Rows = tuple[tuple[str, ...], ...]


class CellMark(Spec):
    """What a compute cell of the tables cannot say."""

    rank: NonNegativeInt
    index: Annotated[NonNegativeInt, Field(description="of the cell in its row, from 0")]
    cell: Annotated[str, Field(description="the cell itself, as a check")]
    planned: Annotated[str, Field(description="the plan's action: I where a B is exported for it")]
    recompute: Annotated[bool, Field(description="a backward in it recomputes mHC blocks")]
    streams: Annotated[
        tuple[str, ...], Field(description="streams that the planned action runs ops on")
    ]
    start_ns: Annotated[NonNegativeInt, Field(description="predicted start of the planned action")]
    end_ns: Annotated[NonNegativeInt, Field(description="predicted end of the planned action")]


class StreamMark(Spec):
    """A stream that every rank has; lower priorities are more urgent, as in torch."""

    name: str
    priority: int


class TorchStage(Spec):
    """A stage as torch counts it."""

    stage: Annotated[NonNegativeInt, Field(description="torch's stage index")]
    rank: NonNegativeInt
    model_stage: Annotated[NonNegativeInt, Field(description="stage of the plan, in depth order")]
    direction: Annotated[int, Field(ge=0, le=1, description="of DualPipe, else 0")]
    blocks: Annotated[tuple[int, ...], Field(description="transformer blocks, counted from 0")]


class TorchSidecar(Spec):
    """``schedule.json``: what belongs to the CSV files and does not go into them."""

    format: Literal["mhcplan.torch_csv"] = TORCH_FORMAT
    format_version: Literal[1] = TORCH_VERSION
    plan_digest: str
    schedule: str
    num_ranks: PositiveInt
    num_stages: Annotated[PositiveInt, Field(description="as torch counts: 2P for dualpipe")]
    num_microbatches: Annotated[PositiveInt, Field(description="torch's n_microbatches")]
    directions: Annotated[int, Field(ge=1, le=2)]
    stages: tuple[TorchStage, ...]
    recompute_block: Annotated[
        PositiveInt | None, Field(description="L_r in sites; null: nothing is recomputed")
    ]
    streams: tuple[StreamMark, ...]
    marks: Annotated[
        dict[str, tuple[CellMark, ...]], Field(description="by file: its compute cells")
    ]
    losses: Annotated[tuple[str, ...], Field(description="what these files do not say")]


class _Cell(NamedTuple):
    """A cell and the plan's action behind it; None for communication."""

    text: str
    planned: Action | None = None


def exported_schedule(schedule: Schedule, *, recomputes: bool) -> Schedule:
    """The schedule as torch should run it: B at the place of I, and no W, if stages recompute."""
    if not recomputes:
        return schedule
    rows = tuple(
        tuple(
            Action("B", a.stage, a.microbatch) if a.kind == "I" else a for a in row if a.kind != "W"
        )
        for row in schedule.actions
    )
    return Schedule(schedule.name, schedule.num_microbatches, schedule.placement, rows.__getitem__)


def compute_only_rows(schedule: Schedule) -> Rows:
    """The table that torch lowers itself; one copy of the model only."""
    if schedule.num_directions != 1:
        raise ValueError("a stage on two ranks cannot be written as compute_only")
    return tuple(tuple(map(str, row)) for row in schedule.actions)


def compute_comms_rows(schedule: Schedule) -> Rows:
    """The table with communication: sends, receives, reduction, and FSDP's gather and release."""
    return tuple(tuple(cell.text for cell in row) for row in _comms_cells(schedule))


def torch_stages(schedule: Schedule, blocks: tuple[range, ...]) -> tuple[TorchStage, ...]:
    """Stages as torch counts them; those of direction 1 come after all of direction 0."""
    return tuple(
        TorchStage(
            stage=direction * schedule.num_stages + stage, rank=rank, model_stage=stage,
            direction=direction, blocks=tuple(blocks[stage]),
        )
        for direction, row in enumerate(schedule.placement)
        for stage, rank in enumerate(row)
    )  # fmt: skip


def csv_text(rows: Rows) -> str:
    """The file: a line a rank, no header, no blank line (torch would count it as a rank)."""
    return "".join(",".join(row) + "\n" for row in rows)


def torch_files(
    plan: PlanSpec,
    recompute_block: int | None,
    program: Program,
    timeline: Timeline,
    losses: tuple[str, ...],
    tables: tuple[str, ...] = (COMPUTE_ONLY, COMPUTE_COMMS),
) -> dict[str, str]:
    """The files by name: those of ``tables`` that can be written, and the sidecar."""
    planned = schedule_of(plan)
    again = recomputes(plan, recompute_block)
    schedule = exported_schedule(planned, recomputes=again)
    cells_of: dict[str, list[list[_Cell]]] = {}
    if COMPUTE_COMMS in tables:
        cells_of[COMPUTE_COMMS] = _comms_cells(schedule)
    if COMPUTE_ONLY in tables and schedule.num_directions == 1:
        cells_of[COMPUTE_ONLY] = [[_Cell(str(a), a) for a in row] for row in schedule.actions]
    extents = _extents(program, timeline)
    sidecar = TorchSidecar(
        plan_digest=plan.digest(),
        schedule=plan.schedule,
        num_ranks=schedule.num_ranks,
        num_stages=schedule.num_stages * schedule.num_directions,
        num_microbatches=schedule.num_microbatches // schedule.num_directions,
        directions=schedule.num_directions,
        stages=torch_stages(schedule, plan.stages),
        recompute_block=recompute_block,
        streams=_stream_marks(program),
        marks={
            name: tuple(_marks(planned, cells, extents, recomputes=again))
            for name, cells in cells_of.items()
        },
        losses=losses,
    )
    files = {
        name: csv_text(tuple(tuple(c.text for c in row) for row in cells))
        for name, cells in cells_of.items()
    }
    return files | {SIDECAR: sidecar.model_dump_json(indent=1) + "\n"}


# -- communication ---------------------------------------------------------------------------------


def _comms_cells(schedule: Schedule) -> list[list[_Cell]]:
    return [
        _comms_row(schedule, row, slots)
        for row, slots in zip(schedule.actions, place_messages(schedule), strict=True)
    ]


def _comms_row(
    schedule: Schedule, row: tuple[Action, ...], slots: tuple[tuple[Message, ...], ...]
) -> list[_Cell]:
    parts = [(k, _torch(schedule, part)) for k, action in enumerate(row) for part in action.parts]
    last_use = {part.stage: k for k, part in parts}
    # a rank holds at most two stages, fewer than torch keeps gathered: gather once, at the start
    cells = [_Cell(f"{stage}UNSHARD") for stage in dict.fromkeys(part.stage for _, part in parts)]
    cells += [_Cell(_message(schedule, m)) for m in slots[0]]
    for k, action in enumerate(row):
        cells.append(_Cell(_text(schedule, action), action))
        cells += [_Cell(_message(schedule, m)) for m in slots[k + 1]]
        for stage in sorted(stage for stage, last in last_use.items() if last == k):
            cells += [_Cell(f"{stage}REDUCE_GRAD"), _Cell(f"{stage}RESHARD")]
    return cells


def _place(schedule: Schedule, stage: int, microbatch: int) -> tuple[int, int]:
    """torch's stage and microbatch of a chunk."""
    direction = schedule.direction_of(microbatch)
    first = direction * (schedule.num_microbatches // schedule.num_directions)
    return stage + direction * schedule.num_stages, microbatch - first


def _torch(schedule: Schedule, action: Action) -> Action:
    if action.backward is not None:
        forward, backward = (_torch(schedule, part) for part in action.parts)
        return Action.overlap(forward, backward)
    return Action(action.kind, *_place(schedule, action.stage, action.microbatch))


def _text(schedule: Schedule, action: Action) -> str:
    return str(_torch(schedule, action))


def _message(schedule: Schedule, message: Message) -> str:
    stage, microbatch = _place(schedule, message.stage, message.microbatch)
    return f"{stage}{message.kind}{microbatch}"


# -- marks -----------------------------------------------------------------------------------------


class _Extent(NamedTuple):
    start_ns: int
    end_ns: int
    streams: tuple[str, ...]


def _extents(program: Program, timeline: Timeline) -> dict[tuple[int, str], _Extent]:
    """From the first start to the last end of every cell's ops, by (rank, planned cell)."""
    found: dict[tuple[int, str], tuple[int, int, set[str]]] = {}
    rows = zip(
        program.rank.tolist(), program.cell.tolist(), program.stream.tolist(),
        timeline.start_ns.tolist(), timeline.end_ns.tolist(), strict=True,
    )  # fmt: skip
    for rank, cell, stream, start, end in rows:
        key = (rank, program.cells[int(cell)])
        first, last, streams = found.get(key, (start, end, set()))
        streams.add(program.streams[int(stream)].name)
        found[key] = min(first, start), max(last, end), streams
    return {key: _Extent(a, b, tuple(sorted(names))) for key, (a, b, names) in found.items()}


def _marks(
    planned: Schedule,
    table: list[list[_Cell]],
    extents: dict[tuple[int, str], _Extent],
    *,
    recomputes: bool,
) -> list[CellMark]:
    split = {(a.stage, a.microbatch) for row in planned.actions for a in row if a.kind == "I"}
    marks: list[CellMark] = []
    for rank, row in enumerate(table):
        for index, (text, action) in enumerate(row):
            if action is None:
                continue
            was_split = action.kind == "B" and (action.stage, action.microbatch) in split
            name = f"{action.stage}I{action.microbatch}" if was_split else str(action)
            extent = extents[rank, name]
            backward = any(part.kind in "BI" for part in action.parts)
            marks.append(
                CellMark(rank=rank, index=index, cell=text, planned=name,
                         recompute=recomputes and backward, streams=extent.streams,
                         start_ns=extent.start_ns, end_ns=extent.end_ns)
            )  # fmt: skip
    return marks


def _stream_marks(program: Program) -> tuple[StreamMark, ...]:
    """Streams by name; names that hold rank numbers are a flow's and stand once each."""
    priorities = {stream.name: stream.priority for stream in program.streams}
    return tuple(StreamMark(name=name, priority=p) for name, p in sorted(priorities.items()))
