"""Finds figures of a profile that no machine can have: mostly a wrong unit.

Types cannot tell nanoseconds from microseconds or bytes from gigabytes. Physics can: nothing is
read faster than the memory delivers it. The bounds are wide on purpose (caches, overlapping
kernels, slow test machines): they catch factors of a thousand, not a bad measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.profiles.schema import SECOND_NS
from mhcplan.profiles.vocabulary import MEASURABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhcplan.profiles.schema import OpTiming, Profile
    from mhcplan.profiles.specs import HardwareSpec

_CACHE_SPEEDUP = 50  # a hot op whose data stays in cache may beat memory, not by more than this
_SLOWEST_SHARE = 1e-6  # of the datasheet's memory rate: slower is another unit
_LARGEST_FLOPS_PER_BYTE = 1e5  # of a machine's rates; GPUs have a few hundred
_LONGEST_READ_S = 100  # to read all of a machine's memory once; GPUs take some hundredths


def implausible(profile: Profile) -> Iterator[str]:
    """Lines "field: problem", in the order of the file; none for a sound profile."""
    yield from _of_hardware(profile)
    yield from _of_rates(profile)
    hardware = profile.hardware
    for i, row in enumerate(profile.ops):
        least_ns = _least_ns(row, hardware)
        if row.duration_ns * _CACHE_SPEEDUP < least_ns:
            yield (
                f"ops.{i}.duration_ns: {row.duration_ns} ns for {row.key} is impossible: its bytes"
                f" and flops take {least_ns:.0f} ns at the datasheet's rates; is the unit ns?"
            )
    for i, row in enumerate(profile.transfers):
        least_ns = row.bytes * SECOND_NS / hardware.memory_bytes_per_second
        if row.duration_ns * row.group_size < least_ns:
            yield (
                f"transfers.{i}.duration_ns: {row.duration_ns} ns for {row.bytes} bytes of"
                f" {row.pattern} is faster than memory; is the unit ns?"
            )


def _of_hardware(profile: Profile) -> Iterator[str]:
    hardware = profile.hardware
    if hardware.memory_bytes <= profile.overheads.context_bytes:
        yield (
            f"hardware.memory_bytes: {hardware.memory_bytes} bytes do not hold a CUDA context"
            f" (overheads.context_bytes {profile.overheads.context_bytes}); is the unit bytes?"
        )
    memory_rate = hardware.memory_bytes_per_second
    read_s = hardware.memory_bytes / memory_rate
    if not 1 / _LONGEST_READ_S < read_s / 0.1 < 10 * _LONGEST_READ_S:
        yield (
            f"hardware.memory_bytes_per_second: {memory_rate} would read the whole memory in"
            f" {read_s:.3g} s; is the unit bytes per second?"
        )
    if not 1 <= hardware.bf16_flops_per_second / memory_rate <= _LARGEST_FLOPS_PER_BYTE:
        yield (
            f"hardware.bf16_flops_per_second: {hardware.bf16_flops_per_second} does not go with"
            f" {memory_rate} bytes per second of memory; is the unit flops per second?"
        )
    link = hardware.inter_node.bytes_per_second
    if not memory_rate * _SLOWEST_SHARE <= link <= memory_rate:
        yield (
            f"hardware.inter_node.bytes_per_second: {link} against {memory_rate} of memory;"
            " is the unit bytes per second?"
        )


def _of_rates(profile: Profile) -> Iterator[str]:
    hardware = profile.hardware
    peaks = {
        "copy_bytes": hardware.memory_bytes_per_second,
        "read_bytes": hardware.memory_bytes_per_second,
        "gemm_bf16_flops": hardware.bf16_flops_per_second,
    }
    for i, rate in enumerate(profile.rates):
        peak = peaks[rate.name]
        if not peak * _SLOWEST_SHARE <= rate.per_second <= 2 * peak:
            yield (
                f"rates.{i}.per_second: {rate.per_second} of {rate.name}, where the datasheet says"
                f" {peak}; is the unit per second?"
            )


def _least_ns(row: OpTiming, hardware: HardwareSpec) -> float:
    kind = MEASURABLE[row.kind]
    return SECOND_NS * max(
        kind.flops(row.shape, row.pass_) / hardware.bf16_flops_per_second,
        kind.bytes(row.shape, row.pass_) / hardware.memory_bytes_per_second,
    )
