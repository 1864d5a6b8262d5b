"""Pricing the ops and transfers of a step from a profile: measured, else derived, else refused.

How an op that was not measured at its shape is priced is in :mod:`mhcplan.profiles.op_costs`, how a
transfer is in :mod:`mhcplan.profiles.transfer_costs`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from mhcplan.profiles.costs import Cost, CostMissing, cost_table, in_graph
from mhcplan.profiles.derive import with_network
from mhcplan.profiles.loads import LoadModel
from mhcplan.profiles.op_costs import (
    OpCosts,
    deferred_bytes,
    measure_command,
    saved_bytes,
    scale_segments,
)
from mhcplan.profiles.op_fit import ALIKE, Roofline
from mhcplan.profiles.transfer_costs import TransferCosts
from mhcplan.profiles.vocabulary import VOCABULARY, OpKey, TransferKey, op_key, parse_key
from mhcplan.sim.kept import Kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.profiles.loads import GpuSettings
    from mhcplan.profiles.schema import OpTiming, Profile
    from mhcplan.sim.program import CostTable

# Kinds that run the very kernels of another, which is what they cost where they have no rows.
_SAME_KERNELS = {"hc_post": "mhc_post"}

# Kinds that a profile may lack, the kind that is priced in their place, and why that is fair.
_PAPER = "arXiv 2512.24880"
_STAND_IN = {
    "hc_pre": ("mhc_pre", f"the same bytes, without Sinkhorn steps ({_PAPER}, equations 3, 5, 7)"),
    "identity_pre": ("mhc_pre", f"the same scan for 2n coefficients, no Sinkhorn ({_PAPER})"),
    "identity_post": ("mhc_post", "the same scan; its backward has no gradient of H_res"),
    "lite_pre": ("mhc_pre", "the same scan for 2n + n! logits, a softmax for the Sinkhorn"
                 " (arXiv 2601.05732)"),
    "single_pre": ("mhc_pre", "F writes u alone, as the scan of F_post,res makes it (arXiv"
                   " 2609.19969); backward as mHC's"),
    "experts_skewed": ("experts", "the same rows and weights, shared evenly among the experts"),
    "mhc_collapse": ("mhc_pre", f"a site's projection and pre-apply ({_PAPER}, equations 14-17)"
                     " with n outputs, as in DeepSeek-V4's hc_head"),
}  # fmt: skip


_MODELS_KEPT = 4


def cost_model_of(profile: Profile) -> CostModel:
    """Prices under a profile; those of the last few profiles are kept, as are their answers.

    Raises:
        ProfileError: the profile lacks a rate that the roofline needs.
    """
    return _models.find(profile.digest, lambda: CostModel(profile))


class CostModel:
    """Prices the ops and transfers of a step on the machine of ``profile``.

    Answers are cached: equal keys cost a dictionary look-up.
    """

    def __init__(self, profile: Profile) -> None:
        """Index ``profile``.

        Raises:
            ProfileError: the profile lacks a rate that the roofline needs.
        """
        self.profile = profile
        self._roofline = Roofline(profile)
        rows: defaultdict[tuple[str, str], list[tuple[OpKey, OpTiming]]] = defaultdict(list)
        for row in profile.ops:
            key = row.key
            rows[key.kind, key.pass_].append((key, row))
        self._rows = dict(rows)
        self._tables: dict[tuple[str, str], OpCosts] = {}
        self._transfers = TransferCosts(profile)
        self._loads = LoadModel(profile)
        self._cache: dict[OpKey | TransferKey, Cost] = {}
        self._networks: Kept[CostModel] = Kept(_MODELS_KEPT)

    def with_network(self, speed: float) -> CostModel:
        """Prices where the network between nodes has ``speed`` times the bandwidth.

        Those of the last few speeds are kept.
        """
        if speed == 1:
            return self
        return self._networks.find(speed, lambda: CostModel(with_network(self.profile, speed)))

    def op(self, key: OpKey) -> Cost:
        """Cost of an op.

        Raises:
            CostMissing: its kind was not measured, or only more than 4x away on some axis.
        """
        cost = self._cache.get(key)
        if cost is None:
            cost = self._cache[key] = self._price(key)
        return cost

    def transfer(self, key: TransferKey) -> Cost:
        """Cost of a transfer; see :class:`mhcplan.profiles.transfer_costs.TransferCosts`.

        Raises:
            CostMissing: its pattern was not measured, or only on far smaller or larger groups.
        """
        cost = self._cache.get(key)
        if cost is None:
            cost = self._cache[key] = self._transfers.price(key)
        return cost

    def costs(self, cost_keys: Sequence[str], gpu: GpuSettings | None = None) -> tuple[Cost, ...]:
        """Costs of a Program's ``cost_keys``, in order.

        Args:
            cost_keys: to be priced.
            gpu: how the plan uses the GPUs, where contention is to be played; None: undisturbed.

        Raises:
            CostMissing: see :meth:`op` and :meth:`transfer`.
            ValueError: a text is no key of this vocabulary.
        """
        costs = [self._cost(parse_key(text)) for text in cost_keys]
        if gpu is not None and (gpu.comm_ctas is not None or gpu.attention == "preemptible"):
            for i, key in enumerate(map(parse_key, cost_keys)):
                if isinstance(key, OpKey) and gpu.attention == "preemptible":
                    costs[i] = self._loads.preemptible(costs[i])
                if isinstance(key, TransferKey) and gpu.comm_ctas is not None:
                    costs[i] = self._loads.with_ctas(key, costs[i], gpu.comm_ctas)
        return tuple(costs)

    def table(
        self,
        cost_keys: Sequence[str],
        gpu: GpuSettings | None = None,
        graphs_begun: Sequence[float] | None = None,
    ) -> CostTable:
        """The engine's table of a Program's ``cost_keys``; arguments, errors as :meth:`costs`.

        ``graphs_begun``: where the step runs as CUDA graphs, how many begin with an op of each key,
        on the average; None: hosts issue it.
        """
        costs = self.costs(cost_keys, gpu)
        if graphs_begun is not None:
            overheads = self.profile.overheads
            costs = [
                in_graph(cost, overheads, begun)
                for cost, begun in zip(costs, graphs_begun, strict=True)
            ]
        table = cost_table(costs, self.profile.overheads)
        if gpu is None:
            return table
        keys = [parse_key(text) for text in cost_keys]
        return replace(table, loads=self._loads.loads(keys, costs, gpu))

    def _cost(self, key: OpKey | TransferKey | None) -> Cost:
        if key is None:  # nothing runs; the host makes a stream wait
            host_ns = self.profile.overheads.event_wait_ns
            return Cost(0, host_ns, self.profile.overheads.source, "an event, no kernel")
        return self.op(key) if isinstance(key, OpKey) else self.transfer(key)

    def _price(self, key: OpKey) -> Cost:
        table = self._table(key)
        if table is not None:
            return table.price(key)
        if key.kind in _SAME_KERNELS:
            kind = _SAME_KERNELS[key.kind]
            cost = self.op(op_key(kind, key.pass_, **dict(key.shape)))
            return replace(cost, explanation=f"{key.kind} runs {kind}: {cost.explanation}")
        if key.kind in _STAND_IN:
            return self._stand_in(key)
        raise CostMissing(
            f"profile {self.profile.name}: {key.kind}.{key.pass_} was not measured;"
            f" {measure_command(key)}"
        )

    def _table(self, key: OpKey) -> OpCosts | None:
        """Rows of the key's kind and pass, if there are any."""
        name = key.kind, key.pass_
        if name not in self._tables:
            rows = self._rows.get(name)
            if rows is None:
                return None
            kinds = ALIKE.get(key.kind, (key.kind,))
            alike = [row for kind in kinds for row in self._rows.get((kind, key.pass_), ())]
            self._tables[name] = OpCosts(rows, alike, self._roofline, self.profile.name)
        return self._tables[name]

    def _stand_in(self, key: OpKey) -> Cost:
        """Price an unmeasured kind as another one that does the same, by the ratio of rooflines."""
        kind, reason = _STAND_IN[key.kind]
        shape = {axis: size for axis, size in key.shape if axis in VOCABULARY[kind].axes}
        how = ""
        if "steps" in set(VOCABULARY[kind].axes) - set(shape):
            measured = self._rows.get((kind, key.pass_), [])
            # the fewest steps measured: these kinds have none
            shape["steps"] = min((row.shape["steps"] for _, row in measured), default=1)
            how = f", {shape['steps']} Sinkhorn steps"
        other = op_key(kind, key.pass_, **shape)
        cost = self.op(other)
        work = self._roofline(key) / self._roofline(other)
        duration_ns = max(round(cost.duration_ns * work), 1)
        return replace(
            cost,
            duration_ns=duration_ns,
            source="assumed",
            explanation=f"{key.kind} was not measured: priced as {kind} ({cost.source}{how}) by"
            f" roofline: {reason}",
            segments=scale_segments(cost.segments, duration_ns / cost.duration_ns, work),
            workspace_bytes=round(cost.workspace_bytes * work),
            saved_bytes=saved_bytes(key),
            deferred_bytes=deferred_bytes(key),
        )


_models: Kept[CostModel] = Kept(_MODELS_KEPT)
