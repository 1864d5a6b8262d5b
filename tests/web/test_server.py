"""The API, asked as a browser asks: a real server, over HTTP."""

from __future__ import annotations

import io
import json
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.planner.cli import main
from mhcplan.planner.export.formats import LOSSES
from mhcplan.planner.plan.file import parse_plan
from mhcplan.planner.report.schema import PlanReport
from tests.web.conftest import SMALL, refused, serving

if TYPE_CHECKING:
    from pathlib import Path

WAIT = httpx.Timeout(240)  # the first answer of a checkout compiles


def get(server: str, path: str, **options: Any) -> httpx.Response:  # noqa: ANN401
    return httpx.get(f"{server}{path}", timeout=WAIT, **options)


def answer(server: str, query: str) -> dict[str, Any]:
    response = get(server, f"/api/answer?{query}")
    assert response.status_code == 200, response.text
    return response.json()


def test_answer_is_the_report_of_the_command_line(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got = answer(server, f"{SMALL}&n=2")
    report = PlanReport.model_validate(got["report"])
    assert report.command == "mhcplan predict mhc-3b --pp 2 --microbatches 4 --n 2"
    with pytest.raises(SystemExit):
        main([*report.command.split()[1:], "--json"])
    told = PlanReport.model_validate_json(capsys.readouterr().out)
    downloaded = get(server, f"/api/download/report?{SMALL}&n=2").content
    same = PlanReport.model_validate_json(downloaded)
    assert same.model_copy(update={"command": told.command}) == told
    assert report.step_time_ns == told.step_time_ns
    assert report.memory == told.memory
    assert report.plan_digest == told.plan_digest


def test_facts_figures_and_tables_are_of_the_report(server: str) -> None:
    got = answer(server, SMALL)
    report = PlanReport.model_validate(got["report"])
    facts = {fact["label"]: fact for fact in got["facts"]}
    assert facts["step"]["value"] == f"{report.step_time_ns / 1e6:,.2f} ms"
    assert facts["overhead"]["value"] == f"{report.overhead_percent:+.2f} %"
    assert not any(fact["pinned"] for fact in got["facts"])
    assert sum(bar["x"][0] for bar in got["figures"]["breakdown"]["data"]) == pytest.approx(
        report.step_time_ns / 1e6
    )
    assert all(len(got["tables"][place]) >= 1 for place in ("breakdown", "memory", "others"))
    assert got["differences"] == []


def test_pinned_plan_stands_beside_with_the_difference(server: str) -> None:
    got = answer(server, f"{SMALL}&n=8&a=" + "model%3Dmhc-3b%26pp%3D2%26microbatches%3D4%26n%3D2")
    alone = answer(server, f"{SMALL}&n=2")
    step = next(fact for fact in got["facts"] if fact["label"] == "step")
    assert step["pinned"] == f"{alone['report']['step_time_ns'] / 1e6:,.2f} ms"
    percent = got["report"]["step_time_ns"] / alone["report"]["step_time_ns"] - 1
    assert step["change"] == f"{100 * percent:+.2f} %"
    assert "residual.expansion_rate" in "".join(got["differences"])
    assert [name[:2] for name in got["figures"]["breakdown"]["data"][0]["y"]] == ["A:", "B:", "B:"]


@pytest.mark.parametrize(
    ("pinned", "message"),
    [
        ("model%3Dmhc-3b%26n%3D3", "residual.expansion_rate=3 must be"),
        ("profile%3Dnone", "profile='none' must be one of"),
    ],
)
def test_what_is_wrong_with_the_pinned_plan_is_not_said_of_a_field(
    server: str, pinned: str, message: str
) -> None:
    said = get(server, f"/api/answer?{SMALL}&a={pinned}").json()
    assert said["message"].startswith(f"A, the pinned plan: {message}")
    assert said["field"] is None


def test_timeline_has_the_ops_of_the_step(server: str) -> None:
    got = get(server, f"/api/timeline?{SMALL}").json()
    assert got["ops"]["step_ns"] == answer(server, SMALL)["report"]["step_time_ns"]
    assert {lane["rank"] for lane in got["ops"]["lanes"]} == {0, 1}
    assert got["timeline"]["layout"]["xaxis"]["range"] == [0, got["ops"]["step_ns"] / 1e6]


@pytest.mark.parametrize("kind", ["html", "perfetto", "plan", "report", *LOSSES])
def test_downloads(server: str, kind: str) -> None:
    query = "model=mhc-3b&pp=2&microbatches=4&schedule=1f1b"
    response = get(server, f"/api/download/{kind}?{query}")
    assert response.status_code == 200, response.text
    name = response.headers["content-disposition"].split('"')[1]
    content = response.content
    if kind == "plan":
        assert parse_plan(content.decode(), name).schedule == "1f1b"
    elif kind == "report":
        PlanReport.model_validate_json(content)
    elif kind == "html":
        assert content.startswith(b"<!doctype html>")
    elif kind == "perfetto":
        assert content[:2] == b"\x1f\x8b"
        assert name.endswith(".json.gz")
    else:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert f"{kind} leaves out" in archive.read("LEFT-OUT.txt").decode()
            assert len(archive.namelist()) > 1


def test_a_plan_file_is_opened_as_its_query(server: str) -> None:
    text = get(server, f"/api/download/plan?{SMALL}&n=2&priority=all").text
    response = httpx.post(f"{server}/api/open", content=text, timeout=WAIT)
    query = response.json()["query"]
    assert (
        answer(server, query)["report"]["plan_digest"]
        == answer(server, f"{SMALL}&n=2&priority=all")["report"]["plan_digest"]
    )


@pytest.mark.parametrize("content", [b"", b"format = 3", b"\xff\xfe", b"a" * 100_000, b"[" * 9000])
def test_what_is_no_plan_file_is_refused_in_one_line(server: str, content: bytes) -> None:
    response = httpx.post(f"{server}/api/open", content=content, timeout=WAIT)
    assert response.status_code == 422
    assert "\n" not in response.json()["message"]


def test_certainty_is_a_line_and_all_remarks(server: str) -> None:
    got = get(server, f"/api/certainty?{SMALL}").json()
    assert "% interval: step " in got["line"]
    assert set(answer(server, SMALL)["report"]["warnings"]) <= set(got["remarks"])


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.iter_lines()]


