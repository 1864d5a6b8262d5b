"""What mHC keeps stable: the same model trained with seven residuals, recorded as it trains.

    PYTHONPATH=src python -m benchmarks.stability --out OUT [--minutes 25] [--steps 1200]
        [--runs plain hc mhc ...] [--time | --cost]

Equal seeds, text and steps for all: ``plain``, ``hc``, ``mhc``, ``identity`` (mHC with H_res = I),
``mhc-no-pre`` (H_pre = 1/n), ``mhc-no-post`` (H_post = 1), ``hc-no-res`` (HC with H_res = I). Two
more are trained when they are asked for: ``mhc-from-hc`` starts mHC as HC starts, and
``hc-no-decay`` keeps weight decay off the constant part of HC's maps, as HC's authors do. The text
is the source of Python's standard library of the machine, whose digest goes into every recording.
``OUT/NAME.recording`` grows as a run goes on; when the minutes are over, the run saves
itself, and the same command takes everything up where it stopped. Then, on any machine,

    mhcplan diagnose OUT/*.recording --out DIR

``--time`` measures a step of each run and says how many steps fit the minutes; ``--cost`` measures
what recording costs. ``--device cpu --model tiny`` is a dry run.

On one H100, two runs at a time on two GPUs of one host, 1200 steps took with starting, compiling
and saving: ``plain`` 81 s, the four of mHC 115 to 142 s, HC some 150 s (485 s without kernels).
(Runs of mHC execute the same kernels whatever they pin: what lies between them is the host.)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import statistics
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.stability_run import (
    MODELS,
    SCHEMES,
    SEVEN,
    Settings,
    Training,
    recording_cost,
    synchronize,
)
from mhcplan.runtime.data import tokens_of

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMED_STEPS, WARM_UP = 20, 5
COST_ROUNDS = 100


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=SCHEMES, default=list(SEVEN))
    parser.add_argument("--model", choices=MODELS, default="100m")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--minutes", type=float, default=25.0, help="of all runs of this call")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=10, help="steps from record to record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-mb", type=float, default=64.0, help="of text at most")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--time", action="store_true", help="only time a step of each run")
    what.add_argument("--cost", action="store_true", help="only time the recorder")
    options = parser.parse_args(words)
    if options.steps % options.every:
        parser.error(f"--steps {options.steps} must be a multiple of --every {options.every}")
    until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    settings = make_settings(options)
    device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
    with one_process(device):
        if options.time:
            time_steps(options, settings, device)
        elif options.cost:
            time_recording(options, settings, device)
        else:
            train(options, settings, device, until)


@contextlib.contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """The group of one process that the runtime asks for; it transfers nothing."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_settings(options: argparse.Namespace) -> Settings:
    """Settings of all runs; makes the file of token numbers if it is not there yet."""
    vocab = MODELS[options.model]["vocab_size"]
    path = options.out / f"text-{vocab}-{options.text_mb:g}.npy"
    if not path.exists():
        text = standard_library(int(options.text_mb * 1e6))
        np.save(path, tokens_of(text, vocab).numpy())
    tokens = np.load(path)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
    return Settings(
        out=options.out, model=options.model, steps=options.steps, tokens=options.tokens,
        seq_len=options.seq_len, text=path, lr=options.lr, every=options.every, seed=options.seed,
        save_every=50 * options.every, dtype="bfloat16" if options.device == "cuda" else "float32",
        about={"text": "Python's standard library", "text_tokens": len(tokens),
               "text_sha256": digest},
    )  # fmt: skip


def standard_library(most: int) -> str:
    """Source of Python's standard library, file by file in alphabetical order."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
    found, size = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        found.append(text)
        size += len(text)
        if size > most:
            break
    return "\n".join(found)[:most]


# -- what it does ----------------------------------------------------------------------------------


def train(
    options: argparse.Namespace, settings: Settings, device: torch.device, until: float
) -> None:
    for name in options.runs:
        gc.collect()  # a run before it holds itself in cycles, and its memory with it
        if not Training(name, settings, device).run(until):
            print("the minutes are over: run the same command again to go on")
            return
    print(f"all {len(options.runs)} runs are done")


def time_steps(options: argparse.Namespace, settings: Settings, device: torch.device) -> None:
    total = 0.0
    for name in options.runs:
        gc.collect()
        training = Training(name, settings, device)
        seconds = []
        for _ in range(WARM_UP + TIMED_STEPS):
            synchronize(device)
            began = time.perf_counter()
            training.advance()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[WARM_UP:])
        total += median
        parameters = training.num_parameters
        print(f"{name}: {parameters:,} parameters, {1e3 * median:.1f} ms a step", flush=True)
    steps = int(60 * options.minutes / total) // options.every * options.every
    print(f"all: {total:.3f} s a step; {steps} steps of each fit {options.minutes:g} minutes")


def time_recording(options: argparse.Namespace, settings: Settings, device: torch.device) -> None:
    steps = np.array([settings.every - 1, 1])  # without a record and with one
    for name in options.runs:
        gc.collect()
        seconds, host = recording_cost(Training(name, settings, device), rounds=COST_ROUNDS)
        percent = 100 / settings.every / np.median(seconds[:, 0])
        cost = percent * (seconds[:, 1:] - seconds[:, :1]) @ steps
        middle = np.median(cost)
        error = 1.86 * np.median(np.abs(cost - middle)) / COST_ROUNDS**0.5  # of a median
        inside = np.median(host[:, 1:], axis=0)
        print(
            f"{name}: recording every {settings.every} steps costs {middle:+.2f} +- {error:.2f} %"
            f" of a step ({1e3 * np.median(seconds[:, 0]):.1f} ms without); the host's time in the"
            f" recorder is {percent * inside @ steps:.2f} %: {1e3 * inside[1]:.2f} ms a record,"
            f" {1e3 * inside[0]:.2f} ms a step between",
            flush=True,
        )


if __name__ == "__main__":
    main()
