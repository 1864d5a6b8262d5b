"""Claims and measurements: errors, anchors, files, and who was first."""

from __future__ import annotations

import subprocess
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.closed_loop_report import (
    LIMITS,
    PAGE,
    bars,
    joined,
    misordered,
    page_lines,
    why_not_blind,
)
from mhcplan.planner.measured.claim import claim
from mhcplan.planner.plan.spec import PlanSpec, make_plan
from mhcplan.planner.predict import predict
from mhcplan.planner.report.uncertainty import rows_that_judge
from mhcplan.profiles.accuracy import (
    BASELINE,
    MHC,
    Claim,
    Measurement,
    ProgramMeasured,
    Row,
    Times,
    append_lines,
    newest,
    read_lines,
    scaled,
    shipped_claims,
    shipped_rows,
)
from mhcplan.profiles.schema import Profile, ProfileError, profile_text
from tests.support.synthetic_profile import synthetic_profile

ROOT = Path(__file__).parents[2]


def plan_of(n: int = 4, **fields: object) -> PlanSpec:
    fields = {"residual": {"expansion_rate": n}, "microbatches": 8, "profile": "made-up"} | fields
    return make_plan({"model": "mhc-9b", "layout": {"pp": 2, "ep": 4}, "schedule": "1f1b"} | fields)


def made(
    n: int = 4, row: str = "row", profile: Profile | None = None, set_: str = "pp2",
    **fields: object,
) -> Claim:  # fmt: skip
    profile = (profile or synthetic_profile()).model_copy(update={"name": "made-up"})
    return claim(plan_of(n, **fields), row, set_, profile)


def measured(of: Claim, factor: float = 1.0, **fields: object) -> Measurement:
    """A run that took ``factor`` times as long as was claimed."""
    programs = {
        name: ProgramMeasured(
            times={
                mode: Times(step_ns=round(s.step_ns * factor), spread_percent=0.1, steps=20,
                            issue_ns=1)
                for mode, s in program.steps.items()
            },
            losses=(2.0, 1.0), allocated_bytes=[b for b in program.peak_bytes for _ in range(4)],
            reserved_bytes=[2 * b for b in program.reserved_bytes for _ in range(4)],
            traced_step_ns=program.steps["captured"].step_ns, timeline=program.timeline,
        )
        for name, program in of.programs.items()
    }  # fmt: skip
    line = {
        "row": of.row, "prediction": of.digest, "measured": "2999-01-01T00:00:00+00:00",
        "command": "python run", "device": "made up", "versions": {}, "anchors": {},
        "programs": programs,
    }  # fmt: skip
    return Measurement.model_validate(line | fields)


# -- claims and errors


def test_a_claim_is_what_predict_says() -> None:
    plan, profile = plan_of(), synthetic_profile()
    found, prediction = made(), predict(plan, profile)
    assert found.programs[MHC].steps["issued"].step_ns == prediction.step.timeline.step_ns
    assert found.programs[BASELINE].steps["issued"].step_ns == prediction.baseline.timeline.step_ns
    assert found.programs[MHC].peak_bytes == tuple(prediction.step.memory.peak_bytes.sum(axis=1))
    assert found.programs[MHC].steps["captured"].step_ns <= prediction.step.timeline.step_ns


def test_anchors_foretell_a_slower_machine() -> None:
    """Ops of one resource 5 % longer: the elasticity gives what playing them again gives."""
    found = made()
    for resource in ("memory", "matrix"):
        slower = made(profile=scaled(synthetic_profile(), resource, 1.05))
        step = found.programs[MHC].steps["captured"]
        again = slower.programs[MHC].steps["captured"].step_ns
        assert again > step.step_ns
        assert step.on({resource: 1.05}) == pytest.approx(again, rel=1e-3)


