"""Run the rows of the closed loop that were predicted, and keep what they measure.

    python benchmarks/closed_loop.py --gpus 2 --out OUT
    python benchmarks/closed_loop.py --gpus 2 --set ablation --out OUT
    python benchmarks/closed_loop.py --gpus 4 --out OUT
    python benchmarks/closed_loop.py --gpus 8 --out OUT

Plans and claims are those of ``profiles/data/predictions.jsonl``; a row whose program is not the
one that was predicted is refused. Kernels are compiled first, then anchors are measured (copy,
matrix product, a block of a shape in no row), then each row in one set of processes: memory, steps
issued by the hosts, steps captured as CUDA graphs, a traced step; mHC and baseline in turns.

Rows run in the order of their sets, those that once hung last; rows of a set that compares its rows
with each other run without their baseline. The blind rows of two GPUs take some 7 minutes, those of
the ablation 3, of four GPUs 5.

Every finished stage of a row is a line of ``OUT/measured.jsonl``, with traces beside it: a run that
is cut off keeps them, and the next one goes on. A row that fails or outlasts ``--row-seconds`` ends
its processes, and new ones run the rows after it, then itself once more; if the captured part fails
twice, later rows are issued only. Needs torch, triton, numpy and pydantic; ``--device cpu`` runs
tiny rows on gloo. ``closed_loop_report.py OUT`` puts the lines beside their claims.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import gc
import importlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.closed_loop_predict import PREDICTIONS
from benchmarks.closed_loop_rows import ALONE, BLIND, GPUS, HUNG, SETS
from mhcplan.planner.measured.claim import program_digest, programs_of
from mhcplan.planner.plan.spec import make_plan
from mhcplan.profiles.accuracy import (
    BASELINE,
    BLOCK,
    MHC,
    Claim,
    Measurement,
    append_lines,
    latest,
    read_lines,
    resource_of,
)
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.power import steady_ns
from mhcplan.profiles.store import find_profile
from mhcplan.runtime.job import Measured, Subject, measure
from mhcplan.runtime.launch import ProcessFailed, launch
from mhcplan.runtime.spec import RunSpec
from mhcplan.runtime.train import Session
from mhcplan.sim.files import write_trace

if TYPE_CHECKING:
    from collections.abc import Iterator

LEAST_S = 25.0  # a row is not begun with less time left
CAPTURES_LOST = 2  # rows whose captured part failed, after which none is captured any more
ISSUED_STEPS = 5  # that are timed where captured ones follow
ANCHOR_MODEL, ANCHOR_TOKENS, ANCHOR_N = "mhc-9b", 4096, 4
MEASURED, ANCHORS, RUNNING = "measured.jsonl", "anchors.json", "running.json"


def main() -> None:
    options = parse()
    options.until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    claims = wanted_claims(options)
    if options.compile_only:
        compile_kernels(options, claims)
        return
    if options.device == "cuda":
        before_rows(options, claims)
    failed: dict[str, str] = {}
    given_up: set[str] = set()
    while pending := [c for c in claims if c.row not in given_up and not is_done(options, c)]:
        pending.sort(key=lambda claim: claim.row in failed)
        if time.monotonic() + LEAST_S > options.until:
            break
        running = options.out / RUNNING
        running.unlink(missing_ok=True)
        try:
            launch(run_rows, options.gpus, options, pending, device=options.device)
        except ProcessFailed as error:
            if not running.exists():  # not even the first row was begun
                print(str(error)[-3000:], flush=True)
                break
            row, stage = json.loads(running.read_text())
            if row in failed:  # once more, as the first of its processes, was not enough
                given_up.add(row)
            failed[row] = stage
            print(f"{row} failed while {stage}: {str(error)[-1500:]}", flush=True)
            if list(failed.values()).count("captured") >= CAPTURES_LOST:
                options.capture = False
    left = [c.row for c in claims if not is_done(options, c)]
    print(f"{len(claims) - len(left)} of {len(claims)} rows done; left: {' '.join(left) or 'none'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, choices=sorted(set(GPUS.values())), default=2)
    parser.add_argument("--set", nargs="+", choices=SETS, help="default: all blind ones of --gpus")
    parser.add_argument("--only", nargs="*", help="rows to run, in this order")
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS)
    parser.add_argument("--minutes", type=float, default=7.7)
    parser.add_argument("--row-seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--compile-workers", type=int, default=max((os.cpu_count() or 2) // 2, 1))
    parser.add_argument("--compile-seconds", type=float, default=100.0)
    parser.add_argument("--compile-only", action="store_true", help="compile the rows' kernels")
    parser.add_argument("--issued-only", dest="capture", action="store_false")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    options.capture = options.capture and options.device == "cuda"
    return options


def wanted_claims(options: argparse.Namespace) -> list[Claim]:
    """The claims of the rows to run, in order; refused ones are named.

    Raises:
        SystemExit: a row that was asked for has no claim in the sets.
    """
    sets = options.set or [
        s for s, n in GPUS.items() if n == options.gpus and (options.only or s in BLIND)
    ]
    claims = latest(read_lines(options.predictions, Claim))
    known = {claim.row for claim in claims.values() if claim.set in sets}
    if unknown := [name for name in options.only or [] if name not in known]:
        raise SystemExit(
            f"--only {unknown[0]}: no claim of the sets {', '.join(sets)} is so called"
        )
    found: list[Claim] = []
    for claim in claims.values():
        if claim.set not in sets or (options.only and claim.row not in options.only):
            continue
        programs = programs_of(make_plan(claim.plan))
        digests = {name: program_digest(program) for name, program in programs.items()}
        if digests == {name: p.program_digest for name, p in claim.programs.items()}:
            found.append(claim)
        else:
            print(f"{claim.row}: its prediction is of another program; predict it again")
    return sorted(found, key=lambda c: options.only.index(c.row) if options.only else turn_of(c))


def turn_of(claim: Claim) -> tuple[bool, int, int]:
    """Where a row stands in a run: what may hang costs no other row its time."""
    names = list(SETS[claim.set])
    place = names.index(claim.row) if claim.row in names else len(names)
    return claim.row in HUNG, list(SETS).index(claim.set), place


def is_done(options: argparse.Namespace, claim: Claim) -> bool:
    """Whether a row has all its stages, as this run would have them."""
    lines = read_lines(options.out / MEASURED, Measurement)
    modes = [
        line.programs[MHC].times
        for line in lines
        if (line.row, line.prediction) == (claim.row, claim.digest)
    ]
    return any("captured" in times for times in modes) or (bool(modes) and not options.capture)


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End this process, and so all, if the block takes longer."""

    def end() -> None:
        print(f"{what} took more than {seconds:.0f} s", flush=True)
        faulthandler.dump_traceback()
        os._exit(4)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


