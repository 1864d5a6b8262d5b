"""The contention model's rules by hand, pricing of pairs, and rows in the profile file."""

from __future__ import annotations

import dataclasses

import pytest

from mhcplan.profiles.contention import (
    Kernel,
    Message,
    Parameters,
    ends_of,
    hbm_share,
    message_ns,
    units,
    wait_ns,
)
from mhcplan.profiles.contention_play import overlap
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

# nothing but SMs counts: every figure below can be worked out by hand
BARE = Parameters(
    num_sms=132, hbm_bytes_per_ns=1e9, busy_delay=0.0, memory_delay=0.0, link_delay=0.0,
    compute_delay=0.0, crowding=1.0,
)  # fmt: skip
WAVE = Kernel(100_000, 132, 1)  # fills the chip once
TILES = Kernel(500_000, 660, 1)  # five waves of 100 us
PERSISTENT = Kernel(400_000, 132, 1, persistent=True)


def message(ctas: int = 16, alone_ns: float = 50_000, **changes: object) -> Message:
    """Traffic without memory traffic, and no gap."""
    plain = Message(alone_ns, 0.0, 0.0, ctas, (0, 0), gap_ns=1.0)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_a_copy_engine_takes_no_sms() -> None:
    found = overlap([TILES], message(0), BARE)
    assert found.compute == pytest.approx((1, 1), rel=1e-3)
    assert found.traffic == pytest.approx(1, rel=1e-3)


def test_traffic_that_never_leaves_makes_one_wave_two() -> None:
    found = overlap([WAVE], message(alone_ns=2_000_000, high_priority=True), BARE)
    assert found.compute == pytest.approx((2, 2), rel=0.12)


def test_many_waves_lose_only_the_share_of_the_sms() -> None:
    many = Kernel(1_000_000, 132 * 50, 1)
    found = overlap([many], message(alone_ns=20_000_000, high_priority=True), BARE)
    assert found.compute[0] == pytest.approx(132 / 116, rel=0.03)


def test_at_equal_priority_short_messages_pass_one_a_kernel() -> None:
    found = overlap([TILES], message(alone_ns=20_000), BARE)
    # each waits for the tail of a kernel of 500 us, on either rank: the later one counts
    assert 500 / 20 <= found.traffic <= 1000 / 20
    assert found.queue_ns > 300_000


def test_urgent_traffic_waits_for_a_wave_and_not_for_the_kernel() -> None:
    equal = overlap([TILES], message(alone_ns=20_000), BARE)
    urgent = overlap([TILES], message(alone_ns=20_000, high_priority=True), BARE)
    assert urgent.traffic < equal.traffic / 2
    assert urgent.queue_ns < 110_000


def test_urgency_buys_nothing_against_a_persistent_kernel() -> None:
    equal = overlap([PERSISTENT], message(alone_ns=20_000), BARE)
    urgent = overlap([PERSISTENT], message(alone_ns=20_000, high_priority=True), BARE)
    assert urgent.traffic == pytest.approx(equal.traffic, rel=0.15)  # against 20 times


def test_a_grid_that_leaves_sms_free_lets_traffic_through() -> None:
    spare = dataclasses.replace(PERSISTENT, ctas=112)
    found = overlap([spare], message(alone_ns=20_000), BARE)
    assert found.traffic == pytest.approx(1, rel=0.02)
    assert found.compute == pytest.approx((1, 1), rel=0.02)


def test_ctas_that_find_no_sm_follow_those_that_do() -> None:
    spare = dataclasses.replace(PERSISTENT, ctas=124)  # 8 SMs for 16 CTAs: two rounds of half each
    found = overlap([spare], message(alone_ns=20_000, chain_ns=20_000), BARE)
    assert found.traffic == pytest.approx(2, rel=0.05)


def test_a_lonely_rank_slows_the_traffic_of_both() -> None:
    found = overlap([TILES], message(alone_ns=20_000, both_busy=False), BARE)
    assert found.compute[1] == 1.0
    assert found.traffic > 10


def test_eager_messages_wait_for_one_end_only() -> None:
    coupled = overlap([TILES], message(alone_ns=20_000), BARE)
    eager = overlap([TILES], message(alone_ns=20_000, eager=True), BARE)
    # the five waves end at once, so each kernel lets one message pass at its tail, on either rank
    assert eager.traffic == pytest.approx(500 / 20, rel=0.2)
    assert eager.traffic <= coupled.traffic


def test_memory_traffic_stretches_messages_unless_the_link_is_narrower() -> None:
    model = Parameters(busy_delay=0.0, memory_delay=2.0, memory_power=1.0, link_delay=0.0)
    bound = Message(100.0, 100.0, 0.0, 4, (0, 0))
    assert message_ns(bound, 0.0, model) == 100
    assert message_ns(bound, 0.5, model) == pytest.approx(200)
    wide = dataclasses.replace(bound, chain_ns=30.0)
    assert message_ns(wide, 0.5, model) == pytest.approx(100)
    busy = dataclasses.replace(model, busy_delay=0.3)
    assert message_ns(bound, 0.5, busy) == pytest.approx(230)
    assert message_ns(wide, 1.0, model, active=1) == pytest.approx(90)  # a quarter of the link


def test_memory_bound_kernels_lose_bandwidth_and_not_sms() -> None:
    model = Parameters(hbm_bytes_per_ns=3000.0)
    copy = Kernel(100_000, 132 * 20, 1, hbm_bytes=300_000_000)
    assert hbm_share(copy, model) == 1.0
    endless = message(alone_ns=5_000_000, high_priority=True)
    free = overlap([copy], endless, model)
    assert free.compute[0] == pytest.approx(1, abs=0.04)
    moved = round(0.2 * 3000 * endless.alone_ns)
    # 0.2 of the bandwidth alone, less beside a kernel that slows the traffic down
    taken = overlap([copy], dataclasses.replace(endless, hbm_bytes=(moved, moved)), model)
    share = 0.2 * endless.alone_ns / message_ns(endless, 1.0, model)
    assert taken.compute[0] == pytest.approx(1 / (1 - share), rel=0.05)


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
        overlap([], message(), BARE)
    with pytest.raises(ValueError, match="ctas=133"):
        overlap([TILES], message(133), BARE)


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
