"""What an op and traffic do to each other while they overlap, for any pair, measured or not.

Both streams of two ranks are kept full and played by the engine, with the physics of every
prediction (:mod:`mhcplan.profiles.contention_replay`). The op is a key of the vocabulary, priced as
in a step, or one of the kernels that were overlapped on the machine, priced with the help of its
measured pairs (:mod:`mhcplan.profiles.overlap_neighbours`); the traffic is a pattern and a size.
How far off such a price is, is measured: the mean error of the pairs of its class (family of
kernels, pattern, whether small messages are sent ahead) that the fit did not see.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from pydantic import ByteSize, TypeAdapter, ValidationError

from mhcplan.profiles.contention import PHASES, Message
from mhcplan.profiles.contention_fit import (
    BUFFER_BYTES,
    TRAITS,
    Pair,
    Pairs,
    errors,
    kernels_of,
)
from mhcplan.profiles.contention_replay import Played, play
from mhcplan.profiles.costs import worst
from mhcplan.profiles.loads import GpuSettings, fitted_parameters
from mhcplan.profiles.lookup import cost_model_of
from mhcplan.profiles.overlap_neighbours import Neighbours, Priced, price_errors
from mhcplan.profiles.schema import Pattern, ProfileError
from mhcplan.profiles.vocabulary import TransferKey
from mhcplan.sim.device_kernels import Kernel, Parameters, hbm_share

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mhcplan.profiles.costs import Source
    from mhcplan.profiles.logs import Entry
    from mhcplan.profiles.schema import Profile
    from mhcplan.profiles.vocabulary import OpKey

ErrorClass = Literal["measured", "held out", "all pairs", "unknown"]

# the kernels that were overlapped stand for those of other ops, by what they do
_FAMILIES = {
    "attention_mla": "attention", "attention_gqa": "attention", "experts": "grouped_gemm",
    "experts_skewed": "grouped_gemm", "gemm": "gemm_library", "gemm_fp8": "gemm_library",
    "dense_ffn": "gemm_library", "shared_experts": "gemm_library", "head": "gemm_library",
    "router": "gemm_library", "mhc_pre": "projection", "hc_pre": "projection",
    "mhc_collapse": "projection", "mhc_post": "post_res", "hc_post": "post_res",
    "mhc_recompute": "post_res",
}  # fmt: skip
_OTHER_FAMILY = "elementwise"
_MOST_CTAS = 32  # that were overlapped
_ENOUGH_PAIRS = 3
MESSAGE_GAP_NS = 1_700  # from a message's end to the next one's start, alone: the measured median


@dataclass(frozen=True)
class OverlapError:
    """How far off the model is: on this very pair, on held-out pairs of its class, or on all.

    ``compute_percent``, ``traffic_percent``: mean of |predicted / measured - 1| over ``pairs``.
    """

    basis: ErrorClass
    of: str
    pairs: int
    compute_percent: float
    traffic_percent: float


@dataclass(frozen=True)
class MeasuredPair:
    """The same pair as it was measured; times as :class:`~.contention_replay.Played` has them, but
    that ``kernel_ns`` includes the wait for the peer's CTAs."""

    compute_slowdown: float
    traffic_slowdown: float
    queue_ns: int
    kernel_ns: int


@dataclass(frozen=True)
class Overlap:
    """An op beside traffic, both streams full.

    Attributes:
        compute, traffic: what was asked for.
        compute_ns, traffic_ns: period of an op and of a message, alone.
        compute_slowdown, traffic_slowdown: periods beside each other over those alone.
        queue_ns: a message waits for SMs on both ranks; kernel_ns: and then takes to its end.
        num_sms, ctas: SMs of a GPU, and those that the traffic takes.
        hbm_percent, burden_percent: share of the memory bandwidth that the op takes alone, and a
            message.
        chain_slowdown: how much longer the traffic's chains of loads and stores take beside the op.
        link_percent: of the link that a message fills alone.
        source: of the less certain of the two times alone.
        why: sentences.
        extrapolated: what lies outside of what was overlapped, in sentences.
        error, measured: see their classes.
    """

    compute: str
    traffic: str
    compute_ns: int
    traffic_ns: int
    compute_slowdown: float
    traffic_slowdown: float
    queue_ns: int
    kernel_ns: int
    num_sms: int
    ctas: int
    hbm_percent: float
    burden_percent: float
    chain_slowdown: float
    link_percent: float
    source: Source
    why: tuple[str, ...]
    extrapolated: tuple[str, ...]
    error: OverlapError
    measured: MeasuredPair | None


