"""From capture rows to priced pairs: what is read, what is held out, and that the fit finds back
what made the data."""

from __future__ import annotations

from typing import Any

import pytest

from mhcplan.profiles.contention import Parameters
from mhcplan.profiles.contention_fit import (
    FIXED_NS,
    HOLDOUT,
    Pair,
    Pairs,
    Trait,
    ctas_per_sm,
    errors,
    fit,
    kernels_of,
    losses,
    predict,
)
from mhcplan.profiles.contention_rows import (
    contention_model,
    contention_ops,
    contention_pairs,
    preemptible_times,
    priority_latencies,
    traffic_traits,
)

Row = dict[str, Any]
# name, [grid, threads, registers, shared bytes], ns, bytes: as measured on an H100
CASES = {
    "gemm": ("gemm_kernel", [768, 256, 200, 196608], 317_000, 100_000_000),
    "library": ("nvjet_coop", [132, 384, 168, 213188], 172_000, 100_000_000),
    "add": ("elementwise", [32768, 128, 34, 0], 67_500, 200_000_000),
}


def _side(period: float, queue: float = 1_700, ops: int = 20) -> Row:
    return {"ops": ops, "period_ns": round(period), "median_ns": round(period),
            "queue_ns": round(queue), "kernel_ns": round(period - queue)}  # fmt: skip


def _traffic(size: int, ctas: int, *, high: bool, pattern: str = "send_recv_both") -> Row:
    return {"pattern": pattern, "num_bytes": size, "ctas": ctas, "high_priority": high,
            "busy": "all"}  # fmt: skip


def _rows(compute: float = 1.25, traffic: float = 2.0) -> dict[str, Row]:
    """A capture of three kernels beside four classes of traffic, the same slowdowns everywhere."""
    none = {"ops": 0}
    rows: dict[str, Row] = {}
    for name, (kernel, launch, length, moved) in CASES.items():
        rows[f"{name}|-"] = {
            "pair": f"{name}|-", "compute": name, "traffic": None, "family": name, "late": [],
            "hbm_bytes": moved,
            "kernels": [{"name": "Memset", "launch": [0, 0, 0, 0], "duration_ns": 800},
                        {"name": kernel, "launch": launch, "duration_ns": length}],
            "A": {"compute": [_side(length + 2_000)] * 2, "traffic": [none, none]},
        }  # fmt: skip
    for size, alone in ((8 << 20, 66_000), (64 << 20, 450_000)):
        for high in (False, True):
            item = _traffic(size, 8, high=high)
            text = f"send_recv_both {size} ctas=8 {'high' if high else 'equal'} busy=all"
            rows[f"-|{text}"] = {
                "pair": f"-|{text}", "compute": "-", "traffic": item, "late": [],
                "A": {"compute": [none, none], "traffic": [_side(alone + 1_700)] * 2},
            }  # fmt: skip
            for name, (_, _, length, _) in CASES.items():
                run = {
                    "compute": [_side(compute * (length + 2_000))] * 2,
                    "traffic": [_side(traffic * (alone + 1_700), 30_000)] * 2,
                }
                rows[f"{name}|{text}"] = {
                    "pair": f"{name}|{text}", "compute": name, "traffic": item, "late": [],
                    "traffic_launch": [8, 640, 96, 103808], "A": run, "B": run,
                }  # fmt: skip
    return rows


def test_occupancy_follows_from_the_launch() -> None:
    assert ctas_per_sm([132, 384, 168, 213188]) == 1  # shared memory
    assert ctas_per_sm([10240, 128, 64, 0]) == 8  # registers
    assert ctas_per_sm([100, 1024, 16, 0]) == 2  # threads
    assert ctas_per_sm([100, 32, 16, 0]) == 32  # CTAs


def test_kernels_of_a_row_leave_out_memsets_and_take_traits_by_name() -> None:
    row = _rows()["library|-"]
    (kernel,) = kernels_of(row, {"nvjet": Trait(512, dealt=False)}, 132)
    assert (kernel.ctas, kernel.ctas_per_sm, kernel.persistent) == (132, 1, True)
    assert (kernel.pieces, kernel.dealt) == (512, False)
    assert kernel.hbm_bytes == pytest.approx(100_000_000, rel=0.01)


