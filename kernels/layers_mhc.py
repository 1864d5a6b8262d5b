"""The residual's own ops (mHC, HC, entry and exit) in the shape of :mod:`mhcplan.kernels.layers`.

Thin: the work is in :mod:`mhcplan.kernels.mhc` and :mod:`mhcplan.kernels.hc`. T = tokens,
n = expansion rate, C = hidden size, M = n^2 + 2n coefficients. Parameters of the residual are fp32,
and so are their gradients.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from mhcplan.kernels import hc, mhc, reference
from mhcplan.kernels.layers_base import (
    Env,
    Gradients,
    Op,
    Tensors,
    Weight,
    fused,
    random_like,
    wide,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_STATES = 7  # salt of random states, apart from those of f and of gradients


def _fp32(env: Env, *shape: int, std: float, salt: int) -> Weight:
    """A random fp32 parameter of the residual."""
    x = Env(env.device, wide(env.dtype), env.seed).normal(*shape, std=std, salt=salt)
    return Weight(x)


def _state(shape: Mapping[str, int], env: Env, salt: int = _STATES) -> Tensor:
    return env.normal(shape["tokens"], shape["n"], shape["hidden"], salt=salt)


def _coefficients(shape: Mapping[str, int], env: Env, salt: int = 0) -> Tensor:
    """Coefficients of the size that a site's are: sigmoids and a row-stochastic H_res."""
    n = shape["n"]
    x = Env(env.device, wide(env.dtype), env.seed).normal(shape["tokens"], n * n + 2 * n, salt=salt)
    pre, post, res = reference.Coefficients.split(x, n)
    return reference.Coefficients(pre.sigmoid(), 2 * post.sigmoid(), res.softmax(-1)).pack()


class _PreKernels(NamedTuple):
    """The parts of a site's F_pre, as :mod:`mhcplan.kernels.mhc` has them."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward_input: Callable[..., tuple[Tensor, ...]]
    backward_weight: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


class _Pre(Op):
    """F_pre of a site: coefficients and the sublayer's input.

    Weights (fp32): the projection, ``bias`` [M], ``alpha`` [3]. The gradients of bias and alpha
    fall out of I, so W has only the projection's. A subclass says which kernels and which numbers
    they are given; what is saved is x, the coefficients and what these were made of.
    """

    _kernels: ClassVar[_PreKernels]
    _numbers: Mapping[str, int] = MappingProxyType({})

    def _parameters(self) -> Tensors:
        return tuple(w.data for w in self.weights.values())

    def forward(  # type: ignore[override]
        self, x: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensors, Tensors]:
        """x [T, n, C]: u [T, C] and coefficients [T, M]; ``out`` for u and what is saved."""
        u, mix, projection = self._kernels.forward(x, *self._parameters(), out=out, **self._numbers)
        return (u, mix), (x, mix, projection)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, du: Tensor, dmix: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy [T, n, C] (of the whole site), du [T, C], dmix [T, M] (post's): dx [T, n, C]."""
        x, mix, projection = saved
        dx, dp, *small = self._kernels.backward_input(
            dy, x, du, mix, projection, dmix, *self._parameters(), **self._numbers
        )
        self._add_small(*small)
        return (dx,), (x, dp)

    def backward_weight(self, deferred: Tensors) -> None:
        """The projection."""
        projection, *_ = self.weights.values()
        projection.main_grad.add_(self._kernels.backward_weight(*deferred))

    def backward(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, du: Tensor, dmix: Tensor, *, out: Tensor | None = None
    ) -> Gradients:
        """I and W with one pass less over the state; ``out`` for dx."""
        x, mix, projection = saved
        dx, weight_grad, *small = self._kernels.backward(
            dy, x, du, mix, projection, dmix, *self._parameters(), out=out, **self._numbers
        )
        weight, *_ = self.weights.values()
        weight.main_grad.add_(weight_grad)
        self._add_small(*small)
        return (dx,)

    def _add_small(self, dbias: Tensor, dalpha: Tensor) -> None:
        self.weights["bias"].main_grad.add_(dbias)
        self.weights["alpha"].main_grad.add_(dalpha)

    def example_grads(self, inputs: Tensors, outputs: Tensors, env: Env) -> Tensors:
        """dy of the site, du, and small gradients of the coefficients."""
        return (
            random_like(inputs[0], env, 500),
            random_like(outputs[0], env, 501),
            random_like(outputs[1], env, 502),
        )

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """A random state."""
        return (_state(shape, env),)


