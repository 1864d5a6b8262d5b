"""What `profile measure` can be asked for: read before torch is, so that help needs none."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal, get_args

from mhcplan.profiles.capture import grid

Part = Literal["ops", "comm", "contention", "priority", "power"]
PARTS: tuple[Part, ...] = get_args(Part)
OP_BUDGET_NS = 50_000_000


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
    parser.add_argument("--budget-seconds", type=float, default=1e9, help="for each part")
    parser.add_argument("--op-budget-ms", type=float, default=OP_BUDGET_NS / 1e6)
    parser.add_argument("--compile-workers", type=int, default=0, help="compile kernels beforehand")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="PART",
                        help="measure nothing, merge these parts: ops, then comm")  # fmt: skip
    parser.add_argument("--check-block", metavar="MODEL", action="append", default=[],
                        help="then time a whole block of MODEL")  # fmt: skip
    return parser
