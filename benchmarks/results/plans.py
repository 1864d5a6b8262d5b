"""Predictions of mhc-27b: measures switched on and off, recompute blocks, rows of the state."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.results.tables import Section, gb, ms, percent
from mhcplan.planner.lowering.recompute import (
    live_peak,
    paper_recompute_block,
    resolve_recompute_block,
)
from mhcplan.planner.plan.spec import PlanSpec, make_plan, schedule_of
from mhcplan.planner.predict import Prediction, predict
from mhcplan.planner.report.make import make_report
from mhcplan.profiles.specs import SITES_PER_BLOCK

if TYPE_CHECKING:
    from mhcplan.planner.report.schema import BreakdownNs, PlanReport
    from mhcplan.profiles.schema import Profile

MODEL = "mhc-27b"
_PLAN = "mhc-27b, PP8 EP8, 64 microbatches, DualPipe, as `mhcplan predict mhc-27b` has it"
# Fields that decide how the step runs, and their values beside the default. A field that this
# version does not have is left out.
FIELDS: dict[str, tuple[object, ...]] = {
    "priority": ("none", "recompute", "all"),
    "overlap_recompute": (False,),
    "overlap_order": ("v3",),
    "p2p": ("grouped",),
    "recompute_layers": ("selective", "full"),
    "receive_buffers": ("per_microbatch",),
    "mtp": (True,),
}
# The same for how a GPU is shared, which means something with contention only.
GPU_FIELDS: dict[str, tuple[object, ...]] = {
    "contention": ("off",),
    "priority": ("none", "all"),
    "attention": ("preemptible",),
    "comm_priority": ("high",),
    "comm_ctas": (8, 16),
    "compute_sms": (112,),
    "max_connections": (1, 32),
}
_TRANSPORTS = (("eager", "two"), ("grouped", "two"), ("grouped", "one"))  # p2p, comm_streams


class Row(NamedTuple):
    """A predicted plan."""

    prediction: Prediction
    report: PlanReport

    @property
    def sources(self) -> str:
        """Shares of measured, interpolated, extrapolated and assumed op time."""
        shares = self.report.sources_percent
        parts = shares.measured, shares.interpolated, shares.extrapolated, shares.assumed
        return " ".join(f"{name}{part:.1f}" for name, part in zip("miea", parts, strict=True))

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return self.report.peak_memory_bytes


def predicted(profile: Profile, **changes: object) -> Row:
    """The default plan of mhc-27b with changed fields."""
    prediction = predict(make_plan({"model": MODEL} | changes), profile)
    return Row(prediction, make_report(prediction, ""))


def measures(profile: Profile) -> Section:
    """Priority x recompute x transport: the measures of the paper's section 4.3.3 together."""
    rows: list[tuple[str, ...]] = []
    steps: dict[tuple[str, bool, str], int] = {}
    spent: dict[str, BreakdownNs] = {}
    for priority, overlap in product(("none", "post", "recompute", "all"), (False, True)):
        cells: list[str] = []
        for p2p, streams in _TRANSPORTS:
            row = predicted(
                profile, priority=priority, overlap_recompute=overlap, p2p=p2p, comm_streams=streams
            )
            step_ns = row.report.step_time_ns
            cells.append(f"{ms(step_ns)} ({percent(row.prediction.overhead_percent)} %)")
            steps[priority, overlap, f"{p2p} {streams}"] = step_ns
            if (priority, overlap) == ("post", True):
                spent[f"{p2p} {streams}"] = row.report.breakdown_ns
        rows.append((priority, "yes" if overlap else "no", *cells))

    def longer(*change: *tuple[str, bool, str]) -> str:
        return f"{100 * (steps[change] / steps['post', True, 'eager two'] - 1):+.2f} %"

    eager, grouped = spent["eager two"], spent["grouped two"]
    reading = (
        f"Against the default, the step changes by {longer('none', True, 'eager two')} without the"
        f" high-priority stream, by {longer('post', False, 'eager two')} when recompute waits for"
        f" the gradient, and by {longer('all', True, 'eager two')} when every mHC op is urgent; the"
        " overhead moves less, because the plain residual's sum gains from that stream, too. When"
        " messages go in batches between actions, as DeepSeek's DualPipe posts them, it changes by"
        f" {longer('post', True, 'grouped two')}: of the busiest rank, waiting for messages goes"
        f" from {ms(eager.exposed_pp)} to {ms(grouped.exposed_pp)} ms, as nothing hides them, and"
        f" model compute from {ms(eager.compute)} to {ms(grouped.compute)} ms, as none runs beside"
        " it; the other measures then have little left to save."
    )
    about = (
        f"{_PLAN}, n = 4: step in ms, and overhead over the plain residual under the same fields."
        " `overlap_recompute` lets recompute run before its gradient arrives."
    )
    columns = (
        "priority", "overlap_recompute", *(f"p2p {p}, comm_streams {s}" for p, s in _TRANSPORTS)
    )  # fmt: skip
    title = "The measures together: priority, recompute, messages"
    return Section(title, about, columns, tuple(rows), reading)


