"""Cases of the kinds that a capture measures: the ops that run, and what no plan runs.

Layer ops come from :mod:`mhcplan.kernels.layers`. Beside them are single matrix products in bf16
and, where torch offers it, in FP8, and experts whose rows are shared unevenly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mhcplan.kernels import layers
from mhcplan.kernels.layers import Case, Env, Experts
from mhcplan.kernels.layers_base import Op, Tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_FP8 = torch.float8_e4m3fn


class Gemm(Op):
    """[m, k] x [k, n], the second operand stored as a linear's weight is, [n, k]."""

    kind = "gemm"

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """a [m, k], b [n, k]: [m, n]."""
        return (torch.mm(a, b.t()),), ()

    @classmethod
    def build(cls, _shape: Mapping[str, int], _env: Env) -> Gemm:
        """No weights, so nothing to build."""
        return cls()

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random operands."""
        m, n, k = shape["m"], shape["n"], shape["k"]
        return env.normal(m, k), env.normal(n, k, std=k**-0.5, salt=1)


class GemmFp8(Gemm):
    """The same of e4m3 operands with one scale each; bf16 out."""

    kind = "gemm_fp8"

    def forward(self, a: Tensor, b: Tensor, one: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """a [m, k], b [n, k] in e4m3, one []: [m, n]."""
        y = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return (y,), ()

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random operands and the scale 1."""
        a, b = Gemm.example_inputs(shape, env)
        return a.to(_FP8), b.to(_FP8), torch.ones((), device=env.device)


class SkewedExperts(Experts):
    """Experts of which the first has more rows than the others."""

    kind = "experts_skewed"

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """Random rows and the running sum of :func:`skewed_splits`."""
        splits = skewed_splits(shape["rows"], shape["experts"], shape["largest"])
        ends = torch.tensor(splits, device=env.device).cumsum(0).int()
        return env.normal(shape["rows"], shape["hidden"]), ends


OPS: dict[str, type[Gemm] | type[SkewedExperts]] = {
    op.kind: op for op in (Gemm, GemmFp8, SkewedExperts)
}


def skewed_splits(rows: int, experts: int, largest: int) -> list[int]:
    """Rows of each expert where the first gets ``largest`` percent and the others share the rest.

    Raises:
        ValueError: one expert has nobody to share with, or ``largest`` is not the largest share.
    """
    first = rows * largest // 100
    if experts < 2 or not 100 // experts <= largest <= 100:
        raise ValueError(
            f"largest={largest} must be {100 // experts} .. 100, the percent of one of"
            f" {experts} experts, of 2 at least"
        )
    return [first, *layers.forced_splits(rows - first, 1, experts - 1)]


def make_case(kind: str, shape: Mapping[str, int], env: Env, op: Op | None = None) -> Case:
    """A :class:`~mhcplan.kernels.layers.Case` of ``kind`` at the vocabulary's ``shape``.

    Args:
        kind: of :data:`mhcplan.profiles.vocabulary.MEASURABLE`.
        shape: the kind's axes.
        env: device, dtype and seed.
        op: an op of that shape to use again (weights are the bulk of the memory).

    Raises:
        KeyError: unknown kind, or an axis is missing.
        ValueError: see :func:`skewed_splits`.
    """
    cls = OPS.get(kind)
    if cls is None:
        return layers.make_case(kind, shape, env, op)
    made = cls.build(shape, env) if op is None else op
    return Case(made, cls.example_inputs(shape, env), env)
