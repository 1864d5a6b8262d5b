"""From measured kernels and transfers to what they put on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mhcplan.profiles.loads import GpuSettings, LoadModel, assumptions, fitted_parameters
from mhcplan.profiles.lookup import CostModel
from mhcplan.profiles.products import products_of
from mhcplan.profiles.schema import ProfileError
from mhcplan.profiles.store import find_profile
from mhcplan.profiles.vocabulary import TransferKey
from mhcplan.sim.compiled import simulate_compiled
from tests.support.programs import Maker
from tests.support.synthetic_profile import synthetic_profile

if TYPE_CHECKING:
    from mhcplan.sim.device_kernels import Loads

MEDIA = ("intra_node", "inter_node")
DEFAULT = GpuSettings()


@cache
def h100() -> CostModel:
    return CostModel(find_profile("h100-sxm"))


def loads_of(keys: list[str], settings: GpuSettings = DEFAULT) -> Loads:
    loads = h100().table(keys, settings).loads
    assert loads is not None
    return loads


def test_every_measured_op_alone_takes_what_was_measured() -> None:
    keys = [str(row.key) for row in h100().profile.ops]
    table = h100().table(keys, DEFAULT)
    maker = Maker()
    for _ in keys:
        maker.op(0, 1)
    program, _ = maker.build()
    line = simulate_compiled(replace(program, cost_keys=tuple(keys)), table)
    measured = [row.duration_ns for row in h100().profile.ops]
    assert (line.end_ns - line.start_ns).tolist() == measured
    assert table.loads is not None
    assert all(table.loads.kernels)


def test_kernels_share_the_bytes_of_their_op() -> None:
    rows = h100().profile.ops
    loads = loads_of([str(row.key) for row in rows])
    for row, kernels in zip(rows, loads.kernels, strict=True):
        total = sum(segment.hbm_bytes for segment in row.segments)
        found = sum(kernel.hbm_bytes for kernel in kernels)
        if products := products_of(
            row.key, row.segments
        ):  # some of which move more than their share
            assert found >= sum(product.operand_bytes for product in products.values())
            assert found >= 0.999 * total
        else:
            assert found == pytest.approx(total, rel=1e-3, abs=len(kernels))


def test_short_elementwise_kernels_take_the_bandwidth_and_products_the_rest() -> None:
    row = next(row for row in h100().profile.ops if row.kind == "dense_ffn" and row.pass_ == "F")
    (kernels,) = loads_of([str(row.key)]).kernels
    names = [segment.name for segment in row.segments if segment.duration_ns >= 3000]
    shares = [k.hbm_bytes / k.duration_ns / 3000 for k in kernels]
    by_name = dict(zip(names, shares, strict=True))
    assert by_name.pop("_swiglu") == pytest.approx(0.9, rel=0.01)
    assert max(by_name.values()) < 0.6


def test_attention_can_be_asked_to_end_its_ctas_one_by_one() -> None:
    row = next(r for r in h100().profile.ops if r.kind == "attention_mla" and r.pass_ == "F")
    names = [segment.name for segment in row.segments if segment.duration_ns >= 3000]
    at = next(i for i, name in enumerate(names) if "sdpa" in name)
    (staying,) = loads_of([str(row.key)]).kernels
    (ending,) = loads_of([str(row.key)], GpuSettings(attention="preemptible")).kernels
    assert staying[at].persistent
    assert not ending[at].persistent
    assert ending[at].ctas > staying[at].ctas
    # an op's other kernels stay as they are, but for their part of its bytes
    assert [replace(k, hbm_bytes=0) for i, k in enumerate(staying) if i != at] == [
        replace(k, hbm_bytes=0) for i, k in enumerate(ending) if i != at
    ]


@pytest.mark.parametrize(("pass_", "times"), [("F", 2.705), ("I", 2.179)])
def test_preemptible_attention_takes_as_much_longer_as_was_measured(
    pass_: str, times: float
) -> None:
    row = next(r for r in h100().profile.ops if r.kind == "attention_mla" and r.pass_ == pass_)
    keys = [str(row.key), "norm.F hidden=2560 tokens=4096"]
    (staying, norm), (ending, same) = (
        h100().costs(keys, GpuSettings(attention=attention))
        for attention in ("persistent", "preemptible")
    )
    (kernel_ns,) = (s.duration_ns for s in row.segments if s.persistent and "sdpa" in s.name)
    assert ending.duration_ns - staying.duration_ns == pytest.approx((times - 1) * kernel_ns, abs=1)
    assert sum(s.duration_ns for s in ending.segments) <= ending.duration_ns
    assert (ending.source, same) == ("extrapolated", norm)
    assert "preemptible" in ending.explanation


def test_pieces_of_attention_are_those_of_the_ops_own_shape() -> None:
    rows = [r for r in h100().profile.ops if r.kind == "attention_mla" and r.pass_ == "I"]
    loads = loads_of([str(row.key) for row in rows])
    for row, kernels in zip(rows, loads.kernels, strict=True):
        found = {kernel.pieces for kernel in kernels if kernel.tail_share}
        assert found <= {row.shape["tokens"] * row.shape["heads"] // 128}, row.key
    assert any(kernel.tail_share for kernels in loads.kernels for kernel in kernels)


def test_a_parameter_that_the_model_no_longer_has_is_left_out() -> None:
    model = h100().profile.contention_model
    assert model is not None
    more = model.model_copy(update={"parameters": {**model.parameters, "gone": 1.0}})
    assert fitted_parameters(more) == fitted_parameters(model)
    assert fitted_parameters(model).num_sms == 132


def test_traffic_is_as_it_was_overlapped_or_assumed_and_said_so() -> None:
    keys = ["all_to_all 8/8 67108864", "send_recv 2/2 67108864", "send_recv 2/1 67108864"]
    a2a, inside, between = loads_of(keys).traffic
    assert a2a is not None
    assert inside is not None
    assert between is not None
    assert (a2a.ctas, inside.ctas, between.ctas) == (32, 16, 2)
    assert inside.received_hbm_bytes == 3 * inside.sent_hbm_bytes == 3 * 67108864
    assert between.link_share == pytest.approx(1, abs=0.02)
    said = " ".join(assumptions(h100().profile, DEFAULT, MEDIA))
    assert "two channels for each network card" in said
    assert "all_reduce is taken to use" in said
    in_a_node = " ".join(assumptions(h100().profile, DEFAULT, MEDIA[:1]))
    assert "between nodes" not in in_a_node
    assert "all_reduce is taken to use" in in_a_node


def test_few_ctas_make_a_transfer_slower_than_measured_and_never_faster() -> None:
    key = "send_recv 2/2 67108864"
    measured, usual, few = (
        h100().costs([key], settings)[0]
        for settings in (None, DEFAULT, GpuSettings(comm_ctas=2))
    )  # fmt: skip
    assert measured == usual
    assert few.duration_ns == pytest.approx(8_000 + 67108864 / (2 * 33), rel=1e-3)
    assert few.duration_ns > measured.duration_ns
    assert few.source == "extrapolated"
    many = h100().costs([key], GpuSettings(comm_ctas=60))[0]
    assert many.duration_ns == measured.duration_ns


@pytest.mark.parametrize(
    ("key", "limit", "ctas"),
    [
        ("send_recv 2/2 8388608", 8, 4),  # between two ranks half of what it may
        ("send_recv_both 2/2 8388608", 4, 2),
        ("send_recv 2/2 67108864", 4, 4),  # large ones all of a few
        ("send_recv 2/2 8388608", 12, 6),  # as of the next smaller limit that was measured
        ("send_recv 2/2 8388608", 1, 1),
        ("all_to_all 2/2 8388608", 8, 8),
        ("all_to_all_uneven 2/2 8388608", 8, 8),
    ],
)
def test_messages_take_the_part_of_a_limit_that_was_measured(
    key: str, limit: int, ctas: int
) -> None:
    cost = h100().costs([key], GpuSettings(comm_ctas=limit))[0]
    loads = h100().table([key], GpuSettings(comm_ctas=limit)).loads
    assert cost.ctas == ctas
    assert loads is not None
    assert loads.traffic[0] is not None
    assert loads.traffic[0].ctas == ctas


def test_chains_of_a_larger_group_carry_the_bytes_that_it_sends() -> None:
    pair, eight = (TransferKey("all_to_all", size, size, 2**26) for size in (2, 8))
    costs = h100().costs([str(pair), str(eight)])
    loads = h100().table([str(pair), str(eight)], GpuSettings()).loads
    assert loads is not None
    of_pair, of_eight = loads.traffic
    assert of_pair is not None
    assert of_eight is not None
    longer = costs[1].duration_ns / costs[0].duration_ns  # 7/8 of the buffer leave, not 1/2
    assert of_eight.chain_ns == pytest.approx(longer * of_pair.chain_ns, rel=0.1)


def test_a_profile_without_a_contention_model_plays_none_and_says_so() -> None:
    profile = synthetic_profile()
    model = LoadModel(profile)
    key = TransferKey("send_recv", 2, 2, 1 << 20)
    cost = CostModel(profile).transfer(key)
    assert model.loads([key], [cost], DEFAULT) is None
    assert model.with_ctas(key, cost, 2) == cost
    (text,) = assumptions(profile, DEFAULT, MEDIA)
    assert "no contention model" in text


def test_fewer_sms_than_the_gpu_has_come_with_a_warning() -> None:
    usual, all_sms, fewer = (
        list(assumptions(h100().profile, GpuSettings(compute_sms=sms), MEDIA))
        for sms in (None, 132, 112)
    )
    assert usual == all_sms
    (warning,) = set(fewer) - set(usual)
    assert warning.startswith("compute_sms=112 takes SMs from kernels whose grids are made for 132")


def test_more_sms_than_the_gpu_has_are_refused() -> None:
    with pytest.raises(ProfileError, match="compute_sms=133 must be at most 132"):
        loads_of(["all_to_all 8/8 67108864"], GpuSettings(compute_sms=133))


def test_settings_change_the_step_only_where_they_should() -> None:
    keys = ["all_to_all 8/8 67108864"]
    plain, fewer = (loads_of(keys, s) for s in (DEFAULT, GpuSettings(compute_sms=112)))
    assert (plain.compute_sms, fewer.compute_sms) == (None, 112)
    assert plain.traffic == fewer.traffic
    assert np.array_equal(
        h100().table(keys, DEFAULT).duration_ns, h100().table(keys).duration_ns
    )  # fmt: skip
