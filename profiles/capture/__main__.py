"""``python -m mhcplan.profiles.capture``: measure this machine without installing the package."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

# before torch is imported: as long runs allocate, and as the allocator's margin is defined
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from mhcplan.profiles.capture import grid
from mhcplan.profiles.capture.options import Options, parser
from mhcplan.profiles.schema import ProfileError
from mhcplan.profiles.store import find_profile
from mhcplan.profiles.vocabulary import OpKey, parse_key

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from mhcplan.profiles.schema import Profile


def _check_block(name: str, out: Path, op_budget_ns: int) -> None:
    import torch

    from mhcplan.profiles.capture.block import check_block

    print(f"{name}: {check_block(name, out, torch.device('cuda'), op_budget_ns)}")


def _keys(args: argparse.Namespace, base: Profile | None) -> list[OpKey] | None:
    """The ops to measure; None for the grid's.

    Raises:
        ValueError: a text is no op key, or base's rows are asked for without a base.
    """
    keys = _named_keys(args)
    if not (args.missing or args.stale or args.spread_above is not None):
        return keys
    if base is None:
        raise ValueError("missing, stale, spread-above: --base PROFILE says what is there")
    there = {row.key: row for row in base.ops}
    found: list[OpKey] = []
    if args.missing:
        wanted = grid.keys(args.tier or grid.TIERS) if keys is None else keys
        found += [key for key in wanted if key not in there]
    again = there if keys is None else {key: there[key] for key in keys if key in there}
    if args.stale:
        from mhcplan.profiles.capture.machine import code_sha256  # needs torch

        code = code_sha256()
        current = {i for i, run in enumerate(base.provenance) if run.code_sha256 == code}
        found += [key for key, row in again.items() if row.run not in current]
    if args.spread_above is not None:
        found += [key for key, row in again.items() if row.spread_percent > args.spread_above]
    return list(dict.fromkeys(found))


def _named_keys(args: argparse.Namespace) -> list[OpKey] | None:
    if args.tiny:
        return grid.tiny_keys()
    lines = args.keys.read_text(encoding="utf-8").splitlines() if args.keys else []
    found: list[OpKey] = []
    for text in (*args.op, *lines):
        key = parse_key(text)
        if not isinstance(key, OpKey):
            raise ValueError(f"{text} is no op: transfers are measured with --part comm")
        found.append(key)
    return found if args.op or args.keys else None


def main(argv: list[str] | None = None, program: str = "python -m mhcplan.profiles.capture") -> int:
    """Run the command; 0 done, 2 bad input or a machine that cannot be measured."""
    args = parser(program).parse_args(argv)
    from mhcplan.profiles.capture.measure import measure, write_merged  # needs torch

    budget_ns = round(args.op_budget_ms * 1e6)
    try:
        if args.merge:
            write_merged(args.out, args.merge[0], args.merge[1:], args.hardware, args.name)
            return 0
        is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's: the others write nothing
        base = find_profile(args.base) if args.base and is_first else None
        options = Options(
            args.out, hardware=args.hardware, name=args.name, parts=args.part,
            tiers=args.tier or grid.TIERS, kinds=args.kind, keys=_keys(args, base), base=base,
            budget_seconds=args.budget_seconds, op_budget_ns=budget_ns, device_type=args.device,
            workers=args.compile_workers, tiny=args.tiny,
        )  # fmt: skip
        for path in measure(options):
            print(path)
        for model in args.check_block:
            _check_block(model, args.out, budget_ns)
    except (ProfileError, ValueError, RuntimeError, OSError) as error:
        print(f"mhcplan profile measure: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
