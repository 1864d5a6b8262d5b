"""The command line: exit codes, pure output, one line for bad input, files whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mhcplan.planner import output
from mhcplan.planner.cli import predict as commands
from mhcplan.planner.cli import terminal
from mhcplan.planner.cli.flags import PlanFlags
from mhcplan.planner.output import OutputError, write_files
from mhcplan.planner.plan.file import read_plan
from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.report.schema import PlanReport
from mhcplan.planner.report.text import headline

if TYPE_CHECKING:
    from contextlib import ExitStack

    from tests.support.commands import Run

ROOT = Path(__file__).parents[3]
SMALL = ["mhc-3b", "--pp", "2", "--microbatches", "4"]


def spawn(code: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
    """Runs Python ``code`` and then the command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    script = f"import sys\n{code}\nfrom mhcplan.planner.cli import main\nmain(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", script, *words], env=environment, text=True, timeout=300,
        capture_output=True, check=False, **more,
    )  # fmt: skip


# -- predict ---------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(run: Run, profile: str) -> None:
    code, out, err = run("predict", *SMALL, "--profile", profile, "--json")
    assert (code, err) == (0, "")
    report = PlanReport.model_validate_json(out)
    assert report.plan.model.name == "mhc-3b"
    assert report.gpus == 16
    assert report.step_time_ns > report.baseline_step_time_ns
    assert report.command == f"mhcplan predict mhc-3b --pp 2 --microbatches 4 --profile {profile}"


def test_text_starts_with_the_answer(run: Run, profile: str) -> None:
    _, text, err = run("predict", *SMALL, "--profile", profile)
    _, data, _ = run("predict", *SMALL, "--profile", profile, "--json")
    assert text.split("\n")[0] == headline(PlanReport.model_validate_json(data))
    assert "\x1b" not in text
    assert err == ""


def test_plan_that_does_not_fit_is_done_and_says_by_how_much(run: Run, profile: str) -> None:
    limit = ["--set", "memory_limit_bytes=1GB"]
    code, out, _ = run("predict", *SMALL, "--profile", profile, *limit)
    assert code == 0
    assert "does NOT fit" in out.split("\n")[0]


def test_out_holds_report_plan_timeline_and_trace(run: Run, profile: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    code, said, err = run("predict", *SMALL, "--profile", profile, "--out", str(out), "--json")
    assert code == 0
    assert err == f"mhcplan: wrote {out}; open {out / 'timeline.html'} in a browser\n"
    assert sorted(file.name for file in out.iterdir()) == [
        "plan.toml", "report.json", "timeline.html", "trace.json.gz",
    ]  # fmt: skip
    assert (out / "report.json").read_text(encoding="utf-8") == said
    assert "<!doctype html>" in (out / "timeline.html").read_text(encoding="utf-8")
    assert json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]
    report = PlanReport.model_validate_json(said)
    assert read_plan(out / "plan.toml") == report.plan
    code, again, _ = run("predict", str(out / "plan.toml"), "--json")
    assert code == 0
    same = ("step_time_ns", "plan_digest", "memory", "breakdown_ns")
    assert [json.loads(again)[k] for k in same] == [json.loads(said)[k] for k in same]


@pytest.mark.parametrize(
    "words",
    [["predict"], ["predict", "--json"], ["compare", "mhc-3b --n 2 --pp 2 --microbatches 4"]],
)
def test_answer_is_given_also_where_nothing_can_be_written(
    run: Run, profile: str, tmp_path: Path, words: list[str]
) -> None:
    command, *more = words
    given = [*SMALL, "--profile", profile]
    plan = [" ".join(given)] if command == "compare" else given
    taken = tmp_path / "file"
    taken.write_text("here first")
    answer = run(command, *plan, *more)
    assert run(command, *plan, *more, "--out", str(taken)) == (
        2, answer[1], f"mhcplan: {taken}: is not a folder\n"
    )  # fmt: skip
    assert taken.read_text() == "here first"


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--n", "2"], "residual.expansion_rate", 2),
        (["--residual", "hc"], "residual.kind", "hc"),
        (["--recompute-block", "6"], "residual.recompute_block", 6),
        (["--recompute-block", "none"], "residual.recompute_block", "none"),
        (["--pp", "4"], "layout.pp", 4),
        (["--ep", "4"], "layout.ep", 4),
        (["--dp", "2"], "layout.dp", 2),
        (["--microbatches", "32"], "microbatches", 32),
        (["--global-batch", "512"], "microbatches", 64),
        (["--global-batch", "512", "--dp", "2", "--micro-batch-size", "2"], "microbatches", 16),
        (["--micro-batch-size", "2"], "micro_batch_size", 2),
        (["--seq-len", "2048"], "seq_len", 2048),
        (["--schedule", "zb1p"], "schedule", "zb1p"),
        (["--priority", "all"], "priority", "all"),
        (["--profile", "other"], "profile", "other"),
        (["--engine", "simpy"], "engine", "simpy"),
        (["--set", "layout.gpus_per_node=4"], "layout.gpus_per_node", 4),
        (["--set", "p2p=grouped", "--set", "comm_streams=one"], "comm_streams", "one"),
    ],
)
def test_flag_reaches_its_field(
    run: Run, tmp_path: Path, words: list[str], path: str, value: object
) -> None:
    file = tmp_path / "plan.toml"
    code, _, _ = run("init", "mhc-27b", *words, "-o", str(file))
    assert code == 0
    found: Any = read_plan(file)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_flags_are_those_of_the_design() -> None:
    """The surface is frozen: daily questions have flags, everything else has --set."""
    flags = set(PlanFlags.__dataclass_fields__)
    assert flags == {
        "n", "residual", "recompute_block", "pp", "ep", "dp", "microbatches", "global_batch",
        "micro_batch_size", "seq_len", "schedule", "priority", "profile", "engine", "settings",
    }  # fmt: skip