def test_errors_are_predicted_over_measured() -> None:
    of = made()
    row = Row(of, measured(of, 1.25, anchors={"block": 1.25}))
    assert row.mode == "captured"
    assert row.step_error_percent(anchored=False) == pytest.approx(-20)
    assert -20 < row.step_error_percent() < 1
    assert row.overhead_error_points(anchored=False) == pytest.approx(0, abs=1e-6)
    assert row.memory_error_percent("allocated") == 0
    assert row.memory_error_percent("reserved") == -50
    assert set(row.op_errors_percent().values()) == {0.0}
    assert row.bubble_error_points() == 0
    timeline = of.programs[MHC].timeline
    shares = [timeline.shares_percent(name) for name in timeline.breakdown_ns]
    assert [sum(of_rank) for of_rank in zip(*shares, strict=True)] == pytest.approx([100, 100])
    plain = made(1)
    assert Row(plain, measured(plain)).overhead_percent is None


def test_the_order_of_rows_is_judged_where_their_work_is_equal() -> None:
    slow, fast, other = (
        made(row="slow"), made(1, row="fast"), made(row="other", microbatches=16),
    )  # fmt: skip
    right = [Row(c, measured(c)) for c in (slow, fast, other)]
    assert misordered(right) == ([], [("slow", "fast")])
    wrong = [Row(fast, measured(fast, 3.0)), Row(slow, measured(slow))]
    assert misordered(wrong)[0] == [("fast", "slow")]


def test_the_page_has_every_row_and_every_claim() -> None:
    ran, waits = made(row="ran"), made(2, row="waits")
    page = "\n".join(page_lines([ran, waits], [Row(ran, measured(ran, 1.1))]))
    assert "| ran |" in page
    assert "-9.09 %" in page
    assert "Claimed, not run yet: 1" in page
    assert "| waits |" in page


def test_the_newest_measurement_of_a_row_comes_first_and_alone_is_judged() -> None:
    of = made(row="again")
    old, new = Row(of, measured(of, 2.0)), Row(of, measured(of, 1.01))
    assert newest([old, new]) == [new]
    page = "\n".join(page_lines([of], [old, new]))
    today, earlier = page.split("## Older measurements: 1\n")
    assert (today.count("| again |"), earlier.count("| again |")) == (2, 1)  # also in its waits
    assert "| step, worst error | 0.99 of 6 %: held |" in today
    assert "-50.00 %" in earlier


def test_limits_are_held_or_missed() -> None:
    of, plain = made(row="mhc"), made(1, row="plain")
    rows = [Row(of, measured(of, 1.1)), Row(plain, measured(plain))]
    assert bars("pp2", rows) == [
        "4.55 of 3 %: **missed**", "9.09 of 6 %: **missed**", "0.00 of 1 points: held",
        "0.00 of 1 %: held", "50.00 of 3 %: **missed**", "1 of 1: held",
    ]  # fmt: skip
    assert bars("ep2", rows)[:2] == ["4.55 of 5 %: held", "9.09 %"]
    assert "ablation" not in LIMITS


def test_rows_of_an_ablation_are_compared_with_the_base_of_their_run() -> None:
    names = ("ablation-base", "other", "alone")
    claims = {name: made(row=name, set_="ablation") for name in names}
    rows = [
        Row(claims[name], measured(claims[name], factor, command=run, anchors=anchors))
        for name, factor, run, anchors in (
            ("ablation-base", 1.0, "first", {"block": 1.01}),
            ("other", 1.2, "first, once more", {"block": 1.01}),
            ("ablation-base", 3.0, "second", {"block": 1.02}), ("alone", 1.0, "third", {}),
        )
    ]  # fmt: skip
    page = "\n".join(page_lines(list(claims.values()), rows))
    _, compared = page.split("| against `ablation-base` of the same run | measured | predicted |")
    assert compared.split("\n\n")[0].splitlines()[2:] == ["| other | +20.0 % | +0.0 % |"]


def test_the_shipped_page_is_current() -> None:
    page = "\n".join(page_lines(shipped_claims(), shipped_rows()))
    assert PAGE.read_text(encoding="utf-8") == page, "python benchmarks/closed_loop_report.py"


