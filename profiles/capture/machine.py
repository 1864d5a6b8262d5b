"""The machine and the code of a capture: provenance, rates and overheads."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mhcplan.profiles.schema import Provenance, Rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.profiles.capture.timing import GpuTimer
    from mhcplan.profiles.specs import HardwareSpec

_ENVIRONMENT = ("NCCL_", "CUDA_", "TORCH_NCCL_", "PYTORCH_", "TRITON_", "NVIDIA_TF32")
_MEASURING = ("cases", "comm", "machine", "ops", "segments", "timing")  # of this folder
_COPY_BYTES = 2 * 1024**3
_GEMM_SIZE = 8192
_CHAIN_LENGTH, _GRAPHS = 32, 4
_CHAIN_BYTES = 2**25  # an addition reads and writes all of them


def code_sha256() -> str:
    """Hash of every file that decides what is timed and how: kernels, timing, the vocabulary."""
    import mhcplan.kernels
    import mhcplan.profiles

    profiles = Path(str(mhcplan.profiles.__file__)).parent
    files = sorted(Path(str(mhcplan.kernels.__file__)).parent.glob("*.py"))
    files += [profiles / "capture" / f"{name}.py" for name in _MEASURING]
    files.append(profiles / "vocabulary.py")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """The accelerator's name as the driver has it; the processor's architecture on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()}"


def unlike(hardware: HardwareSpec, name: str, num_sms: int, memory_bytes: int) -> str | None:
    """What a device and the preset that is to describe it differ in, as a line; None: nothing."""
    if num_sms == hardware.num_sms and 0.8 < memory_bytes / hardware.memory_bytes < 1.25:
        return None
    return (
        f"{name} has {num_sms} SMs and {memory_bytes / 1e9:.0f} GB, --hardware {hardware.name}"
        f" {hardware.num_sms} and {hardware.memory_bytes / 1e9:.0f} GB: name the machine that it is"
    )


def smi_command(fields: str) -> list[str]:
    """The nvidia-smi command that asks for ``fields`` of torch's first device.

    By its UUID: CUDA_VISIBLE_DEVICES numbers devices anew, nvidia-smi does not heed it.
    """
    uuid = torch.cuda.get_device_properties(0).uuid
    return ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits",
            "-i", f"GPU-{uuid}"]  # fmt: skip


def _query(fields: str, load: GpuTimer | None) -> list[str]:
    """nvidia-smi's answer, asked under load; nothing where it is missing."""
    try:
        with subprocess.Popen(smi_command(fields), stdout=subprocess.PIPE, text=True) as process:
            while load is not None and process.poll() is None:
                load.heat(0.05)
            found = process.communicate(timeout=20)[0]
    except (OSError, subprocess.SubprocessError):
        return []
    lines = found.strip().splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else []


def _versions(device: torch.device) -> dict[str, str]:
    import triton

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device.type == "cuda":
        from torch.cuda import nccl

        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["nccl"] = ".".join(map(str, nccl.version()))
    return versions


def _command(arguments: list[str]) -> str:
    """The command that repeats this capture; of paths their last part, the rest is nobody's."""
    shown = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    if shown[:2] == ["profile", "measure"]:
        return " ".join(["mhcplan", *shown])
    return " ".join(["python -m mhcplan.profiles.capture", *shown])


def provenance(
    device: torch.device, num_devices: int, code: str, load: GpuTimer | None = None
) -> Provenance:
    """What runs here, now. Clock and power are read under ``load`` where one is given."""
    clock, power, driver = 0, 0.0, platform.platform()
    if device.type == "cuda":
        readings = [_query("clocks.sm,power.draw,driver_version", load) for _ in range(3)]
        found = [r for r in readings if len(r) == 3]
        if found:
            clock = round(statistics.median(float(r[0]) for r in found))
            power = statistics.median(float(r[1]) for r in found)
            driver = found[-1][2]
    return Provenance(
        device=device_name(device),
        num_devices=num_devices,
        driver=driver,
        sm_clock_mhz=clock,
        power_watts=power,
        versions=_versions(device),
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
        measured_on=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        command=_command(sys.argv[1:]),
        code_sha256=code,
    )


