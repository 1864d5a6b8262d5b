"""What a kernel and traffic between GPUs do to each other while they overlap: what was measured.

Rules read off device traces of an H100 (two streams kept full; see
:mod:`mhcplan.profiles.capture.contention`) are the physics of :mod:`mhcplan.sim.device_sms`; its
parameters are fitted by playing measured pairs (:mod:`mhcplan.profiles.contention_replay`). Here is
the traffic of a pair, and how long a CTA waits for a busy chip, for latencies trial by trial.

**Eager sends**: the library's buffers take 4 MiB a CTA. A message in one direction that fits is
sent whether or not the receiver's CTAs have been placed, so that neither end waits for the other. A
pair is played so; in a played step both ends meet.

All times are ns, rates bytes a ns (= GB/s); nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhcplan.sim.device_kernels import Kernel, Parameters, hbm_share, units

# the runs of a measured pair, and by how much of an op the second rank lags in each
PHASES = {"A": 0.0, "B": 1 / 3, "C": 2 / 3}
_TAIL_STEPS = 7


@dataclass(frozen=True)
class Message:
    """Traffic of one kind and size; one message follows another.

    Attributes:
        alone_ns: its kernel alone, both ends there.
        chain_ns: of that, what the CTAs' chains of loads and stores take (:func:`chain_ns`).
        fixed_ns: of that, what does not depend on the size.
        ctas: SMs that it holds on each rank; 0 for a copy engine.
        hbm_bytes: moved on each rank in the process, (first, second).
        gap_ns: from its end to the start of the next, alone.
        eager: whether the receiver's CTAs need not be placed for it to be sent.
        high_priority: of its stream.
        one_way: only the second rank receives; else both do.
        both_busy: whether both ranks compute meanwhile, or only the first.
    """

    alone_ns: float
    chain_ns: float
    fixed_ns: float
    ctas: int
    hbm_bytes: tuple[int, int]
    gap_ns: float = 1700.0
    eager: bool = False
    high_priority: bool = False
    one_way: bool = False
    both_busy: bool = True


def chain_ns(body_ns: float, ctas: int, num_bytes: int, cta_bytes_per_ns: float) -> float:
    """Of a transfer's time without its handshake, what its CTAs' chains of loads and stores take.

    What else bounds it, a full link most, hides chains as far as they are shorter: of chains that
    would take the share s of the time by themselves, the share s shows when they get longer. (A
    rule between two ends, chains as long as that time and none.)

    Args:
        body_ns: that time.
        ctas: that move the bytes.
        num_bytes: of the message, as its pattern counts them.
        cta_bytes_per_ns: what a CTA moves where nothing else limits it.
    """
    chains = min(body_ns, num_bytes / (ctas * cta_bytes_per_ns))
    return chains * chains / max(body_ns, 1.0)


def ends_of(kernel: Kernel, life: float, sms: int, pending: int) -> list[tuple[float, int]]:
    """When how many of ``sms`` fall free whose CTAs live ``life`` ns at most.

    ``pending``: CTAs that will take their place."""
    found = [(life, sms)]
    rounds = -(-kernel.pieces // kernel.ctas)
    if kernel.dealt and rounds > 1:  # some have a piece less
        full = sms * ((kernel.pieces - 1) % kernel.ctas + 1) // kernel.ctas
        found = [(life * (rounds - 1) / rounds, sms - full), (life, full)]
    if kernel.tail_share and not kernel.persistent:  # CTAs of unequal work, out of step throughout
        parts = [sms * (i + 1) // _TAIL_STEPS - sms * i // _TAIL_STEPS for i in range(_TAIL_STEPS)]
        return [
            (life * (0.5 + i / (_TAIL_STEPS - 1)), part) for i, part in enumerate(parts) if part
        ]
    if kernel.tail_share and not pending:
        tail = min(kernel.tail_share * kernel.duration_ns, life)
        steps = min(sms, _TAIL_STEPS)
        parts = [sms * (i + 1) // steps - sms * i // steps for i in range(steps)]
        early = [tail * (1 - i / max(1, steps - 1)) for i in range(steps)]
        found = [(life - before, part) for before, part in zip(early, parts, strict=True)]
    return [(end, part) for end, part in found if part]


def wait_ns(
    kernel: Kernel, age_ns: float, parameters: Parameters, *, urgent: bool, beside: bool = False
) -> float:
    """Time until a CTA of another stream is placed, ns; 0 where that is at once.

    Args:
        kernel: what keeps the chip busy, alone since ``age_ns``.
        age_ns: how long it has run.
        parameters: of the machine.
        urgent: the other stream is the more urgent one: the CTA is placed before the kernel's CTAs
            that still wait. A persistent kernel has none, and no urgency helps against it.
        beside: the CTA fits on an SM beside the kernel's own.
    """
    usual = min(kernel.ctas_per_sm, -(-kernel.ctas // parameters.num_sms))
    life = kernel.duration_ns / -(-units(kernel) // (usual * parameters.num_sms))
    at = kernel.duration_ns * (1 - kernel.tail_share)
    if kernel.ctas < parameters.num_sms or (beside and (urgent or kernel.persistent)):
        at = 0.0
    elif urgent and not kernel.persistent:
        # CTAs of unequal life, and those that wait for memory, soon lose their step: some SM falls
        # free all the time
        loose = kernel.tail_share or hbm_share(kernel, parameters) > parameters.bound_from
        at = age_ns if loose else (age_ns // life + 1) * life
    elif not kernel.tail_share:
        at -= life  # the last wave is placed; does it leave SMs idle?
        if not beside and units(kernel) % (usual * parameters.num_sms) == 0:
            at += min(end for end, _ in ends_of(kernel, life, parameters.num_sms, 0))
    return min(max(0.0, at - age_ns), max(0.0, kernel.duration_ns - age_ns))
