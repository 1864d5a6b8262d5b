"""The Python API: what the commands do, as functions whose results show themselves in a notebook.

``import mhcplan`` has these functions. Plans are named as on the command line, by a preset, a plan
file or a :class:`~mhcplan.planner.plan.spec.PlanSpec`, and changed by keywords that are called as
the flags are (``n=2``, ``recompute_block="none"``); ``settings`` reaches every other field by its
path.

Examples:
    >>> import mhcplan
    >>> answer = mhcplan.predict("mhc-3b", pp=2, microbatches=4, settings={"p2p": "grouped"})
    >>> answer.report.gpus
    16

Every function raises :class:`~mhcplan.planner.plan.spec.SpecError` for a plan that cannot be, and
:class:`~mhcplan.profiles.schema.ProfileError` for one that cannot be priced; the message is the
line that the command line would print.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mhcplan.planner.api_results import Compared, Exported, Planned, Predicted, Swept
from mhcplan.planner.plan.errors import fields_named, not_modelled
from mhcplan.planner.plan.file import FLAG_FIELDS, changed_plan, source_fields
from mhcplan.planner.plan.spec import PlanSpec, SpecError
from mhcplan.planner.predict import predict as predict_step
from mhcplan.planner.report.make import make_report
from mhcplan.planner.sweep.axes import GLOBAL_BATCH, Axis

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhcplan.planner.compare.sides import Side
    from mhcplan.planner.export.formats import ExportFormat
    from mhcplan.planner.predict import Prediction
    from mhcplan.planner.report.schema import PlanReport

Source = str | os.PathLike[str] | PlanSpec


def predict(
    source: Source = "mhc-27b",
    /,
    *,
    settings: Mapping[str, object] | None = None,
    intervals: bool = True,
    **flags: object,
) -> Predicted:
    """Predict a training step: what mHC adds to its time and memory, and whether it fits.

    Args:
        source: a model preset, a plan file, or a plan.
        settings: fields of the plan by their dotted path.
        intervals: also say how sure the figures are, which takes about as long again.
        flags: fields of the plan as the command line names them.
    """
    plan = plan_of(source, settings, **flags)
    prediction = predict_step(plan)
    return Predicted(_report(prediction, source, settings, flags, intervals), prediction)


def sweep(
    source: Source = "mhc-27b",
    /,
    *,
    settings: Mapping[str, object] | None = None,
    fast: bool = False,
    jobs: int | None = None,
    store: str | os.PathLike[str] | None = None,
    **flags: object,
) -> Swept:
    """Predict every combination of some fields' values; illegal ones are rows with the reason.

    Args:
        source: a model preset, a plan file, or a plan.
        settings: fields of the plan by their dotted path: a list of values, or one.
        fast: estimate by a lower bound, and let the engine play the best five.
        jobs: processes; None is one a core.
        store: file of finished points, so that none is ever worked out twice; None keeps none.
        flags: fields of the plan as the command line names them: a list of values, or one.

    Raises:
        StoreError: the store cannot be opened.
    """
    from mhcplan.planner.sweep.run import SweepOptions
    from mhcplan.planner.sweep.run import sweep as sweep_plans

    options = SweepOptions(
        method="estimate" if fast else "engine",
        jobs=jobs,
        store=None if store is None else Path(store),
    )
    return Swept(sweep_plans(_named(source), _axes(settings, flags), options))


def plan(
    source: Source = "mhc-27b",
    /,
    *,
    gpus: int,
    memory_gib: float | None = None,
    settings: Mapping[str, object] | None = None,
    seconds: float = 45.0,
    jobs: int | None = None,
    **flags: object,
) -> Planned:
    """Find the plan of the fastest step on given GPUs, and say how far that is proven.

    Args:
        source: a model preset, a plan file, or a plan.
        gpus: how many there are: pp x ep x dp.
        memory_gib: memory of one GPU in GiB; None is that of the profile's GPU.
        settings: values that fields may take, by their dotted path.
        seconds: when to stop with what is found, for each n.
        jobs: processes; None is one a core.
        flags: values that fields may take, as the command line names them.
    """
    from mhcplan.planner.search.find import find_plans

    axes = _axes(settings, flags)
    found = find_plans(_named(source), gpus, memory_gib, axes, seconds=seconds, jobs=jobs)
    return Planned(tuple(found))


def compare(a: Source | Predicted, b: Source | Predicted, /) -> Compared:
    """Lay two steps side by side: what changed, and what it did, op class by op class.

    Args:
        a: a preset or a plan file, with flags in one text (``"mhc-27b --n 2"``); a plan or what
            was predicted of one; or the path of a report or a trace.
        b: the same.
    """
    from mhcplan.planner.compare.comparison import compare_sides

    sides = _side(a), _side(b)
    command = shlex.join(["mhcplan", "compare", *(side.figures.name for side in sides)])
    return Compared(compare_sides(*sides, command), sides)


def export(
    source: Source | Predicted,
    /,
    to: ExportFormat,
    folder: str | os.PathLike[str] | None = None,
    *,
    settings: Mapping[str, object] | None = None,
    **flags: object,
) -> Exported:
    """Write a predicted step in another tool's format.

    Args:
        source: a model preset, a plan file, a plan, or what was predicted of one.
        to: stream-json, torch-csv, torchtitan, megatron, piper or perfetto.
        folder: where to write the files; None writes none.
        settings: fields of the plan by their dotted path.
        flags: fields of the plan as the command line names them.

    Raises:
        OutputError: the folder cannot be written.
    """
    from mhcplan.planner.export.files import export as export_step
    from mhcplan.planner.output import write_files

    if isinstance(source, Predicted):
        if settings or flags:
            raise SpecError("what was predicted cannot be changed: predict the changed plan")
        prediction = source.prediction
    else:
        prediction = predict_step(plan_of(source, settings, **flags))
    files, losses = export_step(prediction, to)
    if folder is not None:
        write_files(Path(folder), files)
    return Exported(files, losses)


def plan_of(
    source: Source, settings: Mapping[str, object] | None = None, **flags: object
) -> PlanSpec:
    """The plan of ``source`` with these changes; raises SpecError."""
    changes = _by_path(flags)
    global_batch = changes.pop(GLOBAL_BATCH, None)
    if not isinstance(global_batch, int | None):
        raise SpecError(f"global_batch={global_batch!r} must be a whole number")
    return changed_plan(source_fields(_named(source)), changes | dict(settings or {}), global_batch)


def _by_path(flags: Mapping[str, object]) -> dict[str, object]:
    """Values by the field path that a flag stands for."""
    known = FLAG_FIELDS | {GLOBAL_BATCH: GLOBAL_BATCH}
    for flag, value in flags.items():
        if flag not in known:
            given = f"{flag}={value!r}"
            if missing := not_modelled(flag):
                raise SpecError(f"{given}: {missing}")
            if paths := fields_named(flag, PlanSpec):
                ways = " or ".join(f"settings={{{path!r}: {value!r}}}" for path in paths)
                raise SpecError(f"{given} is no keyword; give {ways}")
            names = ", ".join(known)
            raise SpecError(f"{given} is not one of {names}; settings reaches the others")
    return {known[flag]: value for flag, value in flags.items()}


def _named(source: Source) -> str | PlanSpec:
    return source if isinstance(source, PlanSpec) else os.fspath(source)


def _report(
    prediction: Prediction,
    source: Source,
    settings: Mapping[str, object] | None,
    flags: Mapping[str, object],
    intervals: bool,
) -> PlanReport:
    from mhcplan.planner.report.uncertainty import intervals as intervals_of

    name = "plan.toml" if isinstance(source, PlanSpec) else os.fspath(source)
    words = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
    words += [f"--set={path}={_toml(value)}" for path, value in (settings or {}).items()]
    command = shlex.join(["mhcplan", "predict", name, *words])
    sure = intervals_of(prediction) if intervals else None
    return make_report(prediction, command, sure)


def _axes(settings: Mapping[str, object] | None, flags: Mapping[str, object]) -> list[Axis]:
    values = _by_path(flags) | dict(settings or {})
    return [Axis(path, _values(given)) for path, given in values.items()]


def _values(given: object) -> tuple[Any, ...]:
    """Values of an axis: those of a list or a range, or one."""
    if isinstance(given, list | tuple | range):
        return tuple(cast("list[object]", given))
    return (given,)


def _toml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _side(source: Source | Predicted) -> Side:
    from mhcplan.planner.cli.compare import plan_of_words
    from mhcplan.planner.compare.sides import predicted_side, read_side, side_of

    if isinstance(source, Predicted):
        return side_of(source.report.command, source.prediction, source.report)
    if isinstance(source, PlanSpec):
        return predicted_side(source.model.name, source)
    return read_side(os.fspath(source), plan_of_words)
