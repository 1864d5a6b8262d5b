"""Why a step takes as long as it does: its critical path, phase by phase, and what would help.

The critical path is the chain of ops and host waits that ends with the step, each of which let the
next one start; it has no gap, so its pieces sum to the step. A transfer on it is time that nothing
hid. Phases are those of the pipeline: *warm-up* until every rank computes, *steady* until the first
rank has done its microbatches, *drain* until all have, *update* for what is left of reduction,
optimizer and gather.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

import mhcplan
from mhcplan.planner.explain.counterfactuals import Kind, counterfactuals, device_bytes
from mhcplan.planner.report.schema import Percent
from mhcplan.profiles.specs import Spec
from mhcplan.sim.breakdown import TRAFFIC
from mhcplan.sim.timeline import critical_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from mhcplan.planner.explain.counterfactuals import Counterfactual
    from mhcplan.planner.predict import Prediction, Step
    from mhcplan.sim.program import Program
    from mhcplan.sim.timeline import PathStep, Timeline

EXPLANATION_FORMAT = "mhcplan.explanation"

PhaseName = Literal["warm-up", "steady", "drain", "update"]
END = "end"  # what the last piece of the path was waited for by: the end of the step
HOST = "host"


class PathShare(Spec):
    """A part of the critical path."""

    name: str
    time_ns: NonNegativeInt
    percent: Annotated[Percent, Field(description="of the phase, or of the step")]


class Phase(Spec):
    """A phase of the step and what the critical path does in it, longest first."""

    name: PhaseName
    begin_ns: NonNegativeInt
    end_ns: NonNegativeInt
    path: Annotated[
        tuple[PathShare, ...],
        Field(description="by class; exposed_ep, _pp, _dp: traffic that nothing hid"),
    ]


class Wait(Spec):
    """Why the path waited: pieces of it that the next piece waited for, for one reason."""

    reason: Annotated[
        str,
        Field(description="as in traces; end: the end of the step waited for the last piece"),
    ]
    count: PositiveInt
    time_ns: Annotated[NonNegativeInt, Field(description="of the pieces that were waited for")]
    percent: Annotated[Percent, Field(description="of the step")]


class WhatIf(Spec):
    """A counterfactual, simulated: the same step with one thing otherwise."""

    name: str
    kind: Annotated[
        Kind, Field(description="free, faster: the same program at other costs; plan: another plan")
    ]
    step_time_ns: NonNegativeInt
    time_percent: Annotated[
        float, Field(description="change of the time that a token takes, in percent of the plan's")
    ]
    device_memory_bytes: NonNegativeInt
    fits: bool


class Explanation(Spec):
    """Why a plan's step takes as long as it does."""

    format: Literal["mhcplan.explanation"] = EXPLANATION_FORMAT
    format_version: Literal[1] = 1
    mhcplan_version: str
    command: Annotated[str, Field(description="what to type to get this explanation again")]
    plan_digest: str
    profile_digest: str
    step_time_ns: PositiveInt
    overhead_percent: float
    device_memory_bytes: NonNegativeInt
    fits: bool
    path_pieces: Annotated[NonNegativeInt, Field(description="ops and host waits on the path")]
    rank_changes: Annotated[NonNegativeInt, Field(description="how often the path changes rank")]
    path: Annotated[tuple[PathShare, ...], Field(description="the whole path, by class")]
    slowed_ns: Annotated[
        NonNegativeInt,
        Field(
            description="what kernels on the path took longer than alone: beside traffic, or held"
            " up by more urgent kernels"
        ),
    ]
    ranks: Annotated[tuple[PathShare, ...], Field(description="the whole path, by rank")]
    ops: Annotated[tuple[PathShare, ...], Field(description="the whole path, by kind and pass")]
    phases: tuple[Phase, ...]
    waits: tuple[Wait, ...]
    what_ifs: Annotated[
        tuple[WhatIf, ...], Field(description="each simulated; what helps most is first")
    ]

    def to_json(self) -> str:
        """The explanation as one JSON object."""
        return self.model_dump_json(indent=2)


def explain(prediction: Prediction, command: str = "") -> Explanation:
    """Explain a prediction; ``command`` is what a person types to get it again.

    Simulates some twenty counterfactuals, most of which take as long as half a prediction.
    """
    step = prediction.step
    pieces = _pieces(step)
    ranks = [piece.rank for piece in pieces if piece.rank >= 0]
    return Explanation(
        mhcplan_version=mhcplan.__version__,
        command=command,
        plan_digest=prediction.plan.digest(),
        profile_digest=prediction.profile.digest,
        step_time_ns=step.timeline.step_ns,
        overhead_percent=prediction.overhead_percent,
        device_memory_bytes=device_bytes(step),
        fits=device_bytes(step) <= _limit_bytes(prediction),
        path_pieces=len(pieces),
        rank_changes=sum(a != b for a, b in pairwise(ranks)),
        path=_shares((piece.class_, piece.length_ns) for piece in pieces),
        slowed_ns=sum(piece.slowed_ns for piece in pieces),
        ranks=_shares((_rank_name(piece.rank), piece.length_ns) for piece in pieces),
        ops=_shares((piece.name, piece.length_ns) for piece in pieces),
        phases=_phases(pieces, phase_ends_ns(step.program, step.timeline)),
        waits=_waits(pieces, step.timeline.step_ns),
        what_ifs=_what_ifs(prediction),
    )


