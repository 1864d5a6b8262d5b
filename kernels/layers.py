"""Every op of a transformer block, by the vocabulary's names, as callables with F, I and W parts.

``OPS`` maps an op kind to its class: ``OPS[kind].build(shape, env)`` makes one with random weights
(what ``mhcplan profile measure`` times), the constructors take real ones (what the runtime runs):
both run the same parts. The interface of all is :class:`Op`::

    outputs, saved = op.forward(*inputs)                      # F
    input_grads, deferred = op.backward_input(saved, *grads)  # I
    op.backward_weight(deferred)                              # W: adds to weight.main_grad
    input_grads = op.backward(saved, *grads)                  # B: I and W
    outputs = op.recompute(saved)                             # R (norm, mhc_recompute)
    op.step()                                                 # O (adamw, zero_gradients)

A pass of an op is one launch group on the current stream; none waits for the GPU.
:func:`make_case` binds random inputs to any pass of any kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhcplan.kernels.layers_attention import BACKENDS, AttentionGqa, AttentionMla
from mhcplan.kernels.layers_base import Env, Op, Tensors, Weight, storage_bytes
from mhcplan.kernels.layers_mhc import (
    Collapse,
    Expand,
    HcPost,
    HcPre,
    MhcPost,
    MhcPre,
    MhcRecompute,
)
from mhcplan.kernels.layers_moe import (
    DenseFfn,
    Experts,
    Regroup,
    Router,
    SharedExperts,
    Unpermute,
    forced_splits,
)
from mhcplan.kernels.layers_plain import AdamW, Embedding, Head, Norm, Residual, ZeroGradients

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "BACKENDS",
    "OPS",
    "AdamW",
    "AttentionGqa",
    "AttentionMla",
    "Case",
    "Collapse",
    "DenseFfn",
    "Embedding",
    "Env",
    "Expand",
    "Experts",
    "HcPost",
    "HcPre",
    "Head",
    "MhcPost",
    "MhcPre",
    "MhcRecompute",
    "Norm",
    "Op",
    "Regroup",
    "Residual",
    "Router",
    "SharedExperts",
    "Unpermute",
    "Weight",
    "ZeroGradients",
    "forced_splits",
    "make_case",
    "storage_bytes",
]

OPS: dict[str, Any] = {
    op.kind: op
    for op in (
        MhcPre, MhcPost, MhcRecompute, HcPre, HcPost, Expand, Collapse, Residual, Norm,
        AttentionMla, AttentionGqa, DenseFfn, SharedExperts, Router, Regroup, Experts, Unpermute,
        Embedding, Head, AdamW, ZeroGradients,
    )
}  # fmt: skip


@dataclass
class Case:
    """An op with one microbatch's random inputs, and what its passes left so far."""

    op: Op
    inputs: Tensors
    env: Env
    saved: Tensors = ()
    grads: Tensors = ()
    deferred: Tensors = ()

    def prepare(self, pass_: str) -> Callable[[], Any]:
        """A call that runs ``pass_`` (and may be repeated); runs F and I first where it needs them.

        Raises:
            ValueError: no such pass.
        """
        op = self.op
        if pass_ == "O":
            return op.step
        if pass_ == "F":
            return lambda: op.forward(*self.inputs)
        if not self.saved:
            outputs, self.saved = op.forward(*self.inputs)
            if pass_ != "R":
                self.grads = op.example_grads(self.inputs, outputs, self.env)
        if pass_ == "R":
            return lambda: op.recompute(self.saved)
        if pass_ == "I":
            return lambda: op.backward_input(self.saved, *self.grads)
        if pass_ == "B":
            return lambda: op.backward(self.saved, *self.grads)
        if pass_ == "W":
            self.deferred = op.backward_input(self.saved, *self.grads)[1]
            return lambda: op.backward_weight(self.deferred)
        raise ValueError(f"pass {pass_!r} must be one of F, I, W, B, R, O")


def make_case(
    kind: str, shape: Mapping[str, int], env: Env, op: Op | None = None, **options: object
) -> Case:
    """A :class:`Case` of ``kind`` at the vocabulary's ``shape``.

    Args:
        kind: name in :data:`OPS`.
        shape: the kind's axes.
        env: device, dtype and seed.
        op: an op of that shape to use again (weights are the bulk of the memory).
        options: more arguments of the kind's ``build`` (attention: ``backend``).

    Raises:
        KeyError: unknown kind, or an axis is missing.
    """
    cls = OPS[kind]
    made: Op = cls.build(shape, env, **options) if op is None else op
    return Case(made, cls.example_inputs(shape, env), env)
