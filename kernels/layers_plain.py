"""The small ops of a block and of the model's ends: residual, norm, embedding, head, optimizer.

T = tokens, C = hidden size, V = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor

from mhcplan.kernels.layers_base import (
    Env,
    Gradients,
    Op,
    Tensors,
    Weight,
    add_weight_gradient,
    fused,
    linear,
    random_like,
    wide,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

NORM_EPS = 1e-20  # the mHC paper's, table 5


class Residual(Op):
    """The plain residual: x + f forward, the sum of x's two gradients backward."""

    kind = "residual"

    def forward(  # type: ignore[override]
        self, x: Tensor, f: Tensor, *, out: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """x, f [T, C]: their sum."""
        return (torch.add(x, f, out=out),), ()

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, dx_branch: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy and the gradient that came through the sublayer: gradients of x and of f (dy)."""
        return (torch.add(dy, dx_branch), dy), ()

    def example_grads(self, inputs: Tensors, outputs: Tensors, env: Env) -> Tensors:
        """The gradient of the sum, and that of the sublayer's input."""
        return random_like(outputs[0], env, 500), random_like(outputs[0], env, 501)

    @classmethod
    def build(cls, _shape: Mapping[str, int], _env: Env) -> Residual:
        """No weights, so nothing to build."""
        return cls()

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random x and f."""
        size = shape["tokens"], shape["hidden"]
        return env.normal(*size), env.normal(*size, salt=1)


class Norm(Op):
    """RMSNorm. Weight: ``weight`` [C]; its gradient is part of I, where its inputs are at hand."""

    kind = "norm"

    def __init__(self, weight: Weight, eps: float = NORM_EPS) -> None:
        """Bind the weight."""
        super().__init__(weight=weight)
        self.eps = eps

    def forward(  # type: ignore[override]
        self, x: Tensor, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensors, Tensors]:
        """x [T, C]: x / rms(x) * weight; ``out`` for it and the saved 1 / rms(x) [T]."""
        y, rstd = fused(x).rms_norm(x, self.weights["weight"].data, self.eps, out)
        return (y,), (x, rstd)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, *, out: Tensor | None = None
    ) -> tuple[Gradients, Tensors]:
        """dy [T, C]: the gradient of x; adds the weight's to its ``main_grad``."""
        x, rstd = saved
        weight = self.weights["weight"]
        dx = torch.empty_like(dy) if out is None else out
        fused(dy).rms_norm_grad(dy, x, weight.data, rstd, weight.main_grad, dx)
        return (dx,), ()

    def recompute(self, saved: Tensors, *, out: Tensor | None = None) -> Tensors:
        """The normed output again, bit for bit, from x and the saved 1 / rms(x)."""
        x, rstd = saved
        return (fused(x).rms_norm_again(x, self.weights["weight"].data, rstd, out),)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> Norm:
        """An op of the vocabulary's shape."""
        return cls(env.ones(shape["hidden"]))

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random hidden [T, C]."""
        return (env.normal(shape["tokens"], shape["hidden"]),)


class Embedding(Op):
    """Token embedding. Weight: ``table`` [V, C]. It has no input gradient: W follows F."""

    kind = "embedding"

    def __init__(self, table: Weight) -> None:
        """Bind the table."""
        super().__init__(table=table)

    def forward(self, ids: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """ids [T] int64: their rows [T, C]."""
        return (functional.embedding(ids, self.weights["table"].data),), (ids,)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor
    ) -> tuple[Gradients, Tensors]:
        """Launches nothing: hands dy [T, C] to W."""
        return (None,), (saved[0], dy)

    def backward_weight(self, deferred: Tensors) -> None:
        """Add each token's gradient to its row (not deterministic on a GPU: atomics)."""
        ids, dy = deferred
        fused(dy).add_embedding_gradient(self.weights["table"].main_grad, dy, ids)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> Embedding:
        """An op of the vocabulary's shape with a random table."""
        return cls(env.weight(shape["vocab"], shape["hidden"], salt=1))

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random token ids."""
        return (env.integers(shape["vocab"], shape["tokens"]),)


class Head(Op):
    """Logits and cross-entropy. Weight: ``weight`` [V, C].

    F computes the logits, and puts scale x their gradient in their place at once: no fp32 copy and
    no second buffer of that size ever exists. ``scale`` is what the summed loss is multiplied by
    (None: 1 / T, the mean over the microbatch).
    """

    kind = "head"

    def __init__(self, weight: Weight, scale: float | None = None) -> None:
        """Bind the matrix."""
        super().__init__(weight=weight)
        self.scale = scale

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """x [T, C], targets [T] int64: the loss of each token [T]."""
        logits = linear(x, self.weights["weight"].data)
        scale = 1.0 / x.shape[0] if self.scale is None else self.scale
        loss = fused(x).cross_entropy_(logits, targets, scale)
        return (loss,), (x, logits)

    def backward_input(self, saved: Tensors, *_grads: Tensor) -> tuple[Gradients, Tensors]:
        """The gradient of x; the loss's own gradient is ``scale``, applied in F."""
        x, dlogits = saved
        return (torch.mm(dlogits, self.weights["weight"].data), None), (x, dlogits)

    def backward_weight(self, deferred: Tensors) -> None:
        """The output matrix."""
        x, dlogits = deferred
        add_weight_gradient(self.weights["weight"].main_grad, dlogits, x)

    def example_grads(self, inputs: Tensors, outputs: Tensors, env: Env) -> Tensors:
        """None: F has already applied the loss's gradient."""
        return ()

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> Head:
        """An op of the vocabulary's shape with a random matrix."""
        return cls(env.weight(shape["vocab"], shape["hidden"], salt=1))

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random hidden and targets."""
        tokens = shape["tokens"]
        return env.normal(tokens, shape["hidden"]), env.integers(shape["vocab"], tokens, salt=1)


_SHARD_ALIGN = 64  # elements, as trainers pad flat shards


def _padded(parameters: int) -> int:
    """Elements of a shard of so many parameters: at an odd length kernels load one by one."""
    return -(-parameters // _SHARD_ALIGN) * _SHARD_ALIGN


class AdamW(Op):
    """AdamW on one flat shard: fp32 master and moments, the compute-dtype weight written back.

    Weight: ``flat`` [parameters] (its ``main_grad`` is the reduced gradient). The defaults are the
    mHC paper's (table 5). ``step`` counts itself; ``lr`` may be set before each step.
    """

    kind = "adamw"

    def __init__(
        self, flat: Weight, *, lr: float = 4e-4, betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20, decay: float = 0.1,
    ) -> None:  # fmt: skip
        """Bind a flat shard; master starts as its copy, moments as zero."""
        super().__init__(flat=flat)
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
        self.master = flat.data.to(wide(flat.data.dtype), copy=True)
        self.first, self.second = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.steps = 0

    def step(self) -> None:
        """One step; reads the gradient, changes master, moments and weight."""
        self.steps += 1
        flat = self.weights["flat"]
        fused(flat.data).adamw_(
            flat.data, self.master, flat.main_grad, self.first, self.second,
            self.lr, *self.betas, self.eps, self.decay, self.steps,
        )  # fmt: skip

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> AdamW:
        """A shard of random parameters with random gradients."""
        op = cls(Weight(env.normal(_padded(shape["parameters"]), std=0.02)))
        op.weights["flat"].main_grad.normal_()
        return op

    @staticmethod
    def example_inputs(_shape: Mapping[str, int], _env: Env) -> Tensors:
        """None: the op works on its own buffers."""
        return ()


class ZeroGradients(Op):
    """Set a flat fp32 gradient to zero. Weight: ``flat`` [parameters]."""

    kind = "zero_gradients"

    def __init__(self, flat: Weight) -> None:
        """Bind a flat shard."""
        super().__init__(flat=flat)

    def step(self) -> None:
        """Zero the gradient."""
        self.weights["flat"].main_grad.zero_()

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> ZeroGradients:
        """A shard of parameters with random gradients."""
        size = _padded(shape["parameters"])
        op = cls(Weight(torch.empty(size, dtype=env.dtype, device=env.device)))
        op.weights["flat"].main_grad.normal_()
        return op

    @staticmethod
    def example_inputs(_shape: Mapping[str, int], _env: Env) -> Tensors:
        """None: the op works on its own buffers."""
        return ()
