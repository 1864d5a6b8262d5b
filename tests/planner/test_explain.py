"""Explanations: the path sums to the step in every way it is cut, what-ifs are simulations."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.planner.cli import main
from mhcplan.planner.explain.counterfactuals import FREE, TWICE_AS_FAST, Change, changed_costs
from mhcplan.planner.explain.explanation import Explanation, explain, phase_ends_ns
from mhcplan.planner.explain.text import sections, sentences
from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import Prediction, predict, settle, simulate
from mhcplan.planner.report.schema import json_schema, overhead_percent
from mhcplan.profiles.lookup import cost_model_of
from mhcplan.profiles.schema import profile_text
from mhcplan.sim.timeline import critical_path
from tests.support.loads import loads, with_loads
from tests.support.programs import makers
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "schemas" / "explanation.schema.json"
PLAN = {"model": "mhc-3b", "layout": {"pp": 2}, "microbatches": 4}


@cache
def small() -> Prediction:
    return predict(make_plan(PLAN), synthetic_profile())


@cache
def explained() -> Explanation:
    return explain(small(), "mhcplan explain mhc-3b")


def test_path_sums_to_the_step_however_it_is_cut() -> None:
    found = explained()
    for parts in (found.path, found.ranks, found.ops):
        assert sum(part.time_ns for part in parts) == found.step_time_ns
        assert sum(part.percent for part in parts) == pytest.approx(100)
    assert sum(wait.time_ns for wait in found.waits) == found.step_time_ns
    assert sum(wait.count for wait in found.waits) == found.path_pieces


def test_path_is_the_one_that_the_timeline_draws() -> None:
    timeline, program = small().step.timeline, small().step.program
    pieces = critical_path(timeline)
    assert explained().path_pieces == len(pieces)
    mhc = sum(
        piece.end_ns - piece.start_ns
        for piece in pieces
        if piece.op >= 0 and program[piece.op].category == "mhc"
    )
    assert {part.name: part.time_ns for part in explained().path}["mhc"] == mhc > 0


def test_kernels_that_nothing_delays_are_not_slowed() -> None:
    """Without urgent kernels and contention every kernel on the path takes its own time."""
    plan = make_plan(PLAN | {"priority": "none", "contention": "off"})
    assert explain(predict(plan, synthetic_profile())).slowed_ns == 0
    step = small().step
    alone_ns = step.table.duration_ns[step.played.cost]
    by_hand = sum(
        max(piece.end_ns - piece.start_ns - int(alone_ns[piece.op]), 0)
        for piece in critical_path(step.timeline)
        if piece.op >= 0 and step.program.group[piece.op] < 0
    )
    assert explained().slowed_ns == by_hand


def test_phases_follow_each_other_and_hold_the_whole_path() -> None:
    found = explained()
    assert [phase.name for phase in found.phases] == ["warm-up", "steady", "drain", "update"]
    assert found.phases[0].begin_ns == 0
    assert found.phases[-1].end_ns == found.step_time_ns
    for before, after in pairwise(found.phases):
        assert before.end_ns == after.begin_ns
    for phase in found.phases:
        assert sum(part.time_ns for part in phase.path) == phase.end_ns - phase.begin_ns


def test_steady_phase_is_where_every_rank_works() -> None:
    program, timeline = small().step.program, small().step.timeline
    ends = phase_ends_ns(program, timeline)
    works = (program.microbatch >= 0) & (program.group < 0)
    for rank in range(program.num_ranks):
        own = works & (program.rank == rank) & (timeline.end_ns > timeline.start_ns)
        assert timeline.start_ns[own].min() <= ends["warm-up"]
        assert ends["steady"] <= timeline.end_ns[own].max() <= ends["drain"]


def test_changed_costs_touch_the_chosen_ops_only() -> None:
    prediction = small()
    step = prediction.step
    # every other norm: others of the same cost key keep theirs
    norms = np.flatnonzero([step.program.kinds[k] == "norm" for k in step.program.kind])
    chosen = np.zeros(step.program.num_ops, np.bool_)
    chosen[norms[::2]] = True
    program, table = changed_costs(step.played, step.table, chosen, FREE)
    duration, before = table.duration_ns[program.cost], step.table.duration_ns[step.played.cost]
    assert (duration[chosen] == 0).all()
    assert (duration[~chosen] == before[~chosen]).all()
    assert (before[norms] > 0).all()


def test_nothing_changed_and_everything_free_are_the_step_and_nothing() -> None:
    prediction = small()
    everything = np.ones(prediction.step.program.num_ops, np.bool_)
    step = prediction.step
    same = changed_costs(step.played, step.table, everything, Change())
    assert simulate(*same, "compiled").step_ns == prediction.step.timeline.step_ns
    free = changed_costs(step.played, step.table, everything, FREE)
    assert simulate(*free, "compiled").step_ns == 0


def test_what_is_otherwise_decides_the_clock_anew() -> None:
    prediction = predict(make_plan(PLAN | {"microbatches": 8}))  # of a GPU with a power limit
    plan, step, profile = prediction.plan, prediction.step, prediction.profile
    full_clock = cost_model_of(profile).table(step.program.cost_keys, plan.gpu)
    everything, nothing = np.ones((2, step.program.num_ops), np.bool_) * [[True], [False]]
    for ops in (everything, nothing):
        *_, timeline, clock = settle(
            plan, *changed_costs(step.program, full_clock, ops, Change()), profile
        )
        assert (timeline.step_ns, clock) == (step.timeline.step_ns, step.clock)
    mhc = np.array([name == "mhc" for name in step.program.categories])[step.program.category]
    *_, timeline, clock = settle(plan, *changed_costs(step.program, full_clock, mhc, FREE), profile)
    assert clock > step.clock > 1  # more arithmetic in less time
    found = {what.name: what.step_time_ns for what in explain(prediction).what_ifs}
    assert found["mHC kernels free"] == timeline.step_ns


@settings(max_examples=25)
@given(st.data())
def test_changed_costs_hold_with_contention_too(data: st.DataObject) -> None:
    """Nothing changed is the same step, everything free is none, whatever ops put on a GPU."""
    program, costs = data.draw(makers()).build()
    table = with_loads(costs, data.draw(loads(program)))
    everything = np.ones(program.num_ops, np.bool_)
    some = np.arange(program.num_ops) % 2 == 0
    step_ns = simulate(program, table, "compiled").step_ns
    for ops in (everything, some):
        same = changed_costs(program, table, ops, Change())
        assert simulate(*same, "compiled").step_ns == step_ns
    assert simulate(*changed_costs(program, table, everything, FREE), "compiled").step_ns == 0
    faster, its_table = changed_costs(program, table, some, TWICE_AS_FAST)
    assert its_table.loads is not None
    assert len(its_table.loads.kernels) == len(its_table.duration_ns) == len(faster.cost_keys)
    simulate(faster, its_table, "compiled")


def test_what_ifs_of_plans_are_predictions_of_these_plans() -> None:
    found = {what_if.name: what_if for what_if in explained().what_ifs}
    for name, change in (
        ("priority=none", {"priority": "none"}),
        ("schedule=1f1b", {"schedule": "1f1b"}),
        ("microbatches=8", {"microbatches": 8}),
    ):
        other = predict(make_plan(PLAN | change), synthetic_profile())
        assert found[name].step_time_ns == other.step.timeline.step_ns
        tokens = other.plan.tokens_per_step / small().plan.tokens_per_step
        percent = overhead_percent(other.step.timeline.step_ns, explained().step_time_ns * tokens)
        assert found[name].time_percent == pytest.approx(percent)


def test_what_ifs_are_ranked_and_free_kernels_save_time() -> None:
    times = [what_if.time_percent for what_if in explained().what_ifs]
    assert times == sorted(times)
    found = {what_if.name: what_if for what_if in explained().what_ifs}
    assert found["mHC kernels free"].step_time_ns < explained().step_time_ns
    assert "priority=post" not in found
    assert "schedule=dualpipe" not in found


def test_plain_residual_is_explained_too() -> None:
    plan = make_plan(PLAN | {"residual": {"kind": "plain"}})
    found = explain(predict(plan, synthetic_profile()))
    names = {what_if.name for what_if in found.what_ifs}
    assert "mHC kernels free" not in names
    assert not any(name.startswith(("priority", "residual")) for name in names)
    assert "expert traffic free" in names


def test_words_name_the_largest_parts_and_what_helps_most() -> None:
    found = explained()
    first, *rest = sentences(found)
    assert first.startswith(f"The step takes {found.step_time_ns / 1e6:,.2f} ms")
    assert f"{found.path[0].percent:.2f} %" in first
    assert any(text.startswith("Warm-up, until every rank computes") for text in rest)
    helping = next(w for w in found.what_ifs if w.kind != "plan")
    assert any(helping.name in text for text in rest)


def test_plan_that_does_not_fit_is_not_recommended() -> None:
    plan = make_plan(PLAN | {"memory_limit_bytes": 10**9})
    found = explain(predict(plan, synthetic_profile()))
    assert not any(what_if.fits for what_if in found.what_ifs)
    assert not found.fits
    said = " ".join(sentences(found))
    assert "The plan does not fit in memory." in said
    assert "one field away, none fits" in said


def test_plan_that_nearly_fits_is_told_what_would() -> None:
    """Memory between what the plan needs and what the leanest plan one field away needs."""
    found = explained()
    lean = min(w.device_memory_bytes for w in found.what_ifs if w.kind == "plan")
    assert lean < found.device_memory_bytes
    plan = make_plan(PLAN | {"memory_limit_bytes": lean})
    tight = explain(predict(plan, synthetic_profile()))
    (name,) = {w.name for w in tight.what_ifs if w.fits}
    said = " ".join(sentences(tight))
    assert f"Of the plans one field away that fit, {name} is the fastest" in said


def test_command_prints_words_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "synthetic.json"
    file.write_text(profile_text(synthetic_profile()), encoding="utf-8")
    words = ["explain", "mhc-3b", "--pp", "2", "--microbatches", "4", "--profile", str(file)]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as exit_:
            main([*words, *more])
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        if more:
            found = Explanation.model_validate_json(out)
            assert found.path == explained().path
            jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(
                json.loads(out)
            )
        else:
            assert out.splitlines()[0] == next(sentences(explained()))
            for section in sections(explained()):
                assert section.title in out


def test_published_schema_is_current(published: Callable[[str, str], None]) -> None:
    published("explanation", json_schema(Explanation, "mhcplan explanation, version 1"))
