"""A plan's schedule as directives of Piper (github.com/uw-syfi/piper): a list of JSON objects.

``split`` cuts the batch into microbatches, ``place`` puts stages on GPUs, ``replicate`` reduces
gradients over a stage's copies, and ``order`` is the row of one set of GPUs. A group of two filters
in an order is unordered between two fences: our overlapped pair. Piper calls
I and W BI and BW.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mhcplan.planner.export.torch_csv import exported_schedule
from mhcplan.planner.lowering.recompute import recomputes
from mhcplan.planner.plan.spec import SpecError, schedule_of

if TYPE_CHECKING:
    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.schedules.actions import Action

DIRECTIVES = "piper.json"

_PASS = {"F": "F", "B": "B", "I": "BI", "W": "BW"}
_STREAM, _REDUCE_STREAM = "pp_stream", "dp_stream"


def piper_files(plan: PlanSpec, recompute_block: int | None) -> dict[str, str]:
    """The file of directives.

    Raises:
        SpecError: dualpipe, whose stages live on two sets of GPUs.
    """
    planned = schedule_of(plan)
    if planned.num_directions > 1:
        raise SpecError(
            f"schedule={plan.schedule} cannot be exported to piper, which places a stage once:"
            " dualpipev can"
        )
    # Piper differentiates with torch too: a split backward would recompute several times
    schedule = exported_schedule(planned, recomputes=recomputes(plan, recompute_block))
    directives: list[dict[str, object]] = []
    for stage in range(schedule.num_stages):
        filter_, gpus = {"PP": stage}, _gpus(plan, schedule.rank_of(stage, 0))
        directives.append({"op": "place", "filter": filter_, "devices": gpus, "stream": _STREAM})
        if len(gpus) > 1:
            directives.append(
                {
                    "op": "replicate",
                    "filter": filter_,
                    "devices": gpus,
                    "reduce_stream": _REDUCE_STREAM,
                }
            )
    directives.append(
        {"op": "split", "filter": {}, "dim_name": "MB", "num_microbatches": plan.microbatches}
    )
    for row in schedule.actions:
        groups = [[_filter(part) for part in action.parts] for action in row]
        directives.append({"op": "order", "filters": groups})
    lines = ",\n".join(json.dumps(directive) for directive in directives)
    return {DIRECTIVES: f"[\n{lines}\n]\n"}


def _gpus(plan: PlanSpec, rank: int) -> list[int]:
    """GPUs of a pipeline rank: ep fastest, then dp, then pp."""
    replicas = plan.layout.replicas
    return list(range(rank * replicas, (rank + 1) * replicas))


def _filter(part: Action) -> dict[str, object]:
    return {"PP": part.stage, "MB": part.microbatch, "PASS": _PASS[part.kind]}