def test_help_shows_the_defaults_of_the_plan(run: Run) -> None:
    code, out, _ = run("predict", "--help")
    plan = make_plan({"model": "mhc-27b"})
    words = " ".join(out.replace("│", " ").split())
    assert code == 0
    for value in (plan.layout.pp, plan.microbatches, plan.seq_len, plan.schedule, plan.profile):
        assert f"[default: {value}]" in words


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "MODEL|PLAN requires an argument"),
        (["predict", "mhc-28b"], "model='mhc-28b' is unknown; did you mean mhc-27b"),
        (["predict", "missing.toml"], "missing.toml: cannot be read (No such file or directory)"),
        (["predict", "mhc-27b", "--pp", "7"], "pp=7 must be even for dualpipe"),
        (["predict", "mhc-27b", "--pp", "-2"], "layout.pp=-2 must be greater than or equal to 1"),
        (["predict", "mhc-27b", "--pp", "two"], 'value for --pp: "two" is not a whole number'),
        (["predict", "mhc-27b", "--pp", "3.5"], 'value for --pp: "3.5" is not a whole number'),
        (
            ["predict", "mhc-27b", "--recompute-block", "6.5"],
            '"6.5" is not auto, none, stage or a whole number',
        ),
        (["predict", "mhc-27b", "--global-batch", "63.9"], '"63.9" is not a whole number'),
        (["plan", "mhc-27b", "--gpus", "7.5"], '"7.5" is not a whole number'),
        (["plan", "mhc-27b", "--gpus", "8", "--memory-gib", "80GB"], '"80GB" is not a number'),
        (["run", "mhc-3b", "--steps", "2.5"], '"2.5" is not a whole number'),
        (["web", "--port", "8.5"], '"8.5" is not a whole number'),
        (["sweep", "mhc-27b", "--n", "1", "2", "4"], "too many words: 2 4"),
        (["predict", "mhc-27b", "--n", "1,2"], "not a whole number; mhcplan sweep takes lists"),
        (["web", "--port", "1,2"], '"1,2" is not a whole number\n'),
        (["predict", "mhc-27b", "--n", "0"], "residual.expansion_rate=0 must be 1, 2, 4, 8 or 16"),
        (["predict", "mhc-27b", "--ep", "7"], "layout.ep=7 must divide the 72 experts"),
        (["predict", "mhc-27b", "--microbatches", "4"], "microbatches=4 must be at least 16"),
        (
            ["predict", "mhc-27b", "--global-batch", "100"],
            "global_batch=100 must be a multiple of micro_batch_size=1 x ep=8 x dp=1",
        ),
        (["predict", "mhc-27b", "--global-batch", "64", "--ep", "0"], "layout.ep=0 must be"),
        (
            ["predict", "mhc-27b", "--global-batch", "64", "--microbatches", "8"],
            "global_batch=64 and microbatches=8 exclude each other",
        ),
        (["predict", "mhc-27b", "--schedule", "gpipe"], 'Invalid value "gpipe" for --schedule'),
        (["predict", "mhc-27b", "--engine", "numpy"], 'Invalid value "numpy" for --engine'),
        (["predict", "mhc-27b", "--tp", "2"], "--tp: tensor parallelism is not modelled"),
        (["predict", "mhc-27b", "--gpus-per-node=4"], "give --set layout.gpus_per_node=VALUE"),
        (["sweep", "mhc-27b", "--p2p", "eager"], "--p2p is no flag; give --set p2p=VALUE"),
        (["profile", "list", "--p2p", "eager"], "Unknown option: --p2p"),
        (["predict", "mhc-27b", "--ppp", "2"], "Unknown option: --ppp"),
        (["predict", "mhc-27b", "--set", "layout.tp=2"], "layout.tp is not a field of a plan"),
        (["predict", "mhc-27b", "--set", "pp"], "--set 'pp' must be field=value"),
        (["predict", "mhc-27b", "--profile", "h200-nvl"], "profile='h200-nvl' is unknown"),
        (["export", "mhc-27b", "--to", "gantt", "-o", "x"], 'Invalid value "gantt" for --to'),
        (["profile", "show", "h800-x"], "profile='h800-x' is unknown"),
        (["profile", "diff", "missing.json", "missing.json"], "missing.json: cannot be read"),
        (["forecast"], 'Unknown command "forecast"'),
    ],
)
def test_bad_input_is_one_line_on_standard_error_and_exit_code_2(
    run: Run, words: list[str], message: str
) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("mhcplan: ")
    assert message in err
    assert err.count("\n") == 1


