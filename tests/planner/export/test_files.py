"""Exports: what each file holds, what is refused and why, and that check finds them sound."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jsonschema
import numpy as np
import pytest

from mhcplan.planner.export.files import export, losses_of
from mhcplan.planner.export.formats import LOSSES, ExportFormat
from mhcplan.planner.export.megatron import pipeline_layout
from mhcplan.planner.export.torch_csv import TorchSidecar
from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan, schedule_of
from mhcplan.planner.predict import Prediction, predict
from mhcplan.planner.report.schema import json_schema
from mhcplan.planner.schedules.catalogue import build_schedule
from mhcplan.sim.files import parse_program, parse_trace, write_program
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.commands import Run

SCHEMAS = Path(__file__).parents[3] / "docs" / "schemas"
FORMATS = get_args(ExportFormat)


def small(schedule: str, block: int | str = 4, **more: Any) -> Prediction:  # noqa: ANN401
    plan = {
        "model": "mhc-3b", "schedule": schedule, "microbatches": 4, "engine": "simpy",
        "layout": {"pp": 2, "ep": 2}, "residual": {"recompute_block": block}, **more,
    }  # fmt: skip
    return _predicted(make_plan(plan))


@cache
def _predicted(plan: PlanSpec) -> Prediction:
    return predict(plan, synthetic_profile())


@pytest.fixture(scope="module")
def predictions() -> dict[str, Prediction]:
    return {name: small(name) for name in ("1f1b", "interleaved-1f1b", "dualpipev", "dualpipe")}


def text(prediction: Prediction, to: ExportFormat, name: str) -> str:
    content = export(prediction, to).files[name]
    assert isinstance(content, str)
    return content


def rows(content: str) -> list[list[str]]:
    return list(csv.reader(content.splitlines()))


# -- what is lost ----------------------------------------------------------------------------------


def test_every_format_says_what_it_leaves_out() -> None:
    assert set(LOSSES) == set(FORMATS)
    assert all(LOSSES.values())


def test_losses_are_those_of_the_plan() -> None:
    split, plain = small("dualpipev"), small("dualpipev", "none")
    assert any("I and W" in loss for loss in losses_of(split, "torch-csv"))
    assert not any("I and W" in loss for loss in losses_of(plain, "torch-csv"))
    assert not any("I and W" in loss for loss in losses_of(small("1f1b"), "torch-csv"))
    grouped = small("dualpipev", p2p="grouped")
    assert any("p2p=grouped" in loss for loss in losses_of(grouped, "piper"))


@pytest.mark.parametrize("to", FORMATS)
def test_command_writes_the_files_and_says_what_they_leave_out(
    run: Run, profile: str, tmp_path: Path, to: str
) -> None:
    plan = ["mhc-3b", "--pp", "2", "--ep", "2", "--microbatches", "4", "--schedule", "1f1b"]
    code, out, err = run("export", *plan, "--recompute-block", "4", "--profile", profile,
                         "--to", to, "-o", str(tmp_path / "out"))  # fmt: skip
    assert (code, out) == (0, "")
    wrote, *losses = err.splitlines()
    assert wrote.removeprefix("mhcplan: wrote ").split(", ") == [
        str(tmp_path / "out" / file.name)
        for file in sorted((tmp_path / "out").iterdir(), key=lambda file: wrote.index(file.name))
    ]
    assert losses == [f"mhcplan: {to} leaves out {loss}" for loss in LOSSES[to]]  # type: ignore[index]


def test_a_refused_export_writes_nothing(run: Run, profile: str, tmp_path: Path) -> None:
    words = ["mhc-3b", "--pp", "2", "--microbatches", "4", "--profile", profile]
    code, out, err = run("export", *words, "--to", "piper", "-o", str(tmp_path / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "schedule=dualpipe cannot be exported to piper" in err
    assert not (tmp_path / "out").exists()


# -- stream-json -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev", "dualpipe"])
def test_stream_program_is_what_was_simulated(
    predictions: dict[str, Prediction], schedule: str
) -> None:
    prediction = predictions[schedule]
    program = json.loads(text(prediction, "stream-json", "program.json"))
    predicted = text(prediction, "stream-json", "predicted.json")
    for name, document in (("program", program), ("trace", json.loads(predicted))):
        schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
        jsonschema.validate(document, schema)
    trace = parse_trace(predicted.encode(), "predicted.json")
    assert trace.source == "predicted"
    assert trace.timeline.step_ns == prediction.step.timeline.step_ns
    assert trace.meta["plan_digest"] == prediction.plan.digest()
    read = parse_program(json.dumps(program).encode(), "program.json")
    assert np.array_equal(read.cell, trace.program.cell)
    assert {stream.priority for stream in read.streams} == {0, -1}
    assert "R" in {op.pass_ for op in read}  # recompute is marked


# -- torch-csv -------------------------------------------------------------------------------------


def test_schema_of_the_sidecar_is_published(published: Callable[[str, str], None]) -> None:
    published("torch_csv", json_schema(TorchSidecar, "mhcplan torch_csv"))


def test_tables_hold_the_schedule(predictions: dict[str, Prediction]) -> None:
    files = export(small("dualpipev", "none"), "torch-csv").files
    assert set(files) == {"compute_only.csv", "compute_comms.csv", "schedule.json"}
    expected = [[str(a) for a in row] for row in build_schedule("dualpipev", 2, 4).actions]
    assert rows(str(files["compute_only.csv"])) == expected
    comms = rows(str(files["compute_comms.csv"]))
    assert [[c for c in row if re.fullmatch(r"\d+[FIWB]\d+|\(.*", c)] for row in comms] == expected
    for stage in range(4):
        assert sum(row.count(f"{stage}REDUCE_GRAD") for row in comms) == 1


@pytest.mark.parametrize("to", ["torch-csv", "torchtitan", "piper"])
def test_recomputed_stages_have_no_split_backward(to: ExportFormat) -> None:
    names = {"torch-csv": "compute_comms.csv", "torchtitan": "compute_only.csv",
             "piper": "piper.json"}  # fmt: skip
    split = re.compile(r"\d[IW]\d|\"B[IW]\"")
    assert not split.search(text(small("zb1p"), to, names[to]))
    assert split.search(text(small("zb1p", "none"), to, names[to]))


def test_recompute_of_the_sublayers_alone_has_no_split_backward_either() -> None:
    layers = small("zb1p", "none", recompute_layers="full")
    assert not re.search(r"\d[IW]\d", text(layers, "torch-csv", "compute_comms.csv"))
    for to in ("torch-csv", "torchtitan", "piper"):
        assert any(loss.startswith("I and W:") for loss in losses_of(layers, to))


def test_torchtitan_is_told_that_a_prediction_head_has_no_module() -> None:
    for mtp in (True, False):
        losses = losses_of(small("1f1b", mtp=mtp), "torchtitan")
        assert any("multi-token-prediction" in loss for loss in losses) == mtp


def test_dualpipe_becomes_a_v_of_two_copies(predictions: dict[str, Prediction]) -> None:
    files = export(predictions["dualpipe"], "torch-csv").files
    assert set(files) == {"compute_comms.csv", "schedule.json"}
    sidecar = TorchSidecar.model_validate_json(files["schedule.json"])
    assert (sidecar.directions, sidecar.num_stages, sidecar.num_microbatches) == (2, 4, 2)
    assert [(s.stage, s.rank, s.model_stage, s.direction) for s in sidecar.stages] == [
        (0, 0, 0, 0), (1, 1, 1, 0), (2, 1, 0, 1), (3, 0, 1, 1),
    ]  # fmt: skip
    assert any("compute_only.csv" in loss for loss in sidecar.losses)
    held = [{int(re.match(r"\(?(\d+)", c)[1]) for c in row}  # type: ignore[index]
            for row in rows(str(files["compute_comms.csv"]))]  # fmt: skip
    assert held == [{0, 3}, {1, 2}]


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev", "dualpipe"])
def test_marks_say_stream_recompute_and_time_of_every_compute_cell(
    predictions: dict[str, Prediction], schedule: str
) -> None:
    prediction = predictions[schedule]
    files = export(prediction, "torch-csv").files
    sidecar = TorchSidecar.model_validate_json(files["schedule.json"])
    for name, marks in sidecar.marks.items():
        table = rows(str(files[name]))
        compute = [(r, i) for r, row in enumerate(table) for i, cell in enumerate(row)
                   if re.fullmatch(r"\d+[FIWB]\d+|\(.*", cell)]  # fmt: skip
        assert [(mark.rank, mark.index) for mark in marks] == compute
        for mark in marks:
            assert table[mark.rank][mark.index] == mark.cell
            assert mark.recompute == (re.search(r"B", mark.cell) is not None)
            assert 0 <= mark.start_ns < mark.end_ns <= prediction.step.timeline.step_ns
            assert "compute" in mark.streams
    planned = {str(a) for row in schedule_of(prediction.plan).actions for a in row}
    assert {m.planned for m in sidecar.marks["compute_comms.csv"]} == {
        cell for cell in planned if "W" not in cell
    }


# -- torchtitan, megatron, piper -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "placed_by"),
    [("1f1b", "PipelineScheduleMulti"), ("zbv", "ZBVZeroBubble"), ("dualpipev", "DualPipeV"),
     ("interleaved-1f1b", "PipelineScheduleMulti")],
)  # fmt: skip
def test_torchtitan_names_a_schedule_that_places_stages_as_the_table(
    schedule: str, placed_by: str
) -> None:
    prediction = small(schedule)
    files = export(prediction, "torchtitan").files
    config = tomllib.loads(str(files["torchtitan.toml"]))["parallelism"]
    assert config["pipeline_parallel_schedule"] == placed_by
    assert config["pipeline_parallel_schedule_csv"] in files
    parts = config["module_fqns_per_model_part"]
    assert len(parts) == schedule_of(prediction.plan).num_stages
    assert [m for part in parts for m in part] == [
        "tok_embeddings", *(f"layers.{i}" for i in range(12)), "norm", "output",
    ]  # fmt: skip


def test_torchtitan_setup_refuses_a_rank_that_holds_other_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch.distributed.pipelining")
    for name, content in export(small("dualpipev"), "torchtitan").files.items():
        (tmp_path / name).write_text(str(content), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import mhcplan_setup  # pyright: ignore[reportMissingImports]

    class Stage:
        def __init__(self, stage_index: int) -> None:
            self.stage_index = stage_index

    class Schedule:
        _stages = (Stage(0), Stage(2))  # a loop: what PipelineScheduleMulti would give

    with pytest.raises(ValueError, match="check pipeline_parallel_schedule"):
        mhcplan_setup.setup(Schedule())


def test_megatron_flags(predictions: dict[str, Prediction]) -> None:
    flags = text(predictions["interleaved-1f1b"], "megatron", "megatron.args").splitlines()
    for flag in (
        '--pipeline-model-parallel-layout "Et*3|t*3|t*3|t*3L"',
        "--microbatch-group-size-per-virtual-pipeline-stage 2",
        "--mhc-recompute-layer-num 2",
        "--num-residual-streams 4",
        "--global-batch-size 8",
    ):
        assert flag in flags
    assert any("dev" in line for line in flags if line.startswith("#"))


def test_megatron_layout_has_a_stage_a_part() -> None:
    plan = make_plan({"model": "mhc-3b", "schedule": "1f1b", "microbatches": 4,
                      "layout": {"pp": 3, "ep": 1, "blocks_per_stage": [1, 5, 6]}})  # fmt: skip
    assert pipeline_layout(plan) == "Et|t*5|t*6L"


def test_megatron_places_the_multi_token_prediction_head_with_the_loss() -> None:
    flags = text(small("1f1b", mtp=True), "megatron", "megatron.args")
    assert "--mtp-num-layers 1" in flags
    assert 't*6mL"' in flags


@pytest.mark.parametrize(("block", "instead"), [(1, "2"), (3, "2 or 4"), (5, "4 or 6")])
def test_megatron_refuses_half_a_layer(block: int, instead: str) -> None:
    with pytest.raises(SpecError, match=rf"block={block} .* of 2 sites each; take {instead}$"):
        export(small("1f1b", block), "megatron")


def test_megatron_recomputes_whole_layers_of_the_plain_residual_only() -> None:
    def recomputed(layers: str, n: int) -> Prediction:
        return small("1f1b", recompute_layers=layers, residual={"expansion_rate": n})

    plain = text(recomputed("full", 1), "megatron", "megatron.args")
    assert "--recompute-granularity full" in plain
    for layers, n in (("selective", 1), ("selective", 4), ("full", 4)):
        with pytest.raises(SpecError, match=f"recompute_layers={layers} cannot be exported"):
            export(recomputed(layers, n), "megatron")


@pytest.mark.parametrize("to", ["megatron", "torchtitan", "piper"])
def test_two_copies_are_refused(predictions: dict[str, Prediction], to: ExportFormat) -> None:
    with pytest.raises(SpecError, match=f"schedule=dualpipe cannot be exported to {to}"):
        export(predictions["dualpipe"], to)


def test_piper_orders_are_the_rows(predictions: dict[str, Prediction]) -> None:
    prediction = predictions["dualpipev"]
    directives = json.loads(text(prediction, "piper", "piper.json"))
    orders = [d["filters"] for d in directives if d["op"] == "order"]
    spelled = [
        [";".join(f"{f['PP']}{f['PASS']}{f['MB']}" for f in group) for group in order]
        for order in orders
    ]
    table = rows(text(prediction, "torch-csv", "compute_only.csv"))
    assert spelled == [[re.sub(r"[()]|OVERLAP_F_B", "", c) for c in row] for row in table]
    placed = {d["filter"]["PP"]: d["devices"] for d in directives if d["op"] == "place"}
    assert placed == {0: [0, 1], 1: [2, 3], 2: [2, 3], 3: [0, 1]}
    assert {d["num_microbatches"] for d in directives if d["op"] == "split"} == {4}


# -- check -----------------------------------------------------------------------------------------


def written(prediction: Prediction, to: ExportFormat, folder: Path) -> Path:
    for name, content in export(prediction, to).files.items():
        (folder / name).write_text(str(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev", "dualpipe"])
def test_check_finds_exports_sound(
    run: Run, predictions: dict[str, Prediction], tmp_path: Path, schedule: str
) -> None:
    for to in ("stream-json", "torch-csv"):
        written(predictions[schedule], to, tmp_path)
    for file in ("program.json", "predicted.json", "compute_comms.csv"):
        code, out, err = run("check", str(tmp_path / file))
        assert (code, err) == (0, ""), out
        assert out.startswith(f"{tmp_path / file}: sound (")


def test_check_of_a_plan_needs_no_profile(run: Run) -> None:
    code, out, err = run("check", "mhc-3b", "--pp", "2", "--ep", "2", "--microbatches", "4",
                         "--profile", "none-such")  # fmt: skip
    assert (code, err) == (0, "")
    assert out.startswith("mhc-3b: sound (")


def test_check_finds_a_broken_program(
    run: Run, predictions: dict[str, Prediction], tmp_path: Path
) -> None:
    program = predictions["1f1b"].step.program
    send = int(np.flatnonzero(program.is_send)[0])
    peer = program.peer.copy()
    peer[send] = -1
    write_program(replace(program, peer=peer), tmp_path / "program.json")
    code, out, err = run("check", str(tmp_path / "program.json"))
    assert (code, err) == (1, "")
    assert "transfers: op" in out


def test_check_finds_a_broken_table(
    run: Run, predictions: dict[str, Prediction], tmp_path: Path
) -> None:
    table = written(predictions["dualpipe"], "torch-csv", tmp_path) / "compute_comms.csv"
    table.write_text(table.read_text().replace("0REDUCE_GRAD,", ""))
    code, out, _ = run("check", str(table))
    assert code == 1
    assert "reduction: stage 0 has 0 REDUCE_GRAD" in out


def test_check_finds_marks_of_another_table(
    run: Run, predictions: dict[str, Prediction], tmp_path: Path
) -> None:
    table = written(predictions["dualpipev"], "torch-csv", tmp_path) / "compute_only.csv"
    table.write_text(table.read_text().replace("0F0,0F1", "0F1,0F0"))
    code, out, _ = run("check", str(table))
    assert code == 1
    assert "sidecar: rank 0, cell 0 is 0F1, marked as 0F0" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "cannot be read (No such file or directory)"),
        ("none.json", None, "cannot be read (No such file or directory)"),
        ("bad.csv", b"\xff\xfe0F0", "is no CSV"),
        ("bad.json", b"{", "not JSON, or cut short"),
        ("list.json", b"[1]", "the file is not an object"),
        ("report.json", b'{"format": "mhcplan.report"}', "its format is 'mhcplan.report'"),
    ],
)
def test_unreadable_files_are_bad_input(
    run: Run, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run("check", str(tmp_path / name))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_broken_sidecar_and_flags_beside_a_file_are_bad_input(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0F0,0B0\n")
    assert run("check", str(tmp_path / "a.csv"))[0] == 0
    code, _, err = run("check", str(tmp_path / "a.csv"), "--pp", "2")
    assert (code, err.count("\n")) == (2, 1)
    (tmp_path / "schedule.json").write_text("{}")
    code, _, err = run("check", str(tmp_path / "a.csv"))
    assert (code, err.count("\n")) == (2, 1)
    assert "plan_digest" in err