# -- before the rows -------------------------------------------------------------------------------


def before_rows(options: argparse.Namespace, claims: list[Claim]) -> None:
    """Compile the rows' kernels and measure the anchors; the rows run without either."""
    begin = time.monotonic()
    compiling = subprocess.Popen(
        [sys.executable, *sys.argv, "--compile-only"], start_new_session=True
    )
    try:
        compiling.wait(options.compile_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(compiling.pid, signal.SIGKILL)
    print(f"compiling: {time.monotonic() - begin:.0f} s", flush=True)
    if not (options.out / ANCHORS).exists():
        with contextlib.suppress(ProcessFailed):
            launch(run_anchors, 1, options, claims, device=options.device)
        print(f"compiling and anchors: {time.monotonic() - begin:.0f} s", flush=True)


def compile_kernels(options: argparse.Namespace, claims: list[Claim]) -> None:
    """Run every op of the rows once, in many processes, so that the rows find compiled kernels."""
    from mhcplan.profiles.capture.measure import warm_compilers
    from mhcplan.profiles.vocabulary import OpKey, parse_key

    keys = dict.fromkeys(
        key
        for claim in claims
        for program in claim.programs.values()
        for text in program.timeline.ops_ns
        if isinstance(key := parse_key(text), OpKey)
    )
    warm_compilers(list(keys), options.compile_workers)


def run_anchors(
    _process: int, _world: int, options: argparse.Namespace, claims: list[Claim]
) -> None:
    """How much longer than in the profile a copy, a matrix product and a block take here."""
    from mhcplan.kernels.layers import Env
    from mhcplan.profiles.capture.block import Block, compare
    from mhcplan.profiles.capture.machine import measure_rates
    from mhcplan.profiles.capture.power import matrix_tflops
    from mhcplan.profiles.capture.timing import GpuTimer
    from mhcplan.profiles.presets import MODELS

    with time_limit(options.row_seconds, "anchors"):
        profile = find_profile(claims[0].profile)
        rows = {str(row.key): row for row in profile.ops}
        device = torch.device("cuda", 0)
        both = {"memory": 1.0, "matrix": 1.0}
        if profile.power_model is not None:  # on a rested chip, as the model's was
            both["matrix"] = profile.power_model.tflops / matrix_tflops(device)
        timer = GpuTimer(device)
        claimed = {rate.name: rate.per_second for rate in profile.rates}
        here = {rate.name: rate.per_second for rate in measure_rates(timer)}
        both["memory"] = claimed["copy_bytes"] / here["copy_bytes"]
        block = Block(MODELS[ANCHOR_MODEL], ANCHOR_N, ANCHOR_TOKENS, ANCHOR_TOKENS, Env(device))
        found = compare(block, rows)
        keys = [str(key) for key in block.op_keys()]
        # the block runs as one graph, whose launch is nothing beside it
        in_graph = CostModel(profile).table(keys, graphs_begun=[0.0] * len(keys)).duration_ns
        scaled = [
            int(ns) * both[resource_of(rows[key], profile)]
            for key, ns in zip(keys, in_graph, strict=True)
        ]
        expected_ns = sum(scaled)
        if profile.power_model is not None:
            expected_ns = steady_ns(keys, [round(ns) for ns in scaled], profile.power_model)
        anchors = both | {BLOCK: found.measured_ns / expected_ns}
    (options.out / ANCHORS).write_text(json.dumps(anchors, indent=1))
    print(f"{found}; anchors {anchors}", flush=True)


# -- rows ------------------------------------------------------------------------------------------


def run_rows(process: int, _world: int, options: argparse.Namespace, claims: list[Claim]) -> None:
    """One process of the set."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device("cuda", process) if options.device == "cuda" else torch.device("cpu")
    session = Session(device, timeout_s=options.row_seconds)
    for claim in claims:
        # hosts may disagree on the time: the first decides for all
        go = [time.monotonic() + LEAST_S < options.until]
        torch.distributed.broadcast_object_list(go, src=0, device=device)
        if not go[0]:
            break
        if process == 0:
            note_running(options, claim.row, "issued")
        with time_limit(options.row_seconds, claim.row):
            run_row(claim, session, options)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def note_running(options: argparse.Namespace, row: str, stage: str) -> None:
    """Say what is being done: whoever starts the processes reads it if they end."""
    (options.out / RUNNING).write_text(json.dumps([row, stage]))


def run_row(claim: Claim, session: Session, options: argparse.Namespace) -> None:
    """Measure a row; process 0 keeps it stage by stage."""
    begin = time.monotonic()
    plan = make_plan(claim.plan)
    has_baseline = BASELINE in claim.programs and claim.set not in ALONE
    plans = {MHC: plan, BASELINE: plan.baseline()} if has_baseline else {MHC: plan}
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    subjects = {
        name: Subject(program, RunSpec.from_plan(plans[name].model_dump(mode="json"), dtype=dtype))
        for name, program in programs_of(plan).items()
        if name in plans
    }

    def keep(found: dict[str, Measured]) -> None:
        line = measurement(claim, found, options)
        append_lines(options.out / MEASURED, [line])
        for name, of in found.items():
            assert of.trace is not None
            meta = {"plan": plans[name].model_dump(mode="json"), "prediction": claim.digest}
            path = options.out / f"{claim.row}.{name}.{of.mode}.trace.json"
            write_trace(of.trace._replace(meta=of.trace.meta | meta), path)
        print(f"{summary(line)}, {time.monotonic() - begin:.0f} s", flush=True)
        note_running(options, claim.row, "captured")

    measure(
        subjects, session, steps=options.steps, warm_up=options.warm_up, capture=options.capture,
        issued_steps=ISSUED_STEPS if options.capture else options.steps, keep=keep,
    )  # fmt: skip


def measurement(
    claim: Claim, found: dict[str, Measured], options: argparse.Namespace
) -> Measurement:
    """What process 0 has of a row, as a line."""
    anchors = options.out / ANCHORS
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return Measurement(
        row=claim.row, prediction=claim.digest,
        measured=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command(),
        device=device, versions=versions(options.device), environment=environment(),
        anchors=json.loads(anchors.read_text()) if anchors.exists() else {},
        programs={name: of.line() for name, of in found.items()},
    )  # fmt: skip


def command() -> str:
    """What repeats this run; of absolute paths their last part, the rest is nobody's."""
    words = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/closed_loop.py", *words])


def versions(device: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
        nccl: Any = importlib.import_module("torch.cuda.nccl")
        found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def environment() -> dict[str, str]:
    """What is set for CUDA and NCCL; of absolute paths their last part."""
    return {
        name: Path(value).name if Path(value).is_absolute() else value
        for name, value in sorted(os.environ.items())
        if name.startswith(("CUDA_", "NCCL_", "PYTORCH_CUDA_"))
    }


def summary(line: Measurement) -> str:
    """A row in a line."""
    words: list[str] = []
    for name, found in line.programs.items():
        modes = (
            f"{mode} {times.step_ns / 1e6:.2f} ms ±{times.spread_percent:.1f} %"
            f" (host {times.issue_ns / 1e6:.1f})"
            for mode, times in found.times.items()
        )
        peak = max(found.allocated_bytes, default=0) / 1e9
        words.append(
            f"{name} {', '.join(modes)}, traced {found.traced_step_ns / 1e6:.2f} ms,"
            f" {peak:.2f} GB, losses {' '.join(f'{x:.3f}' for x in found.losses)}"
        )
    return f"{line.row}: " + "; ".join(words)


if __name__ == "__main__":
    main()