def measure_rates(timer: GpuTimer) -> list[Rate]:
    """Copy (bytes read plus written), read and bf16 matrix rates of the current GPU, hot."""
    device = timer.device
    half = _COPY_BYTES // 2
    a, b = (torch.empty(half, dtype=torch.uint8, device=device) for _ in range(2))
    a.random_()
    wide = a.view(torch.float32)
    x, y = (
        torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(x)
    work = {
        "copy_bytes": (lambda: b.copy_(a), 2 * half),
        "read_bytes": (lambda: torch.sum(wide), half),
        "gemm_bf16_flops": (lambda: torch.mm(x, y, out=out), 2 * _GEMM_SIZE**3),
    }
    rates = []
    for name, (call, amount) in work.items():
        sample = timer.measure([call], 60_000_000)
        per_second = round(amount / sample.duration_ns * 1e9)
        rates.append(
            Rate(
                source="measured", name=name, per_second=per_second,  # type: ignore[arg-type]
                spread_percent=sample.spread_percent,
            )
        )  # fmt: skip
    return rates


def _host_median_ns(call: Callable[[], object], repeats: int = 200) -> int:
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    torch.cuda.synchronize()
    return round(statistics.median(times))


class GraphCosts(NamedTuple):
    """By how much sooner kernels of a CUDA graph follow each other than on a stream; what a graph
    takes beyond its kernels. In ns."""

    gap_ns: int
    launch_ns: int


def measure_graphs(timer: GpuTimer) -> GraphCosts:
    """Of a chain of additions and of one of matrix products, some 20 and 70 us each: run on a
    stream, as one graph, and as several graphs one after another. The mean of the two."""
    x = torch.zeros(_CHAIN_BYTES // 4, device=timer.device)
    a, b, c = (
        torch.randn(rows, 2560, device=timer.device, dtype=torch.bfloat16)
        for rows in (4096, 2560, 4096)
    )
    chains = [_chain(timer, lambda: x.add_(1)), _chain(timer, lambda: torch.mm(a, b, out=c))]
    return GraphCosts(*(max(round(statistics.fmean(of)), 0) for of in zip(*chains, strict=True)))


def _chain(timer: GpuTimer, kernel: Callable[[], object]) -> tuple[float, float]:
    """Gap and launch, see :class:`GraphCosts`, of a chain of one kernel."""

    def chain(kernels: int = _CHAIN_LENGTH) -> None:
        for _ in range(kernels):
            kernel()

    def kernel_ns(call: Callable[[], object]) -> float:
        sample = timer.measure([call], 30_000_000, kernels=_CHAIN_LENGTH)
        return sample.duration_ns / _CHAIN_LENGTH

    def as_graphs(count: int) -> Callable[[], object]:
        graphs = [torch.cuda.CUDAGraph() for _ in range(count)]
        for graph in graphs:
            with torch.cuda.graph(graph):
                chain(_CHAIN_LENGTH // count)
        return lambda: [graph.replay() for graph in graphs]

    chain()  # libraries are loaded before a capture
    on_stream, as_one, as_several = (
        kernel_ns(call) for call in (chain, as_graphs(1), as_graphs(_GRAPHS))
    )
    launch_ns = (as_several - as_one) * _CHAIN_LENGTH / (_GRAPHS - 1)
    return on_stream - as_one + launch_ns / _CHAIN_LENGTH, launch_ns


class HostCosts(NamedTuple):
    """Host time to launch a kernel, to record an event and to make a stream wait for one, in ns."""

    launch_ns: int
    event_record_ns: int
    event_wait_ns: int


def measure_host(device: torch.device) -> HostCosts:
    """Medians over 200 calls each."""
    x = torch.zeros(1, device=device)
    event, stream = torch.cuda.Event(), torch.cuda.Stream(device)
    event.record()
    for _ in range(20):
        x.add_(1)
    torch.cuda.synchronize(device)
    return HostCosts(
        launch_ns=_host_median_ns(lambda: x.add_(1)),
        event_record_ns=_host_median_ns(lambda: event.record()),
        event_wait_ns=_host_median_ns(lambda: stream.wait_event(event)),
    )


def context_bytes(device: torch.device) -> int:
    """Device memory in use beyond what the caching allocator holds: context, code, libraries.

    What other processes hold would be counted too: measure on an idle machine.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
