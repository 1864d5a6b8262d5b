"""Draws recordings side by side: Plotly figures, and the page that holds them."""

# plotly's methods are generated and their arguments untyped
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots  # pyright: ignore[reportUnknownVariableType]

from mhcplan.planner.diagnose.judge import THRESHOLDS, composite_gains

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mhcplan.planner.diagnose.judge import Diagnosis
    from mhcplan.planner.diagnose.recording import Floats, Recording

    Line = tuple[str, Any, Floats, str]  # name, x, y, dash
    Lines = Callable[[Recording], Iterator[Line]]

# Okabe and Ito's colours: told apart by everybody
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_HEIGHT = 380


def recording_figures(recordings: Sequence[Recording]) -> dict[str, go.Figure]:
    """Figures by title. Gains and maps are of each recording's last record."""
    runs = [r for r in recordings if not r.is_checkpoint]
    found = {"Composite gain over depth": _over_depth(recordings, _gain_lines, "gain", log=True)}
    for recording in recordings:
        if recording.about["expansion_rate"] > 1:
            found[f"Maps: {recording.name}"] = _maps(recording)
    if not runs:
        return found
    return found | {
        "Loss": _over_steps(runs, _curve_lines("loss"), "loss"),
        "Gradient norm": _over_steps(runs, _curve_lines("gradient_norm"), "norm", log=True),
        "Composite gain over steps": _over_steps(
            runs, _peak_lines, "largest gain over depth", log=True
        ),
        "Column sum error of single maps": _over_steps(
            runs, _most_lines("column_error"), "most over sites and tokens", log=True
        ),
        "Similarity of rows": _over_depth(runs, _site_lines("row_similarity"), "mean cosine"),
        "Share of each row": _over_depth(runs, _share_lines, "share of the state"),
        "Similarity of consecutive layers": _over_depth(
            runs, _site_lines("layer_similarity"), "mean cosine"
        ),
        "Gradient of the state over depth": _over_depth(
            runs, _site_lines("gradient_rms"), "rms", log=True
        ),
    }


def figures_json(figures: Mapping[str, go.Figure]) -> dict[str, Any]:
    """Figures as Plotly's JSON, by title."""
    return {title: cast("dict[str, Any]", f.to_plotly_json()) for title, f in figures.items()}


