"""The flags that describe a plan, shared by every command that takes one.

A flag that is not given is None, so that it does not override a plan file; the default that help
shows is the plan field's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt
from pydantic.fields import FieldInfo

from mhcplan.planner.plan.file import FLAG_FIELDS, resolve_plan
from mhcplan.planner.plan.spec import Engine, LayoutSpec, PlanSpec, Priority, ScheduleName
from mhcplan.profiles.specs import ResidualKind, ResidualSpec

GLOBAL_BATCH_HELP = (
    "sequences of the whole job's step, in place of --microbatches: a multiple of"
    " micro-batch-size x ep x dp"
)
_SPECS = {"residual": ResidualSpec, "layout": LayoutSpec}


def field_of(name: str) -> FieldInfo:
    """The plan field behind a flag."""
    parent, _, last = FLAG_FIELDS[name].rpartition(".")
    return _SPECS.get(parent, PlanSpec).model_fields[last]


def _flag(name: str) -> Parameter:
    """A flag of the plan field behind ``name``, with its description and its default."""
    info = field_of(name)

    def default(_value: object) -> str:
        return str(info.default)

    return Parameter(help=info.description, show_default=default)


@Parameter(name="*", group="Plan")
@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """What to change in a preset or a plan file."""

    n: Annotated[int | None, _flag("n")] = None
    residual: Annotated[ResidualKind | None, _flag("residual")] = None
    recompute_block: Annotated[
        Literal["auto", "none", "stage"] | PositiveInt | None,
        _flag("recompute_block"),
    ] = None
    pp: Annotated[int | None, _flag("pp")] = None
    ep: Annotated[int | None, _flag("ep")] = None
    dp: Annotated[int | None, _flag("dp")] = None
    microbatches: Annotated[int | None, _flag("microbatches")] = None
    global_batch: Annotated[PositiveInt | None, Parameter(help=GLOBAL_BATCH_HELP)] = None
    micro_batch_size: Annotated[int | None, _flag("micro_batch_size")] = None
    seq_len: Annotated[int | None, _flag("seq_len")] = None
    schedule: Annotated[ScheduleName | None, _flag("schedule")] = None
    priority: Annotated[Priority | None, _flag("priority")] = None
    profile: Annotated[str | None, _flag("profile")] = None
    engine: Annotated[Engine | None, _flag("engine")] = None
    settings: Annotated[
        list[str],
        Parameter(
            name="--set",
            negative=(),
            help="field=value: any other field of a plan, by its dotted path (mhcplan init lists"
            " them); may be repeated",
        ),
    ] = field(default_factory=list[str])

    def plan(self, source: str) -> PlanSpec:
        """The plan of ``source`` (a preset or a plan file) with these changes.

        Raises:
            SpecError: see :func:`mhcplan.planner.plan.file.resolve_plan`.
        """
        given: dict[str, Any] = {
            path: value
            for flag, path in FLAG_FIELDS.items()
            if (value := getattr(self, flag)) is not None
        }
        return resolve_plan(source, given, self.settings, self.global_batch)

    def arguments(self) -> list[str]:
        """The command-line words that give these flags."""
        words: list[str] = []
        for flag in FLAG_FIELDS:
            if (value := getattr(self, flag)) is not None:
                words += [f"--{flag.replace('_', '-')}", str(value)]
        if self.global_batch is not None:
            words += ["--global-batch", str(self.global_batch)]
        for setting in self.settings:
            words += ["--set", setting]
        return words
