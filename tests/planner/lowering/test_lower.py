"""From plans to programs: figure 4's order, what is sent, what is kept, and that n = 1 is free."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.lowering.recompute import (
    live_peak,
    paper_recompute_block,
    resolve_recompute_block,
    stored_elements,
)
from mhcplan.planner.plan.spec import PlanSpec, make_plan, schedule_of
from mhcplan.planner.schedules.catalogue import SCHEDULES, build_schedule
from mhcplan.profiles.parameters import stage_parameters
from mhcplan.profiles.vocabulary import parse_key
from mhcplan.sim.program import COMPONENTS, Program, match_transfers

TINY = {
    "name": "tiny",
    "num_blocks": 8,
    "hidden_size": 256,
    "vocab_size": 1024,
    "attention": {"kind": "mla", "num_heads": 4},
    "moe": {"num_experts": 8, "top_k": 2, "num_shared_experts": 1, "ffn_dim": 128},
}


def tiny_plan(**changes: object) -> PlanSpec:
    base: dict[str, object] = {
        "model": TINY,
        "layout": {"pp": 4, "ep": 2},
        "microbatches": 8,
        "seq_len": 128,
    }
    return make_plan(base | changes)


def box(program: Program, i: int) -> str:
    """The box of figure 4 that an op belongs to."""
    op = program[i]
    site = "A" if op.site % 2 == 0 else "M"
    direction = "F" if op.pass_ == "F" else "B"
    if op.category == "recompute":
        return "Recompute(B)"
    if op.kind in ("mhc_pre", "norm", "router") and op.pass_ in "FIB":
        return f"F_pre^{site}({direction})"
    if op.kind in ("mhc_post", "unpermute"):
        return f"F_post^{site}({direction})"
    if op.kind.startswith("attention") or op.kind == "router":
        return f"ATTN({'W' if op.pass_ == 'W' else direction})"
    if op.kind in ("experts", "shared_experts", "regroup"):
        return f"MLP({'W' if op.pass_ == 'W' else direction})"
    return f"{op.kind.upper()}({direction})"


def lane(program: Program, ops: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """Boxes of an action on some streams, in issue order, repeats folded."""
    boxes = [box(program, i) for i in ops if program[i].stream.name in names]
    return [b for i, b in enumerate(boxes) if i == 0 or boxes[i - 1] != b]


@pytest.fixture(scope="module")
def one_block_a_stage() -> Program:
    plan = make_plan({
        "model": TINY | {"num_blocks": 4},
        "layout": {"pp": 4, "ep": 2},
        "microbatches": 12,
        "seq_len": 128,
    })  # fmt: skip
    return lower(plan, recompute_block=2)


def pair_ops(program: Program, rank: int) -> np.ndarray:
    """Ops of the second overlapped pair of a rank: the steady state."""
    cells = [i for i, cell in enumerate(program.cells) if "OVERLAP" in cell]
    on_rank = np.flatnonzero((program.rank == rank) & np.isin(program.cell, cells))
    second = list(dict.fromkeys(program.cell[on_rank].tolist()))[1]
    return on_rank[program.cell[on_rank] == second]


def test_lanes_of_an_overlapped_pair_follow_figure_4(one_block_a_stage: Program) -> None:
    """One period of the figure, from the recompute at its right end (paper.md 4.2)."""
    ops = pair_ops(one_block_a_stage, rank=1)
    assert lane(one_block_a_stage, ops, ("compute",)) == [
        "Recompute(B)", "F_pre^A(F)", "ATTN(F)", "F_post^A(F)", "F_pre^M(F)",
        "MLP(B)", "MLP(W)", "MLP(F)",
        "F_pre^M(B)", "F_post^A(B)", "ATTN(B)", "F_pre^A(B)", "ATTN(W)",
    ]  # fmt: skip
    assert lane(one_block_a_stage, ops, ("high",)) == ["F_post^M(B)", "F_post^M(F)"]
    assert lane(one_block_a_stage, ops, ("ep",)) == [
        "COMBINE(B)", "DISPATCH(F)", "DISPATCH(B)", "COMBINE(F)"
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["mhc", "v3"])
def test_both_lanes_meet_twice_a_layer_as_in_deepseek_v3(order: str) -> None:
    """DeepSeek-V3's figure 4 draws two barriers; what the boxes read implies them in both orders.

    ``v3`` has F_post^M(F) with the attention after it, behind ATTN(W).
    """
    plan = tiny_plan(
        model=TINY | {"num_blocks": 4}, microbatches=12, overlap_order=order, priority="none"
    )
    program = lower(plan, 2)
    ops = pair_ops(program, rank=1)
    boxes = lane(program, ops, ("compute",))
    assert (boxes.index("ATTN(W)") < boxes.index("F_post^M(F)")) == (order == "v3")
    before = ordered_before(program)
    last = {box(program, i): int(i) for i in ops}
    first = {box(program, i): int(i) for i in ops[::-1]}
    barriers = (  # but for MLP(B) of shared experts, which no traffic reaches: it runs ahead
        (("ATTN(F)", "COMBINE(B)"), ("MLP(W)", "DISPATCH(F)")),
        (("MLP(F)", "DISPATCH(B)"), ("ATTN(B)", "COMBINE(F)")),
    )
    for above, below in barriers:
        for early in above:
            for late in below:
                assert before[first[late]] >> last[early] & 1, (early, late)


def test_recompute_needs_nothing_that_arrives_by_pipeline(one_block_a_stage: Program) -> None:
    program = one_block_a_stage
    names = {program.kinds.index(k) for k in ("mhc_recompute",)}
    found = np.flatnonzero(np.isin(program.kind, list(names)))
    assert len(found)
    gradients = {
        buffer
        for i in np.flatnonzero(program.kind == program.kinds.index("pp_recv"))
        if chr(program.pass_[i]) == "I"
        for buffer in program.writes[i].tolist()
    }
    assert gradients
    assert all(gradients.isdisjoint(program.reads[i].tolist()) for i in found)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_pipeline_messages_are_exactly_n_times_larger(n: int) -> None:
    plan = tiny_plan(residual={"expansion_rate": n})
    mhc, plain = lower(plan, 2), lower(plan.baseline(), None)
    sizes = [np.unique(p.payload_bytes[p.peer >= 0]) for p in (mhc, plain)]
    assert sizes[0].tolist() == [n * size for size in sizes[1].tolist()]
    assert sum(mhc.peer >= 0) == sum(plain.peer >= 0)


def test_n_1_is_the_plain_residual() -> None:
    one = tiny_plan(residual={"expansion_rate": 1})
    mhc, plain = lower(one, resolve_recompute_block(one)), lower(one.baseline(), None)
    assert mhc.cost_keys == plain.cost_keys
    for column in ("kind", "cost", "stream", "payload_bytes", "buffer_bytes", "static_bytes"):
        assert np.array_equal(getattr(mhc, column), getattr(plain, column)), column


PLANS = st.fixed_dictionaries({
    "schedule": st.sampled_from(sorted(SCHEDULES)),
    "pp": st.sampled_from([1, 2, 4]),
    "ep": st.sampled_from([1, 2]),
    "dp": st.sampled_from([1, 2]),
    "microbatches": st.sampled_from([8, 12]),
    "priority": st.sampled_from(["none", "post", "recompute", "all"]),
    "kind": st.sampled_from(["mhc", "hc", "plain"]),
    "block": st.sampled_from(["none", "stage", 1, 3]),
    "p2p": st.sampled_from(["eager", "grouped"]),
    "recompute_layers": st.sampled_from(["none", "selective", "full"]),
    "num_dense_blocks": st.sampled_from([0, 1, 8]),
})  # fmt: skip


def drawn_plan(drawn: dict[str, object]) -> PlanSpec | None:
    dense = drawn["num_dense_blocks"]
    model = TINY | {
        "num_blocks": 8,
        "num_dense_blocks": dense,
        "dense_ffn_dim": 512 if dense else None,
    }
    residual = {"kind": drawn["kind"], "recompute_block": drawn["block"]}
    try:
        return make_plan({
            "model": model, "residual": residual, "seq_len": 128,
            "layout": {k: drawn[k] for k in ("pp", "ep", "dp")},
            **{k: drawn[k] for k in ("schedule", "microbatches", "priority", "p2p")},
            "recompute_layers": drawn["recompute_layers"],
        })  # fmt: skip
    except ValueError:
        return None  # P odd for dualpipe and the like: test_spec has those


@settings(max_examples=40, deadline=None)
@given(PLANS)
@example(
    {
        "schedule": "dualpipe",
        "pp": 2,
        "ep": 1,
        "dp": 1,
        "microbatches": 8,
        "priority": "recompute",
        "kind": "mhc",
        "block": 1,
        "p2p": "eager",
        "recompute_layers": "none",
        "num_dense_blocks": 0,
    }
)  # W freed what the release of its I frees
def test_every_legal_plan_lowers_to_a_balanced_program(drawn: dict[str, object]) -> None:
    plan = drawn_plan(drawn)
    if plan is None:
        return
    program = lower(plan, resolve_recompute_block(plan))
    match_transfers(program)
    for number in np.flatnonzero(program.peer >= 0):
        assert program.groups[program.group[number]].name.startswith("pp")
    allocated, freed = np.sort(program.allocs.values), np.sort(program.frees.values)
    assert np.array_equal(allocated, np.unique(allocated)), "a buffer is allocated twice"
    assert np.array_equal(allocated, freed), "memory does not end where it began"
    backward = program.recorder[program.waits.values] >= program.waits.owners
    same_rank = (
        program.rank[program.recorder[program.waits.values]] == program.rank[program.waits.owners]
    )
    assert not backward.any()
    assert same_rank.all()
    for text in program.cost_keys:
        parse_key(text)


@settings(max_examples=40, deadline=None)
@given(PLANS)
def test_messages_of_a_flow_meet_in_order(drawn: dict[str, object]) -> None:
    plan = drawn_plan(drawn)
    if plan is None:
        return
    program = lower(plan, resolve_recompute_block(plan))
    meeting = match_transfers(program)
    sends = np.flatnonzero((program.peer >= 0) & program.is_send)
    receives = np.flatnonzero((program.peer >= 0) & ~program.is_send)
    receives = receives[np.argsort(meeting[receives])]
    sends = sends[np.argsort(meeting[sends])]
    assert np.array_equal(program.microbatch[sends], program.microbatch[receives])
    forward = program.pass_[sends] == ord("F")
    hop = program.stage[receives] - program.stage[sends]
    assert np.array_equal(hop, np.where(forward, 1, -1))


def test_equation_20_of_the_paper() -> None:
    """paper.md 2.4: L = 60 sites, n = 4."""
    assert round(paper_recompute_block(4, 60), 2) == 6.32
    totals = {r: stored_elements(4, r, [(60, 1)]) + 60 for r in range(1, 61)}
    assert min(totals, key=lambda r: totals[r]) == 6
    assert totals[6] == 136


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_blocks", [8, 13, 30])
@pytest.mark.parametrize("n", [2, 4, 16])
def test_auto_is_the_block_of_least_memory_of_1f1bs_live_chunks(
    num_ranks: int, num_blocks: int, n: int
) -> None:
    """Equation 20 where rank r of 1F1B keeps P - r chunks, and some ranks have a block more."""
    plan = tiny_plan(
        model=TINY | {"num_blocks": num_blocks}, schedule="1f1b", residual={"expansion_rate": n},
        layout={"pp": num_ranks, "ep": 1},
    )  # fmt: skip
    sites = [2 * (num_blocks // num_ranks + (r < num_blocks % num_ranks)) for r in range(num_ranks)]

    def elements(block: int) -> int:
        return max(
            n * -(-sites[r] // block) * (num_ranks - r) + (n + 2) * min(block, sites[r])
            for r in range(num_ranks)
        )

    assert resolve_recompute_block(plan) == min(range(1, sites[0] + 1), key=elements)


@pytest.mark.parametrize("num_ranks", [4, 8, 16])
def test_dualpipe_holds_p_plus_1_chunks_on_every_rank(num_ranks: int) -> None:
    plan = make_plan({
        "model": TINY | {"num_blocks": 16}, "microbatches": 40,
        "layout": {"pp": num_ranks, "ep": 1}, "seq_len": 128,
    })  # fmt: skip
    schedule = schedule_of(plan)
    peaks = [sum(live_peak(schedule, rank).values()) for rank in range(num_ranks)]
    assert peaks == [num_ranks + 1] * num_ranks


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        (name, num_ranks)
        for name in SCHEDULES
        for num_ranks in (1, 2, 3, 4, 6, 8)
        if name != "dualpipe" or num_ranks % 2 == 0  # its ranks mirror each other
    ],
)
def test_no_more_chunks_live_at_once_beyond_three_microbatches_a_rank(
    name: str, num_ranks: int
) -> None:
    def peaks(num_microbatches: int) -> list[dict[int, int]]:
        schedule = build_schedule(name, num_ranks, num_microbatches)
        return [live_peak(schedule, rank) for rank in range(num_ranks)]

    step = {"interleaved-1f1b": num_ranks, "dualpipe": 2}.get(name, 1)
    for more in range(step, 3 * num_ranks + step, step):
        assert peaks(3 * num_ranks + more) == peaks(3 * num_ranks)


def test_static_memory_is_what_a_gpu_holds_of_every_parameter() -> None:
    """bf16 weights 2 bytes, fp32 gradients 4; of its equal share, rounded up, AdamW's 12."""
    tiny = tiny_plan(schedule="1f1b", layout={"pp": 4, "ep": 2, "dp": 5})
    static = lower(tiny, 2).static_bytes
    for rank, blocks in enumerate(tiny.stages):
        counts = stage_parameters(tiny.model, tiny.residual, blocks)
        dense, experts = counts.total - counts.routed_experts, counts.routed_experts // 2
        own = math.ceil(dense / 10) + math.ceil(experts / 5)
        expected = {"parameters": 2 * (dense + experts), "gradients": 4 * (dense + experts),
                    "optimizer": 12 * own}  # fmt: skip
        assert experts % 5, "a share is rounded up"
        assert dict(zip(COMPONENTS, static[rank].tolist(), strict=True)) == (
            dict.fromkeys(COMPONENTS, 0) | expected
        )


