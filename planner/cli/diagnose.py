"""The command that says what a residual did: verdicts on recordings of training runs."""

from __future__ import annotations

import json as json_
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from mhcplan.planner.cli.terminal import note, output, progress
from mhcplan.planner.diagnose.judge import THRESHOLDS, Diagnosis, judge
from mhcplan.planner.diagnose.recording import (
    Recording,
    RecordingError,
    is_recording,
    read_recording,
)
from mhcplan.planner.output import write_files

if TYPE_CHECKING:
    from rich.console import Console

PAGE_NAME, FIGURES_NAME, DIAGNOSIS_NAME = "diagnosis.html", "figures.json", "diagnosis.json"

Sources = Annotated[
    Path,
    Parameter(
        name="RECORDING|CHECKPOINT",
        help="recordings of runs, or torch checkpoints; several are shown side by side",
        allow_leading_hyphen=False,
    ),
]


def diagnose(
    *sources: Sources,
    json: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
    sinkhorn_steps: PositiveInt = 20,
) -> None:
    """Say what mHC or HC did in a run: gains over depth, mixing, collapse, and which alarms sound.

    A recording is what mhcplan.kernels.diagnostics.Recorder wrote during training. A torch
    checkpoint is first turned into one (needs torch): its maps on random probe states.

    Args:
        sources: recordings of runs, or torch checkpoints
        json: print one JSON object a recording instead of text
        out: folder for diagnosis.html, figures.json and diagnosis.json
        sinkhorn_steps: t_max of a checkpoint, which does not say
    """
    if not sources:
        raise RecordingError("diagnose needs a recording or a checkpoint")
    recordings = [_read(path, sinkhorn_steps) for path in sources]
    diagnoses = [judge(recording) for recording in recordings]
    try:
        if json:
            for diagnosis in diagnoses:
                print(diagnosis.model_dump_json())
        else:
            _print(diagnoses, output())
    finally:
        if out is not None:
            with progress("drawing"):
                write_files(out, _files(recordings, diagnoses))
            note(f"wrote {out}; open {out / PAGE_NAME} in a browser")


def _read(path: Path, sinkhorn_steps: int) -> Recording:
    if is_recording(path):
        return read_recording(path)
    converter = import_module("mhcplan.kernels.diagnostics_checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.with_suffix(".recording").name
        try:
            converter.record_checkpoint(path, made, sinkhorn_steps=sinkhorn_steps)
        except converter.CheckpointError as error:
            raise RecordingError(str(error)) from None
        return read_recording(made)


def _files(recordings: list[Recording], diagnoses: list[Diagnosis]) -> dict[str, str | bytes]:
    from mhcplan.planner.diagnose.figures import (
        diagnosis_page,
        figures_json,
        recording_figures,
    )

    figures = recording_figures(recordings)
    verdicts = [d.model_dump(mode="json") for d in diagnoses]
    return {
        PAGE_NAME: diagnosis_page(diagnoses, figures),
        FIGURES_NAME: json_.dumps(figures_json(figures)) + "\n",
        DIAGNOSIS_NAME: json_.dumps(verdicts, indent=2) + "\n",
    }


def _print(diagnoses: list[Diagnosis], console: Console) -> None:
    from rich.text import Text

    from mhcplan.planner.report.table import Section, print_section

    for diagnosis in diagnoses:
        alarms = len(diagnosis.alarms)
        verdict = f"{alarms} alarm{'s' * (alarms > 1)}" if alarms else "no alarm"
        console.print(Text(f"{diagnosis.name}: {verdict}", style="bold"))
        for alarm in diagnosis.alarms:
            where = "" if alarm.step is None else f" (step {alarm.step})"
            where = where.replace(")", f", site {alarm.site})") if alarm.site else where
            console.print(Text(f"  {alarm.name}: {alarm.message}{where}"), soft_wrap=True)
        for line in diagnosis.notes:
            console.print(Text(f"  {line}"), soft_wrap=True)
    rows = zip(*(_rows(d) for d in diagnoses), strict=True)
    cells = tuple((row[0][0], *(value for _, value in row)) for row in rows)
    columns = ("", *(d.name for d in diagnoses))
    print_section(Section("Last record", columns, cells), console)
    console.print()
    limits = ", ".join(f"{name} {limit.value:g}" for name, limit in THRESHOLDS.items())
    console.print(Text(f"alarms sound above: {limits} (row_lost: below)"), soft_wrap=True)


def _rows(d: Diagnosis) -> list[tuple[str, str]]:
    about, forward, backward = d.about, d.forward_gain, d.backward_gain
    return [
        ("residual", f"{about['kind']} n={about['expansion_rate']}"),
        ("sites", str(len(about["sites"]))),
        ("steps", f"{d.first_step} to {d.last_step}"),
        ("loss", _number(d.loss)),
        ("gradient norm", _number(d.gradient_norm)),
        ("composite forward gain: mean", _number(forward.mean)),
        ("  most over tokens", _number(forward.most)),
        ("  of the mean map", _number(forward.of_mean_map)),
        ("  highest mean of the run", f"{_number(forward.peak)} at {forward.peak_step}"),
        ("composite backward gain: mean", _number(backward.mean)),
        ("  most over tokens", _number(backward.most)),
        ("  of the mean map", _number(backward.of_mean_map)),
        ("  highest mean of the run", f"{_number(backward.peak)} at {backward.peak_step}"),
        ("composite spectral norm", _number(d.spectral_norm)),
        ("row sum error of a map", _number(d.row_error)),
        ("column sum error of a map", _number(d.column_error)),
        ("similarity of rows", _number(d.row_similarity)),
        ("smallest share of a row", _number(d.least_row_share)),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
