"""Tables and curves of recorded runs, side by side.

    PYTHONPATH=src python -m benchmarks.stability_report OUT [--curves FILE.csv]

Prints the tables that docs/stability.md shows; ``--curves`` keeps one line a run and record.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.stability_run import SCHEMES
from mhcplan.planner.diagnose.judge import composite_gains, judge
from mhcplan.planner.diagnose.recording import Recording, read_recording

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mhcplan.planner.diagnose.judge import Gain

LAST_STEPS = 50  # that the final loss is a mean of
DEPTHS = 8  # points over depth in the table of gains
CURVES = ("loss", "gradient_norm", "forward_gain", "backward_gain", "column_error",
          "row_similarity")  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--curves", type=Path, help="CSV to write")
    options = parser.parse_args(words)
    found = {path.stem: path for path in options.folder.glob("*.recording")}
    recordings = [read_recording(found[name]) for name in SCHEMES if name in found]
    if not recordings:
        parser.error(f"{options.folder} has no recording of {', '.join(SCHEMES)}")
    print(about(recordings), end="\n\n")
    table(("run", "loss", "gradient norm", "forward gain", "backward gain", "column error",
           "cosine of rows", "alarms"), verdicts(recordings))  # fmt: skip
    deep = [r for r in recordings if r.about["scheme"] in ("hc", "hc-no-decay", "mhc")]
    if deep:
        sites, rows = gains_over_depth(deep)
        table(("composite gain at site", *map(str, sites)), rows)
    if options.curves:
        write_curves(options.curves, recordings)


def about(recordings: Sequence[Recording]) -> str:
    """What the runs share, in a line; raises ValueError if they do not."""
    keys = ("model", "device", "dtype", "steps", "tokens_per_step", "seq_len", "lr", "seed", "text",
            "text_tokens", "text_sha256")  # fmt: skip
    shared = {key: recordings[0].about[key] for key in keys}
    for recording in recordings:
        for key in keys:
            if recording.about[key] != shared[key]:
                raise ValueError(f"{recording.name}: {key} is not that of {recordings[0].name}")
    sizes = [int(r.about["parameters"]) for r in recordings]
    parameters = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
    return f"{parameters} parameters; " + ", ".join(f"{k} {v}" for k, v in shared.items())


def verdicts(recordings: Sequence[Recording]) -> Iterator[tuple[str, ...]]:
    for recording in recordings:
        d = judge(recording)
        losses, norms = (recording.curve(name)[1][-LAST_STEPS:] for name in CURVES[:2])
        yield (
            recording.name,
            f"{losses.mean():.4f}",
            f"{norms.mean():.3f}",
            _gain(d.forward_gain),
            _gain(d.backward_gain),
            "-" if d.column_error is None else f"{d.column_error:.2e}",
            "-" if d.row_similarity is None else f"{d.row_similarity:.4f}",
            ", ".join(sorted({alarm.name for alarm in d.alarms})) or "none",
        )


def _gain(gain: Gain) -> str:
    """Last mean over tokens, most over tokens, and the highest mean of the run."""
    parts = ("inf" if v is None else f"{v:.3g}" for v in (gain.mean, gain.most, gain.peak))
    return " / ".join(parts)


def gains_over_depth(
    recordings: Sequence[Recording],
) -> tuple[list[int], Iterator[tuple[str, ...]]]:
    """Sites, and the composite gains there of the last record, mean over tokens."""
    last = len(recordings[0].sites) - 1
    sites = sorted({round(x) for x in np.linspace(0, last, DEPTHS)})

    def rows() -> Iterator[tuple[str, ...]]:
        for recording in recordings:
            for direction in ("forward", "backward"):
                gains = composite_gains(recording, direction)[-1, sites, 0]
                yield f"{recording.name}, {direction}", *(f"{gain:.3f}" for gain in gains)

    return sites, rows()


def table(columns: Sequence[str], rows: Iterator[tuple[str, ...]]) -> None:
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def write_curves(path: Path, recordings: Sequence[Recording]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "step", *CURVES))
        for recording in recordings:
            columns = (
                recording.figure("loss").mean(1),
                recording.figure("gradient_norm").mean(1),
                composite_gains(recording, "forward")[:, :, 0].max(1),
                composite_gains(recording, "backward")[:, :, 0].max(1),
                recording.figure("column_error")[:, :, 1].max(1),
                recording.figure("row_similarity")[:, :, 0].mean(1),
            )
            for step, *values in zip(recording.steps, *columns, strict=True):
                writer.writerow((recording.name, step, *(f"{v:.6g}" for v in values)))


if __name__ == "__main__":
    main()
