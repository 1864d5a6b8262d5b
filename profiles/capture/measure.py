"""``mhcplan profile measure``: a whole profile from the machine it runs on.

A profile has two parts that may come from two machines of a kind: ``ops`` (one GPU: ops, rates,
overheads) and ``comm`` (two or more GPUs of one host: transfers). Each part is written to a file of
its own kind, and :func:`merge` makes a profile of them; with both on one machine that happens at
once. More parts, ``contention``, ``priority`` and ``power``, are measured where they are asked for
(:mod:`mhcplan.profiles.capture.overlap_parts`). Rows go to a log beside the output as they come, so
an interrupted run goes on where it was.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from pydantic import NonNegativeInt, ValidationError

from mhcplan.profiles.capture import grid, machine
from mhcplan.profiles.capture.block import allocator_margin_percent
from mhcplan.profiles.capture.comm import SIZES, launched, measure_transfers
from mhcplan.profiles.capture.ops import Log, Session, groups, measure_ops
from mhcplan.profiles.capture.options import (
    OP_BUDGET_NS,
    PARTS,
    Options,
    Part,
    share_seconds,
)
from mhcplan.profiles.capture.overlap_parts import (
    logs_beside,
    measure_contention_part,
    measure_priority_part,
    with_overlap,
)
from mhcplan.profiles.capture.power import measure_power_part, with_power
from mhcplan.profiles.capture.timing import GpuTimer
from mhcplan.profiles.presets import HARDWARE
from mhcplan.profiles.schema import (
    OpTiming,
    Overheads,
    Profile,
    ProfileError,
    Provenance,
    Rate,
    TransferTiming,
    profile_text,
)
from mhcplan.profiles.specs import HardwareSpec, Spec
from mhcplan.profiles.store import without_unused_runs
from mhcplan.profiles.vocabulary import MEASURABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from mhcplan.profiles.vocabulary import OpKey


class OpsPart(Spec):
    """What one GPU was measured to cost."""

    format: Literal["mhcplan.profile-ops"] = "mhcplan.profile-ops"
    format_version: Literal[1] = 1
    provenance: Provenance
    rates: tuple[Rate, ...]
    launch_ns: NonNegativeInt
    event_record_ns: NonNegativeInt
    event_wait_ns: NonNegativeInt
    context_bytes: NonNegativeInt
    allocator_margin_percent: float
    graph_gap_ns: NonNegativeInt = 0
    graph_launch_ns: NonNegativeInt = 0
    ops: tuple[OpTiming, ...]


class CommPart(Spec):
    """What transfers between the GPUs of one host were measured to cost."""

    format: Literal["mhcplan.profile-comm"] = "mhcplan.profile-comm"
    format_version: Literal[1] = 1
    provenance: Provenance
    communicator_bytes: NonNegativeInt
    transfers: tuple[TransferTiming, ...]


_TINY_SIZES = (64, 4096)
_CUDA_ONLY: tuple[Part, ...] = ("priority", "power")

SomePart = TypeVar("SomePart", OpsPart, CommPart)
Timing = TypeVar("Timing", OpTiming, TransferTiming)


def write_whole(path: Path, text: str) -> None:
    """Write a file or leave it as it was: through a temporary file beside it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def read_part(path: Path, part: type[SomePart]) -> SomePart:
    """Read a part's file.

    Raises:
        ProfileError: unreadable, or not such a part; the message names the field.
    """
    try:
        return part.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read ({error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "file"
        raise ProfileError(f"{path}: {field}: {first['msg']}") from None


def _progress(text: str) -> None:
    print(f"[capture] {text}", file=sys.stderr, flush=True)


# -- ops -------------------------------------------------------------------------------------------


def _compile(keys: list[OpKey]) -> None:
    """Run every key once, so that its kernels are in the compiler's cache on disk."""
    from mhcplan.kernels.layers import Env
    from mhcplan.profiles.capture.cases import make_case

    for kind, shape, passes in groups(keys):
        try:
            case = make_case(kind, shape, Env(torch.device("cuda")))
            for p in passes:
                case.prepare(p)()
            torch.cuda.synchronize()
        except Exception as error:  # a compiler's errors have no common base
            _progress(f"{kind} {shape}: did not run: {str(error).splitlines()[:1]}")
        torch.cuda.empty_cache()


def warm_compilers(keys: Sequence[OpKey], workers: int) -> None:
    """Compile the kernels of ``keys`` in parallel processes; the slowest shapes start first.

    Kernels are compiled per width and rate, not per token count or weight size, so shapes that
    differ only in those are run once, at the smallest.
    """
    smallest: dict[tuple[str, tuple[tuple[str, int], ...]], OpKey] = {}
    free = ("tokens", "rows", "seq", "vocab", "parameters", "m", "k", "largest")
    for key in keys:
        fixed = tuple((a, v) for a, v in key.shape if a not in free)
        name = (f"{key.kind}.{key.pass_}", fixed)
        if name not in smallest or key.shape < smallest[name].shape:
            smallest[name] = key
    cases = [[key for key in smallest.values() if (key.kind, key.shape) == (kind, shape)]
             for kind, shape in {(k.kind, k.shape) for k in smallest.values()}]  # fmt: skip

    def weight(case: list[OpKey]) -> tuple[int, int]:
        shape = dict(case[0].shape)
        return shape.get("n", 0) * shape.get("sites", 1), len(case)

    cases.sort(key=weight, reverse=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(_compile, cases))


def measure_ops_part(
    log: Path, keys: Sequence[OpKey], device: torch.device, *,
    budget_seconds: float = 1e9, op_budget_ns: int = OP_BUDGET_NS, workers: int = 0,
) -> OpsPart:  # fmt: skip
    """Measure ``keys``, rates and overheads on one device.

    Args:
        log: file of lines that rows are appended to and resumed from.
        keys: what to measure, most wanted first.
        device: a CUDA device, or the CPU for tests.
        budget_seconds: start no further op after this much time.
        op_budget_ns: stream time spent on one pass of one op.
        workers: processes that compile kernels beforehand; 0: none.
    """
    deadline = time.monotonic() + budget_seconds
    code = machine.code_sha256()
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    session = Session(device, dtype, code, machine.device_name(device), op_budget_ns)
    store = Log(log, session)
    todo = [key for key in keys if str(key) not in store.rows]
    if gpu and workers and todo:
        begin = time.monotonic()
        warm_compilers(todo, workers)
        _progress(f"compiled in {workers} processes, {time.monotonic() - begin:.0f} s")
    rates: list[Rate] = []
    host, graphs = machine.HostCosts(0, 0, 0), machine.GraphCosts(0, 0)
    context, margin = 0, 0.0
    load = session.timer if isinstance(session.timer, GpuTimer) else None
    if load is not None:
        load.heat(1.0)
        rates = machine.measure_rates(load)
        host = machine.measure_host(device)
        graphs = machine.measure_graphs(load)
    missing = measure_ops(keys, session, store, deadline)
    if load is not None:
        margin = allocator_margin_percent(device)
        context = machine.context_bytes(device)
    if missing:
        _progress(f"{len(missing)} of {len(keys)} rows are missing; run again to go on")
    return OpsPart(
        provenance=machine.provenance(device, 1, code, load), rates=tuple(rates),
        launch_ns=host.launch_ns, event_record_ns=host.event_record_ns,
        event_wait_ns=host.event_wait_ns, context_bytes=context, allocator_margin_percent=margin,
        graph_gap_ns=graphs.gap_ns, graph_launch_ns=graphs.launch_ns,
        ops=tuple(store.rows.values()),
    )  # fmt: skip


# -- comm ------------------------------------------------------------------------------------------


def measure_comm_part(
    log: Path, device_type: str, world: int, *, sizes: Sequence[int] = SIZES,
    budget_seconds: float = 1e9,
) -> CommPart:  # fmt: skip
    """Measure transfers between ``world`` devices of this host.

    Raises:
        RuntimeError: a worker process failed.
        ValueError: fewer than two devices.
    """
    if world < 2:
        raise ValueError(f"devices={world}: transfers need at least 2")
    code = machine.code_sha256()
    device = torch.device(device_type)
    started = launched()
    stamp = {
        "code": code, "device": machine.device_name(device), "world": str(world),
        "medium": started.medium if started else "intra_node",
    }  # fmt: skip
    rows, communicator = measure_transfers(log, stamp, device_type, world, sizes, budget_seconds)
    return CommPart(
        provenance=machine.provenance(device, world, code),
        communicator_bytes=communicator, transfers=tuple(rows),
    )  # fmt: skip


# -- the whole -------------------------------------------------------------------------------------


def merge(ops: OpsPart, comms: Sequence[CommPart], hardware: HardwareSpec, name: str) -> Profile:
    """One profile of all parts; of equal transfers the first part's counts.

    Raises:
        ProfileError: the parts are of different devices.
    """
    transfers: dict[tuple[str, str, int, int], TransferTiming] = {}
    for run, comm in enumerate(comms, 1):
        if ops.provenance.device != comm.provenance.device:
            raise ProfileError(
                f"device: ops were measured on {ops.provenance.device!r},"
                f" transfers on {comm.provenance.device!r}"
            )
        for row in _of_run(comm.transfers, run):
            transfers.setdefault((row.pattern, row.medium, row.group_size, row.bytes), row)
    return Profile(
        name=name, hardware=hardware,
        provenance=(ops.provenance, *(comm.provenance for comm in comms)), rates=ops.rates,
        overheads=Overheads(
            source="measured", launch_ns=ops.launch_ns, event_record_ns=ops.event_record_ns,
            event_wait_ns=ops.event_wait_ns, context_bytes=ops.context_bytes,
            communicator_bytes=max((comm.communicator_bytes for comm in comms), default=0),
            allocator_margin_percent=ops.allocator_margin_percent, graph_gap_ns=ops.graph_gap_ns,
            graph_launch_ns=ops.graph_launch_ns,
        ),
        ops=tuple(sorted(_of_run(ops.ops, 0), key=lambda row: row.key)),
        transfers=tuple(transfers[key] for key in sorted(transfers)),
    )  # fmt: skip


def _of_run(rows: Iterable[Timing], run: int) -> tuple[Timing, ...]:
    return tuple(row.model_copy(update={"run": run}) for row in rows)


def extend(base: Profile, ops: OpsPart | None, comms: Sequence[CommPart]) -> Profile:
    """``base`` with what the parts measured added; of equal rows the parts' count, and the last
    part's word on what a communicator takes and what CUDA graphs do. But of two times of the host
    the shorter one: whatever else a host has to do makes it longer. Runs of which nothing is left
    are named no more.

    Raises:
        ProfileError: a part is of another device.
    """
    parts = [*([ops] if ops else []), *comms]
    for part in parts:
        if part.provenance.device not in {run.device for run in base.provenance}:
            raise ProfileError(
                f"device: {base.name} was measured on {base.provenance[0].device!r}, not on"
                f" {part.provenance.device!r}"
            )
    added = _of_run(ops.ops, len(base.provenance)) if ops else ()
    rows = {row.key: row for row in base.ops}
    for row in added:
        host_ns = min(row.host_ns, rows.get(row.key, row).host_ns)
        rows[row.key] = row.model_copy(update={"host_ns": host_ns})
    transfers = {
        (row.pattern, row.medium, row.group_size, row.bytes): row for row in base.transfers
    }
    first_comm = len(base.provenance) + len(parts) - len(comms)
    for run, comm in enumerate(comms, first_comm):
        for row in _of_run(comm.transfers, run):
            transfers[row.pattern, row.medium, row.group_size, row.bytes] = row
    overheads = base.overheads
    if ops is not None and ops.graph_gap_ns:
        found = {"graph_gap_ns": ops.graph_gap_ns, "graph_launch_ns": ops.graph_launch_ns}
        overheads = overheads.model_copy(update=found)
    for comm in comms:
        overheads = overheads.model_copy(update={"communicator_bytes": comm.communicator_bytes})
    extended = base.model_copy(
        update={
            "provenance": (*base.provenance, *(part.provenance for part in parts)),
            "overheads": overheads,
            "ops": tuple(rows[key] for key in sorted(rows)),
            "transfers": tuple(transfers[key] for key in sorted(transfers)),
        }
    )
    return without_unused_runs(extended)


def measure(options: Options) -> list[Path]:
    """Measure this machine and write what came of it.

    Writes ``OUT.ops.json`` and ``OUT.comm.json`` (parts; logs beside them, ``.jsonl``) as they are
    done, and ``OUT`` itself once the ops are there: a profile, with the other parts as far as they
    are there too. Every file is written whole or not at all.

    Under torchrun only transfers are measured, between its processes, and rank 0 writes.

    Returns:
        The files written.

    Raises:
        ProfileError: parts of different devices.
        ValueError: unknown tier, part, kind or preset; no CUDA device; or comm with one.
        RuntimeError: a worker process failed.
    """
    hardware = _hardware(options.hardware)
    keys = _chosen(options)
    device_type, devices = options.device_type, 2
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "torch finds no CUDA device here; --device cpu --tiny shows that all parts run"
            )
        devices, found = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
        if doubt := machine.unlike(
            hardware, found.name, found.multi_processor_count, found.total_memory
        ):
            _progress(doubt)
    wanted: Sequence[Part] = PARTS[: 1 + (devices > 1)]
    if (started := launched()) is not None:
        devices = started.world
        wanted = ("comm",)
    elif options.parts is not None:
        wanted = [part for part in PARTS if part in options.parts]
    if device_type != "cuda" and (refused := [part for part in wanted if part in _CUDA_ONLY]):
        raise ValueError(f"device={device_type}: the part {refused[0]} needs a CUDA device")
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = _paths(out)
    end = time.monotonic() + options.budget_seconds

    def measure_part(part: Part, seconds: float) -> None:
        if part == "ops":
            ops = measure_ops_part(
                _log(paths[part]), keys, torch.device(device_type), budget_seconds=seconds,
                op_budget_ns=options.op_budget_ns, workers=options.workers,
            )  # fmt: skip
            _write_part(paths[part], ops)
        elif part == "comm":
            comm = measure_comm_part(
                _log(paths[part]), device_type, devices, budget_seconds=seconds,
                sizes=_TINY_SIZES if options.tiny else SIZES,
            )  # fmt: skip
            if started is None or started.rank == 0:  # who has the rows
                _write_part(paths[part], comm)
        elif part == "contention":
            measure_contention_part(paths[part], device_type, seconds, tiny=options.tiny)
        elif part == "priority":
            measure_priority_part(paths[part], device_type, seconds)
        else:
            measure_power_part(paths[part], device_type, seconds)

    for part in wanted:
        measure_part(part, share_seconds(part, wanted, end - time.monotonic()))
    if started is not None and started.rank:
        return []
    written = [paths[part] for part in wanted]
    profile = _profile(options, wanted, paths)
    if profile is None:
        return written
    _write_profile(out, profile)
    return [*written, out]


def _chosen(options: Options) -> list[OpKey]:
    if unknown := sorted(set(options.kinds) - set(MEASURABLE)):
        raise ValueError(f"kind={unknown[0]!r} must be one of {sorted(MEASURABLE)}")
    keys = grid.keys(options.tiers) if options.keys is None else options.keys
    return [key for key in keys if not options.kinds or key.kind in options.kinds]


def _paths(out: Path) -> dict[Part, Path]:
    """The file of each part of the profile ``out``; logs of lines but for the first two."""
    contention_log, priority_log = logs_beside(out)
    return {
        "ops": out.with_name(f"{out.name}.ops.json"),
        "comm": out.with_name(f"{out.name}.comm.json"),
        "contention": contention_log,
        "priority": priority_log,
        "power": _power_log(out),
    }


def _log(part: Path) -> Path:
    return part.with_suffix(".jsonl")


def _write_part(path: Path, part: OpsPart | CommPart) -> None:
    write_whole(path, part.model_dump_json(by_alias=True, exclude_none=True) + "\n")


def _profile(options: Options, wanted: Sequence[Part], paths: dict[Part, Path]) -> Profile | None:
    """What the parts make together; None without ops."""
    ops_path, comm_path = paths["ops"], paths["comm"]
    if options.base is not None:
        ops = read_part(ops_path, OpsPart) if "ops" in wanted else None
        comms = [read_part(comm_path, CommPart)] if "comm" in wanted else []
        return extend(options.base, ops, comms)
    if not ops_path.exists():
        return None
    comm_paths = [comm_path] if comm_path.exists() else []
    return _merged(ops_path, comm_paths, options.hardware, options.name)


def write_merged(
    out: Path, ops_path: Path, comm_paths: Sequence[Path], hardware: str, name: str | None = None
) -> None:
    """Merge the files of parts, and the logs of overlap and power beside ``out``, into the profile
    ``out``; ``name`` None is the preset's.

    Raises:
        ProfileError: a part cannot be read, or they are of different devices.
        ValueError: unknown preset.
    """
    _write_profile(out, _merged(ops_path, comm_paths, hardware, name))


def _write_profile(out: Path, profile: Profile) -> None:
    whole = with_power(with_overlap(profile, *logs_beside(out)), _power_log(out))
    write_whole(out, profile_text(whole))


def _power_log(out: Path) -> Path:
    return out.with_name(f"{out.name}.power.jsonl")


def _merged(ops_path: Path, comm_paths: Sequence[Path], hardware: str, name: str | None) -> Profile:
    ops = read_part(ops_path, OpsPart)
    comms = [read_part(path, CommPart) for path in comm_paths]
    return merge(ops, comms, _hardware(hardware), name or hardware)


def _hardware(name: str) -> HardwareSpec:
    if name not in HARDWARE:
        raise ValueError(f"hardware={name!r} must be one of {sorted(HARDWARE)}")
    return HARDWARE[name]