def test_gradients_are_reduced_in_fp32_and_weights_gathered_in_bf16() -> None:
    """4 bytes an element out and 2 back, of the dense weights and of the experts' share."""
    tiny = tiny_plan(schedule="1f1b", layout={"pp": 4, "ep": 2, "dp": 3})
    program = lower(tiny, 2)
    for rank, blocks in enumerate(tiny.stages):
        counts = stage_parameters(tiny.model, tiny.residual, blocks)
        dense, experts = counts.total - counts.routed_experts, counts.routed_experts // 2
        for kind, each in (("grad_reduce", 4), ("param_gather", 2)):
            ops = np.flatnonzero((program.rank == rank)
                                 & (program.kind == program.kinds.index(kind)))  # fmt: skip
            moved = {program[i].stream.name: program[i] for i in ops}
            assert {name: op.payload_bytes for name, op in moved.items()} == {
                "dp": each * dense, "dp_experts": each * experts,
            }  # fmt: skip
            keys = [parse_key(op.cost_key) for op in moved.values()]
            assert [key.num_bytes for key in keys] == [each * dense, each * experts]
            assert [key.group_size for key in keys] == [6, 3]


def test_static_memory_counts_both_copies_of_dualpipe() -> None:
    one = lower(tiny_plan(schedule="1f1b", layout={"pp": 4, "ep": 1}), 2).static_bytes
    two = lower(tiny_plan(schedule="dualpipe", layout={"pp": 4, "ep": 1}), 2).static_bytes
    parameters, optimizer = COMPONENTS.index("parameters"), COMPONENTS.index("optimizer")
    assert two[:, parameters].sum() == 2 * one[:, parameters].sum()
    rounded_up = 2 * 2 * 4 * 12  # two parts, two stages, four ranks, 12 bytes a parameter
    assert abs(two[:, optimizer].sum() - one[:, optimizer].sum()) <= rounded_up


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipe"])
@pytest.mark.parametrize("priority", ["post", "all"])
def test_gradients_are_reduced_after_every_op_that_makes_them(schedule: str, priority: str) -> None:
    """grad_reduce touches no buffer of the Program, so only this order protects the gradients."""
    plan = tiny_plan(schedule=schedule, priority=priority, microbatches=12)
    program = lower(plan, resolve_recompute_block(plan))
    after = ordered_before(program)
    kinds = np.array([program.kinds[k] for k in program.kind])
    makes = np.isin(program.pass_, [ord("W"), ord("B")])
    for i in np.flatnonzero(kinds == "grad_reduce"):
        makers = np.flatnonzero(makes & (program.rank == program.rank[i])
                                & (program.stage == program.stage[i]))  # fmt: skip
        assert len(makers)
        assert all(after[i] >> int(m) & 1 for m in makers)


def ordered_before(program: Program) -> list[int]:
    """For every op a bit set of the ops of its rank that streams and events order before it."""
    before = [0] * program.num_ops
    for i in range(program.num_ops):
        sources = [int(program.previous_on_stream[i])]
        sources += [int(program.recorder[event]) for event in program.waits[i]]
        for source in sources:
            if source >= 0:
                before[i] |= before[source] | 1 << source
    return before
