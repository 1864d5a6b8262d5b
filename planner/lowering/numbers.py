"""The numbers of a plan's ops: cost keys, and sizes of buffers, for what a form leaves open."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from mhcplan.planner.lowering.form import EXCHANGE, MESSAGE, Key, Size
from mhcplan.profiles import vocabulary
from mhcplan.profiles.specs import Mla
from mhcplan.profiles.vocabulary import (
    BF16,
    OP_KINDS,
    VOCABULARY,
    OpKey,
    TransferKey,
    coefficient_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Hashable

    from mhcplan.planner.lowering.work import Work

op_key = lru_cache(maxsize=4096)(vocabulary.op_key)


class Numbers:
    """Of one plan; what is asked for more than once is worked out once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._axes = _axes(work)
        self._bytes: dict[Hashable, int] = {}

    def key(self, key: Hashable) -> Hashable:
        """The cost key that ``key`` stands for; one that is no :class:`Key` stands for itself."""
        match key:
            case Key() if key == MESSAGE:
                return self._work.pipe_key
            case Key() if key == EXCHANGE:
                return self._work.expert_key
            case Key():
                return self._op_key(key)
            case _:
                return key

    @staticmethod
    def payload_bytes(key: Hashable) -> int:
        """What an op of a cost key moves: nothing unless it is a transfer."""
        return key.num_bytes if isinstance(key, TransferKey) else 0

    def num_bytes(self, size: Hashable) -> int:
        """The bytes that ``size`` stands for."""
        if size not in self._bytes:
            self._bytes[size] = self._bytes_of(size)
        return self._bytes[size]

    def _bytes_of(self, size: Hashable) -> int:
        work = self._work
        match size:
            case int():
                return size
            case Size("hidden"):
                return work.hidden_bytes
            case Size("state"):
                return work.state_bytes
            case Size("routed"):
                return work.routed_bytes
            case Size("received"):
                return work.received_bytes
            case Size("coefficients"):
                r, tokens = work.residual, work.tokens
                return coefficient_bytes(r.num_coefficients, r.num_logits, r.num_norms, tokens)
            case Size("saved", Key() as key):
                return VOCABULARY[key.kind].saved(dict(self._op_key(key).shape))
            case Size("deferred", Key() as key):
                # what W needs beyond the sublayer's input, which stays where F left it
                shape = dict(self._op_key(key).shape)
                source = shape.get("rows", work.tokens) * work.model.hidden_size * BF16
                return VOCABULARY[key.kind].deferred(shape) - source
            case _:
                raise AssertionError(f"{size} is no size")

    def _op_key(self, key: Key) -> OpKey:
        axes = self._axes | self._axes_of_part(key) | {"sites": key.sites}
        return op_key(key.kind, key.pass_, **{axis: axes[axis] for axis in OP_KINDS[key.kind].axes})

    def _axes_of_part(self, key: Key) -> dict[str, int]:
        """Axes that mean another thing for other kinds."""
        model, moe = self._work.model, self._work.model.moe
        if key.part == "mtp_project":  # priced as a SwiGLU of width 2C / 3
            return {"ffn": -(-2 * model.hidden_size // 3)}
        if key.kind == "dense_ffn":
            return {"ffn": model.dense_ffn_dim or 0}
        if moe is None:
            return {}
        match key.kind:
            case "shared_experts":
                return {"ffn": moe.num_shared_experts * moe.ffn_dim}
            case "experts":
                return {"ffn": moe.ffn_dim, "experts": moe.num_experts // self._work.ep}
            case _:
                return {"experts": moe.num_experts}


def _axes(work: Work) -> dict[str, int]:
    """Axes that mean the same for all kinds."""
    model, a, moe = work.model, work.model.attention, work.model.moe
    axes = {
        "hidden": model.hidden_size, "tokens": work.tokens, "vocab": model.vocab_size,
        "n": work.residual.expansion_rate, "steps": work.residual.sinkhorn_steps,
        "seq": work.seq_len, "heads": a.num_heads,
    }  # fmt: skip
    if isinstance(a, Mla):
        axes |= {"nope": a.qk_nope_head_dim, "rope": a.qk_rope_head_dim, "v": a.v_head_dim,
                 "kv_rank": a.kv_lora_rank, "q_rank": a.q_lora_rank or 0}  # fmt: skip
    else:
        axes |= {"kv_heads": a.num_kv_heads, "head_dim": a.head_dim}
    if moe is not None:
        axes |= {"top_k": moe.top_k, "rows": work.tokens * moe.top_k}
    return axes
