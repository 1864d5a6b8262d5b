"""The search: as good as trying everything, honest about what it did not try."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from rich.console import Console

from mhcplan.planner.plan.file import read_plan, source_fields
from mhcplan.planner.plan.spec import make_plan
from mhcplan.planner.predict import predict
from mhcplan.planner.report.make import make_report
from mhcplan.planner.report.schema import json_schema
from mhcplan.planner.search.branch_and_bound import BAND_PERCENT, Found, Search
from mhcplan.planner.search.find import find_plans, quests
from mhcplan.planner.search.points import Bound, FamilyBounds, MemberBounds, Play
from mhcplan.planner.search.report import SearchReport, loss_words
from mhcplan.planner.search.sampled import SampledSearch
from mhcplan.planner.search.space import Space, search_space
from mhcplan.planner.search.text import print_search
from mhcplan.planner.sweep.axes import axes_of
from mhcplan.planner.sweep.farm import Farm
from mhcplan.planner.sweep.run import named_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhcplan.planner.sweep.points import ProfileName, Simulated
    from tests.support.commands import Run

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "schemas" / "search.schema.json"
FEW = ["schedule=1f1b,dualpipe,zbv", "micro_batch_size=1,2", "layout.ep=2"]
FEW += ["residual.recompute_block=auto,none", "priority=none,post,all"]


@pytest.fixture(scope="module")
def named(profile: str) -> ProfileName:
    return named_profile(profile)


@pytest.fixture(scope="module")
def space(profile: str) -> Space:
    """A space small enough to try everything: mhc-3b on 4 GPUs."""
    fields = source_fields("mhc-3b") | {"profile": profile}
    return search_space(fields, gpus=4, global_batch=16, axes=axes_of({}, FEW))


@pytest.fixture(scope="module")
def everything(space: Space, named: ProfileName) -> dict[str, Simulated]:
    """What the engine says of every plan of the space, by the plan's digest."""
    return {
        member.plan.digest(): Play(member, named).answer()
        for family in space.families
        for member in family.members
    }


# -- space -----------------------------------------------------------------------------------------


def test_plans_of_a_space_train_the_same_step_on_the_same_gpus(space: Space) -> None:
    plans = [member.plan for family in space.families for member in family.members]
    assert {plan.layout.gpus for plan in plans} == {4}
    assert {plan.global_batch for plan in plans} == {16}
    assert len({plan.digest() for plan in plans}) == len(plans) == space.num_plans


def test_every_legal_combination_is_in_the_space(profile: str, space: Space) -> None:
    """Against make_plan, tried with every combination there could be."""
    found = {m.plan.digest() for family in space.families for m in family.members}
    legal: set[str] = set()
    for pp, ep, size, schedule, block, priority in itertools.product(
        (1, 2, 4), (2,), (1, 2), ("1f1b", "dualpipe", "zbv"), ("auto", "none"),
        ("none", "post", "all"),
    ):  # fmt: skip
        dp = 4 // pp // ep
        data: dict[str, Any] = {
            "model": "mhc-3b", "profile": profile, "schedule": schedule, "priority": priority,
            "layout": {"pp": pp, "ep": ep, "dp": dp}, "micro_batch_size": size,
            "microbatches": 16 // (ep * max(dp, 1) * size),
            "residual": {"recompute_block": block},
        }  # fmt: skip
        try:
            plan = make_plan(data)
        except ValueError:
            continue
        if plan.layout.gpus == 4 and plan.global_batch == 16:
            legal.add(plan.digest())
    assert found == legal
    assert space.illegal.total() > 0


# -- bounds ----------------------------------------------------------------------------------------


def test_bounds_hold_for_every_plan(
    space: Space, named: ProfileName, everything: dict[str, Simulated]
) -> None:
    for family in space.families:
        (of_family,) = FamilyBounds((family,), named).answer()
        of_members = MemberBounds(family.members, named, 10**15).answer()
        for member, bound in zip(family.members, of_members, strict=True):
            step = everything[member.plan.digest()]
            assert isinstance(bound, Bound)
            assert isinstance(of_family, Bound)
            assert bound.step_time_ns <= step.step_time_ns
            assert bound.device_memory_bytes == step.device_memory_bytes
            assert of_family.step_time_ns <= step.step_time_ns
            assert of_family.device_memory_bytes <= step.device_memory_bytes


