"""The capture on a GPU: does a whole block take the sum of its ops' times?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from mhcplan.profiles.capture import grid
from mhcplan.profiles.capture.block import check_block
from mhcplan.profiles.capture.ops import Log, Session, measure_ops

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_block_takes_the_sum_of_its_ops(tmp_path: Path) -> None:
    """Within 3 %: the profile prices the code that runs."""
    found = check_block("mhc-9b", tmp_path / "p.json", torch.device("cuda"), 20_000_000)
    print(found)
    assert abs(found.difference_percent) < 3


def test_times_repeat_and_segments_fill_them(tmp_path: Path) -> None:
    device = torch.device("cuda")
    keys = [k for k in grid.keys((1,)) if k.kind in ("norm", "shared_experts")][:6]
    rows = []
    for run in ("a", "b"):
        session = Session(device, torch.bfloat16, "code", torch.cuda.get_device_name())
        log = Log(tmp_path / run, session)
        assert measure_ops(keys, session, log) == []
        rows.append(log.rows)
    for key, first in rows[0].items():
        second = rows[1][key]
        assert abs(first.duration_ns / second.duration_ns - 1) < 0.05, key
        filled = sum(segment.duration_ns for segment in first.segments)
        assert 0.4 * first.duration_ns < filled <= first.duration_ns, key
