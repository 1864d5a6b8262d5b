"""Write the rows of the closed loop: plan, Programs and predicted traces, before anything runs.

    python benchmarks/closed_loop_predict.py ROWS --set pair --profile h100-sxm

Each row is a folder: ``plan.json``, ``program.json`` and ``baseline.json`` (what runs),
``predicted.trace.json`` and ``predicted_baseline.trace.json`` and ``prediction.json`` (what is
claimed; its time stamp and the profile's digest make a row blind). ``anchor`` is a row of another
shape, which sets the scale of this machine against the profile's. Needs no GPU and no torch;
``--no-prediction`` writes only what is needed to run.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from mhcplan.planner.lowering import lower
from mhcplan.planner.recompute import resolve_recompute_block
from mhcplan.planner.spec import PlanSpec, make_plan
from mhcplan.sim.files import Trace, write_program, write_trace


def model(hidden: int, top_k: int = 4) -> dict[str, object]:
    """Eight blocks of the paper's kind, small enough for two copies beside their optimizers."""
    return {
        "name": f"closed-loop-{hidden}",
        "num_blocks": 8,
        "hidden_size": hidden,
        "vocab_size": 32_768,
        "attention": {"kind": "mla", "num_heads": hidden // 80},
        "moe": {
            "num_experts": 16, "top_k": top_k, "num_shared_experts": 2,
            "ffn_dim": 2 * hidden // 3 // 64 * 64,
        },
    }  # fmt: skip


def row(
    schedule: str, n: int, recompute: object, *, hidden: int = 1920, tokens: int = 2048,
    pp: int = 2, ep: int = 1, microbatches: int = 8, **fields: object,
) -> dict[str, object]:  # fmt: skip
    """A plan as ``make_plan`` takes it."""
    return {
        "model": model(hidden), "residual": {"expansion_rate": n, "recompute_block": recompute},
        "layout": {"pp": pp, "ep": ep}, "microbatches": microbatches, "seq_len": tokens,
        "schedule": schedule,
    } | fields  # fmt: skip


ANCHOR = row("1f1b", 4, 2, hidden=1536, tokens=3072, pp=1, microbatches=2) | {
    "model": model(1536) | {"num_blocks": 1}
}
# PP = 1 has no transfers: what one GPU can check of the runtime itself
SETS: dict[str, dict[str, dict[str, object]]] = {
    "one": {"pp1-n4": row("1f1b", 4, 2, pp=1, microbatches=4)},
    "pair": {
        "1f1b-n1": row("1f1b", 1, "none"),
        "1f1b-n4": row("1f1b", 4, "none"),
    },
    "two": {
        "1f1b-n2-L4": row("1f1b", 2, 4),
        "1f1b-n4-L2": row("1f1b", 4, 2, priority="none"),
        "zb1p-n4-L2": row("zb1p", 4, 2),
        "zb1p-n4-Lstage-2560": row("zb1p", 4, "stage", hidden=2560),
        "dualpipe-n4-L2": row("dualpipe", 4, 2, p2p="grouped"),
        "dualpipe-n4-Lstage-none": row("dualpipe", 4, "stage", priority="none"),
        "dualpipe-n2-L1-4096": row("dualpipe", 2, 1, tokens=4096, p2p="grouped"),
        "dualpipev-n4-L2": row("dualpipev", 4, 2, p2p="grouped"),
        "dualpipev-n1": row("dualpipev", 1, "none", p2p="grouped"),
        "dualpipev-n4-L4-2560": row("dualpipev", 4, 4, hidden=2560),
        "ep2-n1-none": row("dualpipev", 1, "none", pp=1, ep=2, priority="none"),
        "ep2-n1-post": row("dualpipev", 1, "none", pp=1, ep=2),
        "ep2-n4-none": row("dualpipev", 4, 2, pp=1, ep=2, priority="none"),
        "ep2-n4-post": row("dualpipev", 4, 2, pp=1, ep=2),
        "ep2-n4-all": row("dualpipev", 4, 2, pp=1, ep=2, priority="all"),
        "ep2-n4-recompute": row("dualpipev", 4, "stage", pp=1, ep=2, priority="recompute"),
    },
    "four": {
        f"{schedule}-n{n}-L{block}-M{m}": row(
            schedule, n, block, pp=4, microbatches=m, p2p="grouped" if m > 8 else "eager"
        )
        for schedule, n, block, m in (
            ("1f1b", 1, "none", 8), ("1f1b", 4, 2, 8), ("dualpipe", 1, "none", 8),
            ("dualpipe", 4, 1, 8), ("dualpipe", 4, "stage", 16), ("dualpipev", 4, 2, 8),
            ("dualpipev", 1, "none", 16),
        )
    } | {
        f"dualpipe-ep2-n{n}-{priority}": row("dualpipe", n, 2, ep=2, priority=priority)
        for n, priority in ((1, "post"), (4, "none"), (4, "post"))
    },
}  # fmt: skip


def write_row(folder: Path, plan: PlanSpec, *, predicted: bool) -> None:
    """Write one row's files."""
    folder.mkdir(parents=True, exist_ok=True)
    block = resolve_recompute_block(plan)
    (folder / "plan.json").write_text(json.dumps(plan.model_dump(mode="json"), indent=1))
    write_program(lower(plan, block), folder / "program.json")
    write_program(lower(plan.baseline(), None), folder / "baseline.json")
    if not predicted:
        return
    from mhcplan.planner.predict import predict

    found = predict(plan)
    meta = {"plan_digest": plan.digest(), "profile": found.profile.digest}
    for name, step in (("predicted", found.step), ("predicted_baseline", found.baseline)):
        trace = Trace(step.program, step.timeline, "predicted", meta)
        write_trace(trace, folder / f"{name}.trace.json")
    claim = meta | {
        "step_time_ns": found.step.timeline.step_ns,
        "baseline_step_time_ns": found.baseline.timeline.step_ns,
        "overhead_percent": found.overhead_percent,
        "peak_bytes": found.step.memory.peak_bytes.sum(axis=1).tolist(),
        "baseline_peak_bytes": found.baseline.memory.peak_bytes.sum(axis=1).tolist(),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    (folder / "prediction.json").write_text(json.dumps(claim, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--set", nargs="+", choices=SETS, default=["pair"])
    parser.add_argument("--profile", default="h100-sxm")
    parser.add_argument("--no-prediction", action="store_true")
    wanted = parser.parse_args()
    chosen = {"anchor": ANCHOR} | {k: v for name in wanted.set for k, v in SETS[name].items()}
    for name, fields in chosen.items():
        plan = make_plan({**fields, "profile": wanted.profile})
        write_row(wanted.rows / name, plan, predicted=not wanted.no_prediction)
        print(f"{name}: {plan.digest()[:12]}")
    order = [name for name in chosen if name != "anchor"]
    (wanted.rows / "rows.json").write_text(json.dumps(order, indent=1))


if __name__ == "__main__":
    main()
