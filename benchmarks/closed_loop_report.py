"""Put measured rows beside their claims: ``docs/accuracy.md`` is what this prints.

    python benchmarks/closed_loop_report.py OUT...   # first adds the rows measured in OUT
    python benchmarks/closed_loop_report.py          # prints again from what is there

Rows go into ``profiles/data/accuracy.jsonl`` as they were measured, none left out; of a row that
was measured in stages the last one counts. A row is *blind* if the commit that brought its claim,
and the profile that the claim was made with, came before the commit that brought the measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from benchmarks.closed_loop_predict import PREDICTIONS
from mhcplan.planner.measured.claim import programs_of
from mhcplan.planner.output import write_file
from mhcplan.planner.plan.spec import make_plan
from mhcplan.profiles.accuracy import (
    MHC,
    Claim,
    Measurement,
    Row,
    append_lines,
    claim_line,
    joined,
    latest,
    newest,
    read_lines,
)
from mhcplan.profiles.schema import parse_profile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[1]
ACCURACY = PREDICTIONS.with_name("accuracy.jsonl")
PAGE = ROOT / "docs" / "accuracy.md"
FINDINGS = Path(__file__).with_name("closed_loop_findings.md")


class Limits(NamedTuple):
    """What the project asks of |errors|: of step and memory in percent, of overhead in points."""

    mean: float
    worst: float = math.inf
    overhead: float = 1.0
    allocated: float = 1.0
    reserved: float = math.inf


LIMITS = {
    "pp2": Limits(3, 6, reserved=3), "ep2": Limits(5, reserved=3), "four": Limits(5, 8),
    "eight": Limits(5, 8),
}  # fmt: skip
RANKED_PERCENT = 2.0  # two steps that differ by more must be predicted in order

HEAD = """\
# How far predictions are off

Each row is a training step of a small mixture-of-experts model (the paper's block shapes, 16 routed
experts, forced balanced routing) that was predicted, committed, and then run on real GPUs by the
same stream program. This page is printed by `python benchmarks/closed_loop_report.py`; claims are
in `profiles/data/predictions.jsonl`, measurements in `profiles/data/accuracy.jsonl`, none left out.
"""

LEGEND = """\
*Step* is the median of at least 20 steps that nothing watches, of the slowest process; *host* is
how much longer the step takes when the hosts issue it op by op than as CUDA graphs (older rows: as
one graph of all streams); *traced* is how much longer it takes with an event around every op.
Errors are predicted over measured, minus 1: *anchored* ones after the machine's anchors (a copy, a
matrix product and a block of another shape, measured just before the rows) have scaled the profile;
these are judged. Memory is the allocator's, of the process that is farthest off. *Blind*: git shows
that claim and profile came first.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("out", nargs="*", type=Path, help="folders of closed_loop.py to add")
    wanted = parser.parse_args()
    claims = read_lines(PREDICTIONS, Claim)
    rows = joined(read_lines(ACCURACY, Measurement), claims)
    known = {(row.measured.row, row.measured.measured) for row in rows}
    for folder in wanted.out:
        new = [line for line in last_stages(folder) if (line.row, line.measured) not in known]
        rows += joined(new, claims)  # refuses what nobody claimed, before anything is written
        append_lines(ACCURACY, new)
    page = "\n".join(page_lines(claims, rows))
    write_file(PAGE, page)
    print(page, end="")


def last_stages(folder: Path) -> list[Measurement]:
    """The measured rows of a run, each with all stages that it finished."""
    lines = read_lines(folder / "measured.jsonl", Measurement)
    return list({(line.row, line.prediction): line for line in lines}.values())


# -- the page --------------------------------------------------------------------------------------


