"""How sure a prediction is: its step played again with costs drawn from their measured spread.

Drawn for each of :data:`NUM_SAMPLES` runs:

* every op's own jitter, independent from op to op;
* one factor for all kernels of a run (clock, temperature) and one for all its traffic, the same for
  the plan and its baseline, which run on one machine.

A profile records how far the times of an op spread, but not how much of that is common to a run:
that it is :data:`COMMON_SHARE` of the variance is assumed. Ops without a recorded spread do not
vary, and all GPUs of a run are taken to be equally fast. A drawn step is a longest path
(:mod:`mhcplan.sim.longest_path`), which leaves contention out, so only its ratio to the longest
path of the median costs is used: it scales the engine's answer. As ranks wait for the slowest,
jitter lengthens a step on average, so the answer, which is played with medians, may lie near the
low end.

The model's own error comes on top where :class:`ModelErrors` of measured runs are given: each drawn
run takes one of them, and one of the machines that are known, the profile's own among them. Without
them the intervals say how much runs vary, not how wrong the model is, and nothing is said of the
memory's.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import NormalDist, median
from typing import TYPE_CHECKING

import numpy as np

from mhcplan.planner.report.schema import Intervals
from mhcplan.profiles.accuracy import ABLATIONS, newest, shipped_rows
from mhcplan.sim.longest_path import StepGraph
from mhcplan.sim.memory import memory_report
from mhcplan.sim.order import order_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from mhcplan.planner.predict import Prediction, Step
    from mhcplan.profiles.accuracy import Row

    Floats = NDArray[np.float64]

NUM_SAMPLES = 32
COVERAGE_PERCENT = 90
COMMON_SHARE = 0.5  # of an op's variance; assumed, see the module's docstring
_SPREAD_SIGMAS = 1.2816  # half the distance of the 10th and 90th percentile of a normal variable
_SEED = 0


@dataclass(frozen=True)
class ModelErrors:
    """Measured over predicted, of runs that were predicted before they were measured.

    Attributes:
        step: ratios of step times, the machine's anchors taken into account.
        overhead_points: differences of overheads in percentage points, likewise.
        memory: ratios of what the allocator reserved.
        machines: how long steps take on each machine that is known, by its anchors, over the
            profile's; that is 1, and is among them.
    """

    step: tuple[float, ...] = ()
    overhead_points: tuple[float, ...] = ()
    memory: tuple[float, ...] = ()
    machines: tuple[float, ...] = ()


def rows_that_judge(rows: Iterable[Row]) -> list[Row]:
    """Rows whose errors are those of the model that there is: of each the newest measurement, as
    older ones are of models that have been mended since, and none of the ablations, whose settings
    hardly any plan has."""
    return [row for row in newest(rows) if row.claim.set not in ABLATIONS]


def measured_errors(rows: Iterable[Row]) -> ModelErrors:
    """The model's error in runs that were predicted before they were measured, and their machines.

    Rows of one machine share what it differs in from the profile's, so that is told apart from the
    model's error: nobody knows which machine a plan is for.
    """
    step: list[float] = []
    overhead: list[float] = []
    memory: list[float] = []
    of_machine: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        step.append(1 / (1 + row.step_error_percent() / 100))
        memory.append(1 / (1 + row.memory_error_percent("reserved") / 100))
        of_machine[row.machine].append(row.machine_factor)
        points = row.overhead_error_points()
        if points is not None:
            overhead.append(-points)
    machines = (1.0, *map(median, of_machine.values())) if of_machine else ()
    return ModelErrors(tuple(step), tuple(overhead), tuple(memory), machines)


def intervals(prediction: Prediction, errors: ModelErrors | None = None) -> Intervals:
    """Intervals of a prediction's step, overhead and memory; equal input gives equal output.

    ``errors`` None takes those of the measured runs that come with mhcplan.
    """
    errors = measured_errors(rows_that_judge(shipped_rows())) if errors is None else errors
    draws = np.random.default_rng(_SEED)
    common = _latin_hypercube(draws)
    answer = prediction.step.timeline.step_ns, prediction.baseline.timeline.step_ns
    of_step, of_baseline = draws.spawn(2)
    if prediction.plan.residual.is_plain:
        step = baseline = answer[0] * step_ratios(prediction.step, common, of_step)
    else:
        with ThreadPoolExecutor(1) as other_core:  # random numbers and paths need no GIL
            beside = other_core.submit(step_ratios, prediction.baseline, common, of_baseline)
            step = answer[0] * step_ratios(prediction.step, common, of_step)
            baseline = answer[1] * beside.result()
    overhead = 100 * (step / baseline - 1) + _drawn(errors.overhead_points, draws, otherwise=0.0)
    wrong = _drawn(errors.step, draws, otherwise=1.0)
    wrong = wrong * _drawn(errors.machines, draws, otherwise=1.0)
    low, high = _ends(step * wrong)
    memory = _memory(prediction) * _drawn(errors.memory, draws, otherwise=1.0)
    limit = prediction.plan.memory_limit_bytes or prediction.profile.hardware.memory_bytes
    least, most = _ends(memory)
    return Intervals(
        coverage_percent=COVERAGE_PERCENT,
        num_samples=NUM_SAMPLES,
        num_measured_runs=len(errors.step),
        step_time_ns=(round(low), round(high)),
        overhead_percent=_ends(overhead),
        device_memory_bytes=(round(least), round(most)) if errors.memory else None,
        out_of_memory_percent=100 * float(np.mean(memory > limit)) if errors.memory else None,
        notes=tuple(_notes(prediction, errors)),
    )


def step_ratios(step: Step, common: Floats, draws: np.random.Generator) -> Floats:
    """Drawn steps over the undrawn one.

    Args:
        step: what is drawn.
        common: [sample, 2], standard normal: of kernels and of traffic, common to a run.
        draws: where each op's own jitter comes from.
    """
    program, table = step.program, step.table
    meeting = order_of(program).meeting
    is_transfer = meeting >= 0
    # all members of a transfer see one jitter: their first op's
    own = np.arange(program.num_ops)
    _, first, member = np.unique(meeting[is_transfer], return_index=True, return_inverse=True)
    own[is_transfer] = np.flatnonzero(is_transfer)[first][member]
    spread = np.array([cost.spread_percent for cost in step.costs]) / 100 / _SPREAD_SIGMAS
    duration = table.duration_ns[step.played.cost]
    sigma_ns = duration * spread[program.cost]
    common_ns = np.sqrt(COMMON_SHARE) * np.stack(
        [np.where(is_transfer, 0, sigma_ns), np.where(is_transfer, sigma_ns, 0)]
    )
    own_ns = np.sqrt(1 - COMMON_SHARE) * sigma_ns
    graph = StepGraph(program.renumbered(cost=np.arange(program.num_ops, dtype=np.int32)))
    each = replace(table, duration_ns=duration, host_ns=table.host_ns[program.cost], loads=None)
    (reference,) = graph.step_ns([each])
    steps = np.empty(len(common))
    for i, factors in enumerate(common):
        jitter = draws.standard_normal(program.num_ops, np.float32)[own]
        drawn = duration + factors @ common_ns + own_ns * jitter
        (steps[i],) = graph.step_ns([replace(each, duration_ns=np.maximum(drawn, 0).astype(int))])
    return steps / reference


def _latin_hypercube(draws: np.random.Generator) -> Floats:
    """[sample, 2] standard normal draws that fill each axis evenly, so that few are enough."""
    normal = NormalDist()
    strata = [normal.inv_cdf((i + 0.5) / NUM_SAMPLES) for i in range(NUM_SAMPLES)]
    return np.stack([draws.permutation(strata), draws.permutation(strata)], axis=1)


def _drawn(errors: tuple[float, ...], draws: np.random.Generator, *, otherwise: float) -> Floats:
    if not errors:
        return np.full(NUM_SAMPLES, otherwise)
    return draws.choice(np.array(errors), NUM_SAMPLES)


def _ends(samples: Floats) -> tuple[float, float]:
    """The interval that holds the middle of the samples."""
    outside = (100 - COVERAGE_PERCENT) / 2
    low, high = np.percentile(samples, (outside, 100 - outside))
    return float(low), float(high)


def _memory(prediction: Prediction) -> int:
    step = prediction.step
    rows = memory_report(step.program, step.table, step.memory)
    return max(row["device_bytes"] for row in rows)


def _notes(prediction: Prediction, errors: ModelErrors) -> Iterator[str]:
    yield (
        f"assumed: {COMMON_SHARE:.0%} of the variance of op times is common to a run (clock,"
        " temperature, network), the rest is each op's own"
    )
    yield "assumed: all GPUs of a run are equally fast"
    without_spread = f"{_share_without_spread(prediction.step):.1f}"
    if without_spread != "0.0":
        yield f"{without_spread} % of op time has no recorded spread"
    if not errors.step:
        yield "the model's own error is not in it: no run was predicted and then measured yet"
    if errors.machines:
        factors = ", ".join(f"{factor:.3f}" for factor in sorted(errors.machines))
        yield f"machines of a kind differ: on those known steps take {factors} times as long"
    if not errors.memory:
        yield "memory has no interval: no run's memory was predicted and then measured yet"
    elif (bias := _bias(errors.memory)) is not None:
        yield f"memory: every measured run needed {bias}; the interval has it, the answer does not"


def _bias(ratios: tuple[float, ...]) -> str | None:
    """In words, if all measured over predicted are on one side of 1: the interval then is, too."""
    off = sorted(abs(100 * (ratio - 1)) for ratio in ratios)
    for side, is_all in (("more", min(ratios) > 1), ("less", max(ratios) < 1)):
        if is_all:
            return f"{side} than predicted, {off[0]:.1f} to {off[-1]:.1f} %"
    return None


def _share_without_spread(step: Step) -> float:
    """Percent of summed op durations."""
    counts = np.bincount(step.program.cost, minlength=len(step.costs))
    times = counts * np.array([cost.duration_ns for cost in step.costs])
    fixed = np.array([cost.spread_percent == 0 for cost in step.costs])
    return 100 * float(times[fixed].sum() / times.sum())