class _Compute(NamedTuple):
    name: str
    family: str
    kernels: tuple[Kernel, ...]
    op_ns: float
    source: Source


class _Traffic(NamedTuple):
    key: TransferKey
    message: Message
    link_share: float
    source: Source


class OverlapModel:
    """Prices pairs on the machine of a profile."""

    def __init__(self, profile: Profile, log: Sequence[Entry] = ()) -> None:
        """Take the contention model of ``profile``.

        Args:
            profile: of the machine.
            log: of the capture that the model was fitted to, see
                :func:`mhcplan.profiles.store.contention_log`; empty: errors are the profile's own.

        Raises:
            ProfileError: the profile has no contention model.
        """
        self._profile, self._model = profile, profile.contention_model
        self.parameters = parameters_of(profile)
        self._costs = cost_model_of(profile)
        self._source = Pairs(rows_of(log), self.parameters.num_sms)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that were overlapped."""
        names = (row["compute"] for row in self._source.rows.values())
        return tuple(dict.fromkeys(name for name in names if name != "-"))

    def price(
        self, compute: OpKey | str, traffic: TransferKey, *, ctas: int | None = None,
        high_priority: bool = False,
    ) -> Overlap:  # fmt: skip
        """What the two do to each other.

        Args:
            compute: an op, or one of :attr:`kernels`.
            traffic: pattern, group and bytes.
            ctas: SMs that the traffic takes; None: as the library does.
            high_priority: of the traffic's stream.

        Raises:
            CostMissing: the op or the traffic cannot be priced.
            ProfileError: the op's kernels are unknown, or there is no such kernel.
            ValueError: more CTAs than SMs, or one takes so much longer than the other that playing
                them is hopeless.
        """
        if ctas is not None and not 1 <= ctas <= self.parameters.num_sms:
            raise ValueError(f"ctas={ctas} must be 1 .. {self.parameters.num_sms}, the SMs")
        ours = self._kernel(compute) if isinstance(compute, str) else self._op(compute)
        theirs = self._traffic(traffic, ctas, high_priority)
        pair = self._stored(ours, theirs, is_default=ctas is None)
        if pair is not None:  # with the gaps and times of its own run
            theirs = theirs._replace(message=pair.message)
        played = play(ours.kernels, theirs.message, self.parameters, ours.op_ns)
        name = "" if pair is None else pair.name
        asked = Pair(
            name, ours.name, ours.kernels, ours.op_ns, theirs.message, pattern=traffic.pattern,
            num_bytes=traffic.num_bytes,
        )  # fmt: skip
        priced = self._neighbours.price(asked, played[:2])
        longer = priced.traffic / played.traffic
        message, p = theirs.message, self.parameters
        moved = sum(kernel.hbm_bytes for kernel in ours.kernels)
        burden = max(message.hbm_bytes) / message.alone_ns / p.hbm_bytes_per_ns
        return Overlap(
            compute=ours.name,
            traffic=_name(theirs),
            compute_ns=round(ours.op_ns),
            traffic_ns=round(message.alone_ns + message.gap_ns),
            compute_slowdown=priced.compute,
            traffic_slowdown=priced.traffic,
            queue_ns=round(played.queue_ns * longer),
            kernel_ns=round(played.kernel_ns * longer),
            num_sms=p.num_sms,
            ctas=message.ctas,
            hbm_percent=100 * min(moved / ours.op_ns / p.hbm_bytes_per_ns, 1.0),
            burden_percent=100 * min(burden, 1.0),
            chain_slowdown=_chain_slowdown(ours.kernels, p),
            link_percent=100 * theirs.link_share,
            source=worst([ours.source, theirs.source]),
            why=(
                *_about_sms(ours, message, p),
                *_about_queue(message, played.queue_ns * longer),
                *_about_neighbours(played, priced),
            ),
            extrapolated=tuple(self._beyond(ours, theirs)),
            error=self._error(ours, theirs, pair, priced),
            measured=self._measured(pair),
        )

    # -- the two sides

    def _op(self, key: OpKey) -> _Compute:
        cost = self._costs.op(key)
        loads = self._costs.table([str(key)], GpuSettings()).loads
        kernels = loads.kernels[0] if loads is not None else ()
        if not kernels:
            raise ProfileError(
                f"profile {self._profile.name}: the kernels of {key} are unknown: its row has no"
                " segments"
            )
        family = _FAMILIES.get(key.kind, _OTHER_FAMILY)
        return _Compute(str(key), family, kernels, float(cost.duration_ns), cost.source)

    def _kernel(self, name: str) -> _Compute:
        row = self._source.rows.get(f"{name}|-")
        if row is None or name not in self.kernels:
            known = ", ".join(self.kernels) or "none in this profile"
            raise ProfileError(f"compute={name!r} is no op key and no overlapped kernel ({known})")
        kernels = kernels_of(row, TRAITS, self.parameters.num_sms)
        op_ns = statistics.mean(self._source.op_ns(name))
        return _Compute(name, str(row["family"]), kernels, op_ns, "measured")

    def _traffic(self, key: TransferKey, ctas: int | None, high_priority: bool) -> _Traffic:
        settings = GpuSettings(comm_ctas=ctas)
        (cost,) = self._costs.costs([str(key)], settings)
        loads = self._costs.table([str(key)], settings).loads
        load = loads.traffic[0] if loads is not None else None
        assert load is not None  # the profile has a contention model
        eager = key.pattern == "send_recv" and key.num_bytes < BUFFER_BYTES * load.ctas
        # transfers were timed from start to start
        gap_ns = min(MESSAGE_GAP_NS, cost.duration_ns / 2)
        alone_ns = cost.duration_ns - gap_ns
        message = Message(
            alone_ns, min(load.chain_ns, alone_ns - min(load.fixed_ns, alone_ns)),
            min(load.fixed_ns, alone_ns), load.ctas,
            (load.sent_hbm_bytes, load.received_hbm_bytes), gap_ns=gap_ns, eager=eager,
            high_priority=high_priority, one_way=key.pattern == "send_recv",
        )  # fmt: skip
        return _Traffic(key, message, load.link_share, cost.source)

    # -- what was measured

    def _stored(self, ours: _Compute, theirs: _Traffic, *, is_default: bool) -> Pair | None:
        """The very pair, if it was measured."""
        wanted = theirs.message
        for pair in self._measured_pairs:
            row = self._source.rows[pair.name]["traffic"]
            if (
                pair.compute == ours.name
                and (row["pattern"], row["num_bytes"]) == (theirs.key.pattern, theirs.key.num_bytes)
                and pair.message.high_priority == wanted.high_priority
                and row["busy"] == "all"
                and theirs.key.group_size == theirs.key.ranks_per_node == 2
                and (not row["ctas"] if is_default else pair.message.ctas == wanted.ctas)
            ):
                return pair
        return None

    @cached_property
    def _measured_pairs(self) -> list[Pair]:
        return self._source.pairs(TRAITS)

    @cached_property
    def _neighbours(self) -> Neighbours:
        return Neighbours(self._measured_pairs, self.parameters)

    def _measured(self, pair: Pair | None) -> MeasuredPair | None:
        if pair is None:
            return None
        row = self._source.rows[pair.name]
        runs = (row[name] for name in PHASES if name in row)
        sides = [side for run in runs for side in run["traffic"] if side["ops"]]
        count = sum(side["ops"] for side in sides)
        queue_ns, kernel_ns = (
            round(sum(side[name] * side["ops"] for side in sides) / count)
            for name in ("queue_ns", "kernel_ns")
        )
        return MeasuredPair(*pair.measured, queue_ns, kernel_ns)

    def _error(
        self, ours: _Compute, theirs: _Traffic, pair: Pair | None, priced: Priced
    ) -> OverlapError:
        assert self._model is not None
        if pair is not None:
            seen = "held out" if pair.held_out else "seen by the fit"
            compute, traffic = pair.measured
            found = (pair, abs(priced.compute / compute - 1), abs(priced.traffic / traffic - 1))
            return _mean_error("measured", f"this very pair, {seen}", [found])
        pattern, eager = theirs.key.pattern, theirs.message.eager
        alike = (pattern, eager)
        if priced.neighbours:  # held-out ones were priced as this one is
            whose = ours.name
            found = price_errors(
                [p for p in self._measured_pairs if p.compute == ours.name], self.parameters
            )
            found = [e for e in found if (e[0].pattern, e[0].message.eager) == alike]
        else:
            whose = ours.family
            held = (
                p for p in self._measured_pairs
                if p.held_out and (p.pattern, p.message.eager) == alike
                and self._source.rows[f"{p.compute}|-"]["family"] == ours.family
            )  # fmt: skip
            found = errors(held, self.parameters)
        if len(found) >= _ENOUGH_PAIRS:
            sent_ahead = " sent ahead" if eager else ""
            return _mean_error("held out", f"{whose} beside {pattern}{sent_ahead}", found)
        count = self._model.held_out_pairs
        return OverlapError(
            "all pairs" if count else "unknown",
            "pairs that the fit did not see",
            count,
            self._model.compute_error_percent,
            self._model.traffic_error_percent,
        )

    def _beyond(self, ours: _Compute, theirs: _Traffic) -> Iterator[str]:
        key, ctas = theirs.key, theirs.message.ctas
        overlapped = (row for row in self._source.rows.values() if row["compute"] != "-")
        rows = [row["traffic"] for row in overlapped if row["traffic"]]
        sizes = [row["num_bytes"] for row in rows if row["pattern"] == key.pattern]
        if rows and not sizes:
            yield f"{key.pattern} was not overlapped: memory traffic is taken to be all_to_all's"
        if sizes and not min(sizes) <= key.num_bytes <= max(sizes):
            measured = f"{min(sizes):,} to {max(sizes):,}"
            yield f"{key.num_bytes:,} bytes: messages of {measured} were overlapped"
        if self._model is not None and self._model.source == "assumed":
            yield f"contention of another machine: {self._model.citation}"
        if key.group_size > 2:
            yield f"{key.group_size} ranks: pairs of GPUs were overlapped"
        if key.ranks_per_node < key.group_size:
            yield "between nodes: only NVLink was overlapped"
        if ctas > _MOST_CTAS:
            yield f"{ctas} CTAs: up to {_MOST_CTAS} were overlapped"
        for what, source in ((ours.name, ours.source), (str(key), theirs.source)):
            if source in ("extrapolated", "assumed"):
                yield f"the time of {what} alone is {source}"


def parameters_of(profile: Profile) -> Parameters:
    """The fitted parameters of the machine.

    Raises:
        ProfileError: the profile has no contention model.
    """
    if profile.contention_model is None:
        raise ProfileError(
            f"profile {profile.name} has no contention_model: overlap was not measured on it"
        )
    return fitted_parameters(profile.contention_model)


def parse_traffic(text: str) -> TransferKey:
    """Read "PATTERN SIZE" (two GPUs of a node) or "PATTERN RANKS/RANKS_PER_NODE SIZE".

    >>> parse_traffic("send_recv 64MiB").num_bytes
    67108864

    Raises:
        ValueError: the text is none of these.
    """
    pattern, *group, size = text.split() if len(text.split()) > 1 else ("", "")
    ranks, _, per_node = (group[0] if group else "2/2").partition("/")
    try:
        num_bytes = int(TypeAdapter(ByteSize).validate_python(size))
        key = TransferKey(pattern, int(ranks), int(per_node or ranks), num_bytes)
    except (ValidationError, ValueError):
        key = None
    if key is None or pattern not in get_args(Pattern) or len(group) > 1:
        raise ValueError(
            f"traffic={text!r} must be a pattern ({', '.join(get_args(Pattern))}) and a size, as"
            " 'send_recv 64MiB', or with a group of 8 ranks, 4 of them on a node, 'all_to_all 8/4"
            " 8MiB'"
        )
    return key


def _mean_error(
    basis: ErrorClass, of: str, found: Sequence[tuple[Pair, float, float]]
) -> OverlapError:
    compute, traffic = (
        100 * statistics.mean(values) for values in zip(*(e[1:] for e in found), strict=True)
    )
    return OverlapError(basis, of, len(found), compute, traffic)


def rows_of(log: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """Rows of a contention capture, by pair; the latest of equal pairs counts."""
    return {entry["contention"]["pair"]: entry["contention"] for entry in log}


def _name(traffic: _Traffic) -> str:
    level = "high" if traffic.message.high_priority else "equal"
    return f"{traffic.key}, {traffic.message.ctas} CTAs, {level} priority"


def _chain_slowdown(kernels: tuple[Kernel, ...], p: Parameters) -> float:
    """Mean over the op's kernels by their time; the formula is
    :class:`mhcplan.sim.device_kernels.Parameters`'s."""
    total = sum(kernel.duration_ns for kernel in kernels)
    added = sum(k.duration_ns * hbm_share(k, p) ** p.memory_power for k in kernels) / total
    return 1 + p.busy_delay + p.memory_delay * added


