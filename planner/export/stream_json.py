"""A predicted step as a stream program: all that an executor or a checker needs, and its times.

``program.json`` is the Program (streams with priorities, process groups, ops in host issue order
with events, handles, buffers and recompute marks) and the plan it is of: ``mhcplan check`` proves
it sound, ``mhcplan run`` runs it. ``predicted.json`` is the same Program with the predicted times,
in the format of a measured trace, so that the two are compared op by op. Their JSON Schemas are in
``docs/schemas``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import mhcplan
from mhcplan.sim.files import Trace, program_json, trace_json

if TYPE_CHECKING:
    from mhcplan.planner.predict import Prediction

PROGRAM, PREDICTED = "program.json", "predicted.json"


def stream_files(prediction: Prediction) -> dict[str, str]:
    """Both files by name."""
    step = prediction.step
    meta: dict[str, object] = {
        "mhcplan_version": mhcplan.__version__,
        "plan": prediction.plan.model_dump(mode="json"),
        "plan_digest": prediction.plan.digest(),
        "profile_digest": prediction.profile.digest,
        "recompute_block": prediction.recompute_block,
    }
    trace = Trace(step.program, step.timeline, "predicted", meta)
    runnable = replace(step.program, meta=step.program.meta | {"plan": meta["plan"]})
    return {PROGRAM: program_json(runnable), PREDICTED: trace_json(trace)}
