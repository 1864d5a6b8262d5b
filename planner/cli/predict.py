"""The commands that take a plan: predict, export, init."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mhcplan.planner.cli.flags import PlanFlags
from mhcplan.planner.cli.terminal import COMPILES, note, output, progress
from mhcplan.planner.export.formats import ExportFormat
from mhcplan.planner.output import write_file, write_files
from mhcplan.planner.plan.file import commented_plan_text, plan_text
from mhcplan.planner.plan.spec import SpecError

if TYPE_CHECKING:
    from mhcplan.planner.predict import Prediction
    from mhcplan.planner.report.schema import PlanReport

_DEFAULT_MODEL = "mhc-27b"
TRACE_NAME, PAGE_NAME = "trace.json.gz", "timeline.html"

Source = Annotated[
    str,
    Parameter(
        name="MODEL|PLAN", help="a model preset, or a plan file (.toml)", allow_leading_hyphen=False
    ),
]
OutputFolder = Annotated[Path, Parameter(name=["--output", "-o"], help="folder to write to")]


def predict(
    source: Source,
    /,
    *,
    flags: PlanFlags | None = None,
    intervals: Annotated[bool, Parameter(negative="--no-intervals")] = True,
    json: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
) -> None:
    """Predict a training step: what mHC adds to its time and memory, and whether it fits.

    Exits 0 also when the plan does not fit: the first line says by how much.

    Args:
        source: a model preset, or a plan file (.toml)
        flags: what to change in it
        intervals: how sure the figures are, from the measured spread of ops
        json: print one JSON object instead of text
        out: folder for report.json, plan.toml, timeline.html and trace.json.gz
    """
    flags = flags or PlanFlags()
    prediction, report = _predict(source, flags, intervals=intervals)
    try:
        if json:
            print(report.to_json())
        else:
            from mhcplan.planner.report.text import print_report

            print_report(report, output())
    finally:  # the answer first: what cannot be written must not take it away
        if out is not None:
            with progress("writing the timeline"):
                write_files(out, _files(prediction, report))
            note(f"wrote {out}; open {out / PAGE_NAME} in a browser")


def export(
    source: Source,
    /,
    *,
    to: ExportFormat,
    folder: OutputFolder,
    flags: PlanFlags | None = None,
) -> None:
    """Write a predicted step in another tool's format, and say what that format leaves out.

    stream-json: the whole stream program and its predicted times, for runtimes and mhcplan check.
    torch-csv: tables for torch.distributed.pipelining.
    torchtitan: a table, configuration lines and the function that overlaps F and B.
    megatron: layout and flags. piper: directives.
    perfetto: a trace for ui.perfetto.dev or chrome://tracing.

    Args:
        source: a model preset, or a plan file (.toml)
        to: the format
        folder: folder to write to
        flags: what to change in the plan
    """
    from mhcplan.planner.export.files import export as export_step

    prediction, _ = _predict(source, flags or PlanFlags())
    files, losses = export_step(prediction, to)
    write_files(folder, files)
    note("wrote " + ", ".join(str(folder / name) for name in files))
    for loss in losses:
        note(f"{to} leaves out {loss}")


def init(
    source: Source | None = None,
    /,
    *,
    config: Annotated[Path | None, Parameter(name="--from")] = None,
    file: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("plan.toml"),
    force: Annotated[bool, Parameter(negative=(), help="replace an existing file")] = False,
    flags: PlanFlags | None = None,
) -> None:
    """Write a plan file with comments that say what every field decides, to be edited.

    Args:
        source: a model preset, or a plan file (.toml); mhc-27b if neither this nor --from is given
        config: config.json of a Hugging Face checkpoint: DeepSeek-V2 or V3, Llama, Qwen 2 or 3,
            Mixtral
        file: file to write
        force: replace an existing file
        flags: what to change in the plan
    """
    if source is not None and config is not None:
        raise SpecError(f"{source} and --from={config} exclude each other: both name the model")
    if config is not None and config.suffix != ".json":
        raise SpecError(f"--from={config} must be a model's config.json")
    plan = (flags or PlanFlags()).plan(source or str(config or _DEFAULT_MODEL))
    write_file(file, commented_plan_text(plan), replace=force)
    note(f"wrote {file}; now: mhcplan predict {shlex.quote(str(file))}")


def _predict(
    source: str, flags: PlanFlags, *, intervals: bool = False
) -> tuple[Prediction, PlanReport]:
    from mhcplan.planner.predict import predict as predict_step
    from mhcplan.planner.report.make import make_report
    from mhcplan.planner.report.uncertainty import intervals as intervals_of

    plan = flags.plan(source)
    with progress(f"simulating {plan.model.name}", COMPILES):
        prediction = predict_step(plan)
        command = shlex.join(["mhcplan", "predict", source, *flags.arguments()])
        sure = intervals_of(prediction) if intervals else None
        return prediction, make_report(prediction, command, sure)


def _files(prediction: Prediction, report: PlanReport) -> dict[str, str | bytes]:
    from mhcplan.planner.figures.timeline_page import timeline_page

    return {
        "report.json": report.to_json() + "\n",
        "plan.toml": plan_text(prediction.plan),
        PAGE_NAME: timeline_page(prediction, report),
        TRACE_NAME: _trace(prediction),
    }


def _trace(prediction: Prediction) -> bytes:
    from mhcplan.sim.chrome_trace import chrome_trace

    step = prediction.step
    return chrome_trace(step.program, step.timeline, step.memory)