def test_slowdowns_are_means_over_runs_and_ranks_that_had_both_sides() -> None:
    rows = _rows()
    source = Pairs(rows)
    pair = rows["gemm|send_recv_both 8388608 ctas=8 equal busy=all"]
    assert source.measured(pair) == pytest.approx((1.25, 2.0), rel=1e-4)
    assert source.measured({**pair, "late": ["A0"]}) == source.measured(pair, "B")
    assert source.measured({**pair, "late": ["A0", "B1"]}) is None
    empty = {**pair["A"], "compute": [{"ops": 0}] * 2}
    assert source.measured({**pair, "A": empty, "B": empty}) is None
    assert source.measured({**pair, "B": empty}, "A") == source.measured(pair)
    assert source.measured({**pair, "B": empty}, "B") is None
    message = source.message(pair)
    assert (message.ctas, message.gap_ns, message.alone_ns) == (8, 1_700, 66_000)
    assert not message.eager  # both directions: each end needs the other


def test_an_op_is_held_against_its_own_time_just_before_the_traffic() -> None:
    rows = _rows()
    pair = rows["gemm|send_recv_both 8388608 ctas=8 equal busy=all"]
    alone = Pairs(rows).op_ns("gemm")[0]
    slower = {**pair["A"], "before": [_side(1.1 * alone)] * 2}  # the clock has fallen since
    compute, traffic = Pairs(rows).measured({**pair, "A": slower, "B": slower}) or (0.0, 0.0)
    assert (compute, traffic) == pytest.approx((1.25 / 1.1, 2.0), rel=1e-3)
    unknown = {**pair["A"], "before": [{"ops": 0}] * 2}
    assert Pairs(rows).measured({**pair, "A": unknown, "B": unknown}) == pytest.approx(
        (1.25, 2.0), rel=1e-4
    )


def test_a_send_that_fits_the_buffers_is_eager() -> None:
    for size, eager in ((8 << 20, True), (64 << 20, False)):
        item = _traffic(size, 8, high=False, pattern="send_recv")
        text = f"send_recv {size} ctas=8 equal busy=all"
        rows = {f"-|{text}": {
            "traffic": item, "A": {"traffic": [_side(70_000)] * 2}, "compute": "-",
        }}  # fmt: skip
        row = {"traffic": item, "traffic_launch": [8, 640, 96, 103808], "compute": "gemm"}
        assert Pairs(rows).message(row).eager is eager


def test_one_pair_in_five_is_held_out_whatever_the_others_are() -> None:
    names = [f"pair {i}" for i in range(500)]
    message = Pairs(_rows()).message(_rows()["gemm|send_recv_both 8388608 ctas=8 equal busy=all"])
    held = [Pair(n, "gemm", (), 1.0, message, (1.0, 1.0)).held_out for n in names]
    assert 0.8 * 500 / HOLDOUT < sum(held) < 1.2 * 500 / HOLDOUT


def test_the_fit_finds_the_parameters_that_made_the_data() -> None:
    truth = Parameters(busy_delay=0.2, memory_delay=2.5)
    made = [
        Pair(p.name, p.compute, p.kernels, p.op_ns, p.message, predict(p, truth))
        for p in Pairs(_rows()).pairs({})
    ]
    choices = {"busy_delay": (0.2, 0.6), "memory_delay": (1.0, 2.5)}
    start = Parameters(busy_delay=0.6, memory_delay=1.0)
    found = fit(made, start, choices)
    assert (found.busy_delay, found.memory_delay) == (0.2, 2.5)
    assert sum(losses(made, found)) == 0.0 < sum(losses(made, start))
    assert fit(made, start, choices, workers=2) == found
    assert all(error == (0.0, 0.0) for _, *pair in errors(made, found) for error in [tuple(pair)])
    with pytest.raises(ValueError, match="held out"):
        fit([p for p in made if p.held_out], start)