def _about_sms(compute: _Compute, message: Message, p: Parameters) -> Iterator[str]:
    kernel = max(compute.kernels, key=lambda each: each.duration_ns)
    at_once = kernel.ctas_per_sm * p.num_sms
    where = f"the op's longest kernel ({100 * kernel.duration_ns / compute.op_ns:.0f} % of it) "
    if kernel.ctas < p.num_sms:
        spare = p.num_sms - kernel.ctas
        where += f"takes {kernel.ctas} of {p.num_sms} SMs and leaves {spare} to others"
    elif kernel.persistent:
        where += f"is persistent: its {kernel.ctas} CTAs keep their SMs to its end"
    else:
        waves = -(-kernel.ctas // at_once)
        where += (
            f"has {kernel.ctas:,} CTAs, {kernel.ctas_per_sm} to an SM, in {waves} waves of about"
            f" {kernel.duration_ns / waves / 1e3:.1f} us"
        )
    yield where
    if message.ctas:
        yield f"each message takes {message.ctas} of {p.num_sms} SMs on each rank while it lasts"
    else:
        yield "a copy engine moves the bytes: it takes no SM"


def _about_queue(message: Message, queue_ns: float) -> Iterator[str]:
    period = message.alone_ns + message.gap_ns
    how = "as soon as CTAs end" if message.high_priority else "between kernels or in their tails"
    if message.ctas and queue_ns > 0.02 * period:
        yield f"its CTAs find SMs {how}: {queue_ns / 1e3:.1f} us a message on both ranks together"
    if message.eager:
        yield "the library's buffers take the message before its receiver is there"


def _about_neighbours(played: Played, priced: Priced) -> Iterator[str]:
    if priced.neighbours:
        yield (
            f"the engine plays {played.compute:.2f} and {played.traffic:.2f} times;"
            f" {priced.neighbours} measured pairs of this kernel bring that nearer to theirs"
        )
