"""Ops that may run beside the compute stream write into memory that they are given."""

from __future__ import annotations

import pytest
import torch

from mhcplan.kernels.layers import OPS, Env

SHAPE = {"tokens": 48, "hidden": 128, "n": 4, "steps": 5, "sites": 3, "top_k": 2}
AXES = {
    "mhc_pre": "n hidden tokens steps",
    "hc_pre": "n hidden tokens",
    "mhc_post": "n hidden tokens",
    "hc_post": "n hidden tokens",
    "mhc_recompute": "n hidden tokens sites",
    "residual": "hidden tokens",
    "norm": "hidden tokens",
    "unpermute": "tokens hidden top_k",
}
PASSES = {
    "mhc_pre": "FB", "hc_pre": "FB", "mhc_post": "FI", "hc_post": "FI", "mhc_recompute": "R",
    "residual": "F", "norm": "FIR", "unpermute": "FI",
}  # fmt: skip
CASES = [(kind, pass_) for kind, passes in PASSES.items() for pass_ in passes]


def results(kind: str, pass_: str, made: tuple) -> tuple[torch.Tensor, ...]:
    """What a pass returns that may be placed; F of a norm and of pre also saves some."""
    if pass_ == "F":
        outputs, saved = made
        if kind == "norm" or kind.endswith("_pre"):
            return (*outputs, saved[-1])
        return tuple(outputs)
    if pass_ == "I":
        kept = {"mhc_post": slice(1, 3), "hc_post": slice(1, 3), "unpermute": slice(0, 2)}
        return tuple(made[0][kept.get(kind, slice(0, 1))])
    return tuple(made)


@pytest.mark.parametrize(("kind", "pass_"), CASES)
def test_results_lie_in_the_given_memory_and_are_the_same(kind: str, pass_: str) -> None:
    env = Env(torch.device("cpu"), torch.float32, seed=3)
    cls = OPS[kind]
    shape = {axis: SHAPE[axis] for axis in AXES[kind].split()}
    op, inputs = cls.build(shape, env), cls.example_inputs(shape, env)
    outputs, saved = op.forward(*inputs)
    grads = () if kind == "mhc_recompute" else op.example_grads(inputs, outputs, env)
    if kind.endswith("_pre"):
        grads[2][:, : shape["n"]] = 0  # mhc_post leaves them; other tests say that none is read
    call = {
        "F": lambda **k: op.forward(*inputs, **k),
        "I": lambda **k: op.backward_input(saved, *grads, **k),
        "B": lambda **k: op.backward(saved, *grads, **k),
        "R": lambda **k: op.recompute(saved, **k),
    }[pass_]
    expected = results(kind, pass_, call())
    placed = tuple(torch.full_like(x, float("nan")) for x in expected)
    found = results(kind, pass_, call(out=placed if len(placed) > 1 else placed[0]))
    for memory, y, right in zip(placed, found, expected, strict=True):
        assert y.data_ptr() == memory.data_ptr()
        # mhc_post leaves the first n columns of dmix to mhc_pre
        skip = shape["n"] if kind.endswith("_post") and pass_ == "I" and y is found[-1] else 0
        torch.testing.assert_close(memory[..., skip:], right[..., skip:], rtol=0, atol=0)
