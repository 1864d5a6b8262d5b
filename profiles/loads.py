"""What the ops of a step put on a GPU: kernels and traffic, from a profile's measurements.

An op's kernels were measured with it: CTAs, CTAs per SM, whether they stay to the kernel's end, and
the op's memory traffic. What a launch does not show (pieces of work, tails) and how traffic behaves
beside kernels is the profile's contention model, fitted to overlapped pairs. Two things are
assumed, and :func:`assumptions` says so:

* Which kernel of an op moves its bytes: those of very many short CTAs, which wait for memory, take
  nearly all the bandwidth there is while they run, and the others share the rest by their time. A
  matrix product moves each of its operands at least once.
* How many SMs a collective takes that was not overlapped: as many as the profile's row for it says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from mhcplan.profiles.contention import chain_ns
from mhcplan.profiles.costs import worst
from mhcplan.profiles.products import cluster_of, products_of
from mhcplan.profiles.schema import ProfileError
from mhcplan.profiles.transfer_costs import traffic_factor
from mhcplan.profiles.vocabulary import OpKey, TransferKey
from mhcplan.sim.device_kernels import Kernel, Loads, Parameters, Traffic

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from mhcplan.profiles.costs import Cost
    from mhcplan.profiles.products import Product
    from mhcplan.profiles.schema import (
        ContentionModel,
        CtasBySize,
        KernelTrait,
        Profile,
        Segment,
        TrafficTrait,
    )

Attention = Literal["persistent", "preemptible"]

SHORT_NS = 3_000  # memsets and the like: counted as gaps between kernels
_STREAMING_CTAS_PER_SM = 4  # kernels of at least so many small CTAs wait for memory ...
_STREAMING_WAVES = 2  # ... if there are more of them than fit at once
_STREAMING_SHARE = 0.9  # of the bandwidth, that they take
# Kernels that fetch their tiles one after another count them in memory that is cleared before each
# launch. The same library launches others whose tiles are dealt to CTAs at the start: beside NCCL
# they take up to twice as long (docs/accuracy.md), and no clearing goes before them.
_CLEARING = "Memset"
# A piece of attention's work is so many queries of a head: the flash kernel that has a CTA for each
# launches 512 for 4096 queries of 16 heads, and the persistent ones are taken to deal as many.
_QUERIES_A_PIECE = 128


@dataclass(frozen=True)
class GpuSettings:
    """How a plan uses the GPUs.

    Attributes:
        comm_ctas: SMs that communication kernels take at most; None: as was measured.
        compute_sms: SMs that compute kernels may use; None for all.
        attention: whether attention's CTAs stay to the kernel's end, or end one by one.
        connections: hardware queues that streams are dealt to.
    """

    comm_ctas: int | None = None
    compute_sms: int | None = None
    attention: Attention = "persistent"
    connections: int = 8


class LoadModel:
    """Loads of ops and transfers on the machine of a profile; answers are cached."""

    def __init__(self, profile: Profile) -> None:
        """Take the contention model of ``profile``, which may have none."""
        self._model = profile.contention_model
        if self._model is None:
            return
        self._parameters = fitted_parameters(self._model)
        self._traffic_traits = {(row.pattern, row.medium): row for row in self._model.traffic}
        self._link_bytes_per_ns = _link_bytes_per_ns(profile)
        self._kernels: dict[tuple[OpKey, Attention], tuple[Kernel, ...]] = {}

    def loads(
        self,
        keys: Sequence[OpKey | TransferKey | None],
        costs: Sequence[Cost],
        settings: GpuSettings,
    ) -> Loads | None:
        """Loads of a step's cost keys; None where the profile has no contention model.

        Raises:
            ProfileError: ``compute_sms`` are more than the GPU has.
        """
        if self._model is None:
            return None
        sms = self._parameters.num_sms
        if settings.compute_sms is not None and settings.compute_sms > sms:
            raise ProfileError(
                f"compute_sms={settings.compute_sms} must be at most {sms}, the SMs of the"
                " profile's GPU"
            )
        kernels: list[tuple[Kernel, ...]] = []
        traffic: list[Traffic | None] = []
        for key, cost in zip(keys, costs, strict=True):
            traffic.append(self._traffic(key, cost) if isinstance(key, TransferKey) else None)
            has_kernels = isinstance(key, OpKey)
            kernels.append(self._kernels_of(key, cost, settings.attention) if has_kernels else ())
        return Loads(
            tuple(kernels), tuple(traffic), self._parameters, settings.compute_sms,
            settings.connections,
        )  # fmt: skip

    def with_ctas(self, key: TransferKey, cost: Cost, ctas: int) -> Cost:
        """The cost of a transfer whose kernel may take ``ctas`` SMs at most: never below what the
        chains of loads and stores take on those that it does take."""
        trait = self._trait(key) if self._model is not None else None
        if trait is None:
            return cost
        ctas = min(_limited_ctas(key, ctas, trait), _usual_ctas(key, cost, trait))
        least_ns = round(
            _fixed_ns(cost, trait) + _chained_bytes(key, cost) / (ctas * trait.cta_bytes_per_ns)
        )
        if least_ns <= cost.duration_ns:
            return replace(cost, ctas=ctas)
        return replace(
            cost,
            ctas=ctas,
            duration_ns=least_ns,
            source=worst([cost.source, "extrapolated"]),
            explanation=f"{ctas} CTAs at {trait.cta_bytes_per_ns} B/ns each; {cost.explanation}",
        )

    def preemptible(self, cost: Cost) -> Cost:
        """The cost of an op whose attention kernels end one by one; others' as it is."""
        if self._model is None:
            return cost
        segments = [
            _scaled(segment, trait.preemptible_times)
            if segment.persistent and (trait := _attention_of(segment, self._model.traits))
            else segment
            for segment in cost.segments
        ]
        more_ns = sum(s.duration_ns for s in segments) - sum(s.duration_ns for s in cost.segments)
        if not more_ns:
            return cost
        return replace(
            cost,
            duration_ns=cost.duration_ns + more_ns,
            segments=tuple(segments),
            source=worst([cost.source, "extrapolated"]),
            explanation=f"and {more_ns} ns more with preemptible kernels, as at the shape that was"
            f" measured with both; {cost.explanation}",
        )

    def _kernels_of(self, key: OpKey, cost: Cost, attention: Attention) -> tuple[Kernel, ...]:
        """Kernels of an op, without the very short ones unless there are no others."""
        assert self._model is not None
        found = self._kernels.get((key, attention))
        if found is None:
            segments = cost.segments
            at = [i for i, s in enumerate(segments) if s.duration_ns >= SHORT_NS]
            at = at or list(range(len(segments)))
            kept = [segments[i] for i in at]
            moved = _bytes_of(kept, sum(s.hbm_bytes for s in segments), self._parameters)
            products = products_of(key, segments)
            moved = [
                max(size, products[i].operand_bytes) if i in products else size
                for i, size in zip(at, moved, strict=True)
            ]
            found = self._kernels[key, attention] = tuple(
                _kernel(
                    key, segments[i], size, self._traits_at(segments, i), attention, products.get(i)
                )
                for i, size in zip(at, moved, strict=True)
            )
        return found

    def _traits_at(self, segments: Sequence[Segment], i: int) -> Sequence[KernelTrait]:
        """Traits that kernel ``i`` of an op may have."""
        assert self._model is not None
        cleared = i > 0 and segments[i - 1].name.startswith(_CLEARING)
        return [t for t in self._model.traits if t.dealt or t.pieces or cleared]

    def _trait(self, key: TransferKey) -> TrafficTrait | None:
        pattern = key.pattern.removesuffix("_uneven")
        found = self._traffic_traits.get((pattern, _medium(key)))
        return found or self._traffic_traits.get((pattern, "intra_node"))

    def _traffic(self, key: TransferKey, cost: Cost) -> Traffic:
        """The kernel of a transfer; one that no row describes takes no SMs, as a copy engine."""
        carried = cost.link_bytes / max(cost.duration_ns, 1)
        link_share = min(carried / self._link_bytes_per_ns[_medium(key)], 1.0)
        trait = self._trait(key)
        if trait is None:
            return Traffic(0, link_share=link_share)
        ctas, fixed_ns = _usual_ctas(key, cost, trait), _fixed_ns(cost, trait)
        body_ns, moved = max(cost.duration_ns - fixed_ns, 1), _chained_bytes(key, cost)
        return Traffic(
            ctas=ctas,
            fixed_ns=fixed_ns,
            chain_ns=round(chain_ns(body_ns, ctas, moved, trait.cta_bytes_per_ns)),
            sent_hbm_bytes=round(key.num_bytes * trait.sent_hbm_factor),
            received_hbm_bytes=round(key.num_bytes * trait.received_hbm_factor),
            link_share=link_share,
        )


