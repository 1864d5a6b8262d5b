"""A stage given as one plain ``nn.Module``, for Programs lowered at action granularity.

Such a Program has one compute op an action, kind ``module``, with these buffers in this order:

====  =========================================  ================================================
pass  reads                                      writes
====  =========================================  ================================================
F     input (none on the first stage)            output (none on the last stage), keep
B     gradient (none on the last stage), keep    gradient of the input (none on the first stage)
I     as B                                       as B, then defer
W     defer                                      none
====  =========================================  ================================================

``keep`` is the autograd graph of the action. I and W are two walks through it (the graph is kept in
between), so I + W costs more than B; a module that queues its own weight gradients should be bound
op by op instead. Gradients add up in ``parameter.grad``. The last stage's F ends in the loss.
Sends, receives, releases and waits are as in any Program; ``adamw`` and ``zero_gradients`` call
what the trainer gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhcplan.runtime.executor import Bound, TensorLayout
from mhcplan.runtime.spec import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mhcplan.runtime.executor import Attachments
    from mhcplan.sim.program import Op


@dataclass(frozen=True)
class ModuleStage:
    """A stage of the model.

    Attributes:
        module: maps the stage's input to its output; a trainer's own.
        data: first stage: the input of a microbatch.
        loss: last stage: (output, microbatch) -> scalar, already divided by the microbatches.
    """

    module: nn.Module
    data: Callable[[int], Tensor] | None = None
    loss: Callable[[Tensor, int], Tensor] | None = None


class ModuleBinding:
    """Binds the ops of an action-level Program to modules.

    Args:
        stages: by stage number, those of this rank.
        message: shape and dtype of what stages hand on.
        step: the optimizer's step; ``zero``: sets gradients to zero; None: nothing happens.
    """

    def __init__(
        self,
        stages: Mapping[int, ModuleStage],
        message: TensorLayout,
        *,
        step: Callable[[], object] | None = None,
        zero: Callable[[], object] | None = None,
    ) -> None:
        self.stages, self.losses = stages, dict[int, Tensor]()
        self._message = (message,)
        self._once = {"adamw": step, "zero_gradients": zero}

    def bind(self, op: Op, attached: Attachments) -> Bound | None:
        """The callable of an op.

        Raises:
            RunError: the Program is not at action granularity.
        """
        if op.kind in ("release", "await"):
            return None
        if op.kind in ("pp_send", "pp_recv"):
            return Bound(lambda *_: [], (self._message,))
        if op.kind in self._once:
            act = self._once[op.kind]
            return Bound(lambda *_: [] if act is None else [act()][:0])
        if op.kind != "module":
            raise RunError(
                f"op {op.index} is {op.kind}.{op.pass_}: a module runs only Programs lowered at"
                " action granularity, whose compute ops are of kind module"
            )
        stage = self.stages[op.stage]
        make = {"F": self._forward, "B": _backward, "I": _input_part, "W": _weight_part}
        return make[op.pass_](stage, op.microbatch)

    def _forward(self, stage: ModuleStage, microbatch: int) -> Bound:
        def run(inputs: list[Any], _out: list[Any]) -> Sequence[Any]:
            if stage.data is not None:
                x = stage.data(microbatch)
            else:
                x = inputs[0].detach().requires_grad_()
            with torch.enable_grad():
                y = stage.module(x)
                if stage.loss is None:
                    return [y.detach(), (x, y)]
                loss = stage.loss(y, microbatch)
            self.losses[microbatch] = loss.detach()
            return [(x, loss)]

        return Bound(run, (self._message,))


def _graph(stage: ModuleStage, inputs: list[Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(input, output, gradient of the output) of an action, from what its backward reads."""
    *gradient, (x, y) = inputs
    return x, y, gradient[0] if stage.loss is None else None


def _backward(stage: ModuleStage, _microbatch: int) -> Bound:
    def run(inputs: list[Any], _out: list[Any]) -> Sequence[Any]:
        x, y, gradient = _graph(stage, inputs)
        torch.autograd.backward(y, gradient)
        return [] if stage.data is not None else [x.grad]

    return Bound(run)


def _input_part(stage: ModuleStage, _microbatch: int) -> Bound:
    def run(inputs: list[Any], _out: list[Any]) -> Sequence[Any]:
        x, y, gradient = _graph(stage, inputs)
        if stage.data is not None:
            return [(y, gradient)]
        (dx,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        return [dx, (y, gradient)]

    return Bound(run)


def _weight_part(stage: ModuleStage, _microbatch: int) -> Bound:
    parameters = [p for p in stage.module.parameters() if p.requires_grad]

    def run(inputs: list[Any], _out: list[Any]) -> Sequence[Any]:
        y, gradient = inputs[0]
        torch.autograd.backward(y, gradient, inputs=parameters)
        return []

    return Bound(run)
