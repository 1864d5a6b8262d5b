"""Measuring op keys: time of each pass, host time, memory and kernels, one JSON line a row.

A file of lines is both the log and the state: a run that is killed and started again skips the
keys that have a line with the same device and the same hash of the measuring code.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mhcplan.kernels.layers import Case, Env, storage_bytes
from mhcplan.profiles.capture.cases import make_case
from mhcplan.profiles.capture.options import OP_BUDGET_NS
from mhcplan.profiles.capture.segments import Chip, Kernel, chip_of, make_segments, record_kernels
from mhcplan.profiles.capture.timing import GpuTimer, HostTimer, make_timer
from mhcplan.profiles.schema import OpTiming, Segment
from mhcplan.profiles.vocabulary import MEASURABLE, OpKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_SET_LIMIT = 12
_SETS_MEMORY_SHARE = 0.25
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_DTYPES = {"gemm_fp8": "fp8"}  # of kinds that have their own


@dataclass
class Session:
    """One device and what is measured on it.

    Attributes:
        device: where to measure.
        dtype: of parameters and activations.
        code_sha256: hash of the measuring code (see :mod:`mhcplan.profiles.capture.machine`).
        device_name: as the driver has it.
        budget_ns: stream time of one pass of one op.
    """

    device: torch.device
    dtype: torch.dtype
    code_sha256: str
    device_name: str
    budget_ns: int = OP_BUDGET_NS
    timer: GpuTimer | HostTimer = field(init=False)
    chip: Chip | None = field(init=False)

    def __post_init__(self) -> None:
        """Make the timer; what Python has imported by now is no garbage, and is not looked at in
        every collection."""
        gc.collect()
        gc.freeze()
        self.timer = make_timer(self.device)
        self.chip = chip_of(self.device) if self.is_gpu else None

    def tidy(self) -> None:
        """Give memory back where little is left: weights of one op are all garbage at the next."""
        if self.is_gpu:
            free, total = torch.cuda.mem_get_info(self.device)
            if free < total // 2:
                gc.collect()
                torch.cuda.empty_cache()

    @property
    def is_gpu(self) -> bool:
        """Whether there is a stream to time."""
        return self.device.type == "cuda"


class Log:
    """The lines of a capture: append-only, flushed as they come."""

    def __init__(self, path: Path, session: Session) -> None:
        """Read what is there; a last line cut short by a kill is dropped."""
        self._path = path
        self._stamp = {"code": session.code_sha256, "device": session.device_name}
        self.rows: dict[str, OpTiming] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return
        if all(entry.get(k) == v for k, v in self._stamp.items()):
            row = OpTiming.model_validate(entry["row"])
            self.rows[str(row.key)] = row

    def append(self, row: OpTiming) -> None:
        """Add a row and write its line."""
        self.rows[str(row.key)] = row
        data = row.model_dump(mode="json", by_alias=True, exclude_none=True)
        append_line(self._path, {**self._stamp, "row": data})


def append_line(log: Path, entry: Mapping[str, object]) -> None:
    """Add a line to a log; after one that a kill cut short, on a line of its own."""
    text = log.read_bytes() if log.exists() else b""
    is_cut = bool(text) and not text.endswith(b"\n")
    with log.open("a", encoding="utf-8") as file:
        file.write("\n" * is_cut + json.dumps(entry) + "\n")


def groups(keys: Iterable[OpKey]) -> Iterator[tuple[str, dict[str, int], list[str]]]:
    """Keys that share kind and shape: (kind, shape, passes), in the order they first appear."""
    found: dict[tuple[str, tuple[tuple[str, int], ...]], list[str]] = {}
    for key in keys:
        found.setdefault((key.kind, key.shape), []).append(key.pass_)
    for (kind, shape), passes in found.items():
        yield kind, dict(shape), passes


def measure_ops(
    keys: Sequence[OpKey], session: Session, log: Log, deadline: float = float("inf")
) -> list[OpKey]:
    """Measure the keys that ``log`` does not have, in order, until ``deadline`` (monotonic, s).

    A key that fails (out of memory, say) is reported on stderr and left out.

    Returns:
        The keys that are still missing.
    """
    todo = [key for key in keys if str(key) not in log.rows]
    work = list(groups(todo))
    if work:
        session.timer.heat(1.0)
    begin = time.monotonic()
    for done, (kind, shape, passes) in enumerate(work):
        if time.monotonic() > deadline:
            break
        try:
            rows = _measure_case(kind, shape, passes, session)
        except Exception as error:  # a compiler's errors have no common base
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"[capture] {kind} {shape}: failed: {text}", file=sys.stderr)
            rows = []
        for row in rows:
            log.append(row)
        session.tidy()
        seconds = time.monotonic() - begin
        times = " ".join(f"{r.pass_}={r.duration_ns / 1000:.1f}us" for r in rows)
        print(
            f"[capture {done + 1}/{len(work)} {seconds:.0f}s] {kind} {_axes(shape)}: {times}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return [key for key in keys if str(key) not in log.rows]


def _axes(shape: dict[str, int]) -> str:
    return " ".join(f"{k}={v}" for k, v in shape.items())


def _measure_case(
    kind: str, shape: dict[str, int], passes: Sequence[str], session: Session
) -> list[OpTiming]:
    env = Env(session.device, session.dtype)
    first = make_case(kind, shape, env)
    kernels: dict[str, list[Kernel]] = {key: [] for key in passes}
    memory: dict[str, dict[str, int]] = {p: {} for p in passes}
    if session.is_gpu:
        calls = [first.prepare(p) for p in passes]
        for call in calls:
            call()
        kernels = dict(zip(passes, record_kernels(calls), strict=True))
        memory = _memory(first, passes)
    cases = [first, *_more_cases(first, kind, shape, passes, session)]
    rows = []
    for p in passes:
        count = _sets(MEASURABLE[kind].bytes(shape, p), session)
        calls = [case.prepare(p) for case in cases[:count]]
        launched = max(1, len(kernels[p]))
        sample = session.timer.measure(calls, session.budget_ns, kernels=launched + 1)
        rows.append(_row(kind, p, shape, session, sample, kernels[p], memory[p]))
    return rows


def _row(
    kind: str, pass_: str, shape: dict[str, int], session: Session, sample: Any,  # noqa: ANN401
    kernels: Sequence[Kernel], memory: dict[str, int],
) -> OpTiming:  # fmt: skip
    segments: tuple[Segment, ...] = ()
    if session.chip is not None:
        moved = MEASURABLE[kind].bytes(shape, pass_)
        segments = make_segments(kernels, session.chip, sample.duration_ns, moved)
    return OpTiming(
        source="measured", kind=kind, pass_=pass_, shape=shape,
        dtype=_DTYPES.get(kind) or _NAMES[session.dtype],
        duration_ns=sample.duration_ns, spread_percent=sample.spread_percent,
        samples=sample.samples, host_ns=sample.host_ns, segments=segments,
        saved_bytes=memory.get("saved"), deferred_bytes=memory.get("deferred"),
        workspace_bytes=memory.get("workspace"),
    )  # fmt: skip


def _sets(moved_bytes: int, session: Session) -> int:
    """Input sets to rotate so that a set's data has left the L2 cache when its turn comes again."""
    if not session.is_gpu:
        return 1
    l2 = torch.cuda.get_device_properties(session.device).L2_cache_size
    return max(1, min(_SET_LIMIT, -(-2 * l2 // max(1, moved_bytes))))


def _more_cases(
    first: Case, kind: str, shape: dict[str, int], passes: Sequence[str], session: Session
) -> Iterator[Case]:
    """Further input sets for the same op, as many as the lightest pass needs and memory allows."""
    if not first.inputs:
        return iter(())
    need = max(_sets(MEASURABLE[kind].bytes(shape, p), session) for p in passes)
    if session.is_gpu:
        kept = storage_bytes([*first.inputs, *first.saved, *first.grads, *first.deferred])
        free = torch.cuda.mem_get_info(session.device)[0]
        need = min(need, 1 + int(free * _SETS_MEMORY_SHARE / max(1, kept)))
    seeds = itertools.count(1)
    return iter(
        [make_case(kind, shape, Env(session.device, session.dtype, next(seeds)), op=first.op)
         for _ in range(need - 1)]
    )  # fmt: skip


def _memory(case: Case, passes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Bytes that passes keep and need, as the allocator sees them (blocks of 512 bytes)."""
    found: dict[str, dict[str, int]] = {}
    for p in passes:
        call = case.prepare(p)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result: Any = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        found[p] = {"workspace": max(0, peak)}
        if p == "F":
            outputs, saved = result
            found[p]["saved"] = storage_bytes(saved, beyond=[*case.inputs, *outputs])
        elif p == "I":
            found[p]["deferred"] = storage_bytes(result[1])
        del result
    return found
