"""A profile of a machine that is slower by a factor in every respect.

Costs, steps and whole predictions of such a machine are slower by the same factor: what does not
scale is a number hidden in the code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhcplan.profiles.schema import OpTiming, Overheads, Profile, Segment
    from mhcplan.profiles.specs import HardwareSpec


def scaled(profile: Profile, factor: int) -> Profile:
    """``profile`` with every time multiplied and every rate divided by ``factor``."""
    return profile.model_copy(
        update={
            "hardware": _hardware(profile.hardware, factor),
            "rates": tuple(
                rate.model_copy(update={"per_second": rate.per_second // factor})
                for rate in profile.rates
            ),
            "overheads": _overheads(profile.overheads, factor),
            "ops": tuple(_op(row, factor) for row in profile.ops),
            "transfers": tuple(
                row.model_copy(
                    update={
                        "duration_ns": row.duration_ns * factor,
                        "host_ns": row.host_ns * factor,
                    }
                )
                for row in profile.transfers
            ),
        }
    )


def _hardware(hardware: HardwareSpec, factor: int) -> HardwareSpec:
    link = hardware.inter_node
    return hardware.model_copy(
        update={
            "memory_bytes_per_second": hardware.memory_bytes_per_second // factor,
            "bf16_flops_per_second": hardware.bf16_flops_per_second // factor,
            "inter_node": link.model_copy(
                update={
                    "bytes_per_second": link.bytes_per_second // factor,
                    "latency_ns": link.latency_ns * factor,
                }
            ),
        }
    )


def _overheads(overheads: Overheads, factor: int) -> Overheads:
    return overheads.model_copy(
        update={name: value * factor for name, value in overheads if name.endswith("_ns")}
    )


def _op(row: OpTiming, factor: int) -> OpTiming:
    return row.model_copy(
        update={
            "duration_ns": row.duration_ns * factor,
            "host_ns": row.host_ns * factor,
            "segments": tuple(_segment(segment, factor) for segment in row.segments),
        }
    )


def _segment(segment: Segment, factor: int) -> Segment:
    return segment.model_copy(
        update={"duration_ns": segment.duration_ns * factor, "cta_ns": segment.cta_ns * factor}
    )
