"""What every op of a Program computes for the shipped transformer.

A table from (op kind, pass) to a method that binds one op: it looks up the stage's module once and
returns a callable of buffers. Buffers hold what :mod:`mhcplan.planner.lowering.chunks` says;
bundles are

* ``coef``: coefficients and projection of a site;
* ``keep``, ``defer``: what the sublayer's F left for I, and I for W, less its input, which W reads
  from the buffer where it lies or was recomputed;
* ``route``: weights, slot and ends of the router's choice, then what its I needs.

Small tensors that the Program does not count ride on a buffer that lives as long: 1/rms of a norm
on its site's coefficients (plain residual and the head: on the norm's input), the gradient of the
routing weights on ``route``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from mhcplan.runtime.executor import Attachments, Bound, TensorLayout
from mhcplan.runtime.routes import forced_routes
from mhcplan.runtime.spec import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mhcplan.runtime.collectives import StageReduction
    from mhcplan.runtime.data import Batches
    from mhcplan.runtime.executor import Layout
    from mhcplan.runtime.groups import Handle
    from mhcplan.runtime.model import Stage
    from mhcplan.runtime.routes import Routes
    from mhcplan.runtime.spec import RunSpec
    from mhcplan.sim.program import Op

Values = list[Any]


class ModelBinding:
    """Binds ops to the stages of the shipped transformer; see the module's docstring."""

    def __init__(
        self,
        spec: RunSpec,
        stages: Mapping[int, Stage],
        batches: Batches,
        reductions: Mapping[int, StageReduction],
        experts: Handle | None,
        ops: Sequence[Op],
    ) -> None:
        """Prepare to bind ``ops``, a rank's, in order.

        Args:
            spec: the run.
            stages: modules of the stages that the rank holds.
            batches: where inputs come from and losses go.
            reductions: by stage, who reduces gradients and gathers weights.
            experts: group in which dispatch and combine run; None with ep = 1.
            ops: needed to find buffers that an op uses but does not list.
        """
        self.spec, self.stages, self.batches = spec, stages, batches
        self.reductions, self._experts = reductions, experts
        hidden, dtype = spec.model.hidden_size, spec.dtype
        self._hidden: Layout = (TensorLayout((spec.tokens, hidden), dtype),)
        self._state: Layout = (TensorLayout(spec.state_shape, dtype),)
        index = experts.index if experts else 0
        self._routes = forced_routes(spec, index, batches.inputs.device)
        self._coef = _written(ops, ("mhc_pre", "hc_pre"), position=1)
        self._route = _written(ops, ("router",), position=1)
        self._regroups: Counter[tuple[object, ...]] = Counter()

    def bind(self, op: Op, attached: Attachments) -> Bound | None:
        """The callable of an op.

        Raises:
            RunError: this model has no such op.
        """
        if op.kind in ("release", "await"):
            return None
        if op.kind in ("pp_send", "pp_recv"):
            return Bound(lambda *_: [], (self._state,))
        kind = op.kind.removeprefix("mhc_").removeprefix("hc_")
        kind = "attention" if kind.startswith("attention_") else kind
        make = getattr(self, f"_{kind}_{op.pass_.lower()}", None)
        if make is None:
            raise RunError(f"op {op.index}: the model has no {op.kind} in pass {op.pass_}")
        return make(op, attached)

    def _op(self, op: Op) -> Any:  # noqa: ANN401 - ops differ in their arguments
        return self.stages[op.stage].op(op.kind, op.site)

    # -- ends of the model

    def _embedding_f(self, op: Op, _: Attachments) -> Bound:
        module, ids = self._op(op), self.batches.inputs[op.microbatch]
        return Bound(lambda _i, _o: module.forward(ids)[0])

    def _embedding_w(self, op: Op, _: Attachments) -> Bound:
        module, ids = self._op(op), self.batches.inputs[op.microbatch]

        def run(i: Values, _o: Values) -> Values:
            module.backward_weight((ids, i[0]))
            return []

        return Bound(run)

    def _expand_f(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)
        return Bound(lambda i, _o: module.forward(i[0])[0])

    def _expand_i(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)
        return Bound(lambda i, _o: module.backward_input((), i[0])[0])

    def _collapse_f(self, op: Op, attached: Attachments) -> Bound:
        module, home = self._op(op), op.reads[0]

        def run(i: Values, _o: Values) -> Sequence[Any]:
            outputs, (_, *coefficients) = module.forward(i[0])
            attached.put(home, "exit", tuple(coefficients))
            return outputs

        return Bound(run)

    def _collapse_b(self, op: Op, attached: Attachments) -> Bound:
        module, home = self._op(op), op.reads[1]
        return Bound(lambda i, _o: module.backward((i[1], *attached.get(home, "exit")), i[0]))

    def _head_f(self, op: Op, _: Attachments) -> Bound:
        module, b = self._op(op), op.microbatch
        targets, loss = self.batches.targets[b], self.batches.losses[b]

        def run(i: Values, _o: Values) -> Values:
            (losses,), (_, dlogits) = module.forward(i[0], targets)
            torch.mean(losses.to(loss.dtype), 0, out=loss)
            return [dlogits]

        return Bound(run)

    def _head_i(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)
        return Bound(lambda i, _o: module.backward_input((None, i[0]))[0][:1])

    def _head_w(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)

        def run(i: Values, _o: Values) -> Values:
            module.backward_weight((i[1], i[0]))
            return []

        return Bound(run)

    # -- norms: 1/rms rides on `home`

    def _home(self, op: Op, source: int) -> int:
        return self._coef.get((op.stage, op.site, op.microbatch), source)

    def _norm_f(self, op: Op, attached: Attachments) -> Bound:
        module, home = self._op(op), self._home(op, op.reads[0])
        rstd = TensorLayout((self.spec.tokens,), _wide(self.spec.dtype))

        def run(i: Values, o: Values) -> Values:
            (y,), (_, rstd) = module.forward(i[0], out=o[0])
            attached.put(home, "rstd", rstd)
            return [y]

        return Bound(run, ((*self._hidden, rstd),))

    def _norm_r(self, op: Op, attached: Attachments) -> Bound:
        module, home = self._op(op), self._home(op, op.reads[0])

        def run(i: Values, o: Values) -> Sequence[Any]:
            return module.recompute((i[0], attached.get(home, "rstd")), out=o[0])

        return Bound(run, (self._hidden,))

    def _norm_i(self, op: Op, attached: Attachments) -> Bound:
        module, home = self._op(op), self._home(op, op.reads[1])

        def run(i: Values, o: Values) -> Sequence[Any]:
            saved = (i[1], attached.get(home, "rstd"))
            return module.backward_input(saved, i[0], out=o[0])[0]

        return Bound(run, (self._hidden,))

    # -- residuals

    def _residual_f(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)
        return Bound(lambda i, o: module.forward(*i, out=o[0])[0], (self._state,))

    def _residual_i(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)
        return Bound(lambda i, _o: module.backward_input((), *i)[0][:1])

    def _pre_f(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)

        def run(i: Values, o: Values) -> Values:
            out = None if o[0] is None else (o[0], *as_tuple(o[1]))
            (u, _), (_, *coefficients) = module.forward(i[0], out=out)
            return [u, tuple(coefficients)]

        return Bound(run, (self._hidden, self._coefficients))

    def _pre_b(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)

        def run(i: Values, o: Values) -> Sequence[Any]:
            dy, x, du, coefficients, dmix = i
            return module.backward((x, *coefficients), dy, du, dmix, out=o[0])

        return Bound(run, (self._state,))

    def _post_f(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)
        return Bound(lambda i, o: module.forward(i[0], i[1], i[2][0], out=o[0])[0], (self._state,))

    def _post_i(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)

        def run(i: Values, o: Values) -> Sequence[Any]:
            dy, x, f, coefficients = i
            out = None if o[0] is None else (o[0], o[1])
            return module.backward_input((x, f, coefficients[0]), dy, out=out)[0][1:]

        return Bound(run, (self._hidden, self._coefficients[:1]))

    def _recompute_r(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)
        sites = (len(op.writes) + 1) // 2
        layouts = (self._hidden,) * sites + (self._state,) * (sites - 1)

        def run(i: Values, o: Values) -> Sequence[Any]:
            x, coefficients, fs = i[0], i[1 : 1 + sites], i[1 + sites : 2 * sites]
            saved = (x, *fs, *(mix[0] for mix in coefficients))
            return module.recompute(saved, out=None if o[0] is None else o)

        return Bound(run, layouts)

    @property
    def _coefficients(self) -> Layout:
        """Coefficients and what they are made of."""
        tokens, residual, wide = self.spec.tokens, self.spec.residual, _wide(self.spec.dtype)
        m, n = residual.num_coefficients, residual.expansion_rate
        made_of = (tokens, n, n + 3) if residual.kind == "hc" else (tokens, m + 1)
        return TensorLayout((tokens, m), wide), TensorLayout(made_of, wide)

    # -- sublayers: bundles leave their input out

    def _sublayer_f(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)

        def run(i: Values, _o: Values) -> Values:
            (y,), (_, *keep) = module.forward(i[0])
            return [y, tuple(keep)]

        return Bound(run)

    def _sublayer_i(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)

        def run(i: Values, _o: Values) -> Values:
            (dx, *_), (_, *defer) = module.backward_input((None, *i[1]), i[0])
            return [dx, tuple(defer)]

        return Bound(run)

    def _sublayer_w(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)

        def run(i: Values, _o: Values) -> Values:
            module.backward_weight((i[0], *i[1]))
            return []

        return Bound(run)

    _attention_f = _dense_ffn_f = _shared_experts_f = _sublayer_f
    _attention_i = _dense_ffn_i = _shared_experts_i = _experts_i = _sublayer_i
    _attention_w = _dense_ffn_w = _shared_experts_w = _experts_w = _router_w = _sublayer_w

    # -- mixture of experts

    @property
    def _fixed(self) -> Routes:
        assert self._routes is not None
        return self._routes

    def _router_f(self, op: Op, attached: Attachments) -> Bound:
        module, home = self._op(op), op.writes[1]

        def run(i: Values, _o: Values) -> Values:
            (rows, weights, slot, ends), (_, logits, expert, _) = module.forward(i[0])
            attached.put(home, "ends", ends)
            return [rows, (weights, slot, logits, expert)]

        return Bound(run)

    def _router_i(self, op: Op, attached: Attachments) -> Bound:
        module, home = self._op(op), op.reads[1]

        def run(i: Values, _o: Values) -> Values:
            _, slot, logits, expert = i[1]
            shared = i[2] if len(i) > 2 else None
            dweights = attached.get(home, "dweights")
            (dx,), (_, *defer) = module.backward_input(
                (None, logits, expert, slot), i[0], dweights, shared
            )
            return [dx, tuple(defer)]

        return Bound(run)

    def _experts_f(self, op: Op, attached: Attachments) -> Bound:
        module = self._op(op)
        route = self._route[op.stage, op.site, op.microbatch]
        fixed = self._fixed.ends if self.spec.ep > 1 else None

        def run(i: Values, _o: Values) -> Values:
            ends = attached.get(route, "ends") if fixed is None else fixed
            (y,), (_, *keep) = module.forward(i[0], ends)
            return [y, tuple(keep)]

        return Bound(run)

    def _unpermute_f(self, op: Op, _: Attachments) -> Bound:
        module = self._op(op)

        def run(i: Values, o: Values) -> Sequence[Any]:
            rows, (weights, slot, *_), *shared = i
            return module.forward(rows, weights, slot, *shared, out=o[0])[0]

        return Bound(run, (self._hidden,))

    def _unpermute_i(self, op: Op, attached: Attachments) -> Bound:
        module, route = self._op(op), op.reads[2]
        moe = self.spec.model.moe
        assert moe is not None
        weights = TensorLayout((self.spec.tokens, moe.top_k), _wide(self.spec.dtype))

        def run(i: Values, o: Values) -> Values:
            dy, rows, (weights, slot, *_) = i
            drows, dweights, *_ = module.backward_input((rows, weights, slot), dy, out=o[0])[0]
            attached.put(route, "dweights", dweights)
            return [drows]

        return Bound(run, ((*self._fixed.sent, weights),))

    def _regroup_f(self, op: Op, _: Attachments) -> Bound:
        """The first of a site and pass brings rows into expert order, the second back."""
        module, index = self._op(op), self._fixed.index
        key = (op.stage, op.site, op.microbatch, op.pass_)
        self._regroups[key] += 1
        if self._regroups[key] == 1:
            return Bound(lambda i, _o: module.forward(i[0], index)[0])
        return Bound(lambda i, _o: module.backward_input((index,), i[0])[0][:1])

    _regroup_i = _regroup_f

    def _dispatch_f(self, op: Op, _: Attachments) -> Bound:
        return self._exchange(to_experts=True)

    def _combine_f(self, op: Op, _: Attachments) -> Bound:
        return self._exchange(to_experts=False)

    _combine_i, _dispatch_i = _dispatch_f, _combine_f

    def _exchange(self, *, to_experts: bool) -> Bound:
        """An all-to-all of token copies to the ranks of their experts, or back."""
        assert self._experts is not None
        group, routes = self._experts.group, self._fixed
        splits = (routes.received, routes.given) if to_experts else (routes.given, routes.received)

        def run(i: Values, o: Values) -> Values:
            work = torch.distributed.all_to_all_single(o[0], i[0], *splits, group, async_op=True)
            return [work]

        return Bound(run, (routes.got if to_experts else routes.sent,))

    # -- once a step

    def _grad_reduce_o(self, op: Op, _: Attachments) -> Bound:
        reduction = self.reductions[op.stage]
        return Bound(lambda _i, _o: reduction.reduce(op.group))

    def _param_gather_o(self, op: Op, _: Attachments) -> Bound:
        reduction = self.reductions[op.stage]
        return Bound(lambda _i, _o: reduction.gather(op.group))

    def _adamw_o(self, _op: Op, _: Attachments) -> Bound:
        return self._each_section(lambda section: section.adamw.step())

    def _zero_gradients_o(self, _op: Op, _: Attachments) -> Bound:
        return self._each_section(lambda section: section.grad.zero_())

    def _each_section(self, act: Callable[[Any], object]) -> Bound:
        sections = [s for stage in self.stages.values() for s in stage.parameters.all_sections()]

        def run(_i: Values, _o: Values) -> Values:
            for section in sections:
                act(section)
            return []

        return Bound(run)


def _written(
    ops: Sequence[Op], kinds: Sequence[str], position: int
) -> dict[tuple[int, int, int], int]:
    """The buffer that each site's F of a kind writes at ``position``."""
    return {
        (op.stage, op.site, op.microbatch): op.writes[position]
        for op in ops
        if op.kind in kinds and op.pass_ == "F"
    }


def as_tuple(value: Any) -> tuple[Any, ...]:  # noqa: ANN401 - a buffer's value
    """The tensors of a buffer's value."""
    return value if isinstance(value, tuple) else (value,)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