def test_rows_of_a_profile_come_from_rows_of_a_capture() -> None:
    source = Pairs(_rows())
    ops = {op.name: op for op in contention_ops(source)}
    assert set(ops) == set(CASES)
    (segment,) = ops["library"].segments
    assert (segment.name, segment.ctas, segment.persistent) == ("nvjet_coop", 132, True)
    pairs = contention_pairs(source)
    assert len(pairs) == 12
    assert {(p.compute_slowdown, p.traffic_slowdown, p.queue_ns) for p in pairs} == {
        (1.25, 2.0, 30_000)
    }
    errors = [(0.1, 0.2), (0.3, 0.4)]
    model = contention_model(Parameters(), {"nvjet": Trait(512)}, (), errors)
    assert (model.held_out_pairs, model.compute_error_percent) == (2, 20.0)
    assert model.parameters == {k: float(v) for k, v in vars(Parameters()).items()}


def test_reductions_have_the_rate_of_few_ctas_alone_or_that_of_all_to_all() -> None:
    rows = _rows()
    for pattern in ("send_recv", "send_recv_both", "all_to_all"):
        usual = _traffic(8 << 20, 0, high=False, pattern=pattern)
        rows[pattern] = {"compute": "-", "traffic": usual, "traffic_launch": [16, 640, 96, 0]}
    assumed = {row.pattern: row for row in traffic_traits(Pairs(rows))}
    assert assumed["all_gather"].cta_bytes_per_ns == assumed["all_to_all"].cta_bytes_per_ns
    for ctas, launched in ((0, 24), (2, 2), (4, 4), (8, 8)):
        body_ns = (64 << 20) / (30.0 * ctas) if ctas in (2, 4) else 400_000.0  # 8: the link limits
        item = _traffic(64 << 20, ctas, high=False, pattern="all_gather")
        rows[f"-|all_gather {64 << 20} ctas={ctas} equal busy=all"] = {
            "compute": "-", "traffic": item, "traffic_launch": [launched, 640, 96, 0],
            "A": {"traffic": [_side(FIXED_NS + body_ns)] * 2},
        }  # fmt: skip
    found = {row.pattern: row for row in traffic_traits(Pairs(rows))}
    gather = found["all_gather"]
    assert (gather.cta_bytes_per_ns, gather.ctas) == (30.0, ((0, 24),))
    assert gather.limited == ((2, ((0, 2),)), (4, ((0, 4),)), (8, ((0, 8),)))
    assert gather.source == "assumed"
    assert "memory" in gather.citation
    assert "SMs" not in gather.citation
    assert found["all_reduce"] == assumed["all_reduce"]


def test_preemptible_attention_is_compared_with_the_persistent_kernel_that_it_replaces() -> None:
    def alone(period_ns: int, *kernels: tuple[str, int]) -> dict[str, Any]:
        return {
            "A": {"compute": [{"median_ns": period_ns}, {"median_ns": period_ns}]},
            "kernels": [{"name": name, "duration_ns": ns} for name, ns in kernels],
        }

    rows = {
        "attention_cudnn_I|-": alone(660, ("dot_do_o", 60), ("cudnn_sdpa_bprop", 600)),
        "attention_flash_I|-": alone(1360, ("copy", 60), ("flash_bwd", 1300)),
        "attention_cudnn_F|-": alone(200, ("cudnn_sdpa_fprop", 200)),
    }
    found = preemptible_times(Pairs(rows), ["sdpa_bprop", "sdpa_fprop", "nvjet"])
    # the kernels around it stay: 60 + 1300 / 600 would count them twice
    assert found == {"sdpa_bprop": pytest.approx(1 + 700 / 600)}


def test_latencies_are_medians_of_trials() -> None:
    trial = {"case": "latency", "resident": "gemm", "level": "high", "probe": "small"}
    lines = [
        {"connections": 8, "priority": {**trial, "start_ns": start, "end_ns": start + 5}}
        for start in (10, 30, 20)
    ]
    lines += [{"connections": 8, "priority": "done"}]
    (found,) = priority_latencies(lines)
    assert (found.start_ns, found.end_ns, found.ctas, found.samples) == (20, 25, 16, 3)
