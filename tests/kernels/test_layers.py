"""Every op against autograd of a plain float64 reference, and the op table against the words."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhcplan.kernels import layers_eager
from mhcplan.kernels.layers import (
    OPS,
    Case,
    Env,
    Op,
    Weight,
    forced_splits,
    make_case,
    storage_bytes,
)
from mhcplan.kernels.layers_attention import NORM_EPS, rope_tables
from mhcplan.profiles.capture.grid import TINY
from mhcplan.profiles.vocabulary import VOCABULARY

ENV = Env(torch.device("cpu"), torch.float64, seed=3)
# kinds whose parameters are fp32 by definition and that have tests of their own
RESIDUAL_KINDS = {k for k in VOCABULARY if k.startswith(("mhc_", "hc_"))}
DIFFERENTIABLE = sorted(set(VOCABULARY) - RESIDUAL_KINDS - {"adamw", "zero_gradients", "regroup"})

Reference = Callable[[Op, dict[str, Tensor], tuple[Tensor, ...]], tuple[Tensor, ...]]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * weight


def rotate(x: Tensor, seq: int) -> Tensor:
    """Rotary embedding of x [B, S, H, d] as complex numbers (a + i b) e^(i angle)."""
    cos, sin = (t.double()[None, :, None] for t in rope_tables(seq, x.shape[-1], x.device))
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, H, .]: torch's own causal attention."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def mla(op: Op, w: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    seq, heads, rope = op.seq, op.heads, op.rope
    query_input = x
    if "query_down" in w:
        query_input = rms(x @ w["query_down"].t(), w["query_norm"])
    q = (query_input @ w["query"].t()).view(-1, seq, heads, op.qk)
    latent = x @ w["latent"].t()
    normed = rms(latent[:, : op.rank], w["latent_norm"])
    nope = (normed @ w["key"].t()).view(-1, seq, heads, op.qk - rope)
    v = (normed @ w["value"].t()).view(*nope.shape[:3], -1)
    k_rope = rotate(latent[:, op.rank :].view(-1, seq, 1, rope), seq).expand(-1, -1, heads, -1)
    q = torch.cat([q[..., :-rope], rotate(q[..., -rope:], seq)], -1)
    out = attend(q, torch.cat([nope, k_rope], -1), v)
    return (out.reshape(len(x), -1) @ w["out"].t(),)


def gqa(op: Op, w: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    qkv = (x @ w["qkv"].t()).view(-1, op.seq, op.heads + 2 * op.kv_heads, op.dim)
    q, k, v = qkv.split([op.heads, op.kv_heads, op.kv_heads], 2)
    out = attend(rotate(q, op.seq), rotate(k, op.seq), v)
    return (out.reshape(len(x), -1) @ w["out"].t(),)


def swiglu(op: Op, w: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    gate, up = (inputs[0] @ w["gate_up"].t()).chunk(2, -1)
    return ((functional.silu(gate) * up) @ w["down"].t(),)


def experts(op: Op, w: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, ends = inputs
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = []
    for e, rows in enumerate(x.split(sizes)):
        gate, up = (rows @ w["gate_up"][e].t()).chunk(2, -1)
        parts.append((functional.silu(gate) * up) @ w["down"][e].t())
    return (torch.cat(parts),)


def router(op: Op, w: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    logits = x @ w["gate"].t()
    scores = logits.softmax(-1) if op.scoring == "softmax" else logits.sigmoid()
    tokens, num_experts = scores.shape
    chosen = []
    for t in range(tokens):
        order = sorted(range(num_experts), key=lambda e, t=t: -float(scores.detach()[t, e]))
        turn = [(t * op.top_k + j) % num_experts for j in range(op.top_k)]
        turn.sort(key=lambda e, t=t: -float(scores.detach()[t, e]))
        chosen.append(turn if op.forced else order[: op.top_k])
    expert = torch.tensor(chosen)
    weights = scores.gather(1, expert)
    if op.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    copies = sorted((int(e), t, j) for t, row in enumerate(expert) for j, e in enumerate(row))
    rows = torch.stack([x[t] for _, t, _ in copies])
    return rows, weights


def unpermute(op: Op, w: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rows, weights, slot, shared = inputs
    y = [shared[t] + sum(weights[t, j] * rows[s] for j, s in enumerate(slot[t].tolist()))
         for t in range(len(shared))]  # fmt: skip
    return (torch.stack(y),)


def head(op: Op, w: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, targets = inputs
    return (functional.cross_entropy(x @ w["weight"].t(), targets, reduction="none"),)


REFERENCES: dict[str, Reference] = {
    "residual": lambda op, w, i: (i[0] + i[1],),
    "norm": lambda op, w, i: (rms(i[0], w["weight"]),),
    "attention_mla": mla,
    "attention_gqa": gqa,
    "dense_ffn": swiglu,
    "shared_experts": swiglu,
    "router": router,
    "experts": experts,
    "unpermute": unpermute,
    "embedding": lambda op, w, i: (w["table"][i[0]],),
    "head": head,
}


def check(case: Case) -> None:
    """F, I and W of a case against autograd; main_grad must be added to, not overwritten."""
    op, inputs = case.op, case.inputs
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    parameters = {k: w.data.detach().requires_grad_() for k, w in op.weights.items()}
    expected = REFERENCES[op.kind](op, parameters, tuple(leaves))
    before = [x.clone() for x in inputs]
    outputs, saved = op.forward(*inputs)
    for got, want in zip(outputs, expected, strict=False):
        torch.testing.assert_close(got, want)
    for weight in op.weights.values():
        weight.main_grad.fill_(0.5)
    grads = op.example_grads(inputs, outputs, case.env)
    if op.kind == "head":
        total = expected[0].mean()
    else:
        total = sum((y * g).sum() for y, g in zip(expected, grads, strict=False))
    wanted = [x for x in [*leaves, *parameters.values()] if x.requires_grad]
    found = iter(torch.autograd.grad(total, wanted))
    input_grads, deferred = op.backward_input(saved, *grads)
    if deferred:
        op.backward_weight(deferred)
    extra = {"residual": grads[-1], "router": grads[-1]}.get(op.kind) if grads else None
    for x, got in zip(leaves, input_grads, strict=True):
        if not x.requires_grad:
            assert got is None
            continue
        want = next(found)
        # residual and router also carry a gradient that came another way, for their first input
        torch.testing.assert_close(got, want + extra if x is leaves[0] and extra is not None
                                   else want)  # fmt: skip
    for name, weight in op.weights.items():
        torch.testing.assert_close(weight.main_grad, next(found) + 0.5, msg=f"{op.kind}.{name}")
    for x, was in zip(inputs, before, strict=True):
        assert torch.equal(x, was), f"{op.kind} changed an input"


@pytest.mark.parametrize("kind", DIFFERENTIABLE)
def test_op_agrees_with_autograd_of_its_reference(kind: str) -> None:
    check(make_case(kind, TINY[kind], ENV))


def test_attention_with_compressed_queries() -> None:
    check(make_case("attention_mla", {**TINY["attention_mla"], "q_rank": 12}, ENV))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_router_in_every_mode(scoring: str, renormalise: bool, forced: bool) -> None:
    shape = TINY["router"]
    gate = ENV.weight(shape["experts"], shape["hidden"])
    op = OPS["router"](
        gate, top_k=shape["top_k"], scoring=scoring, renormalise=renormalise, forced=forced
    )
    check(make_case("router", shape, ENV, op=op))
    _, _, slot, ends = op.forward(*OPS["router"].example_inputs(shape, ENV))[0]
    assert sorted(slot.reshape(-1).tolist()) == list(range(slot.numel()))
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    if forced:
        assert counts == forced_splits(shape["tokens"], shape["top_k"], shape["experts"])
    else:
        assert sum(counts) == slot.numel()


def test_router_without_shared_experts_leaves_their_part_out() -> None:
    case = make_case("router", TINY["router"], ENV)
    outputs, saved = case.op.forward(*case.inputs)
    drows, dweights, others = case.op.example_grads(case.inputs, outputs, ENV)
    with_others = case.op.backward_input(saved, drows, dweights, others)[0][0]
    without = case.op.backward_input(saved, drows, dweights)[0][0]
    torch.testing.assert_close(with_others - others, without)


def test_experts_that_get_no_rows() -> None:
    case = make_case("experts", TINY["experts"], ENV)
    case.inputs = (case.inputs[0], torch.tensor([0, 21, 21], dtype=torch.int32))
    check(case)


def test_regroup_and_back_is_the_identity() -> None:
    op = OPS["regroup"]()
    rows, index = OPS["regroup"].example_inputs(TINY["regroup"], ENV)
    (there,), saved = op.forward(rows, index)
    assert not torch.equal(there, rows)
    assert torch.equal(op.backward_input(saved, there)[0][0], rows)


def test_norm_is_recomputed_bit_for_bit() -> None:
    case = make_case("norm", TINY["norm"], Env(torch.device("cpu"), torch.bfloat16))
    (y,), saved = case.op.forward(*case.inputs)
    assert torch.equal(case.op.recompute(saved)[0], y)


def test_two_microbatches_in_flight_do_not_mix() -> None:
    shape = TINY["dense_ffn"]
    first = make_case("dense_ffn", shape, ENV)
    second = make_case("dense_ffn", shape, Env(ENV.device, ENV.dtype, 4), op=first.op)
    grads = first.op.example_grads(first.inputs, first.inputs, ENV)
    alone = []
    for case in (first, second):
        saved = case.op.forward(*case.inputs)[1]
        alone.append(case.op.backward_input(saved, *grads)[0][0])
    one, two = first.op.forward(*first.inputs)[1], first.op.forward(*second.inputs)[1]
    late, early = first.op.backward_input(two, *grads), first.op.backward_input(one, *grads)
    assert torch.equal(early[0][0], alone[0])
    assert torch.equal(late[0][0], alone[1])
    first.op.backward_weight(early[1])
    first.op.backward_weight(late[1])
    fresh = make_case("dense_ffn", shape, ENV)
    for case in (first, second):
        fresh.op.backward(fresh.op.forward(*case.inputs)[1], *grads)
    for a, b in zip(first.op.weights.values(), fresh.op.weights.values(), strict=True):
        torch.testing.assert_close(a.main_grad, b.main_grad)


def test_adamw_agrees_with_torch() -> None:
    op = make_case("adamw", TINY["adamw"], ENV).op
    flat = op.weights["flat"]
    parameter = torch.nn.Parameter(flat.data.clone())
    other = torch.optim.AdamW([parameter], lr=op.lr, betas=op.betas, eps=op.eps, weight_decay=0.1)
    for step in range(3):
        flat.main_grad.mul_(1 + step)
        parameter.grad = flat.main_grad.clone()
        op.step()
        other.step()
        torch.testing.assert_close(flat.data, parameter.detach())


def test_zero_gradients() -> None:
    op = make_case("zero_gradients", TINY["zero_gradients"], ENV).op
    assert op.weights["flat"].main_grad.abs().sum() > 0
    op.step()
    assert op.weights["flat"].main_grad.abs().sum() == 0


def test_op_table_names_are_the_vocabulary() -> None:
    assert set(OPS) == set(VOCABULARY)
    assert all(OPS[kind].kind == kind for kind in OPS)


@pytest.mark.parametrize("kind", sorted(VOCABULARY))
def test_every_pass_of_the_vocabulary_runs_and_no_other(kind: str) -> None:
    env = Env(torch.device("cpu"), torch.float32)
    assert set(TINY[kind]) == set(VOCABULARY[kind].axes)
    for pass_ in VOCABULARY[kind].passes:
        make_case(kind, TINY[kind], env).prepare(pass_)()
    if "W" not in VOCABULARY[kind].passes and "B" not in VOCABULARY[kind].passes:
        with pytest.raises(NotImplementedError, match=f"{kind} has no"):
            OPS[kind].build(TINY[kind], env).backward_weight(())


def test_bf16_stays_bf16_and_gradients_stay_fp32() -> None:
    env = Env(torch.device("cpu"), torch.bfloat16)
    for kind in DIFFERENTIABLE:
        case = make_case(kind, TINY[kind], env)
        outputs, saved = case.op.forward(*case.inputs)
        grads, deferred = case.op.backward_input(
            saved, *case.op.example_grads(case.inputs, outputs, env)
        )
        if deferred:
            case.op.backward_weight(deferred)
        assert outputs[0].dtype == (torch.float32 if kind == "head" else torch.bfloat16)
        assert all(g is None or g.dtype == x.dtype for g, x in zip(grads, case.inputs, strict=True))
        assert all(w.main_grad.dtype == torch.float32 for w in case.op.weights.values())


@pytest.mark.parametrize("kind", sorted(set(VOCABULARY) - {"adamw", "zero_gradients"}))
def test_ops_keep_the_bytes_that_the_vocabulary_says(kind: str) -> None:
    """saved: beyond inputs and outputs; deferred: all that W needs. Row bounds are not counted."""
    if kind in ("mhc_collapse", "mhc_recompute"):
        pytest.skip("a chain of others")
    case = make_case(kind, TINY[kind], Env(torch.device("cpu"), torch.bfloat16))
    outputs, saved = case.op.forward(*case.inputs)
    words, shape = VOCABULARY[kind], TINY[kind]
    assert storage_bytes(saved, beyond=[*case.inputs, *outputs]) == words.saved(shape)
    grads = case.op.example_grads(case.inputs, outputs, case.env)
    deferred = case.op.backward_input(saved, *grads)[1]
    bounds = case.inputs[1:] if kind == "experts" else case.inputs if kind == "embedding" else ()
    # the embedding's W needs its output gradient, which nobody else keeps: not in the formula
    given = [*bounds, *(grads if kind == "embedding" else ())]
    assert storage_bytes(deferred, beyond=given) == words.deferred(shape)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="main_grad"):
        Weight(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="scoring"):
        OPS["router"](ENV.weight(4, 8), top_k=2, scoring="tanh")
    with pytest.raises(ValueError, match="top_k=5"):
        OPS["router"](ENV.weight(4, 8), top_k=5)
    with pytest.raises(ValueError, match="backend"):
        OPS["attention_mla"].build(TINY["attention_mla"], ENV, backend="fast")


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float64)
    loss = layers_eager.cross_entropy_(logits, torch.tensor([1]), 1.0)
    assert math.isclose(float(loss), 2e4)
    assert torch.equal(logits, torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64))


def test_random_values_depend_on_the_seed_only() -> None:
    assert torch.equal(ENV.normal(4, salt=1), Env(ENV.device, ENV.dtype, 3).normal(4, salt=1))
    assert not torch.equal(ENV.normal(4, salt=1), ENV.normal(4, salt=2))


@pytest.mark.parametrize(
    "kind",
    ["dense_ffn", "shared_experts", "experts", "router", "head", "attention_mla", "attention_gqa"],
)
def test_the_vocabulary_counts_the_flops_that_torch_counts(kind: str) -> None:
    op, shape = VOCABULARY[kind], TINY[kind]
    for pass_ in "FI":
        call = make_case(kind, shape, ENV).prepare(pass_)
        with FlopCounterMode(display=False) as counter:
            call()
        # plain torch makes both halves of the scores, of which causal kernels make one
        expected = op.flops(shape, pass_) + op.scores(shape, pass_)
        assert counter.get_total_flops() == expected, pass_
    assert op.flops(shape, "W") == op.flops(shape, "F") - op.scores(shape, "F")
