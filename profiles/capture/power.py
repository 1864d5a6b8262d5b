"""The part of a capture that finds what a GPU draws, and how far it lowers its clock.

Every load repeats for a second or more, long enough for the power limit to show: on an H100 the
clock falls some 50 ms after the limit is passed. The driver is asked every few milliseconds by
nvidia-smi. A log of lines stands beside the profile; :func:`with_power` fits the power model to it.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from mhcplan.kernels.layers import Env, make_case
from mhcplan.profiles.capture import machine
from mhcplan.profiles.capture.ops import append_line
from mhcplan.profiles.power import Row, fit_power, read_rows
from mhcplan.profiles.vocabulary import OP_KINDS, op_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mhcplan.profiles.schema import Profile
    from mhcplan.profiles.vocabulary import OpKey

POWER_SECONDS = 110.0
_LOAD_SECONDS = 1.2
_BLOCK = (1920, 4096)  # width and tokens of the block that is run as a load: the paper's 9B
_PERIOD_MS = 20
_REST_S = 0.3
_FIELDS = "power.draw.instant,clocks.sm,temperature.gpu"


class Load(NamedTuple):
    """Something to repeat: ``run`` enqueues it once; the stream then rests ``rest_share`` of the
    time that it took."""

    name: str
    run: Callable[[], object]
    rest_share: float = 0.0
    flops: int = 0
    hbm_bytes: int = 0


Reading = tuple[float, ...]  # of _FIELDS


@contextmanager
def metered() -> Iterator[list[Reading]]:
    """Read power and clock meanwhile; the list is filled at the end, in order."""
    command = [*machine.smi_command(_FIELDS), "-lms", str(_PERIOD_MS)]
    found: list[Reading] = []
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, stdout=file, text=True)
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
        file.seek(0)
        found += filter(None, map(_reading, file))


def _reading(line: str) -> Reading | None:
    """A line's values; None for a line that was cut short or is no reading."""
    try:
        values = tuple(float(v) for v in line.split(","))
    except ValueError:
        return None
    return values if len(values) == _FIELDS.count(",") + 1 else None


