"""Fixed splits of forced routing: who gets how many token copies, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mhcplan.kernels.layers import forced_splits
from mhcplan.runtime.executor import TensorLayout

if TYPE_CHECKING:
    from mhcplan.runtime.executor import Layout
    from mhcplan.runtime.spec import RunSpec


@dataclass(frozen=True)
class Routes:
    """What one process of an expert group sends and gets.

    Attributes:
        given, received: rows that this process sends to, and gets from, each of the ep processes.
        sent, got: layouts of token copies before and after the dispatch.
        ends: [experts held] int32, running sum of rows an expert, of what all processes send.
        index: [rows] int32: row i in expert order is row index[i] as received.
    """

    given: list[int]
    received: list[int]
    sent: Layout
    got: Layout
    ends: Tensor
    index: Tensor


def forced_routes(spec: RunSpec, index: int, device: torch.device) -> Routes | None:
    """Splits of process ``index`` of the expert group; None for a model without experts."""
    moe = spec.model.moe
    if moe is None:
        return None
    ep, hidden = spec.ep, spec.model.hidden_size
    splits = forced_splits(spec.tokens, moe.top_k, moe.num_experts)
    held = moe.num_experts // ep
    of_process = [splits[e * held : (e + 1) * held] for e in range(ep)]
    own = of_process[index]
    rows = sum(own)
    starts = [sum(own[:e]) for e in range(held)]
    order = [
        torch.arange(count) + source * rows + start
        for count, start in zip(own, starts, strict=True)
        for source in range(ep)
    ]
    return Routes(
        given=[sum(s) for s in of_process],
        received=[rows] * ep,
        sent=(TensorLayout((spec.tokens * moe.top_k, hidden), spec.dtype),),
        got=(TensorLayout((rows * ep, hidden), spec.dtype),),
        ends=(torch.tensor(own) * ep).cumsum(0).int().to(device),
        index=torch.cat(order).int().to(device),
    )
