"""What stands at the top of the page."""

from __future__ import annotations

import pytest

from mhcplan.web.facts import facts
from tests.support.reports import make_report


@pytest.mark.parametrize(
    ("slower", "note"),
    [
        (4.36, "plain 1,000.00; power limit: arithmetic +4.4 %"),
        (0.0, "plain 1,000.00"),
        (None, "plain 1,000.00"),
    ],
)
def test_step_says_what_the_power_limit_adds(slower: float | None, note: str) -> None:
    step = next(
        f for f in facts(make_report(power_slowdown_percent=slower), None) if f[0] == "step"
    )
    assert step.note == note


def test_one_gpu_is_not_all_gpus() -> None:
    notes = {gpus: facts(make_report(gpus=gpus), None)[3].note for gpus in (1, 1024)}
    assert notes == {1: "of 1 GPU", 1024: "of all 1,024 GPUs"}


def test_overhead_of_the_plain_residual_is_not_over_itself() -> None:
    plain, other = make_report(), make_report()
    plain = plain.model_copy(
        update={"plan": plain.plan.model_copy(
            update={"residual": plain.plan.residual.model_copy(update={"kind": "plain"})})}
    )  # fmt: skip
    assert facts(plain, None)[0].note == "plain residual itself"
    assert facts(other, None)[0].note == "of mHC n=4 over plain"