def diagnosis_page(diagnoses: Sequence[Diagnosis], figures: Mapping[str, go.Figure]) -> str:
    """One HTML file with the verdicts and the figures; nothing is fetched."""
    verdicts = "".join(
        f"<li><b>{escape(d.name)}</b>: "
        + escape("; ".join(a.message for a in d.alarms) or "no alarm")
        + "".join(f"<br>{escape(note)}" for note in d.notes)
        + "</li>"
        for d in diagnoses
    )
    thresholds = "".join(
        f"<li>{escape(name)}: {limit.value:g} ({escape(limit.reason)})</li>"
        for name, limit in THRESHOLDS.items()
    )
    plots = "".join(
        f"<h2>{escape(title)}</h2>"
        + figure.to_html(full_html=False, include_plotlyjs=index == 0, div_id=f"figure{index}")
        for index, (title, figure) in enumerate(figures.items())
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<title>What the residual did</title><style>body{font:14px/1.5 system-ui,sans-serif;"
        "margin:0 auto;max-width:1200px;padding:0 20px 32px}h2{font-size:15px}</style></head><body>"
        f"<h1>What the residual did</h1><ul>{verdicts}</ul>{plots}"
        f"<h2>Thresholds of the alarms</h2><ul>{thresholds}</ul></body></html>"
    )


# -- curves ----------------------------------------------------------------------------------------


def _gain_lines(r: Recording) -> Iterator[Line]:
    for direction, dash in (("forward", "solid"), ("backward", "dash")):
        yield direction, r.sites, composite_gains(r, direction)[-1, :, 0], dash


def _site_lines(name: str) -> Lines:
    def lines(r: Recording) -> Iterator[Line]:
        values = r.last(name)
        yield "", r.sites, values[:, 0] if values.ndim == 2 else values, "solid"

    return lines


def _share_lines(r: Recording) -> Iterator[Line]:
    dashes = ("solid", "dash", "dot", "dashdot")
    shares = r.last("row_share")
    for row in range(shares.shape[1]):
        yield f"row {row}", r.sites, shares[:, row], dashes[row % len(dashes)]


def _curve_lines(name: str) -> Lines:
    def lines(r: Recording) -> Iterator[Line]:
        steps, values = r.curve(name)
        yield "", steps, values, "solid"

    return lines


def _peak_lines(r: Recording) -> Iterator[Line]:
    for direction, dash in (("forward", "solid"), ("backward", "dash")):
        yield direction, r.steps, composite_gains(r, direction)[:, :, 0].max(1), dash


def _most_lines(name: str) -> Lines:
    def lines(r: Recording) -> Iterator[Line]:
        yield "", r.steps, r.figure(name)[:, :, 1].max(1), "solid"

    return lines


def _over_depth(
    recordings: Sequence[Recording],
    lines: Lines,
    unit: str,
    *,
    log: bool = False,
) -> go.Figure:
    return _curves(recordings, lines, "site", unit, log=log)


def _over_steps(
    recordings: Sequence[Recording],
    lines: Lines,
    unit: str,
    *,
    log: bool = False,
) -> go.Figure:
    return _curves(recordings, lines, "step", unit, log=log)


def _curves(
    recordings: Sequence[Recording],
    lines: Lines,
    x_title: str,
    y_title: str,
    *,
    log: bool,
) -> go.Figure:
    figure = go.Figure()
    for index, recording in enumerate(recordings):
        for name, x, y, dash in lines(recording):
            figure.add_scatter(
                x=list(x),
                y=_plain(y),
                name=f"{recording.name} {name}".strip(),
                mode="lines",
                line={"color": _COLORS[index % len(_COLORS)], "dash": dash, "width": 1.5},
            )
    figure.update_layout(template="plotly_white", height=_HEIGHT, margin={"t": 16, "b": 44})
    figure.update_xaxes(title=x_title, type="category" if x_title == "site" else "linear")
    figure.update_yaxes(title=y_title, type="log" if log else "linear")
    return figure


# -- maps ------------------------------------------------------------------------------------------


def _maps(recording: Recording) -> go.Figure:
    """Heat maps of single and composite maps, averaged over tokens, one colour scale for all.

    Halves of the depth are left to the composites from the first site and to the last.
    """
    sites = recording.sites
    last, middle = len(sites) - 1, len(sites) // 2
    single, forward, backward = (
        recording.last(f"{name}_map") for name in ("res", "forward", "backward")
    )
    shown = {
        sites[0]: single[0],
        sites[middle]: single[middle],
        sites[last]: single[last],
        f"{sites[0]} to {sites[middle]}": forward[middle],
        f"{sites[middle]} to {sites[last]}": backward[middle],
        "whole depth": forward[last],
    }
    figure = make_subplots(rows=2, cols=3, subplot_titles=list(shown))
    every = np.abs(np.stack(list(shown.values())))
    largest = float(every[np.isfinite(every)].max(initial=0))
    for index, values in enumerate(shown.values()):
        heat = go.Heatmap(
            z=[_plain(row) for row in values],
            coloraxis="coloraxis",
            texttemplate="%{z:.3g}",
            hovertemplate="row %{y} from row %{x}: %{z:.6g}<extra></extra>",
        )
        figure.add_trace(heat, row=index // 3 + 1, col=index % 3 + 1)
    figure.update_layout(
        template="plotly_white",
        height=2 * _HEIGHT,
        margin={"t": 40, "b": 44},
        coloraxis={"colorscale": "RdBu", "cmin": -largest, "cmax": largest},
    )
    figure.update_xaxes(title="row read", dtick=1, constrain="domain")
    figure.update_yaxes(title="row written", dtick=1, autorange="reversed")
    return figure


def _plain(values: Floats) -> list[float | None]:
    """Numbers as JSON has them; what is not finite leaves a gap."""
    return [float(v) if np.isfinite(v) else None for v in values]
