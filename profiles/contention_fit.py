"""Fitting the contention model to measured pairs, and its error on pairs it was not fitted on.

Pairs are the rows of :mod:`mhcplan.profiles.capture.contention`. One pair in five is held out, by a
hash of its name. The error of a pair's side is |predicted / measured - 1| of its slowdown.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, repeat
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from mhcplan.profiles.contention import PHASES, Message, chain_ns
from mhcplan.profiles.contention_replay import replay
from mhcplan.profiles.products import cluster_of
from mhcplan.sim.device_kernels import Kernel, Parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from mhcplan.profiles.schema import Profile

Row = dict[str, Any]

HOLDOUT = 5  # one pair in so many
_SHORT_NS = 3_000  # memsets and the like: counted as gaps
_LONG_CTA_NS = 20_000
FIXED_NS = 8_000  # of a message alone: what 1 MiB takes beyond its bytes
# of a copy: 1 MiB takes 2.5 us longer beside matrix products that delay chains by half
COPY_FIXED_NS = 2_500
# bytes a ns that one CTA moves, from the messages of 8 MiB and 2 or 4 CTAs, where nothing else
# limits them; of all_to_all the own part counts too, as it does in num_bytes
CTA_BYTES_PER_NS = {"send_recv": 33.0, "send_recv_both": 20.5, "all_to_all": 20.9}
# bytes of memory traffic for each byte of num_bytes at (first, second) rank: a sender reads; a
# receiver has the data written into its buffer, reads it there and writes it to its place
HBM_FACTOR = {
    "send_recv": (1.0, 3.0), "send_recv_both": (4.0, 4.0), "all_to_all": (3.0, 3.0),
    "copy_engine": (1.0, 1.0),
}  # fmt: skip
BUFFER_BYTES = 4 * 1024**2  # of a CTA: NCCL_BUFFSIZE, its documented default
_LIMITS = {"threads": 2048, "registers": 65536, "shared_bytes": 233472, "ctas": 32}


@dataclass(frozen=True)
class Trait:
    """What a launch does not show of a kernel: see :class:`~mhcplan.profiles.contention.Kernel`."""

    pieces: int = 0
    dealt: bool = True
    tail_share: float = 0.0


# Traits of the kernels that the capture runs, by case or by part of the kernel's name. Pieces are
# the tiles of the problem (256 x 128 for cuBLAS's, 128 x 256 for the others); tail shares were
# measured: profiles.priority.tail_shares of data/raw/h100-sxm-priority.jsonl.xz
TRAITS: dict[str, Trait] = {
    "gemm_library_big": Trait(1792, dealt=False),
    "gemm_library": Trait(512, dealt=False),
    "grouped_gemm": Trait(768),
    "gemm_persistent_spare": Trait(896),
    "gemm_persistent": Trait(1024),
    "sdpa_sm90_flash_fprop": Trait(512, dealt=False, tail_share=0.355),
    "sdpa_sm90_flash_bprop": Trait(512, dealt=False, tail_share=0.326),
    "flash_fwd_kernel": Trait(tail_share=0.37),
    "flash_bwd_dq_dk_dv": Trait(tail_share=0.167),
    "nvjet": Trait(dealt=False),  # of other shapes: any number of tiles
}


@dataclass(frozen=True)
class Pair:
    """A pair: the arguments that price it, its slowdowns where they were measured, and what its
    traffic is called."""

    name: str
    compute: str
    kernels: tuple[Kernel, ...]
    op_ns: float
    message: Message
    measured: tuple[float, float] = (1.0, 1.0)  # compute, traffic
    pattern: str = ""
    num_bytes: int = 1

    @property
    def held_out(self) -> bool:
        """Whether the fit must not see it."""
        return _digest(self.name)[0] % HOLDOUT == 0


def _fixed_ns(alone_ns: float, ctas: int) -> float:
    return min(0.9 * alone_ns, FIXED_NS if ctas else COPY_FIXED_NS)


def ctas_per_sm(launch: Sequence[int]) -> int:
    """CTAs of a launch [grid, threads, registers, shared bytes] that fit on an SM of compute
    capability 9.0 (CUDA C programming guide; registers go to warps in units of 256)."""
    _, threads, registers, shared = launch
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    fits = (
        _LIMITS["ctas"],
        _LIMITS["threads"] // max(1, warps * 32),
        _LIMITS["registers"] // max(1, per_warp * warps),
        _LIMITS["shared_bytes"] // (shared + 1024),
    )
    return max(1, min(fits))


def kernels_of(row: Row, traits: Mapping[str, Trait], num_sms: int) -> tuple[Kernel, ...]:
    """The kernels of a case from its row alone; ``traits`` by part of the kernel's name, or by the
    name of the case."""
    total = sum(k["duration_ns"] for k in row["kernels"])
    found: list[Kernel] = []
    for kernel in row["kernels"]:
        if kernel["duration_ns"] < _SHORT_NS:
            continue
        grid, fit = kernel["launch"][0], ctas_per_sm(kernel["launch"])
        keys = [key for key in traits if key in (row["compute"],) or key in kernel["name"]]
        trait = traits[keys[0]] if keys else Trait()
        one_wave = grid <= fit * num_sms
        found.append(
            Kernel(
                kernel["duration_ns"], max(1, grid), fit,
                round(row["hbm_bytes"] * kernel["duration_ns"] / total),
                one_wave and kernel["duration_ns"] >= _LONG_CTA_NS,
                trait.pieces, trait.dealt, trait.tail_share, cluster_of(kernel["name"]),
            )
        )  # fmt: skip
    return tuple(found)


class Pairs:
    """The rows of a capture, by pair."""

    def __init__(self, rows: Mapping[str, Row], num_sms: int = 132) -> None:
        """``num_sms`` of the GPU that was measured."""
        self.rows, self.num_sms = rows, num_sms

    def op_ns(self, compute: str) -> list[float]:
        """Period of an op alone on each rank."""
        return [float(s["median_ns"]) for s in self.rows[f"{compute}|-"]["A"]["compute"]]

    def message_ns(self, traffic: Row) -> float:
        """Period of a message alone: the least over ranks and over stream priorities, which do not
        matter alone (the first transfers of a communicator are slower)."""
        wanted = {**traffic, "busy": "all"}
        periods = [
            side["median_ns"]
            for level in (False, True)
            for side in self._alone({**wanted, "high_priority": level})
            if side["ops"]
        ]
        return float(min(periods))

    def _alone(self, traffic: Row) -> list[Row]:
        level = "high" if traffic["high_priority"] else "equal"
        key = (f"-|{traffic['pattern']} {traffic['num_bytes']} ctas={traffic['ctas']} {level}"
               " busy=all")  # fmt: skip
        return self.rows[key]["A"]["traffic"] if key in self.rows else []

    def message(self, row: Row) -> Message:
        """The traffic of a pair's row as the model takes it."""
        traffic = row["traffic"]
        pattern, size = traffic["pattern"], traffic["num_bytes"]
        period = self.message_ns(traffic)
        gaps = [s["queue_ns"] for s in self._alone({**traffic, "high_priority": False}) if s["ops"]]
        gap = min(max(500.0, float(min(gaps))), period / 2)
        alone = period - gap
        ctas = row["traffic_launch"][0] if row["traffic_launch"] else 0
        fixed = _fixed_ns(alone, ctas)
        chain = 0.0
        if ctas:
            chain = chain_ns(alone - fixed, ctas, size, CTA_BYTES_PER_NS[pattern])
        first, second = (round(size * factor) for factor in HBM_FACTOR[pattern])
        eager = pattern == "send_recv" and size < BUFFER_BYTES * ctas
        return Message(
            alone, chain, fixed, ctas, (first, second), gap, eager, traffic["high_priority"],
            pattern in ("send_recv", "copy_engine"),
            traffic["busy"] == "all" and pattern != "copy_engine",
        )  # fmt: skip

    def measured(self, row: Row, runs: Iterable[str] = PHASES) -> tuple[float, float] | None:
        """Mean slowdown of compute and of traffic over those of ``runs`` that went as planned and
        the ranks that had both; None where there is none. An op's time alone is that of the same
        run, where it is known: the clock is another one a second later."""
        late = {mark[0] for mark in row["late"]}
        planned = [row[name] for name in runs if name in row and name not in late]
        ours = self.op_ns(row["compute"])
        theirs = self.message_ns(row["traffic"])
        lonely = row["traffic"]["busy"] == "first"
        found: list[float] = []
        for side in ("compute", "traffic"):
            weighed: list[tuple[float, int]] = []
            for run in planned:
                alone = _before_ns(run, ours) if side == "compute" else [theirs, theirs]
                weighed += [
                    (s["period_ns"] / base, min(s["ops"], 20))
                    for rank, (s, base) in enumerate(zip(run[side], alone, strict=True))
                    if s["ops"] and not (lonely and rank)
                ]
            if not weighed:
                return None
            found.append(sum(v * w for v, w in weighed) / sum(w for _, w in weighed))
        return found[0], found[1]

    def pairs(self, traits: Mapping[str, Trait]) -> list[Pair]:
        """Every pair that was measured as planned."""
        found: list[Pair] = []
        for row in self.rows.values():
            if row["compute"] == "-" or row["traffic"] is None:
                continue
            measured = self.measured(row)
            if measured is None:
                continue
            kernels = kernels_of(self.rows[f"{row['compute']}|-"], traits, self.num_sms)
            ours = statistics.mean(self.op_ns(row["compute"]))
            traffic = row["traffic"]
            found.append(
                Pair(
                    row["pair"], row["compute"], kernels, ours, self.message(row), measured,
                    traffic["pattern"], traffic["num_bytes"],
                )
            )  # fmt: skip
        return found


