"""The Chrome trace of a small step, as a viewer reads it."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings

from mhcplan.sim.chrome_trace import chrome_trace, to_chrome_trace
from mhcplan.sim.engine import simulate
from mhcplan.sim.memory import memory_of
from tests.support.programs import Maker, add_buffers, makers

if TYPE_CHECKING:
    from pathlib import Path


def events(maker: Maker) -> list[dict[str, Any]]:
    program, costs = maker.build()
    data = chrome_trace(program, simulate(program, costs), memory_of(program, costs))
    return json.loads(gzip.decompress(data))["traceEvents"]


def one_message() -> Maker:
    maker = Maker(2)
    pp = maker.group("pp", 0, 1)
    a = maker.buffer(100)
    work = maker.op(0, 1500, kind="attention", cell="0F0", stage=0, allocs=[a])
    more = maker.op(0, 500, kind="ffn", cell="0F0", stage=0)
    maker.transfer(0, pp, 250, to=1, waits=[more], kind="pp_send", cell="0SEND_F0")
    maker.op(0, 0, kind="release", waits=[work], frees=[a])
    maker.op(0, 1000, kind="attention", cell="0F1")
    got = maker.transfer(1, pp, 250, source=0, kind="pp_recv", cell='1RECV_F0"')
    maker.op(1, 700, kind="attention", cell="1F0", waits=[got])
    return maker


def test_slices_are_ops_in_microseconds() -> None:
    slices = [e for e in events(one_message()) if e["ph"] == "X" and e["cat"] != "action"]
    shown = [(e["pid"], e["name"], e["ts"], e["dur"], e["args"]["cell"]) for e in slices]
    assert shown == [
        (0, "attention", 0.0, 1.5, "0F0"),
        (0, "ffn", 1.5, 0.5, "0F0"),
        (0, "pp_send", 2.0, 0.25, "0SEND_F0"),
        (0, "attention", 2.0, 1.0, "0F1"),
        (1, "pp_recv", 2.0, 0.25, '1RECV_F0"'),
        (1, "attention", 2.25, 0.7, "1F0"),
    ]
    assert slices[4]["args"] == {
        "cell": '1RECV_F0"', "pass": "F", "stage": -1, "site": -1, "microbatch": -1, "op": 5,
        "started_by": "peer", "cause": 1,
    }  # fmt: skip


def test_actions_enclose_the_ops_of_their_cell() -> None:
    actions = [e for e in events(one_message()) if e.get("cat") == "action"]
    assert [(e["pid"], e["name"], e["ts"], e["dur"]) for e in actions] == [
        (0, "PP:0F0", 0.0, 2.0),
        (0, "PP:0F1", 2.0, 1.0),
        (1, "PP:1F0", 2.25, 0.7),
    ]


def test_messages_are_arrows_and_memory_is_a_counter() -> None:
    found = events(one_message())
    start, finish = (next(e for e in found if e["ph"] == phase) for phase in "sf")
    assert start["id"] == finish["id"]
    assert (start["pid"], finish["pid"]) == (0, 1)
    counter = [(e["pid"], e["ts"], e["args"]["bytes"]) for e in found if e["ph"] == "C"]
    assert counter == [(0, 0.0, 100), (0, 2.0, 0), (1, 0.0, 0)]


def test_the_counter_shows_the_peak_of_an_instant() -> None:
    maker = Maker()
    first, second = maker.buffer(100), maker.buffer(30)
    maker.op(0, 1000, allocs=[first])
    maker.op(0, 0, allocs=[second], frees=[first])
    maker.op(0, 1000, frees=[second])
    counter = [(e["ts"], e["args"]["bytes"]) for e in events(maker) if e["ph"] == "C"]
    assert counter == [(0.0, 100), (1.0, 130), (1.0, 30)]


def test_processes_and_threads_have_names() -> None:
    names = {
        (e["pid"], e["tid"]): e["args"]["name"]
        for e in events(one_message())
        if e["name"] in {"thread_name", "process_name"} and e["tid"]
    }
    assert sorted(names.items()) == [
        ((0, 1), "compute"),
        ((0, 2), "pp"),
        ((1, 3), "pp"),
        ((1, 4), "compute"),
    ]


def test_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    program, costs = one_message().build()
    paths = [tmp_path / name for name in ("a.json.gz", "b.json.gz")]
    for path in paths:
        to_chrome_trace(program, simulate(program, costs), path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second == chrome_trace(program, simulate(program, costs))
    assert sorted(tmp_path.iterdir()) == paths


@settings(max_examples=40, deadline=None)
@given(makers(max_steps=12))
def test_slices_of_a_thread_are_the_same_or_apart_and_hold_their_arrows(maker: Maker) -> None:
    """A viewer cannot draw slices that overlap in part."""
    found = events(add_buffers(maker))
    threads: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for e in found:
        if e["ph"] == "X":
            begin = round(e["ts"] * 1000)
            span = (begin, begin + round(e["dur"] * 1000))
            threads.setdefault((e["pid"], e["tid"]), set()).add(span)
    for spans in threads.values():
        ordered = sorted(spans)
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))
    for e in found:
        if e["ph"] in "sf":
            at = round(e["ts"] * 1000)
            assert any(begin <= at < end for begin, end in threads[e["pid"], e["tid"]])
