"""The mixture of experts as ops: router, regroup, experts and unpermute.

A token's k copies travel: ``Router`` puts them in expert order, dispatch (not here) takes them to
the ranks of their experts, ``Regroup`` sorts what arrives from (source rank, expert) to expert
order, ``Experts`` runs, and all the way back; ``Unpermute`` adds them up. T = tokens, C = hidden,
k = top_k, E = all experts, R = rows (token copies on this rank). Nothing here waits for the GPU:
the router's buffers have T k rows whatever it chooses, and ``forced`` routing has fixed splits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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

SCORINGS = ("sigmoid", "softmax")


def forced_splits(tokens: int, top_k: int, experts: int) -> list[int]:
    """Copies that forced routing gives each expert: T k / E, the remainder to the first ones."""
    share, rest = divmod(tokens * top_k, experts)
    return [share + (e < rest) for e in range(experts)]


def _wide_mm(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in the wide dtype: the gate's logits are too close together for bf16."""
    out = wide(x.dtype)
    if x.is_cuda and x.dtype != out:
        return torch.mm(x, weight.t(), out_dtype=out)
    return torch.mm(x.to(out), weight.t().to(out))


class Router(Op):
    """Gate, top-k and the permutation into expert order. Weight: ``gate`` [E, C].

    ``forced`` adds a large bias to the choice (not to the weights) of experts t k .. t k + k - 1
    (mod E) for token t: the same kernels run, and every expert gets its share exactly.
    """

    kind = "router"

    def __init__(
        self, gate: Weight, *, top_k: int, scoring: str = "sigmoid", renormalise: bool = True,
        forced: bool = False,
    ) -> None:  # fmt: skip
        """Bind the gate; raises ValueError for an unknown scoring or an impossible top_k."""
        super().__init__(gate=gate)
        if scoring not in SCORINGS:
            raise ValueError(f"scoring={scoring!r} must be one of {SCORINGS}")
        if not 1 <= top_k <= gate.data.shape[0]:
            raise ValueError(f"top_k={top_k} must be between 1 and {gate.data.shape[0]}")
        self.top_k, self.scoring = top_k, scoring
        self.renormalise, self.forced = renormalise, forced

    def forward(self, x: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """x [T, C]: rows [T k, C] in expert order, weights [T, k], slot [T, k], ends [E].

        slot is the row of each copy, ends the running sum of copies an expert (int32).
        """
        k = fused(x)
        logits = _wide_mm(x, self.weights["gate"].data)
        weights, expert, slot, ends = k.route(
            logits, self.top_k, self.scoring, self.renormalise, self.forced
        )
        return (k.permute(x, slot), weights, slot, ends), (x, logits, expert, slot)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, drows: Tensor, dweights: Tensor, dx_others: Tensor | None = None
    ) -> tuple[Gradients, Tensors]:
        """drows [T k, C], dweights [T, k]: the gradient of x.

        ``dx_others`` [T, C], the gradient that x got from the shared experts, is added on the way.
        """
        x, logits, expert, slot = saved
        k = fused(drows)
        dlogits = k.route_grad(
            dweights, logits, expert, self.scoring, self.renormalise, drows.dtype
        )
        dx = k.permute_grad(drows, slot, dx_others)
        torch.addmm(dx, dlogits, self.weights["gate"].data, out=dx)
        return (dx,), (x, dlogits)

    def backward_weight(self, deferred: Tensors) -> None:
        """The gate."""
        x, dlogits = deferred
        add_weight_gradient(self.weights["gate"].main_grad, dlogits, x)

    def example_grads(self, inputs: Tensors, outputs: Tensors, env: Env) -> Tensors:
        """Gradients of the rows and of the weights, and the shared experts' part."""
        return (*super().example_grads(inputs, outputs, env), random_like(inputs[0], env, 510))

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> Router:
        """An op of the vocabulary's shape with a random gate; routing is forced."""
        gate = env.weight(shape["experts"], shape["hidden"], salt=1)
        return cls(gate, top_k=shape["top_k"], forced=True)

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random normed hidden [T, C]."""
        return (env.normal(shape["tokens"], shape["hidden"]),)


class Regroup(Op):
    """Rows from (source rank, expert) order to expert order, and back."""

    kind = "regroup"

    def forward(self, rows: Tensor, index: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """rows [R, C], index [R] int32: row i of the result is rows[index[i]]."""
        return (fused(rows).gather_rows(rows, index),), (index,)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy [R, C]: the gradient of rows."""
        return (fused(dy).scatter_rows(dy, saved[0]), None), ()

    @classmethod
    def build(cls, _shape: Mapping[str, int], _env: Env) -> Regroup:
        """No weights, so nothing to build."""
        return cls()

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random rows and a transposition of (up to) 8 sources x 8 experts, as in a run of ep 8."""
        rows = shape["rows"]
        sources = experts = 8 if rows % 64 == 0 else 1
        order = torch.arange(rows, dtype=torch.int32, device=env.device)
        index = order.view(sources, experts, -1).transpose(0, 1).reshape(-1).contiguous()
        return env.normal(rows, shape["hidden"]), index


class Experts(Op):
    """SwiGLU experts as grouped GEMMs.

    Weights: ``gate_up`` [E, 2 F, C] (gate rows, then up rows) and ``down`` [E, C, F] of the E
    experts on this rank.
    """

    kind = "experts"

    def __init__(self, gate_up: Weight, down: Weight) -> None:
        """Bind weights."""
        super().__init__(gate_up=gate_up, down=down)

    def forward(self, x: Tensor, ends: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """x [R, C] in expert order, ends [E] int32 (running sum of rows an expert): [R, C]."""
        k = fused(x)
        gate_up = k.grouped_linear(x, self.weights["gate_up"].data, ends)
        y = k.grouped_linear(k.swiglu(gate_up), self.weights["down"].data, ends)
        return (y,), (x, ends, gate_up)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy [R, C]: the gradient of x."""
        x, ends, gate_up = saved
        k = fused(dy)
        da = k.grouped_linear_grad(dy, self.weights["down"].data, ends)
        dgate_up, a = k.swiglu_grad(gate_up, da)
        del da
        dx = k.grouped_linear_grad(dgate_up, self.weights["gate_up"].data, ends)
        return (dx, None), (x, ends, dgate_up, a, dy)

    def backward_weight(self, deferred: Tensors) -> None:
        """Both grouped weight gradients, added to fp32 in place."""
        x, ends, dgate_up, a, dy = deferred
        k = fused(dy)
        k.add_grouped_weight_gradient(self.weights["down"].main_grad, dy, a, ends)
        k.add_grouped_weight_gradient(self.weights["gate_up"].main_grad, dgate_up, x, ends)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> Experts:
        """An op of the vocabulary's shape with random weights."""
        experts, hidden, ffn = shape["experts"], shape["hidden"], shape["ffn"]
        return cls(
            env.weight(experts, 2 * ffn, hidden, salt=1), env.weight(experts, hidden, ffn, salt=2)
        )

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random rows, shared evenly among the experts."""
        splits = forced_splits(shape["rows"], 1, shape["experts"])
        ends = torch.tensor(splits, device=env.device).cumsum(0).int()
        return env.normal(shape["rows"], shape["hidden"]), ends


class Unpermute(Op):
    """The weighted sum of a token's expert outputs, and the shared experts' output on top."""

    kind = "unpermute"

    def forward(  # type: ignore[override]
        self,
        rows: Tensor,
        weights: Tensor,
        slot: Tensor,
        shared: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensors, Tensors]:
        """rows [T k, C] in expert order, weights and slot [T, k], shared [T, C]: [T, C]."""
        y = fused(rows).unpermute(rows, weights, slot, shared, out)
        return (y,), (rows, weights, slot)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Gradients, Tensors]:
        """dy [T, C]: gradients of rows, weights, (none of slot) and shared, which is dy itself."""
        rows, weights, slot = saved
        drows, dweights = fused(dy).unpermute_grad(dy, rows, weights, slot, out)
        return (drows, dweights, None, dy), ()

    @classmethod
    def build(cls, _shape: Mapping[str, int], _env: Env) -> Unpermute:
        """No weights, so nothing to build."""
        return cls()

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random expert outputs of a balanced routing among 8 k experts."""
        tokens, top_k = shape["tokens"], shape["top_k"]
        logits = torch.zeros(tokens, 8 * top_k, dtype=wide(env.dtype), device=env.device)
        weights, _, slot, _ = fused(logits).route(logits, top_k, "sigmoid", True, True)
        rows = env.normal(tokens * top_k, shape["hidden"])
        return rows, weights, slot, env.normal(tokens, shape["hidden"], salt=1)


