"""What a run needs to know beside its Program: the model, the batch and the replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mhcplan.profiles.specs import EXECUTABLE, SITES_PER_BLOCK, ModelSpec, ResidualSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhcplan.sim.program import Program

Routing = Literal["forced", "learned"]
# cuDNN's kernels keep their SMs to the end, flash-attention's CTAs are short
_BACKENDS = {"persistent": "cudnn", "preemptible": "flash"}


class RunError(ValueError):
    """A Program that this runtime cannot run as asked; the message says what it can."""


@dataclass(frozen=True)
class RunSpec:
    """The model and batch that a Program was lowered from, and how this run holds them.

    Attributes:
        model, residual: what is trained.
        tokens, seq_len: T of a microbatch on one rank, and of one of its sequences.
        ep, dp: replicas; a Program's rank stands for ``ep * dp`` processes.
        routing: ``forced`` sends every expert its equal share (nothing waits for counts);
            ``learned`` takes the gate's choice.
        dtype: of weights and activations. The residual's own parameters are at least fp32.
        attention: a GPU's backend of the scores; None is the default. CPUs have one only.
        comm_ctas: CTAs of every NCCL kernel; None leaves it to NCCL.
        compute_sms: SMs that compute streams may use; None is all.
        seed: of weights and of the order of the data.
    """

    model: ModelSpec
    residual: ResidualSpec
    tokens: int
    seq_len: int
    ep: int = 1
    dp: int = 1
    routing: Routing = "forced"
    dtype: torch.dtype = torch.bfloat16
    attention: str | None = None
    comm_ctas: int | None = None
    compute_sms: int | None = None
    seed: int = 0

    @classmethod
    def from_plan(cls, plan: Mapping[str, object], **choices: object) -> RunSpec:
        """Read a plan as its JSON has it (``PlanSpec.model_dump``, a report's ``plan``).

        Args:
            plan: the resolved plan; ``model`` holds all sizes.
            choices: fields that a plan does not have (routing, dtype, seed), or instead of it.

        Raises:
            RunError: the plan asks for what the runtime lacks.
            pydantic.ValidationError: model or residual is not valid.
        """
        for field, runnable in (("mtp", False), ("recompute_layers", "none")):
            if (asked_for := plan.get(field, runnable)) != runnable:
                raise RunError(f"{field}={asked_for}: the runtime has {field}={runnable} only")
        model = ModelSpec.model_validate(plan["model"])
        residual = ResidualSpec.model_validate(plan["residual"])
        layout = plan["layout"]
        seq_len = plan["seq_len"]
        assert isinstance(layout, dict)
        assert isinstance(seq_len, int)
        tokens = seq_len * int(plan.get("micro_batch_size", 1))  # type: ignore[call-overload]
        asked: dict[str, Any] = {name: plan.get(name) for name in ("comm_ctas", "compute_sms")}
        asked["attention"] = _BACKENDS.get(str(plan.get("attention")))
        asked |= choices
        spec = cls(
            model, residual, tokens, seq_len, ep=int(layout["ep"]), dp=int(layout["dp"]), **asked
        )
        spec.check()
        return spec

    def check(self) -> None:
        """Refuse what cannot run; raises RunError."""
        if self.residual.kind not in EXECUTABLE:
            raise RunError(
                f"residual.kind={self.residual.kind}: the runtime has {', '.join(EXECUTABLE)}"
            )
        if self.model.tied_embeddings:
            raise RunError("tied_embeddings: the runtime keeps a matrix each for both ends only")
        if self.routing == "learned" and self.ep > 1:
            raise RunError(
                "routing=learned needs ep=1: with more, split sizes are known only after a host"
                " sync that the Program does not have; take routing=forced"
            )

    @property
    def replicas(self) -> int:
        """Processes that a Program's rank stands for: ep x dp."""
        return self.ep * self.dp

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the residual state: [T, n, C], or [T, C] where it is plain."""
        if self.residual.is_plain:
            return self.tokens, self.model.hidden_size
        return self.tokens, self.residual.expansion_rate, self.model.hidden_size


def stage_blocks(program: Program) -> tuple[range, ...]:
    """Transformer blocks of every stage, read off the sites of the Program's ops.

    Raises:
        RunError: a stage has no op with a site (its Program is not at op granularity).
    """
    stages: list[range] = []
    for stage in range(int(program.stage.max()) + 1):
        sites = program.site[(program.stage == stage) & (program.site >= 0)]
        if not len(sites):
            raise RunError(f"stage {stage} has no sites: bind it as a module")
        first, last = int(sites.min()), int(sites.max())
        stages.append(range(first // SITES_PER_BLOCK, last // SITES_PER_BLOCK + 1))
    return tuple(stages)


def num_microbatches(program: Program) -> int:
    """M of the Program: microbatches of one replica."""
    return int(program.microbatch.max()) + 1


def stages_of(program: Program, rank: int) -> tuple[int, ...]:
    """Stages that a rank holds, in depth order."""
    ops = program.rank == rank
    return tuple(int(s) for s in np.unique(program.stage[ops & (program.stage >= 0)]))
