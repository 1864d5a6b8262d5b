"""Predict the rows of the closed loop, before anything runs.

    python benchmarks/closed_loop_predict.py
    python benchmarks/closed_loop_predict.py --keys closed_loop.keys

The first adds a line for every row to ``profiles/data/predictions.jsonl``, to be committed before
``closed_loop.py`` runs it; a row whose figures are as in its last line is left as it is. The second
writes the op keys of the rows that the profile has not measured at their very shape; one GPU fills
them with ``python -m mhcplan.profiles.capture --part ops --keys closed_loop.keys --base h100-sxm``.
Needs no GPU and no torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.closed_loop_rows import BLIND, SETS
from mhcplan.planner.measured.claim import claim, programs_of
from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.profiles.accuracy import BASELINE, MHC, Claim, append_lines, latest, read_lines
from mhcplan.profiles.store import find_profile
from mhcplan.profiles.vocabulary import OpKey, parse_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mhcplan.profiles.schema import Profile

PREDICTIONS = Path(__file__).parents[1] / "profiles" / "data" / "predictions.jsonl"


def plans_of(sets: Iterable[str], profile: str) -> dict[tuple[str, str], PlanSpec]:
    """Plans by (set, row)."""
    return {
        (set_, name): make_plan({**fields, "profile": profile})
        for set_ in sets
        for name, fields in SETS[set_].items()
    }


def unmeasured(plans: Iterable[PlanSpec], profile: Profile) -> list[OpKey]:
    """Op keys of the plans' programs that the profile lacks, in the order of their first use."""
    measured = {row.key for row in profile.ops}
    keys: dict[OpKey, None] = {}
    for plan in plans:
        for program in programs_of(plan).values():
            for text in program.cost_keys:
                key = parse_key(text)
                if isinstance(key, OpKey) and key not in measured:
                    keys[key] = None
    return list(keys)


def is_same(old: Claim | None, new: Claim) -> bool:
    """Whether two claims say the same, whenever they were written."""
    return old is not None and old.model_copy(update={"written": new.written}) == new


def summary(found: Claim) -> str:
    """A claim in a line."""
    words = [f"{found.row:32s} plan {found.plan_digest[:12]}"]
    for mode in ("captured", "issued"):
        step_ns = found.programs[MHC].steps[mode].step_ns
        over = 0.0
        if BASELINE in found.programs:
            over = 100 * (step_ns / found.programs[BASELINE].steps[mode].step_ns - 1)
        words.append(f"{mode} {step_ns / 1e6:8.2f} ms ({over:+5.1f} %)")
    words.append(f"{max(found.programs[MHC].peak_bytes) / 1e9:.2f} GB")
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--set", nargs="+", choices=SETS, default=[*BLIND, "ablation"])
    parser.add_argument("--profile", default="h100-sxm")
    parser.add_argument("--out", type=Path, default=PREDICTIONS)
    parser.add_argument("--keys", type=Path, help="write unmeasured op keys instead")
    wanted = parser.parse_args()
    profile = find_profile(wanted.profile)
    plans = plans_of(wanted.set, wanted.profile)
    if wanted.keys:
        keys = unmeasured(plans.values(), profile)
        wanted.keys.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
        print(f"{len(keys)} op keys of {len(plans)} rows are not in {profile.name}")
        return
    known = latest(read_lines(wanted.out, Claim))
    for (set_, name), plan in plans.items():
        made = claim(plan, name, set_, profile)
        same = is_same(known.get(name), made)
        if not same:
            append_lines(wanted.out, [made])
        print(summary(made) + (", as before" if same else ""))


if __name__ == "__main__":
    main()
