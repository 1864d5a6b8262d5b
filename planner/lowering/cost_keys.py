"""Cost keys of a plan's ops: what each of them is looked up by in a profile."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from mhcplan.profiles import vocabulary
from mhcplan.profiles.specs import Mla, ResidualKind

if TYPE_CHECKING:
    from mhcplan.planner.lowering.work import Work
    from mhcplan.profiles.specs import Moe
    from mhcplan.profiles.vocabulary import OpKey

op_key = lru_cache(maxsize=4096)(vocabulary.op_key)  # every op of a template asks for its key

# of a site, by the residual's kind: F_pre, and F_post,res
_SITE_KINDS: dict[ResidualKind, tuple[str, str]] = {
    "mhc": ("mhc_pre", "mhc_post"),
    "hc": ("hc_pre", "hc_post"),
    "identity": ("identity_pre", "identity_post"),
    "mhc-lite": ("lite_pre", "mhc_post"),
    "mhc-single-pass": ("single_pre", "mhc_post"),
    "plain": ("", ""),
}


class CostKeys:
    """Keys of the kinds that have more than one axis in common with others."""

    def __init__(self, work: Work) -> None:
        self._work, self._model = work, work.model
        self._pre, self._post = _SITE_KINDS[work.residual.kind]

    def hidden(self, kind: str, pass_: str, **more: int) -> OpKey:
        """A kind over the tokens' hidden vectors, with ``more`` axes."""
        hidden, tokens = self._model.hidden_size, self._work.tokens
        return op_key(kind, pass_, hidden=hidden, tokens=tokens, **more)

    def vocabulary(self, kind: str, pass_: str) -> OpKey:
        """Embedding or head."""
        return self.hidden(kind, pass_, vocab=self._model.vocab_size)

    def mhc(self, kind: str, pass_: str, **more: int) -> OpKey:
        """A kind over the rows of the state."""
        return self.hidden(kind, pass_, n=self._work.residual.expansion_rate, **more)

    def pre(self, pass_: str) -> OpKey:
        """Coefficients and F_pre."""
        residual = self._work.residual
        steps = {"steps": residual.sinkhorn_steps} if residual.has_sinkhorn else {}
        return self.mhc(self._pre, pass_, **steps)

    def post(self, pass_: str) -> OpKey:
        """F_post,res."""
        return self.mhc(self._post, pass_)

    def attention(self, pass_: str) -> OpKey:
        """The attention sublayer; its kind says which."""
        a = self._model.attention
        more = {"seq": self._work.seq_len, "heads": a.num_heads}
        if isinstance(a, Mla):
            more |= {"nope": a.qk_nope_head_dim, "rope": a.qk_rope_head_dim, "v": a.v_head_dim,
                     "kv_rank": a.kv_lora_rank, "q_rank": a.q_lora_rank or 0}  # fmt: skip
        else:
            more |= {"kv_heads": a.num_kv_heads, "head_dim": a.head_dim}
        return self.hidden(f"attention_{a.kind}", pass_, **more)

    def dense_ffn(self, pass_: str) -> OpKey:
        """The FFN of a dense block."""
        return self.hidden("dense_ffn", pass_, ffn=self._model.dense_ffn_dim or 0)

    def shared_experts(self, pass_: str) -> OpKey:
        """Shared experts, as one FFN."""
        width = self._moe.num_shared_experts * self._moe.ffn_dim
        return self.hidden("shared_experts", pass_, ffn=width)

    def router(self, pass_: str) -> OpKey:
        """Gate, top-k and the gather."""
        moe = self._moe
        return self.hidden("router", pass_, experts=moe.num_experts, top_k=moe.top_k)

    def experts(self, pass_: str) -> OpKey:
        """Routed experts of one rank."""
        moe = self._moe
        return op_key("experts", pass_, rows=self._work.tokens * moe.top_k,
                      hidden=self._model.hidden_size, ffn=moe.ffn_dim,
                      experts=moe.num_experts // self._work.ep)  # fmt: skip

    def regroup(self, pass_: str) -> OpKey:
        """Rows from one order to another."""
        rows = self._work.tokens * self._moe.top_k
        return op_key("regroup", pass_, rows=rows, hidden=self._model.hidden_size)

    def unpermute(self, pass_: str) -> OpKey:
        """The weighted sum of what experts returned."""
        return self.hidden("unpermute", pass_, top_k=self._moe.top_k)

    @property
    def _moe(self) -> Moe:
        assert self._model.moe is not None
        return self._model.moe