def assumptions(profile: Profile, settings: GpuSettings, media: Collection[str]) -> Iterator[str]:
    """What contention takes for granted, in sentences for a report of groups on these media."""
    model = profile.contention_model
    if model is None:
        yield (
            f"profile {profile.name} has no contention model: NCCL and kernels do not slow each"
            " other down"
        )
        return
    yield (
        "of an op's kernels, those of many short CTAs are taken to use"
        f" {100 * _STREAMING_SHARE:.0f} % of the memory bandwidth; the others share the op's other"
        " bytes by their time, a matrix product has its operands at least"
    )
    assumed = (t for t in model.traffic if t.source == "assumed" and t.medium in media)
    yield from dict.fromkeys(row.citation for row in assumed)
    num_sms = fitted_parameters(model).num_sms
    if settings.compute_sms is not None and settings.compute_sms < num_sms:
        yield (
            f"compute_sms={settings.compute_sms} takes SMs from kernels whose grids are made for"
            f" {num_sms}: what filled the GPU once takes two waves; what CUDA graphs add to each op"
            " on such streams is not in it (docs/accuracy.md)"
        )
    if settings.attention == "preemptible":
        yield (
            "attention's CTAs end one by one: the library's kernels for it take the time of its"
            f" persistent ones {_times(model)}, measured at one shape"
        )


