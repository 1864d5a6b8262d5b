"""How much a GPU's power limit slows a step: arithmetic takes longer the more of it there is.

Ops are measured on a chip that is warm but not at its limit. A step that keeps the tensor cores
busy for longer than some 50 ms passes the limit, and the clock falls. On an H100 a matrix product
alone would draw 1000 W at the full clock; with a limit of 700 W it takes 1.14 times as long. mHC's
kernels wait for memory and draw little, so the plain model is slowed more than the one with mHC:
without this, mHC's overhead is predicted too high.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mhcplan.profiles.logs import read_log
from mhcplan.profiles.schema import PowerModel
from mhcplan.profiles.vocabulary import OP_KINDS, OpKey, parse_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mhcplan.sim.program import CostTable, Program
    from mhcplan.sim.timeline import Timeline

    Floats = NDArray[np.float64]

# Ops whose arithmetic needs this share of their time, at the full matrix rate, follow the clock in
# full; attention and grouped products, which reach little more than half the rate, do so too.
_BOUND_SHARE = 0.5
_FULL_CLOCK = 0.995  # of the highest clock seen: below it the limit is at work
_TERA = 1e12
_CLOCK_DIGITS = 4  # slowdowns that are equal to so many digits are one


def stretched(watts: float | Floats, model: PowerModel) -> Floats:
    """How many times as long a load of arithmetic takes, rests included, that would draw ``watts``.

    The law is one for loads with rests and without: it was fitted to their periods."""
    excess = np.asarray(watts, np.float64) / model.free_watts - 1
    return 1 + model.stretch * np.maximum(excess, 0.0)


class Arithmetic(NamedTuple):
    """Of each cost key: its floating-point operations, whether it is a kernel, and the share of
    its duration that follows the clock."""

    flops: Floats
    is_kernel: Floats
    share: Floats


def arithmetic_of(
    cost_keys: Sequence[str], durations_ns: NDArray[np.int64], model: PowerModel
) -> Arithmetic:
    """What the ops of a Program's cost keys compute."""
    keys = [parse_key(text) for text in cost_keys]
    ops = [key if isinstance(key, OpKey) else None for key in keys]
    flops = np.array([_flops(key) if key else 0.0 for key in ops], np.float64)
    busy = flops / (model.tflops * _TERA) * 1e9 / np.maximum(durations_ns, 1)
    share = np.minimum(busy / _BOUND_SHARE, 1.0)
    return Arithmetic(flops, np.array([key is not None for key in ops], np.float64), share)


def _flops(key: OpKey) -> float:
    return float(OP_KINDS[key.kind].flops(dict(key.shape), key.pass_))


def slowdown(
    program: Program, costs: CostTable, timeline: Timeline, model: PowerModel
) -> tuple[Floats, Arithmetic]:
    """How many times as long arithmetic takes on each rank in this step, run over and over, and
    what computes.

    The step is cut into windows as long as the clock takes to follow the load; the slowdown is the
    mean over a rank's arithmetic. Every GPU has a clock of its own: in a measured DualPipeV the one
    of rank 0 ran at 1853 MHz and that of rank 1, which waits more, at 1964 MHz.
    """
    found = arithmetic_of(program.cost_keys, costs.duration_ns, model)
    windows = max(1, round(timeline.step_ns / (model.window_ms * 1e6)))
    length_ns = max(timeline.step_ns / windows, 1.0)
    middle = (timeline.start_ns + timeline.end_ns) / (2 * length_ns)
    window = np.minimum(middle.astype(np.int64), windows - 1)
    # how many ops of each cost key a window has, and their time: far fewer figures than ops
    keys = len(program.cost_keys)
    place = (program.rank * windows + window) * keys + program.cost
    shape = program.num_ranks * windows, keys
    count, spent_ns = (
        np.bincount(place, weights, shape[0] * keys).reshape(shape)
        for weights in (None, timeline.end_ns - timeline.start_ns)
    )
    flops = (count * found.flops).sum(1)
    busy = (spent_ns * found.is_kernel).sum(1) / length_ns
    watts = (
        model.idle_watts
        + (model.active_watts - model.idle_watts) * np.minimum(busy, 1.0)
        + model.joules_per_tflop * flops / _TERA / (length_ns / 1e9)
    )
    flops = flops.reshape(-1, windows)
    weighted = (stretched(watts, model).reshape(-1, windows) * flops).sum(1)
    return np.maximum(weighted / np.maximum(flops.sum(1), 1.0), 1.0), found


def steady_ns(cost_keys: Sequence[str], durations_ns: Sequence[int], model: PowerModel) -> float:
    """What ops take that one stream runs over and over without a pause."""
    durations = np.asarray(durations_ns, np.int64)
    found = arithmetic_of(cost_keys, durations, model)
    rate = found.flops.sum() / _TERA / (durations.sum() / 1e9)
    longer = float(stretched(model.active_watts + model.joules_per_tflop * rate, model))
    return float((durations * (1 + found.share * (longer - 1))).sum())


