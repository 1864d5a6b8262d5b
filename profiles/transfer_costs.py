"""What a transfer costs: latency + bytes / bandwidth, piecewise between measured sizes.

Inside a node a transfer is looked up by pattern, group size and bytes. Between two measured sizes
time is a straight line in bytes, which is the physical form; above the largest, bandwidth is held
(larger messages are trains of that size); below the smallest, its time is held.

A group size that was not measured takes the time of the nearest measured one, times the ratio of
what a rank sends: (g - 1) / g of its buffer in an all-to-all, reduce-scatter or all-gather, twice
that in a ring all-reduce (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH", 2005; nccl-tests doc/PERFORMANCE.md has the same factors).

Across nodes, what leaves the node is priced as a message of so many bytes between two nodes, where
the profile measured those, else by the network of the machine's specification: latency + traffic /
bandwidth, ``assumed`` with the link's citation. The part that stays in the node runs at the same
time, so that the longer of the two counts. A group with one rank a node that was measured as such,
or one near it, is looked up as inside a node.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from mhcplan.profiles.costs import Cost, CostMissing, Source, worst
from mhcplan.profiles.interpolation import MAX_EXTRAPOLATION
from mhcplan.profiles.schema import BETWEEN_TWO, SECOND_NS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mhcplan.profiles.schema import Profile, TransferTiming
    from mhcplan.profiles.vocabulary import TransferKey

_HALVES = ("reduce_scatter", "all_gather")
REDUCTIONS = ("all_reduce", *_HALVES)  # of gradients and shards
_UNEVEN = "all_to_all_uneven"
_ALL_TO_ALL = ("all_to_all", _UNEVEN)
UNEVEN_SHARE = 1.5  # of an even share: what every rank sends to the first one of an uneven group


def traffic_factor(pattern: str, group_size: int) -> float:
    """Bytes that a rank sends, as a share of its buffer; of an uneven group, that the first one
    receives."""
    if pattern in BETWEEN_TWO:
        return 1.0
    share = (group_size - 1) / group_size
    return {"all_reduce": 2, _UNEVEN: UNEVEN_SHARE}.get(pattern, 1) * share


class TransferCosts:
    """Prices transfers on the machine of ``profile``."""

    def __init__(self, profile: Profile) -> None:
        """Sort the measured transfers of ``profile`` by pattern, medium, group and bytes."""
        self._profile = profile
        self._link = profile.hardware.inter_node
        self._curves: dict[tuple[str, str], dict[int, list[TransferTiming]]] = {}
        for row in sorted(profile.transfers, key=lambda row: row.bytes):
            groups = self._curves.setdefault((row.pattern, row.medium), {})
            groups.setdefault(row.group_size, []).append(row)

    def price(self, key: TransferKey) -> Cost:
        """Cost of a transfer of ``key.num_bytes`` on each rank.

        Raises:
            CostMissing: the pattern was not measured, or only for groups beyond 4x of this one.
            ValueError: no such group or message.
        """
        pattern, size, per_node, num_bytes = key
        if not (1 <= per_node <= size and size >= 2 and num_bytes >= 1):
            raise ValueError(f"transfer {key}: needs 2 ranks, some of them on a node, and a byte")
        if pattern in BETWEEN_TWO and size != 2:
            raise ValueError(f"transfer {key}: {pattern} is between 2 ranks")
        if per_node == size:
            return self._on_medium("intra_node", pattern, size, num_bytes)
        measured = self._curves.get((pattern, "inter_node"), {})
        if (
            per_node == 1
            and measured
            and _beyond(_nearest(measured, size), size) <= MAX_EXTRAPOLATION
        ):
            return self._on_medium("inter_node", pattern, size, num_bytes)
        return self._over_network(key)

    def _on_medium(self, medium: str, pattern: str, size: int, num_bytes: int) -> Cost:
        groups = self._curves.get((pattern, medium))
        if groups is None and pattern == _UNEVEN:
            return self._as_even(medium, size, num_bytes)
        if groups is None:
            return self._half_of_all_reduce(medium, pattern, size, num_bytes)
        near = _nearest(groups, size)
        if _beyond(near, size) > MAX_EXTRAPOLATION:
            self._missing(
                f"{pattern} on {medium} was measured for group_size {_listed(groups)};"
                f" group_size={size} is more than {MAX_EXTRAPOLATION}x outside",
                size,
            )
        cost = _on_curve(groups[near], num_bytes)
        link_bytes = round(num_bytes * traffic_factor(pattern, size))
        if near == size:
            return replace(cost, link_bytes=link_bytes)
        scale = traffic_factor(pattern, size) / traffic_factor(pattern, near)
        return replace(
            cost,
            duration_ns=round(cost.duration_ns * scale),
            source=worst([cost.source, "extrapolated"]),
            explanation=f"{cost.explanation}; group of {near} scaled by traffic x{scale:.3g}",
            link_bytes=link_bytes,
        )

    def _half_of_all_reduce(self, medium: str, pattern: str, size: int, num_bytes: int) -> Cost:
        """A ring all-reduce is a reduce-scatter and an all-gather of the same buffer."""
        if pattern not in _HALVES or ("all_reduce", medium) not in self._curves:
            self._missing(f"{pattern} on {medium} was not measured", size)
        whole = self._on_medium(medium, "all_reduce", size, num_bytes)
        return replace(
            whole,
            duration_ns=round(whole.duration_ns / 2),
            source="assumed",
            explanation=f"half of an all_reduce, which is a reduce_scatter and an all_gather"
            f" (Thakur et al. 2005); {whole.explanation}",
            link_bytes=round(num_bytes * traffic_factor(pattern, size)),
        )

    def _as_even(self, medium: str, size: int, num_bytes: int) -> Cost:
        """An uneven all-to-all takes as long as an even one of what its first rank receives."""
        even = self._on_medium(medium, "all_to_all", size, round(UNEVEN_SHARE * num_bytes))
        return replace(
            even,
            source="assumed",
            explanation="uneven all_to_all was not measured: as an even one with"
            f" {UNEVEN_SHARE} times the bytes, what its first rank receives; {even.explanation}",
        )

    def _over_network(self, key: TransferKey) -> Cost:
        """What leaves the node at the link's rate, what stays in it at the measured one."""
        pattern, size, per_node, num_bytes = key
        network = self._leaving_the_node(pattern, self._network_bytes(key))
        if per_node == 1:
            return network
        # of an all-to-all buffer, only the parts for the node's own ranks stay in it
        local = num_bytes * per_node // size if pattern in _ALL_TO_ALL else num_bytes
        inside = self._on_medium("intra_node", pattern, per_node, max(local, 1))
        longer = inside if inside.duration_ns > network.duration_ns else network
        return replace(
            longer,
            source=worst([network.source, inside.source]),
            explanation=f"{network.explanation}; beside it {per_node} ranks inside the node"
            f" ({inside.explanation}); the longer of the two counts",
            link_bytes=network.link_bytes,
        )

    def _leaving_the_node(self, pattern: str, sent: int) -> Cost:
        """A rank's ``sent`` bytes to another node: as a message was measured, or by the link."""
        messages = self._curves.get(("send_recv", "inter_node"))
        host_ns = self._host_ns(pattern)
        if messages is None:
            duration_ns = self._link.latency_ns + round(
                sent * SECOND_NS / self._link.bytes_per_second
            )
            how = f"across nodes: {self._link.source}"
            return Cost(duration_ns, host_ns, "assumed", how, link_bytes=sent)
        cost = _on_curve(messages[2], max(sent, 1))
        return replace(
            cost,
            host_ns=host_ns,
            source=worst([cost.source, "extrapolated"]),
            explanation=f"across nodes: as a message of {sent} bytes, {cost.explanation}",
            link_bytes=sent,
        )

    def _network_bytes(self, key: TransferKey) -> int:
        """Bytes that one rank sends out of its node.

        All-to-all: its buffer's parts for other nodes. Reductions and gathers: each of the node's
        ranks carries an equal part of the buffer around the ring of nodes.
        """
        pattern, size, per_node, num_bytes = key
        if pattern in BETWEEN_TWO:
            return num_bytes
        if pattern in _ALL_TO_ALL:
            leaving = num_bytes * (size - per_node) // size
            return round(UNEVEN_SHARE * leaving) if pattern == _UNEVEN else leaving
        nodes = -(-size // per_node)
        return round(num_bytes * traffic_factor(pattern, nodes) / per_node)

    def _host_ns(self, pattern: str) -> int:
        """The host issues the same call whatever link it takes; unmeasured: one launch."""
        for name in (pattern, "all_reduce"):
            groups = self._curves.get((name, "intra_node"))
            if groups:
                return max(row.host_ns for row in groups[min(groups)])
        return self._profile.overheads.launch_ns

    def _missing(self, problem: str, size: int) -> NoReturn:
        raise CostMissing(
            f"profile {self._profile.name}: {problem}; measure it on {size} GPUs of a host:"
            f" mhcplan profile measure --part comm --base {self._profile.name} --out mine.json"
        )


def _nearest(groups: Iterable[int], size: int) -> int:
    """The group nearest by ratio; the smaller of two equally near."""
    return min(groups, key=lambda group: (_beyond(group, size), group))


def _beyond(group: int, size: int) -> float:
    return max(group / size, size / group)


def _on_curve(rows: list[TransferTiming], num_bytes: int) -> Cost:
    """Time of ``num_bytes`` from rows of one group, sorted by bytes."""
    i = bisect_left(rows, num_bytes, key=lambda row: row.bytes)
    if i < len(rows) and rows[i].bytes == num_bytes:
        row = rows[i]
        text = row.citation or f"median of {row.samples} samples"
        return _cost([row], row.duration_ns, row.source, text)
    if i == 0:
        return _cost([rows[0]], rows[0].duration_ns, "extrapolated",
                     f"held below the smallest measured, {rows[0].bytes} bytes")  # fmt: skip
    low = rows[i - 1]
    if i == len(rows):
        held_ns = round(low.duration_ns * (num_bytes / low.bytes))
        return _cost([low], held_ns, "extrapolated",
                     f"bandwidth held above the largest measured, {low.bytes} bytes")  # fmt: skip
    high = rows[i]
    fraction = (num_bytes - low.bytes) / (high.bytes - low.bytes)
    duration_ns = round(low.duration_ns + fraction * (high.duration_ns - low.duration_ns))
    return _cost([low, high], duration_ns, "interpolated",
                 f"between {low.bytes} and {high.bytes} bytes")  # fmt: skip


def _cost(rows: list[TransferTiming], duration_ns: int, source: Source, text: str) -> Cost:
    cited = [row.citation for row in rows if row.citation and row.citation != text]
    return Cost(
        duration_ns=duration_ns,
        host_ns=max(row.host_ns for row in rows),
        source=worst([source, *(row.source for row in rows)]),
        explanation="; ".join([text, *dict.fromkeys(cited)]),
        spread_percent=max(row.spread_percent for row in rows),
        ctas=rows[-1].ctas,
    )


def _listed(sizes: dict[int, list[TransferTiming]]) -> str:
    return ", ".join(str(size) for size in sorted(sizes))