def _times(model: ContentionModel) -> str:
    """How many, in words."""
    found = [f"{t.preemptible_times:.2f}" for t in model.traits if t.is_attention]
    return f"{' and '.join(found)} times (forward and backward)" if found else "once"


def _attention_of(segment: Segment, traits: Sequence[KernelTrait]) -> KernelTrait | None:
    return next((t for t in traits if t.is_attention and t.name in segment.name), None)


def _scaled(segment: Segment, times: float) -> Segment:
    return segment.model_copy(
        update={
            "duration_ns": round(segment.duration_ns * times),
            "cta_ns": round(segment.cta_ns * times),
        }
    )


def fitted_parameters(model: ContentionModel) -> Parameters:
    """What was fitted to the machine of a profile. What only models before this one had is left
    out."""
    known = {field.name for field in fields(Parameters)}
    values = {name: value for name, value in model.parameters.items() if name in known}
    num_sms = round(values.pop("num_sms"))
    return Parameters(num_sms=num_sms, **values)


def _kernel(
    key: OpKey,
    segment: Segment,
    hbm_bytes: int,
    traits: Sequence[KernelTrait],
    attention: Attention,
    product: Product | None,
) -> Kernel:
    kernel = Kernel(
        segment.duration_ns, segment.ctas, segment.ctas_per_sm, hbm_bytes, segment.persistent,
        product.tiles if product else 0, cluster=cluster_of(segment.name),
    )  # fmt: skip
    trait = next((trait for trait in traits if trait.name in segment.name), None)
    if trait is None:
        return kernel
    pieces = trait.pieces or (product.tiles if product else 0)
    if trait.is_attention and pieces:
        shape = dict(key.shape)
        pieces = -(-shape["tokens"] * shape["heads"] // _QUERIES_A_PIECE)
    if attention == "preemptible" and trait.is_attention and segment.persistent:
        ctas = max(pieces, segment.ctas)
        return replace(kernel, persistent=False, ctas=ctas, tail_share=trait.tail_share)
    return replace(kernel, pieces=pieces, dealt=trait.dealt, tail_share=trait.tail_share)


def _bytes_of(segments: Sequence[Segment], total: int, p: Parameters) -> list[int]:
    """Memory traffic of each kernel of an op that moves ``total`` bytes."""
    most = [
        segment.duration_ns * p.hbm_bytes_per_ns * _STREAMING_SHARE
        if _is_streaming(segment, p) else 0.0
        for segment in segments
    ]  # fmt: skip
    left = total - sum(most)
    others = sum(s.duration_ns for s, size in zip(segments, most, strict=True) if not size)
    if left <= 0 or not others:  # all there is, by time where they are alike
        weight = sum(most) or 1.0
        shares = [size / weight for size in most]
        if not sum(most):
            shares = [s.duration_ns / sum(x.duration_ns for x in segments) for s in segments]
        return [round(total * share) for share in shares]
    return [
        round(size or left * segment.duration_ns / others)
        for segment, size in zip(segments, most, strict=True)
    ]


def _is_streaming(segment: Segment, p: Parameters) -> bool:
    fits = segment.ctas_per_sm * p.num_sms
    return (
        not segment.persistent
        and segment.ctas_per_sm >= _STREAMING_CTAS_PER_SM
        and segment.ctas >= _STREAMING_WAVES * fits
    )


def _medium(key: TransferKey) -> str:
    return "intra_node" if key.ranks_per_node == key.group_size else "inter_node"


def _usual_ctas(key: TransferKey, cost: Cost, trait: TrafficTrait) -> int:
    """What the library takes for a message of this size, if the profile does not say."""
    if cost.ctas is not None:
        return cost.ctas
    return _at_size(trait.ctas, key.num_bytes)


def _limited_ctas(key: TransferKey, limit: int, trait: TrafficTrait) -> int:
    """What the library takes where it may take ``limit``: of another limit than those that were
    measured, the share that it takes of the next smaller one."""
    if not trait.limited:
        return limit
    below = [row for row in trait.limited if row[0] <= limit]
    measured, by_size = below[-1] if below else trait.limited[0]
    return max(limit * _at_size(by_size, key.num_bytes) // measured, 1)


def _at_size(steps: CtasBySize, num_bytes: int) -> int:
    fitting = [ctas for least_bytes, ctas in steps if least_bytes <= num_bytes]
    return fitting[-1] if fitting else steps[0][1]


def _chained_bytes(key: TransferKey, cost: Cost) -> int:
    """Bytes of a transfer between two ranks that sends as much: CTAs' rates are known of these."""
    return round(cost.link_bytes / traffic_factor(key.pattern, 2))


def _fixed_ns(cost: Cost, trait: TrafficTrait) -> int:
    return min(trait.fixed_ns, cost.duration_ns * 9 // 10)


def _link_bytes_per_ns(profile: Profile) -> dict[str, float]:
    """What a rank's link carries: the most that a measured transfer reached, or the network's."""
    measured = {
        medium: max(
            (
                row.bytes * traffic_factor(row.pattern, row.group_size) / row.duration_ns
                for row in profile.transfers
                if row.medium == medium
            ),
            default=0.0,
        )
        for medium in ("intra_node", "inter_node")
    }
    network = profile.hardware.inter_node.bytes_per_second / 1e9
    return {
        "intra_node": measured["intra_node"] or network,
        "inter_node": measured["inter_node"] or network,
    }
