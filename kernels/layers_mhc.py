"""The residual's own ops (mHC, HC, entry and exit) in the shape of :mod:`mhcplan.kernels.layers`.

Thin: the work is in :mod:`mhcplan.kernels.mhc`. T = tokens, n = expansion rate, C = hidden size,
M = n^2 + 2n coefficients. Parameters of the residual are fp32, and so are their gradients.

HC's coefficients (``HcPre``) have no Triton kernels yet: they run the eager reference and its
autograd on any device, correct but slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor

from mhcplan.kernels import mhc, reference
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
    from collections.abc import Mapping, Sequence

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


class MhcPre(Op):
    """F_pre of a site: coefficients and the sublayer's input.

    Weights (fp32): ``phi`` [M, n C], ``bias`` [M], ``alpha`` [3]. The gradients of bias and alpha
    fall out of I, so W has only phi's.
    """

    kind = "mhc_pre"

    def __init__(
        self, phi: Weight, bias: Weight, alpha: Weight,
        *, steps: int = reference.DEFAULT_SINKHORN_STEPS,
    ) -> None:  # fmt: skip
        """Bind parameters; ``steps`` is t_max of the Sinkhorn normalisation."""
        super().__init__(phi=phi, bias=bias, alpha=alpha)
        self.steps = steps

    def _parameters(self) -> Tensors:
        return tuple(w.data for w in self.weights.values())

    def forward(  # type: ignore[override]
        self, x: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensors, Tensors]:
        """x [T, n, C]: u [T, C] and coefficients [T, M]; ``out`` for u and what is saved."""
        u, mix, projection = mhc.mhc_pre_forward(x, *self._parameters(), steps=self.steps, out=out)
        return (u, mix), (x, mix, projection)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, du: Tensor, dmix: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy [T, n, C] (of the whole site), du [T, C], dmix [T, M] (mhc_post's): dx [T, n, C]."""
        x, mix, projection = saved
        dx, dp, dbias, dalpha = mhc.mhc_pre_backward_input(
            dy, x, du, mix, projection, dmix, *self._parameters(), steps=self.steps
        )
        self._add_small(dbias, dalpha)
        return (dx,), (x, dp)

    def backward_weight(self, deferred: Tensors) -> None:
        """phi."""
        self.weights["phi"].main_grad.add_(mhc.mhc_pre_backward_weight(*deferred))

    def backward(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, du: Tensor, dmix: Tensor, *, out: Tensor | None = None
    ) -> Gradients:
        """I and W with one pass less over the state; ``out`` for dx."""
        x, mix, projection = saved
        dx, dphi, dbias, dalpha = mhc.mhc_pre_backward(
            dy, x, du, mix, projection, dmix, *self._parameters(), steps=self.steps, out=out
        )
        self.weights["phi"].main_grad.add_(dphi)
        self._add_small(dbias, dalpha)
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

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> MhcPre:
        """An op of the vocabulary's shape; phi Xavier-like, b zero, alpha 0.01 (table 5)."""
        n, hidden = shape["n"], shape["hidden"]
        m = n * n + 2 * n
        bias = _fp32(env, m, std=0.1, salt=2)
        alpha = _fp32(env, 3, std=0.01, salt=3)
        phi = _fp32(env, m, n * hidden, std=(n * hidden) ** -0.5, salt=1)
        return cls(phi, bias, alpha, steps=shape["steps"])

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """A random state."""
        return (_state(shape, env),)


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


class HcPre(Op):
    """HC's first half of a site: coefficients (eq. 5) and the sublayer's input.

    Weights (fp32): ``theta`` [n + 2, C], ``bias`` [M], ``alpha`` [3]. Eager: see the module.
    """

    kind = "hc_pre"

    def __init__(self, theta: Weight, bias: Weight, alpha: Weight) -> None:
        """Bind parameters."""
        super().__init__(theta=theta, bias=bias, alpha=alpha)

    def forward(  # type: ignore[override]
        self, x: Tensor, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensors, Tensors]:
        """x [T, n, C]: u [T, C] and coefficients [T, M]; ``out`` for both."""
        theta, bias, alpha = (w.data for w in self.weights.values())
        made = reference.hc_pre(x, theta, bias, alpha)
        u, mix = mhc.placed(made, out)
        return (u, mix), (x, mix)

    def _gradients(self, x: Tensor, grads: Tensors) -> Tensors:
        """Gradients of x and of the parameters, by autograd of the reference."""
        with torch.enable_grad():
            parameters = (w.data for w in self.weights.values())
            leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
            state, theta, bias, alpha = leaves
            return torch.autograd.grad(reference.hc_pre(state, theta, bias, alpha), leaves, grads)

    def backward_input(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, du: Tensor, dmix: Tensor
    ) -> tuple[Gradients, Tensors]:
        """dy [T, n, C] (of the whole site), du [T, C], dmix [T, M] (hc_post's): dx [T, n, C]."""
        x, mix = saved
        n = x.shape[1]
        # the first n columns of dmix are not written; du brings H_pre's gradient
        dmix = torch.cat([torch.zeros_like(dmix[:, :n]), dmix[:, n:]], 1)
        dx = self._gradients(x, (du, dmix))[0]
        res = reference.Coefficients.split(mix, n).res
        dx = dx + torch.einsum("toi,toc->tic", res, dy.to(res.dtype)).to(x.dtype)
        return (dx,), (x, du, dmix)

    def backward(  # type: ignore[override]
        self, saved: Tensors, dy: Tensor, du: Tensor, dmix: Tensor, *, out: Tensor | None = None
    ) -> Gradients:
        """I, then W; ``out`` for dx."""
        (dx,), deferred = self.backward_input(saved, dy, du, dmix)
        self.backward_weight(deferred)
        return (dx if out is None or dx is None else out.copy_(dx),)

    def backward_weight(self, deferred: Tensors) -> None:
        """Every parameter."""
        x, *grads = deferred
        _, *found = self._gradients(x, tuple(grads))
        for weight, grad in zip(self.weights.values(), found, strict=True):
            weight.main_grad.add_(grad)

    def example_grads(self, inputs: Tensors, outputs: Tensors, env: Env) -> Tensors:
        """dy of the site, du, and gradients of the coefficients."""
        return random_like(inputs[0], env, 500), *super().example_grads(inputs, outputs, env)

    @classmethod
    def build(cls, shape: Mapping[str, int], env: Env) -> HcPre:
        """An op of the vocabulary's shape with random parameters."""
        n, hidden = shape["n"], shape["hidden"]
        return cls(
            theta=_fp32(env, n + 2, hidden, std=hidden**-0.5, salt=1),
            bias=_fp32(env, n * n + 2 * n, std=0.1, salt=2),
            alpha=_fp32(env, 3, std=0.01, salt=3),
        )

    @staticmethod
    def example_inputs(shape: Mapping[str, int], env: Env) -> Tensors:
        """A random state."""
        return (_state(shape, env),)


class HcPost(MhcPost):
    """HC's second half of a site: the same sum as mHC's, with unconstrained coefficients."""

    kind = "hc_post"
