"""What a kernel and traffic between GPUs do to each other while they overlap: the priced model.

The state that explains it is small, and each rule was read off device traces of an H100 (two
streams kept full; see :mod:`mhcplan.profiles.capture.contention`):

* **Admission.** A communication CTA takes a whole SM. At equal priority it is placed when an SM is
  free and no CTA of a kernel that was launched before it still waits for one: with streams kept
  full, once a kernel, at its tail. At high priority it takes the next SM that falls free. CTAs that
  run are never taken back; a persistent kernel gives up its SMs at its end.
* **SMs held.** A placed CTA moves its share of the message once its peer is placed too, and keeps
  its SM until that is done; those that found no SM follow. A kernel that starts meanwhile has that
  many SMs less: one that filled the chip in one wave needs a second one.
* **Eager sends.** The library's buffers take 4 MiB a CTA: a message in one direction that fits is
  sent whether or not the receiver's CTAs have been placed, so neither end waits for the other.
* **Memory.** Traffic is a chain of loads and stores: beside a kernel that uses the share u of the
  memory bandwidth each takes 1 + b + k u^p as long, unless the link is the narrower part: a little
  beside any kernel, three times where memory is saturated. The bytes that traffic moves are missing
  to the kernel: the data once at the sender, and three times at the receiver (into the buffer, out
  of it, to its place).

The types and rules are here; :func:`mhcplan.profiles.contention_play.overlap` plays them on two
ranks and prices a pair. All times are ns, rates bytes a ns (= GB/s); nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhcplan.sim.device_kernels import Kernel, Parameters, hbm_share, units

_TAIL_STEPS = 7


@dataclass(frozen=True)
class Message:
    """Traffic of one kind and size; one message follows another.

    Attributes:
        alone_ns: its kernel alone, both ends there.
        chain_ns: of that, what the CTAs' chains of loads and stores take at least; they share the
            time with the link (the longer of the two counts).
        fixed_ns: of that, what does not depend on the size.
        ctas: SMs that it holds on each rank; 0 for a copy engine.
        hbm_bytes: moved on each rank in the process, (first, second).
        gap_ns: from its end to the start of the next, alone.
        eager: whether the receiver's CTAs need not be placed for it to be sent.
        high_priority: of its stream.
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
    both_busy: bool = True


@dataclass(frozen=True)
class Slowdowns:
    """Time beside the other over time alone: mean per op (first, second rank), and per message.

    ``queue_ns``: mean time of a message from the end of the one before to its first CTA;
    ``kernel_ns``: from there to its end.
    """

    compute: tuple[float, float]
    traffic: float
    queue_ns: float
    kernel_ns: float


def message_ns(message: Message, share: float, parameters: Parameters, active: int = 0) -> float:
    """Time of a message's CTAs, once placed, beside kernels that use ``share`` of the bandwidth.

    ``active`` of them move at once (0: all), so that fewer have more of the link each.
    """
    part = active / message.ctas if active else 1.0
    squeezed = share**parameters.memory_power
    link = (message.alone_ns - message.fixed_ns) * part * (1 + parameters.link_delay * squeezed)
    busy = parameters.busy_delay if share > 0 else 0.0
    delay = 1 + busy + parameters.memory_delay * squeezed
    return message.fixed_ns * delay + max(link, message.chain_ns * delay)


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
