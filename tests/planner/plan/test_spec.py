"""PlanSpec: what is legal, what is refused and how, stages, digest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.planner.plan.spec import (
    MAX_CELLS,
    LayoutSpec,
    PlanSpec,
    ScheduleName,
    SpecError,
    make_plan,
    schedule_of,
    stage_blocks,
)
from mhcplan.planner.schedules.catalogue import SCHEDULES, ScheduleError, build_schedule
from mhcplan.profiles.presets import MODELS
from mhcplan.profiles.specs import ResidualSpec

PAPER = {"model": "mhc-27b"}


def test_defaults_are_those_of_the_command_line() -> None:
    plan = make_plan(PAPER)
    assert plan.model == MODELS["mhc-27b"]
    assert (plan.layout.pp, plan.layout.ep, plan.layout.dp, plan.layout.gpus) == (8, 8, 1, 64)
    assert (plan.microbatches, plan.micro_batch_size, plan.seq_len) == (64, 1, 4096)
    assert (plan.residual.kind, plan.residual.expansion_rate) == ("mhc", 4)
    assert plan.residual.recompute_block == "auto"
    assert (plan.schedule, plan.priority, plan.profile) == ("dualpipe", "post", "h100-sxm")
    assert (plan.p2p, plan.comm_streams, plan.engine) == ("eager", "two", "compiled")


def test_every_schedule_of_the_planner_is_a_value_of_the_field() -> None:
    assert set(SCHEDULES) == set(ScheduleName.__args__)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": {"pp": 7}}, "pp=7 must be even for dualpipe"),
        ({"microbatches": 14}, "microbatches=14 must be at least 16 for dualpipe with pp=8"),
        ({"microbatches": 65}, "microbatches=65 must be even for dualpipe"),
        ({"residual": {"expansion_rate": 0}}, "residual.expansion_rate=0 must be 1, 2, 4, 8 or 16"),
        ({"layout": {"ep": 7}}, "layout.ep=7 must divide the 72 experts of mhc-27b"),
        ({"layout": {"pp": 32}}, "layout.pp=32 makes 32 stages with dualpipe, more than the 30"),
        ({"layout": {"pp": 16}, "schedule": "zbv"}, "layout.pp=16 makes 32 stages with zbv"),
        ({"layout": {"pp": 0}}, "layout.pp=0 must be greater than or equal to 1"),
        ({"layout": {"pp": True}}, "layout.pp=True must be a valid integer"),
        ({"layout": {"blocks_per_stage": [4, 26]}}, "must be 8 numbers that sum to 30"),
        ({"seq_len": 100}, "seq_len=100 must be a multiple of 64"),
        (
            {"micro_batch_size": 4096},
            "micro_batch_size=4096 must be at most 1024 with seq_len=4096",
        ),
        ({"microbatches": MAX_CELLS}, f"must be at most {MAX_CELLS // 8} with layout.pp=8"),
        ({"schedule": "dualpip"}, "schedule='dualpip' must be '1f1b', 'interleaved-1f1b'"),
        ({"comm_streams": "one"}, "comm_streams=one needs p2p=grouped"),
        ({"p2p": "grouped", "schedule": "zb1p"}, "p2p=grouped goes with dualpipe and dualpipev"),
        ({"engine": "numpy"}, "engine='numpy' must be 'compiled' or 'simpy'"),
        ({"model": "mhc-28b"}, "model='mhc-28b' is unknown; did you mean mhc-27b"),
        ({"0\n0": {}}, "'0\\n0' is not a field of a plan"),
        ({"layuot": {}}, "layuot is not a field of a plan; did you mean layout"),
        ({"layout": {"tp": 2}}, "layout.tp is not a field of a plan: tensor parallelism"),
        ({"residual": {"recompute_block": "all"}}, "must be auto, none, stage or a number of"),
        ({"memory_limit_bytes": 80}, "memory_limit_bytes=80 must be a size of at least 1 MB"),
        ({"memory_limit_bytes": "80 parsecs"}, "memory_limit_bytes='80 parsecs' must be a size"),
    ],
)
def test_refusal_is_one_line_with_field_value_and_what_is_valid(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        make_plan(PAPER | changes)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_attention_of_an_unknown_kind_names_the_kinds() -> None:
    model = MODELS["mhc-27b"].model_dump() | {"attention": {"kind": "mqa", "num_heads": 8}}
    with pytest.raises(SpecError, match=r"model.attention.kind='mqa' must be gqa or mla"):
        make_plan({"model": model})


def test_model_is_needed() -> None:
    with pytest.raises(SpecError, match="model is missing"):
        make_plan({})


def test_dense_model_has_no_experts_to_split() -> None:
    dense = {
        "name": "dense", "num_blocks": 16, "hidden_size": 1024, "vocab_size": 32000,
        "dense_ffn_dim": 4096, "attention": {"kind": "gqa", "num_heads": 8, "num_kv_heads": 8},
    }  # fmt: skip
    with pytest.raises(SpecError, match=r"layout\.ep=8 must be 1: dense has no experts"):
        make_plan({"model": dense, "layout": {"ep": 8}})
    assert make_plan({"model": dense}).layout.ep == 1
    assert make_plan({"model": dense, "layout": {"dp": 8}}).layout.gpus == 64


@pytest.mark.parametrize("vocab_size", [10**12, 10**400])  # the latter fits no float
def test_model_too_large_to_count_is_refused(vocab_size: int) -> None:
    huge = MODELS["mhc-27b"].model_dump() | {"vocab_size": vocab_size}
    with pytest.raises(SpecError, match=r"has more than 1e\+13 parameters"):
        make_plan({"model": huge})


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    pp=st.integers(1, 12),
    microbatches=st.integers(1, 40),
)
def test_p_and_m_are_legal_exactly_where_the_schedule_can_be_built(
    name: str, pp: int, microbatches: int
) -> None:
    data = PAPER | {"schedule": name, "layout": {"pp": pp}, "microbatches": microbatches}
    try:
        schedule = build_schedule(name, pp, microbatches)
    except ScheduleError:
        with pytest.raises(SpecError):
            make_plan(data)
    else:
        assert schedule_of(make_plan(data)) == schedule


def test_stages_are_cut_at_block_borders_remainders_first() -> None:
    assert [len(s) for s in make_plan(PAPER).stages] == [4, 4, 4, 4, 4, 4, 3, 3]
    told = make_plan(PAPER | {"layout": {"blocks_per_stage": [3, 3, 4, 4, 4, 4, 4, 4]}})
    assert [len(s) for s in told.stages] == [3, 3, 4, 4, 4, 4, 4, 4]


@given(st.integers(1, 200), st.integers(1, 64))
def test_stages_hold_every_block_once_in_order(blocks: int, stages: int) -> None:
    cut = stage_blocks(blocks, stages)
    assert len(cut) == stages
    assert [b for stage in cut for b in stage] == list(range(blocks))
    sizes = [len(stage) for stage in cut]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_tokens_are_those_of_the_whole_job() -> None:
    plan = make_plan(PAPER | {"layout": {"dp": 2}, "micro_batch_size": 2})
    assert plan.tokens == 8192
    assert plan.tokens_per_step == 64 * 2 * 4096 * 8 * 2


def test_baseline_differs_in_the_residual_only() -> None:
    plan = make_plan(PAPER | {"priority": "all", "seq_len": 2048})
    baseline = plan.baseline()
    assert baseline.residual.is_plain
    assert baseline.model_dump(exclude={"residual"}) == plan.model_dump(exclude={"residual"})


def test_digest_tells_plans_apart_and_equal_plans_not() -> None:
    plan = make_plan(PAPER)
    written_out = PlanSpec.model_validate(plan.model_dump())
    assert written_out.digest() == plan.digest()
    assert make_plan(PAPER | {"seq_len": 2048}).digest() != plan.digest()
    assert len(plan.digest()) == 64


def test_plan_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_plan(PAPER).seq_len = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_says_what_it_decides() -> None:
    for spec in (PlanSpec, LayoutSpec, ResidualSpec):
        for name, field in spec.model_fields.items():
            assert field.description, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contention": "off", "comm_ctas": 8}, "comm_ctas=8 needs contention=on"),
        ({"contention": "off", "compute_sms": 112}, "compute_sms=112 needs contention=on"),
        ({"max_connections": 64}, "max_connections"),
        ({"comm_priority": "low"}, "comm_priority"),
    ],
)
def test_settings_of_a_shared_gpu_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_plan({"model": "mhc-3b"} | changes)
    assert make_plan({"model": "mhc-3b", "contention": "off"}).gpu is None