def page_lines(claims: Sequence[Claim], rows: Sequence[Row]) -> Iterator[str]:
    """The page, line by line: today's rows, what missed and why, single ops, what came before."""
    yield HEAD
    today = newest(rows)
    earlier = [row for row in rows if row not in today]
    by_set: defaultdict[str, list[Row]] = defaultdict(list)
    for row in today:
        by_set[row.claim.set].append(row)
    judged = {name: of for name, of in by_set.items() if name in LIMITS}
    if rows:
        yield from today_lines(judged)
        for name, of_set in by_set.items():
            if name not in judged:
                yield from compared_lines(name, of_set, rows)
        yield FINDINGS.read_text(encoding="utf-8")
        for name, of_set in by_set.items():
            yield f"## Ops and waits of {name}\n"
            yield from op_lines(of_set)
            yield from wait_lines(of_set)
    else:
        yield "No row has been measured yet.\n"
    if earlier:
        yield f"## Older measurements: {len(earlier)}\n"
        yield "Of rows that were measured again, after the model had been mended.\n"
        yield from row_lines(earlier)
    waiting = [claim for claim in latest(claims).values() if claim.row not in names_of(rows)]
    if waiting:
        yield f"## Claimed, not run yet: {len(waiting)}\n"
        yield "| row | GPUs | step, captured | issued | overhead | profile | claimed |"
        yield "|---|---:|---:|---:|---:|---|---|"
        yield from map(claim_row, waiting)
        yield ""


def names_of(rows: Iterable[Row]) -> set[str]:
    return {row.claim.row for row in rows}


