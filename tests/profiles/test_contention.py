"""The contention model's rules by hand, pricing of pairs, and rows in the profile file."""

from __future__ import annotations

import dataclasses

import pytest

from mhcplan.profiles.contention import Message, chain_ns, ends_of, wait_ns
from mhcplan.profiles.contention_replay import replay
from mhcplan.profiles.schema import (
    ContentionModel,
    ContentionOp,
    ContentionPair,
    KernelTrait,
    PriorityLatency,
    Profile,
    ProfileError,
    Segment,
    parse_profile,
    profile_text,
)
from mhcplan.sim.device_kernels import Kernel, Parameters, hbm_share, units

# nothing but SMs counts: every figure below can be worked out by hand
BARE = Parameters(
    num_sms=132, hbm_bytes_per_ns=1e9, busy_delay=0.0, memory_delay=0.0,
    compute_delay=0.0, crowding=1.0,
)  # fmt: skip
WAVE = Kernel(100_000, 132, 1)  # fills the chip once
TILES = Kernel(500_000, 660, 1)  # five waves of 100 us
PERSISTENT = Kernel(400_000, 132, 1, persistent=True)


def message(ctas: int = 16, alone_ns: float = 50_000, **changes: object) -> Message:
    """Traffic without memory traffic, and no gap."""
    plain = Message(alone_ns, 0.0, 0.0, ctas, (0, 0), gap_ns=1.0)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def played(kernel: Kernel, traffic: Message, parameters: Parameters = BARE) -> tuple[float, float]:
    """Slowdowns of compute and traffic, streams kept full."""
    return replay((kernel,), traffic, parameters, kernel.duration_ns)


def test_a_copy_engine_takes_no_sms() -> None:
    assert played(TILES, message(0)) == pytest.approx((1, 1), rel=1e-3)


def test_traffic_that_never_leaves_makes_one_wave_two() -> None:
    compute, _ = played(WAVE, message(alone_ns=2_000_000, high_priority=True))
    assert compute == pytest.approx(2, rel=0.12)


def test_many_waves_lose_only_the_share_of_the_sms() -> None:
    many = Kernel(1_000_000, 132 * 50, 1)
    compute, _ = played(many, message(alone_ns=20_000_000, high_priority=True))
    assert compute == pytest.approx(132 / 116, rel=0.03)


def test_at_equal_priority_short_messages_pass_one_a_kernel() -> None:
    _, traffic = played(TILES, message(alone_ns=20_000))
    # each waits for the tail of a kernel of 500 us, on either rank: the later one counts
    assert 500 / 20 <= traffic <= 1000 / 20


def test_urgent_traffic_waits_for_a_wave_and_not_for_the_kernel() -> None:
    _, equal = played(TILES, message(alone_ns=20_000))
    _, urgent = played(TILES, message(alone_ns=20_000, high_priority=True))
    assert urgent < equal / 2


def test_urgency_buys_nothing_against_a_persistent_kernel() -> None:
    _, equal = played(PERSISTENT, message(alone_ns=20_000))
    _, urgent = played(PERSISTENT, message(alone_ns=20_000, high_priority=True))
    assert urgent == pytest.approx(equal, rel=0.15)  # against 20 times


def test_a_grid_that_leaves_sms_free_lets_traffic_through() -> None:
    spare = dataclasses.replace(PERSISTENT, ctas=112)
    assert played(spare, message(alone_ns=20_000)) == pytest.approx((1, 1), rel=0.02)


def test_ctas_that_find_no_sm_follow_those_that_do() -> None:
    spare = dataclasses.replace(PERSISTENT, ctas=124)  # 8 SMs for 16 CTAs: two rounds of half each
    _, traffic = played(spare, message(alone_ns=20_000, chain_ns=20_000))
    assert traffic == pytest.approx(2, rel=0.05)


def test_a_rank_that_computes_slows_the_traffic_of_both() -> None:
    assert played(TILES, message(alone_ns=20_000, both_busy=False))[1] > 10


def test_memory_traffic_stretches_messages_unless_the_link_is_narrower() -> None:
    model = Parameters(busy_delay=0.0, memory_delay=2.0, memory_power=1.0)
    half = dataclasses.replace(PERSISTENT, ctas=100, hbm_bytes=400_000 * 1500)
    bound = message(4, 100_000, chain_ns=100_000)
    wide = message(4, 100_000, chain_ns=30_000)
    assert played(half, bound, model)[1] == pytest.approx(2, rel=1e-2)
    assert played(half, wide, model)[1] == pytest.approx(1.3, rel=1e-2)
    busy = dataclasses.replace(model, busy_delay=0.3)
    assert played(half, bound, busy)[1] == pytest.approx(2.3, rel=1e-2)


def test_a_handshake_is_delayed_more_than_bytes() -> None:
    model = Parameters(busy_delay=0.5, memory_delay=0.0, latency_delay=3.0)
    spare = dataclasses.replace(PERSISTENT, ctas=100)
    bytes_only = message(4, 100_000, chain_ns=100_000)
    half_of_each = message(4, 100_000, fixed_ns=50_000, chain_ns=50_000)
    assert played(spare, bytes_only, model)[1] == pytest.approx(1.5, rel=1e-2)
    assert played(spare, half_of_each, model)[1] == pytest.approx(2, rel=1e-2)  # 1.5 and 2.5


