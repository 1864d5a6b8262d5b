"""OVERLAP_F_B for ``torch.distributed.pipelining``: both halves of a pair at the same time.

torch's own runtime runs an OVERLAP_F_B cell as F, then B. To overlap, a trainer registers this::

    schedule = _PipelineScheduleRuntime(stages, n_microbatches=M, loss_fn=loss_fn)
    schedule._load_csv("compute_only.csv")
    register_overlap(schedule)

The file needs torch (2.10 to 2.14) and nothing else; copy it into your trainer.

On CUDA every stage of the rank gets a stream. Autograd runs a backward op on the stream of its
forward, so the stream of a B is chosen when its F runs: that is why F, B, I and W are registered
too. The pairs of DualPipeV and DualPipe join two *different* stages of a rank, so their halves are
on two streams. The caller's stream waits for every action at its end, so that sends (which torch
issues on it), gradient reduction and the optimizer find finished tensors; stage streams wait for
the caller's stream once, at the start of a step. The B of a pair is issued by a thread of its own,
as a host sync in the F (expert dispatch reads counts back) would hold it up. On the CPU there are
two threads and no streams.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    OVERLAP_F_B,
)

__all__ = ["OverlapRuntime", "register_overlap"]


def register_overlap(schedule: Any) -> OverlapRuntime:  # noqa: ANN401 - torch's class is private
    """Let ``schedule`` (a ``_PipelineScheduleRuntime``) run its pairs overlapped.

    Raises:
        ValueError: the schedule is not one whose actions can be replaced (torch before 2.10, or
            a schedule class without a CSV).
    """
    if not hasattr(schedule, "register_custom_function"):
        raise ValueError(f"{type(schedule).__name__} cannot run custom functions: torch >= 2.10")
    runtime = OverlapRuntime(schedule)
    for kind, run in (
        (FORWARD, runtime.single),
        (FULL_BACKWARD, runtime.single),
        (BACKWARD_INPUT, runtime.single),
        (BACKWARD_WEIGHT, runtime.single),
        (OVERLAP_F_B, runtime.pair),
    ):
        schedule.register_custom_function(kind, run)
    return runtime


class OverlapRuntime:
    """Runs a rank's compute actions, each stage on a stream of its own.

    Attributes:
        pairs: overlapped pairs run so far.
    """

    def __init__(self, schedule: Any) -> None:  # noqa: ANN401
        self.pairs = 0
        self._schedule = schedule
        self._stages = {stage.stage_index: stage for stage in schedule._stages}
        device = next(iter(self._stages.values())).device
        self._device = device if device.type == "cuda" else None
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._done: dict[int, Any] = {}  # events: what each stage has run so far
        if self._device is not None:
            self._streams = {index: torch.cuda.Stream(device) for index in self._stages}
        self._helper = ThreadPoolExecutor(1, "mhcplan-backward")
        self._step: object = None

    def single(self, action: Any, ctx: Any) -> None:  # noqa: ANN401 - called by torch
        """An F, B, I or W cell."""
        self._begin(ctx)
        with self._on(action.stage_index):
            if action.computation_type == FORWARD:
                self._forward(action, ctx)
            elif action.computation_type == BACKWARD_WEIGHT:
                self._weights(action)
            else:
                self._backward(action, self._loss(action))
        self._end(action.stage_index)

    def pair(self, action: Any, ctx: Any) -> None:  # noqa: ANN401 - called by torch
        """An OVERLAP_F_B cell: F here, B in the helper thread.

        Raises:
            ValueError: the pair is not an F and a B of two chunks.
        """
        halves = list(action.sub_actions or ())
        if [half.computation_type for half in halves] != [FORWARD, FULL_BACKWARD]:
            raise ValueError(f"{action}: only (F;B) pairs are overlapped")
        forward, backward = halves
        self._begin(ctx)
        self.pairs += 1
        # both halves use the list of losses: look up before the other half can append
        loss = self._loss(backward)
        for half in halves:
            self._schedule._assert_unsharded(self._stages[half.stage_index])
        running = self._helper.submit(self._backward_in_thread, backward, loss)
        try:
            with self._on(forward.stage_index):
                self._forward(forward, ctx)
        finally:
            running.result()  # an error of either half ends the step
        for half in halves:
            self._end(half.stage_index)

    # -- the halves, as torch's _perform_action has them

    def _forward(self, action: Any, ctx: Any) -> None:  # noqa: ANN401
        index, microbatch = action.stage_index, action.microbatch_index
        stage, schedule = self._stages[index], self._schedule
        schedule._assert_unsharded(stage)
        _wait(schedule.fwd_recv_ops.pop((index, microbatch), ()))
        self._follow(index, index - 1)
        output = stage.forward_one_chunk(
            microbatch, ctx.arg_mbs[microbatch], ctx.kwarg_mbs[microbatch]
        )
        schedule._maybe_compute_loss(stage, output, ctx.target_mbs, microbatch)
        if index + 1 in self._stages:
            self._lend(output, index + 1)
            self._stages[index + 1].set_local_fwd_input(output, microbatch)

    def _backward(self, action: Any, loss: Any) -> None:  # noqa: ANN401
        index, microbatch = action.stage_index, action.microbatch_index
        stage, schedule = self._stages[index], self._schedule
        schedule._assert_unsharded(stage)
        _wait(schedule.bwd_recv_ops.pop((index, microbatch), ()))
        self._follow(index, index + 1)
        full = action.computation_type == FULL_BACKWARD
        if full:
            schedule.backward_counter[index] += 1
        stage.backward_one_chunk(
            microbatch, loss=loss, full_backward=full, last_backward=full and self._is_last(index)
        )
        if index - 1 in self._stages and stage.has_backward:
            gradients = stage.get_local_bwd_output(microbatch)
            self._lend(gradients, index - 1)
            self._stages[index - 1].set_local_bwd_input(gradients, microbatch)

    def _weights(self, action: Any) -> None:  # noqa: ANN401
        index, stage = action.stage_index, self._stages[action.stage_index]
        self._schedule._assert_unsharded(stage)
        self._schedule.backward_counter[index] += 1
        stage.backward_weight_one_chunk(action.microbatch_index, last_backward=self._is_last(index))

    def _backward_in_thread(self, action: Any, loss: Any) -> None:  # noqa: ANN401
        device = torch.cuda.device(self._device) if self._device is not None else nullcontext()
        with device, self._on(action.stage_index):  # both are per thread
            self._backward(action, loss)

    def _loss(self, action: Any) -> Any:  # noqa: ANN401
        stage = self._stages[action.stage_index]
        if not stage.is_last:
            return None
        return self._schedule._maybe_get_loss(stage, action.microbatch_index)

    def _is_last(self, index: int) -> bool:
        return self._schedule.backward_counter[index] == self._schedule._n_microbatches

    # -- streams

    def _begin(self, ctx: Any) -> None:  # noqa: ANN401
        """At a step's first action: stage streams see the new weights and the inputs."""
        if ctx.arg_mbs is self._step:
            return
        self._step = ctx.arg_mbs  # held, so that no other step's list can have its address
        self._done.clear()
        for stream in self._streams.values():
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def _on(self, index: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[index]) if self._streams else nullcontext()

    def _follow(self, index: int, source: int) -> None:
        """A neighbour on this rank hands over without a message: wait for what it has run."""
        if self._streams and source in self._done:
            self._streams[index].wait_event(self._done[source])

    def _lend(self, tensors: Any, index: int) -> None:  # noqa: ANN401
        """Keep the allocator from reusing them while another stage's stream reads them."""
        if not self._streams:
            return
        for tensor in tensors if isinstance(tensors, (tuple, list)) else (tensors,):
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(self._streams[index])

    def _end(self, index: int) -> None:
        if self._streams:
            self._done[index] = self._streams[index].record_event()
            torch.cuda.current_stream(self._device).wait_event(self._done[index])


def _wait(works: Any) -> None:  # noqa: ANN401
    for work in works:
        work.wait()
