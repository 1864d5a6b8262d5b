"""The search behind ``mhcplan plan``: from a model and its GPUs to the best plan, by name.

:func:`find_plans` is what Python calls; the command line uses its parts, to show what is found when
it is interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from mhcplan.planner.plan.file import changed_plan, source_fields
from mhcplan.planner.plan.spec import SpecError
from mhcplan.planner.search.branch_and_bound import Search
from mhcplan.planner.search.report import SearchReport, make_search_report
from mhcplan.planner.search.sampled import SampledSearch
from mhcplan.planner.search.space import RATE, SINGLE_FIELDS, search_space, sequences_of
from mhcplan.planner.sweep.axes import GLOBAL_BATCH, Axis
from mhcplan.planner.sweep.farm import Farm
from mhcplan.planner.sweep.points import cost_model, memory_limit_bytes
from mhcplan.planner.sweep.run import named_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic import JsonValue

    from mhcplan.planner.plan.spec import PlanSpec
    from mhcplan.planner.search.branch_and_bound import Found
    from mhcplan.planner.sweep.farm import Backend

Method = Literal["auto", "exact", "sampled"]

EXACT_PLANS = 40_000  # a space beyond this takes longer to bound than anybody waits

_FEW_PLANS = 100
_GIB = 1 << 30


@dataclass(frozen=True)
class Quest:
    """What is searched, for one n.

    Attributes:
        rate: n.
        values: fields that all plans have in common, by path.
        axes: values to choose from, and further fields to search.
    """

    source: str | PlanSpec
    gpus: int
    rate: JsonValue
    values: dict[str, JsonValue]
    axes: tuple[Axis, ...]

    def begin(self, method: Method = "auto") -> Run:
        """List the plans to choose from.

        Raises:
            SpecError, ProfileError: a value, the source or the profile cannot be used.
        """
        values: dict[str, object] = dict(self.values)
        batch = cast("int | None", values.pop(GLOBAL_BATCH, None))
        plan = changed_plan(source_fields(self.source), values | {RATE: self.rate})
        sequences = batch or sequences_of(plan, self.gpus)
        fields = cast("dict[str, object]", plan.model_dump(mode="json"))
        space = search_space(fields, self.gpus, sequences, self.axes)
        profile = named_profile(plan.profile)
        limit = memory_limit_bytes(plan, cost_model(profile).profile)
        sampled = method == "sampled" or (method == "auto" and space.num_plans > EXACT_PLANS)
        search = (SampledSearch if sampled else Search)(space, profile, limit)

        def report(command: str) -> SearchReport:
            return make_search_report(
                search.found(), space, plan, profile, gpus=self.gpus, global_batch=sequences,
                command=command, method="sampled" if sampled else "exact",
            )  # fmt: skip

        return Run(search, space.num_plans, report)


@dataclass(frozen=True)
class Run:
    """A search on its way, and its report so far."""

    search: Search | SampledSearch
    num_plans: int
    report: Callable[[str], SearchReport]

    def farm(self, backend: Backend, jobs: int | None) -> Farm:
        """Workers for it: this process alone if that is sooner done than others could start."""
        few = jobs is None and backend == "local" and self.num_plans <= _FEW_PLANS
        return Farm(backend, 1 if few else jobs)


def quests(
    source: str | PlanSpec, gpus: int, memory_gib: float | None, axes: Sequence[Axis]
) -> list[Quest]:
    """One quest for each n that ``axes`` list, or for the source's own n.

    Raises:
        SpecError: no GPUs, or several values of a field that is not searched.
    """
    if gpus < 1:
        raise SpecError(f"gpus={gpus} must be at least 1")
    values: dict[str, JsonValue] = {}
    searched: list[Axis] = []
    rates: Sequence[JsonValue] = ()
    for axis in axes:
        if axis.path == RATE:
            rates = axis.values
        elif axis.path not in SINGLE_FIELDS:
            searched.append(axis)
        elif len(axis.values) > 1:
            raise SpecError(f"{axis.path} is not searched: give one value")
        else:
            values[axis.path] = next(iter(axis.values))
    if memory_gib is not None:
        values["memory_limit_bytes"] = round(memory_gib * _GIB)
    if not rates:
        fields: dict[str, object] = {k: v for k, v in values.items() if k != GLOBAL_BATCH}
        rates = [changed_plan(source_fields(source), fields).residual.expansion_rate]
    return [Quest(source, gpus, rate, values, tuple(searched)) for rate in rates]


def find_plans(
    source: str | PlanSpec,
    gpus: int,
    memory_gib: float | None = None,
    axes: Sequence[Axis] = (),
    *,
    seconds: float = 45.0,
    jobs: int | None = None,
    backend: Backend = "local",
    method: Method = "auto",
    report: Callable[[Found], None] = lambda _: None,
) -> list[SearchReport]:
    """Find the plan of the fastest step, for each n asked for.

    Args:
        source: a model preset, a plan file, or a plan.
        gpus: pp x ep x dp of every plan.
        memory_gib: memory of a GPU in GiB; None is that of the profile's GPU.
        axes: values to choose from (see :func:`mhcplan.planner.sweep.axes.parse_axis`).
        seconds: when to stop, for each n.
        jobs: processes; None is one a core, or all that the cluster has.
        backend: local processes, or a cluster's library.
        method: exact, sampled by Optuna, or what suits the size of the space.
        report: called with what is found by then.

    Raises:
        SpecError, ProfileError: input that cannot be used.
        FarmError: workers cannot be had, or die again and again.
    """
    reports: list[SearchReport] = []
    for quest in quests(source, gpus, memory_gib, axes):
        run = quest.begin(method)
        with run.farm(backend, jobs) as farm:
            run.search.run(farm, seconds, report)
        reports.append(run.report(""))
    return reports
