"""How long a kernel of another stream waits for a busy chip: predicted trial by trial.

Trials are the rows of :mod:`mhcplan.profiles.capture.priority`: when the probe was launched, when
its first CTA ran, and the kernels that ran in between, on one clock. The prediction knows the
launch, the resident kernels up to then and their traits, and takes
:func:`mhcplan.profiles.contention.wait_ns` for the rest.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from mhcplan.profiles.contention import Kernel, Parameters, wait_ns
from mhcplan.profiles.contention_fit import Trait, ctas_per_sm

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Trial = dict[str, Any]
Case = tuple[str, str, str]  # resident, level, probe

# [threads, registers, shared bytes] of a CTA of each probe of the capture
PROBES = {"small": (128, 32, 0), "full": (256, 32, 0)}
_LONG_CTA_NS = 20_000
_SM = (2048, 65536, 233472, 32)  # threads, registers, shared bytes, CTAs: compute capability 9.0


def fits_beside(launch: Sequence[int], cta: Sequence[int], num_sms: int) -> bool:
    """Whether a CTA [threads, registers, shared bytes] finds room on an SM beside all the CTAs
    that a launch [grid, threads, registers, shared bytes] puts there."""
    grid, threads, registers, shared = launch
    count = min(ctas_per_sm(launch), -(-max(1, grid) // num_sms))
    used = (
        count * (-(-threads // 32) * 32),
        count * _registers(threads, registers),
        count * (shared + 1024),
        count,
    )
    wanted = (cta[0], _registers(cta[0], cta[1]), cta[2] + 1024, 1)
    return all(u + w <= most for u, w, most in zip(used, wanted, _SM, strict=True))


def _registers(threads: int, each: int) -> int:
    """Registers of a CTA: given to warps in units of 256."""
    return -(-each * 32 // 256) * 256 * -(-threads // 32)


def idle_start_ns(trials: Iterable[Trial]) -> float:
    """Median from launch call to first CTA on an idle chip."""
    return statistics.median(t["start_ns"] for t in trials if t["resident"] == "idle")


def predict_start_ns(
    trial: Trial, idle_ns: float, traits: Mapping[str, Trait], parameters: Parameters,
    hbm_bytes: Mapping[str, int] | None = None,
) -> float:  # fmt: skip
    """From the launch call to the probe's first CTA.

    Args:
        trial: a row of the capture.
        idle_ns: the same on an idle chip.
        traits: by the name of the resident, or by part of the kernel's name.
        parameters: of the machine.
        hbm_bytes: of a kernel, by part of its name; 0 where it is missing.
    """
    for start, length, launch, name in trial["residents"]:
        if not start <= idle_ns < start + length:
            continue
        keys = [key for key in traits if key == trial["resident"] or key in name]
        trait = traits[keys[0]] if keys else Trait()
        grid, fit = max(1, launch[0]), ctas_per_sm(launch)
        moved = [size for part, size in (hbm_bytes or {}).items() if part in name]
        one_wave = grid <= fit * parameters.num_sms
        kernel = Kernel(
            length, grid, fit, moved[0] if moved else 0, one_wave and length >= _LONG_CTA_NS,
            trait.pieces, trait.dealt, trait.tail_share,
        )  # fmt: skip
        beside = fits_beside(launch, PROBES[trial["probe"]], parameters.num_sms)
        urgent = trial["level"] == "high"
        return idle_ns + wait_ns(kernel, idle_ns - start, parameters, urgent=urgent, beside=beside)
    return idle_ns


def errors_ns(
    trials: Sequence[Trial], traits: Mapping[str, Trait], parameters: Parameters,
    hbm_bytes: Mapping[str, int] | None = None,
) -> dict[Case, tuple[float, float]]:  # fmt: skip
    """For each case the median over its trials of the measured start, and of the absolute error of
    the predicted one."""
    idle = idle_start_ns(trials)
    found: dict[Case, list[tuple[float, float]]] = {}
    for trial in trials:
        wanted = trial["start_ns"]
        missed = abs(predict_start_ns(trial, idle, traits, parameters, hbm_bytes) - wanted)
        case = trial["resident"], trial["level"], trial["probe"]
        found.setdefault(case, []).append((wanted, missed))
    return {
        case: (statistics.median(w for w, _ in rows), statistics.median(m for _, m in rows))
        for case, rows in found.items()
    }


def tail_shares(trials: Iterable[Trial], idle_ns: float, least: int = 3) -> dict[str, float]:
    """Share of each resident kernel's time that was left when a probe of equal priority got in:
    its :attr:`~mhcplan.profiles.contention.Kernel.tail_share`, median, by the kernel's name.

    Only probes that waited count, and kernels with ``least`` of them.
    """
    found: dict[str, list[float]] = {}
    for trial in trials:
        start = trial["start_ns"]
        if trial["level"] != "equal" or start - idle_ns < 8_000:
            continue
        for begin, length, _, name in trial["residents"]:
            if begin <= start < begin + length:
                found.setdefault(name, []).append((begin + length - start) / length)
    return {k: statistics.median(v) for k, v in found.items() if len(v) >= least}
