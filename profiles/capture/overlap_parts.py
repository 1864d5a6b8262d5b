"""The parts of a capture in which kernels overlap: with traffic (two GPUs), with kernels (one).

Both are logs of lines beside the profile; :func:`with_overlap` fits the contention model to the
first and takes the latencies of the second, and puts them into the profile.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch

from mhcplan.profiles.capture import contention, machine, priority
from mhcplan.profiles.contention_fit import TRAITS, Pairs, choices_of, errors, fit, start_of
from mhcplan.profiles.contention_rows import (
    contention_model,
    preemptible_times,
    priority_latencies,
    traffic_traits,
)
from mhcplan.profiles.logs import read_log
from mhcplan.sim.jit import has_numba

if TYPE_CHECKING:
    from pathlib import Path

    from mhcplan.profiles.schema import ContentionModel, Profile

# a message of each pattern beside two kernels: does it run?
_TINY = contention.Plan(sizes=(65536,), ctas=(0,), names=("gemm_library", "elementwise"))
CONTENTION_SECONDS, PRIORITY_SECONDS = 280.0, 200.0


def _stamp(device_type: str) -> dict[str, str]:
    return {
        "code": machine.code_sha256(),
        "device": machine.device_name(torch.device(device_type)),
    }


def measure_contention_part(
    log: Path, device_type: str, budget_seconds: float, *, tiny: bool = False
) -> None:
    """Overlap kernels with traffic between two devices; pairs that ``log`` has are not measured
    again.

    Raises:
        RuntimeError: a worker process failed.
    """
    seconds = min(budget_seconds, CONTENTION_SECONDS)
    plan = _TINY if tiny else contention.Plan()
    plan.budget_seconds = seconds
    contention.measure_contention(log, _stamp(device_type), device_type, plan=plan)


def measure_priority_part(log: Path, device_type: str, budget_seconds: float) -> None:
    """How long a short kernel waits for a chip that another keeps busy.

    Raises:
        RuntimeError: a process failed.
        ValueError: no CUDA device.
    """
    if device_type != "cuda":
        raise ValueError(f"device={device_type}: the part priority needs a CUDA device")
    seconds = min(budget_seconds, PRIORITY_SECONDS)
    priority.measure_priority(log, _stamp(device_type), budget_seconds=seconds)


def logs_beside(out: Path) -> tuple[Path, Path]:
    """Where the two parts of the profile ``out`` are logged: contention, priority."""
    return (
        out.with_name(f"{out.name}.contention.jsonl"),
        out.with_name(f"{out.name}.priority.jsonl"),
    )


def with_overlap(profile: Profile, contention_log: Path, priority_log: Path) -> Profile:
    """``profile`` with what the logs say, as far as they are there and of its device."""
    stamp = {"device": profile.provenance[0].device}
    changes: dict[str, object] = {}
    if contention_log.exists():
        model = _fitted(profile, Pairs(contention.read_rows(contention_log, stamp), _sms(profile)))
        if model is not None:
            changes["contention_model"] = model
    if priority_log.exists():
        lines = read_log(priority_log, stamp)
        changes["priorities"] = tuple(priority_latencies(lines))
    return profile.model_copy(update=changes)


def _sms(profile: Profile) -> int:
    return profile.hardware.num_sms


def _fitted(profile: Profile, source: Pairs) -> ContentionModel | None:
    """The model; None, and a line that says why, where there is too little to fit it to."""
    if not has_numba():  # plain Python would take hours
        print("[capture] no contention model: fitting needs numba; where that is installed, --merge"
              " fits it from the log", file=sys.stderr)  # fmt: skip
        return None
    pairs = source.pairs(TRAITS)
    print(f"[capture] fitting the contention model to {len(pairs)} pairs", file=sys.stderr)
    try:
        parameters = fit(pairs, start_of(profile), choices_of(source), workers=os.cpu_count() or 1)
        held_out = errors(
            (pair for pair in pairs if pair.held_out and not pair.message.eager), parameters
        )
        cases = {pair.compute for pair in pairs}
        kernels = {name: trait for name, trait in TRAITS.items() if name not in cases}
        return contention_model(
            parameters, kernels, traffic_traits(source), [(c, t) for _, c, t in held_out],
            preemptible_times(source, kernels),
        )  # fmt: skip
    except ValueError as error:  # a row of the profile's schema that cannot be made, too
        text = str(error).splitlines()[0]
        print(f"[capture] no contention model: {text}", file=sys.stderr)
        return None