def _before_ns(run: Row, alone: Sequence[float]) -> list[float]:
    """Period of an op before the traffic of a run, on each rank; ``alone`` where there is none."""
    before = run.get("before", [{"ops": 0}] * len(alone))
    return [
        float(side["median_ns"]) if side["ops"] else base
        for side, base in zip(before, alone, strict=True)
    ]


def predict(pair: Pair, parameters: Parameters) -> tuple[float, float]:
    """Slowdowns of compute (mean over the ranks that compute) and traffic."""
    return replay(pair.kernels, pair.message, parameters, pair.op_ns)


def errors(pairs: Iterable[Pair], parameters: Parameters) -> list[tuple[Pair, float, float]]:
    """Error of both sides of each pair."""
    found: list[tuple[Pair, float, float]] = []
    for pair in pairs:
        compute, traffic = predict(pair, parameters)
        found.append(
            (pair, abs(compute / pair.measured[0] - 1), abs(traffic / pair.measured[1] - 1))
        )
    return found


def losses(pairs: Iterable[Pair], parameters: Parameters) -> list[float]:
    """|log(predicted / measured)| of both sides of each pair: robust, equal for twice and half."""
    return [
        abs(math.log(found / wanted))
        for pair in pairs
        for found, wanted in zip(predict(pair, parameters), pair.measured, strict=True)
    ]


