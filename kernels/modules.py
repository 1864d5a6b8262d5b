"""Residual schemes as modules with one interface, and block recompute for a training loop.

Every site wraps a sublayer (any module from ``[..., C]`` to ``[..., C]``) and maps the state of
the network ``[..., n, C]`` to the next one: :class:`MhcSite` and :class:`HcSite` (the kernels),
:class:`IdentitySite` (plain torch), :class:`PlainSite` (n = 1: x + F(x)). :class:`Expand` makes
the state from the embedding, :class:`Collapse` one vector a token from the last state.

Recompute (paper, section 4.3.2) takes three lines of a training loop:

    with recompute_block():
        for site in block:
            x = site(x)

Inside, sites keep what a block needs (its input, the sublayers' outputs, the coefficients) and let
go of what can be rebuilt (the states x_l, the inputs u_l and, where a site owns its pre-norm, the
normalised inputs); the first backward that asks for any of it rebuilds the block in one launch.
Results equal those without recompute bit by bit.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mhcplan.kernels import hc_autograd, mhc, mhc_autograd, reference
from mhcplan.kernels.checks import check_sizes
from mhcplan.kernels.reference import (
    DEFAULT_NORM_EPS,
    DEFAULT_SINKHORN_STEPS,
    num_coefficients,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Kind = Literal["mhc", "hc", "identity", "plain"]
ALPHA_INIT = 0.01  # paper, table 5

# -- block recompute -------------------------------------------------------------------------------


class _Handle(NamedTuple):
    """Stands in the graph for a tensor that the block rebuilds: which, and which view of it."""

    block: RecomputeBlock
    what: str
    site: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Known(NamedTuple):
    what: str
    site: int
    storage: StorageWeakRef
    offset: int


class RecomputeBlock:
    """The sites that share one stored input; made by :func:`recompute_block`."""

    def __init__(self) -> None:
        """Start with no site."""
        self._input: Tensor | None = None
        self._fs: list[Tensor] = []
        self._coefficients: list[Tensor] = []
        self._norms: list[nn.Module | None] = []
        self._known: dict[int, _Known] = {}
        self._rebuilt: dict[str, list[Tensor]] = {}

    @property
    def num_sites(self) -> int:
        """Sites that ran in this block (L_r)."""
        return len(self._coefficients)

    def enter_site(self, x: Tensor) -> None:
        """Note a site's input: the first is stored, later ones are rebuilt.

        Raises:
            RuntimeError: x is not the state that the site before it returned.
        """
        if self._input is None:
            self._input = x.detach()
        else:
            if x.data_ptr() != self._output:
                raise RuntimeError("the sites of a recompute block must follow each other directly")
            self.remember("x", x)

    def leave_site(
        self, f: Tensor, coefficients: Tensor, norm: nn.Module | None, y: Tensor
    ) -> None:
        """Note what is stored of a site, and its output."""
        self._fs.append(f.detach())
        self._coefficients.append(coefficients.detach())
        self._norms.append(norm)
        self._output = y.data_ptr()

    def remember(self, what: str, tensor: Tensor) -> None:
        """Let go of the running site's ``x``, ``u`` or ``h`` (normalised u) after its forward."""
        storage = tensor.untyped_storage()
        known = _Known(what, len(self._fs), StorageWeakRef(storage), int(tensor.storage_offset()))
        self._known[storage.data_ptr()] = known

    def pack(self, tensor: Tensor) -> Tensor | _Handle:
        """Replace a tensor about to be saved for backward if the block can rebuild it."""
        known = self._known.get(tensor.untyped_storage().data_ptr())
        if known is None or known.storage.expired():  # the address may have been used again
            return tensor
        offset = int(tensor.storage_offset()) - known.offset
        return _Handle(self, known.what, known.site, tensor.size(), tensor.stride(), offset)

    @staticmethod
    def unpack(saved: Tensor | _Handle) -> Tensor:
        """The tensor of :meth:`pack`, rebuilt with the whole block when the first is asked for."""
        if isinstance(saved, Tensor):
            return saved
        whole = saved.block.rebuild()[saved.what][saved.site]
        return whole.as_strided(saved.size, saved.stride, whole.storage_offset() + saved.offset)

    def rebuild(self) -> dict[str, list[Tensor]]:
        """``{"x", "u", "h"}``: states, sublayer inputs and normalised inputs of every site."""
        if not self._rebuilt:
            assert self._input is not None
            x = self._input
            flat = x.reshape(-1, *x.shape[-2:])
            channels = x.shape[-1]
            fs = [f.reshape(-1, channels) for f in self._fs[: self.num_sites - 1]]
            us, xs = mhc.mhc_recompute(flat, fs, self._coefficients)
            with torch.no_grad():
                hs = [norm(u) if norm else u for norm, u in zip(self._norms, us, strict=True)]
            self._rebuilt = {"x": [flat, *xs], "u": us, "h": hs}
        return self._rebuilt


_blocks: list[RecomputeBlock] = []


