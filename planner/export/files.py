"""Every format that a predicted step is exported to: its files, and what it cannot say.

A format that would run something else than the plan refuses with a reason; what it merely leaves
out is in :data:`~mhcplan.planner.export.formats.LOSSES`, which the command prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mhcplan.planner.export.formats import LOSSES, ExportFormat
from mhcplan.planner.export.megatron import megatron_files
from mhcplan.planner.export.piper import piper_files
from mhcplan.planner.export.stream_json import stream_files
from mhcplan.planner.export.torch_csv import torch_files
from mhcplan.planner.export.torchtitan import torchtitan_files
from mhcplan.planner.lowering.recompute import recomputes
from mhcplan.planner.plan.spec import SpecError
from mhcplan.sim.chrome_trace import chrome_trace

if TYPE_CHECKING:
    from mhcplan.planner.predict import Prediction

TRACE_NAME = "trace.json.gz"

_MERGED = "I and W: stages recompute, so B stands for them (torch would recompute several times)"
_TWO_COPIES = (
    "compute_only.csv: a dualpipe stage is on two ranks, so there is only compute_comms.csv, for 2P"
    " stages in a V with M/2 microbatches (stage P+s is the second copy of stage s; load it with"
    " mhcplan.runtime.torch_dualpipe)"
)
_NO_HEAD = "the multi-token-prediction head: no module of it is listed"
_GROUPED = "p2p=grouped: torch posts every message by itself"


class Export(NamedTuple):
    """Files by name, and what they leave out of this plan."""

    files: dict[str, str | bytes]
    losses: tuple[str, ...]


def losses_of(prediction: Prediction, to: ExportFormat) -> tuple[str, ...]:
    """What the format leaves out of this very plan."""
    losses = list(LOSSES[to])
    schedule = prediction.plan.schedule
    splits = schedule not in ("1f1b", "interleaved-1f1b")
    again = recomputes(prediction.plan, prediction.recompute_block)
    if to in ("torch-csv", "torchtitan", "piper") and splits and again:
        losses.append(_MERGED)
    if to == "torch-csv" and schedule == "dualpipe":
        losses.append(_TWO_COPIES)
    if to == "torchtitan" and prediction.plan.mtp:
        losses.append(_NO_HEAD)
    if to in ("torch-csv", "torchtitan", "piper", "megatron") and prediction.plan.p2p == "grouped":
        losses.append(_GROUPED)
    return tuple(losses)


def export(prediction: Prediction, to: ExportFormat) -> Export:
    """Write a prediction in a format.

    Raises:
        SpecError: there is no such format, or it cannot run this plan; the message says why.
    """
    if to not in LOSSES:
        raise SpecError(f"to={to!r} must be one of {', '.join(LOSSES)}")
    losses = losses_of(prediction, to)
    return Export(_files(prediction, to, losses), losses)


def _files(
    prediction: Prediction, to: ExportFormat, losses: tuple[str, ...]
) -> dict[str, str | bytes]:
    plan, block, step = prediction.plan, prediction.recompute_block, prediction.step
    match to:
        case "stream-json":
            return dict(stream_files(prediction))
        case "torch-csv":
            return dict(torch_files(plan, block, step.program, step.timeline, losses))
        case "torchtitan":
            return dict(torchtitan_files(plan, block, step.program, step.timeline, losses))
        case "megatron":
            return dict(megatron_files(plan, block, losses))
        case "piper":
            return dict(piper_files(plan, block))
        case "perfetto":
            return {TRACE_NAME: chrome_trace(step.program, step.timeline, step.memory)}