class SwiGlu(Op):
    """A SwiGLU on this rank's tokens. Weights: ``gate_up`` [2 F, C], ``down`` [C, F]."""

    def __init__(self, gate_up: Weight, down: Weight) -> None:
        """Bind weights."""
        super().__init__(gate_up=gate_up, down=down)

    def forward(self, x: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """x [T, C]: [T, C]."""
        gate_up = linear(x, self.weights["gate_up"].data)
        y = linear(fused(x).swiglu(gate_up), self.weights["down"].data)
        return (y,), (x, gate_up)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy [T, C]: the gradient of x."""
        x, gate_up = saved
        da = torch.mm(dy, self.weights["down"].data)
        dgate_up, a = fused(dy).swiglu_grad(gate_up, da)
        del da
        return (torch.mm(dgate_up, self.weights["gate_up"].data),), (x, dgate_up, a, dy)

    def backward_weight(self, deferred: Tensors) -> None:
        """Both linears."""
        x, dgate_up, a, dy = deferred
        add_weight_gradient(self.weights["down"].main_grad, dy, a)
        add_weight_gradient(self.weights["gate_up"].main_grad, dgate_up, x)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> SwiGlu:
        """An op of the vocabulary's shape with random weights."""
        hidden, ffn = shape["hidden"], shape["ffn"]
        return cls(env.weight(2 * ffn, hidden, salt=1), env.weight(hidden, ffn, salt=2))

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random normed hidden [T, C]."""
        return (env.normal(shape["tokens"], shape["hidden"]),)


class DenseFfn(SwiGlu):
    """The FFN of a dense block."""

    kind = "dense_ffn"


class SharedExperts(SwiGlu):
    """The experts that see every token; several of width F are one of their summed width."""

    kind = "shared_experts"
