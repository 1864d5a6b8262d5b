"""Parts of a rank's memory that decide plans: receive buffers, coefficients, what W waits with."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mhcplan.planner.lowering.lower import lower
from mhcplan.planner.plan.spec import PlanSpec, make_plan, schedule_of
from mhcplan.planner.predict import predict
from mhcplan.profiles.vocabulary import FP32, OpKey, parse_key
from mhcplan.sim.program import COMPONENTS, Program
from tests.support.synthetic_profile import synthetic_profile

COMMUNICATION = COMPONENTS.index("communication")


def plan(**changes: object) -> PlanSpec:
    base: dict[str, object] = {
        "model": "mhc-9b", "layout": {"pp": 4, "ep": 8}, "microbatches": 8,
    }  # fmt: skip
    return make_plan(base | changes)


# -- receive buffers


def test_torch_holds_a_buffer_for_every_microbatch() -> None:
    """n = 4, 4096 tokens, C = 7168, bf16, 40 microbatches, two inner stages a rank: 37.6 GB."""
    large = make_plan({
        "model": "deepseek-v3", "layout": {"pp": 16, "ep": 64}, "microbatches": 40,
        "schedule": "dualpipev", "receive_buffers": "per_microbatch",
    })  # fmt: skip
    static = lower(large, 4).static_bytes[:, COMMUNICATION]
    state_bytes = 4 * 4096 * 7168 * 2
    assert static[1] == 4 * 40 * state_bytes == 37_580_963_840
    # the first rank holds the first stage, which receives no input, and the last one
    assert static[0] == 2 * 40 * state_bytes
    assert static[-1] == static[1], "torch makes buffers where neighbours share a rank, too"


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zbv", "dualpipe"])
def test_buffers_of_the_whole_step_replace_those_of_single_receives(schedule: str) -> None:
    pooled, held = (
        predict(plan(schedule=schedule, receive_buffers=name), synthetic_profile()).step
        for name in ("pooled", "per_microbatch")
    )
    assert held.timeline.step_ns == pooled.timeline.step_ns
    assert not pooled.program.static_bytes[:, COMMUNICATION].any()
    table = schedule_of(plan(schedule=schedule))
    received = Counter(
        rank for rank, row in enumerate(table.actions) for action in row for part in action.parts
        for inner in (part.kind == "F" and part.stage > 0,
                      part.kind in "IB" and part.stage < table.num_stages - 1) if inner
    )  # fmt: skip
    state_bytes = plan().tokens * 4 * 1920 * 2
    for rank, buffers in received.items():
        assert held.program.static_bytes[rank, COMMUNICATION] == buffers * state_bytes
    sizes = [
        {int(program.buffer_bytes[b]) for op in program if op.kind == "pp_recv" for b in op.allocs}
        for program in (pooled.program, held.program)
    ]
    assert not sizes[1] - {0}
    peaks = [step.memory.peak_bytes.sum(axis=1) for step in (pooled, held)]
    assert (peaks[1] > peaks[0]).all()


# -- coefficients


@pytest.mark.parametrize("n", [2, 4, 8])
def test_coefficients_stay_from_forward_to_backward(n: int) -> None:
    """n^2 + 2n of a token and site, and the projection with 1/r behind them, all in fp32."""
    program = lower(plan(residual={"expansion_rate": n}), 4)
    size = (2 * (n * n + 2 * n) + 1) * FP32 * 4096
    freed = freed_by(program)
    backward = {
        (op.site, op.microbatch): op.index
        for op in program
        if op.kind == "mhc_pre" and op.pass_ == "B"
    }
    assert len(backward) == 36 * 8  # every site of the model, every microbatch
    for op in program:
        if op.kind == "mhc_pre" and op.pass_ == "F":
            (stored,) = (b for b in op.writes if program.buffer_bytes[b] == size)
            assert freed[stored] >= backward[op.site, op.microbatch]


# -- what W waits with


@pytest.mark.parametrize("residual", ["mhc", "plain"])
def test_what_a_delayed_w_needs_stays_until_it_ran(residual: str) -> None:
    program = lower(plan(schedule="zb1p", residual={"kind": residual}), 4)
    made, freed = writers(program), freed_by(program)
    deferred = 0
    for i in np.flatnonzero(program.pass_ == ord("W")):
        for buffer in program.reads[i].tolist():
            assert freed[buffer] >= i, "freed before W read it"
            deferred += int(program.buffer_bytes[buffer]) * (
                program.pass_[made[buffer]] == ord("I")
            )
    assert deferred > 0


def test_w_of_experts_waits_with_what_a_swiglu_leaves_it() -> None:
    """Of every row, beside the input that F kept: the gradients of gate, up and output, and their
    product, in bf16; a GPU holds a part of the experts and gets, balanced, its tokens' copies."""
    small = plan(schedule="zb1p")
    program, moe = lower(small, 4), small.model.moe
    assert moe is not None
    rows, hidden = small.tokens * moe.top_k, small.model.hidden_size
    made, sizes = writers(program), set[int]()
    for op in (op for op in program if op.kind == "experts" and op.pass_ == "W"):
        key = parse_key(program.cost_keys[program.cost[op.index]])
        assert isinstance(key, OpKey)
        shape = dict(key.shape)
        assert (shape["experts"], shape["rows"]) == (moe.num_experts // 8, rows)
        of_i = (b for b in op.reads if program.pass_[made[b]] == ord("I"))
        sizes |= {int(program.buffer_bytes[buffer]) for buffer in of_i}
    assert sizes == {rows * (3 * moe.ffn_dim + hidden) * 2}


def test_delaying_w_holds_more_than_running_it_at_once() -> None:
    """On the last rank ZB1P lags P-1 W behind, where 1F1B holds one chunk."""
    at_once, delayed = (
        predict(plan(schedule=name), synthetic_profile()).step for name in ("1f1b", "zb1p")
    )
    activations = COMPONENTS.index("activations")
    assert delayed.memory.peak_bytes[2, activations] > at_once.memory.peak_bytes[2, activations]


def writers(program: Program) -> dict[int, int]:
    """The first op that writes each buffer."""
    made: dict[int, int] = {}
    for op in range(program.num_ops):
        for buffer in program.writes[op].tolist():
            made.setdefault(buffer, op)
    return made


def freed_by(program: Program) -> dict[int, int]:
    """The op that frees each buffer."""
    return {b: op for op in range(program.num_ops) for b in program.frees[op].tolist()}