def fields(profile: Profile) -> Section:
    """One field changed at a time."""
    about = f"{_PLAN}, n = 4, with one `--set FIELD=VALUE`."
    mhc, v3 = (
        predicted(profile, priority="none", overlap_order=order).report.step_time_ns
        for order in ("mhc", "v3")
    )
    reading = (
        "The order of DeepSeek-V3's figure 4 is the mHC paper's but for the place of F_post,res of"
        " FFN sites in the host's order, which a stream of its own makes irrelevant; without that"
        f" stream (priority=none) it changes the step by {percent(100 * (v3 / mhc - 1))} %. What"
        " the mHC paper adds are the streams."
    )
    section = _one_at_a_time(profile, "One field at a time", about, FIELDS, {})
    return replace(section, reading=reading)


def gpu_fields(profile: Profile) -> Section:
    """One field of how a GPU is shared changed at a time."""
    about = f"{_PLAN}, n = 4, `contention=on`, with one more `--set FIELD=VALUE`."
    title = "One field of the GPU at a time"
    return _one_at_a_time(profile, title, about, GPU_FIELDS, {"contention": "on"})


def _one_at_a_time(
    profile: Profile,
    title: str,
    about: str,
    fields: dict[str, tuple[object, ...]],
    common: dict[str, object],
) -> Section:
    base = predicted(profile, **common)
    rows = [_field_row(", ".join(f"{k}={v}" for k, v in common.items()) or "default", base, base)]
    for field, values in fields.items():
        if field in PlanSpec.model_fields:
            for value in values:
                row = predicted(profile, **common | {field: value})
                rows.append(_field_row(f"{field}={value}", row, base))
    columns = ("", "step ms", "against the first %", "overhead %", "peak GB", "sources %")
    return Section(title, about, columns, tuple(rows))


def _field_row(name: str, row: Row, base: Row) -> tuple[str, ...]:
    change = 100 * (row.report.step_time_ns / base.report.step_time_ns - 1)
    return (
        name, ms(row.report.step_time_ns), percent(change),
        percent(row.prediction.overhead_percent), gb(row.peak_bytes), row.sources,
    )  # fmt: skip


def recompute(profile: Profile) -> Section:
    """Time and memory for every L_r that a stage of mhc-27b can have."""
    sites = SITES_PER_BLOCK * max(len(b) for b in make_plan({"model": MODEL}).stages)
    found = {
        block: predicted(profile, residual={"recompute_block": block})
        for block in (*range(1, sites + 1), "none")
    }
    rows = tuple(
        (
            str(block), ms(row.report.step_time_ns), percent(row.prediction.overhead_percent),
            ms(row.report.breakdown_ns.recompute), gb(row.peak_bytes), row.sources,
        )
        for block, row in found.items()
    )  # fmt: skip
    fastest = min(found, key=lambda block: found[block].report.step_time_ns)
    smallest = min(found, key=lambda block: found[block].peak_bytes)
    fastest_block = min(
        (block for block in found if block != "none"),
        key=lambda block: found[block].report.step_time_ns,
    )
    model = make_plan({"model": MODEL}).model
    chosen = resolve_recompute_block(make_plan({"model": MODEL}))
    reading = (
        f"Least memory: L_r = {smallest}; fastest: {fastest}, of those that recompute"
        f" {fastest_block}. The paper's formula, sqrt(nL/(n+2)) with L = {model.num_sites} for the"
        f" whole model, gives {paper_recompute_block(4, model.num_sites):.2f}; `auto`, the same"
        f" equation for a rank's stages and live chunks, takes {chosen}. Recompute costs"
        f" {percent(_difference(found, fastest_block, 'none'))} % of the step and saves"
        f" {gb(found['none'].peak_bytes - found[smallest].peak_bytes)} GB at most."
    )
    about = f"{_PLAN}, n = 4, one recompute block L_r after the other, in sites."
    columns = ("L_r", "step ms", "overhead %", "recompute ms", "peak GB", "sources %")
    return Section("Recompute block of mhc-27b", about, columns, rows, reading)