class _Piece(NamedTuple):
    """A piece of the critical path; ``rank`` -1: a host thread, which no op names.

    ``waited_by`` says why the next piece waited for this one, ``slowed_ns`` how much longer than
    alone a kernel took.
    """

    begin_ns: int
    end_ns: int
    class_: str
    name: str
    rank: int
    waited_by: str
    slowed_ns: int

    @property
    def length_ns(self) -> int:
        return self.end_ns - self.begin_ns


def _pieces(step: Step) -> list[_Piece]:
    program = step.program
    path = critical_path(step.timeline)
    waited_by = [*(piece.reason for piece in path[1:]), END]
    return [
        _Piece(
            piece.start_ns, piece.end_ns, _class(program, piece.op), _name(program, piece.op),
            int(program.rank[piece.op]) if piece.op >= 0 else -1, reason,
            _slowed_ns(step, piece),
        )
        for piece, reason in zip(path, waited_by, strict=True)
    ]  # fmt: skip


def _slowed_ns(step: Step, piece: PathStep) -> int:
    program = step.program
    if piece.op < 0 or program.group[piece.op] >= 0:
        return 0
    alone_ns = int(step.table.duration_ns[step.played.cost[piece.op]])
    return max(piece.end_ns - piece.start_ns - alone_ns, 0)


def _class(program: Program, op: int) -> str:
    """The class of the breakdown that a piece counts to."""
    if op < 0:
        return HOST
    group = int(program.group[op])
    if group < 0:
        return program.categories[int(program.category[op])]
    traffic = program.groups[group].name[:2]
    return f"exposed_{traffic}" if traffic in TRAFFIC else traffic


def _name(program: Program, op: int) -> str:
    if op < 0:
        return HOST
    return f"{program.kinds[int(program.kind[op])]} {chr(program.pass_[op])}"


def _rank_name(rank: int) -> str:
    return HOST if rank < 0 else f"rank {rank}"


def phase_ends_ns(program: Program, timeline: Timeline) -> dict[PhaseName, int]:
    """When each phase ends; a phase that there is not ends where the one before it does."""
    works = (program.microbatch >= 0) & (program.group < 0)
    works &= timeline.end_ns > timeline.start_ns
    first, last = _first_and_last(program, timeline, works)
    warm = int(first.max(initial=0))
    steady = max(warm, int(last.min(initial=timeline.step_ns)))
    drained = max(steady, int(last.max(initial=0)))
    return {"warm-up": warm, "steady": steady, "drain": drained, "update": timeline.step_ns}


def _first_and_last(
    program: Program, timeline: Timeline, ops: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per rank that has such ops: start of the first, end of the last."""
    rank = program.rank[ops]
    first = np.full(program.num_ranks, timeline.step_ns, np.int64)
    last = np.zeros(program.num_ranks, np.int64)
    np.minimum.at(first, rank, timeline.start_ns[ops])
    np.maximum.at(last, rank, timeline.end_ns[ops])
    has = np.unique(rank)
    return first[has], last[has]


def _phases(pieces: Sequence[_Piece], ends_ns: dict[PhaseName, int]) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    begin = 0
    for name, end in ends_ns.items():
        inside = (
            (piece.class_, min(piece.end_ns, end) - max(piece.begin_ns, begin)) for piece in pieces
        )
        shares = _shares((class_, ns) for class_, ns in inside if ns > 0)
        phases.append(Phase(name=name, begin_ns=begin, end_ns=end, path=shares))
        begin = end
    return tuple(phases)


def _shares(parts: Iterable[tuple[str, int]]) -> tuple[PathShare, ...]:
    """Sums by name, longest first; names without time are left out."""
    sums: Counter[str] = Counter()
    for name, ns in parts:
        sums[name] += ns
    total = max(sums.total(), 1)
    return tuple(
        PathShare(name=name, time_ns=ns, percent=100 * ns / total)
        for name, ns in sums.most_common()
        if ns
    )


def _waits(pieces: Sequence[_Piece], step_ns: int) -> tuple[Wait, ...]:
    count = Counter(piece.waited_by for piece in pieces)
    time: Counter[str] = Counter()
    for piece in pieces:
        time[piece.waited_by] += piece.length_ns
    return tuple(
        Wait(reason=reason, count=count[reason], time_ns=ns, percent=100 * ns / step_ns)
        for reason, ns in time.most_common()
    )


def _what_ifs(prediction: Prediction) -> tuple[WhatIf, ...]:
    limit = _limit_bytes(prediction)
    ns_a_token = prediction.step.timeline.step_ns / prediction.plan.tokens_per_step

    def what_if(found: Counterfactual) -> WhatIf:
        return WhatIf(
            name=found.name,
            kind=found.kind,
            step_time_ns=found.step_ns,
            time_percent=100 * (found.step_ns / found.tokens / ns_a_token - 1),
            device_memory_bytes=found.device_bytes,
            fits=found.device_bytes <= limit,
        )

    return tuple(
        sorted(map(what_if, counterfactuals(prediction)), key=lambda found: found.time_percent)
    )


def _limit_bytes(prediction: Prediction) -> int:
    return prediction.plan.memory_limit_bytes or prediction.profile.hardware.memory_bytes