@pytest.mark.parametrize(
    "more",
    [
        {"contention": "on"},
        {"contention": "off", "recompute_layers": "full"},
        {"contention": "off", "residual": {"kind": "hc"}},
        {"contention": "on", "comm_ctas": 16, "recompute_layers": "selective"},
    ],
    ids=lambda more: " ".join(more),
)
def test_bounds_hold_for_other_fields(
    more: dict[str, Any], profile: str, named: ProfileName
) -> None:
    fields = source_fields("mhc-3b") | {"profile": profile} | more
    axes = axes_of({}, ["layout.pp=2", "layout.ep=2", "schedule=dualpipe", "micro_batch_size=1"])
    for family in search_space(fields, 4, 8, axes).families:
        (of_family,) = FamilyBounds((family,), named).answer()
        assert isinstance(of_family, Bound)
        for member, bound in zip(
            family.members, MemberBounds(family.members, named, 10**15).answer(), strict=True
        ):
            step = Play(member, named).answer()
            assert isinstance(bound, Bound)
            assert of_family.step_time_ns <= bound.step_time_ns <= step.step_time_ns
            assert bound.device_memory_bytes == step.device_memory_bytes
            assert of_family.device_memory_bytes <= step.device_memory_bytes


# -- search ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
def test_search_finds_what_trying_everything_finds(
    share: float, space: Space, named: ProfileName, everything: dict[str, Simulated]
) -> None:
    needs = sorted(step.device_memory_bytes for step in everything.values())
    limit = needs[round(share * (len(needs) - 1))]  # that share of the plans fits
    fitting = [s for s in everything.values() if s.device_memory_bytes <= limit]
    merits = sorted((s.step_time_ns, s.device_memory_bytes) for s in fitting)
    search = Search(space, named, limit)
    with Farm(jobs=1) as farm:
        search.run(farm, seconds=600)
    found = search.found()
    assert found.candidates[0].merit == merits[0]
    assert found.proven
    slowest = merits[0][0] * (1 + BAND_PERCENT / 100)
    front: list[tuple[int, int]] = []
    for step_ns, num_bytes in merits:
        if step_ns <= slowest and (not front or num_bytes < front[-1][1]):
            front.append((step_ns, num_bytes))
    merits_found = [candidate.merit for candidate in found.front]
    assert [merit for merit in merits_found if merit[0] <= slowest] == front
    tally = found.tally
    assert tally.total == space.num_plans
    assert tally.unknown == 0
    assert tally.too_large == len(everything) - len(fitting)
    if share > 0.2:  # of a few plans all are played at once
        assert tally.played < 0.7 * len(fitting)  # the bounds are worth something


def test_search_that_is_stopped_says_what_it_does_not_know(
    space: Space, named: ProfileName, everything: dict[str, Simulated]
) -> None:
    """At every round: nothing is counted twice, and the least bound is one."""
    fastest = min(step.step_time_ns for step in everything.values())
    seen: list[Found] = []
    search = Search(space, named, 10**12)
    with Farm(jobs=1) as farm:
        search.run(farm, 600, seen.append)
    assert len(seen) > 3
    for found in seen:
        assert found.tally.total == space.num_plans
        best = found.candidates[0].merit[0] if found.candidates else None
        assert found.proven == (best == fastest) or not found.proven
        if best != fastest:
            assert found.least_bound_ns is not None
            assert found.least_bound_ns <= fastest
    nothing = Search(space, named, 10**12)
    with Farm(jobs=1) as farm:
        nothing.run(farm, seconds=0)
    assert nothing.found().tally.unknown == space.num_plans
    assert not nothing.found().proven


class _Interrupted(Farm):
    """The user presses Ctrl-C when the third answer is there."""

    def map(self, function: Any, tasks: Any) -> Any:  # noqa: ANN401
        for count, answer in enumerate(super().map(function, tasks)):
            if count == 2:
                raise KeyboardInterrupt
            yield answer