def _difference(found: dict[int | str, Row], one: int | str, other: int | str) -> float:
    """Step time of one row over another's, in percent."""
    return 100 * (found[one].report.step_time_ns / found[other].report.step_time_ns - 1)


def in_flight(profile: Profile) -> Section:
    """Which L_r takes least memory on each rank, where the chunks in flight differ."""
    rows: list[tuple[str, ...]] = []
    for schedule, pp in (("1f1b", 4), ("dualpipe", 4), ("1f1b", 2), ("dualpipe", 2)):
        base = {"model": MODEL, "schedule": schedule, "layout": {"pp": pp}, "microbatches": 8}
        plan = make_plan(base)
        sites = SITES_PER_BLOCK * len(plan.stages[0])
        blocks = range(1, sites + 1)
        peaks = np.array([
            _peaks(profile, make_plan(base | {"residual": {"recompute_block": block}}))
            for block in blocks
        ])  # fmt: skip
        table = schedule_of(plan)
        for rank in range(pp if schedule == "1f1b" else 1):
            live = sum(live_peak(table, rank).values())
            local = paper_recompute_block(4, live * sites)
            least = peaks[:, rank].min()
            smallest = [block for block in blocks if peaks[block - 1, rank] == least]
            spread = peaks[:, rank].max() - least
            rows.append((
                f"{schedule}, PP{pp}, rank {rank}", str(sites), str(live), f"{local:.1f}",
                " ".join(map(str, smallest)), gb(least), gb(spread),
            ))  # fmt: skip
    about = (
        "mhc-27b, EP8, 8 microbatches, n = 4. The paper's formula counts one microbatch and the"
        " whole model; a rank that holds m chunks of L_s sites stores m times the block inputs for"
        " one block that is rebuilt: sqrt(m n L_s / (n+2))."
    )
    columns = (
        "", "L_s", "m in flight", "formula", "least memory at L_r", "peak GB there",
        "worst L_r adds GB",
    )  # fmt: skip
    reading = (
        "The first ranks of 1F1B hold more microbatches and want larger blocks than the last;"
        " DualPipe holds P + 1 chunks everywhere. The best block is larger than the formula's and"
        " leaves a remainder: the peak falls on the backward of the stage's last experts, when all"
        " that F keeps is still held, and only the last, shorter block is rebuilt by then."
    )
    return Section("Where microbatches in flight move it", about, columns, tuple(rows), reading)


def _peaks(profile: Profile, plan: PlanSpec) -> list[int]:
    """Peak memory of every rank."""
    return predict(plan, profile).step.memory.peak_bytes.sum(axis=1).tolist()


def state_rows(profile: Profile) -> Section:
    """n = 1, 2, 4, 8."""
    rows: list[tuple[str, ...]] = []
    for n in (1, 2, 4, 8):
        row = predicted(profile, residual={"expansion_rate": n})
        spent, base = row.report.breakdown_ns, row.report.baseline_breakdown_ns
        waits = sum(
            getattr(spent, name) - getattr(base, name)
            for name in ("exposed_ep", "exposed_pp", "exposed_dp", "bubble", "host")
        )
        rows.append((
            str(n), ms(row.report.step_time_ns), percent(row.prediction.overhead_percent),
            ms(spent.mhc), ms(spent.recompute), ms(waits),
            str(row.report.recompute_block or "-"), gb(row.peak_bytes), row.sources,
        ))  # fmt: skip
    about = (
        f"{_PLAN}: rows of the residual state. n = 1 is the plain residual by definition. Times of"
        " mHC kernels, recompute and what waiting and bubble grow by are the busiest rank's."
    )
    columns = (
        "n", "step ms", "overhead %", "mHC ms", "recompute ms", "more waiting ms", "L_r", "peak GB",
        "sources %",
    )  # fmt: skip
    return Section("Rows of the state", about, columns, tuple(rows))
