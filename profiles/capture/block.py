"""Does the profile price the code that runs? A whole block on one stream against its ops' times.

A mixture-of-experts block with mHC (attention site, then FFN site, ep = 1) runs F, then I and W of
everything, back to back on one stream. The sum of the profile rows of the very same keys should
take as long.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mhcplan.kernels.layers import OPS, Env, Op
from mhcplan.profiles.capture import machine
from mhcplan.profiles.capture.grid import SINKHORN_STEPS
from mhcplan.profiles.capture.ops import Log, Session, measure_ops
from mhcplan.profiles.capture.timing import GpuTimer, spread_percent
from mhcplan.profiles.presets import MODELS
from mhcplan.profiles.specs import Mla, ModelSpec
from mhcplan.profiles.vocabulary import OpKey, op_key

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from mhcplan.kernels.layers_base import Tensors
    from mhcplan.profiles.schema import OpTiming


_CHECKED = 40  # runs of a block that are timed


@dataclass(frozen=True)
class Comparison:
    """A block's measured time beside the sum of its rows, in ns."""

    measured_ns: int
    spread_percent: float
    samples: int
    summed_ns: int

    @property
    def difference_percent(self) -> float:
        """How much longer the sum is than the block, in percent of the block."""
        return 100 * (self.summed_ns / self.measured_ns - 1)

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"block {self.measured_ns / 1e6:.3f} ms (spread {self.spread_percent:.1f} %,"
            f" {self.samples} runs), sum of its ops {self.summed_ns / 1e6:.3f} ms:"
            f" {self.difference_percent:+.1f} %"
        )


