"""What a GPU draws and how its clock follows: measure it, fit it, see how far the fit is off.

    python benchmarks/power.py                       # the fit, and every load beside it
    python benchmarks/power.py --store FILE          # and write the model into a profile
    python benchmarks/power.py --measure ROWS.jsonl  # needs a GPU and nvidia-smi; two minutes

A load repeats for seconds. *slowed* is its period over that of a rested chip, *fit* what the model
gives it (:mod:`mhcplan.profiles.power`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from mhcplan.profiles.power import Row, fit_power, steady_stretch
from mhcplan.profiles.schema import profile_text, read_profile

if TYPE_CHECKING:
    from mhcplan.profiles.schema import PowerModel

RAW = Path(__file__).parents[1] / "profiles" / "data" / "raw" / "h100-sxm-power.jsonl"
HIDDEN, TOKENS = 1920, 4096
LIMIT_WATTS = 700.0


def measure(path: Path, seconds: float) -> None:
    """Measure all loads; rows are written as they come."""
    import torch

    from mhcplan.profiles.capture.power import block_keys, loads, measure_load

    keys = block_keys(HIDDEN, TOKENS, 1) | block_keys(HIDDEN, TOKENS, 4)
    with path.open("w") as out:
        for load in loads(torch.device("cuda"), keys):
            row = measure_load(load, seconds)
            out.write(json.dumps(row._asdict()) + "\n")
            out.flush()
            print(row, flush=True)


def limit_watts() -> float:
    """The driver's power limit."""
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", "-i", "0"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def show(rows: list[Row], model: PowerModel) -> None:
    """A line for every load."""
    print(f"{'load':28}{'watts':>8}{'MHz':>7}{'slowed':>9}{'fit':>8}")
    for row in rows:
        print(
            f"{row.name:28}{row.watts:8.0f}{row.clock_mhz:7.0f}{row.slowdown:9.3f}"
            f"{steady_stretch(row, model):8.3f}"
        )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--raw", type=Path, default=RAW, help="rows of a measurement")
    parser.add_argument("--measure", type=Path, help="measure this GPU into a file of rows")
    parser.add_argument("--seconds", type=float, default=1.2, help="of each load")
    parser.add_argument("--limit-watts", type=float, default=LIMIT_WATTS)
    parser.add_argument("--store", type=Path, help="profile that the model is written into")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.seconds)
        args.raw, args.limit_watts = args.measure, limit_watts()
    rows = [Row(**json.loads(line)) for line in args.raw.read_text().splitlines()]
    model = fit_power(rows, args.limit_watts)
    show(rows, model)
    print(model)
    if args.store:
        profile = read_profile(args.store)
        args.store.write_text(profile_text(profile.model_copy(update={"power_model": model})))
        print(f"wrote {args.store}")


if __name__ == "__main__":
    main()
