"""``profile overlap`` and ``profile validate --holdout`` as they are typed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.commands import Run

POST = "mhc_post.F hidden=2560 n=4 tokens=4096"


def test_an_op_of_a_model_beside_its_traffic(run: Run) -> None:
    words = ("profile", "overlap", "mhc-3b:attention.F", "mhc-3b:dispatch")
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["compute"].startswith("attention_mla.F heads=16 hidden=1280")
    assert found["traffic"].startswith("all_to_all 8/8 ")
    assert found["compute_slowdown"] >= 1
    assert set(found["error"]) == {
        "basis", "of", "pairs", "compute_percent", "traffic_percent"
    }  # fmt: skip
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert f"takes {found['traffic_slowdown']:.2f} times as long" in out
    for word in ("SMs: ", "memory: ", "link: ", "error: ", "extrapolated: 8 ranks"):
        assert word in out


def test_a_measured_pair_shows_what_was_measured(run: Run) -> None:
    words = ("profile", "overlap", "gemm_library", "send_recv_both 8MiB", "--ctas", "2")
    code, out, _ = run(*words, "--priority", "equal")
    assert code == 0
    assert "measured" in out.splitlines()[2]
    assert "error: this very pair, seen by the fit" in out or "pair, held out" in out


@pytest.mark.parametrize(
    ("compute", "traffic", "said"),
    [
        ("gemm_huge", "send_recv 1MiB", "a kernel that was overlapped (gemm_wave_long"),
        ("brew.F cups=2", "send_recv 1MiB", "is no cost key"),
        ("mhc-27b:brew.F", "send_recv 1MiB", "must name one of adamw, "),
        ("mhc-27b:mhc_p", "send_recv 1MiB", "mhc_post.F"),
        ("mhc-28b:norm.F", "send_recv 1MiB", "mhc-27b"),
        (POST, "gossip 1MiB", "must be a pattern"),
        (POST, "mhc-27b:gossip", "'mhc-27b:gossip' must name one of "),
        ("norm.F hidden=2560 tokens=999999999", "send_recv 1MiB", "profile measure"),
    ],
)
def test_what_cannot_be_priced_is_bad_input(
    compute: str, traffic: str, said: str, run: Run
) -> None:
    code, out, err = run("profile", "overlap", compute, traffic)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_more_ctas_than_sms_are_bad_input(run: Run) -> None:
    for ctas in ("0", "-1"):
        code, _, err = run("profile", "overlap", POST, "send_recv 1MiB", "--ctas", ctas)
        assert (code, err.count("\n")) == (2, 1)


def test_holdout_says_which_family_misses_its_bar(run: Run) -> None:
    code, out, _ = run("profile", "validate", "h100-sxm", "--holdout")
    assert code == 0
    assert "families pass" in out
    assert "pass" in out.split("all ops")[1].splitlines()[0]
    code, said, _ = run("profile", "validate", "h100-sxm", "--holdout", "--json")
    families = json.loads(said)["holdout"]
    assert code == 0
    assert f"{sum(not row['misses'] for row in families)} of {len(families)} families pass" in out
    assert all(row["bar"].keys() == {"median", "p90", "mean", "worst", "share"} for row in families)
