"""The capture suite on the CPU: tiny shapes, gloo, the clock instead of events."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.profiles.capture import grid, machine, measure, power
from mhcplan.profiles.capture.__main__ import main
from mhcplan.profiles.capture.comm import launched, read_transfers, uneven_splits, without_starved
from mhcplan.profiles.capture.ops import Log, Session, append_line, groups, measure_ops
from mhcplan.profiles.capture.options import PARTS, Options, Part, share_seconds
from mhcplan.profiles.capture.segments import Chip, Kernel, ctas_per_sm, make_segments
from mhcplan.profiles.capture.timing import HostTimer, plan_bursts, spread_percent
from mhcplan.profiles.overlap import rows_of
from mhcplan.profiles.presets import HARDWARE, MODELS
from mhcplan.profiles.schema import ProfileError, TransferTiming, read_profile
from mhcplan.profiles.store import contention_log
from mhcplan.profiles.vocabulary import VOCABULARY, op_key

H100 = Chip(num_sms=132, registers=65536, shared_bytes=233472, threads=2048)
SOME = [op_key("norm", p, **grid.TINY["norm"]) for p in "FIR"]
SOME += [op_key("residual", "F", **grid.TINY["residual"])]


def session() -> Session:
    return Session(torch.device("cpu"), torch.float32, "code", "cpu", budget_ns=10_000)


def ops_part(tmp_path: Path, **kwargs: object) -> measure.OpsPart:
    return measure.measure_ops_part(
        tmp_path / "log.jsonl", SOME, torch.device("cpu"), op_budget_ns=10_000, **kwargs
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(*args: str, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mhcplan.profiles.capture", "--device", "cpu", *args]
    source = Path(__file__).parents[2] / "src"
    env = {**os.environ, "PYTHONPATH": str(source), "TRITON_INTERPRET": "0"} | (variables or {})
    return subprocess.Popen(
        command,
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_whole_suite_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "here" / "p.json"
    parts = ("--part", "ops", "--part", "comm", "--part", "contention")
    args = ("--out", str(out), "--tiny", "--op-budget-ms", "0.01", "--name", "mine")
    process = run(*args, *parts)
    stdout, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr
    assert str(out) in stdout
    profile = read_profile(out)
    assert profile.name == "mine"
    assert {str(row.key) for row in profile.ops} == {str(key) for key in grid.tiny_keys()}
    patterns = {row.pattern for row in profile.transfers}
    assert len(patterns) == 7
    # small ones that a busy machine made slower than large ones are dropped
    assert {4096} <= {row.bytes for row in profile.transfers} <= {64, 4096}
    assert all(row.source == "measured" for row in (*profile.ops, *profile.transfers))
    assert [p.num_devices for p in profile.provenance] == [1, 2]
    assert profile.provenance[0].versions["torch"] == torch.__version__
    assert not list(out.parent.glob("*.tmp"))
    log = rows_of(contention_log(str(out)))
    assert {row["family"] for row in log.values() if row["traffic"] is None} == {
        "gemm_library", "elementwise"
    }  # fmt: skip


def test_two_nodes_under_torchrun_add_the_network_to_a_profile(tmp_path: Path) -> None:
    """Two processes as torchrun starts them, one on each of two nodes that share a folder."""
    base, out = tmp_path / "base.json", tmp_path / "p.json"
    one = run("--out", str(base), "--part", "ops", "--op", str(SOME[0]), "--op-budget-ms", "0.01")
    one.communicate(timeout=120)
    world = {
        "TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    args = ("--out", str(out), "--tiny", "--base", str(base))
    nodes = [run(*args, variables={**world, "RANK": rank}) for rank in "01"]
    (said, problem), (other, _) = (node.communicate(timeout=150) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], problem
    assert str(out) in said
    assert not other  # one writes for both
    profile = read_profile(out)
    found = {(row.medium, row.bytes) for row in profile.transfers}
    assert {("inter_node", 4096)} <= found <= {("inter_node", 64), ("inter_node", 4096)}
    assert [row.key for row in profile.ops] == SOME[:1]


def test_several_processes_on_several_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start one process a node"):
        launched()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launched() == (0, 8, "intra_node")


def test_kill_and_resume_measures_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    log = tmp_path / "p.json.ops.jsonl"
    args = ("--out", str(out), "--tiny", "--part", "ops", "--op-budget-ms", "30")
    process = run(*args)
    end = time.monotonic() + 60
    while time.monotonic() < end and (not log.exists() or log.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert not out.exists()
    kept = log.read_text().splitlines()
    log.write_text("\n".join([*kept, '{"code": "cut sho']))
    again = run(*args)
    _, stderr = again.communicate(timeout=120)
    assert again.returncode == 0, stderr
    lines = log.read_text().splitlines()
    assert lines[: len(kept)] == kept
    keys = [json.dumps([r["kind"], r["pass"], r["shape"]]) for r in map(row_of, lines) if r]
    assert len(keys) == len(set(keys)) == len(grid.tiny_keys())
    assert len(read_profile(out).ops) == len(keys)


def test_transfers_go_on_after_a_kill(tmp_path: Path) -> None:
    log = tmp_path / "p.json.comm.jsonl"
    args = ("--out", str(tmp_path / "p.json"), "--tiny", "--part", "comm")
    process = run(*args)
    end = time.monotonic() + 60
    while time.monotonic() < end and (not log.exists() or log.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)  # with the two processes that it started
    process.communicate(timeout=20)
    kept = log.read_text().splitlines()[:3]
    log.write_text("\n".join([*kept, '{"code": "cut sho']))
    again = run(*args)
    _, stderr = again.communicate(timeout=120)
    assert again.returncode == 0, stderr
    assert "/70 " not in stderr  # 7 patterns, 2 sizes, 5 turns; some of them known
    assert "/67]" in stderr.replace(" ", "]")
    lines = log.read_text().splitlines()
    assert lines[:3] == kept
    rows = [json.loads(line)["transfer"] for line in lines if line.endswith("}")]
    times: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        times.setdefault((row["pattern"], row["bytes"]), []).append(row["duration_ns"])
    assert {len(found) for found in times.values()} == {5}
    kept_rows, _ = read_transfers(log, {"device": json.loads(kept[0])["device"]})
    for row in kept_rows:  # the others were slower than larger messages
        assert row.duration_ns == min(times[row.pattern, row.bytes])


def row_of(line: str) -> dict[str, object]:
    try:
        return json.loads(line)["row"]
    except json.JSONDecodeError:
        return {}


def test_rows_of_other_code_or_device_are_measured_again(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", session())
    assert measure_ops(SOME, session(), log) == []
    assert len(Log(tmp_path / "log.jsonl", session()).rows) == len(SOME)
    other = session()
    other.code_sha256 = "changed"
    assert Log(tmp_path / "log.jsonl", other).rows == {}


def test_the_driver_is_asked_of_the_device_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of its own first one, whose watts an H200's loads were once given."""
    seen = SimpleNamespace(uuid="5f1a-second-of-the-host")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: seen)
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout="700.00\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert power.limit_watts() == 700.0
    assert asked[0][-2:] == ["-i", "GPU-5f1a-second-of-the-host"]


