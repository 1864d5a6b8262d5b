"""Any op beside any traffic is priced by what the engines play, and stored pairs as the fit saw
them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.profiles.contention_fit import TRAITS, Pairs
from mhcplan.profiles.contention_replay import play
from mhcplan.profiles.loads import GpuSettings
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.overlap import MESSAGE_GAP_NS, Overlap, OverlapModel, parse_traffic, rows_of
from mhcplan.profiles.overlap_neighbours import Neighbours
from mhcplan.profiles.schema import ProfileError
from mhcplan.profiles.store import contention_log, find_profile
from mhcplan.profiles.vocabulary import OpKey, TransferKey, op_key
from mhcplan.sim.compiled import simulate_compiled
from mhcplan.sim.device_kernels import Traffic
from mhcplan.sim.engine import simulate
from mhcplan.sim.program import CostTable, Program
from mhcplan.sim.timeline import Timeline
from tests.support.programs import Maker

PROFILE = find_profile("h100-sxm")
LOG = contention_log("h100-sxm")
MODEL = OverlapModel(PROFILE, LOG)
POST = op_key("mhc_post", "F", n=4, hidden=2560, tokens=4096)
FFN = op_key("dense_ffn", "F", hidden=3000, ffn=8000, tokens=3000)  # nobody measured it
SEND = TransferKey("send_recv_both", 2, 2, 8 * 2**20)

Engine = Callable[[Program, CostTable], Timeline]
OPS = st.sampled_from([row.key for row in PROFILE.ops if row.duration_ns > 20_000]) | st.just(FFN)
TRANSFERS = st.builds(
    TransferKey,
    st.sampled_from(["send_recv", "send_recv_both", "all_to_all", "reduce_scatter"]),
    st.just(2),
    st.just(2),
    st.integers(2**20, 2**26),
)


@given(OPS, TRANSFERS, st.sampled_from([None, 2, 8, 16]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_nothing_is_faster_beside_something_else(
    op: OpKey, transfer: TransferKey, ctas: int | None, urgent: bool
) -> None:
    found = MODEL.price(op, transfer, ctas=ctas, high_priority=urgent)
    assert found.compute_slowdown > 1 - 1e-4  # times are whole nanoseconds
    assert found.traffic_slowdown > 1 - 1e-4
    together = found.queue_ns + found.kernel_ns + MESSAGE_GAP_NS
    assert together == pytest.approx(found.traffic_slowdown * found.traffic_ns, rel=0.05)
    assert found.kernel_ns >= found.traffic_ns - MESSAGE_GAP_NS - 1
    assert ctas is None or found.ctas <= ctas


@pytest.mark.parametrize("engine", [simulate, simulate_compiled])
@pytest.mark.parametrize(("op", "urgent"), [(POST, False), (FFN, False), (FFN, True)])
def test_the_price_is_what_the_engines_give(op: OpKey, urgent: bool, engine: Engine) -> None:
    """Two streams of two ranks, written down here, with the tables of a prediction.

    What a message waits for depends on how far the second rank is behind, and on how many of them
    were sent: a price lies about between."""
    price = MODEL.price(op, SEND, high_priority=urgent)
    lags_ns = [price.compute_ns * third // 3 for third in range(3)]
    found = [played(price, op, urgent, engine, lag_ns) for lag_ns in lags_ns]
    compute, traffic = zip(*found, strict=True)
    assert 0.9 * min(traffic) < price.traffic_slowdown < 1.1 * max(traffic)
    assert 0.98 * min(compute) < price.compute_slowdown < 1.02 * max(compute)


def played(
    price: Overlap, op: OpKey, urgent: bool, engine: Engine, lag_ns: int
) -> tuple[float, float]:
    """Slowdowns of compute and traffic where the second rank is behind by ``lag_ns``."""
    maker, messages = Maker(2), 60
    pair = maker.group("pair", 0, 1)
    gaps = [maker.group(f"gap{rank}", rank, size=2) for rank in (0, 1)]
    level = {"priority": -int(urgent)}
    ops = 10 + round(1.5 * messages * price.traffic_slowdown * price.traffic_ns / price.compute_ns)
    for rank in (0, 1):
        length = price.compute_ns * (100 + rank) // 100  # no two GPUs are equal
        maker.op(rank, rank * lag_ns)
        for _ in range(ops):
            maker.op(rank, length)
        before: tuple[int, ...] = ()
        for _ in range(messages):
            sent = maker.transfer(
                rank, pair, price.traffic_ns - MESSAGE_GAP_NS, waits=before, **level
            )
            before = (
                maker.transfer(
                    rank, gaps[rank], MESSAGE_GAP_NS, waits=(sent,), kind="gap", **level
                ),
            )
    program, costs = maker.build()
    loads = CostModel(PROFILE).table([str(op), str(SEND)], GpuSettings()).loads
    assert loads is not None
    sends, computes = program.group == pair, program.group < 0
    gap = Traffic(0, link_share=0.0)
    loads = dataclasses.replace(
        loads,
        kernels=tuple(loads.kernels[0] if is_op else () for is_op in computes),
        traffic=tuple(
            None if group < 0 else loads.traffic[1] if group == pair else gap
            for group in program.group
        ),
    )
    timeline = engine(program, dataclasses.replace(costs, loads=loads))
    ends = np.sort(timeline.end_ns[sends & (program.rank == 0)])
    traffic = (ends[-1] - ends[0]) / (messages - 1) / price.traffic_ns
    longer: list[float] = []
    for rank in (0, 1):
        begun = np.sort(timeline.start_ns[computes & (program.rank == rank)])[1:]
        begun = begun[begun <= ends[-1]]
        alone_ns = price.compute_ns * (100 + rank) // 100
        longer.append((begun[-1] - begun[0]) / (len(begun) - 1) / alone_ns)
    return sum(longer) / 2, traffic


def test_a_stored_pair_is_priced_from_the_others_and_shown_beside_its_measurement() -> None:
    pairs = Pairs(rows_of(LOG)).pairs(TRAITS)
    neighbours = Neighbours(pairs, MODEL.parameters)
    usual = [p for p in pairs if " ctas=0 " in p.name and p.pattern != "copy_engine"]
    for pair in [p for p in usual if p.message.both_busy and p.compute == "grouped_gemm"][::5]:
        key = TransferKey(pair.pattern, 2, 2, pair.num_bytes)
        found = MODEL.price(pair.compute, key, high_priority=pair.message.high_priority)
        played = play(pair.kernels, pair.message, MODEL.parameters, pair.op_ns)
        price = neighbours.price(pair, played[:2])
        assert (found.compute_slowdown, found.traffic_slowdown) == pytest.approx(price[:2])
        assert f"{price.neighbours} measured pairs" in found.why[-1]
        assert found.measured is not None
        assert found.measured.compute_slowdown == pair.measured[0]
        assert found.error.basis == "measured"
        compute, traffic = (one / of for one, of in zip(price[:2], pair.measured, strict=True))
        assert found.error.compute_percent == pytest.approx(100 * abs(compute - 1))
        assert found.error.traffic_percent == pytest.approx(100 * abs(traffic - 1))


def test_an_overlapped_kernel_beside_other_sizes_has_the_error_of_its_own_pairs() -> None:
    found = MODEL.price("grouped_gemm", parse_traffic("all_to_all 16MiB"), ctas=8)
    assert (found.measured, found.error.basis) == (None, "held out")
    assert found.error.of == "grouped_gemm beside all_to_all"
    assert "measured pairs of this kernel" in found.why[-1]
    assert not any("measured pairs" in line for line in MODEL.price(POST, SEND).why)


def test_what_was_not_overlapped_says_so() -> None:
    held_out = MODEL.price(POST, SEND)
    assert (held_out.error.basis, held_out.extrapolated) == ("held out", ())
    assert held_out.error.pairs >= 3
    reduce = MODEL.price(POST, parse_traffic("reduce_scatter 16MiB"))
    assert reduce.error.basis == "all pairs"
    assert "all_to_all" in reduce.extrapolated[0]
    large = MODEL.price(POST, TransferKey("all_to_all", 8, 8, 2**30))
    assert [text.split()[1] for text in large.extrapolated[:2]] == ["bytes:", "ranks:"]
    bare = OverlapModel(PROFILE).price(POST, SEND)
    assert bare.error.pairs == 336
    assert dataclasses.replace(bare, error=held_out.error) == held_out


@pytest.mark.parametrize(
    "text", ["", "64MiB", "send_recv", "send_recv many", "gossip 1MiB", "all_to_all 2 2 1MiB"]
)
def test_traffic_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a pattern"):
        parse_traffic(text)


def test_traffic_is_read() -> None:
    assert parse_traffic("send_recv 64MiB") == TransferKey("send_recv", 2, 2, 2**26)
    assert parse_traffic("all_to_all 8/4 1000") == TransferKey("all_to_all", 8, 4, 1000)
    assert parse_traffic("all_to_all 8 1kB") == TransferKey("all_to_all", 8, 8, 1000)


def test_what_the_profile_cannot_price_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"no overlapped kernel \(gemm_wave_long, "):
        MODEL.price("gemm_huge", SEND)
    with pytest.raises(ProfileError, match="no contention_model"):
        OverlapModel(PROFILE.model_copy(update={"contention_model": None}))