def test_the_readme_says_how_far_off_the_newest_rows_are() -> None:
    """The profile alone first: nobody has measured the machine that a reader has."""
    rows = rows_that_judge(shipped_rows())
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(rows)} training steps of a small model on two H100s" in said
    for anchored in (False, True):
        errors = [abs(row.step_error_percent(anchored=anchored)) for row in rows]
        assert f"off by {fmean(errors):.1f} % on average and {max(errors):.1f} % at worst" in said
    for name, where in (("pp2", "in pipelines"), ("ep2", "where experts' traffic overlaps")):
        points = [
            abs(p)
            for row in rows
            if row.claim.set == name
            and (p := row.overhead_error_points(anchored=False)) is not None
        ]
        assert f"up to {max(points):.1f} points {where}" in said.replace(" of the step", "")


# -- files


def test_lines_are_read_back_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    path, of = tmp_path / "claims.jsonl", made()
    append_lines(path, [of])
    with path.open("a") as file:
        file.write('{"row": "cut o')
    assert read_lines(path, Claim) == [of]
    append_lines(path, [of])
    assert read_lines(path, Claim) == [of, of]
    assert read_lines(tmp_path / "none.jsonl", Claim) == []


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    path.write_text('{"row": 1}\n')
    with pytest.raises(ProfileError, match=r"claims.jsonl: line 1: row"):
        read_lines(path, Claim)


def test_a_measurement_without_a_claim_is_refused() -> None:
    of = made()
    with pytest.raises(ProfileError, match=r"row row: prediction .* is not there"):
        joined([measured(of, prediction="0" * 64)], [of])


# -- who was first


def git(root: Path, *words: str) -> None:
    names = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *names, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    data = tmp_path / "profiles" / "data"
    data.mkdir(parents=True)
    profile = synthetic_profile().model_copy(update={"name": "made-up"})
    (data / "made-up.json").write_text(profile_text(profile))
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "profile")
    return tmp_path


def commit(root: Path, *lines: Claim | Measurement) -> None:
    for line in lines:
        name = "predictions" if isinstance(line, Claim) else "accuracy"
        append_lines(root / "profiles" / "data" / f"{name}.jsonl", [line])
    git(root, "add", ".")
    git(root, "commit", "-qm", "lines")


def test_a_claim_committed_first_makes_a_blind_row(repository: Path) -> None:
    of = made()
    found = measured(of)
    commit(repository, of)
    commit(repository, found)
    assert why_not_blind(repository, Row(of, found)) == ""


def test_git_shows_who_was_not_first(repository: Path) -> None:
    together, late, unclaimed = made(row="together"), made(row="late"), made(row="unclaimed")
    rows = {c.row: Row(c, measured(c)) for c in (together, late, unclaimed)}
    commit(repository, together, rows["together"].measured)
    commit(repository, rows["late"].measured)
    commit(repository, late)
    reasons = {name: why_not_blind(repository, row) for name, row in rows.items()}
    assert reasons == {
        "together": "the claim was not committed before the measurement",
        "late": "the claim was not committed before the measurement",
        "unclaimed": "the claim is not committed",
    }
    early = Row(together, measured(together, measured="1999-01-01T00:00:00+00:00"))
    assert why_not_blind(repository, early) == "claimed after it ran"


def test_a_profile_that_was_not_committed_makes_no_blind_row(repository: Path) -> None:
    of = made(profile=scaled(synthetic_profile(), "memory", 1.5))
    commit(repository, of)
    found = measured(of)
    commit(repository, found)
    reason = "claimed with another profile than the committed one"
    assert why_not_blind(repository, Row(of, found)) == reason


def test_shipped_rows_are_measurements_beside_their_claims() -> None:
    runs = read_lines(ROOT / "profiles/data/accuracy.jsonl", Measurement)
    assert list(shipped_rows()) == joined(runs, shipped_claims())


def test_shipped_rows_were_claimed_before_they_ran() -> None:
    assert len({c.digest for c in shipped_claims()}) == len(shipped_claims())
    if not (ROOT / ".git").exists():
        pytest.skip("no git history here")
    for row in shipped_rows():
        assert why_not_blind(ROOT, row) == "", row.claim.row
