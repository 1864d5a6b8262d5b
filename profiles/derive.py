"""Profiles of machines that nobody measured yet: a measured one, scaled by datasheets.

Every figure of a derived profile is ``assumed`` and cites this rule:

* an op keeps its launch; the rest of its time changes as its roofline does, with the rates that
  were measured times the ratio of the datasheets' (arithmetic: dense bf16; bytes: HBM);
* a transfer in the node keeps the time of the shortest message; the rest changes as NVLink does;
* kernels keep their CTAs: that another number of SMs takes other waves is not modelled;
* host times, overheads and memory are those of the measured machine.

So a derived profile says what its machine would do with today's kernels and the same efficiency,
which a new generation rarely reaches at first and passes later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mhcplan.profiles.op_costs import scale_segments
from mhcplan.profiles.op_fit import Roofline
from mhcplan.profiles.presets import HARDWARE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mhcplan.profiles.schema import OpTiming, PowerModel, Profile, Rate, TransferTiming
    from mhcplan.profiles.specs import HardwareSpec

# Shipped names of derived profiles, and the measured profile that each is made from.
DERIVED = {"b200": "h100-sxm", "h800": "h100-sxm"}


class _NvLink(NamedTuple):
    """Bytes per second of one GPU in one direction."""

    bytes_per_second: int
    source: str


_NVLINK = {
    "h100-sxm": _NvLink(450_000_000_000, "NVIDIA H100 datasheet: NVLink 900 GB/s both ways"),
    "h800": _NvLink(200_000_000_000, "arXiv 2505.09343, section 4: NVLink 400 GB/s both ways"),
    "b200": _NvLink(900_000_000_000, "NVIDIA DGX B200 user guide: NVLink 1.8 TB/s both ways"),
}


def derive(profile: Profile, name: str) -> Profile:
    """The profile of machine ``name``, scaled from ``profile``.

    Raises:
        KeyError: no datasheet of ``name`` or of the profile's machine is known.
        ProfileError: ``profile`` lacks a rate.
    """
    machine = HARDWARE[name]
    scale = _Scale(profile, machine)
    model = profile.contention_model
    return profile.model_copy(
        update={
            "name": name,
            "hardware": machine,
            "rates": tuple(scale.rate(rate) for rate in profile.rates),
            "overheads": profile.overheads.model_copy(update=scale.assumed),
            "ops": tuple(scale.op(row) for row in profile.ops),
            "transfers": scale.transfers(profile.transfers),
            # fitted on pairs of another machine: the shares hold as far as its kernels do
            "contention_model": model and model.model_copy(update=scale.assumed),
            "power_model": scale.power(profile.power_model),
            "contention_ops": (),
            "contention_pairs": (),
            "priorities": (),
        }
    )


def with_network(profile: Profile, speed: float) -> Profile:
    """The profile where the network between nodes has ``speed`` times the bandwidth.

    A transfer keeps the time of the shortest message of its kind, its latency. What was measured is
    no longer: all of it is ``assumed``.
    """
    said = f"at {speed:g} times its bandwidth, as network_speed asks"
    link = profile.hardware.inter_node
    link = link.model_copy(
        update={
            "bytes_per_second": max(1, round(link.bytes_per_second * speed)),
            "source": f"{link.source}; {said}",
        }
    )
    assumed: dict[str, object] = {
        "source": "assumed", "citation": f"network of profile {profile.name} {said}",
    }  # fmt: skip
    return profile.model_copy(
        update={
            "hardware": profile.hardware.model_copy(update={"inter_node": link}),
            "transfers": tuple(
                _at_speed(row, latency_ns, speed, assumed) if row.medium == "inter_node" else row
                for row, latency_ns in _with_latency(profile.transfers)
            ),
        }
    )


def _with_latency(rows: Sequence[TransferTiming]) -> Iterator[tuple[TransferTiming, int]]:
    """Each transfer and its latency: transfers of the same pattern, medium and group share one."""
    shortest: dict[tuple[str, str, int], int] = {}
    for row in rows:
        curve = row.pattern, row.medium, row.group_size
        shortest[curve] = min(shortest.get(curve, row.duration_ns), row.duration_ns)
    for row in rows:
        yield row, shortest[row.pattern, row.medium, row.group_size]


def _at_speed(
    row: TransferTiming, latency_ns: int, speed: float, assumed: Mapping[str, object]
) -> TransferTiming:
    duration_ns = latency_ns + round((row.duration_ns - latency_ns) / speed)
    return row.model_copy(update={"duration_ns": duration_ns, "samples": 0, **assumed})


class _Scale:
    """How much faster the machine is than the one that was measured, by its datasheet."""

    def __init__(self, profile: Profile, machine: HardwareSpec) -> None:
        base = profile.hardware
        link, base_link = _NVLINK[machine.name], _NVLINK[base.name]
        self._flops = machine.bf16_flops_per_second / base.bf16_flops_per_second
        self._bytes = machine.memory_bytes_per_second / base.memory_bytes_per_second
        self._link = link.bytes_per_second / base_link.bytes_per_second
        self._roofline = Roofline(profile)
        self._launch_ns = profile.overheads.launch_ns
        self.assumed: dict[str, object] = {
            "source": "assumed",
            "citation": f"profile {profile.name} scaled by datasheets: {machine.source}",
        }
        self._assumed_link: dict[str, object] = {
            "source": "assumed",
            "citation": f"profile {profile.name} scaled by NVLink: {link.source}",
        }

    def rate(self, rate: Rate) -> Rate:
        factor = self._flops if rate.name == "gemm_bf16_flops" else self._bytes
        per_second = round(rate.per_second * factor)
        return rate.model_copy(update={"per_second": per_second, **self.assumed})

    def op(self, row: OpTiming) -> OpTiming:
        flops_ns, bytes_ns = self._roofline.work_ns(row.key)
        before_ns = max(flops_ns, bytes_ns)
        after_ns = max(flops_ns / self._flops, bytes_ns / self._bytes)
        ratio = after_ns / before_ns if before_ns > 0 else 1.0
        working_ns = max(row.duration_ns - self._launch_ns, 0)
        duration_ns = max(row.duration_ns - working_ns + round(working_ns * ratio), 1)
        return row.model_copy(
            update={
                "duration_ns": duration_ns,
                "samples": 0,
                "segments": scale_segments(row.segments, duration_ns / row.duration_ns, 1.0),
                **self.assumed,
            }
        )

    def power(self, model: PowerModel | None) -> PowerModel | None:
        """That of a chip with the same rates; what another draws at its limit is not known."""
        if model is None or self._flops != 1 or self._bytes != 1:
            return None
        return model.model_copy(update=self.assumed)

    def transfers(self, rows: tuple[TransferTiming, ...]) -> tuple[TransferTiming, ...]:
        return tuple(
            _at_speed(row, latency_ns, self._link, self._assumed_link)
            for row, latency_ns in _with_latency(rows)
            if row.medium == "intra_node"
        )
