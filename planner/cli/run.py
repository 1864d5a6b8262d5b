"""``mhcplan run``: train steps of a plan on this machine's GPUs, timed beside the prediction."""

from __future__ import annotations

import json as json_module
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt

from mhcplan.planner.cli.flags import PlanFlags
from mhcplan.planner.cli.terminal import note, output, progress
from mhcplan.planner.output import write_files
from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan
from mhcplan.profiles.accuracy import BASELINE, MHC, Claim, Measurement, ProgramMeasured, Row
from mhcplan.profiles.schema import ProfileError
from mhcplan.sim.files import TRACE_FORMAT, FormatError, Trace, parse_program, parse_trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhcplan.sim.program import Program

FAILED = 1
MOST_ON_CPU = 16  # processes
TITLES = {MHC: "step", BASELINE: "plain residual"}

Source = Annotated[
    str,
    Parameter(
        name="MODEL|PLAN|FILE",
        help="a model preset, a plan file (.toml), or what `export --to stream-json` wrote",
        allow_leading_hyphen=False,
    ),
]


def run(
    source: Source,
    /,
    *,
    steps: Annotated[int, Parameter(help="steps that are timed, at least 2")] = 20,
    warm_up: Annotated[NonNegativeInt, Parameter(help="steps before those")] = 3,
    device: Annotated[Literal["cuda", "cpu"] | None, Parameter(help="default: cuda if any")] = None,
    captured: Annotated[bool, Parameter(help="time steps as CUDA graphs as well")] = True,
    baseline: Annotated[bool, Parameter(help="run the plain residual as well, in turns")] = True,
    seconds: Annotated[float, Parameter(help="when a transfer without an answer fails")] = 120.0,
    out: Path | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    flags: PlanFlags | None = None,
) -> int:
    """Train steps of a plan here, one process a GPU; print times, losses and memory.

    The stream program is the one that was predicted; what it computes is the shipped transformer on
    real tokens, with forced balanced routing. Without a GPU, small plans run on the CPU: their
    losses are right, their times mean nothing.

    Args:
        source: a model preset, a plan file (.toml), or what `export --to stream-json` wrote
        steps: steps that are timed, at least 2
        warm_up: steps before those
        device: default: cuda if any
        captured: time steps as CUDA graphs as well
        baseline: run the plain residual as well, in turns
        seconds: when a transfer without an answer fails
        out: folder for the measured traces and run.json
        json: print one JSON object instead of text
        flags: what to change in a plan
    """
    if steps < 2:
        raise SpecError(f"steps={steps} must be at least 2: their spread is reported")
    plan, programs = _what_to_run(source, flags or PlanFlags())
    if not baseline:
        programs.pop(BASELINE, None)
    where = _device(device, plan)
    measured = _measured(plan, programs, where, steps, warm_up, captured, seconds)
    if measured is None:
        return FAILED
    claim, why_not = _claim(plan) if where == "cuda" else (None, "on a CPU times mean nothing")
    lines = {name: of.line() for name, of in measured.items()}
    document = {
        "format": "mhcplan.run", "format_version": 1, "plan": plan.model_dump(mode="json"),
        "device": where, "programs": {k: v.model_dump(mode="json") for k, v in lines.items()},
        "claim": claim.model_dump(mode="json") if claim else None,
    }  # fmt: skip
    try:
        if json:
            print(json_module.dumps(document))
        else:
            _print(lines, claim, why_not)
    finally:
        if out is not None:
            traces = {name: of.trace for name, of in measured.items()}
            write_files(out, _files(plan, traces, document))
            note(f"wrote {out}; compare a trace with its plan: mhcplan compare")
    return 0


def _what_to_run(source: str, flags: PlanFlags) -> tuple[PlanSpec, dict[str, Program]]:
    """The plan and its programs by name; a file's own program where a file is given."""
    from mhcplan.planner.measured.claim import programs_of

    if Path(source).suffix != ".json":
        plan = flags.plan(source)
        return plan, programs_of(plan)
    if flags.arguments():
        raise SpecError(f"{source}: flags change plans, not .json files")
    program, meta = _read(Path(source))
    if not isinstance(meta.get("plan"), dict):
        raise SpecError(f"{source}: says not which plan it is of; run the plan itself")
    plan = make_plan(meta["plan"])
    return plan, programs_of(plan) | {MHC: program}


def _read(path: Path) -> tuple[Program, dict[str, Any]]:
    """A program file or a trace, with what its writer kept beside it."""
    try:
        data = path.read_bytes()
        if f'"{TRACE_FORMAT}"'.encode() in data[:100]:
            trace = parse_trace(data, str(path))
            return trace.program, trace.meta
        program = parse_program(data, str(path))
        return program, dict(program.meta)
    except FormatError as error:
        raise SpecError(str(error)) from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None


