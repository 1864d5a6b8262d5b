"""What a chunk does: the ops of one stage for one microbatch, phase by phase.

A phase is what figure 4 of the paper (arXiv 2512.24880) draws as one box, or a few that always
follow each other. :mod:`mhcplan.planner.lowering.lower` puts phases in order; here each phase names
its ops, what they read and make, and what is dead after them.

Names of buffers, j a site of the stage (2k attention, 2k + 1 FFN of its block k), L its sites:

=============== ===================================================================================
x{j}, g{j}      state before site j ([tokens, n, C]) and its gradient; ``out`` is x{L} where it
                goes to the next stage, ``grad_out`` is g0 where it goes to the previous one
coef{j}         fp32 coefficients of site j, stored from F to I
u{j}, h{j}      H_pre x, and its norm: what the sublayer reads
f{j}            output of the sublayer
keep{j}, defer{j}  what the sublayer's F keeps for I, and I for W, beyond the above
sent, got, rows  MoE: permuted copies, dispatched, in expert order
back, ret       MoE: what experts made, in the order of its senders, and combined
=============== ===================================================================================

d in front of a name is its gradient, r behind it stands for recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mhcplan.planner.lowering.form import EXCHANGE, MESSAGE, Key, Size
from mhcplan.planner.lowering.kept import Kept
from mhcplan.profiles.specs import SITES_PER_BLOCK
from mhcplan.profiles.vocabulary import NO_COST
from mhcplan.sim.build import COMPUTE, EXPERT, GRAD_OUT, OUT, PIPE, New

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.planner.lowering.form import Form
    from mhcplan.planner.lowering.work import StageShape
    from mhcplan.sim.build import TemplateBuilder


class _Run(NamedTuple):
    """A sublayer's forward, or the same again before its backward: how its ops and buffers are
    marked."""

    pass_: str
    mark: str
    category: str
    component: str


_FIRST, _AGAIN = _Run("F", "", "compute", "activations"), _Run("R", "r", "recompute", "recompute")


class Chunk:
    """Emits the phases of one stage's chunk into the slot of a template."""

    branch_gradient = ""
    """Another gradient of the last hidden vectors than the output head's, by its buffer's name."""

    def __init__(self, form: Form, shape: StageShape, builder: TemplateBuilder, slot: int) -> None:
        self.form, self.shape, self.slot = form, shape, slot
        self.plain = form.is_plain
        self._builder = builder
        self._kept = Kept(form, shape)

    # -- boxes of figure 4, forward

    def enter(self) -> None:
        """First stage: embedding, and its copy to n rows."""
        if not self.shape.first:
            return
        key = Key("embedding", "F")
        if self.plain:
            self._op("embedding", "F", COMPUTE, key, new=[self._state("x0")])
            return
        self._op("embedding", "F", COMPUTE, key, new=[self._hidden("e")])
        self._op("mhc_expand", "F", COMPUTE, Key("mhc_expand", "F"), category="mhc",
                 reads=["e"], new=[self._state("x0")], dead=["e"])  # fmt: skip

    def attention_forward(self, block: int) -> None:
        """F_pre^A, ATTN, F_post,res^A."""
        j = SITES_PER_BLOCK * block
        self._pre_forward(j)
        self._sublayer(self._attention_key("F"), j, _FIRST)
        self._post_forward(j)

    def ffn_enter_forward(self, block: int) -> None:
        """F_pre^M, and in a MoE block the router, which permutes tokens into expert order."""
        j = self._ffn_site(block)
        self._pre_forward(j)
        if self.shape.moe[block]:
            self._route(j, _FIRST)

    def dispatch_forward(self, block: int) -> None:
        """DISPATCH(F)."""
        if self.shape.moe[block]:
            self._dispatch(self._ffn_site(block), _FIRST)

    def ffn_forward(self, block: int) -> None:
        """MLP(F): dense FFN, or shared experts (while the dispatch runs) and routed experts."""
        j = self._ffn_site(block)
        if self.shape.moe[block]:
            self._experts(j, _FIRST)
        else:
            self._sublayer(Key("dense_ffn", "F"), j, _FIRST)

    def combine_forward(self, block: int) -> None:
        """COMBINE(F)."""
        if self.shape.moe[block]:
            self._combine(self._ffn_site(block), _FIRST)

    def ffn_leave_forward(self, block: int) -> None:
        """F_post,res^M, with the weighted sum of what the experts returned before it."""
        j = self._ffn_site(block)
        if self.shape.moe[block]:
            shared = [f"s{j}"] if self._has_shared else []
            dead = [*shared, *([f"back{j}"] if self.form.exchanges else [])]
            self._op("unpermute", "F", self.form.post_stream(is_ffn=True),
                     Key("unpermute", "F"), site=j, reads=[f"ret{j}", f"route{j}", *shared],
                     new=[self._hidden(f"f{j}")],
                     dead=[*dead, *self._kept.dead_if_again(f"ret{j}", j)])  # fmt: skip
        self._post_forward(j)

    def leave(self) -> None:
        """Last stage: rows collapse to one, final norm, logits and loss."""
        if not self.shape.last:
            return
        last = self._kept.x(self.shape.num_sites)
        if not self.plain:
            self._op("mhc_collapse", "F", COMPUTE, Key("mhc_collapse", "F"),
                     category="mhc", reads=[last], new=[self._hidden("z")])  # fmt: skip
        z = last if self.plain else "z"
        self._op("norm", "F", COMPUTE, Key("norm", "F"), name="norm.F.head",
                 reads=[z], new=[self._hidden("hz")])  # fmt: skip
        key = Key("head", "F")
        self._op("head", "F", COMPUTE, key, reads=["hz"],
                 new=[New("dlogits", Size("saved", key), "logits")])  # fmt: skip

    # -- boxes of figure 4, backward

    def enter_backward(self) -> None:
        """Last stage: from the loss to the gradient of the last state."""
        if not self.shape.last:
            return
        sites = self.shape.num_sites
        key = Key("head", "I")
        self._op("head", "I", COMPUTE, key, reads=["dlogits"], new=[self._hidden("dhz")])
        z = self._kept.x(sites) if self.plain else "z"
        top = self._state(self._kept.g(sites))
        alone = not self.branch_gradient
        self._op("norm", "I", COMPUTE, Key("norm", "I"), name="norm.I.head",
                 reads=["dhz", z], new=[top if self.plain and alone else self._hidden("dz")],
                 dead=["dhz", z])  # fmt: skip
        gradient = "dz"
        if not alone:
            gradients = ["dz", self.branch_gradient]
            self._op("residual", "I", COMPUTE, Key("residual", "I"),
                     name="residual.I.head", reads=gradients, dead=gradients,
                     new=[top if self.plain else self._hidden("dz_sum")])  # fmt: skip
            gradient = "dz_sum"
        if not self.plain:
            last = self._kept.x(sites)
            self._op("mhc_collapse", "B", COMPUTE, Key("mhc_collapse", "B"),
                     category="mhc", reads=[gradient, last], new=[top],
                     dead=[gradient, last])  # fmt: skip

    def recompute(self, block: int, *, of_ffn: bool) -> None:
        """Rebuild what the backward of this sublayer is about to need and F did not keep: a
        recompute block of sites if the backward enters one, then what the sublayer itself kept.

        Only local data is read (paper 4.3.3), so it may run before the gradient arrives.
        """
        j = self._ffn_site(block) if of_ffn else SITES_PER_BLOCK * block
        for sites in self._kept.recompute_blocks():
            if sites[-1] == j:
                self._rebuild_states(sites)
        if not self._kept.runs_again(j):
            return
        if not self._kept.rebuilds_states:
            source = self._kept.x(j) if self.plain else f"u{j}"
            self._norm_again(j, COMPUTE, [source, *self._kept.arrived(j)])
        if not of_ffn:
            self._sublayer(self._attention_key("F"), j, _AGAIN)
        elif self.shape.moe[block]:
            self._route(j, _AGAIN)
            self._dispatch(j, _AGAIN)
            self._experts(j, _AGAIN)
            self._combine(j, _AGAIN)
        else:
            self._sublayer(Key("dense_ffn", "F"), j, _AGAIN)

    def ffn_leave_backward(self, block: int) -> None:
        """F_post,res^M(B), and the gradients of the weighted sum."""
        j = self._ffn_site(block)
        gradient = self._post_backward(j)
        if self.shape.moe[block]:
            made = f"dback{j}" if self.form.exchanges else f"dy{j}"
            returned = self._kept.left("ret", j)
            self._op("unpermute", "I", self.form.post_stream(is_ffn=True),
                     Key("unpermute", "I"), site=j, reads=[gradient, returned, f"route{j}"],
                     new=[self._routed(made)], dead=[returned])  # fmt: skip

    def combine_backward(self, block: int) -> None:
        """COMBINE(B): a dispatch-shaped all-to-all of gradients."""
        if self.form.exchanges and self.shape.moe[block]:
            j = self._ffn_site(block)
            self._transfer("combine", "I", j, f"dback{j}", f"dgot{j}")

    def ffn_backward(self, block: int) -> None:
        """MLP(B)."""
        j = self._ffn_site(block)
        gradient = self._kept.g(j + 1) if self.plain else f"df{j}"
        if not self.shape.moe[block]:
            self._sublayer_backward(Key("dense_ffn", "I"), j, gradient)
            return
        if self._has_shared:
            key = Key("shared_experts", "I")
            kept = self._kept.left("keep_shared", j)
            self._op("shared_experts", "I", COMPUTE, key, site=j, reads=[gradient, kept],
                     new=[self._hidden(f"dhs{j}"), self._defer(j, key, "defer_shared")],
                     dead=[kept])  # fmt: skip
        if not self.plain:
            self._bury(f"df{j}")
        rows = self._to_expert_order("I", j, f"dback{j}", f"dgot{j}", f"dy{j}")
        key = Key("experts", "I")
        made = f"drows{j}" if self.form.exchanges else f"dsent{j}"
        kept = self._kept.left("keep", j)
        self._op("experts", "I", COMPUTE, key, site=j, reads=[rows, kept],
                 new=[self._routed(made), self._defer(j, key)], dead=[rows, kept])  # fmt: skip
        if self.form.exchanges:
            self._op("regroup", "I", COMPUTE, Key("regroup", "I"), site=j,
                     name=f"regroup.I{j}.back", reads=[made], new=[self._routed(f"dout{j}")],
                     dead=[made])  # fmt: skip

    def dispatch_backward(self, block: int) -> None:
        """DISPATCH(B)."""
        if self.form.exchanges and self.shape.moe[block]:
            j = self._ffn_site(block)
            self._transfer("dispatch", "I", j, f"dout{j}", f"dsent{j}")

    def ffn_weights(self, block: int) -> None:
        """MLP(W)."""
        j = self._ffn_site(block)
        if not self.shape.moe[block]:
            self._weights(Key("dense_ffn", "W"), j, self._kept.h(j))
            return
        if self._has_shared:
            key = Key("shared_experts", "W")
            deferred = f"defer_shared{j}"
            self._op("shared_experts", "W", COMPUTE, key, site=j,
                     reads=[self._kept.h(j), deferred], dead=[deferred])  # fmt: skip
        self._weights(Key("experts", "W"), j, self._kept.rows(j))

    def ffn_enter_backward(self, block: int) -> None:
        """F_pre^M(B), in a MoE block behind the router's gradient."""
        j = self._ffn_site(block)
        if self.shape.moe[block]:
            key = Key("router", "I")
            shared = [f"dhs{j}"] if self._has_shared else []
            sent = [f"dout{j}"] if self.form.exchanges else []
            self._op("router", "I", COMPUTE, key, site=j,
                     reads=[f"dsent{j}", f"route{j}", *shared],
                     new=[self._hidden(f"dh{j}"), self._defer(j, key, "defer_route")],
                     dead=[f"dsent{j}", f"route{j}", *sent, *shared])  # fmt: skip
        self._pre_backward(j)

    def attention_backward(self, block: int) -> None:
        """F_post,res^A(B), ATTN(B), F_pre^A(B)."""
        j = SITES_PER_BLOCK * block
        gradient = self._post_backward(j)
        self._sublayer_backward(self._attention_key("I"), j, gradient)
        self._pre_backward(j)

    def attention_weights(self, block: int) -> None:
        """ATTN(W), behind the router's weights, which had to wait for DISPATCH(B)."""
        j = self._ffn_site(block)
        if self.shape.moe[block]:
            self._op("router", "W", COMPUTE, Key("router", "W"), site=j,
                     reads=[self._kept.h(j), f"defer_route{j}"],
                     dead=[self._kept.h(j), f"defer_route{j}"])  # fmt: skip
        a = SITES_PER_BLOCK * block
        self._weights(self._attention_key("W"), a, self._kept.h(a))

    def leave_backward(self) -> None:
        """First stage: n gradients of the embedding sum up to one."""
        if self.shape.first and not self.plain:
            self._op("mhc_expand", "I", COMPUTE, Key("mhc_expand", "I"), category="mhc",
                     reads=["g0"], new=[self._hidden("de")], dead=["g0"])  # fmt: skip

    def enter_weights(self) -> None:
        """Last stage: weight gradient of the head."""
        if self.shape.last:
            key = Key("head", "W")
            self._op("head", "W", COMPUTE, key, reads=["dlogits", "hz"], dead=["dlogits", "hz"])

    def leave_weights(self) -> None:
        """First stage: weight gradient of the embedding."""
        if self.shape.first:
            gradient = "g0" if self.plain else "de"
            key = Key("embedding", "W")
            self._op("embedding", "W", COMPUTE, key, reads=[gradient], dead=[gradient])

    # -- pipeline messages

    def receive(self, pass_: str) -> None:
        """Receive the state (F; it stays as the stage's stored input) or its gradient (I)."""
        size = Size("received")
        forward = New("x0", size), -1
        backward = New(self._kept.g(self.shape.num_sites), size, "communication"), 1
        new, hop = forward if pass_ == "F" else backward
        self._op("pp_recv", pass_, PIPE, MESSAGE, category="pp", new=[new], hop=hop)  # fmt: skip

    def await_message(self, pass_: str) -> None:
        """Let the compute stream wait for a receive before anything needs it."""
        name = "x0" if pass_ == "F" else self._kept.g(self.shape.num_sites)
        self._op("await", pass_, COMPUTE, NO_COST, reads=[name])

    def send(self, pass_: str) -> None:
        """Send the state (F) or its gradient (I); its buffer is dead once the send is done."""
        name, hop = (OUT, 1) if pass_ == "F" else (GRAD_OUT, -1)
        self._op("pp_send", pass_, PIPE, MESSAGE, category="pp", reads=[name],
                 dead=[name], hop=hop, is_send=1)  # fmt: skip

    # -- parts of the boxes

    def _pre_forward(self, j: int) -> None:
        source = self._kept.x(j)
        if not self.plain:
            new = [self._hidden(f"u{j}"), self._coefficients(f"coef{j}")]
            key = Key(self.form.pre_kind, "F")
            self._op(key.kind, "F", self.form.pre_stream, key, category="mhc", site=j,
                     reads=[source], new=new)  # fmt: skip
            source = f"u{j}"
        self._op("norm", "F", self.form.pre_stream, Key("norm", "F"), site=j,
                 reads=[source], new=[self._hidden(f"h{j}")],
                 dead=self._kept.dead_if_rebuilt(source))  # fmt: skip

    def _post_forward(self, j: int) -> None:
        stream = self.form.post_stream(is_ffn=j % SITES_PER_BLOCK == 1)
        made = self._state(self._kept.x(j + 1))
        if self.plain:
            self._op("residual", "F", stream, Key("residual", "F"), site=j,
                     reads=[self._kept.x(j), f"f{j}"], new=[made], dead=[f"f{j}"])  # fmt: skip
            return
        starts = {sites.start for sites in self._kept.recompute_blocks()}
        dead = [self._kept.x(j)] if self._kept.rebuilds_states and j not in starts else []
        key = Key(self.form.post_kind, "F")
        self._op(key.kind, "F", stream, key, category="mhc", site=j,
                 reads=[self._kept.x(j), f"f{j}", f"coef{j}"], new=[made], dead=dead)  # fmt: skip

    def _post_backward(self, j: int) -> str:
        """F_post,res(B): returns the name of the gradient of the sublayer's output."""
        if self.plain:
            return self._kept.g(j + 1)
        stream = self.form.post_stream(is_ffn=j % SITES_PER_BLOCK == 1)
        key = Key(self.form.post_kind, "I")
        self._op(key.kind, "I", stream, key, category="mhc", site=j,
                 reads=[self._kept.g(j + 1), self._kept.x_again(j), f"f{j}", f"coef{j}"],
                 new=[self._hidden(f"df{j}"), self._coefficients(f"dcoef{j}")],
                 dead=[f"f{j}"])  # fmt: skip
        return f"df{j}"

    def _pre_backward(self, j: int) -> None:
        """F_pre(B): the norm, then everything that adds up to the gradient of x{j}."""
        u = self._kept.x(j) if self.plain else self._kept.u(j)
        made = self._state(self._kept.g(j))
        self._op("norm", "I", self.form.pre_stream, Key("norm", "I"), site=j,
                 reads=[f"dh{j}", u], new=[self._hidden(f"du{j}")],
                 dead=[f"dh{j}", u])  # fmt: skip
        gradient = self._kept.g(j + 1)
        if self.plain:
            self._op("residual", "I", COMPUTE, Key("residual", "I"), site=j,
                     reads=[gradient, f"du{j}"], new=[made], dead=[gradient, f"du{j}"])  # fmt: skip
            return
        x = self._kept.x_again(j)
        key = Key(self.form.pre_kind, "B")
        self._op(key.kind, "B", self.form.pre_stream, key, category="mhc", site=j,
                 reads=[gradient, x, f"du{j}", f"coef{j}", f"dcoef{j}"], new=[made],
                 dead=[gradient, x, f"du{j}", f"coef{j}", f"dcoef{j}"])  # fmt: skip

    def _sublayer(self, key: Key, j: int, run: _Run) -> None:
        """F of attention or of a dense FFN."""
        made = [self._hidden(f"f{j}")] if run is _FIRST else []
        again = run is _AGAIN
        self._op(key.kind, run.pass_, COMPUTE, key, category=run.category, site=j,
                 reads=[self._kept.source(j, again=again)],
                 new=[*made, *self._keep_in(run, j, key)],
                 dead=self._kept.dead_source(j, again=again))  # fmt: skip

    def _sublayer_backward(self, key: Key, j: int, gradient: str) -> None:
        kept = self._kept.left("keep", j)
        self._op(key.kind, "I", COMPUTE, key, site=j, reads=[gradient, kept],
                 new=[self._hidden(f"dh{j}"), self._defer(j, key)],
                 dead=[kept, *([] if self.plain else [gradient])])  # fmt: skip

    def _weights(self, key: Key, j: int, source: str) -> None:
        """W of a sublayer; the router still needs the input that shared experts read."""
        self._op(key.kind, "W", COMPUTE, key, site=j, reads=[source, f"defer{j}"],
                 dead=[source, f"defer{j}"])  # fmt: skip

    def _route(self, j: int, run: _Run) -> None:
        """The router; run again it follows the routes it kept."""
        key = Key("router", "F")
        routes = [self._keep(j, key, "route")] if run is _FIRST else []
        follow = [] if run is _FIRST else [f"route{j}"]
        self._op("router", run.pass_, COMPUTE, key, category=run.category, site=j,
                 reads=[self._kept.source(j, again=run is _AGAIN), *follow],
                 new=[self._routed(f"sent{run.mark}{j}", run.component), *routes])  # fmt: skip

    def _dispatch(self, j: int, run: _Run) -> None:
        if self.form.exchanges:
            self._transfer("dispatch", run.pass_, j, f"sent{run.mark}{j}", f"got{run.mark}{j}")

    def _experts(self, j: int, run: _Run) -> None:
        """Shared experts, then the routed ones on what was dispatched."""
        mark, category = run.mark, run.category
        if self._has_shared:
            key = Key("shared_experts", "F")
            made = [self._hidden(f"s{j}")] if run is _FIRST else []
            self._op("shared_experts", run.pass_, COMPUTE, key, category=category, site=j,
                     reads=[self._kept.source(j, again=run is _AGAIN)],
                     new=[*made, *self._keep_in(run, j, key, "keep_shared")])  # fmt: skip
        self._bury(*self._kept.dead_source(j, again=run is _AGAIN))
        rows = self._to_expert_order(
            run.pass_, j, f"sent{mark}{j}", f"got{mark}{j}", f"rows{mark}{j}", run.component
        )
        key = Key("experts", "F")
        returned = f"ret{mark}{j}"
        made = f"y{mark}{j}" if self.form.exchanges else returned
        dead = self._kept.dead_if_again(rows, j) if run is _FIRST else []
        self._op("experts", run.pass_, COMPUTE, key, category=category, site=j, reads=[rows],
                 new=[self._routed(made, run.component), *self._keep_in(run, j, key)],
                 dead=dead)  # fmt: skip
        if self.form.exchanges:
            self._op("regroup", run.pass_, COMPUTE, Key("regroup", "F"), category=category,
                     site=j, name=f"regroup.{run.pass_}{j}.back", reads=[made],
                     new=[self._routed(f"back{mark}{j}", run.component)], dead=[made])  # fmt: skip

    def _combine(self, j: int, run: _Run) -> None:
        if self.form.exchanges:
            dead = [] if run is _FIRST else [f"back{run.mark}{j}"]  # unpermute frees the first
            back, returned = f"back{run.mark}{j}", f"ret{run.mark}{j}"
            self._transfer("combine", run.pass_, j, back, returned, dead)

    def _to_expert_order(
        self, pass_: str, j: int, sent: str, got: str, rows: str, component: str = "activations"
    ) -> str:
        """Regroup what other ranks sent by expert; with ep = 1 it already is."""
        if not self.form.exchanges:
            return rows if pass_ == "I" else sent
        category = "recompute" if pass_ == "R" else "compute"
        key = Key("regroup", "I" if pass_ == "I" else "F")
        self._op("regroup", pass_, COMPUTE, key, category=category, site=j, reads=[got],
                 new=[self._routed(rows, component)], dead=[sent, got])  # fmt: skip
        return rows

    def _rebuild_states(self, sites: range) -> None:
        """A recompute block of mHC: the states before its sites, and what the sublayers read."""
        stored = self._kept.x(sites.start)
        reads = [stored, *(f"coef{j}" for j in sites), *(f"f{j}" for j in sites[:-1])]
        reads += self._kept.arrived(sites[-1])
        made = [self._hidden(f"ur{j}", "recompute") for j in sites]
        made += [self._state(f"xr{j}", "recompute") for j in sites[1:]]
        stream = self.form.recompute_stream
        key = Key("mhc_recompute", "R", sites=len(sites))
        self._op("mhc_recompute", "R", stream, key, category="recompute", site=sites[-1],
                 reads=reads, new=made)  # fmt: skip
        for j in sites:
            self._norm_again(j, stream, [f"ur{j}"])

    def _norm_again(self, j: int, stream: int, reads: list[str]) -> None:
        self._op("norm", "R", stream, Key("norm", "R"), category="recompute",
                 site=j, reads=reads, new=[self._hidden(f"hr{j}", "recompute")])  # fmt: skip

    def _transfer(
        self, kind: str, pass_: str, j: int, source: str, target: str, dead: Sequence[str] = ()
    ) -> None:
        self._op(kind, pass_, EXPERT, EXCHANGE, category="ep", site=j, reads=[source],
                 new=[self._routed(target, "communication")], dead=dead)  # fmt: skip

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
        reads: Sequence[str] = (),
        new: Sequence[New] = (),
        dead: Sequence[str] = (),
        hop: int = 0,
        is_send: int = 0,
    ) -> None:
        self._builder.op(
            self.slot, kind, pass_, stream, key, category=category, site=site, name=name,
            reads=reads, new=new, dead=dead,
            hop=hop, is_send=is_send,
        )  # fmt: skip

    def _bury(self, *buffers: str) -> None:
        """Buffers whose last use has been issued, but on more than the last op's stream."""
        self._builder.states[self.slot].pending += buffers

    # -- sizes

    @staticmethod
    def _ffn_site(block: int) -> int:
        return SITES_PER_BLOCK * block + 1

    def _hidden(self, name: str, component: str = "activations") -> New:
        return New(name, Size("hidden"), component)

    def _state(self, name: str, component: str = "activations") -> New:
        return New(name, Size("state"), component)

    def _routed(self, name: str, component: str = "activations") -> New:
        return New(name, Size("routed"), component)

    def _keep(self, j: int, key: Key, name: str = "keep") -> New:
        return New(f"{name}{j}", Size("saved", key))

    def _keep_in(self, run: _Run, j: int, key: Key, name: str = "keep") -> list[New]:
        """What F keeps for I, in the run that the backward finds it from."""
        if self._kept.runs_again(j) and run is _FIRST:
            return []
        kept = self._keep(j, key, f"{name}{run.mark}")
        return [kept._replace(component=run.component)]

    def _defer(self, j: int, key: Key, name: str = "defer") -> New:
        """What W needs beyond the sublayer's input, which stays where F left it."""
        return New(f"{name}{j}", Size("deferred", key))

    def _coefficients(self, name: str) -> New:
        return New(name, Size("coefficients"))

    @property
    def _has_shared(self) -> bool:
        return self.form.shared_experts

    def _attention_key(self, pass_: str) -> Key:
        return Key(f"attention_{self.form.attention}", pass_)
