"""The Python API: the same answers as the commands, which show themselves in a notebook."""

from __future__ import annotations

import shlex
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

import mhcplan
from mhcplan.planner.api import plan_of
from mhcplan.planner.cli import main
from mhcplan.planner.cli.flags import PlanFlags
from mhcplan.planner.explain import text as explain_text
from mhcplan.planner.plan.file import plan_text
from mhcplan.planner.plan.spec import PlanSpec, SpecError, make_plan
from mhcplan.planner.report.schema import PlanReport
from mhcplan.planner.report.text import headline, sections
from mhcplan.profiles.schema import profile_text
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from pathlib import Path

    from mhcplan.planner.api_results import Predicted

FLAGS = {"pp": 2, "microbatches": 4}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a profile file."""
    file = tmp_path_factory.mktemp("profile") / "synthetic.json"
    file.write_text(profile_text(synthetic_profile()), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def answer(profile: str) -> Predicted:
    return mhcplan.predict("mhc-3b", **FLAGS, profile=profile)


class Texts(HTMLParser):
    """The texts of a page, and whether its elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_same_answer_as_the_command(
    answer: Predicted, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        f"mhcplan predict mhc-3b --pp 2 --microbatches 4 --profile {profile}",
        answer.report.command,
    ):
        with pytest.raises(SystemExit):
            main([*shlex.split(command)[1:], "--json"])
        said = PlanReport.model_validate_json(capsys.readouterr().out)
        assert said.model_copy(update={"command": ""}) == answer.report.model_copy(
            update={"command": ""}
        )


def test_every_flag_of_the_command_line_is_a_keyword(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(plan_text(make_plan({"model": "mhc-9b"})), encoding="utf-8")
    flags = {
        "n": 2, "residual": "hc", "recompute_block": 6, "pp": 2, "ep": 4, "dp": 2,
        "micro_batch_size": 2, "seq_len": 2048, "schedule": "zb1p", "priority": "all",
        "profile": "other", "engine": "simpy",
    }  # fmt: skip
    given = PlanFlags(**flags, global_batch=512, settings=["layout.gpus_per_node=4"])
    for source in (file, str(file), make_plan({"model": "mhc-9b"})):
        found = plan_of(source, {"layout.gpus_per_node": 4}, **flags, global_batch=512)
        assert found == given.plan(str(file))
    assert plan_of("mhc-9b", microbatches=32).microbatches == 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"tp": 2}, "tp=2: tensor parallelism is not modelled"),
        ({"ppp": 2}, "ppp=2 is not one of n, residual"),
        ({"p2p": "grouped"}, "p2p='grouped' is no keyword; give settings={'p2p': 'grouped'}"),
        ({"pp": 3}, "pp=3 must be even"),
        ({"settings": {"layout.tpp": 2}}, "layout.tpp is not a field"),
        ({"settings": {"n": 2}}, "n is not a field"),
        ({"global_batch": "many"}, "global_batch='many' must be a whole number"),
    ],
)
def test_bad_input_is_said_as_on_the_command_line(words: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError) as refusal:
        mhcplan.predict("mhc-27b", **words)
    assert message in str(refusal.value)


def test_prediction_shows_itself(answer: Predicted) -> None:
    assert repr(answer) == headline(answer.report)
    shown = Texts(answer._repr_html_()).texts
    assert headline(answer.report) in shown
    for section in sections(answer.report):
        assert section.title in shown
        assert all(cell in shown for row in section.rows for cell in row if cell)


def test_text_of_a_plan_cannot_become_html(profile: str) -> None:
    plan = make_plan({"model": "mhc-3b", "profile": profile, "layout": {"pp": 2}})
    name = "<script>alert(1)</script>"
    evil = plan.model_copy(update={"model": plan.model.model_copy(update={"name": name})})
    shown = mhcplan.predict(evil, microbatches=4, intervals=False)._repr_html_()
    assert "<script" not in shown
    assert any(name in text for text in Texts(shown).texts)


def test_comparison_takes_texts_plans_and_predictions(answer: Predicted, profile: str) -> None:
    words = f"mhc-3b --pp 2 --microbatches 4 --profile {profile}"
    other = mhcplan.compare(answer, f"{words} --n 2")
    assert {change.field for change in other.comparison.fields or ()} == {"residual.expansion_rate"}
    again = mhcplan.compare(words, plan_of("mhc-3b", None, **FLAGS, profile=profile, n=2))
    assert again.comparison.ops == other.comparison.ops
    assert repr(again) == repr(other)
    texts = Texts(other._repr_html_()).texts
    assert repr(other) in texts
    assert "residual.expansion_rate" in texts
    assert "<!doctype html>" in other.page()


