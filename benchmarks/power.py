"""What a GPU draws and how its clock follows: every steady load beside what the fit gives it.

    python benchmarks/power.py [--log FILE.power.jsonl] [--store PROFILE]

The log is what ``mhcplan profile measure --part power`` keeps. *slowed* is a load's period over
that of a rested chip, *fit* what the model gives it (:mod:`mhcplan.profiles.power`); ``--store``
writes the model into a profile.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mhcplan.profiles.power import fit_power, read_rows, steady_stretch
from mhcplan.profiles.schema import profile_text, read_profile

LOG = Path(__file__).parents[1] / "profiles" / "data" / "raw" / "h100-sxm-power.jsonl"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--log", type=Path, default=LOG, help="of a capture")
    parser.add_argument("--store", type=Path, help="profile that the model is written into")
    args = parser.parse_args()
    found = read_rows(args.log)
    rows, limit_watts = [row for row, _ in found], found[-1][1]
    model = fit_power(rows, limit_watts)
    print(f"{'load':28}{'watts':>8}{'MHz':>7}{'slowed':>9}{'fit':>8}")
    for row in rows:
        print(
            f"{row.name:28}{row.watts:8.0f}{row.clock_mhz:7.0f}{row.slowdown:9.3f}"
            f"{steady_stretch(row, model):8.3f}"
        )
    print(model)
    if args.store:
        profile = read_profile(args.store)
        args.store.write_text(profile_text(profile.model_copy(update={"power_model": model})))
        print(f"wrote {args.store}")


if __name__ == "__main__":
    main()