def test_chains_show_as_far_as_nothing_else_hides_them() -> None:
    narrow = {"ctas": 4, "num_bytes": 1000, "cta_bytes_per_ns": 1.0}  # chains of 250 ns
    assert chain_ns(500.0, **narrow) == 125  # half as long as the link's time
    assert chain_ns(250.0, **narrow) == 250
    assert chain_ns(100.0, **narrow) == 100  # what is measured cannot be shorter


def test_ends_of_a_message_that_buffers_take_do_not_wait_for_each_other() -> None:
    # SMs fall free twice an op; of ends that meet, one waits beyond its second time for the other
    kernels = tuple(dataclasses.replace(PERSISTENT, duration_ns=ns) for ns in (20_000, 100_000))
    meeting = message(alone_ns=10_000, one_way=True)
    _, apart = replay(kernels, dataclasses.replace(meeting, eager=True), BARE, 120_000)
    _, together = replay(kernels, meeting, BARE, 120_000)
    assert apart == pytest.approx(6, rel=0.1)
    assert together > 1.1 * apart


def test_memory_bound_kernels_lose_bandwidth_and_not_sms() -> None:
    model = Parameters(hbm_bytes_per_ns=3000.0)
    copy = Kernel(100_000, 132 * 20, 1, hbm_bytes=300_000_000)
    assert hbm_share(copy, model) == 1.0
    endless = message(alone_ns=5_000_000, high_priority=True)
    free, stretch = played(copy, endless, model)
    assert free == pytest.approx(1, abs=0.04)
    moved = round(0.2 * 3000 * endless.alone_ns)
    # 0.2 of the bandwidth alone, less beside a kernel that slows the traffic down
    taken, _ = played(copy, dataclasses.replace(endless, hbm_bytes=(moved, moved)), model)
    assert taken == pytest.approx(1 / (1 - 0.2 / stretch), rel=0.05)


def test_wait_is_the_rest_of_a_wave_of_a_kernel_or_nothing() -> None:
    assert wait_ns(TILES, 130_000, BARE, urgent=True) == 70_000
    assert wait_ns(TILES, 130_000, BARE, urgent=False) == 370_000
    assert wait_ns(TILES, 130_000, BARE, urgent=True, beside=True) == 0
    # beside the CTAs of an older kernel of equal priority there is room only when none waits
    assert wait_ns(TILES, 130_000, BARE, urgent=False, beside=True) == 270_000
    for urgent in (True, False):
        assert wait_ns(PERSISTENT, 130_000, BARE, urgent=urgent) == 270_000
        assert wait_ns(PERSISTENT, 130_000, BARE, urgent=urgent, beside=True) == 0
    assert wait_ns(dataclasses.replace(PERSISTENT, ctas=100), 1.0, BARE, urgent=False) == 0
    assert wait_ns(TILES, 600_000, BARE, urgent=False) == 0


def test_wait_ends_early_where_the_last_pieces_do_not_fill_the_chip() -> None:
    # 512 tiles of 132 CTAs: in the last of four rounds 16 SMs have nothing to do
    library = dataclasses.replace(PERSISTENT, pieces=512, dealt=False)
    assert units(library) == 512
    assert wait_ns(library, 0, BARE, urgent=True) == 300_000
    dealt = dataclasses.replace(PERSISTENT, pieces=512)
    assert units(dealt) == 132
    assert ends_of(dealt, 400_000, 132, 0) == [(300_000, 16), (400_000, 116)]
    tail = dataclasses.replace(PERSISTENT, tail_share=0.25)
    assert wait_ns(tail, 0, BARE, urgent=False) == 300_000
    assert sum(sms for _, sms in ends_of(tail, 400_000, 132, 0)) == 132


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels"):
        replay((), message(), BARE, 1.0)
    with pytest.raises(ValueError, match="ctas=133"):
        played(TILES, message(133))


def _with_contention(profile: Profile) -> Profile:
    segment = Segment(name="k", duration_ns=9, ctas=132, ctas_per_sm=1, cta_ns=9, persistent=True)
    return profile.model_copy(
        update={
            "contention_ops": (
                ContentionOp(
                    source="measured", name="gemm", family="gemm", duration_ns=10,
                    segments=(segment,),
                ),
            ),
            "contention_pairs": (
                ContentionPair(
                    source="measured", op="gemm", pattern="send_recv", bytes=8, ctas=4,
                    compute_slowdown=1.5, traffic_slowdown=2.5, alone_ns=7, queue_ns=3, kernel_ns=9,
                ),
            ),
            "contention_model": ContentionModel(
                source="measured", parameters={"memory_delay": 2.0},
                traits=(KernelTrait(name="nvjet", pieces=512, dealt=False),),
            ),
            "priorities": (
                PriorityLatency(
                    source="measured", resident="gemm", level="high", ctas=16, connections=8,
                    start_ns=5, end_ns=6,
                ),
            ),
        }
    )  # fmt: skip


def test_profiles_carry_contention_and_older_ones_keep_their_digest(profile: Profile) -> None:
    full = _with_contention(profile)
    again = parse_profile(profile_text(full), "text")
    assert again == full
    assert again.digest == full.digest != profile.digest
    assert "contention" not in profile_text(profile)
    assert full.model_copy(
        update={"contention_ops": (), "contention_pairs": (), "contention_model": None,
                "priorities": ()}
    ).digest == profile.digest  # fmt: skip


def test_a_pair_of_an_op_that_is_not_there_is_refused(profile: Profile) -> None:
    text = profile_text(_with_contention(profile)).replace('"op": "gemm"', '"op": "other"')
    with pytest.raises(ProfileError, match=r"contention_pairs\.0\.op"):
        parse_profile(text, "text")
