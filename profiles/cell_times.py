"""Times of pipeline actions in a torch profiler trace of somebody's run.

``torch.distributed.pipelining`` puts every action into a range named ``PP:<cell>``, such as
``PP:0F3`` (any trainer can: ``torch.profiler.record_function``). What a cell took on the GPU is the
time of the kernels that were launched within its range, from any thread, less NCCL's: transfers are
priced by themselves. In a trace without a GPU it is the range's own time. Cells in overlapped pairs
share the GPU and say nothing about either alone; they are counted and left out.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mhcplan.profiles.schema import ProfileError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_CELL = re.compile(r"PP:(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"PP:\(.*\)OVERLAP_F_B")
_ON_GPU = ("kernel", "gpu_memset", "gpu_memcpy")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_GZIP = b"\x1f\x8b"


class Cell(NamedTuple):
    """A stage and a pass letter of torch's: F, B, I or W."""

    stage: int
    pass_: str


@dataclass(frozen=True)
class CellTimes:
    """What traces say.

    Attributes:
        samples_ns: times of every cell's microbatches, in the order of the traces.
        device: the GPU's name as the profiler has it; None where there was none.
        num_files: traces read, one a rank.
        num_pairs: overlapped pairs, which were left out.
    """

    samples_ns: dict[Cell, list[int]]
    device: str | None
    num_files: int
    num_pairs: int


def read_cell_times(paths: Iterable[Path]) -> CellTimes:
    """Read traces of the ranks of one run (``.json``, also gzipped).

    Raises:
        ProfileError: unreadable, no trace of a torch profiler, or one without ranges of cells.
    """
    samples: defaultdict[Cell, list[int]] = defaultdict(list)
    device: str | None = None
    num_files = num_pairs = 0
    for path in paths:
        document = _read(path)
        try:
            events = [e for e in document["traceEvents"] if e.get("ph") == "X"]
            ranges = _ranges(events)
            times = _times(events, ranges, str(path))
            properties: list[dict[str, Any]] = document.get("deviceProperties") or [{}]
            device = device or properties[0].get("name")
        except (AttributeError, KeyError, TypeError):
            raise ProfileError(
                f"{path}: has events that are not as a torch profiler writes them"
            ) from None
        num_pairs += sum(_PAIR.fullmatch(r.name) is not None for r in ranges)
        for cell, time_ns in times:
            samples[cell].append(time_ns)
        num_files += 1
    if not samples:
        raise ProfileError(
            "every cell is in an overlapped pair: trace a schedule without OVERLAP_F_B"
        )
    return CellTimes(dict(samples), device, num_files, num_pairs)


class _Range(NamedTuple):
    begin_us: float
    end_us: float
    name: str


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        document: object = json.loads(gzip.decompress(data) if data[:2] == _GZIP else data)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError, RecursionError, zlib.error):
        raise ProfileError(f"{path}: not valid JSON, or cut short") from None
    if not isinstance(document, dict) or not isinstance(
        cast("dict[str, Any]", document).get("traceEvents"), list
    ):
        raise ProfileError(f"{path}: no traceEvents: a torch profiler's trace has them")
    return cast("dict[str, Any]", document)


def _ranges(events: list[dict[str, Any]]) -> list[_Range]:
    """Ranges of cells and pairs, by their beginning."""
    return sorted(
        _Range(e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") == "user_annotation" and str(e.get("name", "")).startswith("PP:")
    )


def _times(
    events: list[dict[str, Any]], ranges: list[_Range], origin: str
) -> list[tuple[Cell, int]]:
    """(cell, ns) of every range of a cell, in order."""
    if not ranges:
        raise ProfileError(f"{origin}: no range is named PP:<cell>, such as PP:0F3")
    busy_us = [0.0] * len(ranges)
    kernels = [e for e in events if e.get("cat") in _ON_GPU]
    if kernels:
        launched = {
            e["args"]["correlation"]: e["ts"]
            for e in events
            if e.get("cat") in _LAUNCHES and "correlation" in e.get("args", {})
        }
        begins = [r.begin_us for r in ranges]
        for kernel in kernels:
            ts = launched.get(kernel.get("args", {}).get("correlation"))
            if ts is None or str(kernel["name"]).lower().startswith("nccl"):
                continue
            i = bisect_right(begins, ts) - 1
            if i >= 0 and ts <= ranges[i].end_us:
                busy_us[i] += kernel["dur"]
        if not any(busy_us):
            raise ProfileError(f"{origin}: no kernel was launched within a range PP:<cell>")
    else:
        busy_us = [r.end_us - r.begin_us for r in ranges]
    found: list[tuple[Cell, int]] = []
    for r, us in zip(ranges, busy_us, strict=True):
        match = _CELL.fullmatch(r.name)
        if match:
            found.append((Cell(int(match[1]), match[2]), round(1000 * us)))
    return found