def measure_load(load: Load, seconds: float) -> Row:
    """Run a load for ``seconds``; what it draws is read over the last 60 % of them."""
    load.run()
    torch.cuda.synchronize()
    time.sleep(_REST_S)
    cold = min(_time(load.run, 3))
    rest_cycles = int(load.rest_share * cold * 1.98)  # of the clock that a rested chip has
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    per_turn = max(1, round(30e6 / (cold * (1 + load.rest_share))))
    with metered() as readings:
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            for _ in range(per_turn):
                load.run()
                if rest_cycles:
                    torch.cuda._sleep(rest_cycles)
            events[1].record()
            pairs.append((events[0], events[1]))
            if len(pairs) > 2:
                pairs[-3][1].synchronize()  # two turns ahead of the stream
        torch.cuda.synchronize()
    last = readings[len(readings) * 2 // 5 :] or readings
    spans = [1e6 * a.elapsed_time(b) / per_turn for a, b in pairs[len(pairs) * 2 // 5 :]]
    watts, clock, degrees = (statistics.fmean(v) for v in zip(*last, strict=True))
    return Row(
        load.name, round(statistics.median(spans)), round(cold), round(watts, 1),
        round(clock, 1), round(degrees, 1), load.flops, load.hbm_bytes, load.rest_share,
    )  # fmt: skip


def _time(run: Callable[[], object], repeats: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(2_000_000)  # the host is ahead
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return [1e6 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def matrix_tflops(device: torch.device, size: int = 8192) -> float:
    """The bf16 matrix rate of a rested chip, 10^12 a second: before the power limit is felt."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    time.sleep(_REST_S)
    return 2 * size**3 / min(_time(lambda: torch.mm(a, b, out=out), 3)) / 1e3


def measure_power_part(log: Path, device_type: str, budget_seconds: float) -> None:
    """Measure all steady loads; those that ``log`` has are not measured again.

    Raises:
        ValueError: no CUDA device.
        OSError: nvidia-smi is missing.
    """
    if device_type != "cuda":
        raise ValueError(f"device={device_type}: the part power needs a CUDA device")
    device = torch.device("cuda")
    stamp = {"device": machine.device_name(device), "limit_watts": limit_watts()}
    done = {row.name for row, _ in read_rows(log, stamp["device"])}
    deadline = time.monotonic() + min(budget_seconds, POWER_SECONDS)
    keys = block_keys(*_BLOCK, 1) | block_keys(*_BLOCK, 4)
    for load in loads(device, keys):
        if time.monotonic() > deadline:
            break
        if load.name in done:
            continue
        row = measure_load(load, _LOAD_SECONDS)
        print(f"[capture] {row}", file=sys.stderr, flush=True)
        append_line(log, {**stamp, "row": row._asdict()})


def with_power(profile: Profile, log: Path) -> Profile:
    """``profile`` with the power model of a log, as far as there is one of its device."""
    rows = read_rows(log, profile.provenance[0].device)
    if not rows:
        return profile
    try:
        model = fit_power([row for row, _ in rows], rows[-1][1])
    except ValueError as error:
        print(f"[capture] no power model: {error}", file=sys.stderr)
        return profile
    return profile.model_copy(update={"power_model": model})


def limit_watts() -> float:
    """The power limit that the driver enforces.

    Raises:
        OSError: nvidia-smi is missing.
    """
    asked = subprocess.run(
        machine.smi_command("power.limit"), capture_output=True, text=True, check=True
    )
    return float(asked.stdout)


def graph_of(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Calls as one CUDA graph, so that the host need not keep up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def loads(device: torch.device, keys: Mapping[str, Sequence[OpKey]]) -> Iterator[Load]:
    """Steady loads: idle, copies, matrix products at several shares of the time, ops of a model.

    Args:
        device: a CUDA device.
        keys: by name, ops that run one after another.
    """
    size, half = 8192, 2**30
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    c, x = torch.empty_like(a), torch.empty(half, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    product = partial(torch.mm, a, b, out=c)
    yield Load("idle", lambda: torch.cuda._sleep(2_000_000))
    yield Load("copy", lambda: y.copy_(x), hbm_bytes=2 * half)
    for rest in (2.0, 1.0, 0.5, 0.25, 0.1, 0.0):
        yield Load(f"gemm rest {rest}", product, rest, 2 * size**3)
    for rest in (1.0, 0.25, 0.0):
        yield Load(f"gemm+copy rest {rest}", graph_of([product, lambda: y.copy_(x)]), rest,
                   2 * size**3, 2 * half)  # fmt: skip
    env = Env(device)
    for name, of in keys.items():
        cases = {key: make_case(key.kind, dict(key.shape), env) for key in of}
        calls = [cases[key].prepare(key.pass_) for key in of]
        for rest in (0.25, 0.0) if len(of) > 1 else (0.0,):
            yield Load(
                f"{name} rest {rest}", graph_of(calls), rest,
                sum(OP_KINDS[k.kind].flops(dict(k.shape), k.pass_) for k in of),
                sum(OP_KINDS[k.kind].bytes(dict(k.shape), k.pass_) for k in of),
            )  # fmt: skip
        del cases, calls


def block_keys(hidden: int, tokens: int, n: int) -> dict[str, list[OpKey]]:
    """Ops of a block of the paper's models, F, I and W, with mHC or plain; and the heavy ones."""
    heads, ffn, top_k, experts = hidden // 80, {1920: 1280, 2560: 1536}[hidden], 6, 16
    here = {"hidden": hidden, "tokens": tokens}
    mla = {**here, "seq": tokens, "heads": heads, "nope": 128, "rope": 64, "v": 128,
           "kv_rank": 512, "q_rank": 0}  # fmt: skip
    shapes: list[tuple[str, str, dict[str, int], int]] = [
        ("norm", "FI", here, 2),
        ("attention_mla", "FIW", mla, 1),
        ("router", "FIW", {**here, "experts": experts, "top_k": top_k}, 1),
        ("shared_experts", "FIW", {**here, "ffn": 2 * ffn}, 1),
        ("experts", "FIW",
         {"rows": tokens * top_k, "hidden": hidden, "ffn": ffn, "experts": experts}, 1),
        ("unpermute", "FI", {**here, "top_k": top_k}, 1),
    ]  # fmt: skip
    if n > 1:
        site = {**here, "n": n}
        shapes += [("mhc_pre", "FIW", {**site, "steps": 20}, 2), ("mhc_post", "FI", site, 2)]
    else:
        shapes.append(("residual", "FI", here, 2))
    return {
        f"block n={n}": [
            op_key(kind, p, **shape) for kind, passes, shape, times in shapes
            for p in passes for _ in range(times)
        ]
    } | {
        f"{kind}.{p}": [op_key(kind, p, **shape)]
        for kind, passes, shape, _ in shapes
        if kind in ("attention_mla", "shared_experts", "experts", "mhc_pre", "mhc_post")
        for p in passes
    }  # fmt: skip
