"""Derived profiles: a measured one scaled by datasheets, every figure assumed and cited."""

from __future__ import annotations

import pytest

from mhcplan.profiles.derive import DERIVED, derive
from mhcplan.profiles.op_fit import Roofline
from mhcplan.profiles.presets import HARDWARE
from mhcplan.profiles.schema import Profile, parse_profile, profile_text
from mhcplan.profiles.store import find_profile


@pytest.fixture(scope="module")
def h100() -> Profile:
    return find_profile("h100-sxm")


@pytest.mark.parametrize("name", sorted(DERIVED))
def test_every_figure_is_assumed_and_cited(name: str) -> None:
    profile = find_profile(name)
    figures = (*profile.rates, profile.overheads, *profile.ops, *profile.transfers)
    assert all(figure.source == "assumed" and figure.citation for figure in figures)
    assert profile.hardware == HARDWARE[name]
    assert parse_profile(profile_text(profile), name) == profile


def test_the_machine_itself_is_its_own_scaling(h100: Profile) -> None:
    again = derive(h100, "h100-sxm")
    assert [row.duration_ns for row in again.ops] == [row.duration_ns for row in h100.ops]
    assert [r.duration_ns for r in again.transfers] == [r.duration_ns for r in h100.transfers]


def test_h800_is_an_h100_with_slower_nvlink(h100: Profile) -> None:
    h800 = find_profile("h800")
    assert [row.duration_ns for row in h800.ops] == [row.duration_ns for row in h100.ops]
    large = [
        (slow.duration_ns, fast.duration_ns)
        for slow, fast in zip(h800.transfers, h100.transfers, strict=True)
        if fast.bytes >= 2**28
    ]
    assert all(slow == pytest.approx(450 / 200 * fast, rel=0.02) for slow, fast in large)
    assert large


def test_ops_of_b200_follow_the_rate_that_bounds_them(h100: Profile) -> None:
    b200, roofline = find_profile("b200"), Roofline(h100)
    launch_ns = h100.overheads.launch_ns
    seen = set[str]()
    for fast, slow in zip(b200.ops, h100.ops, strict=True):
        flops_ns, bytes_ns = roofline.work_ns(slow.key)
        faster = (slow.duration_ns - launch_ns) / max(fast.duration_ns - launch_ns, 1)
        if flops_ns > 2 * bytes_ns > 0 and slow.duration_ns > 100_000:
            assert faster == pytest.approx(2250 / 989, rel=1e-3)
            seen.add("arithmetic")
        elif bytes_ns > 2 * flops_ns and slow.duration_ns > 100_000:
            assert faster == pytest.approx(8.0 / 3.35, rel=1e-3)
            seen.add("bytes")
    assert seen == {"arithmetic", "bytes"}


def test_only_an_equal_chip_draws_what_was_measured(h100: Profile) -> None:
    power = find_profile("h800").power_model
    assert power is not None
    assert power.source == "assumed"
    assert power.citation
    assert h100.power_model is not None
    assert power.free_watts == h100.power_model.free_watts
    assert find_profile("b200").power_model is None
