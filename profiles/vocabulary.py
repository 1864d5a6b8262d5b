"""The op vocabulary: every kind of op that a step is made of, with its shape and its work.

An *op* is one launch group on one stream (a kernel, or a few that always run back to back) or one
collective. An op's cost is looked up by its :class:`OpKey`: kind, pass and shape. The lowering
writes these keys, :mod:`mhcplan.kernels.layers` implements them (a test proves that the names
agree) and ``mhcplan profile measure`` times exactly those callables.

Passes: F forward, I input gradient, W weight gradient, B = I and W fused in one launch group (used
where W is not deferred and fusing saves memory traffic), R recompute, O optimizer and other work on
parameters, once a step.

Axes: ``tokens`` T of one microbatch on one rank; ``hidden`` C; ``n`` the expansion rate; ``rows``
token copies that a rank's experts compute (T x top_k when routing is balanced); all are integers.
``flops`` and ``bytes`` of a kind are the least work of a pass: the roofline that interpolation
between measured shapes is anchored to. bf16 activations, fp32 coefficients and weight gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import factorial
from typing import NamedTuple

Shape = Mapping[str, int]

BF16, FP32 = 2, 4
# bf16 weight, fp32 gradient, fp32 master and two AdamW moments: design.md, "Memory"
ADAMW_BYTES_PER_PARAMETER = FP32 + 2 * FP32 + 4 * FP32 + BF16  # gradient, master, moments, weight


class OpKey(NamedTuple):
    """What a cost is looked up by. ``shape`` is sorted by axis name, so equal shapes are equal."""

    kind: str
    pass_: str
    shape: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """Kind, pass and axes; :func:`parse_key` reads it back."""
        axes = " ".join(f"{axis}={value}" for axis, value in self.shape)
        return f"{self.kind}.{self.pass_} {axes}"


def op_key(kind: str, pass_: str, **shape: int) -> OpKey:
    """Make the key of ``kind`` in ``pass_``.

    Raises:
        KeyError: the vocabulary has no such kind.
        ValueError: the kind has no such pass, or the axes are not exactly the kind's axes.
    """
    op = OP_KINDS[kind]
    if pass_ not in op.passes:
        raise ValueError(f"{kind} has passes {op.passes}, not {pass_!r}")
    if set(shape) != set(op.axes):
        raise ValueError(f"{kind} has axes {sorted(op.axes)}, not {sorted(shape)}")
    return OpKey(kind, pass_, tuple(sorted(shape.items())))


@dataclass(frozen=True)
class OpKind:
    """One kind of op.

    Attributes:
        axes: names of the shape's integers.
        passes: letters among F, I, W, B, R, O.
        category: class of time in the report: ``compute``, ``mhc`` or ``optimizer``.
        flops, bytes: least work of (shape, pass): floating-point operations, bytes of HBM.
        scores: those of the flops that are attention's scores: other kernels than the products'.
        stores: those of the bytes that a lone product stores when its sums are done.
        saved: bytes that F keeps for I beyond the op's own inputs and outputs.
        deferred: bytes that I leaves for W (inputs and output gradients of its linears).
    """

    axes: tuple[str, ...]
    passes: str
    category: str
    flops: Callable[[Shape, str], int]
    bytes: Callable[[Shape, str], int]
    scores: Callable[[Shape, str], int]
    stores: Callable[[Shape, str], int]
    saved: Callable[[Shape], int]
    deferred: Callable[[Shape], int]


def _none(_shape: Shape) -> int:
    return 0


def _kind(
    axes: str,
    passes: str,
    category: str,
    *,
    flops: Callable[[Shape, str], int],
    bytes: Callable[[Shape, str], int],
    scores: Callable[[Shape, str], int] = lambda _s, _p: 0,
    stores: Callable[[Shape, str], int] = lambda _s, _p: 0,
    saved: Callable[[Shape], int] = _none,
    deferred: Callable[[Shape], int] = _none,
) -> OpKind:
    return OpKind(
        tuple(axes.split()), passes, category, flops, bytes, scores, stores, saved, deferred
    )


# -- mHC (paper section 4.3.1 and Table 2; bytes of F as fused: reference "I/O after fusion") ----


def coefficients(n: int) -> int:
    """Coefficients of one token and site: H_pre n, H_post n, H_res n^2."""
    return n * n + 2 * n


def coefficient_bytes(coefficients: int, logits: int, norms: int, tokens: int) -> int:
    """fp32 that a site keeps from F to I: its coefficients, and the projection with 1/r that they
    were made of (equations 14-15; HC has 1/r of every row, equation 5), from which the backward
    walks the Sinkhorn steps again. Recompute reads the coefficients only.
    """
    return (coefficients + logits + norms) * FP32 * tokens


def _mhc_bytes(elements: dict[str, tuple[int, int]]) -> Callable[[Shape, str], int]:
    """Bytes from {pass: (a, b)}: (a n + b) C bf16 elements a token."""

    def least(s: Shape, p: str) -> int:
        per_row, fixed = elements[p]
        return (per_row * s["n"] + fixed) * s["hidden"] * BF16 * s["tokens"]

    return least


def _pre_flops(outputs: Callable[[int], int]) -> Callable[[Shape, str], int]:
    """F_pre whose projection has ``outputs(n)`` numbers a token."""

    def flops(s: Shape, p: str) -> int:
        # projection 2 nC outputs, applied once in F, once in W (dphi) and once in I (dx)
        gemm = 2 * s["n"] * s["hidden"] * outputs(s["n"]) * s["tokens"]
        mix = 2 * s["n"] * s["hidden"] * s["tokens"]
        return {"F": gemm + mix, "I": gemm + 2 * mix, "W": gemm, "B": 2 * gemm + 2 * mix}[p]

    return flops


_mhc_pre_flops = _pre_flops(coefficients)


def _mhc_mix_flops(s: Shape, p: str) -> int:
    mix = 2 * s["n"] * (s["n"] + 1) * s["hidden"] * s["tokens"]
    return mix if p in "FR" else 2 * mix


# -- GEMM-like ops -------------------------------------------------------------------------------


def _gemm_bytes(rows: int, inputs: int, outputs: int, weights: int, p: str) -> int:
    """Least bytes of a group of linears: activations in and out, bf16 weights, fp32 weight gradient
    read and written in W (it accumulates over microbatches)."""
    activations = rows * (inputs + outputs) * BF16
    return activations + weights * (2 * FP32 if p == "W" else BF16)


def swiglu_weights(hidden: int, ffn: int) -> int:
    """Parameters of one SwiGLU: gate, up and down."""
    return 3 * hidden * ffn


def _ffn_flops(s: Shape, _p: str) -> int:
    return 2 * s["tokens"] * swiglu_weights(s["hidden"], s["ffn"])


def _swiglu_widths(hidden: int, ffn: int, p: str) -> int:
    """Elements a row that a SwiGLU's two GEMMs and the kernel between them read and write.

    F: x | gate, up (w, r) | product (w, r) | y. I: dy | its product's gradient (w, r) | gate, up |
    their gradients (w, r) and the product again (w) | dx. W: dgate, dup, x, dy and the product.
    """
    return 2 * hidden + {"F": 6, "I": 9, "W": 3}[p] * ffn


def _ffn_bytes(s: Shape, p: str) -> int:
    weights = swiglu_weights(s["hidden"], s["ffn"])
    return _gemm_bytes(s["tokens"], _swiglu_widths(s["hidden"], s["ffn"], p), 0, weights, p)


def _ffn_saved(s: Shape) -> int:
    return s["tokens"] * 2 * s["ffn"] * BF16  # gate and up; silu(gate) * up is made again in I


def _ffn_deferred(s: Shape) -> int:
    # input, its inner product, gradients of gate|up and of the output
    return s["tokens"] * (2 * s["hidden"] + 3 * s["ffn"]) * BF16


def _expert_flops(s: Shape, _p: str) -> int:
    return 2 * s["rows"] * swiglu_weights(s["hidden"], s["ffn"])


def _expert_bytes(s: Shape, p: str) -> int:
    weights = s["experts"] * swiglu_weights(s["hidden"], s["ffn"])
    return _gemm_bytes(s["rows"], _swiglu_widths(s["hidden"], s["ffn"], p), 0, weights, p)


def _expert_saved(s: Shape) -> int:
    return s["rows"] * 2 * s["ffn"] * BF16


def _expert_deferred(s: Shape) -> int:
    return s["rows"] * (2 * s["hidden"] + 3 * s["ffn"]) * BF16


def _mla_weights(s: Shape) -> int:
    qk = s["nope"] + s["rope"]
    heads, hidden, rank = s["heads"], s["hidden"], s["q_rank"]
    query = heads * qk * (rank if rank else hidden) + hidden * rank
    down = hidden * (s["kv_rank"] + s["rope"])
    return query + down + s["kv_rank"] * heads * (s["nope"] + s["v"]) + heads * s["v"] * hidden


def _score_flops(tokens: int, seq: int, heads: int, qk: int, v: int, p: str) -> int:
    """Causal attention: half of the score matrix. F makes scores of q and k, and sums v; I makes
    the scores again and the gradients of q and k, and those of the weights and of v."""
    wide, narrow = {"F": (1, 1), "I": (3, 2), "W": (0, 0)}[p]
    return tokens * seq * heads * (wide * qk + narrow * v)


def _mla_scores(s: Shape, p: str) -> int:
    qk = s["nope"] + s["rope"]
    return _score_flops(s["tokens"], s["seq"], s["heads"], qk, s["v"], p)


def _mla_flops(s: Shape, p: str) -> int:
    return 2 * s["tokens"] * _mla_weights(s) + _mla_scores(s, p)


def _mla_widths(s: Shape) -> int:
    """Activations a token that pass through HBM between the parts of the sublayer."""
    heads, qk = s["heads"], s["nope"] + s["rope"]
    latent = s["kv_rank"] + s["rope"] + s["q_rank"]
    return 2 * s["hidden"] + 2 * latent + heads * (2 * qk + 2 * s["v"])


def _mla_bytes(s: Shape, p: str) -> int:
    scale = 2 if p == "I" else 1
    return _gemm_bytes(s["tokens"], scale * _mla_widths(s), 0, _mla_weights(s), p)


def _mla_saved(s: Shape) -> int:
    heads, qk = s["heads"], s["nope"] + s["rope"]
    latent = s["kv_rank"] + s["rope"] + 2 * s["q_rank"] + s["kv_rank"]  # before and after the norms
    bf16 = latent + heads * (2 * qk + 2 * s["v"])  # q, k after RoPE, v, attention output
    # and the statistics of the softmax and of the norms
    return s["tokens"] * (bf16 * BF16 + (heads + 1 + (s["q_rank"] > 0)) * FP32)


def _mla_deferred(s: Shape) -> int:
    heads, qk = s["heads"], s["nope"] + s["rope"]
    inputs = s["hidden"] + s["q_rank"] + s["kv_rank"] + heads * s["v"]
    grads = heads * qk + s["q_rank"] + s["kv_rank"] + s["rope"] + heads * (s["nope"] + s["v"])
    return s["tokens"] * (inputs + grads + s["hidden"]) * BF16


def _gqa_weights(s: Shape) -> int:
    return s["hidden"] * s["head_dim"] * 2 * (s["heads"] + s["kv_heads"])


def _gqa_scores(s: Shape, p: str) -> int:
    d = s["head_dim"]
    return _score_flops(s["tokens"], s["seq"], s["heads"], d, d, p)


def _gqa_flops(s: Shape, p: str) -> int:
    return 2 * s["tokens"] * _gqa_weights(s) + _gqa_scores(s, p)


def _gqa_widths(s: Shape) -> int:
    return 2 * s["hidden"] + s["head_dim"] * 2 * (s["heads"] + s["kv_heads"])


def _gqa_bytes(s: Shape, p: str) -> int:
    scale = 2 if p == "I" else 1
    return _gemm_bytes(s["tokens"], scale * _gqa_widths(s), 0, _gqa_weights(s), p)


def _gqa_saved(s: Shape) -> int:
    width = s["head_dim"] * 2 * (s["heads"] + s["kv_heads"])
    return s["tokens"] * (width * BF16 + s["heads"] * FP32)


def _gqa_deferred(s: Shape) -> int:
    width = s["head_dim"] * (2 * s["heads"] + 2 * s["kv_heads"])
    return s["tokens"] * (width + 2 * s["hidden"]) * BF16


def _router_flops(s: Shape, _p: str) -> int:
    return 2 * s["tokens"] * s["hidden"] * s["experts"]


def _router_bytes(s: Shape, p: str) -> int:
    if p == "W":
        return s["tokens"] * (s["hidden"] + s["experts"]) * BF16
    return s["tokens"] * (1 + s["top_k"] + (p == "I")) * s["hidden"] * BF16


def _copy_bytes(axis: str, *, copies: int) -> Callable[[Shape, str], int]:
    return lambda s, _p: copies * s[axis] * s["hidden"] * BF16


def _zero_flops(_s: Shape, _p: str) -> int:
    return 0


def _pointwise_flops(s: Shape, _p: str) -> int:
    return 4 * s["tokens"] * s["hidden"]


def _head_flops(s: Shape, _p: str) -> int:
    return 2 * s["tokens"] * s["hidden"] * s["vocab"]


def _head_bytes(s: Shape, p: str) -> int:
    # F writes the logits, reads them twice (normaliser, then gradient) and writes the gradient
    passes = 4 if p == "F" else 1
    return _gemm_bytes(s["tokens"], s["hidden"], passes * s["vocab"], s["hidden"] * s["vocab"], p)


_MHC = "n hidden tokens"
_MLA = "tokens seq hidden heads nope rope v kv_rank q_rank"
_GQA = "tokens seq hidden heads kv_heads head_dim"

VOCABULARY: dict[str, OpKind] = {
    # site wrap: coefficients and pre-apply (F_pre), then F_post,res
    "mhc_pre": _kind(
        _MHC + " steps",
        "FIWB",
        "mhc",
        flops=_mhc_pre_flops,
        bytes=_mhc_bytes({"F": (2, 1), "I": (4, 2), "W": (1, 0), "B": (4, 2)}),
        # the projection of eq. 14-15; the coefficients are an output
        saved=lambda s: s["tokens"] * (coefficients(s["n"]) + 1) * FP32,
        # the state, and the projection's gradient in rows padded to a power of two
        deferred=lambda s: s["tokens"] * (
            s["n"] * s["hidden"] * BF16 + (1 << coefficients(s["n"]).bit_length()) * FP32
        ),
    ),
    "mhc_post": _kind(
        _MHC, "FI", "mhc", flops=_mhc_mix_flops, bytes=_mhc_bytes({"F": (2, 1), "I": (2, 2)})
    ),
    "mhc_recompute": _kind(
        _MHC + " sites",
        "R",
        "mhc",
        flops=lambda s, p: s["sites"] * _mhc_mix_flops(s, p),
        # reads the block's input and the output of every sublayer but the last; writes every
        # sublayer's input and the states between
        bytes=lambda s, _p: ((s["n"] + 2) * s["sites"] - 1) * s["hidden"] * BF16 * s["tokens"],
    ),
    "hc_pre": _kind(
        _MHC,
        "FIWB",
        "mhc",
        # each row is projected by itself, by the n + 2 lines of one theta: n times less arithmetic
        flops=_pre_flops(lambda n: n + 2),
        bytes=_mhc_bytes({"F": (2, 1), "I": (4, 2), "W": (1, 0), "B": (4, 2)}),
        # the projection and 1/r of every row (equation 5)
        saved=lambda s: s["tokens"] * s["n"] * (s["n"] + 3) * FP32,
        deferred=lambda s: s["tokens"] * s["n"] * (
            s["hidden"] * BF16 + max(16, 1 << (s["n"] + 2).bit_length()) * FP32
        ),
    ),
    "hc_post": _kind(
        _MHC, "FI", "mhc", flops=_mhc_mix_flops, bytes=_mhc_bytes({"F": (2, 1), "I": (2, 2)})
    ),
    "mhc_expand": _kind(
        _MHC, "FI", "mhc", flops=_zero_flops, bytes=_mhc_bytes({"F": (1, 1), "I": (1, 1)})
    ),
    "mhc_collapse": _kind(
        _MHC, "FB", "mhc", flops=_zero_flops, bytes=_mhc_bytes({"F": (1, 1), "B": (3, 1)})
    ),
    # the plain residual: x + f, and the sum of the two gradients of x
    "residual": _kind(
        "hidden tokens", "FI", "compute", flops=_zero_flops, bytes=_copy_bytes("tokens", copies=3)
    ),
    "norm": _kind(
        "hidden tokens",
        "FIR",
        "compute",
        flops=_pointwise_flops,
        bytes=lambda s, p: (3 if p == "I" else 2) * s["tokens"] * s["hidden"] * BF16,
        saved=lambda s: s["tokens"] * FP32,
    ),
    "attention_mla": _kind(
        _MLA, "FIW", "compute",
        flops=_mla_flops, bytes=_mla_bytes, scores=_mla_scores,
        saved=_mla_saved, deferred=_mla_deferred,
    ),
    "attention_gqa": _kind(
        _GQA, "FIW", "compute",
        flops=_gqa_flops, bytes=_gqa_bytes, scores=_gqa_scores,
        saved=_gqa_saved, deferred=_gqa_deferred,
    ),
    "dense_ffn": _kind(
        "tokens hidden ffn", "FIW", "compute",
        flops=_ffn_flops, bytes=_ffn_bytes, saved=_ffn_saved, deferred=_ffn_deferred,
    ),
    "shared_experts": _kind(
        "tokens hidden ffn", "FIW", "compute",
        flops=_ffn_flops, bytes=_ffn_bytes, saved=_ffn_saved, deferred=_ffn_deferred,
    ),
    # MoE: gate, top-k and the gather into expert order; grouped GEMMs; the weighted sum
    "router": _kind(
        "tokens hidden experts top_k", "FIW", "compute",
        flops=_router_flops, bytes=_router_bytes,
        # logits fp32 and the expert of each copy int32; weights and slots are outputs
        saved=lambda s: s["tokens"] * (s["top_k"] * 4 + s["experts"] * FP32),
        deferred=lambda s: s["tokens"] * (s["hidden"] + s["experts"]) * BF16,
    ),
    # from (source rank, expert) order to expert order and back; only where ep > 1
    "regroup": _kind(
        "rows hidden", "FI", "compute", flops=_zero_flops, bytes=_copy_bytes("rows", copies=2)
    ),
    "experts": _kind(
        "rows hidden ffn experts", "FIW", "compute",
        flops=_expert_flops, bytes=_expert_bytes, saved=_expert_saved, deferred=_expert_deferred,
    ),
    "unpermute": _kind(
        "tokens hidden top_k", "FI", "compute",
        flops=_zero_flops,
        # F reads the copies and the shared output; I reads them and dy, and writes their gradients
        bytes=lambda s, p: (
            (2 * s["top_k"] + 1 if p == "I" else s["top_k"] + 2)
            * s["tokens"] * s["hidden"] * BF16
        ),
    ),
    "embedding": _kind(
        "tokens hidden vocab", "FW", "compute",
        flops=_zero_flops,
        bytes=lambda s, p: s["tokens"] * s["hidden"] * (2 * BF16 if p == "F" else BF16 + 2 * FP32),
    ),
    # final norm is an op of its own; logits, softmax and loss, whose F leaves dlogits in place
    "head": _kind(
        "tokens hidden vocab", "FIW", "compute",
        flops=_head_flops, bytes=_head_bytes,
        saved=lambda s: s["tokens"] * s["vocab"] * BF16,
        deferred=lambda s: s["tokens"] * (s["vocab"] + s["hidden"]) * BF16,
    ),
    "adamw": _kind(
        "parameters", "O", "optimizer",
        flops=_zero_flops, bytes=lambda s, _p: s["parameters"] * ADAMW_BYTES_PER_PARAMETER,
    ),
    "zero_gradients": _kind(
        "parameters", "O", "optimizer",
        flops=_zero_flops, bytes=lambda s, _p: s["parameters"] * FP32,
    ),
}  # fmt: skip


# -- residuals that have no kernels here: nothing runs them, a profile prices them by their bytes --


def lite_logits(n: int) -> int:
    """Projection of mHC-lite (arXiv 2601.05732): H_pre, H_post, and a weight for each of the n!
    permutations that H_res is a mixture of.
    """
    return 2 * n + factorial(n)


def _pre_kind(
    axes: str, outputs: Callable[[int], int], forward: tuple[int, int] = (2, 1)
) -> OpKind:
    return _kind(
        axes,
        "FIWB",
        "mhc",
        flops=_pre_flops(outputs),
        bytes=_mhc_bytes({"F": forward, "I": (4, 2), "W": (1, 0), "B": (4, 2)}),
    )


PRICED_ONLY: dict[str, OpKind] = {
    # H_res = I: 2n coefficients; F_post's backward needs no state, as no map of it is learned
    "identity_pre": _pre_kind(_MHC, lambda n: 2 * n),
    "identity_post": _kind(
        _MHC,
        "FI",
        "mhc",
        flops=lambda s, _p: 2 * s["n"] * s["hidden"] * s["tokens"],
        bytes=_mhc_bytes({"F": (2, 1), "I": (1, 2)}),
    ),
    "lite_pre": _pre_kind(_MHC, lite_logits),
    # H_pre is the one of the site before (arXiv 2609.19969), so that the scan of F_post,res also
    # makes u and the coefficients: F writes u and reads no state. Nothing is published of its
    # backward, which is taken to be mHC's
    "single_pre": _pre_kind(_MHC + " steps", coefficients, forward=(0, 1)),
}


# -- kinds that no plan runs: measured to compare with, and for what-ifs --------------------------


def _gemm_kind(operand_bytes: int) -> OpKind:
    """[m, k] x [k, n] with fp32 sums and a bf16 result."""
    return _kind(
        "m n k",
        "F",
        "compute",
        flops=lambda s, _p: 2 * s["m"] * s["n"] * s["k"],
        bytes=lambda s, _p: (s["m"] + s["n"]) * s["k"] * operand_bytes + s["m"] * s["n"] * BF16,
        stores=lambda s, _p: s["m"] * s["n"] * BF16,
    )


MEASURED_ONLY: dict[str, OpKind] = {
    "gemm": _gemm_kind(BF16),
    "gemm_fp8": _gemm_kind(1),  # e4m3, one scale a tensor
    # one expert of the rank gets ``largest`` percent of its rows, the others share the rest evenly
    "experts_skewed": _kind(
        "rows hidden ffn experts largest", "FIW", "compute",
        flops=_expert_flops, bytes=_expert_bytes, saved=_expert_saved, deferred=_expert_deferred,
    ),
}  # fmt: skip
MEASURABLE = VOCABULARY | MEASURED_ONLY
OP_KINDS = MEASURABLE | PRICED_ONLY


class TransferKey(NamedTuple):
    """What the cost of a transfer is looked up by.

    ``num_bytes`` is the buffer on each rank as :class:`~mhcplan.profiles.schema.TransferTiming`
    counts it; ``ranks_per_node`` of the group's ``group_size`` ranks share a node (all of them: the
    traffic stays on NVLink; one: all of it crosses the network).
    """

    pattern: str
    group_size: int
    ranks_per_node: int
    num_bytes: int

    def __str__(self) -> str:
        """Pattern, group and bytes; :func:`parse_key` reads it back."""
        return f"{self.pattern} {self.group_size}/{self.ranks_per_node} {self.num_bytes}"


NO_COST = "none"  # bookkeeping on the host and on events: nothing runs on the GPU


@lru_cache(maxsize=4096)
def parse_key(text: str) -> OpKey | TransferKey | None:
    """Read a key's ``str`` back; None for :data:`NO_COST`.

    Raises:
        ValueError: the text is no key of this vocabulary.
    """
    if text == NO_COST:
        return None
    head, *rest = text.split(" ")
    kind, dot, pass_ = head.partition(".")
    try:
        if dot:
            return op_key(kind, pass_, **{a: int(v) for a, v in (r.split("=") for r in rest)})
        group, num_bytes = rest
        size, per_node = group.split("/")
        return TransferKey(head, int(size), int(per_node), int(num_bytes))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{text!r} is no cost key of this version ({error})") from None


# Communication: the op's kind says what it is for, its pattern says how it moves bytes.
TRANSFER_PATTERNS = {
    "pp_send": "send_recv",
    "pp_recv": "send_recv",
    "dispatch": "all_to_all",
    "combine": "all_to_all",
    "grad_reduce": "reduce_scatter",
    "param_gather": "all_gather",
}
