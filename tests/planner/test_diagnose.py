"""`mhcplan diagnose`: reading cut-off files, verdicts and alarms on recordings made by hand."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhcplan.planner.cli import main
from mhcplan.planner.diagnose.judge import THRESHOLDS, Diagnosis, judge
from mhcplan.planner.diagnose.recording import Recording, RecordingError, read_recording
from mhcplan.planner.report.schema import json_schema

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

L, N, EVERY, RECORDS = 3, 2, 4, 40
PAIRS = (
    "forward_gain", "backward_gain", "composite_forward_gain", "composite_backward_gain",
    "row_error", "column_error", "spectral_norm", "composite_spectral_norm",
    "identity_distance", "uniform_distance", "row_similarity",
)  # fmt: skip
SHAPES = (
    dict.fromkeys(PAIRS, (L, 2))
    | dict.fromkeys(("layer_similarity", "state_rms", "gradient_rms"), (L,))
    | dict.fromkeys(("res_map", "forward_map", "backward_map"), (L, N, N))
    | dict.fromkeys(("pre_map", "post_map", "row_share"), (L, N))
)
DTYPE = np.dtype(
    [("step", "<i8"), ("elapsed_s", "<f8"), ("loss", "<f8", EVERY), ("gradient_norm", "<f8", EVERY)]
    + [(name, "<f8", shape) for name, shape in SHAPES.items()]
)
ABOUT = {"kind": "mhc", "expansion_rate": N, "sinkhorn_steps": 20, "sites": ["a", "b", "c"],
         "every": EVERY, "tokens": 8}  # fmt: skip


def calm_records(records: int = RECORDS) -> np.ndarray:
    """A run in which nothing is wrong: the loss falls with some noise, maps are near identity."""
    made = np.zeros(records, DTYPE)
    made["step"] = EVERY * np.arange(1, records + 1) - 1
    noise = np.random.default_rng(0).normal(size=(records, EVERY))
    made["loss"] = 4 - 0.002 * made["step"][:, None] + 0.02 * noise
    made["gradient_norm"] = 1 + 0.1 * np.abs(noise)
    for name in PAIRS:
        made[name] = 1.0
    for name in ("row_error", "column_error"):
        made[name] = 1e-3
    made["row_similarity"], made["layer_similarity"] = 0.3, 0.9
    made["row_share"] = 1 / N
    for name in ("res_map", "forward_map", "backward_map"):
        made[name] = np.eye(N)
    return made


def recording(records: np.ndarray, **about: object) -> Recording:
    return Recording("run", ABOUT | about, records)


def write(path: Path, records: np.ndarray, **about: object) -> list[int]:
    """Write a recording as the format says; returns where each record ends."""
    header = {
        "format": "mhcplan.recording", "format_version": 1, "about": ABOUT | about,
        "dtype": [
            [name, DTYPE[name].base.str, list(DTYPE[name].shape)] for name in DTYPE.names or ()
        ],
    }  # fmt: skip
    data = json.dumps(header).encode() + b"\n"
    ends = []
    for record in records:
        data += record.tobytes() + zlib.crc32(record.tobytes()).to_bytes(4, "little")
        ends.append(len(data))
    path.write_bytes(data)
    return ends


def names(records: np.ndarray, **about: object) -> set[str]:
    return {alarm.name for alarm in judge(recording(records, **about)).alarms}


# -- the file --------------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_read_to_its_last_whole_record(
    data: st.DataObject, tmp_path: Path
) -> None:
    path, records = tmp_path / "run.recording", calm_records(4)
    ends = write(path, records)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    expected = sum(end <= cut for end in ends)
    if expected == 0:
        with pytest.raises(RecordingError, match=r"run\.recording"):
            read_recording(path)
        return
    found = read_recording(path)
    assert np.array_equal(found.records, records[:expected])
    assert found.cut_bytes == cut - ends[expected - 1]


def test_a_damaged_record_ends_what_is_read(tmp_path: Path) -> None:
    path, records = tmp_path / "run.recording", calm_records(4)
    ends = write(path, records)
    data = bytearray(path.read_bytes())
    data[ends[1] + 20] ^= 1
    path.write_bytes(data)
    found = read_recording(path)
    assert len(found.records) == 2
    assert "was cut off" in judge(found).notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no recording"),
        (b"hello", "is no recording"),
        (b'{"format": "mhcplan.recording", "format_version": 2}\n', "version 2; this version"),
        (b'{"format": "mhcplan.recording", "format_version": 1}\n', "does not describe it"),
        (b'{"format": "mhcplan.recording", "form', "cut off before its first record"),
    ],
)
def test_files_that_are_no_recording_are_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(RecordingError, match=message):
        read_recording(tmp_path / "x")


# -- verdicts --------------------------------------------------------------------------------------


def test_a_calm_run_sounds_no_alarm() -> None:
    verdict = judge(recording(calm_records()))
    assert not verdict.alarms
    assert verdict.notes == []
    assert verdict.forward_gain.mean == verdict.backward_gain.of_mean_map == 1.0
    assert (verdict.first_step, verdict.last_step) == (EVERY - 1, EVERY * RECORDS - 1)


def test_figures_are_those_of_the_last_record() -> None:
    records = calm_records()
    records["composite_backward_gain"][7, 1] = (6.0, 9.0)
    records["composite_backward_gain"][-1, 2] = (1.25, 1.75)
    records["backward_map"][-1, 1] = [[1.0, 0.5], [0.25, -4.0]]
    gain = judge(recording(records)).backward_gain
    assert (gain.mean, gain.most, gain.site) == (1.25, 1.75, "c")
    assert (gain.peak, gain.peak_step) == (6.0, records["step"][7])
    assert gain.of_mean_map == 3.5  # |0.5 - 4|


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_large_gain_sounds(direction: str) -> None:
    records = calm_records()
    limit = THRESHOLDS["gain"].value
    records[f"composite_{direction}_gain"][:, 1, 0] = limit
    assert names(records) == set()
    records[f"composite_{direction}_gain"][:, 1, 0] = limit * 1.01
    assert names(records) == {"gain"}
    (alarm,) = judge(recording(records)).alarms
    assert f"{direction} gain" in alarm.message
    assert alarm.site == "b"


def test_a_large_gain_that_passed_sounds_where_it_was() -> None:
    records = calm_records()
    records["composite_backward_gain"][7, 1, 0] = 26.0
    (alarm,) = judge(recording(records, kind="hc")).alarms
    assert (alarm.name, alarm.step, alarm.site) == ("gain", records["step"][7], "b")
    assert "was 26, above 10; it ended at 1" in alarm.message


def test_a_growing_gain_sounds_and_one_that_settled_does_not() -> None:
    records = calm_records()
    growing = np.geomspace(1, 9, RECORDS)[:, None]
    records["composite_forward_gain"][:, :, 0] = growing
    assert names(records) == {"gain_growing"}
    records["composite_forward_gain"][:, :, 0] = np.minimum(growing, 4)
    records["composite_forward_gain"][-RECORDS // 2 :, :, 0] = 4
    assert names(records) == set()


def test_a_diverged_run_can_be_judged() -> None:
    records = calm_records()
    records["loss"][-2, 1:] = np.nan
    records["composite_forward_gain"][-1] = np.nan
    records["composite_backward_gain"][-1] = np.inf
    records["forward_map"][-1] = np.nan
    verdict = judge(recording(records, kind="hc"))
    assert {a.name for a in verdict.alarms} == {"not_finite", "gain"}
    assert verdict.alarms[0].step == records["step"][-2] - EVERY + 2
    assert verdict.forward_gain.mean is None
    assert Diagnosis.model_validate_json(verdict.model_dump_json()) == verdict


def test_unconverged_sinkhorn_sounds_for_mhc_only() -> None:
    records = calm_records()
    records["column_error"][-1, 1, 1] = 0.0999
    assert names(records) == set()
    records["column_error"][-1, 1, 1] = 0.1001
    (alarm,) = judge(recording(records)).alarms
    assert (alarm.name, alarm.site, alarm.step) == ("sinkhorn", "b", records["step"][-1])
    assert (
        "20 Sinkhorn steps leave column sums off by 0.1, more than 0.1, at 1 of 3" in alarm.message
    )
    assert names(records, kind="hc") == set()


def test_ill_conditioned_logits_trip_the_convergence_alarm(tmp_path: Path) -> None:
    """From logits through the recorder's own maps and file to the alarm."""
    torch = pytest.importorskip("torch")
    from mhcplan.kernels.diagnostics_checkpoint import record_checkpoint

    # three rows want the same two columns: what is left to the other two comes from exp(-24)
    wish = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
    for size, alarms in ((1.0, set()), (24.0, {"sinkhorn"})):
        site = {
            "0.phi": torch.zeros(24, 256), "0.alpha": torch.ones(3),
            "0.bias": torch.cat([torch.zeros(8), (size * wish).flatten()]),
        }  # fmt: skip
        torch.save(site, tmp_path / "a.pt")
        record_checkpoint(tmp_path / "a.pt", tmp_path / "a.recording")
        verdict = judge(read_recording(tmp_path / "a.recording"))
        assert {alarm.name for alarm in verdict.alarms} == alarms


