"""The command that proves a schedule sound: a stream program, a torch CSV, or a plan's own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from pydantic import ValidationError

from mhcplan.planner.cli.flags import PlanFlags
from mhcplan.planner.plan.spec import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhcplan.planner.export.torch_csv import TorchSidecar
    from mhcplan.sim.program import Program

UNSOUND = 1

Source = Annotated[
    str,
    Parameter(
        name="FILE|PLAN",
        help="program.json, a trace, a torch CSV; or a model preset or plan file",
        allow_leading_hyphen=False,
    ),
]


def check(source: Source, /, *, flags: PlanFlags | None = None) -> int:
    """Prove that a schedule runs: every finding is a line on standard output.

    Exits 0 if there is none, 1 if there are some. A CSV is checked together with the schedule.json
    beside it, if it is there.

    Args:
        source: program.json, a trace, a torch CSV; or a model preset or plan file
        flags: what to change in a plan
    """
    flags = flags or PlanFlags()
    path = Path(source)
    if path.suffix not in (".csv", ".json"):
        return _report(source, *_program_findings(_lowered(source, flags)))
    if flags.arguments():
        raise SpecError(f"{source}: flags change plans, not {path.suffix} files")
    if path.suffix == ".json":
        return _report(source, *_program_findings(_read_program(path)))
    return _report(source, *_csv_findings(path))


def _report(source: str, what: str, findings: list[str]) -> int:
    for finding in findings:
        print(f"{source}: {finding}")
    if findings:
        return UNSOUND
    print(f"{source}: sound ({what})")
    return 0


# -- stream programs -------------------------------------------------------------------------------


def _lowered(source: str, flags: PlanFlags) -> Program:
    from mhcplan.planner.lowering.lower import lower
    from mhcplan.planner.lowering.recompute import resolve_recompute_block

    plan = flags.plan(source)
    return lower(plan, resolve_recompute_block(plan))


def _read_program(path: Path) -> Program:
    from mhcplan.sim.files import TRACE_FORMAT, FormatError, parse_program, parse_trace

    data = _read(path)
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError):
        found = None  # the reader says what is wrong with it
    try:
        if isinstance(found, dict) and ("format", TRACE_FORMAT) in found.items():
            return parse_trace(data, str(path)).program
        return parse_program(data, str(path))
    except FormatError as error:
        raise SpecError(str(error)) from None


def _program_findings(program: Program) -> tuple[str, list[str]]:
    from mhcplan.planner.check.program import check_step

    findings = [f"{finding.rule}: {finding.message}" for finding in check_step(program)]
    return f"{program.num_ops} ops on {program.num_ranks} ranks", findings


# -- torch CSVs ------------------------------------------------------------------------------------


def _csv_findings(path: Path) -> tuple[str, list[str]]:
    from mhcplan.planner.check.torch_csv import check_rows

    try:
        rows = list(csv.reader(_read(path).decode().splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{path}: is no CSV: {error}") from None
    sidecar = _sidecar(path)
    if sidecar is None:
        findings = check_rows(rows)
    else:
        findings = check_rows(
            rows, directions=sidecar.directions, num_microbatches=sidecar.num_microbatches
        )
    lines = [f"{finding.rule}: {finding.message}" for finding in findings]
    lines += [f"sidecar: {text}" for text in _stale_marks(path.name, rows, sidecar)]
    return f"{sum(map(len, rows))} cells on {len(rows)} ranks", lines


def _sidecar(table: Path) -> TorchSidecar | None:
    from mhcplan.planner.export.torch_csv import SIDECAR, TorchSidecar

    path = table.with_name(SIDECAR)
    if not path.exists():
        return None
    try:
        return TorchSidecar.model_validate_json(_read(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SpecError(f"{path}: {where}: {first['msg']}") from None


def _stale_marks(name: str, rows: list[list[str]], sidecar: TorchSidecar | None) -> Iterator[str]:
    """Marks belong to cells by their place: they must still be there."""
    marks = sidecar.marks.get(name, ()) if sidecar else ()
    for mark in marks:
        row = rows[mark.rank] if mark.rank < len(rows) else []
        cell = row[mark.index] if mark.index < len(row) else "nothing"
        if cell != mark.cell:
            yield f"rank {mark.rank}, cell {mark.index} is {cell}, marked as {mark.cell}"
            return


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