def today_lines(by_set: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """The newest measurement of each row that judges the model, and whether limits were held."""
    rows = [row for of_set in by_set.values() for row in of_set]
    yield "## The newest measurement of each row\n"
    yield f"| asked of {len(rows)} rows | {' | '.join(by_set)} |"
    yield f"|---|{'---|' * len(by_set)}"
    columns = [bars(name, of_set) for name, of_set in by_set.items()]
    for words, *found in zip(BARS, *columns, strict=True):
        yield f"| {words} | {' | '.join(found)} |"
    yield ""
    yield from row_lines(rows)
    yield LEGEND
    for name, of_set in by_set.items():
        for slower, faster in misordered(of_set)[0]:
            yield f"* {name}: `{slower}` was predicted faster than `{faster}`."
        bubble = max((row.bubble_error_points() for row in of_set), key=abs)
        yield f"* {name}: bubble by rank, worst error {bubble:+.2f} points of the step."
    yield ""


BARS = (
    "step, mean error", "step, worst error", "overhead, worst error", "allocated memory, worst",
    "reserved memory, worst", f"pairs that differ by over {RANKED_PERCENT:g} %, in order",
)  # fmt: skip


def bars(name: str, rows: Sequence[Row]) -> list[str]:
    """A set's errors against its limits, in the order of ``BARS``."""
    limits = LIMITS[name]
    steps = [abs(row.step_error_percent()) for row in rows]
    points = [abs(p) for row in rows if (p := row.overhead_error_points()) is not None]
    memory = [
        max(abs(row.memory_error_percent(kind)) for row in rows)
        for kind in ("allocated", "reserved")
    ]  # fmt: skip
    wrong, pairs = misordered(rows)
    return [
        held(statistics.fmean(steps), limits.mean, "%"),
        held(max(steps), limits.worst, "%"),
        held(max(points), limits.overhead, "points") if points else "",
        held(memory[0], limits.allocated, "%"),
        held(memory[1], limits.reserved, "%"),
        f"{len(pairs) - len(wrong)} of {len(pairs)}: {'**missed**' if wrong else 'held'}",
    ]


def held(found: float, limit: float, unit: str) -> str:
    """A figure and whether it is within its limit, which may be none."""
    if math.isinf(limit):
        return f"{found:.2f} {unit}"
    return f"{found:.2f} of {limit:g} {unit}: {'held' if found <= limit else '**missed**'}"


def compared_lines(name: str, rows: Sequence[Row], every: Sequence[Row]) -> Iterator[str]:
    """Rows that are compared with the base of their set, where the same run measured it."""
    base = f"{name}-base"
    bases = {row.machine: row for row in every if row.claim.row == base}
    yield f"## Settings one by one: {name}\n"
    yield from row_lines(rows)
    yield f"| against `{base}` of the same run | measured | predicted |"
    yield "|---|---:|---:|"
    for row in rows:
        other = bases.get(row.machine)
        if other is None or row.claim.row == base:
            continue
        change = (100 * (ns(row) / ns(other) - 1) for ns in (measured_ns, predicted_ns))
        yield f"| {row.claim.row} | {' | '.join(f'{percent:+.1f} %' for percent in change)} |"
    yield ""


def row_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Rows as a table, and how they were run."""
    yield "| row | step | host | traced | error | anchored | overhead | its error | allocated |"\
          " reserved | blind |"  # fmt: skip
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    yield from map(measured_row, rows)
    yield ""
    runs: defaultdict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        of = row.measured
        runs[of.command, f"{row.claim.gpus} x {of.device}", of.measured[:10]].append(row)
    for (command, machine, day), of_run in runs.items():
        anchors = ", ".join(f"{k} {v:.3f}" for k, v in of_run[0].measured.anchors.items())
        yield f"{len(of_run)} rows on {machine}, {day}, anchors {anchors or 'none'}: `{command}`\n"


def measured_row(row: Row) -> str:
    found = row.measured.programs[MHC]
    times = found.times[row.mode]
    host = found.times["issued"].step_ns / times.step_ns - 1 if row.mode == "captured" else None
    overhead = row.overhead_percent
    cells = [
        row.claim.row,
        f"{times.step_ns / 1e6:.2f} ms ±{times.spread_percent:.1f} %",
        "issued" if host is None else f"{100 * host:+.1f} %",
        f"{100 * (found.traced_step_ns / times.step_ns - 1):+.1f} %",
        f"{row.step_error_percent(anchored=False):+.2f} %",
        f"{row.step_error_percent():+.2f} %",
        "" if overhead is None else f"{overhead:+.2f} %",
        "" if overhead is None else f"{row.overhead_error_points():+.2f} points",
        f"{row.memory_error_percent('allocated'):+.2f} %",
        f"{row.memory_error_percent('reserved'):+.2f} %",
        why_not_blind(ROOT, row) or "yes",
    ]
    return f"| {' | '.join(cells)} |"


def claim_row(claim: Claim) -> str:
    steps = {mode: step.step_ns for mode, step in claim.programs[MHC].steps.items()}
    base = claim.programs.get("baseline", claim.programs[MHC]).steps["captured"].step_ns
    return (
        f"| {claim.row} | {claim.gpus} | {steps['captured'] / 1e6:.2f} ms |"
        f" {steps['issued'] / 1e6:.2f} ms | {100 * (steps['captured'] / base - 1):+.2f} % |"
        f" {claim.profile} {claim.profile_digest[:12]} | {claim.written} |"
    )


def misordered(
    rows: Sequence[Row],
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs (slower, faster) with equal work that were predicted the other way, and all pairs."""
    pairs: list[tuple[str, str]] = []
    wrong: list[tuple[str, str]] = []
    for pair in combinations(rows, 2):
        if work_of(pair[0].claim) != work_of(pair[1].claim):
            continue
        faster, slower = sorted(pair, key=measured_ns)
        if measured_ns(slower) > measured_ns(faster) * (1 + RANKED_PERCENT / 100):
            pairs.append((slower.claim.row, faster.claim.row))
            if predicted_ns(slower) <= predicted_ns(faster):
                wrong.append(pairs[-1])
    return wrong, pairs


def measured_ns(row: Row) -> int:
    return row.measured.programs[MHC].times[row.mode].step_ns


def predicted_ns(row: Row) -> float:
    return measured_ns(row) * (1 + row.step_error_percent() / 100)


def work_of(claim: Claim) -> tuple[object, ...]:
    """What two rows must have in common to be alternatives of each other."""
    plan = claim.plan
    tokens = plan["microbatches"] * plan["micro_batch_size"] * plan["seq_len"]
    return str(plan["model"]), tokens, claim.gpus, plan["layout"]["ep"]


def op_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Errors of single ops in traced steps, by kind and pass, with and without events."""
    errors: defaultdict[str, list[float]] = defaultdict(list)
    without: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        for found, events in ((errors, 0.0), (without, events_ns(row))):
            for key, error in row.op_errors_percent(events).items():
                found[key.split(" ")[0]].append(error)
    each = [events_ns(row) / 1e3 for row in rows]
    yield f"Events make an op of a traced step up to {min(each):.1f} to {max(each):.1f} us longer"
    yield "(traced step less step, over a rank's ops). Where the error changes its sign without"
    yield "them, they may be all of it; ops no longer than twice that have no such figure.\n"
    yield "| op | rows | median error | worst | median without events |"
    yield "|---|---:|---:|---:|---:|"
    for name, of in sorted(errors.items(), key=lambda item: -abs(statistics.median(item[1]))):
        rest = f"{statistics.median(without[name]):+.1f} %" if without[name] else ""
        median, worst = statistics.median(of), max(of, key=abs)
        yield f"| {name} | {len(of)} | {median:+.1f} % | {worst:+.1f} % | {rest} |"
    yield ""


def events_ns(row: Row) -> float:
    """What the events around an op take in a row's traced step, at most."""
    found = row.measured.programs[MHC]
    more_ns = found.traced_step_ns - found.times[row.mode].step_ns
    return max(more_ns, 0) / ops_of_a_rank(json.dumps(row.claim.plan))


@cache
def ops_of_a_rank(plan: str) -> int:
    """Ops of the rank that has most, of a plan as JSON."""
    program = programs_of(make_plan(json.loads(plan)))[MHC]
    return int(max(np.diff(program.rank_offsets)))


def wait_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Waiting and hidden traffic, predicted and measured, of the mean rank."""
    yield "| row | waits predicted, ms | measured, ms | hidden predicted | measured |"
    yield "|---|---|---|---|---|"
    for row in rows:
        sides = row.claim.programs[MHC].timeline, row.measured.programs[MHC].timeline
        waits = [
            ", ".join(
                f"{name.removeprefix('exposed_')} {statistics.fmean(ns) / 1e6:.2f}"
                for name, ns in side.breakdown_ns.items()
                if name.startswith("exposed_") or name in ("host", "bubble")
            )
            for side in sides
        ]
        hidden = [
            ", ".join(f"{k} {statistics.fmean(v):.0f} %" for k, v in side.hidden_percent.items())
            for side in sides
        ]
        yield f"| {row.claim.row} | {' | '.join(waits)} | {' | '.join(hidden)} |"
    yield ""


# -- blind -----------------------------------------------------------------------------------------


def why_not_blind(root: Path, row: Row) -> str:
    """Why git does not show that a row was claimed before it ran; empty if it does."""
    claimed = first_commit(root, claim_line(row.claim), "profiles/data/predictions.jsonl")
    ran = first_commit(
        root, f'"prediction":"{row.measured.prediction}"', "profiles/data/accuracy.jsonl"
    )
    if not claimed:
        return "the claim is not committed"
    if row.claim.written >= row.measured.measured:
        return "claimed after it ran"
    if ran and (ran == claimed or git(root, "merge-base", claimed, ran) != claimed):
        return "the claim was not committed before the measurement"
    if committed_digest(root, claimed, row.claim.profile) != row.claim.profile_digest:
        return "claimed with another profile than the committed one"
    return ""


@cache
def committed_digest(root: Path, commit: str, profile: str) -> str:
    """Digest of a profile as a commit has it; empty if it has none."""
    text = git(root, "show", f"{commit}:profiles/data/{profile}.json")
    return parse_profile(text, profile).digest if text else ""


def first_commit(root: Path, text: str, path: str) -> str:
    """The commit that first had ``text`` in a file; empty if none has."""
    found = git(root, "log", "--reverse", "--format=%H", f"-S{text}", "--", path)
    return found.split("\n", 1)[0]


def git(root: Path, *words: str) -> str:
    """What git says; empty where it fails."""
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
