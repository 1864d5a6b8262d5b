"""Loads made by hypothesis: kernels and traffic of every shape that the physics knows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from mhcplan.sim.device_kernels import Kernel, Loads, Parameters, Traffic

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

    from mhcplan.sim.program import CostTable, Program

NUM_SMS = 8

KERNELS = st.builds(
    Kernel,
    duration_ns=st.integers(1, 20).map(float),
    ctas=st.sampled_from([0, 3, 6, NUM_SMS, 20, 300]),
    ctas_per_sm=st.sampled_from([1, 2, 16]),
    hbm_bytes=st.integers(0, 100),
    persistent=st.booleans(),
    pieces=st.sampled_from([0, 20, 50]),
    dealt=st.booleans(),
    cluster=st.sampled_from([1, 2, 4]),
    tail_share=st.sampled_from([0.0, 0.0, 0.3]),
)
TRAFFIC = st.builds(
    Traffic,
    ctas=st.integers(0, 3),
    fixed_ns=st.integers(0, 5),
    chain_ns=st.integers(0, 20),
    sent_hbm_bytes=st.integers(0, 50),
    received_hbm_bytes=st.integers(0, 50),
    link_share=st.sampled_from([0.2, 0.6, 1.0]),
)


@st.composite
def loads(draw: DrawFn, program: Program) -> Loads:
    """Loads of every cost key of a Program, on a machine of few SMs and little bandwidth."""
    transfers = {int(key) for key in program.cost[program.group >= 0]}
    keys = range(len(program.cost_keys))
    return Loads(
        kernels=tuple(
            () if key in transfers else tuple(draw(st.lists(KERNELS, max_size=3))) for key in keys
        ),
        traffic=tuple(draw(TRAFFIC) if key in transfers else None for key in keys),
        parameters=Parameters(
            num_sms=NUM_SMS, hbm_bytes_per_ns=10.0, together=draw(st.sampled_from([0.0, 0.35]))
        ),
        compute_sms=draw(st.sampled_from([None, None, 6])),
        connections=draw(st.sampled_from([1, 2, 8])),
    )


def with_loads(costs: CostTable, given: Loads) -> CostTable:
    """The same durations, played with contention."""
    return replace(costs, loads=given)