def test_sweep_goes_on_point_by_point(server: str) -> None:
    with httpx.stream("GET", f"{server}/api/sweep/n?{SMALL}", timeout=WAIT) as response:
        told = lines(response)
    assert [line["done"] for line in told] == [1, 2, 3, 4, 5]
    overhead = told[-1]["figure"]["data"][0]
    assert overhead["x"][0] == "1"
    assert overhead["y"][0] == pytest.approx(0)
    assert len(overhead["x"]) + len(told[-1]["refused"]) == 5
    chosen = answer(server, overhead["customdata"][1])["report"]
    assert chosen["overhead_percent"] == pytest.approx(overhead["y"][1])
    assert overhead["text"][1].startswith(f"{chosen['sources_percent']['measured']:.0f} % of op")


def test_a_sweep_ends_when_nobody_listens(server: str) -> None:
    def status() -> tuple[int, int]:
        told = get(server, "/api/status").json()
        return told["waiting"]["background"], told["done"]["background"]

    _, before = status()
    query = "model=mhc-9b&pp=4&microbatches=32"
    with httpx.stream("GET", f"{server}/api/sweep/pareto?{query}", timeout=WAIT) as response:
        total = json.loads(next(response.iter_lines()))["total"]
    waiting, done = status()
    while waiting:  # the point that was under way
        time.sleep(0.05)
        waiting, done = status()
    time.sleep(0.5)
    assert status() == (0, done)
    assert done - before < total


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/answer?n=5", 422),
        ("/api/answer?profile=/etc/passwd", 422),
        ("/api/answer?model=../../etc/passwd", 422),
        ("/api/timeline?pp=3", 422),
        ("/api/download/nothing?model=mhc-3b&pp=2&microbatches=4", 422),
        ("/api/sweep/nothing", 404),
        ("/api/nothing", 404),
        ("/static/server.py", 404),
        ("/static/..%2f..%2fetc%2fpasswd", 404),
        ("/static/../web/server.py", 404),
        ("/static/%2e%2e/index.html", 404),
        ("/docs", 404),
        ("/openapi.json", 404),
        ("/api/answer?" + "x" * 9000, 414),
    ],
)
def test_refusals_are_one_line(server: str, path: str, status: int) -> None:
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as raw:  # httpx would tidy paths
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
    assert f" {status} " in reply.splitlines()[0]
    body = json.loads(reply.split("\r\n\r\n", 1)[1])
    assert body["message"]
    assert "\n" not in body["message"]


@given(
    st.dictionaries(
        st.sampled_from(["n", "pp", "microbatches", "schedule", "seq_len", "model", "profile"])
        | st.text(max_size=8),
        st.text(max_size=20) | st.integers(-5, 10).map(str),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=40, deadline=None)
def test_fuzzed_queries_are_answered_or_refused(server: str, fields: dict[str, str]) -> None:
    # a field that is surely wrong keeps each example from being simulated
    response = get(server, "/api/timeline", params={**fields, "micro_batch_size": "0"})
    assert 400 <= response.status_code < 500, response.text
    assert "\n" not in response.json()["message"]


def test_other_sites_and_other_names_may_not_ask(server: str) -> None:
    assert get(server, "/", headers={"Host": "evil.example"}).status_code == 400
    crossed = get(server, "/api/controls", headers={"Sec-Fetch-Site": "cross-site"})
    assert crossed.status_code == 403
    assert get(server, "/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_answers_may_load_nothing_from_outside(server: str) -> None:
    page = get(server, "/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "//" not in page.text.replace("<!--", "").replace("</", "")


def test_files_are_not_sent_again(server: str) -> None:
    tag = get(server, "/static/timeline.js").headers["etag"]
    again = get(server, "/static/timeline.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")


def test_port_in_use_is_one_line(server: str) -> None:
    port = server.rpartition(":")[2]
    assert f"--port {port}" in refused("web", "--no-open", "--port", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_host_that_is_not_ours_is_one_line(host: str) -> None:
    assert f"--host {host}: " in refused("web", "--no-open", "--host", host)


def test_broken_profile_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "broken.json" in refused("web", "--no-open", "--profiles", str(broken))


def test_two_servers_and_a_time_limit(server: str) -> None:
    with serving("--limit-seconds", "0.01") as other:  # takes another port by itself
        assert other != server
        assert get(other, "/").status_code == 200
        response = get(other, "/api/answer?model=mhc-3b&pp=2&microbatches=200")
        assert response.status_code == 422
        assert "took longer than 0.01 s" in response.json()["message"]
    assert get(server, f"/api/answer?{SMALL}").status_code == 200


def test_many_at_once_are_answered_or_told_to_wait(server: str) -> None:
    def ask(seq: int) -> int:
        return get(server, f"/api/answer?{SMALL}&seq_len={1024 * seq}").status_code

    with ThreadPoolExecutor(24) as pool:
        codes = list(pool.map(ask, [1 + i % 4 for i in range(24)]))
    assert set(codes) <= {200, 503}
    assert codes.count(200) >= 8