class MhcPre(_Pre):
    """mHC's F_pre; the projection is ``phi`` [M, n C]."""

    kind = "mhc_pre"
    _kernels = _PreKernels(
        mhc.mhc_pre_forward,
        mhc.mhc_pre_backward_input,
        mhc.mhc_pre_backward_weight,
        mhc.mhc_pre_backward,
    )

    def __init__(
        self, phi: Weight, bias: Weight, alpha: Weight,
        *, steps: int = reference.DEFAULT_SINKHORN_STEPS,
    ) -> None:  # fmt: skip
        """Bind parameters; ``steps`` is t_max of the Sinkhorn normalisation."""
        super().__init__(phi=phi, bias=bias, alpha=alpha)
        self._numbers = {"steps": steps}

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> MhcPre:
        """An op of the vocabulary's shape; phi Xavier-like, b zero, alpha 0.01 (table 5)."""
        n, hidden = shape["n"], shape["hidden"]
        m = n * n + 2 * n
        bias = _fp32(env, m, std=0.1, salt=2)
        alpha = _fp32(env, 3, std=0.01, salt=3)
        phi = _fp32(env, m, n * hidden, std=(n * hidden) ** -0.5, salt=1)
        return cls(phi, bias, alpha, steps=shape["steps"])


class HcPre(_Pre):
    """HC's F_pre (eq. 5); the projection is ``theta`` [n + 2, C], of every row alike."""

    kind = "hc_pre"
    _kernels = _PreKernels(
        hc.hc_pre_forward, hc.hc_pre_backward_input, hc.hc_pre_backward_weight, hc.hc_pre_backward
    )

    def __init__(self, theta: Weight, bias: Weight, alpha: Weight) -> None:
        """Bind parameters."""
        super().__init__(theta=theta, bias=bias, alpha=alpha)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> HcPre:
        """An op of the vocabulary's shape with random parameters."""
        n, hidden = shape["n"], shape["hidden"]
        return cls(
            theta=_fp32(env, n + 2, hidden, std=hidden**-0.5, salt=1),
            bias=_fp32(env, n * n + 2 * n, std=0.1, salt=2),
            alpha=_fp32(env, 3, std=0.01, salt=3),
        )


class MhcPost(Op):
    """F_post,res of a site."""

    kind = "mhc_post"

    def forward(  # type: ignore[override]
        self, x: Tensor, f: Tensor, mix: Tensor, *, out: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """x [T, n, C], f [T, C], coefficients [T, M]: the next state [T, n, C]."""
        return (mhc.mhc_post_forward(x, f, mix, out=out),), (x, f, mix)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Gradients, Tensors]:
        """dy [T, n, C]: None (x's gradient is mhc_pre's to write), df and dmix [T, M]."""
        df, dmix = mhc.mhc_post_backward(dy, *saved, out=out)
        return (None, df, dmix), ()

    @classmethod
    def build(cls, _shape: Mapping[str, int], _env: Env) -> MhcPost:
        """No weights, so nothing to build."""
        return cls()

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """A random state, sublayer output and coefficients."""
        f = env.normal(shape["tokens"], shape["hidden"], salt=1)
        return _state(shape, env), f, _coefficients(shape, env)