def test_collapsing_rows_sound() -> None:
    records = calm_records()
    records["row_similarity"][-1] = 0.97
    assert names(records) == {"rows"}
    (alarm,) = judge(recording(records)).alarms
    assert "0.9700, above 0.95; its lowest was 0.3000 at step 3" in alarm.message
    records = calm_records()
    records["row_share"][-1, 2] = (0.999, 0.001)
    assert names(records) == {"row_lost"}
    assert names(records, expansion_rate=1) == set()


def test_a_loss_spike_sounds_only_with_a_spike_of_the_gradient_norm() -> None:
    records = calm_records()
    records["loss"][25, 2] += 1.0
    assert names(records) == set()
    records["gradient_norm"][25, 0] = 8.0
    verdict = judge(recording(records))
    (alarm,) = verdict.alarms
    assert alarm.name == "loss_spike"
    assert alarm.step == records["step"][25] - 1
    records["loss"][25, 2] -= 1.0
    assert names(records) == set()


def test_a_gain_of_mhc_above_two_is_explained() -> None:
    records = calm_records()
    records["row_error"][-1], records["column_error"][-1, 1, 1] = 1e-9, 0.07
    records["composite_backward_gain"][-1, 0] = (1.8, 2.4)
    (line,) = judge(recording(records)).notes
    assert "reaches 2.4" in line
    assert "at most n = 2" in line
    assert "0.07 (site b; 1 of 3 sites above 1 %)" in line
    assert judge(recording(records, kind="hc")).notes == []


