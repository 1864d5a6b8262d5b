"""A training run of one process: the model of its rank, its Program, and steps on real tokens.

:class:`Session` is what all Programs of a process share (device, process groups);
:class:`Trainer` runs steps of one Program. Launching processes, and ending all of them when one
fails, is :mod:`mhcplan.runtime.launch`; timing and traces are :mod:`mhcplan.runtime.measure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mhcplan.runtime.binding import ModelBinding
from mhcplan.runtime.collectives import StageReduction
from mhcplan.runtime.data import Batches, TextBatches
from mhcplan.runtime.executor import Executor, rank_ops, streams_of
from mhcplan.runtime.groups import PART_OF_GROUP, Groups, GroupTransfers, Handle, Place
from mhcplan.runtime.model import Stage, build_stage
from mhcplan.runtime.parameters import PARTS
from mhcplan.runtime.spec import (
    RunError,
    RunSpec,
    num_microbatches,
    stage_blocks,
    stages_of,
)
from mhcplan.runtime.streams import CpuStreams, CudaStreams, StreamPool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mhcplan.runtime.executor import Observer
    from mhcplan.sim.program import Program

DEFAULT_TIMEOUT_S = 120.0


class Session:
    """What all Programs that this process runs share: process groups and CUDA streams. The default
    process group must exist."""

    def __init__(self, device: torch.device, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """``timeout_s``: when a transfer that nobody answers fails (gloo; NCCL's watchdog)."""
        self.device = device
        self.process = dist.get_rank()
        self.streams = StreamPool(device)
        self.groups = Groups(self.streams, timeout_s)


class Trainer:
    """Trains the shipped transformer by a Program, as one of its processes.

    Args:
        program: what to run, on ``num_ranks * ep * dp`` processes.
        spec: model and batch that it was lowered from.
        session: of this process.
        optimizer: options, see :func:`~mhcplan.runtime.parameters.build_parameters`.
        order, poison: see :class:`~mhcplan.runtime.executor.Executor`.

    Raises:
        RunError: Program, spec and number of processes do not go together.
    """

    binding_class = ModelBinding

    def __init__(
        self,
        program: Program,
        spec: RunSpec,
        session: Session,
        *,
        optimizer: Mapping[str, Any] | None = None,
        order: Sequence[int] | None = None,
        poison: bool = False,
    ) -> None:
        spec.check()
        self.program, self.spec, self.session = program, spec, session
        self.place = Place(session.process, spec.ep, spec.dp)
        needed = program.num_ranks * spec.replicas
        if dist.get_world_size() != needed:
            raise RunError(
                f"the Program needs {needed} processes ({program.num_ranks} ranks x ep {spec.ep}"
                f" x dp {spec.dp}), this run has {dist.get_world_size()}"
            )
        self.num_microbatches = num_microbatches(program)
        self.groups = session.groups.add(program, self.place, spec.comm_ctas)
        self.stages = self._build_stages(optimizer or {})
        self.batches = Batches(self.num_microbatches, spec.tokens, session.device)
        self.text = TextBatches(spec.model.vocab_size, spec.tokens, spec.seq_len, spec.seed)
        self.executor = self._make_executor(order, poison)

    def load(self, step: int) -> None:
        """Bring the microbatches of a step to the device."""
        first = self.place.replica * self.num_microbatches
        pairs = [self.text.microbatch(step, first + b) for b in range(self.num_microbatches)]
        self.batches.inputs.copy_(torch.stack([x for x, _ in pairs]))
        self.batches.targets.copy_(torch.stack([y for _, y in pairs]))

    def rehearse(self) -> None:
        """Compile and load every kernel, without another process; weights stay as they are."""
        self.executor.rehearse()
        for stage in self.stages.values():
            for section in stage.parameters.all_sections():
                section.rehearse()
                section.grad.zero_()
        self.batches.losses.zero_()

    def step(self, observer: Observer | None = None) -> None:
        """Train one step on what :meth:`load` brought; on a GPU it returns once it is issued."""
        self.executor.step(observer)

    def losses(self) -> dict[int, float]:
        """Mean loss of every microbatch that ended on this process. Waits for the step."""
        last = len(stage_blocks(self.program)) - 1
        mine = (self.program.rank == self.place.rank) & (self.program.stage == last)
        found = sorted({int(b) for b in self.program.microbatch[mine] if b >= 0})
        values = self.batches.losses.tolist()
        return {b: values[b] for b in found}

    # -- assembly

    def _part_groups(self) -> dict[int, tuple[str, Handle]]:
        """The reduction groups of this rank by number, with the part that each reduces."""
        found: dict[int, tuple[str, Handle]] = {}
        for number, handle in self.groups.items():
            part = PART_OF_GROUP.get(self.program.groups[number].name.partition(":")[0])
            if part is not None:
                found[number] = part, handle
        return found

    def _build_stages(self, optimizer: Mapping[str, Any]) -> dict[int, Stage]:
        shares: dict[str, tuple[int, int]] = dict.fromkeys(PARTS, (0, 1))
        for part, handle in self._part_groups().values():
            shares[part] = handle.index, len(handle.processes)
        blocks = stage_blocks(self.program)
        replicas = self.spec.replicas
        scale = 1.0 / (self.spec.tokens * self.num_microbatches * replicas)
        return {
            stage: build_stage(
                self.spec, blocks[stage], expert_index=self.place.expert_index, shares=shares,
                device=self.session.device, loss_scale=scale, optimizer=optimizer,
            )
            for stage in stages_of(self.program, self.place.rank)
        }  # fmt: skip

    def _make_executor(self, order: Sequence[int] | None, poison: bool) -> Executor:
        program, rank, device = self.program, self.place.rank, self.session.device
        ops = rank_ops(program, rank)
        parts = self._part_groups()
        reductions = {
            stage: StageReduction(module.parameters, parts) for stage, module in self.stages.items()
        }
        experts = [h for n, h in self.groups.items() if program.groups[n].name.startswith("ep:")]
        binding = self.binding_class(
            self.spec, self.stages, self.batches, reductions, experts[0] if experts else None, ops
        )
        own = [program.streams[i] for i in streams_of(program, rank)]
        events = sum(op.record >= 0 for op in ops)
        if self.spec.compute_sms and any(op.group < 0 and op.stream.priority for op in ops):
            raise RunError("compute_sms goes with priority=none: capped streams have no priority")
        streams = (
            CudaStreams(own, events, self.session.streams, self.spec.compute_sms)
            if device.type == "cuda"
            else CpuStreams(own, events)
        )
        transfers = GroupTransfers(self.groups, self.place)
        return Executor(program, rank, binding, transfers, streams, order=order, poison=poison)