class MhcRecompute(Op):
    """R of a recompute block: its states and sublayer inputs again, in one launch."""

    kind = "mhc_recompute"

    def forward(self, *inputs: Tensor) -> tuple[Tensors, Tensors]:
        """Launches nothing: x, the sites' f and coefficients are what the block stores."""
        return (), inputs

    def recompute(self, saved: Tensors, *, out: Sequence[Tensor] | None = None) -> Tensors:
        """saved: x [T, n, C], then f [T, C] of all sites but the last, then coefficients of all.

        Returns u of every site, then the states after all sites but the last.
        """
        x, *rest = saved
        sites = (len(rest) + 1) // 2
        us, xs = mhc.mhc_recompute(x, rest[: sites - 1], rest[sites - 1 :], out=out)
        return (*us, *xs)

    @classmethod
    def build(cls, _shape: Mapping[str, int], _env: Env) -> MhcRecompute:
        """No weights, so nothing to build."""
        return cls()

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """A random stored block."""
        sites = shape["sites"]
        fs = [env.normal(shape["tokens"], shape["hidden"], salt=10 + i) for i in range(sites - 1)]
        mixes = [_coefficients(shape, env, 40 + i) for i in range(sites)]
        return (_state(shape, env), *fs, *mixes)


class Expand(Op):
    """Entry: the embedding copied to n rows."""

    kind = "mhc_expand"

    def __init__(self, n: int) -> None:
        """Bind the expansion rate."""
        super().__init__()
        self.n = n

    def forward(self, h: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """h [T, C]: [T, n, C]."""
        return (fused(h).expand_rows(h, self.n),), ()

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dx: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dx [T, n, C]: the sum of its rows [T, C]."""
        return (fused(dx).sum_rows(dx),), ()

    @classmethod
    def build(cls, shape: Mapping[str, int], _env: Env) -> Expand:
        """No weights."""
        return cls(shape["n"])

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """A random embedding."""
        return (env.normal(shape["tokens"], shape["hidden"]),)


class Collapse(Op):
    """Exit: rows weighted by learned sigmoids and summed.

    The weights are H_pre of a site (eq. 16-17), so F is a site's F_pre whose other coefficients
    are not used, and B is F_pre's, with H_res set to zero. Weights (fp32): ``phi`` [n, n C],
    ``bias`` [n], ``alpha`` [1].
    """

    kind = "mhc_collapse"

    def __init__(self, phi: Weight, bias: Weight, alpha: Weight) -> None:
        """Bind parameters."""
        super().__init__(phi=phi, bias=bias, alpha=alpha)

    def _padded(self) -> Tensors:
        """The parameters of a site that has zeros where the exit has nothing."""
        phi, bias, alpha = (w.data for w in self.weights.values())
        more = bias.numel() * (bias.numel() + 1)
        return (
            functional.pad(phi, (0, 0, 0, more)),
            functional.pad(bias, (0, more)),
            functional.pad(alpha, (0, 2)),
        )

    def forward(self, x: Tensor) -> tuple[Tensors, Tensors]:  # type: ignore[override]
        """x [T, n, C]: [T, C]."""
        h, mix, projection = mhc.mhc_pre_forward(x, *self._padded(), steps=1)
        mix[:, x.shape[1] :].zero_()
        return (h,), (x, mix, projection)

    def backward(  # type: ignore[override]
        self, saved: Tensors, dh: Tensor
    ) -> Gradients:
        """dh [T, C]: dx [T, n, C]; adds every parameter's gradient."""
        x, mix, projection = saved
        n = x.shape[1]
        # any finite tensor can stand for dy, which H_res = 0 multiplies: x is in the cache anyway
        dx, *grads = mhc.mhc_pre_backward(
            x, x, dh, mix, projection, torch.zeros_like(mix), *self._padded(), steps=1
        )
        for weight, grad in zip(self.weights.values(), grads, strict=True):
            weight.main_grad.add_(grad[: 1 if grad.numel() == 3 else n])
        return (dx,)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> Collapse:
        """An op of the vocabulary's shape with random parameters."""
        n, hidden = shape["n"], shape["hidden"]
        return cls(
            phi=_fp32(env, n, n * hidden, std=(n * hidden) ** -0.5, salt=1),
            bias=_fp32(env, n, std=0.1, salt=2),
            alpha=_fp32(env, 1, std=0.01, salt=3),
        )

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """A random state."""
        return (_state(shape, env),)


class HcPost(MhcPost):
    """HC's second half of a site: the same sum as mHC's, with unconstrained coefficients."""

    kind = "hc_post"
