"""One process fails in the middle of a step: all end soon, and say which one and why."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from mhcplan.runtime.launch import ProcessFailed, Watch, launch
from mhcplan.runtime.train import Session, Trainer
from tests.runtime.plans import make_case

if TYPE_CHECKING:
    from tests.runtime.worker import Case

MOST_S = 90.0  # start-up of two processes on a busy machine is most of it


class FailsAt:
    """Observer that ends its process in the middle of a step."""

    def __init__(self, index: int, how: str) -> None:
        self._index, self._how = index, how

    def before(self, index: int) -> None:
        if index == self._index:
            if self._how == "raises":
                raise ValueError("a wrong number in the middle")
            if self._how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(9)

    def after(self, index: int) -> None:
        pass


def fail_in_step(process: int, _world: int, case: Case, how: str) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(case.program, case.spec, Session(torch.device("cpu"), timeout_s=300))
    trainer.load(0)
    middle = len(trainer.executor.instructions) // 2
    trainer.step(FailsAt(middle, how) if process == 1 else None)


def wait_for_nobody(process: int, _world: int) -> None:
    """Process 0 waits for a message that 1, which fails, will never send: no socket closes."""
    if process == 0:
        dist.recv(torch.zeros(1), src=1)
    else:
        time.sleep(1)
        raise ValueError("before it sent anything")


def fail_where_nobody_listens(_process: int, _world: int) -> None:
    Watch.fail = _refuse  # type: ignore[method-assign]
    raise ValueError("after the store")


def _refuse(_watch: Watch, _reason: str) -> None:
    raise dist.DistNetworkError("connection refused")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "a wrong number in the middle"),
        ("dies", "exit code 9"),
        ("is killed", "was killed by SIGKILL: the machine ran out of memory"),
    ],
)
def test_a_failure_in_a_step_ends_all_processes(how: str, words: str) -> None:
    case = make_case("failing", schedule="1f1b", n=1)
    begin = time.monotonic()
    with pytest.raises(ProcessFailed, match=f"(?s)process 1.*{words}"):
        launch(fail_in_step, 2, case, how, timeout_s=300)
    assert time.monotonic() - begin < MOST_S


def test_a_process_that_waits_for_one_that_failed_does_not_hang() -> None:
    begin = time.monotonic()
    with pytest.raises(ProcessFailed, match=r"(?s)process 1 failed.*before it sent anything"):
        launch(wait_for_nobody, 2, timeout_s=300)
    assert time.monotonic() - begin < MOST_S


def test_a_process_that_cannot_tell_ends_without_waiting_for_others(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ProcessFailed) as caught:
        launch(fail_where_nobody_listens, 1)
    assert str(caught.value).startswith("processes [0] ended"), "not by an exit code of its own"
    assert "ValueError: after the store" in capfd.readouterr().err