class Block:
    """One MoE block with mHC on one GPU; ``tokens`` = sequences x seq, routing forced."""

    def __init__(self, model: ModelSpec, n: int, tokens: int, seq: int, env: Env) -> None:
        """Build its ops with random weights.

        Raises:
            ValueError: the model has no experts, or no MLA.
        """
        moe, mla = model.moe, model.attention
        if moe is None or not isinstance(mla, Mla):
            raise ValueError(f"{model.name}: the block check needs MLA and experts")
        here = {"hidden": model.hidden_size, "tokens": tokens}
        site = {**here, "n": n}
        self.env = env
        self.shapes: dict[str, dict[str, int]] = {
            "mhc_pre": {**site, "steps": SINKHORN_STEPS},
            "mhc_post": site,
            "norm": here,
            "attention_mla": {
                **here, "seq": seq, "heads": mla.num_heads, "nope": mla.qk_nope_head_dim,
                "rope": mla.qk_rope_head_dim, "v": mla.v_head_dim, "kv_rank": mla.kv_lora_rank,
                "q_rank": mla.q_lora_rank or 0,
            },
            "router": {**here, "experts": moe.num_experts, "top_k": moe.top_k},
            "shared_experts": {**here, "ffn": moe.num_shared_experts * moe.ffn_dim},
            "experts": {
                "rows": tokens * moe.top_k, "hidden": model.hidden_size, "ffn": moe.ffn_dim,
                "experts": moe.num_experts,
            },
            "unpermute": {**here, "top_k": moe.top_k},
        }  # fmt: skip
        self.ops = {kind: self._op(kind) for kind in self.shapes if kind in OPS}
        self.second = {kind: self._op(kind) for kind in ("mhc_pre", "norm")}
        self.x = env.normal(tokens, n, model.hidden_size)
        self.dy = env.normal(tokens, n, model.hidden_size, salt=1)

    def _op(self, kind: str) -> Op:
        op: Op = OPS[kind].build(self.shapes[kind], self.env)
        return op

    def op_keys(self) -> list[OpKey]:
        """What :meth:`run` runs, as keys."""
        twice = ("mhc_pre", "mhc_post", "norm")
        found = []
        for kind, shape in self.shapes.items():
            passes = "FI" if kind in ("mhc_post", "norm", "unpermute") else "FIW"
            found += [op_key(kind, p, **shape) for p in passes] * (2 if kind in twice else 1)
        return found

    def run(self) -> None:
        """F of the block, then I and W of it, on the current stream."""
        ops, second = self.ops, self.second
        x = self.x
        (u, mix), pre = ops["mhc_pre"].forward(x)
        (h,), norm = ops["norm"].forward(u)
        (f,), attention = ops["attention_mla"].forward(h)
        (x,), post = ops["mhc_post"].forward(x, f, mix)
        (u, mix), pre2 = second["mhc_pre"].forward(x)
        (h,), norm2 = second["norm"].forward(u)
        (rows, weights, slot, ends), router = ops["router"].forward(h)
        (shared,), dense = ops["shared_experts"].forward(h)
        (rows,), experts = ops["experts"].forward(rows, ends)
        (f,), unpermute = ops["unpermute"].forward(rows, weights, slot, shared)
        (x,), post2 = ops["mhc_post"].forward(x, f, mix)
        del x, u, h, f, rows, shared

        dx = self._ffn_backward((pre2, norm2, router, dense, experts, unpermute, post2))
        _, df, dmix = _some(ops["mhc_post"].backward_input(post, dx)[0])
        (dh,), late = ops["attention_mla"].backward_input(attention, df)
        (du,), _ = ops["norm"].backward_input(norm, _one(dh))
        _, late_pre = ops["mhc_pre"].backward_input(pre, dx, _one(du), dmix)
        ops["attention_mla"].backward_weight(late)
        ops["mhc_pre"].backward_weight(late_pre)

    def graph(self) -> torch.cuda.CUDAGraph:
        """:meth:`run` as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph

    def _ffn_backward(self, saved: tuple[Tensors, ...]) -> Tensor:
        pre, norm, router, dense, experts, unpermute, post = saved
        ops, second = self.ops, self.second
        _, df, dmix = _some(ops["mhc_post"].backward_input(post, self.dy)[0])
        drows, dweights, _, dshared = ops["unpermute"].backward_input(unpermute, df)[0]
        (dh,), late_dense = ops["shared_experts"].backward_input(dense, _one(dshared))
        (drows, _), late_experts = ops["experts"].backward_input(experts, _one(drows))
        (dh,), late_router = ops["router"].backward_input(
            router, _one(drows), _one(dweights), _one(dh)
        )
        (du,), _ = second["norm"].backward_input(norm, _one(dh))
        (dx,), late_pre = second["mhc_pre"].backward_input(pre, self.dy, _one(du), dmix)
        ops["shared_experts"].backward_weight(late_dense)
        ops["experts"].backward_weight(late_experts)
        ops["router"].backward_weight(late_router)
        second["mhc_pre"].backward_weight(late_pre)
        return _one(dx)


def _one(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def _some(gradients: tuple[Tensor | None, ...]) -> tuple[None, Tensor, Tensor]:
    """What mhc_post's I returns: x's gradient is left to mhc_pre."""
    _, df, dmix = gradients
    return None, _one(df), _one(dmix)


def compare(
    block: Block, rows: Mapping[str, OpTiming], samples: int = 60, heat_seconds: float = 1.0
) -> Comparison:
    """Run the block over and over, launches hidden in a CUDA graph: it is its own load, and meets
    the power limit.

    Args:
        block: what to run.
        rows: profile rows by the text of their keys.
        samples: runs that are timed, after ``heat_seconds`` of runs that are not.
        heat_seconds: see ``samples``.

    Raises:
        KeyError: ``rows`` lacks one of the block's keys.
    """
    summed = summed_ns(block, rows)
    graph = block.graph()
    end = time.perf_counter() + heat_seconds
    while time.perf_counter() < end:
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 2)]
    for event in events:
        graph.replay()
        event.record()
    events[-1].synchronize()
    pairs = itertools.pairwise(events[1:])
    times = [start.elapsed_time(end) * 1e6 for start, end in pairs]
    return Comparison(round(statistics.median(times)), spread_percent(times), samples, summed)


def summed_ns(block: Block, rows: Mapping[str, OpTiming]) -> int:
    """What the ops of a block take by their rows.

    Raises:
        KeyError: ``rows`` lacks one of the block's keys.
    """
    return sum(rows[str(key)].duration_ns for key in block.op_keys())


def allocator_margin_percent(device: torch.device) -> float:
    """What the caching allocator reserves beyond what is allocated at the peak, in percent.

    Over three runs of a block of the 9B model, F and B, with weights, gradients and activations.
    ``PYTORCH_CUDA_ALLOC_CONF`` decides how it reserves; a capture turns expandable segments on.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    block = Block(MODELS["mhc-9b"], 4, 4096, 4096, Env(device))
    for _ in range(3):
        block.run()
    torch.cuda.synchronize(device)
    found = torch.cuda.memory_stats(device)
    reserved, allocated = (found[f"{k}_bytes.all.peak"] for k in ("reserved", "allocated"))
    del block
    gc.collect()
    torch.cuda.empty_cache()
    return round(100 * (reserved / allocated - 1), 2)


def check_block(
    model: str, log: Path, device: torch.device, op_budget_ns: int, tokens: int = 4096, n: int = 4
) -> Comparison:
    """Measure the ops of a block of the preset ``model`` and the block itself, here and now, in the
    same way: launched, and with rests between, so that no limit of power is met.

    Args:
        model: name of a preset with MLA and experts.
        log: rows are taken from and appended to ``log``.block.jsonl.
        device: a CUDA device.
        op_budget_ns: stream time of one pass of one op.
        tokens: one sequence of this length.
        n: expansion rate.

    Raises:
        ValueError: unknown preset, or one without MLA or experts.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r} must be one of {sorted(MODELS)}")
    name = machine.device_name(device)
    session = Session(device, torch.bfloat16, machine.code_sha256(), name, op_budget_ns)
    assert isinstance(session.timer, GpuTimer)
    block = Block(MODELS[model], n, tokens, tokens, Env(device))
    keys = list(dict.fromkeys(block.op_keys()))
    store = Log(log.with_name(log.name + ".block.jsonl"), session)
    measure_ops(keys, session, store)
    summed = summed_ns(block, store.rows)
    kernels = sum(len(store.rows[str(key)].segments) for key in block.op_keys())
    found = session.timer.measure([block.run], _CHECKED * summed, kernels=kernels)
    return Comparison(found.duration_ns, found.spread_percent, found.samples, summed)
