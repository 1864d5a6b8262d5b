"""How far the engine's model of contention is off, on every overlapped pair that was measured.

    python benchmarks/contention.py                  # held-out pairs: error of both sides, by class
    python benchmarks/contention.py --fit            # fit parameters to the other pairs first
    python benchmarks/contention.py --fit --store    # and write the model into the profile
    python benchmarks/contention.py --profile h200   # pairs and profile of another machine

A pair ran with both streams kept full on two GPUs; the engine plays the same. The error is
|predicted / measured - 1| of a side's slowdown. Eager pairs (messages small enough for the
library's buffers, whose ends do not wait for each other) are shown apart: in a step ends meet.
*Priced* is what ``mhcplan profile overlap`` says of an overlapped kernel, with the help of its
other pairs; all else is the model by itself, as steps are played.

How near a model can come is shown beside it: what the runs of a pair say of the error of their
mean, and how far off one measurement is as the prediction of another that should be equal to it.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mhcplan.profiles.contention import PHASES
from mhcplan.profiles.contention_fit import (
    TRAITS,
    Pair,
    Pairs,
    choices_of,
    errors,
    fit,
    start_of,
)
from mhcplan.profiles.contention_rows import (
    contention_model,
    preemptible_times,
    traffic_traits,
)
from mhcplan.profiles.loads import fitted_parameters
from mhcplan.profiles.overlap import parameters_of, rows_of
from mhcplan.profiles.overlap_neighbours import price_errors
from mhcplan.profiles.schema import profile_text, read_profile
from mhcplan.profiles.store import contention_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_AGREE = 0.03  # standard error of the mean of runs that agree
DATA = Path(__file__).parents[1] / "profiles" / "data"
Error = tuple[Pair, float, float]


def show(title: str, found: Iterable[Error]) -> None:
    """One line: pairs, and mean and median error of either side."""
    pairs = list(found)
    sides = [100 * c for _, c, _ in pairs], [100 * t for _, _, t in pairs]
    means = "  ".join(
        f"{name} {statistics.mean(side):5.1f} % (median {statistics.median(side):5.1f} %)"
        for name, side in zip(("compute", "traffic"), sides, strict=True)
    )
    print(f"{title:28}{len(pairs):5}  {means}")


def show_by(found: list[Error], key: Callable[[Pair], object]) -> None:
    """A line for each class of pairs."""
    for name in sorted({str(key(pair)) for pair, *_ in found}):
        show(f"  {name}", (error for error in found if str(key(error[0])) == name))


def runs_differ(pair: Pair, source: Pairs) -> float | None:
    """Standard error of the mean of a pair's traffic over its runs; None for one run."""
    runs = (source.measured(source.rows[pair.name], run) for run in PHASES)
    found = [run[1] for run in runs if run]
    if len(found) < 2:
        return None
    return statistics.stdev(found) / math.sqrt(len(found)) / statistics.mean(found)


def measured_again(pairs: Iterable[Pair], key: Callable[[Pair], object]) -> list[float]:
    """Error of each pair's traffic as the prediction of the next one that has the same key."""
    alike: defaultdict[object, list[float]] = defaultdict(list)
    for pair in pairs:
        alike[key(pair)].append(pair.measured[1])
    return [abs(a / b - 1) for same in alike.values() for a, b in pairwise(same)]


def show_repeats(found: list[Error], pairs: list[Pair], source: Pairs) -> None:
    """The errors ``found`` by how well runs agree, and what measuring ``pairs`` again changes."""
    errors_of_means = [by for pair in pairs if (by := runs_differ(pair, source)) is not None]
    print(f"standard error of the mean of a pair's runs, traffic: {_mean_percent(errors_of_means)}")
    differ = [(error, runs_differ(error[0], source)) for error in found]
    show("  held out, at most 3 %", (e for e, by in differ if by is not None and by <= _AGREE))
    show("  held out, more", (e for e, by in differ if by is not None and by > _AGREE))

    def message(pair: Pair) -> tuple[object, ...]:
        traffic = source.rows[pair.name]["traffic"]
        return pair.compute, traffic["pattern"], traffic["num_bytes"], traffic["busy"]

    print("one measurement of traffic as the prediction of another, mean error")
    limit = measured_again(pairs, lambda p: (*message(p), p.message.ctas, p.message.high_priority))
    print(f"  same kernel and CTAs, another limit for them: {_mean_percent(limit)}")
    persistent = (pair for pair in pairs if all(kernel.persistent for kernel in pair.kernels))
    level = measured_again(
        persistent, lambda p: (*message(p), source.rows[p.name]["traffic"]["ctas"])
    )
    print(f"  persistent kernel, another priority: {_mean_percent(level)}")


def _mean_percent(values: list[float]) -> str:
    if not values:
        return "no pair was"
    return f"{100 * statistics.mean(values):.1f} % of {len(values)}"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--profile", default="h100-sxm", help="shipped profile with a raw log")
    parser.add_argument("--fit", action="store_true", help="fit before the errors are taken")
    parser.add_argument("--store", action="store_true", help="write the model into the profile")
    args = parser.parse_args()
    path = DATA / f"{args.profile}.json"
    profile = read_profile(path)
    source = Pairs(rows_of(contention_log(args.profile)), profile.hardware.num_sms)
    pairs = source.pairs(TRAITS)
    if args.fit:
        parameters = fit(pairs, start_of(profile), choices_of(source), workers=os.cpu_count() or 1)
    else:
        parameters = parameters_of(profile)
    print(parameters)
    held_out = errors((pair for pair in pairs if pair.held_out), parameters)
    meeting = [error for error in held_out if not error[0].message.eager]
    show("held out", held_out)
    show("held out, ends meet", meeting)
    show("held out, eager", (error for error in held_out if error[0].message.eager))
    priced = price_errors(pairs, parameters)
    show("  priced, ends meet", (error for error in priced if not error[0].message.eager))
    show("  priced, eager", (error for error in priced if error[0].message.eager))
    print("ends meet, by kernel")
    show_by(meeting, lambda pair: pair.compute)
    print("by traffic")
    show_by(meeting, lambda pair: " ".join(pair.name.split("|")[1].split()[:2]))
    print("by priority of the traffic")
    show_by(meeting, lambda pair: "high" if pair.message.high_priority else "equal")
    print("by class of kernel")
    show_by(meeting, lambda pair: source.rows[f"{pair.compute}|-"]["family"])
    print("by MiB of a message")
    show_by(meeting, lambda pair: source.rows[pair.name]["traffic"]["num_bytes"] >> 20)
    show_repeats(meeting, [pair for pair in pairs if not pair.message.eager], source)
    if args.store:
        cases = {pair.compute for pair in pairs}
        kernels = {name: trait for name, trait in TRAITS.items() if name not in cases}
        if profile.contention_model is not None:  # pairs say nothing of two kernels side by side
            together = fitted_parameters(profile.contention_model).together
            parameters = replace(parameters, together=together)
        model = contention_model(
            parameters, kernels, traffic_traits(source), [(c, t) for _, c, t in meeting],
            preemptible_times(source, kernels),
        )  # fmt: skip
        profile = profile.model_copy(update={"contention_model": model})
        path.write_text(profile_text(profile), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