def test_shape_far_outside_the_profile_names_the_measurement(run: Run, profile: str) -> None:
    code, out, err = run("predict", *SMALL, "--profile", profile, "--seq-len", "65536")
    assert (code, out) == (2, "")
    assert "mhcplan profile measure" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -3])
def test_truncated_profile_is_bad_input(
    run: Run, profile: str, tmp_path: Path, length: int
) -> None:
    file = tmp_path / "cut.json"
    file.write_text(Path(profile).read_text(encoding="utf-8")[:length], encoding="utf-8")
    code, out, err = run("predict", *SMALL, "--profile", str(file))
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    real = output._stage
    calls: list[str | bytes] = []

    def full(folder: Path, content: str | bytes, cleanup: ExitStack) -> Path:
        calls.append(content)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(tmp_path / "b"))
        return real(folder, content, cleanup)

    monkeypatch.setattr(output, "_stage", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_files(tmp_path, {"a": "new", "b": "new"})
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "old")]


def test_what_cannot_be_written_is_named_as_it_was_asked_for(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "plan.toml"
    folder.mkdir()
    said = f"mhcplan: {folder}: Is a directory\n"
    assert run("init", "mhc-3b", "--force", "-o", str(folder)) == (2, "", said)


def test_pipe_or_device_is_written_into_and_never_replaced(run: Run, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code, _, _ = run("init", "mhc-3b", "-o", str(pipe))
    assert code == 0
    assert pipe.is_fifo()
    assert os.read(reader, 1 << 16).decode().startswith("# ")
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_standard_output_on_a_full_disk_is_one_line(profile: str) -> None:
    script = "from mhcplan.planner.cli import main\nimport sys\nmain(sys.argv[1:])"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script, "predict", *SMALL, "--profile", profile], stdout=full,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stderr=subprocess.PIPE, text=True,
            timeout=300, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "mhcplan: cannot write: No space left on device\n")


