"""What the physics with contention knows of ops, kernels and machine, and keeps of each op.

The rules are those of :mod:`mhcplan.sim.device_sms`, the tables are made by
:mod:`mhcplan.sim.device_tables`. Shares are integers, in units of ``1 / SHARE``; work and rates are
those of :mod:`mhcplan.sim.device`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mhcplan.sim.jit import Ints

SHARE = 1 << 12
FAR = (1 << 63) - 1  # no time comes after it
NOT_PLACED = -1  # the rate of a transfer that has no SM yet


class Gpu(NamedTuple):
    """What the physics knows of ops, kernels and machine.

    Attributes:
        number: of each op in the order of issue; engines may index ops in another way.
        priority: of each op's stream; lower is more urgent.
        cost: cost key of each op.
        waits: 1 where an op's stream waits for events of others before it.
        ctas: of each op's transfer on its rank; -1 for a compute op.
        burden: of each op's transfer, share of the memory bandwidth it takes alone.
        out_link, in_link: of each op's transfer, the link that it sends or receives over, or -1.
        begin: kernels of cost key k are ``begin[k] : begin[k + 1]`` of the columns from ``like``
            on.
        like: the first kernel that differs from it in its duration at most.
        end: work of the op done at the kernel's end.
        life: work done in one wave; 0: none of its CTAs ends before the kernel does.
        tail: work before the end of the kernel from which on ``idle`` SMs have nothing to do.
        idle: see tail; -1: they fall idle one after another.
        used: SMs it uses outside of its tail.
        units, usual, fit, waves: CTAs or pieces, of which an SM takes ``usual`` and could take
            ``fit``; alone they take ``waves`` (:func:`waves_of`). units 0: any number of them.
        most: SMs that it finds places on where none is held: those that make whole clusters.
        less: share of a CTA's work that the last ones do not have, as many as SMs are ``idle``.
        fluid: share of its time that fewer SMs take longer for, any number of them; 0: it comes in
            waves.
        lone: life of a CTA in a last wave that is nearly empty, of its life in a full one.
        own: CTAs that have a first piece of their own, and fetch others: those that come late do it
            when the others have ended.
        bound: how far it is bound by memory.
        loose: 1 where CTAs end all the time, not in waves.
        drain_ns: what an urgent communication CTA waits for a whole SM.
        delay: of cost key k, how much longer chains of transfers take beside it.
        alone, fixed, chain: of cost key k, ns of a transfer; see
            :class:`mhcplan.sim.device_kernels.Traffic`.
        link: of cost key k, share of a link that a transfer takes alone.
        memory: of cost key k, how far it is bound by memory, mean over its kernels.
        machine: num_sms, SMs for compute, compute_delay, crowding, least_life, together,
            latency_delay.
    """

    number: Ints
    priority: Ints
    cost: Ints
    waits: Ints
    ctas: Ints
    burden: Ints
    out_link: Ints
    in_link: Ints
    begin: Ints
    like: Ints
    end: Ints
    life: Ints
    tail: Ints
    idle: Ints
    used: Ints
    units: Ints
    usual: Ints
    fit: Ints
    most: Ints
    waves: Ints
    less: Ints
    fluid: Ints
    lone: Ints
    own: Ints
    bound: Ints
    loose: Ints
    drain_ns: Ints
    delay: Ints
    alone: Ints
    fixed: Ints
    chain: Ints
    link: Ints
    memory: Ints
    machine: Ints


# Places in ``Gpu.machine``.
SMS, COMPUTE_SMS, COMPUTE_DELAY, CROWDING, LEAST_LIFE, TOGETHER, LATENCY_DELAY = range(7)
HAS_SMS, BESIDE = 1, 0  # ``State.placed`` of a compute op
KNOWN = 1 << 12  # more than any step was seen to ask


class State(NamedTuple):
    """What an engine knows of each op; from ``placed`` on it is kept by the physics.

    Attributes:
        start_ns: when it has begun, a transfer to move; or a negative number.
        work, rate, rated_at: work left at ``rated_at``, and the rate since; of compute ops.
        here_ns: when a transfer's member came to wait for SMs.
        placed, placed_ns: SMs that it holds there, and since when; negative before. Of a compute op
            ``placed`` is 1 while the SMs are its, 0 or less while it waits or goes on beside.
        spread: of a compute op, SMs that it had when a kernel of it was last seen to begin, without
            those that more urgent transfers have taken since.
        known: KNOWN slots of two, a question and its answer: a step asks few things many times.
    """

    start_ns: Ints
    work: Ints
    rate: Ints
    rated_at: Ints
    here_ns: Ints
    placed: Ints
    placed_ns: Ints
    spread: Ints
    known: Ints
