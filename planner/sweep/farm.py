"""Many independent tasks on all cores of this machine, or on a Ray or Dask cluster, through joblib.

Clusters are joblib's backends. On this machine the process that asks works too, beside joblib's
worker processes: they take a second or two to start. It takes tasks from the end of the list while
they take them from its beginning, so that neighbours, which have most in common, stay together.

What is added is what a long search needs: results come as they are ready, a task that raises does
not take the others' results with it, and the tasks of a worker that was killed go to another one.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import warnings
from collections import deque
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from mhcplan.planner.plan.spec import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from types import TracebackType

Backend = Literal["local", "ray", "dask"]
Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_DEATHS = 3  # workers lost in a row without a result: it is the task that kills them

_TASKS_OF_A_LIST = 4  # for each worker of Ray
_TASKS_AHEAD = 2  # for each process here, the one that runs included
_IDLE_SECONDS = 300.0  # after which a process ends that a next sweep could use
_CLUSTER_ERRORS = ("ray.exceptions", "distributed.")  # modules; tasks' own errors come as values


class FarmError(SpecError):
    """Workers that cannot be had or that keep dying; the message is one line."""


@dataclass(frozen=True)
class _Raised:
    error: Exception


class Farm:
    """Workers, for as long as a ``with`` lasts.

    A cluster is found where its library looks for one (``RAY_ADDRESS``,
    ``DASK_SCHEDULER_ADDRESS``); without that, one is started on this machine.
    """

    def __init__(self, backend: Backend = "local", jobs: int | None = None) -> None:
        """Choose workers; none is started before there is a task for it.

        Args:
            backend: local processes, or the cluster's library.
            jobs: how many; None is one a core, or all that the cluster has. One local job is this
                process.
        """
        self._backend: Backend = backend
        self._jobs = jobs
        self._workers: Any = None
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Let the workers go."""
        self._opened.close()
        self._workers = None

    @property
    def jobs(self) -> int:
        """Tasks that run at once, as far as it can be said before workers have started."""
        if self._jobs is not None:
            return self._jobs
        return _module("joblib").cpu_count()

    def map(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number and the result of every task, as they become ready.

        Raises:
            FarmError: workers cannot be started, or die again and again.
            Exception: the first one that a task raised.
        """
        if self._backend == "local" and (self.jobs == 1 or len(tasks) == 1):
            for number, task in enumerate(tasks):
                yield number, function(task)
            return
        run = self._run_here if self._backend == "local" else self._run_on_cluster
        left, deaths = dict(enumerate(tasks)), 0
        while left:
            try:
                with _closing(run(function, list(left.items()))) as results:
                    for number, result in results:
                        deaths = 0
                        del left[number]
                        if isinstance(result, _Raised):
                            raise _TaskError(result.error)
                        yield number, result
            except _TaskError as raised:
                raise raised.error from None
            except Exception as error:
                if not _is_lost_worker(error):
                    raise
                deaths += 1
                if deaths == MAX_DEATHS:
                    raise FarmError(
                        f"workers died {deaths} times in a row (killed, or out of memory): {error}"
                    ) from None
                self._restart()

    def _run_here(
        self, function: Callable[[Task], Result], numbered: Sequence[tuple[int, Task]]
    ) -> Generator[tuple[int, Result | _Raised]]:
        """Results of this process and of others; what they have not begun when nobody asks any
        more is not begun, and what they have is cut short."""
        # a worker whose caches have grown is replaced, and no result is lost by it
        warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
        others = self.jobs - 1
        workers = _module("joblib.externals.loky").get_reusable_executor(
            others, timeout=_IDLE_SECONDS, initializer=_begin_worker, initargs=(gc.get_threshold(),)
        )
        left, running = deque(numbered), set[Future[tuple[int, Result | _Raised]]]()
        try:
            while left or running:
                while len(running) < min(len(left), _TASKS_AHEAD * others):
                    with _interrupts_ignored():  # the first task starts the processes
                        running.add(workers.submit(_caught, function, *left.popleft()))
                if left:
                    yield _caught(function, *left.pop())
                done, running = wait(running, 0 if left else None, FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            if running:
                workers.shutdown(kill_workers=True)

    def _run_on_cluster(
        self, function: Callable[[Task], Result], numbered: Sequence[tuple[int, Task]]
    ) -> Generator[tuple[int, Result | _Raised]]:
        joblib = _module("joblib")
        if self._workers is None:
            self._workers = self._start()
        # Ray's pool hands over lists only: short ones, so that results are seen as they come
        size = _TASKS_OF_A_LIST * self._workers.n_jobs if self._backend == "ray" else len(numbered)
        for first in range(0, len(numbered), size):
            some = numbered[first : first + size]
            yield from self._workers(joblib.delayed(_caught)(function, *item) for item in some)

    def _start(self) -> Any:  # noqa: ANN401 - joblib has no types
        joblib = _module("joblib")
        return_as = "list" if self._backend == "ray" else "generator_unordered"
        try:
            join = _join_ray if self._backend == "ray" else _join_dask
            jobs = join(self._jobs, self._opened)
        except (OSError, TimeoutError) as error:
            raise FarmError(f"backend={self._backend}: no workers ({error})") from None
        self._opened.enter_context(joblib.parallel_config(backend=self._backend, n_jobs=jobs))
        # plans are seconds of work in kilobytes: hand tasks over one by one
        parallel = joblib.Parallel(return_as=return_as, batch_size=1, pre_dispatch="3*n_jobs")
        return self._opened.enter_context(parallel)

    def _restart(self) -> None:
        try:
            self._opened.close()
        finally:
            self._opened, self._workers = ExitStack(), None


class _TaskError(Exception):
    """A task's own error on its way out, told from an error of the workers."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _closing(results: Generator[Result]) -> Generator[Generator[Result]]:
    """Give up what is not finished when nobody asks for it any more; joblib would warn of it."""
    try:
        yield results
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results.close()


def _caught(
    function: Callable[[Task], Result], number: int, task: Task
) -> tuple[int, Result | _Raised]:
    try:
        return number, function(task)
    except Exception as error:  # a task's error is a result, so that others' results are kept
        return number, _Raised(error)


def _is_lost_worker(error: Exception) -> bool:
    return isinstance(error, BrokenExecutor) or type(error).__module__.startswith(_CLUSTER_ERRORS)


def _module(name: str) -> Any:  # noqa: ANN401 - these libraries have no types, or are not there
    return import_module(name)


def _begin_worker(collect_after: tuple[int, int, int]) -> None:
    """Leave interrupts to the main process, and look for garbage as rarely as it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(*collect_after)


@contextmanager
def _interrupts_ignored() -> Generator[None]:
    """Processes that are started here begin without Ctrl-C, which a shell sends to all of them:
    they import for a second before they can leave it to the main process, and would print where."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # not Python's to set, or not from here
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _join_ray(jobs: int | None, opened: ExitStack) -> int:
    """Connect to Ray or start it here; returns how many tasks may run at once."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _module("ray")
    if not ray.is_initialized():
        own = "RAY_ADDRESS" not in os.environ
        started = {"num_cpus": jobs, "include_dashboard": False} if own else {}
        ray.init(log_to_driver=False, configure_logging=False, **started)
        opened.callback(ray.shutdown)
    _module("ray.util.joblib").register_ray()
    return jobs or int(ray.cluster_resources()["CPU"])


def _join_dask(jobs: int | None, opened: ExitStack) -> int:
    """Connect to Dask or start it here; returns how many tasks may run at once."""
    own = _module("dask").config.get("scheduler-address", None) is None
    started: dict[str, Any] = {"n_workers": jobs, "threads_per_worker": 1} if own else {}
    # a lost worker is no news for a person, and no reason to print tracebacks
    quiet = {"dashboard_address": None, "silence_logs": logging.CRITICAL} if own else {}
    client = opened.enter_context(_module("distributed").Client(**started, **quiet))
    return jobs or sum(client.nthreads().values())
