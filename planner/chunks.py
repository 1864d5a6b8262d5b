"""What a chunk does: the ops of one stage for one microbatch, phase by phase.

A phase is what figure 4 of the paper (arXiv 2512.24880) draws as one box, or a few that always
follow each other. :mod:`mhcplan.planner.lowering` puts phases in order; here each phase names its
ops, what they read and make, and what is dead after them.

Names of buffers, j a site of the stage (2k attention, 2k + 1 FFN of its block k), L its sites:

=============== ===================================================================================
x{j}, g{j}      state before site j ([tokens, n, C]) and its gradient; ``out`` is x{L} where it
                goes to the next stage, ``grad_out`` is g0 where it goes to the previous one
coef{j}         fp32 coefficients of site j, stored from F to I
u{j}, h{j}      H_pre x, and its norm: what the sublayer reads (r for recomputed: xr, ur, hr)
f{j}            output of the sublayer
keep{j}, defer{j}  what the sublayer's F keeps for I, and I for W, beyond the above
sent, got, rows, ret  MoE: permuted copies, dispatched, in expert order, combined
=============== ===================================================================================

d in front of a name is its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.profiles.specs import SITES_PER_BLOCK, Mla
from mhcplan.profiles.vocabulary import (
    BF16,
    FP32,
    NO_COST,
    VOCABULARY,
    OpKey,
    coefficient_bytes,
    op_key,
)
from mhcplan.sim.build import COMPUTE, EXPERT, GRAD_OUT, OUT, PIPE, New

if TYPE_CHECKING:
    from mhcplan.planner.work import StageShape, Work
    from mhcplan.sim.build import TemplateBuilder


class Chunk:
    """Emits the phases of one stage's chunk into the slot of a template."""

    def __init__(self, work: Work, shape: StageShape, builder: TemplateBuilder, slot: int) -> None:
        self.work, self.shape, self.slot = work, shape, slot
        self.plain = work.residual.is_plain
        self._builder = builder
        self._model = work.model
        self._recomputed = not self.plain and work.recompute_block is not None
        self._prefix = "hc" if work.residual.kind == "hc" else "mhc"

    # -- boxes of figure 4, forward

    def enter(self) -> None:
        """First stage: embedding, and its copy to n rows."""
        if not self.shape.first:
            return
        key = self._hidden_key("embedding", "F", vocab=self._model.vocab_size)
        if self.plain:
            self._op("embedding", "F", COMPUTE, key, new=[self._state("x0")])
            return
        self._op("embedding", "F", COMPUTE, key, new=[self._hidden("e")])
        self._op("mhc_expand", "F", COMPUTE, self._mhc_key("mhc_expand", "F"), category="mhc",
                 reads=["e"], new=[self._state("x0")], dead=["e"])  # fmt: skip

    def attention_forward(self, block: int) -> None:
        """F_pre^A, ATTN, F_post,res^A."""
        j = SITES_PER_BLOCK * block
        self._pre_forward(j)
        self._op(self._attention, "F", COMPUTE, self._attention_key("F"), site=j, reads=[f"h{j}"],
                 new=[self._hidden(f"f{j}"), self._keep(j, self._attention_key("F"))],
                 dead=self._if_recomputed(f"h{j}"))  # fmt: skip
        self._post_forward(j)

    def ffn_enter_forward(self, block: int) -> None:
        """F_pre^M, and in a MoE block the router, which permutes tokens into expert order."""
        j = self._ffn_site(block)
        self._pre_forward(j)
        if self.shape.moe[block]:
            key = self._router_key("F")
            self._op("router", "F", COMPUTE, key, site=j, reads=[f"h{j}"],
                     new=[self._routed(f"sent{j}"), self._keep(j, key, "route")])  # fmt: skip

    def dispatch_forward(self, block: int) -> None:
        """DISPATCH(F)."""
        if self.work.ep > 1 and self.shape.moe[block]:
            j = self._ffn_site(block)
            self._transfer("dispatch", "F", j, f"sent{j}", f"got{j}")

    def ffn_forward(self, block: int) -> None:
        """MLP(F): dense FFN, or shared experts (while the dispatch runs) and routed experts."""
        j = self._ffn_site(block)
        if not self.shape.moe[block]:
            key = self._ffn_key("dense_ffn", "F")
            self._op("dense_ffn", "F", COMPUTE, key, site=j, reads=[f"h{j}"],
                     new=[self._hidden(f"f{j}"), self._keep(j, key)],
                     dead=self._if_recomputed(f"h{j}"))  # fmt: skip
            return
        if self._has_shared:
            key = self._ffn_key("shared_experts", "F")
            self._op("shared_experts", "F", COMPUTE, key, site=j, reads=[f"h{j}"],
                     new=[self._hidden(f"s{j}"), self._keep(j, key, "keep_shared")])  # fmt: skip
        self._builder.states[self.slot].pending += self._if_recomputed(f"h{j}")
        rows = self._to_expert_order("F", j, f"sent{j}", f"got{j}", f"rows{j}")
        key = self._expert_key("F")
        made = f"y{j}" if self.work.ep > 1 else f"ret{j}"
        self._op("experts", "F", COMPUTE, key, site=j, reads=[rows],
                 new=[self._routed(made), self._keep(j, key)])  # fmt: skip
        if self.work.ep > 1:
            self._op("regroup", "F", COMPUTE, self._regroup_key("F"), site=j,
                     name=f"regroup.F{j}.back", reads=[made], new=[self._routed(f"yr{j}")],
                     dead=[made])  # fmt: skip

    def combine_forward(self, block: int) -> None:
        """COMBINE(F)."""
        if self.work.ep > 1 and self.shape.moe[block]:
            j = self._ffn_site(block)
            self._transfer("combine", "F", j, f"yr{j}", f"ret{j}")

    def ffn_leave_forward(self, block: int) -> None:
        """F_post,res^M, with the weighted sum of what the experts returned before it."""
        j = self._ffn_site(block)
        if self.shape.moe[block]:
            shared = [f"s{j}"] if self._has_shared else []
            dead = [*shared, *([f"yr{j}"] if self.work.ep > 1 else [])]
            self._op("unpermute", "F", self.work.post_stream(is_ffn=True),
                     self._unpermute_key("F"), site=j, reads=[f"ret{j}", f"route{j}", *shared],
                     new=[self._hidden(f"f{j}")], dead=dead)  # fmt: skip
        self._post_forward(j)

    def leave(self) -> None:
        """Last stage: rows collapse to one, final norm, logits and loss."""
        if not self.shape.last:
            return
        last = self._x(self.shape.num_sites)
        if not self.plain:
            self._op("mhc_collapse", "F", COMPUTE, self._mhc_key("mhc_collapse", "F"),
                     category="mhc", reads=[last], new=[self._hidden("z")])  # fmt: skip
        z = last if self.plain else "z"
        self._op("norm", "F", COMPUTE, self._hidden_key("norm", "F"), name="norm.F.head",
                 reads=[z], new=[self._hidden("hz")])  # fmt: skip
        key = self._hidden_key("head", "F", vocab=self._model.vocab_size)
        logits = VOCABULARY["head"].saved(dict(key.shape))
        self._op("head", "F", COMPUTE, key, reads=["hz"],
                 new=[New("dlogits", logits, "logits")])  # fmt: skip

    # -- boxes of figure 4, backward

    def enter_backward(self) -> None:
        """Last stage: from the loss to the gradient of the last state."""
        if not self.shape.last:
            return
        sites = self.shape.num_sites
        key = self._hidden_key("head", "I", vocab=self._model.vocab_size)
        self._op("head", "I", COMPUTE, key, reads=["dlogits"], new=[self._hidden("dhz")])
        z = self._x(sites) if self.plain else "z"
        made = self._state(self._g(sites)) if self.plain else self._hidden("dz")
        self._op("norm", "I", COMPUTE, self._hidden_key("norm", "I"), name="norm.I.head",
                 reads=["dhz", z], new=[made], dead=["dhz", z])  # fmt: skip
        if not self.plain:
            last = self._x(sites)
            self._op("mhc_collapse", "B", COMPUTE, self._mhc_key("mhc_collapse", "B"),
                     category="mhc", reads=["dz", last], new=[self._state(self._g(sites))],
                     dead=["dz", last])  # fmt: skip

    def recompute(self, block: int, *, of_ffn: bool) -> None:
        """Rebuild a recompute block of sites if the backward is about to enter one.

        Only local data is read (paper 4.3.3), so it may run before the gradient arrives.
        """
        last = self._ffn_site(block) if of_ffn else SITES_PER_BLOCK * block
        found = [sites for sites in self._recompute_blocks() if sites[-1] == last]
        if not found:
            return
        sites = found[0]
        stored = self._x(sites.start)
        reads = [stored, *(f"coef{j}" for j in sites), *(f"f{j}" for j in sites[:-1])]
        arrives = last + 1 < self.shape.num_sites or not self.shape.last
        if not self.work.overlap_recompute and arrives:
            reads.append(self._g(last + 1))
        made = [self._hidden(f"ur{j}", "recompute") for j in sites]
        made += [self._state(f"xr{j}", "recompute") for j in sites[1:]]
        stream = self.work.recompute_stream
        self._op("mhc_recompute", "R", stream, self._recompute_key(len(sites)),
                 category="recompute", site=last, reads=reads, new=made)  # fmt: skip
        for j in sites:
            self._op(
                "norm",
                "R",
                stream,
                self._hidden_key("norm", "R"),
                category="recompute",
                site=j,
                reads=[f"ur{j}"],
                new=[self._hidden(f"hr{j}", "recompute")],
            )

    def ffn_leave_backward(self, block: int) -> None:
        """F_post,res^M(B), and the gradients of the weighted sum."""
        j = self._ffn_site(block)
        gradient = self._post_backward(j)
        if self.shape.moe[block]:
            made = f"dyr{j}" if self.work.ep > 1 else f"dy{j}"
            self._op("unpermute", "I", self.work.post_stream(is_ffn=True),
                     self._unpermute_key("I"), site=j, reads=[gradient, f"ret{j}", f"route{j}"],
                     new=[self._routed(made)], dead=[f"ret{j}"])  # fmt: skip

    def combine_backward(self, block: int) -> None:
        """COMBINE(B): a dispatch-shaped all-to-all of gradients."""
        if self.work.ep > 1 and self.shape.moe[block]:
            j = self._ffn_site(block)
            self._transfer("combine", "I", j, f"dyr{j}", f"dgot{j}")

    def ffn_backward(self, block: int) -> None:
        """MLP(B)."""
        j = self._ffn_site(block)
        gradient = self._g(j + 1) if self.plain else f"df{j}"
        if not self.shape.moe[block]:
            self._sublayer_backward("dense_ffn", self._ffn_key("dense_ffn", "I"), j, gradient)
            return
        if self._has_shared:
            key = self._ffn_key("shared_experts", "I")
            self._op("shared_experts", "I", COMPUTE, key, site=j,
                     reads=[gradient, f"keep_shared{j}"],
                     new=[self._hidden(f"dhs{j}"), self._defer(j, key, "defer_shared")],
                     dead=[f"keep_shared{j}"])  # fmt: skip
        if not self.plain:
            self._builder.states[self.slot].pending.append(f"df{j}")
        rows = self._to_expert_order("I", j, f"dyr{j}", f"dgot{j}", f"dy{j}")
        key = self._expert_key("I")
        made = f"drows{j}" if self.work.ep > 1 else f"dsent{j}"
        self._op("experts", "I", COMPUTE, key, site=j, reads=[rows, f"keep{j}"],
                 new=[self._routed(made), self._defer(j, key)],
                 dead=[rows, f"keep{j}"])  # fmt: skip
        if self.work.ep > 1:
            self._op("regroup", "I", COMPUTE, self._regroup_key("I"), site=j,
                     name=f"regroup.I{j}.back", reads=[made], new=[self._routed(f"dout{j}")],
                     dead=[made])  # fmt: skip

    def dispatch_backward(self, block: int) -> None:
        """DISPATCH(B)."""
        if self.work.ep > 1 and self.shape.moe[block]:
            j = self._ffn_site(block)
            self._transfer("dispatch", "I", j, f"dout{j}", f"dsent{j}")

    def ffn_weights(self, block: int) -> None:
        """MLP(W)."""
        j = self._ffn_site(block)
        if not self.shape.moe[block]:
            self._weights("dense_ffn", self._ffn_key("dense_ffn", "W"), j, self._h(j))
            return
        if self._has_shared:
            key = self._ffn_key("shared_experts", "W")
            self._op("shared_experts", "W", COMPUTE, key, site=j,
                     reads=[self._h(j), f"defer_shared{j}"], dead=[f"defer_shared{j}"])  # fmt: skip
        self._weights("experts", self._expert_key("W"), j, self._rows(j))

    def ffn_enter_backward(self, block: int) -> None:
        """F_pre^M(B), in a MoE block behind the router's gradient."""
        j = self._ffn_site(block)
        if self.shape.moe[block]:
            key = self._router_key("I")
            shared = [f"dhs{j}"] if self._has_shared else []
            sent = [f"dout{j}"] if self.work.ep > 1 else []
            self._op("router", "I", COMPUTE, key, site=j,
                     reads=[f"dsent{j}", f"route{j}", *shared],
                     new=[self._hidden(f"dh{j}"), self._defer(j, key, "defer_route")],
                     dead=[f"dsent{j}", f"route{j}", *sent, *shared])  # fmt: skip
        self._pre_backward(j)

    def attention_backward(self, block: int) -> None:
        """F_post,res^A(B), ATTN(B), F_pre^A(B)."""
        j = SITES_PER_BLOCK * block
        gradient = self._post_backward(j)
        self._sublayer_backward(self._attention, self._attention_key("I"), j, gradient)
        self._pre_backward(j)

    def attention_weights(self, block: int) -> None:
        """ATTN(W), behind the router's weights, which had to wait for DISPATCH(B)."""
        j = self._ffn_site(block)
        if self.shape.moe[block]:
            self._op("router", "W", COMPUTE, self._router_key("W"), site=j,
                     reads=[self._h(j), f"defer_route{j}"],
                     dead=[self._h(j), f"defer_route{j}"])  # fmt: skip
        a = SITES_PER_BLOCK * block
        self._weights(self._attention, self._attention_key("W"), a, self._h(a))

    def leave_backward(self) -> None:
        """First stage: n gradients of the embedding sum up to one."""
        if self.shape.first and not self.plain:
            self._op("mhc_expand", "I", COMPUTE, self._mhc_key("mhc_expand", "I"), category="mhc",
                     reads=["g0"], new=[self._hidden("de")], dead=["g0"])  # fmt: skip

    def enter_weights(self) -> None:
        """Last stage: weight gradient of the head."""
        if self.shape.last:
            key = self._hidden_key("head", "W", vocab=self._model.vocab_size)
            self._op("head", "W", COMPUTE, key, reads=["dlogits", "hz"], dead=["dlogits", "hz"])

    def leave_weights(self) -> None:
        """First stage: weight gradient of the embedding."""
        if self.shape.first:
            gradient = "g0" if self.plain else "de"
            key = self._hidden_key("embedding", "W", vocab=self._model.vocab_size)
            self._op("embedding", "W", COMPUTE, key, reads=[gradient], dead=[gradient])

    # -- pipeline messages

    def receive(self, pass_: str) -> None:
        """Receive the state (F; it stays as the stage's stored input) or its gradient (I)."""
        forward = self._state("x0"), -1
        backward = self._state(self._g(self.shape.num_sites), "communication"), 1
        new, hop = forward if pass_ == "F" else backward
        self._op("pp_recv", pass_, PIPE, self.work.pipe_key, category="pp", new=[new], hop=hop,
                 payload_bytes=self.work.state_bytes)  # fmt: skip

    def await_message(self, pass_: str) -> None:
        """Let the compute stream wait for a receive before anything needs it."""
        name = "x0" if pass_ == "F" else self._g(self.shape.num_sites)
        self._op("await", pass_, COMPUTE, NO_COST, reads=[name])

    def send(self, pass_: str) -> None:
        """Send the state (F) or its gradient (I); its buffer is dead once the send is done."""
        name, hop = (OUT, 1) if pass_ == "F" else (GRAD_OUT, -1)
        self._op("pp_send", pass_, PIPE, self.work.pipe_key, category="pp", reads=[name],
                 dead=[name], hop=hop, is_send=1, payload_bytes=self.work.state_bytes)  # fmt: skip

    # -- parts of the boxes

    def _pre_forward(self, j: int) -> None:
        source = self._x(j)
        if not self.plain:
            new = [self._hidden(f"u{j}"), New(f"coef{j}", self._coefficient_bytes)]
            self._op(f"{self._prefix}_pre", "F", self.work.pre_stream, self._pre_key("F"),
                     category="mhc", site=j, reads=[source], new=new)  # fmt: skip
            source = f"u{j}"
        self._op("norm", "F", self.work.pre_stream, self._hidden_key("norm", "F"), site=j,
                 reads=[source], new=[self._hidden(f"h{j}")],
                 dead=self._if_recomputed(source))  # fmt: skip

    def _post_forward(self, j: int) -> None:
        stream = self.work.post_stream(is_ffn=j % SITES_PER_BLOCK == 1)
        made = self._state(self._x(j + 1))
        if self.plain:
            self._op("residual", "F", stream, self._hidden_key("residual", "F"), site=j,
                     reads=[self._x(j), f"f{j}"], new=[made], dead=[f"f{j}"])  # fmt: skip
            return
        starts = {sites.start for sites in self._recompute_blocks()}
        dead = [self._x(j)] if self._recomputed and j not in starts else []
        self._op(f"{self._prefix}_post", "F", stream, self._mhc_key(f"{self._prefix}_post", "F"),
                 category="mhc", site=j, reads=[self._x(j), f"f{j}", f"coef{j}"], new=[made],
                 dead=dead)  # fmt: skip

    def _post_backward(self, j: int) -> str:
        """F_post,res(B): returns the name of the gradient of the sublayer's output."""
        if self.plain:
            return self._g(j + 1)
        stream = self.work.post_stream(is_ffn=j % SITES_PER_BLOCK == 1)
        self._op(f"{self._prefix}_post", "I", stream, self._mhc_key(f"{self._prefix}_post", "I"),
                 category="mhc", site=j,
                 reads=[self._g(j + 1), self._x_again(j), f"f{j}", f"coef{j}"],
                 new=[self._hidden(f"df{j}"), New(f"dcoef{j}", self._coefficient_bytes)],
                 dead=[f"f{j}"])  # fmt: skip
        return f"df{j}"

    def _pre_backward(self, j: int) -> None:
        """F_pre(B): the norm, then everything that adds up to the gradient of x{j}."""
        u = self._x(j) if self.plain else self._u(j)
        made = self._state(self._g(j))
        self._op("norm", "I", self.work.pre_stream, self._hidden_key("norm", "I"), site=j,
                 reads=[f"dh{j}", u], new=[self._hidden(f"du{j}")],
                 dead=[f"dh{j}", u])  # fmt: skip
        gradient = self._g(j + 1)
        if self.plain:
            self._op("residual", "I", COMPUTE, self._hidden_key("residual", "I"), site=j,
                     reads=[gradient, f"du{j}"], new=[made], dead=[gradient, f"du{j}"])  # fmt: skip
            return
        x = self._x_again(j)
        self._op(f"{self._prefix}_pre", "B", self.work.pre_stream, self._pre_key("B"),
                 category="mhc", site=j,
                 reads=[gradient, x, f"du{j}", f"coef{j}", f"dcoef{j}"], new=[made],
                 dead=[gradient, x, f"du{j}", f"coef{j}", f"dcoef{j}"])  # fmt: skip

    def _sublayer_backward(self, kind: str, key: OpKey, j: int, gradient: str) -> None:
        self._op(kind, "I", COMPUTE, key, site=j, reads=[gradient, f"keep{j}"],
                 new=[self._hidden(f"dh{j}"), self._defer(j, key)],
                 dead=[f"keep{j}", *([] if self.plain else [gradient])])  # fmt: skip

    def _weights(self, kind: str, key: OpKey, j: int, source: str) -> None:
        """W of a sublayer; the router still needs the input that shared experts read."""
        self._op(kind, "W", COMPUTE, key, site=j, reads=[source, f"defer{j}"],
                 dead=[source, f"defer{j}"])  # fmt: skip

    def _to_expert_order(self, pass_: str, j: int, sent: str, got: str, rows: str) -> str:
        """Regroup what other ranks sent by expert; with ep = 1 it already is."""
        if self.work.ep == 1:
            return sent if pass_ == "F" else rows
        self._op("regroup", pass_, COMPUTE, self._regroup_key(pass_), site=j, reads=[got],
                 new=[self._routed(rows)], dead=[sent, got])  # fmt: skip
        return rows

    def _transfer(self, kind: str, pass_: str, j: int, source: str, target: str) -> None:
        self._op(kind, pass_, EXPERT, self.work.expert_key, category="ep", site=j, reads=[source],
                 new=[self._routed(target, "communication")],
                 payload_bytes=self.work.routed_bytes)  # fmt: skip

    def _op(
        self,
        kind: str,
        pass_: str,
        stream: int,
        key: object,
        *,
        category: str = "compute",
        site: int = -1,
        name: str = "",
        reads: list[str] | None = None,
        new: list[New] | None = None,
        dead: list[str] | None = None,
        hop: int = 0,
        is_send: int = 0,
        payload_bytes: int = 0,
    ) -> None:
        self._builder.op(
            self.slot, kind, pass_, stream, key, category=category, site=site, name=name,
            reads=reads or (), new=new or (), dead=dead or (),
            hop=hop, is_send=is_send, payload_bytes=payload_bytes,
        )  # fmt: skip

    # -- names and sizes

    def _x(self, j: int) -> str:
        return OUT if j == self.shape.num_sites and not self.shape.last else f"x{j}"

    def _g(self, j: int) -> str:
        return GRAD_OUT if j == 0 and not self.shape.first else f"g{j}"

    def _again(self, name: str, j: int) -> str:
        return f"{name}r{j}" if self._recomputed else f"{name}{j}"

    def _x_again(self, j: int) -> str:
        """The state before site j as the backward finds it: stored, or recomputed."""
        stored = {sites.start for sites in self._recompute_blocks()}
        return self._x(j) if not self._recomputed or j in stored else f"xr{j}"

    def _u(self, j: int) -> str:
        return self._again("u", j)

    def _h(self, j: int) -> str:
        return self._again("h", j)

    def _rows(self, j: int) -> str:
        return f"rows{j}" if self.work.ep > 1 else f"sent{j}"

    def _if_recomputed(self, name: str) -> list[str]:
        return [name] if self._recomputed else []

    def _recompute_blocks(self) -> list[range]:
        """Sites of each recompute block of the stage; the last may be shorter."""
        size, sites = self.work.recompute_block, self.shape.num_sites
        if self.plain or size is None:
            return []
        return [range(start, min(start + size, sites)) for start in range(0, sites, size)]

    @staticmethod
    def _ffn_site(block: int) -> int:
        return SITES_PER_BLOCK * block + 1

    def _hidden(self, name: str, component: str = "activations") -> New:
        return New(name, self.work.hidden_bytes, component)

    def _state(self, name: str, component: str = "activations") -> New:
        return New(name, self.work.state_bytes, component)

    def _routed(self, name: str, component: str = "activations") -> New:
        return New(name, self.work.routed_bytes, component)

    def _keep(self, j: int, key: OpKey, name: str = "keep") -> New:
        return New(f"{name}{j}", VOCABULARY[key.kind].saved(dict(key.shape)))

    def _defer(self, j: int, key: OpKey, name: str = "defer") -> New:
        """What W needs beyond the sublayer's input, which stays where F left it."""
        shape = dict(key.shape)
        source = shape.get("rows", self.work.tokens) * self._model.hidden_size * BF16
        return New(f"{name}{j}", VOCABULARY[key.kind].deferred(shape) - source)

    @property
    def _coefficient_bytes(self) -> int:
        return coefficient_bytes(self.work.residual.expansion_rate, self.work.tokens)

    @property
    def _has_shared(self) -> bool:
        return self._model.moe is not None and self._model.moe.num_shared_experts > 0

    # -- cost keys

    @property
    def _attention(self) -> str:
        return f"attention_{self._model.attention.kind}"

    def _hidden_key(self, kind: str, pass_: str, **more: int) -> OpKey:
        hidden, tokens = self._model.hidden_size, self.work.tokens
        return op_key(kind, pass_, hidden=hidden, tokens=tokens, **more)

    def _mhc_key(self, kind: str, pass_: str, **more: int) -> OpKey:
        return self._hidden_key(kind, pass_, n=self.work.residual.expansion_rate, **more)

    def _pre_key(self, pass_: str) -> OpKey:
        if self._prefix == "hc":
            return self._mhc_key("hc_pre", pass_)
        return self._mhc_key("mhc_pre", pass_, steps=self.work.residual.sinkhorn_steps)

    def _recompute_key(self, sites: int) -> OpKey:
        return self._mhc_key("mhc_recompute", "R", sites=sites)

    def _attention_key(self, pass_: str) -> OpKey:
        a = self._model.attention
        more = {"seq": self.work.seq_len, "heads": a.num_heads}
        if isinstance(a, Mla):
            more |= {"nope": a.qk_nope_head_dim, "rope": a.qk_rope_head_dim, "v": a.v_head_dim,
                     "kv_rank": a.kv_lora_rank, "q_rank": a.q_lora_rank or 0}  # fmt: skip
        else:
            more |= {"kv_heads": a.num_kv_heads, "head_dim": a.head_dim}
        return self._hidden_key(self._attention, pass_, **more)

    def _ffn_key(self, kind: str, pass_: str) -> OpKey:
        moe = self._model.moe
        if kind == "shared_experts":
            assert moe is not None
            width = moe.num_shared_experts * moe.ffn_dim
        else:
            width = self._model.dense_ffn_dim or 0
        return self._hidden_key(kind, pass_, ffn=width)

    def _router_key(self, pass_: str) -> OpKey:
        moe = self._model.moe
        assert moe is not None
        return self._hidden_key("router", pass_, experts=moe.num_experts, top_k=moe.top_k)

    def _expert_key(self, pass_: str) -> OpKey:
        moe = self._model.moe
        assert moe is not None
        return op_key("experts", pass_, rows=self.work.tokens * moe.top_k,
                      hidden=self._model.hidden_size, ffn=moe.ffn_dim,
                      experts=moe.num_experts // self.work.ep)  # fmt: skip

    def _regroup_key(self, pass_: str) -> OpKey:
        moe = self._model.moe
        assert moe is not None
        rows = self.work.tokens * moe.top_k
        return op_key("regroup", pass_, rows=rows, hidden=self._model.hidden_size)

    def _unpermute_key(self, pass_: str) -> OpKey:
        moe = self._model.moe
        assert moe is not None
        return self._hidden_key("unpermute", pass_, top_k=moe.top_k)


def optimizer_bytes_per_parameter() -> int:
    """fp32 master and AdamW's two moments, sharded by ZeRO-1."""
    return 3 * FP32