def test_interrupted_search_loses_nothing_and_can_go_on(
    space: Space, named: ProfileName, everything: dict[str, Simulated]
) -> None:
    search = Search(space, named, 10**12)
    with _Interrupted(jobs=1) as farm, pytest.raises(KeyboardInterrupt):
        search.run(farm, 600)
    assert search.found().tally.total == space.num_plans
    with Farm(jobs=1) as farm:
        search.run(farm, 600)
    fastest = min(step.step_time_ns for step in everything.values())
    assert search.found().candidates[0].merit[0] == fastest


class _Listed(Farm):
    """Keeps what it was asked."""

    asked: list[Any]

    def map(self, function: Any, tasks: Any) -> Any:  # noqa: ANN401
        self.asked += tasks
        return super().map(function, tasks)


def test_plans_that_share_the_order_of_their_ops_are_bounded_one_after_the_other(
    profile: str, named: ProfileName
) -> None:
    axes = axes_of({}, ["layout.pp=1", "schedule=1f1b,zbv", "micro_batch_size=1"])
    fields = source_fields("mhc-3b") | {"profile": profile}
    wide = search_space(fields, gpus=8, global_batch=16, axes=axes)
    search = Search(wide, named, 10**12)
    with _Listed(jobs=1) as farm:
        farm.asked = []
        search.run(farm, seconds=600)
    families = [asked for asked in farm.asked if isinstance(asked, FamilyBounds)]
    assert sorted(asked.families[0].common.schedule for asked in families) == ["1f1b", "zbv"]
    for asked in families:
        assert [f.common.layout.ep for f in asked.families] == [1, 2, 4, 8]
    members = [asked.members for asked in farm.asked if isinstance(asked, MemberBounds)]
    for some in members:
        assert len({(m.plan.schedule, m.recompute_block) for m in some}) == 1
        orders = [m.plan.priority for m in some]
        assert orders == sorted(orders)
    assert max(map(len, members)) > 4  # more than one family's


def test_sampled_search_finds_the_best_of_a_small_space(
    space: Space, named: ProfileName, everything: dict[str, Simulated]
) -> None:
    pytest.importorskip("optuna")
    search = SampledSearch(space, named, 10**12)
    with Farm(jobs=1) as farm:
        search.run(farm, seconds=600)
    found = search.found()
    assert found.candidates[0].merit[0] == min(s.step_time_ns for s in everything.values())
    assert found.tally.total == space.num_plans
    assert not found.proven or found.tally.unknown == 0


def test_every_n_has_an_answer_of_its_own(profile: str) -> None:
    axes = axes_of({"profile": profile, "residual.expansion_rate": "1,2", "layout.pp": "2",
                    "schedule": "1f1b", "layout.ep": "2", "global_batch": "8"}, [])  # fmt: skip
    reports = find_plans("mhc-3b", 4, None, axes, jobs=1)
    assert [r.best[0].plan.residual.expansion_rate for r in reports] == [1, 2]
    assert all(r.proven and r.global_batch == 8 for r in reports)


def test_work_of_a_step_grows_with_the_gpus(profile: str) -> None:
    """64 microbatches x 8 replicas on 64 GPUs are 8 sequences a GPU."""
    axes = axes_of({"profile": profile, "layout.pp": "2", "schedule": "1f1b", "layout.ep": "2",
                    "micro_batch_size": "1"}, [])  # fmt: skip
    (quest,) = quests("mhc-3b", 4, None, axes)
    assert quest.begin().report("").global_batch == 32


# -- words -----------------------------------------------------------------------------------------


def test_loss_names_the_classes_that_differ_most(profile: str) -> None:
    data: dict[str, Any] = {"model": "mhc-3b", "layout": {"pp": 2}, "microbatches": 8}
    plans = [make_plan(data | {"profile": profile, "schedule": s}) for s in ("dualpipe", "1f1b")]
    best, other = (make_report(predict(plan), "") for plan in plans)
    assert other.step_time_ns > best.step_time_ns
    words = loss_words(best, other)
    assert f"({(other.step_time_ns - best.step_time_ns) / 1e6:,.2f} ms) longer" in words
    assert "ms more pipeline bubble" in words
    assert loss_words(best, best) == "takes as long, and 0.00 GB more memory"