def test_ctrl_c_is_130_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_predict", interrupted)
    assert run("predict", *SMALL) == (130, "", "mhcplan: interrupted\n")


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_reader_that_leaves_early_is_no_error(profile: str, more: list[str]) -> None:
    words = ["predict", *SMALL, "--profile", profile, *more]
    script = "from mhcplan.planner.cli import main\nimport sys\nmain(sys.argv[1:])"
    read, write = os.pipe()
    os.close(read)  # nobody will ever read
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_reader_that_leaves_early_costs_no_file(profile: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.csv"
    words = ["sweep", *SMALL, "--profile", profile, "--no-store", "--jobs", "1", "--csv", str(file)]
    script = "from mhcplan.planner.cli import main\nimport sys\nmain(sys.argv[1:])"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, check=False,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 141
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2


# -- what is loaded --------------------------------------------------------------------------------


def test_version_loads_nothing() -> None:
    code = "import atexit; atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))"
    done = spawn(code, "--version")
    assert done.returncode == 0
    assert done.stdout.count(".") == 2
    loaded = done.stderr.split()
    assert not {"cyclopts", "numpy", "pydantic", "rich", "plotly", "torch"} & set(loaded)


def test_process_that_ends_is_not_searched_for_cycles() -> None:
    code = "import atexit, gc; atexit.register(lambda: print(len(gc.get_objects())))"
    assert int(spawn(code, "--version").stdout.split()[-1]) < 1000  # all others are frozen


def test_predict_runs_where_torch_and_triton_are_not_installed(profile: str) -> None:
    code = "sys.modules['torch'] = sys.modules['triton'] = None"
    done = spawn(code, "predict", *SMALL, "--profile", profile, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "mhcplan.report"


def test_predict_loads_no_plots_unless_it_writes_them(profile: str) -> None:
    code = "import atexit; atexit.register(lambda: print('plotly' in sys.modules))"
    done = spawn(code, "predict", *SMALL, "--profile", profile)
    assert done.stdout.rstrip().endswith("False")


def test_measuring_without_torch_names_the_extra() -> None:
    done = spawn("sys.modules['torch'] = None", "profile", "measure", "--out", "x.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mhcplan: torch is not installed: pip install 'mhcplan[gpu]'\n"


def test_help_of_measuring_needs_no_torch() -> None:
    done = spawn("sys.modules['torch'] = None", "profile", "measure", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: mhcplan profile measure ")
    assert "--from-trace" in done.stdout


# -- export, init, profile -------------------------------------------------------------------------


def test_export_writes_a_trace(run: Run, profile: str, tmp_path: Path) -> None:
    words = ["export", *SMALL, "--profile", profile, "--to", "perfetto", "-o", str(tmp_path)]
    code, out, err = run(*words)
    assert (code, out) == (0, "")
    assert err.startswith(f"mhcplan: wrote {tmp_path / 'trace.json.gz'}\n")
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {"rank 0", "rank 1"} <= {e["args"]["name"] for e in events if e["ph"] == "M" and
                                    e["name"] == "process_name"}  # fmt: skip


def test_init_writes_a_plan_and_never_over_one(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    assert run("init", "mhc-9b", "--pp", "2", "-o", str(file))[0] == 0
    plan = read_plan(file)
    assert (plan.model.name, plan.layout.pp) == ("mhc-9b", 2)
    code, _, err = run("init", "mhc-3b", "-o", str(file))
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err
    assert read_plan(file) == plan
    assert run("init", "mhc-3b", "-o", str(file), "--force")[0] == 0
    assert read_plan(file).model.name == "mhc-3b"


def test_profile_show_prints_the_very_file(run: Run, profile: str) -> None:
    assert run("profile", "show", profile, "--json") == (
        0, Path(profile).read_text(encoding="utf-8"), "",
    )  # fmt: skip
    code, out, _ = run("profile", "show", profile)
    assert code == 0
    assert "attention_mla" in out
    assert "all_to_all" in out


def test_profile_validate_lists_every_problem(run: Run, profile: str, tmp_path: Path) -> None:
    assert run("profile", "validate", profile) == (0, f"{profile}: no problem\n", "")
    data = json.loads(Path(profile).read_text(encoding="utf-8"))
    data["ops"][0]["duration_ns"] = -1
    data["transfers"][0]["bytes"] = "many"
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(data))
    code, out, _ = run("profile", "validate", str(broken))
    assert code == 2
    assert len(out.strip().split("\n")) == 2
    assert "duration_ns" in out
    assert "bytes" in out
    code, said, _ = run("profile", "validate", str(broken), "--json")
    assert (code, json.loads(said)) == (2, {"problems": out.splitlines(), "holdout": []})


def test_equal_profiles_have_no_table_of_changes(run: Run, profile: str) -> None:
    code, out, _ = run("profile", "diff", profile, profile)
    assert code == 0
    assert out.startswith("0 figures changed, ")


def test_profile_diff_tells_what_changed(run: Run, profile: str, tmp_path: Path) -> None:
    data = json.loads(Path(profile).read_text(encoding="utf-8"))
    data["ops"][0]["duration_ns"] *= 2
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    code, out, _ = run("profile", "diff", profile, str(other), "--json")
    assert code == 0
    (change,) = json.loads(out)["changed"]
    assert change["after"] == 2 * change["before"]
    assert "+100.0" in run("profile", "diff", profile, str(other))[1]


def test_profile_list_is_a_table_or_json(run: Run) -> None:
    code, out, _ = run("profile", "list", "--json")
    assert code == 0
    assert isinstance(json.loads(out), list)
    assert run("profile", "list")[0] == 0


def test_plan_flags_give_the_words_that_make_them_again() -> None:
    flags = PlanFlags(n=2, recompute_block="none", micro_batch_size=2, settings=["p2p=grouped"])
    assert flags.arguments() == [
        "--n", "2", "--recompute-block", "none", "--micro-batch-size", "2", "--set", "p2p=grouped",
    ]  # fmt: skip
    assert isinstance(flags.plan("mhc-27b"), PlanSpec)


def test_who_waits_long_is_told_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_SLOW_SECONDS", 0.01)
    with terminal.progress("simulating", terminal.COMPILES):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""  # nobody is watching
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.progress("simulating", terminal.COMPILES):
        time.sleep(0.3)
    assert f"mhcplan: simulating {terminal.COMPILES}" in capsys.readouterr().err
