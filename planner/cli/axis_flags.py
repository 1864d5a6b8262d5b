"""The flags that list the values to visit, shared by the commands that predict many plans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from cyclopts import Group, Parameter

from mhcplan.planner.cli.flags import GLOBAL_BATCH_HELP, field_of
from mhcplan.planner.plan.file import FLAG_FIELDS
from mhcplan.planner.sweep.axes import GLOBAL_BATCH, Axis, axes_of

VALUES_HELP = "A list (1,2,4), a range with both ends and a step (16..64..16), or both."


def _values(name: str) -> Parameter:
    return Parameter(help=field_of(name).description, show_default=False)


@Parameter(name="*", group=Group("Values to visit", help=VALUES_HELP))
@dataclass(frozen=True, kw_only=True)
class AxisFlags:
    """Which values of which fields: a list (1,2,4), a range with its ends (16..64..16), or both."""

    n: Annotated[str | None, _values("n")] = None
    residual: Annotated[str | None, _values("residual")] = None
    recompute_block: Annotated[str | None, _values("recompute_block")] = None
    pp: Annotated[str | None, _values("pp")] = None
    ep: Annotated[str | None, _values("ep")] = None
    dp: Annotated[str | None, _values("dp")] = None
    microbatches: Annotated[str | None, _values("microbatches")] = None
    global_batch: Annotated[str | None, Parameter(help=GLOBAL_BATCH_HELP)] = None
    micro_batch_size: Annotated[str | None, _values("micro_batch_size")] = None
    seq_len: Annotated[str | None, _values("seq_len")] = None
    schedule: Annotated[str | None, _values("schedule")] = None
    priority: Annotated[str | None, _values("priority")] = None
    profile: Annotated[str | None, _values("profile")] = None
    engine: Annotated[str | None, _values("engine")] = None
    settings: Annotated[
        list[str],
        Parameter(
            name="--set",
            negative=(),
            help="field=values: any other field of a plan, by its dotted path (mhcplan init lists"
            " them); may be repeated",
        ),
    ] = field(default_factory=list[str])

    def axes(self) -> tuple[Axis, ...]:
        """The axes of the flags that were given, in the order of the help, then of ``--set``.

        Raises:
            SpecError: see :func:`mhcplan.planner.sweep.axes.axes_of`.
        """
        paths = FLAG_FIELDS | {GLOBAL_BATCH: GLOBAL_BATCH}
        given = {
            path: str(text)
            for flag, path in paths.items()
            if (text := getattr(self, flag)) is not None
        }
        return axes_of(given, self.settings)

    def arguments(self) -> list[str]:
        """The command-line words that give these flags."""
        words: list[str] = []
        for flag in (*FLAG_FIELDS, GLOBAL_BATCH):
            if (text := getattr(self, flag)) is not None:
                words += [f"--{flag.replace('_', '-')}", str(text)]
        for setting in self.settings:
            words += ["--set", setting]
        return words