def _device(wanted: str | None, plan: PlanSpec) -> Literal["cuda", "cpu"]:
    """Where to run; raises SpecError where this machine has too few GPUs, or a CPU too little."""
    torch = import_module("torch")
    has: int = torch.cuda.device_count()
    world = plan.layout.gpus
    if wanted == "cuda" or (wanted is None and has):
        if has < world:
            raise SpecError(f"layout: pp x ep x dp = {world} GPUs, this machine has {has}")
        return "cuda"
    if world > MOST_ON_CPU:
        raise SpecError(f"layout: pp x ep x dp = {world}, a CPU runs at most {MOST_ON_CPU}")
    return "cpu"


def _measured(
    plan: PlanSpec,
    programs: dict[str, Program],
    device: Literal["cuda", "cpu"],
    steps: int,
    warm_up: int,
    captured: bool,
    seconds: float,
) -> dict[str, Any] | None:
    """What the runtime measures, by program; None if a process failed, which is said."""
    torch, job = import_module("torch"), import_module("mhcplan.runtime.job")
    spec, launch = import_module("mhcplan.runtime.spec"), import_module("mhcplan.runtime.launch")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plans = {MHC: plan, BASELINE: plan.baseline()}
    try:
        subjects = {
            name: job.Subject(
                program, spec.RunSpec.from_plan(plans[name].model_dump(mode="json"), dtype=dtype)
            )
            for name, program in programs.items()
        }
        with progress(f"running {plan.model.name} on {plan.layout.gpus} x {device}"):
            return job.run(
                subjects, plan.layout.gpus, device=device, steps=steps, warm_up=warm_up,
                capture=captured and device == "cuda", timeout_s=seconds,
            )  # fmt: skip
    except spec.RunError as error:
        raise SpecError(str(error)) from None
    except launch.ProcessFailed as error:
        print(f"mhcplan: {error}", file=sys.stderr)
        return None


def _claim(plan: PlanSpec) -> tuple[Claim | None, str]:
    """The prediction, or why there is none."""
    from mhcplan.planner.measured.claim import claim

    try:
        return claim(plan, "run", "run"), ""
    except ProfileError as error:
        return None, str(error)


def _files(
    plan: PlanSpec, traces: Mapping[str, Trace], document: Mapping[str, object]
) -> dict[str, str | bytes]:
    from mhcplan.sim.files import trace_json

    plans = {MHC: plan, BASELINE: plan.baseline()}
    names = {MHC: "trace.json", BASELINE: "baseline_trace.json"}
    files: dict[str, str | bytes] = {"run.json": json_module.dumps(document, indent=1) + "\n"}
    for name, trace in traces.items():
        meta = trace.meta | {"plan": plans[name].model_dump(mode="json")}
        files[names[name]] = trace_json(trace._replace(meta=meta))
    return files


def _print(lines: dict[str, ProgramMeasured], claim: Claim | None, why_not: str) -> None:
    from mhcplan.planner.report.table import Section, print_section

    columns = ("", "step ms", "±%", "host ms", "traced +%", "GB", "losses")
    rows: list[tuple[str, ...]] = []
    for name, line in lines.items():
        peak_bytes = max(line.allocated_bytes)  # 0 on a CPU, whose allocator does not count
        for mode, times in line.times.items():
            traced = mode == list(line.times)[-1]
            slower = f"{100 * (line.traced_step_ns / times.step_ns - 1):.1f}" if traced else ""
            rows.append((
                f"{TITLES[name]}, {mode}", f"{times.step_ns / 1e6:,.2f}",
                f"{times.spread_percent:.1f}", f"{times.issue_ns / 1e6:,.2f}", slower,
                f"{peak_bytes / 1e9:,.2f}" if peak_bytes else "",
                " ".join(f"{loss:.4f}" for loss in line.losses),
            ))  # fmt: skip
    console = output()
    print_section(Section("Measured", columns, tuple(rows)), console)
    if claim is None:
        console.print(f"not compared with a prediction: {why_not}", soft_wrap=True)
        return
    row = Row(claim, _as_measurement(claim, lines))
    console.print(f"predicted step {row.step_error_percent():+.1f} % off ({row.mode})")
    if (points := row.overhead_error_points()) is not None:
        console.print(
            f"overhead of mHC {row.overhead_percent:+.2f} %, predicted {points:+.2f} points off"
        )
    console.print(f"allocated memory {row.memory_error_percent('allocated'):+.1f} % off")


def _as_measurement(claim: Claim, lines: dict[str, ProgramMeasured]) -> Measurement:
    return Measurement(
        row=claim.row, prediction=claim.digest, measured="", command="", device="", versions={},
        environment={}, anchors={}, programs=lines,
    )  # fmt: skip