@contextlib.contextmanager
def recompute_block() -> Iterator[RecomputeBlock]:
    """Make the sites that run inside one recompute block (mHC's or HC's, directly in turn)."""
    block = RecomputeBlock()
    _blocks.append(block)
    try:
        with torch.autograd.graph.saved_tensors_hooks(block.pack, block.unpack):
            yield block
    finally:
        _blocks.pop()


# -- sites -----------------------------------------------------------------------------------------


class _KernelSite(nn.Module):
    """A site on the kernels: its first half from :meth:`pre`; recompute blocks take it."""

    def __init__(self, sublayer: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.sublayer, self.norm = sublayer, norm

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(u, coefficients, x)`` of ``[T, n, C]``; the last two are for ``site_post``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The next state ``[..., n, C]``.

        Raises:
            TypeError: x is neither bf16 nor fp32, or a parameter is not fp32.
            ValueError: x has the wrong shape, device or layout.
        """
        block = _blocks[-1] if _blocks else None
        if block is not None:
            block.enter_site(x)
        lead = x.shape[:-2]
        u, coefficients, flat = self.pre(x.reshape(-1, *x.shape[-2:]))
        if block is not None:
            block.remember("u", u)
        h = u.unflatten(0, lead) if len(lead) != 1 else u
        if self.norm is not None:
            h = self.norm(h)
            if block is not None:
                block.remember("h", h)
        f = self.sublayer(h).reshape(u.shape)
        y = mhc_autograd.site_post(flat, f, coefficients)
        if block is not None:
            block.leave_site(f, coefficients, self.norm, y)
        return y.reshape(x.shape)


class MhcSite(_KernelSite):
    """An mHC site around a sublayer (paper, equations 3, 7-9).

    Args:
        sublayer: module from ``[..., C]`` to ``[..., C]``.
        hidden_size: C, a multiple of 64.
        expansion_rate: n, one of 2, 4, 8, 16.
        norm: pre-norm of the sublayer; given here rather than inside the sublayer, its output is
            recomputed in a block too.
        sinkhorn_steps: t_max.
        norm_eps: added to the mean square of the state.

    Raises:
        ValueError: n or C is not supported.
    """

    def __init__(
        self,
        sublayer: nn.Module,
        hidden_size: int,
        expansion_rate: int = 4,
        *,
        norm: nn.Module | None = None,
        sinkhorn_steps: int = DEFAULT_SINKHORN_STEPS,
        norm_eps: float = DEFAULT_NORM_EPS,
    ) -> None:
        check_sizes(expansion_rate, hidden_size)
        super().__init__(sublayer, norm)
        m = num_coefficients(expansion_rate)
        self.sinkhorn_steps, self.norm_eps = sinkhorn_steps, norm_eps
        self.phi = nn.Parameter(torch.empty(m, expansion_rate * hidden_size))
        self.bias = nn.Parameter(torch.zeros(m))
        self.alpha = nn.Parameter(torch.full((3,), ALPHA_INIT))
        nn.init.xavier_uniform_(self.phi)

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Equations 14-19."""
        return mhc_autograd.site_pre(
            x, self.phi, self.bias, self.alpha, self.sinkhorn_steps, self.norm_eps
        )


class HcSite(_KernelSite):
    """A Hyper-Connections site (paper, equations 3 and 5): tanh, nothing constrained.

    Starts as the HC paper does: dynamic part zero, H_res = I, H_post = 1, H_pre picks the row
    ``layer_index % n``.

    Args:
        sublayer: module from ``[..., C]`` to ``[..., C]``.
        hidden_size: C, a multiple of 64.
        expansion_rate: n, one of 2, 4, 8, 16.
        layer_index: which row the sublayer reads at first.
        norm: pre-norm of the sublayer, see :class:`MhcSite`.
        norm_eps: added to the mean square of every row.

    Raises:
        ValueError: n or C is not supported.
    """

    def __init__(
        self,
        sublayer: nn.Module,
        hidden_size: int,
        expansion_rate: int = 4,
        *,
        layer_index: int = 0,
        norm: nn.Module | None = None,
        norm_eps: float = DEFAULT_NORM_EPS,
    ) -> None:
        check_sizes(expansion_rate, hidden_size)
        super().__init__(sublayer, norm)
        n = expansion_rate
        self.norm_eps = norm_eps
        self.theta = nn.Parameter(torch.zeros(n + 2, hidden_size))
        start = reference.Coefficients(
            torch.eye(n)[layer_index % n], torch.ones(n), torch.eye(n)
        ).pack()
        self.bias = nn.Parameter(start)
        self.alpha = nn.Parameter(torch.full((3,), ALPHA_INIT))

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Equation 5."""
        return hc_autograd.site_pre(x, self.theta, self.bias, self.alpha, self.norm_eps)


class IdentitySite(nn.Module):
    """An mHC site whose H_res is the identity: rows are read and written but never mixed.

    Plain torch; it keeps what autograd wants and no recompute block takes it.

    Args:
        sublayer: module from ``[..., C]`` to ``[..., C]``.
        hidden_size: C.
        expansion_rate: n.
        norm: pre-norm of the sublayer.
        norm_eps: added to the mean square of the state.
    """

    def __init__(
        self,
        sublayer: nn.Module,
        hidden_size: int,
        expansion_rate: int = 4,
        *,
        norm: nn.Module | None = None,
        norm_eps: float = DEFAULT_NORM_EPS,
    ) -> None:
        super().__init__()
        self.sublayer, self.norm = sublayer, norm
        n = expansion_rate
        self.norm_eps = norm_eps
        self.phi = nn.Parameter(torch.empty(2 * n, n * hidden_size))
        self.bias = nn.Parameter(torch.zeros(2 * n))
        self.alpha = nn.Parameter(torch.full((2,), ALPHA_INIT))
        nn.init.xavier_uniform_(self.phi)

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(u, coefficients)`` of equations 14-18 with H_res = I."""
        n = x.shape[-2]
        projection = reference.project(x, self.phi, self.norm_eps)
        gates = self.alpha.repeat_interleave(n)
        logits = projection[..., -1:] * projection[..., :-1] * gates + self.bias
        eye = torch.eye(n, dtype=logits.dtype, device=x.device).expand(*logits.shape[:-1], n, n)
        coefficients = reference.Coefficients(
            torch.sigmoid(logits[..., :n]), 2 * torch.sigmoid(logits[..., n:]), eye
        ).pack()
        return reference.pre_apply(x, coefficients), coefficients

    def forward(self, x: Tensor) -> Tensor:
        """The next state ``[..., n, C]``."""
        u, coefficients = self.pre(x)
        f = self.sublayer(u if self.norm is None else self.norm(u))
        return reference.post_res(x, f, coefficients)


class PlainSite(nn.Module):
    """The plain residual x + F(x) (paper, equation 1) on a state of one row ``[..., 1, C]``."""

    def __init__(self, sublayer: nn.Module, *, norm: nn.Module | None = None) -> None:
        """Wrap ``sublayer``, with its pre-norm if that is kept apart."""
        super().__init__()
        self.sublayer, self.norm = sublayer, norm

    def forward(self, x: Tensor) -> Tensor:
        """The next state ``[..., 1, C]``."""
        row = x.squeeze(-2)
        f = self.sublayer(row if self.norm is None else self.norm(row))
        return x + f.unsqueeze(-2)


def make_site(
    kind: Kind, sublayer: nn.Module, hidden_size: int, expansion_rate: int, *,
    norm: nn.Module | None = None, layer_index: int = 0,
) -> nn.Module:  # fmt: skip
    """A site of the given kind; n = 1 is the plain residual whatever the kind.

    Raises:
        ValueError: the kind is unknown, or n or C is not supported.
    """
    if kind == "plain" or expansion_rate == 1:
        return PlainSite(sublayer, norm=norm)
    make: dict[str, Callable[[], nn.Module]] = {
        "mhc": lambda: MhcSite(sublayer, hidden_size, expansion_rate, norm=norm),
        "hc": lambda: HcSite(
            sublayer, hidden_size, expansion_rate, norm=norm, layer_index=layer_index
        ),
        "identity": lambda: IdentitySite(sublayer, hidden_size, expansion_rate, norm=norm),
    }
    if kind not in make:
        raise ValueError(f"kind={kind!r} must be one of {sorted(make)} or 'plain'")
    return make[kind]()


# -- entry and exit --------------------------------------------------------------------------------


class Expand(nn.Module):
    """Entry: the embedding ``[..., C]`` in n rows, each scaled by a learned gate (1 at first).

    Args:
        expansion_rate: n.
    """

    def __init__(self, expansion_rate: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(expansion_rate))

    def forward(self, embedding: Tensor) -> Tensor:
        """The first state ``[..., n, C]``."""
        rows = reference.expand(embedding, self.gate.shape[0])
        return (rows * self.gate[:, None]).to(embedding.dtype)


class Collapse(nn.Module):
    """Exit: rows weighted by sigmoids learned as H_pre is, summed to ``[..., C]``.

    Args:
        hidden_size: C.
        expansion_rate: n.
        norm_eps: added to the mean square of the state.
    """

    def __init__(
        self, hidden_size: int, expansion_rate: int, norm_eps: float = DEFAULT_NORM_EPS
    ) -> None:
        super().__init__()
        n = expansion_rate
        self.norm_eps = norm_eps
        self.phi = nn.Parameter(torch.empty(n, n * hidden_size))
        self.bias = nn.Parameter(torch.zeros(n))
        self.alpha = nn.Parameter(torch.full((1,), ALPHA_INIT))
        nn.init.xavier_uniform_(self.phi)

    def forward(self, x: Tensor) -> Tensor:
        """One vector a token ``[..., C]``."""
        return reference.collapse(x, self.phi, self.bias, self.alpha, self.norm_eps)
