"""What `profile measure` can be asked for: read before torch is, so that help needs none."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from mhcplan.profiles.capture import grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.profiles.schema import Profile
    from mhcplan.profiles.vocabulary import OpKey

Part = Literal["ops", "comm", "contention", "priority", "power"]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order in which they are measured
BUDGET_SECONDS = 540.0
OP_BUDGET_NS = 20_000_000
# About what each part takes on H100s, in seconds: how parts that are asked for together share time.
_NEEDS: dict[Part, float] = {
    "ops": 450.0, "comm": 90.0, "contention": 280.0, "priority": 60.0, "power": 70.0,
}  # fmt: skip
_MOST_COMPILERS = 14  # each holds a CUDA context


@dataclass(frozen=True)
class Options:
    """What to measure, how long, and where it goes.

    Attributes:
        out: the profile's path.
        hardware: preset that describes the machine (:data:`mhcplan.profiles.presets.HARDWARE`).
        name: the profile's name; None: the preset's.
        parts: which to measure; None: ops, and comm where there are two devices.
        tiers: tiers of the grid.
        kinds: only these op kinds; empty: all.
        keys: op keys instead of the grid's.
        base: add the rows to this profile instead of making a new one.
        budget_seconds: for all parts together; see :func:`share_seconds`.
        op_budget_ns: stream time of one pass of one op.
        device_type: ``cuda`` or ``cpu``, whose times mean nothing.
        workers: processes that compile kernels beforehand; 0: none.
        tiny: tiny messages and the fewest overlapped pairs: does it run at all?
    """

    out: Path
    hardware: str = "h100-sxm"
    name: str | None = None
    parts: Sequence[Part] | None = None
    tiers: Sequence[int] = grid.TIERS
    kinds: Sequence[str] = ()
    keys: Sequence[OpKey] | None = None
    base: Profile | None = None
    budget_seconds: float = BUDGET_SECONDS
    op_budget_ns: int = OP_BUDGET_NS
    device_type: str = "cuda"
    workers: int = 0
    tiny: bool = False


def share_seconds(part: Part, wanted: Sequence[Part], left_seconds: float) -> float:
    """What ``part`` may take of the time that is left.

    The parts of ``wanted`` that come after it get what they need; where that is too much, all are
    cut by the same factor. What a part does not use is left to the next.
    """
    later = sum(_NEEDS[other] for other in wanted if PARTS.index(other) > PARTS.index(part))
    left = max(left_seconds, 0.0)
    return max(left - later, left * _NEEDS[part] / (_NEEDS[part] + later))


def compilers() -> int:
    """Processes that compile at once: a core is left for the one that waits, one for the driver."""
    return min(_MOST_COMPILERS, max((os.cpu_count() or 1) - 2, 1))


def parser(program: str) -> argparse.ArgumentParser:
    """The options of ``program``, as it was called."""
    parser = argparse.ArgumentParser(
        prog=program, description="Measure this machine's GPUs (needs torch and triton).",
        epilog="mhcplan profile measure --from-trace TRACE --plan PLAN makes a profile of a torch"
        " profiler trace of your own run instead.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("profile.json"),
                        help="the profile to write (default: profile.json)")  # fmt: skip
    parser.add_argument("--hardware", default="h100-sxm", help="preset that describes the machine")
    parser.add_argument("--name", help="the profile's name (default: the preset's)")
    parser.add_argument(
        "--part",
        choices=PARTS,
        action="append",
        help="measure only this part (default: ops, and comm with two GPUs)",
    )
    parser.add_argument("--tier", type=int, action="append", help=f"of {grid.TIERS} (default: all)")
    parser.add_argument("--kind", action="append", default=[], help="measure only this op kind")
    parser.add_argument("--op", action="append", default=[], metavar="KEY",
                        help="measure this op, as errors name it, not the grid")  # fmt: skip
    parser.add_argument("--keys", type=Path, help="measure the ops of this file, one a line")
    parser.add_argument("--base", metavar="PROFILE", help="add the rows to this profile")
    parser.add_argument("--missing", action="store_true",
                        help="of the ops, only those that --base has no row of")  # fmt: skip
    parser.add_argument("--spread-above", type=float, metavar="PERCENT",
                        help="also ops whose rows in --base spread more, again")  # fmt: skip
    parser.add_argument("--stale", action="store_true",
                        help="also ops that other code measured for --base, again")  # fmt: skip
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_SECONDS,
                        help="for all parts together (default: %(default)g), most wanted rows"
                        " first; the same command, given again, goes on")  # fmt: skip
    parser.add_argument("--op-budget-ms", type=float, default=OP_BUDGET_NS / 1e6,
                        help="for each pass of an op (default: %(default)g)")  # fmt: skip
    parser.add_argument("--compile-workers", type=int, default=compilers(),
                        help="processes that compile kernels before GPUs are timed; 0: none"
                        " (default here: %(default)d)")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="PART",
                        help="measure nothing, merge these parts: ops, then comm")  # fmt: skip
    parser.add_argument("--check-block", metavar="MODEL", action="append", default=[],
                        help="then time a whole block of MODEL")  # fmt: skip
    return parser
