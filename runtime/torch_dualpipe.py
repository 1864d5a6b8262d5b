"""DualPipe under ``torch.distributed.pipelining``: two copies of the model in one table of stages.

torch wants every stage on one rank; DualPipe's two copies become 2P stages in a V. Stages 0 .. P-1
are the copy of direction 0 (stage s on rank s), stages P .. 2P-1 that of direction 1 (stage P+s,
the same layers as stage s, on rank P-1-s). Each direction runs M/2 microbatches::

    stages = [BidirectionalStage(module, index, 2 * P, device, input_args=..., output_args=...)
              for index in (rank, 2 * P - 1 - rank)]
    schedule = load_bidirectional(
        stages, "compute_comms.csv", n_microbatches=M // 2, loss_fn=loss_fn)
    schedule.step(*inputs, target=targets)

Rank 0 is given the inputs of direction 0 and the targets of direction 1, rank P-1 the other way
round. Example tensors of stages need ``requires_grad=True`` where a gradient flows. The two copies'
gradients are not reduced here: put ranks r and P-1-r into one data-parallel group.

The file needs torch (2.12 to 2.14) and nothing else; copy it into your trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["BidirectionalStage", "load_bidirectional"]


class BidirectionalStage(PipelineStage):
    """A stage of one of two copies: both have a first and a last stage of their own.

    torch joins stages P-1 and P by a local hand-over, as they are neighbours on one rank; they
    belong to different copies, so nothing is handed over.
    """

    @property
    def _half(self) -> int:
        return self.num_stages // 2

    @property
    def is_first(self) -> bool:
        """Whether the copy's inputs enter here."""
        return self.stage_index in (0, self._half)

    @property
    def is_last(self) -> bool:
        """Whether the copy's loss is computed here."""
        return self.stage_index in (self._half - 1, self.num_stages - 1)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:  # noqa: ANN401
        """Takes the output of the stage before, unless that is the other copy's last."""
        if not self.is_first:
            super().set_local_fwd_input(prev_stage_outputs, mb_index)

    def get_local_bwd_output(self, mb_index: int) -> Any:  # noqa: ANN401
        """The gradient for the stage before, if there is one in this copy."""
        return None if self.is_first else super().get_local_bwd_output(mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:  # noqa: ANN401
        """Takes the gradient of the stage after, unless that is the other copy's first."""
        if not self.is_last:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """W; torch asks for ``stage_index != 0`` here, where I asks for ``is_first``."""
        if self.stage_index != self._half:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            return
        self.stage_index = 0
        try:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        finally:
            self.stage_index = self._half


class _Runtime(_PipelineScheduleRuntime):
    def _warmup_p2p(self, stages: Any, has_backward: Any, done: Any) -> None:  # noqa: ANN401
        """Shapes are given, so nothing is voted on: the vote walks all stages as one chain."""
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC


def load_bidirectional(
    stages: Sequence[BidirectionalStage],
    csv: str,
    *,
    n_microbatches: int,
    loss_fn: Callable[..., Any],
    scale_grads: bool = True,
) -> _PipelineScheduleRuntime:
    """The schedule of a ``compute_comms.csv`` of dualpipe.

    Args:
        stages: the rank's two stages.
        csv: path of the file.
        n_microbatches: of one direction, M/2 of the plan.
        loss_fn: called as ``loss_fn(output, target)``.
        scale_grads: divide gradients by ``n_microbatches``.

    Raises:
        ValueError: a stage that is no :class:`BidirectionalStage`.
    """
    for stage in stages:
        if not isinstance(stage, BidirectionalStage):
            raise ValueError(f"stage {stage.stage_index} must be a BidirectionalStage")
    schedule = _Runtime(
        list(stages), n_microbatches=n_microbatches, loss_fn=loss_fn, scale_grads=scale_grads
    )
    schedule._load_csv(csv, format="compute_comms")
    return schedule