def test_deadline_leaves_keys_for_the_next_run(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", session())
    assert measure_ops(SOME, session(), log, deadline=0.0) == SOME
    assert measure_ops(SOME, session(), log) == []


def test_an_op_that_fails_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = op_key("router", "F", tokens=4, hidden=8, experts=2, top_k=3)
    log = Log(tmp_path / "log.jsonl", session())
    assert measure_ops([bad, *SOME], session(), log) == [bad]
    assert "top_k=3" in capsys.readouterr().err


def test_parts_merge_into_a_profile_and_different_devices_do_not(tmp_path: Path) -> None:
    ops = ops_part(tmp_path)
    profile = measure.merge(ops, [], HARDWARE["h100-sxm"], "x")
    assert [row.key for row in profile.ops] == sorted(SOME)
    comm = measure.CommPart(
        provenance=ops.provenance.model_copy(update={"device": "another"}),
        communicator_bytes=7, transfers=(),
    )  # fmt: skip
    with pytest.raises(ProfileError, match="'another'"):
        measure.merge(ops, [comm], HARDWARE["h100-sxm"], "x")
    same = comm.model_copy(
        update={"provenance": ops.provenance, "transfers": (transfer(8, 20), transfer(4, 9))}
    )
    wider = transfer(8, 70, "all_to_all").model_copy(update={"group_size": 4})
    more = same.model_copy(update={"communicator_bytes": 5, "transfers": (transfer(8, 99), wider)})
    merged = measure.merge(ops, [same, more], HARDWARE["h100-sxm"], "x")
    assert merged.overheads.communicator_bytes == 7
    assert len(merged.provenance) == 3
    rows = [(r.bytes, r.duration_ns, r.run) for r in merged.transfers]
    assert rows == [(8, 70, 2), (4, 9, 1), (8, 20, 1)]


def test_a_broken_part_is_refused_with_its_field(tmp_path: Path) -> None:
    part = tmp_path / "ops.json"
    part.write_text('{"format": "mhcplan.profile-ops", "rates": 3}')
    with pytest.raises(ProfileError, match=r"ops\.json"):
        measure.read_part(part, measure.OpsPart)
    with pytest.raises(ProfileError, match="cannot be read"):
        measure.read_part(tmp_path / "none.json", measure.OpsPart)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tier", "9"], "tier=9"),
        (["--hardware", "abacus"], "hardware='abacus'"),
        (["--kind", "nrom"], "kind='nrom'"),
        (["--part", "ops", "--part", "power"], "the part power needs a CUDA device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "p.json"), "--device", "cpu", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_machine_without_gpu_is_not_measured_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "p.json")]) == 2
    err = capsys.readouterr().err
    assert "no CUDA device here" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_parts_run_in_order_with_their_share_and_what_is_there_makes_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One GPU's suite; two of its parts need one, so that they only note their time here."""
    seen: dict[str, float] = {}

    def noted(part: str) -> None:
        def measure_part(log: Path, _device: str, seconds: float) -> None:
            seen[part] = seconds
            log.write_text("", encoding="utf-8")

        monkeypatch.setattr(measure, f"measure_{part}_part", measure_part)

    for part in ("priority", "power"):
        noted(part)
    monkeypatch.setattr(measure, "_CUDA_ONLY", ())
    asked = Options(
        tmp_path / "p.json", parts=("power", "ops", "priority"), keys=SOME, budget_seconds=400,
        op_budget_ns=10_000, device_type="cpu",
    )  # fmt: skip
    written = measure.measure(asked)
    assert [path.name for path in written] == [
        "p.json.ops.json", "p.json.priority.jsonl", "p.json.power.jsonl", "p.json"
    ]  # fmt: skip
    assert list(seen) == ["priority", "power"]
    # 70 s are kept for power, which also gets what priority did not use
    assert 300 < seen["priority"] <= 330 < seen["power"] <= 400
    assert [row.key for row in read_profile(asked.out).ops] == sorted(SOME)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    measure.write_whole(path, "old")
    with pytest.raises(TypeError):
        measure.write_whole(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "old"


def test_grid_has_what_the_models_need() -> None:
    keys = grid.keys((1,))
    assert len(keys) == len(set(keys))
    for kind in set(VOCABULARY) - {"hc_pre", "hc_post", "attention_gqa"}:
        assert any(key.kind == kind for key in keys), kind
    for n in (2, 4, 8):
        for hidden in (1920, 2560):
            for tokens in (2048, 4096):
                key = op_key("mhc_pre", "B", n=n, hidden=hidden, tokens=tokens, steps=20)
                assert key in keys
    local = {dict(k.shape)["experts"] for k in keys if k.kind == "experts"}
    assert local == {64, 32, 16, 8, 72, 36, 18, 9}
    assert grid.keys((1, 2))[: len(keys)] == keys
    with pytest.raises(ValueError, match="tier=4"):
        grid.keys((4,))


def test_grid_has_the_layers_of_every_preset() -> None:
    keys = set(grid.keys())
    for name, model in MODELS.items():
        wanted = set(grid.block_keys(model, 4096, 4096)) | set(grid.end_keys(model, 4096))
        assert wanted <= keys, name
        assert any((key.kind, key.pass_) == ("norm", "R") for key in wanted)  # recompute of norms
        experts = [k for k in keys if k.kind == "experts" and model.moe is not None
                   and dict(k.shape)["hidden"] == model.hidden_size]  # fmt: skip
        assert bool(experts) == (model.moe is not None)


def test_grid_has_the_residual_for_all_rates_widths_and_token_counts() -> None:
    keys = set(grid.keys())
    for n in (2, 4, 8):
        for hidden in grid.WIDTHS:
            for tokens in (1024, 4096, 16384):
                assert op_key("mhc_post", "I", n=n, hidden=hidden, tokens=tokens) in keys
        for hidden in (1280, 7168):  # what lies between is interpolated
            for tokens in (1024, 16384):
                assert op_key("hc_pre", "B", n=n, hidden=hidden, tokens=tokens) in keys
    assert len(keys) < 1500  # 0.31 s each on an H100 (docs/profiling.md): within nine minutes


def test_groups_keep_passes_of_a_shape_together() -> None:
    assert [(kind, passes) for kind, _, passes in groups(SOME)] == [
        ("norm", ["F", "I", "R"]),
        ("residual", ["F"]),
    ]


def test_parts_share_the_time_by_what_they_need() -> None:
    one_gpu: list[Part] = ["ops", "priority", "power"]
    assert share_seconds("ops", ["ops"], 540) == 540
    assert share_seconds("ops", one_gpu, 700) == 700 - 60 - 70  # what the others need is kept
    assert share_seconds("ops", one_gpu, 580 / 2) == 450 / 2  # all have half of what they need
    assert share_seconds("power", one_gpu, 300) == 300  # the last gets what is left
    assert share_seconds("priority", one_gpu, -5) == 0


@given(
    st.lists(st.sampled_from(PARTS), min_size=1, unique=True),
    st.just(0.0) | st.floats(1e-3, 5000),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
)
def test_parts_never_take_more_than_is_left_and_each_gets_some(
    wanted: list[Part], seconds: float, used: list[float]
) -> None:
    """Whatever share of its time each uses."""
    left = seconds
    for part, share in zip((p for p in PARTS if p in wanted), used, strict=False):
        may = share_seconds(part, wanted, left)
        assert 0 <= may <= left + 1e-6
        assert may > 0 or left < 1e-9
        left -= share * may
    assert left >= -1e-6


@given(st.floats(1_000, 2e7), st.floats(1e6, 1e8), st.integers(1, 30))
def test_trains_of_bursts_end_before_the_power_limit_is_felt(
    call_ns: float, budget_ns: float, kernels: int
) -> None:
    plan = plan_bursts(call_ns, budget_ns, kernels)
    train_ns = plan.train * plan.length * call_ns
    assert train_ns <= 2 * max(10e6, call_ns)  # two calls at least: the first is not timed
    assert plan.train * plan.length * kernels <= 600 or plan.train == 2
    assert plan.bursts >= 8
    goes_on = plan.bursts * plan.length * call_ns > 10e6
    assert plan.rest_ns == pytest.approx(train_ns if goes_on else 0)


@pytest.mark.parametrize(
    ("kernel", "fit"),
    [
        (Kernel("gemm", 1, 132, 384, 168, 213188), 1),  # shared memory and registers of one
        (Kernel("pointwise", 1, 9999, 128, 32, 0), 16),  # 2048 threads
        (Kernel("rows", 1, 9999, 1024, 64, 0), 1),  # 65536 registers
        (Kernel("small", 1, 9999, 32, 16, 0), 32),  # most CTAs an SM takes
        (Kernel("huge", 1, 9999, 1024, 255, 0), 1),  # at least one, it did run
    ],
)
def test_ctas_that_fit_on_an_sm(kernel: Kernel, fit: int) -> None:
    assert ctas_per_sm(kernel, H100) == fit


def test_segments_add_up_to_no_more_than_the_op() -> None:
    kernels = [
        Kernel("gemm", 60_000, 132, 384, 168, 213188),
        Kernel("pointwise", 40_000, 132 * 16 * 3, 128, 32, 0),
        Kernel("Memset", 100, 0, 1, 0, 0),
    ]
    gemm, pointwise, fill = make_segments(kernels, H100, 90_000, 1000)
    assert sum(s.duration_ns for s in (gemm, pointwise, fill)) <= 90_000
    assert gemm.persistent
    assert gemm.cta_ns == gemm.duration_ns
    assert not pointwise.persistent
    assert pointwise.cta_ns == pointwise.duration_ns // 3
    assert (fill.ctas, fill.ctas_per_sm, fill.persistent) == (132, 1, False)
    assert gemm.hbm_bytes == 599
    assert make_segments([], H100, 90_000, 1000) == ()


def test_spread_is_half_of_the_middle_eighty_percent() -> None:
    assert spread_percent([100.0] * 9) == 0
    assert spread_percent(list(range(50, 151))) == pytest.approx(40.0)
    assert spread_percent([5.0]) == 0


def test_host_timer_takes_calls_in_turn() -> None:
    seen: list[int] = []
    sample = HostTimer().measure([lambda: seen.append(0), lambda: seen.append(1)], 0)
    assert seen == [0, 1, 0]
    assert sample.samples == 3
    assert sample.duration_ns > 0


def transfer(num_bytes: int, duration_ns: int, pattern: str = "send_recv") -> TransferTiming:
    return TransferTiming(
        source="measured", pattern=pattern, group_size=2, bytes=num_bytes, duration_ns=duration_ns
    )


@given(st.integers(2, 64), st.integers(1, 10**6))
def test_uneven_splits_send_half_as_much_again_to_the_first_rank(ranks: int, each: int) -> None:
    parts = uneven_splits(each * ranks, ranks)
    assert (len(parts), sum(parts)) == (ranks, each * ranks)
    assert parts[0] == int(1.5 * each)
    assert min(parts) >= 0
    assert len(set(parts[1:-1])) <= 1


def test_a_message_slower_than_a_larger_one_is_dropped() -> None:
    rows = [transfer(1, 10), transfer(2, 40), transfer(4, 12), transfer(8, 20)]
    assert {row.bytes for row in without_starved(rows)} == {1, 4, 8}
    other = transfer(2, 40, "all_to_all")
    assert other in without_starved([*rows, other])


def test_a_command_names_no_folder_of_this_machine() -> None:
    assert machine._command(["--out", "/a/b/p.json", "--tiny"]).endswith("--out p.json --tiny")


def test_a_device_that_is_not_the_preset_is_noticed() -> None:
    h100 = HARDWARE["h100-sxm"]
    assert machine.unlike(h100, "NVIDIA H100 80GB HBM3", 132, 84_940_000_000) is None
    said = machine.unlike(h100, "NVIDIA H200", 132, 150_000_000_000)
    assert said is not None
    assert "NVIDIA H200 has 132 SMs and 150 GB, --hardware h100-sxm 132 and 80 GB" in said
    assert machine.unlike(h100, "NVIDIA H100 PCIe", 114, 84_940_000_000) is not None
    assert machine.unlike(HARDWARE["h200"], "NVIDIA H200", 132, 150_000_000_000) is None


def test_merge_from_the_command_line(tmp_path: Path) -> None:
    ops, out = tmp_path / "ops.json", tmp_path / "p.json"
    ops.write_text(ops_part(tmp_path).model_dump_json(by_alias=True, exclude_none=True))
    assert main(["--out", str(out), "--merge", str(ops)]) == 0
    assert len(read_profile(out).ops) == len(SOME)
    assert main(["--out", str(out), "--merge", str(tmp_path / "none.json")]) == 2


def test_a_row_after_a_cut_line_has_a_line_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    append_line(log, {"row": 1})
    log.write_text(log.read_text() + '{"row": 2, "du')
    append_line(log, {"row": 3})
    assert log.read_text().splitlines() == ['{"row": 1}', '{"row": 2, "du', '{"row": 3}']