# -- the command -----------------------------------------------------------------------------------


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["diagnose", *words])
    return int(str(exit_.value.code))


def test_recordings_are_shown_side_by_side_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = calm_records()
    loud["composite_backward_gain"][:, 0, 0] = 2828.0
    write(tmp_path / "calm.recording", calm_records())
    write(tmp_path / "loud.recording", loud, kind="hc")
    files = [str(tmp_path / f"{name}.recording") for name in ("calm", "loud")]
    assert run(*files, "--out", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "calm: no alarm" in text
    assert "loud: 1 alarm" in text
    assert "the composite backward gain is 2828, above 10 (step 159, site a)" in text
    drawn = json.loads((tmp_path / "out" / "figures.json").read_text())
    backward = drawn["Composite gain over depth"]["data"][3]
    assert (backward["name"], backward["y"]) == ("loud backward", [2828.0, 1.0, 1.0])
    assert len(drawn["Maps: loud"]["data"]) == 6
    page = (tmp_path / "out" / "diagnosis.html").read_text()
    assert page.count("<h2>") == len(drawn) + 1
    assert 'src="http' not in page
    verdicts = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert [v["format"] for v in verdicts] == ["mhcplan.diagnosis"] * 2


def test_json_is_one_object_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", calm_records())
    assert run(str(tmp_path / "a"), str(tmp_path / "a"), "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Diagnosis.model_validate_json(line).name for line in lines] == ["a", "a"]


def test_published_schema_is_current(published: Callable[[str, str], None]) -> None:
    text = json_schema(Diagnosis, "mhcplan diagnosis, version 1")
    published("diagnosis", text)
    verdict = json.loads(judge(recording(calm_records())).model_dump_json())
    jsonschema.Draft202012Validator(json.loads(text)).validate(verdict)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    (tmp_path / "wrong.pt").write_bytes(b"PK\x03\x04 and then nothing")
    write(tmp_path / "empty", calm_records(0))
    for words in ([], [str(tmp_path / "none")], [str(tmp_path / "wrong.pt")],
                  [str(tmp_path / "empty")]):  # fmt: skip
        assert run(*words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
