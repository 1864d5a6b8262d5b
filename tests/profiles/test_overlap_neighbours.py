"""Prices are brought nearer to measured pairs of the same kernel, and to nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcplan.profiles.contention import Message
from mhcplan.profiles.contention_fit import Pair, predict
from mhcplan.profiles.overlap_neighbours import Neighbours, price_errors
from mhcplan.sim.device_kernels import Kernel, Parameters

MIB = 2**20
PARAMETERS = Parameters()
KERNEL = (Kernel(100_000, 132, 1, 80 * MIB, persistent=True),)


def pair(size: int, ctas: int, *, off: float = 1.0, compute: str = "gemm", high: bool = False,
         eager: bool = False) -> Pair:  # fmt: skip
    """A pair whose measured traffic is ``off`` times what the model plays."""
    message = Message(
        3_000 + size / 200, 0.0, 3_000, ctas, (size, size), eager=eager, high_priority=high,
    )  # fmt: skip
    name = f"{compute}|{size} {ctas} {high} {eager}"
    bare = Pair(name, compute, KERNEL, 101_000, message, (1.0, 1.0), "send_recv_both", size)
    compute_slowdown, traffic = predict(bare, PARAMETERS)
    return replace(bare, measured=(compute_slowdown, traffic * off))


@given(
    st.lists(
        st.tuples(st.sampled_from([MIB, 8 * MIB, 64 * MIB]), st.sampled_from([2, 8, 16])),
        min_size=1, max_size=9, unique=True,
    ),
    st.floats(0.5, 2.0),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_what_all_neighbours_are_off_by_is_made_up_for_in_part(
    known: list[tuple[int, int]], off: float
) -> None:
    asked = pair(4 * MIB, 4)
    played = predict(asked, PARAMETERS)
    neighbours = Neighbours([pair(*one, off=off) for one in known], PARAMETERS)
    found = neighbours.price(asked, played)
    low, high = sorted((1.0, off))
    assert low - 1e-9 <= found.traffic / played[1] <= high + 1e-9
    assert found.compute == pytest.approx(played[0])
    assert found.neighbours == len(known)


def test_the_more_alike_the_traffic_the_more_a_pair_counts() -> None:
    asked = pair(8 * MIB, 8)
    played = predict(asked, PARAMETERS)

    def made_up(*known: Pair) -> float:
        return Neighbours(known, PARAMETERS).price(asked, played).traffic / played[1]

    near, far = pair(16 * MIB, 8, off=1.5), pair(64 * MIB, 2, off=1.5)
    urgent = pair(16 * MIB, 8, off=1.5, high=True)
    assert 1 < made_up(far) < made_up(urgent) < made_up(near) < 1.5
    assert made_up(near) < made_up(near, pair(4 * MIB, 8, off=1.5))
    assert made_up(pair(16 * MIB, 8, off=1.5), pair(4 * MIB, 8, off=1 / 1.5)) == pytest.approx(1.0)


def test_the_pair_itself_other_kernels_and_other_kinds_of_sending_say_nothing() -> None:
    asked = pair(8 * MIB, 8)
    played = predict(asked, PARAMETERS)
    others = [
        pair(8 * MIB, 8, off=2.0), pair(8 * MIB, 4, off=2.0, compute="attention"),
        pair(8 * MIB, 4, off=2.0, eager=True),
    ]  # fmt: skip
    assert Neighbours(others, PARAMETERS).price(asked, played) == (*played, 0)


def test_held_out_pairs_are_priced_from_the_others_alone() -> None:
    sizes = [MIB * 2**i for i in range(7)]
    pairs = [pair(size, ctas, off=1.3) for size in sizes for ctas in (2, 4, 8, 16)]
    held = [each for each in pairs if each.held_out]
    assert 0 < len(held) < len(pairs)
    found = price_errors(pairs, PARAMETERS)
    assert [each for each, *_ in found] == held
    assert all(traffic < 0.12 for *_, traffic in found)  # the model alone: 1 - 1 / 1.3
    told = [replace(each, measured=(90.0, 90.0)) if each.held_out else each for each in pairs]
    neighbours = Neighbours((each for each in pairs if not each.held_out), PARAMETERS)
    for other, compute, traffic in price_errors(told, PARAMETERS):
        price = neighbours.price(other, predict(other, PARAMETERS))
        assert compute == pytest.approx(1 - price.compute / 90)
        assert traffic == pytest.approx(1 - price.traffic / 90)