# what is tried for each parameter: coarse, for a fit that a laptop makes in some minutes
CHOICES: dict[str, tuple[float, ...]] = {
    "busy_delay": (0.2, 0.3, 0.35, 0.4, 0.45, 0.55), "memory_power": (3.0, 5.0, 8.0, 14.0, 20.0),
    "memory_delay": (0.6, 0.8, 1.2, 1.6, 2.0, 2.4), "latency_delay": (1.0, 1.5, 2.0, 2.5, 3.0),
    "crowding": (0.35, 0.5, 0.7, 0.9),
    "bound_from": (0.5, 0.6, 0.7), "least_life": (0.3, 0.5, 0.65),
}  # fmt: skip


def start_of(profile: Profile) -> Parameters:
    """Where a fit begins: the SMs of the profile's machine and what its copy moves."""
    copy = [rate.per_second for rate in profile.rates if rate.name == "copy_bytes"]
    start = Parameters(num_sms=profile.hardware.num_sms)
    return replace(start, hbm_bytes_per_ns=copy[0] / 1e9) if copy else start


def choices_of(source: Pairs) -> dict[str, tuple[float, ...]]:
    """What a fit tries. Where an op's time alone is not of the very run, the clock moves kernels
    that compute by more than traffic does: their ``compute_delay`` is then left as it is."""
    if any("before" in row.get("A", {}) for row in source.rows.values()):
        return {**CHOICES, "compute_delay": (0.3, 0.5, 0.9, 1.4)}
    return CHOICES


def fit(
    pairs: Sequence[Pair],
    start: Parameters,
    choices: Mapping[str, Sequence[float]] = CHOICES,
    most: int = 600,
    rounds: int = 2,
    workers: int = 1,
) -> Parameters:
    """Parameters of least mean of :func:`losses` on ``most`` of the pairs that are not held out,
    one parameter after another; ``workers`` processes play them.

    Raises:
        ValueError: no pair is left to fit to.
    """
    seen = sorted((p for p in pairs if not p.held_out), key=lambda p: _digest(p.name)[1:])[:most]
    if not seen:
        raise ValueError("pairs: all of them are held out")
    with _played_by(workers) as play:

        def loss(parameters: Parameters) -> float:
            parts = play(losses, [seen[i::workers] for i in range(workers)], repeat(parameters))
            return math.fsum(chain.from_iterable(parts)) / len(seen)  # whoever played which

        best, least = start, loss(start)
        for _ in range(rounds):
            before = least
            for name, values in choices.items():
                for value in values:
                    tried = replace(best, **{name: value})
                    if tried != best and (found := loss(tried)) < least:
                        best, least = tried, found
            if least == before:
                break
    return best


@contextmanager
def _played_by(workers: int) -> Generator[Callable[..., Iterable[list[float]]]]:
    """A ``map`` over ``workers`` processes, or over none but this one."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool.map


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
