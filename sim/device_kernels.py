"""What ops put on a GPU: kernels as its SMs see them, traffic as SMs, memory and links see it.

These are the inputs of :mod:`mhcplan.sim.device_sms`, made from measurements: a profile says what
the kernels of an op are and how sensitive the machine is. Nothing here is chosen by hand but the
units.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A kernel of an op, as the SMs see it.

    Attributes:
        duration_ns: alone.
        ctas: of its grid; 0 where unknown: it is then taken for as many short ones.
        ctas_per_sm: that fit on one SM.
        hbm_bytes: moved at least.
        persistent: its CTAs stay to its end.
        pieces: of work (tiles) that a persistent kernel's CTAs do one after another; 0: one each,
            or any number where they are not dealt.
        dealt: whether pieces are dealt out at the start; else others do what a late CTA misses, but
            for its first one.
        tail_share: share of the duration, at its end, in which no CTA waits and SMs fall idle one
            after another (causal attention: the CTAs' work is unequal); 0: as the waves have it.
            Measured by when a CTA of equal priority gets in.
        cluster: CTAs that are placed together, on SMs of one GPC.
    """

    duration_ns: float
    ctas: int
    ctas_per_sm: int
    hbm_bytes: int = 0
    persistent: bool = False
    pieces: int = 0
    dealt: bool = True
    tail_share: float = 0.0
    cluster: int = 1


@dataclass(frozen=True)
class Traffic:
    """The kernel of a transfer.

    Attributes:
        ctas: that it places on each member's rank, an SM each; 0 for a copy engine.
        fixed_ns: of its duration alone, what does not depend on the size: its ends' handshake.
        chain_ns: of the rest, what its CTAs' chains of loads and stores take, and not the link.
        sent_hbm_bytes, received_hbm_bytes: memory traffic on a rank that sends, or receives; a
            member of a collective does what ``received_hbm_bytes`` says.
        link_share: of what the link can carry, taken by it alone.
    """

    ctas: int
    fixed_ns: int = 0
    chain_ns: int = 0
    sent_hbm_bytes: int = 0
    received_hbm_bytes: int = 0
    link_share: float = 1.0


@dataclass(frozen=True)
class Parameters:
    """What is measured or fitted once for a machine; the rest of the model is counted.

    The defaults were fitted to pairs measured on H100s (benchmarks/contention.py); ``together`` was
    read off traced steps (docs/accuracy.md).

    Attributes:
        num_sms: of the GPU.
        hbm_bytes_per_ns: what a copy reaches, bytes read plus bytes written.
        busy_delay: b: how much longer a communication CTA takes for its bytes beside any kernel, as
            a share.
        memory_delay: k: what is added beside kernels that use all of the memory bandwidth.
        memory_power: p: how steeply that grows: a chain takes 1 + b + k u^p as long beside a kernel
            that uses the share u of the memory bandwidth.
        latency_delay: a handshake, flags that go to and fro, takes so many times more of that
            delay than bytes do.
        compute_delay: how much longer a compute-bound CTA lives for each share of the memory
            bandwidth that traffic takes.
        crowding: how much longer CTAs live for each CTA more that shares their SM, as a share of
            what an SM without any slack would make them.
        bound_from: share of the memory bandwidth from which a kernel begins to be bound by it.
        least_life: shortest life of a memory-bound CTA, as a share of its life beside all others.
        clustered: share of the SMs that make whole clusters of four or eight CTAs. GPCs differ in
            their SMs from chip to chip; cuBLAS launches 120 CTAs of such products at most on each
            H100 and H200 that was measured. All SMs make pairs.
        together: rate of an op beside one of a more urgent stream, if one of them is bound by
            memory and the other is not, as a share of its rate alone. 0: nothing is gained.
    """

    num_sms: int = 132
    hbm_bytes_per_ns: float = 3000.0
    busy_delay: float = 0.35
    memory_delay: float = 2.0
    memory_power: float = 20.0
    latency_delay: float = 2.0
    compute_delay: float = 0.5
    crowding: float = 0.35
    bound_from: float = 0.7
    least_life: float = 0.5
    clustered: float = 120 / 132
    together: float = 0.0


@dataclass(frozen=True)
class Loads:
    """What the ops of each cost key put on a GPU.

    Attributes:
        kernels: of each cost key, in order; none for a transfer, and where they are unknown.
        traffic: of each cost key that is a transfer's.
        parameters: of the machine.
        compute_sms: SMs that compute kernels may use (a green context), None for all; grids are
            those of the whole GPU, as libraries launch them.
        connections: hardware queues that streams are dealt to (CUDA_DEVICE_MAX_CONNECTIONS).
    """

    kernels: tuple[tuple[Kernel, ...], ...]
    traffic: tuple[Traffic | None, ...]
    parameters: Parameters
    compute_sms: int | None = None
    connections: int = 8


def units(kernel: Kernel) -> int:
    """What is placed on SMs one by one: CTAs, or the pieces of work of a persistent kernel that
    any CTA may fetch."""
    return kernel.ctas if kernel.dealt else max(kernel.ctas, kernel.pieces)


def hbm_share(kernel: Kernel, parameters: Parameters) -> float:
    """Share of the memory bandwidth that a kernel uses alone."""
    return min(1.0, kernel.hbm_bytes / kernel.duration_ns / parameters.hbm_bytes_per_ns)
