"""What every op of :mod:`mhcplan.kernels.layers` shares: parameters, linears and the op interface.

An op is cut out of the model at its borders: there is no autograd graph. ``forward`` returns the
outputs and a *saved* tuple; ``backward_input`` takes it with the gradients of the outputs and
returns the gradients of the inputs and a *deferred* tuple; ``backward_weight`` takes that and adds
to every weight's ``main_grad``. All state is in those tuples, so any number of microbatches may be
in flight and the weight part may run whenever the schedule wants it. No part ever changes a tensor
it was given, except where its docstring says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mhcplan.kernels import layers_eager

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Tensors = tuple[Tensor, ...]
Gradients = tuple["Tensor | None", ...]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and gradients of ``dtype`` parameters are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fused(x: Tensor) -> Any:  # noqa: ANN401 - a module
    """The implementation of the pointwise and routing kernels for the device that ``x`` is on.

    Triton on a GPU, plain torch on a CPU and for float64. Only here is that decided.
    """
    if x.is_cuda and x.dtype != torch.float64:
        from mhcplan.kernels import layers_triton

        return layers_triton
    return layers_eager


class Weight:
    """A parameter: ``data`` in the compute dtype, ``main_grad`` in :func:`wide`.

    The trainer may pass views of its flat buffers; by default the gradient is a fresh zero tensor.
    """

    __slots__ = ("data", "main_grad")

    def __init__(self, data: Tensor, main_grad: Tensor | None = None) -> None:
        """Take the tensors as they are; raises ValueError where they do not fit."""
        if main_grad is None:
            main_grad = torch.zeros_like(data, dtype=wide(data.dtype))
        if main_grad.shape != data.shape or main_grad.dtype != wide(data.dtype):
            raise ValueError(
                f"main_grad is {tuple(main_grad.shape)} {main_grad.dtype}, the weight needs"
                f" {tuple(data.shape)} {wide(data.dtype)}"
            )
        self.data = data
        self.main_grad = main_grad


@dataclass(frozen=True)
class Env:
    """Where and in which dtype an op is built, and the seed of its random weights and inputs."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def normal(self, *shape: int, std: float = 1.0, salt: int = 0) -> Tensor:
        """A random normal tensor; equal arguments give equal values."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1009 + salt)
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        return x.normal_(0.0, std, generator=generator)

    def integers(self, high: int, *shape: int, salt: int = 0) -> Tensor:
        """Random int64 in [0, high)."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1009 + salt)
        return torch.randint(high, shape, device=self.device, generator=generator)

    def weight(self, *shape: int, salt: int = 0) -> Weight:
        """A random weight whose last axis is the fan-in."""
        return Weight(self.normal(*shape, std=shape[-1] ** -0.5, salt=1000 + salt))

    def ones(self, size: int) -> Weight:
        """A norm weight."""
        return Weight(torch.ones(size, dtype=self.dtype, device=self.device))


class Op:
    """One op of the vocabulary bound to its weights; see the module's docstring.

    A subclass overrides the parts that its kind has; asking for another raises
    ``NotImplementedError``. ``weights`` names the parameters, in the order they are used.
    """

    kind: ClassVar[str]
    weights: Mapping[str, Weight]

    def __init__(self, **weights: Weight) -> None:
        """Bind weights by name."""
        self.weights = weights

    def forward(self, *inputs: Tensor) -> tuple[Tensors, Tensors]:
        """F: the outputs, and what backward_input needs."""
        raise NotImplementedError(f"{self.kind} has no F part")

    def backward_input(self, saved: Tensors, *grads: Tensor) -> tuple[Gradients, Tensors]:
        """I: gradients of the inputs (None for integer inputs), and what backward_weight needs."""
        raise NotImplementedError(f"{self.kind} has no I part")

    def backward_weight(self, deferred: Tensors) -> None:
        """W: add this microbatch's gradient to every weight's ``main_grad``."""
        raise NotImplementedError(f"{self.kind} has no W part")

    def backward(self, saved: Tensors, *grads: Tensor) -> Gradients:
        """B: I, then W."""
        gradients, deferred = self.backward_input(saved, *grads)
        if deferred:
            self.backward_weight(deferred)
        return gradients

    def recompute(self, saved: Tensors) -> Tensors:
        """R: the outputs again, from what F saved."""
        raise NotImplementedError(f"{self.kind} has no R part")

    def step(self) -> None:
        """O: the once-a-step work on parameters."""
        raise NotImplementedError(f"{self.kind} has no O part")

    def example_grads(self, inputs: Tensors, outputs: Tensors, env: Env) -> Tensors:
        """Random arguments for backward_input: one gradient for each floating output."""
        floating = [y for y in outputs if y.is_floating_point()]
        return tuple(random_like(y, env, 500 + i) for i, y in enumerate(floating))


def random_like(x: Tensor, env: Env, salt: int) -> Tensor:
    """A random normal tensor of x's shape and dtype, contiguous."""
    generator = torch.Generator(x.device).manual_seed(env.seed * 1009 + salt)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).normal_(generator=generator)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [rows, in] times ``weight`` [out, in] transposed: [rows, out]."""
    return torch.mm(x, weight.t())


def add_weight_gradient(main_grad: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """main_grad [out, in] += grad_output [rows, out]^T x [rows, in], summed in main_grad's dtype.

    On a GPU with bf16 operands this is one GEMM that reads and writes the fp32 gradient.
    """
    if x.is_cuda and x.dtype != main_grad.dtype:
        torch.addmm(main_grad, grad_output.t(), x, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.addmm_(grad_output.t().to(main_grad.dtype), x.to(main_grad.dtype))


def storage_bytes(tensors: Iterable[Tensor | None], beyond: Iterable[Tensor | None] = ()) -> int:
    """Bytes of the distinct storages under ``tensors`` that are not under ``beyond``."""
    seen = {t.untyped_storage().data_ptr() for t in beyond if t is not None}
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