def slowed(
    program: Program, costs: CostTable, arithmetic: Arithmetic, factor: Floats
) -> tuple[Program, CostTable]:
    """A Program and its costs where arithmetic takes ``factor`` [rank] times as long.

    Ranks whose clocks differ have costs of their own: the cost keys follow each other once for
    every clock. Equal clocks share them.
    """
    clocks, of_rank = np.unique(np.round(factor, _CLOCK_DIGITS), return_inverse=True)
    count = len(clocks)
    longer = 1 + arithmetic.share * (clocks[:, None] - 1)
    cost = program.cost + len(program.cost_keys) * of_rank[program.rank]
    loads = costs.loads and replace(
        costs.loads, kernels=costs.loads.kernels * count, traffic=costs.loads.traffic * count
    )
    return program.renumbered(
        cost=cost.astype(program.cost.dtype), cost_keys=program.cost_keys * count
    ), replace(
        costs,
        duration_ns=np.round(costs.duration_ns * longer).astype(np.int64).ravel(),
        host_ns=np.tile(costs.host_ns, count),
        workspace_bytes=np.tile(costs.workspace_bytes, count),
        loads=loads,
    )


class Row(NamedTuple):
    """A steady load that was measured, see :mod:`mhcplan.profiles.capture.power`."""

    name: str
    period_ns: int
    cold_ns: int
    watts: float
    clock_mhz: float
    degrees: float
    flops: int
    hbm_bytes: int
    rest_share: float = 0.0

    @property
    def slowdown(self) -> float:
        """Period over the period that a rested chip would have."""
        return self.period_ns / (self.cold_ns * (1 + self.rest_share))


def read_rows(log: Path, device: str | None = None) -> list[tuple[Row, float]]:
    """Loads of a capture's log with the power limit (watts) of each."""
    entries = read_log(log, {"device": device} if device else None)
    return [(Row(**entry["row"]), entry["limit_watts"]) for entry in entries]


def fit_power(rows: Iterable[Row], limit_watts: float) -> PowerModel:
    """The model of a GPU from steady loads.

    The matrix products at several shares of the time say what one would draw at the full clock (the
    shares that the limit does not touch, carried on) and how far it is slowed beyond the limit;
    all other loads then say, by how far they are slowed, what they would draw.

    Args:
        rows: with an ``idle`` load, and ``gemm`` loads with and without rests.
        limit_watts: power limit of the driver.

    Raises:
        ValueError: loads are missing, or none reaches the limit.
    """
    found = list(rows)
    idle = next((row.watts for row in found if row.name == "idle"), None)
    products = [row for row in found if row.name.startswith("gemm rest")]
    full = max((row.clock_mhz for row in found), default=0.0)
    free = [r for r in products if r.rest_share and r.clock_mhz >= _FULL_CLOCK * full]
    slowed = [r for r in products if r.clock_mhz < _FULL_CLOCK * full]
    if idle is None or not free or len(slowed) < 2:
        raise ValueError("power: needs idle, and matrix products below and beyond the limit")
    alone = statistics.mean(r.watts * (1 + r.rest_share) - idle * r.rest_share for r in free)
    demand = [(alone + idle * r.rest_share) / (1 + r.rest_share) for r in slowed]
    slope, start = np.polyfit(demand, [r.slowdown - 1 for r in slowed], 1)
    free_watts = -start / slope
    stretch = slope * free_watts
    loads = [r for r in found if r.rest_share == 0 and r.name != "idle"]
    drawn = [
        free_watts * (1 + (r.slowdown - 1) / stretch)
        if r.clock_mhz < _FULL_CLOCK * full else r.watts
        for r in loads
    ]  # fmt: skip
    rate = np.array([r.flops / r.cold_ns / 1e3 for r in loads])
    per_tflop, active = np.polyfit(rate, drawn, 1)
    model = PowerModel(
        source="measured", limit_watts=limit_watts, idle_watts=idle,
        active_watts=round(float(active), 1), joules_per_tflop=round(float(per_tflop), 4),
        free_watts=round(float(free_watts), 1), stretch=round(float(stretch), 4),
        tflops=round(max(r.flops / r.cold_ns for r in products) / 1e3, 1),
    )  # fmt: skip
    return model.model_copy(update={"error_percent": _error_percent(loads, model)})


def steady_stretch(row: Row, model: PowerModel) -> float:
    """How many times its cold period a load takes by the model."""
    rate = row.flops / row.cold_ns / 1e3 if row.cold_ns else 0.0
    share = min(rate / model.tflops / _BOUND_SHARE, 1.0)
    rest = row.rest_share
    busy = 0.0 if row.name == "idle" else 1 / (1 + rest)
    watts = model.idle_watts + busy * (
        model.active_watts - model.idle_watts + model.joules_per_tflop * rate
    )
    return 1 + share * (float(stretched(watts, model)) - 1)


def _error_percent(loads: Sequence[Row], model: PowerModel) -> float:
    """Mean error of the periods that the model gives loads."""
    errors = [abs(steady_stretch(row, model) / row.slowdown - 1) for row in loads]
    return round(100 * statistics.mean(errors), 2)