def test_export_gives_files_or_writes_them(answer: Predicted, tmp_path: Path) -> None:
    found = mhcplan.export(answer, "stream-json", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(found.files)
    again = mhcplan.export("mhc-3b", "stream-json", **FLAGS, profile=answer.report.plan.profile)
    assert again == found
    loss, *_ = mhcplan.export(answer, "torch-csv").losses
    assert repr(mhcplan.export(answer, "torch-csv")).splitlines()[:2] == [
        "compute_comms.csv, schedule.json", f"leaves out {loss}",
    ]  # fmt: skip
    with pytest.raises(SpecError, match="predict the changed plan"):
        mhcplan.export(answer, "stream-json", n=2)
    with pytest.raises(SpecError, match="to='gantt' must be one of stream-json, torch-csv"):
        mhcplan.export(answer, "gantt")  # type: ignore[arg-type]


def test_prediction_explains_itself_and_draws_its_page(answer: Predicted) -> None:
    found = answer.explain()
    assert found.explanation.step_time_ns == answer.report.step_time_ns
    assert found.explanation.command == answer.report.command.replace("predict", "explain", 1)
    assert repr(found).splitlines() == list(explain_text.sentences(found.explanation))
    shown = Texts(found._repr_html_()).texts
    assert set(repr(found).splitlines()) <= set(shown)
    for section in explain_text.sections(found.explanation):
        assert all(cell in shown for row in section.rows for cell in row if cell)
    assert headline(answer.report).split(";")[0] in answer.page()


def test_plan_is_what_was_predicted(answer: Predicted) -> None:
    assert isinstance(answer.report.plan, PlanSpec)
    assert mhcplan.predict(answer.report.plan).report.step_time_ns == answer.report.step_time_ns


def test_sweep_takes_lists_and_single_values(profile: str, tmp_path: Path) -> None:
    found = mhcplan.sweep(
        "mhc-3b", n=[2, 4], pp=(2, 3), microbatches=4, profile=profile, jobs=1,
        settings={"layout.gpus_per_node": [8]}, store=tmp_path / "points.sqlite",
    )  # fmt: skip
    records = found.records()
    assert [(r["residual.expansion_rate"], r["layout.pp"]) for r in records] == [
        (2, 2), (2, 3), (4, 2), (4, 3),
    ]  # fmt: skip
    assert [r["status"] for r in records] == ["predicted", "illegal", "predicted", "illegal"]
    one = mhcplan.predict("mhc-3b", n=2, **FLAGS, profile=profile, intervals=False).report
    assert records[0]["step_time_ns"] == one.step_time_ns
    assert found.best[0].values["residual.expansion_rate"] == 2
    assert "4 combinations" in repr(found)
    assert "".join(Texts(found._repr_html_()).texts).split() == repr(found).split()
    again = mhcplan.sweep(
        "mhc-3b", n=[2, 4], pp=(2, 3), microbatches=4, profile=profile, jobs=1,
        settings={"layout.gpus_per_node": [8]}, store=tmp_path / "points.sqlite",
    )  # fmt: skip
    assert again.sweep.stored == 2


def test_sweep_of_a_plan(answer: Predicted) -> None:
    rows = mhcplan.sweep(answer.report.plan, n=[1, 2], jobs=1).sweep.rows
    assert [row.values for row in rows] == [
        {"residual.expansion_rate": 1}, {"residual.expansion_rate": 2},
    ]  # fmt: skip
    with pytest.raises(SpecError, match="tp=2: tensor parallelism"):
        mhcplan.sweep("mhc-3b", tp=2)


def test_plan_without_gpus_is_refused() -> None:
    with pytest.raises(SpecError, match="gpus=0 must be at least 1"):
        mhcplan.plan("mhc-3b", gpus=0)


def test_plan_finds_what_can_be_predicted(profile: str) -> None:
    found = mhcplan.plan(
        "mhc-3b", gpus=8, pp=[2, 4], ep=[2, 4], microbatches=8, profile=profile, jobs=1,
        schedule=["1f1b", "dualpipe"], settings={"priority": "post"},
    )  # fmt: skip
    assert found.best is not None
    best = found.reports[0].best[0]
    again = mhcplan.predict(found.best, intervals=False).report
    assert again.step_time_ns == best.figures.step_time_ns
    assert repr(found).startswith("n=4 on 8 GPUs")
    assert "".join(Texts(found._repr_html_()).texts).split() == repr(found).split()
    nothing = mhcplan.plan("mhc-3b", gpus=8, memory_gib=1, pp=2, profile=profile, jobs=1)
    assert nothing.best is None
