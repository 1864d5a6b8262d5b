"""Judges a recording: what the maps of a run did, and which alarms sound.

Every alarm has a threshold that stands in its message; ``THRESHOLDS`` has them all with reasons.
Gains are those of :mod:`mhcplan.kernels.diagnostics_maps`: largest absolute row sum (forward) and
column sum (backward) of products of H_res over depth, for each sampled token; *mean* and *most* are
over tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mhcplan.profiles.specs import Spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhcplan.planner.diagnose.recording import Floats, Recording

DIAGNOSIS_FORMAT, DIAGNOSIS_VERSION = "mhcplan.diagnosis", 1


Figure = float | None  # None: not finite, or not known of a checkpoint


class Threshold(NamedTuple):
    """When an alarm sounds, and why there."""

    value: float
    reason: str


THRESHOLDS = {
    "gain": Threshold(
        10.0,
        "composite gain; mHC's is at most 1.65 in its paper, HC's reached 2828"
        " (arXiv 2512.24880, figures 3 and 7)",
    ),
    "gain_growing": Threshold(
        1.5,
        "factor of the composite gain from the third to the fourth quarter of the run, where it is"
        " above 2",
    ),
    "sinkhorn": Threshold(
        0.1,
        "column sums off by more than 10 % at a token; 6 % is the most in the mHC paper (figure 7)",
    ),
    "rows": Threshold(0.95, "mean cosine between the rows of a state, averaged over sites"),
    "row_lost": Threshold(0.02, "a row's share of the state's energy, as part of 1 / n"),
    "loss_spike": Threshold(
        6.0, "deviations (1.48 x median) above the median of the 50 steps before"
    ),
    "gradient_spike": Threshold(3.0, "times the median of the 50 steps before"),
}
WATCHED_GAIN = 2.0  # above this, a gain of mHC is explained
_WINDOW, _NEAR = 50, 5  # steps: behind a spike, and between a loss's and its gradient norm's
_LEAST_WINDOW = 10
_LEAST_RISE = 0.02  # of the loss, relative: smaller ones are no spike however calm the curve


class Alarm(Spec):
    """Something that went wrong."""

    name: Annotated[str, Field(description="key of the threshold")]
    message: str
    step: int | None = None
    site: str | None = None


class Gain(Spec):
    """A composite gain over the depth: its largest value and where it is."""

    mean: Annotated[Figure, Field(description="mean over tokens, largest over depth")]
    most: Annotated[Figure, Field(description="largest over tokens and depth")]
    of_mean_map: Annotated[
        Figure, Field(description="of the map averaged over tokens, as the paper prints it")
    ]
    site: Annotated[str, Field(description="where the mean is largest")]
    peak: Annotated[Figure, Field(description="largest mean of all records")]
    peak_step: int


class Diagnosis(Spec):
    """The verdict on one recording; figures are those of its last record."""

    format: Literal["mhcplan.diagnosis"] = DIAGNOSIS_FORMAT
    format_version: Literal[1] = DIAGNOSIS_VERSION
    name: str
    about: dict[str, Any]
    first_step: int
    last_step: int
    num_records: int
    cut_bytes: Annotated[int, Field(description="of a record cut off at the end, not read")]
    loss: Annotated[Figure, Field(description="mean of the last record's steps")]
    gradient_norm: Figure
    forward_gain: Gain
    backward_gain: Gain
    spectral_norm: Annotated[Figure, Field(description="of the composite map, most over tokens")]
    row_error: Figure
    column_error: Figure
    row_similarity: Figure
    least_row_share: Annotated[Figure, Field(description="1 / n is an equal share")]
    alarms: list[Alarm]
    notes: list[str]


def judge(recording: Recording) -> Diagnosis:
    """The verdict on a recording."""
    return Diagnosis(
        name=recording.name,
        about=recording.about,
        first_step=int(recording.steps[0]),
        last_step=int(recording.steps[-1]),
        num_records=len(recording.records),
        cut_bytes=recording.cut_bytes,
        loss=_finite(recording.last("loss").mean()),
        gradient_norm=_finite(recording.last("gradient_norm").mean()),
        forward_gain=_gain(recording, "forward", axis=-1),
        backward_gain=_gain(recording, "backward", axis=-2),
        spectral_norm=_finite(recording.last("composite_spectral_norm")[:, 1].max()),
        row_error=_finite(recording.last("row_error")[:, 1].max()),
        column_error=_finite(recording.last("column_error")[:, 1].max()),
        row_similarity=_finite(recording.last("row_similarity")[:, 0].mean()),
        least_row_share=_finite(recording.last("row_share").min()),
        alarms=list(_alarms(recording)),
        notes=list(_notes(recording)),
    )


def _finite(value: float) -> Figure:
    return float(value) if np.isfinite(value) else None


def composite_gains(recording: Recording, direction: str) -> Floats:
    """Composite gains ``[records, sites, (mean, most)]``; what is not a number counts as infinite:
    it comes of maps that overflowed.
    """
    return np.nan_to_num(recording.figure(f"composite_{direction}_gain"), nan=np.inf, posinf=np.inf)


def _gain(recording: Recording, direction: str, axis: int) -> Gain:
    gains = composite_gains(recording, direction)
    mean, peaks = gains[-1, :, 0], gains[:, :, 0].max(1)
    site, peak = int(mean.argmax()), int(peaks.argmax())
    maps = recording.last(f"{direction}_map")
    return Gain(
        mean=_finite(mean[site]),
        most=_finite(gains[-1, :, 1].max()),
        of_mean_map=_finite(np.abs(maps.sum(axis)).max()),
        site=recording.sites[site],
        peak=_finite(peaks[peak]),
        peak_step=int(recording.steps[peak]),
    )


# -- alarms ----------------------------------------------------------------------------------------


def _alarms(recording: Recording) -> Iterator[Alarm]:
    if not recording.is_checkpoint:
        yield from _not_finite(recording)
        yield from _rows(recording)
        yield from _spikes(recording)
    for direction in ("forward", "backward"):
        yield from _gain_alarms(recording, direction)
    if recording.kind == "mhc":
        yield from _sinkhorn(recording)


def _not_finite(recording: Recording) -> Iterator[Alarm]:
    steps, losses = recording.curve("loss")
    bad = steps[~np.isfinite(losses)]
    if len(bad):
        yield Alarm(name="not_finite", step=int(bad[0]), message="the loss is not finite")


def _gain_alarms(recording: Recording, direction: str) -> Iterator[Alarm]:
    gains = composite_gains(recording, direction)[:, :, 0]
    site = int(gains[-1].argmax())
    largest = gains.max(1)
    where: dict[str, Any] = {"step": int(recording.steps[-1]), "site": recording.sites[site]}
    limit, peak = THRESHOLDS["gain"].value, int(largest.argmax())
    if largest[-1] > limit:
        yield Alarm(
            name="gain",
            message=f"the composite {direction} gain is {largest[-1]:.4g}, above {limit:g}",
            **where,
        )
    elif largest[peak] > limit:
        yield Alarm(
            name="gain",
            message=f"the composite {direction} gain was {largest[peak]:.4g}, above {limit:g}; it"
            f" ended at {largest[-1]:.4g}",
            step=int(recording.steps[peak]),
            site=recording.sites[int(gains[peak].argmax())],
        )
    quarter = len(largest) // 4
    if quarter == 0:
        return
    before = float(np.median(largest[2 * quarter : 3 * quarter]))
    now = float(np.median(largest[-quarter:]))
    factor = THRESHOLDS["gain_growing"].value
    if now > WATCHED_GAIN and now > factor * before:
        yield Alarm(
            name="gain_growing",
            message=f"the composite {direction} gain grew from {before:.4g} to {now:.4g} in the"
            f" last quarter of the run, by more than {factor:g} times",
            **where,
        )


def _sinkhorn(recording: Recording) -> Iterator[Alarm]:
    errors = recording.last("column_error")[:, 1]
    site, limit = int(errors.argmax()), THRESHOLDS["sinkhorn"].value
    if errors[site] > limit:
        count = int((errors > limit).sum())
        yield Alarm(
            name="sinkhorn",
            step=int(recording.steps[-1]),
            site=recording.sites[site],
            message=f"{recording.about['sinkhorn_steps']} Sinkhorn steps leave column sums off by"
            f" {errors[site]:.3g}, more than {limit:g}, at {count} of {len(errors)} sites",
        )


def _rows(recording: Recording) -> Iterator[Alarm]:
    n = int(recording.about["expansion_rate"])
    similarity, share = recording.last("row_similarity")[:, 0], recording.last("row_share")
    if n == 1 or not np.isfinite(similarity).all():
        return
    step = int(recording.steps[-1])
    limit = THRESHOLDS["rows"].value
    means = recording.figure("row_similarity")[:, :, 0].mean(1)
    if means[-1] > limit:
        least = int(means.argmin())
        yield Alarm(
            name="rows",
            step=step,
            message=f"rows are near copies of each other: their mean cosine is {means[-1]:.4f},"
            f" above {limit:g}; its lowest was {means[least]:.4f} at step"
            f" {recording.steps[least]}",
        )
    least = THRESHOLDS["row_lost"].value / n
    if share.min() < least:
        site, row = np.unravel_index(int(share.argmin()), share.shape)
        yield Alarm(
            name="row_lost",
            step=step,
            site=recording.sites[int(site)],
            message=f"row {row} holds {share.min():.2e} of the state, less than {least:g}",
        )


def _spikes(recording: Recording) -> Iterator[Alarm]:
    """Steps where the loss and, at most a few steps away, the gradient norm jump together."""
    steps, losses = recording.curve("loss")
    _, norms = recording.curve("gradient_norm")
    last = -_WINDOW
    for at in range(_LEAST_WINDOW, len(losses)):
        if at - last < _WINDOW or not _is_spike(losses, at):
            continue
        near = range(max(at - _NEAR, _LEAST_WINDOW), min(at + _NEAR + 1, len(norms)))
        usual = float(np.median(norms[max(near[0] - _WINDOW, 0) : near[0]]))
        ratio = float(norms[near].max()) / usual if usual > 0 else 0.0
        factor = THRESHOLDS["gradient_spike"].value
        if ratio > factor:
            last = at
            yield Alarm(
                name="loss_spike",
                step=int(steps[at]),
                message=f"the loss jumps to {losses[at]:.4f} from"
                f" {np.median(losses[max(at - _WINDOW, 0) : at]):.4f}, the gradient norm to"
                f" {ratio:.1f} times its median (above {factor:g})",
            )


def _is_spike(losses: Floats, at: int) -> bool:
    before = losses[max(at - _WINDOW, 0) : at]
    median = float(np.median(before))
    deviation = 1.4826 * float(np.median(np.abs(before - median)))
    rise = max(THRESHOLDS["loss_spike"].value * deviation, _LEAST_RISE * abs(median))
    return bool(losses[at] - median > rise)


# -- notes -----------------------------------------------------------------------------------------


def _notes(recording: Recording) -> Iterator[str]:
    if recording.cut_bytes:
        yield f"the file ends in {recording.cut_bytes} bytes of a record that was cut off"
    if recording.is_checkpoint:
        yield f"maps of a checkpoint on {recording.about['probe']}"
    if recording.kind == "mhc":
        yield from _explanation(recording)


def _explanation(recording: Recording) -> Iterator[str]:
    """Why a gain of mHC is above 2, if one is."""
    most = {d: composite_gains(recording, d)[-1, :, 1].max() for d in ("forward", "backward")}
    direction, gain = max(most.items(), key=lambda item: item[1])
    if not gain > WATCHED_GAIN:
        return
    rows, columns = (recording.last(f"{name}_error")[:, 1] for name in ("row", "column"))
    n, steps = recording.about["expansion_rate"], recording.about["sinkhorn_steps"]
    worst = int(columns.argmax())
    yield (
        f"the {direction} gain reaches {gain:.3g}: rows, normalised last, sum to 1 within"
        f" {rows.max():.1e}, so that a product's column sums are at most n = {n}; after {steps}"
        f" steps columns are off by up to {columns[worst]:.3g} (site {recording.sites[worst]};"
        f" {int((columns > 0.01).sum())} of {len(columns)} sites above 1 %), which the"
        f" product over depth compounds"
    )