# -- the command -----------------------------------------------------------------------------------

SMALL = ["plan", "mhc-3b", "--gpus", "4", "--global-batch", "8", "--pp", "2", "--ep", "2"]
SMALL += ["--schedule", "1f1b,dualpipe", "--micro-batch-size", "1", "--priority", "none,post"]
SMALL += ["--jobs", "1"]


def test_command_writes_the_plan_that_it_found(run: Run, profile: str, tmp_path: Path) -> None:
    file = tmp_path / "best.toml"
    code, out, err = run(*SMALL, "--profile", profile, "-o", str(file), "--json")
    assert code == 0
    assert err == f"mhcplan: wrote {file}; now: mhcplan predict {file}\n"
    report = SearchReport.model_validate_json(out)
    jsonschema.validate(json.loads(out), json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert read_plan(file) == report.best[0].plan
    assert report.space.plans == sum(
        getattr(report.space, name)
        for name in ("played", "bounded", "too_large", "unpriced", "unknown")
    )
    step = predict(report.best[0].plan).step
    assert report.best[0].figures.step_time_ns == step.timeline.step_ns


def test_text_starts_with_the_answer_and_says_what_is_proven(run: Run, profile: str) -> None:
    code, out, err = run(*SMALL, "--profile", profile)
    assert (code, err) == (0, "")
    assert out.startswith("n=4 on 4 GPUs: pp 2 x ep 2 x dp 1, ")
    assert "Why the second lost: pp 2 x ep 2" in out
    assert "no other plan is faster" in out
    assert "Again: mhcplan plan mhc-3b --gpus 4 --pp 2" in out


def test_search_that_ran_out_of_time_claims_no_bound_that_it_has_not(
    run: Run, profile: str
) -> None:
    _, out, _ = run(*SMALL, "--profile", profile, "--json")
    known = SearchReport.model_validate_json(out).model_copy(update={"proven": False})
    for gain, words in (
        (2.5, "an unknown plan could be faster by 2.50 % at most"),
        (100.0, "some unknown plans were not looked at: more --seconds may find a faster one"),
    ):
        said = io.StringIO()
        late = known.model_copy(update={"possible_gain_percent": gain})
        print_search(late, Console(file=said, width=200))
        assert f"- {words}\n" in said.getvalue()


def test_schema_on_disk_is_that_of_the_report(published: Callable[[str, str], None]) -> None:
    published("search", json_schema(SearchReport, "mhcplan search, version 1"))


def test_nothing_that_fits_is_exit_code_1(run: Run, profile: str) -> None:
    code, out, _ = run(*SMALL, "--profile", profile, "--memory-gib", "1")
    assert code == 1
    assert out.startswith("no plan for 4 GPUs of 1.07 GB and 8 sequences a step was found\n")
    assert "too large" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "8", "--global-batch", "0"], "global_batch='0' must be a number"),
        (["--gpus", "8", "--global-batch", "8,16"], "global_batch is not searched"),
        (["--gpus", "8", "--seq-len", "2048,4096"], "seq_len is not searched: give one value"),
        (["--gpus", "8", "--priority", "urgent"], "priority='urgent' must be"),
        (["--gpus", "8", "--n", "1,2", "-o", "x.toml"], "--output takes one plan"),
        (["--gpus", "8", "--memory-gib", "0"], "--memory-gib"),
        (["--gpus", "8", "--method", "luck"], "--method"),
        (["--gpus", "8", "--set", "layout.tp=2"], "layout.tp is not a field"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, more: list[str], message: str) -> None:
    code, out, err = run("plan", "mhc-3b", *more)
    assert (code, out) == (2, "")
    assert err.startswith("mhcplan: ")
    assert message in err
    assert err.count("\n") == 1
