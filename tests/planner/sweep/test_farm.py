"""Tasks on all cores and on clusters: every result once, also when a worker is killed."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest

from mhcplan.planner.sweep import farm
from mhcplan.planner.sweep.farm import Farm, FarmError

# Where workers go with tasks left, joblib's own thread may trip over one; no result is lost.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception in thread ExecutorManagerThread:pytest.PytestUnhandledThreadExceptionWarning"
)


def square(number: int) -> int:
    return number * number


def square_but_killed_once(task: tuple[int, str, int]) -> int:
    """The worker that gets number 0 is killed, the first time; who asks works no sooner."""
    number, mark, asking = task
    if os.getpid() == asking:
        while not Path(mark).exists():
            time.sleep(0.01)
    elif number == 0:
        try:
            Path(mark).touch(exist_ok=False)
        except FileExistsError:
            return 0
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def killed_but(asking: int) -> int:
    if os.getpid() != asking:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def process_beside(folder: str) -> int:
    """Who did a task, once two processes are at one."""
    Path(folder, str(os.getpid())).touch()
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.01)
    return os.getpid()


def process_and_whether_it_ignores_interrupts(folder: str) -> tuple[int, bool]:
    return process_beside(folder), signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def fails_at_3(number: int) -> int:
    if number == 3:
        raise ValueError("number 3 fails")
    return number


def test_one_job_is_this_process_and_keeps_the_order() -> None:
    with Farm(jobs=1) as farm:
        assert list(farm.map(lambda n: (n, os.getpid()), [5, 6])) == [
            (0, (5, os.getpid())),
            (1, (6, os.getpid())),
        ]


def test_workers_ignore_interrupts_before_their_first_line_and_who_asks_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(farm, "_begin_worker", len)  # what they would say themselves
    with Farm(jobs=2) as workers:
        tasks = [str(tmp_path)] * 4
        results = workers.map(process_and_whether_it_ignores_interrupts, tasks)
        found = dict(result for _, result in results)
    assert not found.pop(os.getpid())
    assert list(found.values()) == [True]


def test_killed_worker_costs_no_result_and_error_of_a_task_comes_out(tmp_path: Path) -> None:
    tasks = [(number, str(tmp_path / "mark"), os.getpid()) for number in range(8)]
    with Farm(jobs=2) as farm:
        assert sorted(farm.map(square_but_killed_once, tasks)) == [(n, n * n) for n in range(8)]
        assert (tmp_path / "mark").exists()
        with pytest.raises(ValueError, match="number 3 fails"):
            list(farm.map(fails_at_3, range(8)))


def test_task_that_kills_every_worker_is_given_up_with_one_line() -> None:
    with Farm(jobs=2) as farm, pytest.raises(FarmError, match="workers died 3 times in a row"):
        list(farm.map(killed_but, [os.getpid()] * 2))


def test_who_asks_works_too_from_the_end_of_the_list(tmp_path: Path) -> None:
    with Farm(jobs=2) as farm:
        processes = dict(farm.map(process_beside, [str(tmp_path)] * 6))
    assert (processes[0] != os.getpid(), processes[5]) == (True, os.getpid())
    assert len(set(processes.values())) == 2


def _cluster_library(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(
        missing, reason=f"{name} is not installed: it is in the extra cluster"
    )


@pytest.mark.filterwarnings("default")  # the cluster libraries' own
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("dask", marks=_cluster_library("distributed")),
        pytest.param("ray", marks=_cluster_library("ray")),
    ],
)
def test_cluster_of_two_workers_gives_the_same_results_also_when_one_is_killed(
    backend: str, tmp_path: Path
) -> None:
    tasks = [(number, str(tmp_path / "mark"), os.getpid()) for number in range(12)]
    with Farm(backend, jobs=2) as farm:  # pyright: ignore[reportArgumentType]
        assert sorted(farm.map(square_but_killed_once, tasks)) == [(n, n * n) for n in range(12)]
        assert sorted(farm.map(square, [7, 8])) == [(0, 49), (1, 64)]
    assert (tmp_path / "mark").exists()


def collects_after(_: int) -> tuple[int, int, int]:
    return gc.get_threshold()


def test_workers_look_for_garbage_as_rarely_as_the_process_that_starts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = gc.get_threshold()
    monkeypatch.setattr(gc, "get_threshold", lambda: (54_321, 12, 13))
    with Farm(jobs=2) as farm:
        assert dict(farm.map(collects_after, [1, 2]))[0] == (54_321, 12, 13)
    assert before != (54_321, 12, 13)
