"""The formats that a predicted step is exported to, and what each of them cannot say."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

ExportFormat = Literal["stream-json", "torch-csv", "torchtitan", "megatron", "piper", "perfetto"]

_TORCH = (
    "streams, priorities and the order of ops inside a cell: torch runs a stage as one module"
    " (schedule.json keeps the plan's)",
    "recompute and its block: checkpoint the stages yourself",
    "overlap inside OVERLAP_F_B: torch runs F, then B, until you register a function"
    " (mhcplan.runtime.torch_overlap)",
    "receive buffers: torch up to 2.14 keeps one for every microbatch through the step, which"
    " receive_buffers=per_microbatch predicts",
)

LOSSES: Mapping[ExportFormat, tuple[str, ...]] = MappingProxyType(
    {
        "stream-json": ("nothing: it holds what was simulated, op by op",),
        "torch-csv": _TORCH,
        "torchtitan": (
            *_TORCH[:2],
            "overlap inside OVERLAP_F_B, unless mhcplan_setup.setup(schedule) is called",
            _TORCH[3],
            "the residual: torchtitan's models have no mHC",
            "module names: those of torchtitan's own models, check them against yours",
        ),
        "megatron": (
            "the schedule's order of actions: Megatron makes its own 1F1B",
            "overlapped pairs, split I and W, and V placement",
            "the priority stream: mHC recompute and post run on the normal compute stream",
            "optimizer settings, data and tokenizer",
        ),
        "piper": (
            "stream priorities, and all streams inside a stage",
            "recompute: checkpoint inside the model",
            "expert parallelism: every GPU of a stage is a replica, experts are not split",
        ),
        "perfetto": (
            "dependencies other than messages, and buffers: it is a picture, not a schedule",
        ),
    }
)
"""What each format does not say, for the person who exports."""
