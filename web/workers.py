"""Processes that simulate for the server, with limits on time, on waiting work and on patience.

One process answers what a person waits for, in the order asked, and keeps its last predictions at
hand; another one works through sweeps in the background. A task that nobody waits for any more is
taken out of the queue, or ended if it runs on; one beyond the time limit is ended. The process is
then replaced.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from typing import TYPE_CHECKING, Literal, TypeVar

from pebble import ProcessExpired, ProcessPool

from mhcplan.web import answers
from mhcplan.web.whatif import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from pebble import ProcessFuture

Place = Literal["front", "background"]
T = TypeVar("T")

_WARM_UP_SECONDS = 300
_GRACE_SECONDS = 5  # a task that was given up may end by itself: its prediction is kept
_MAX_WAITING = 16  # tasks a process


class Busy(Exception):
    """More is asked than is worked off."""

    def __init__(self, message: str) -> None:
        """``message`` is one line."""
        super().__init__(message)
        self.message = message


class Workers:
    """The two processes; made by the server when it starts."""

    def __init__(self, limit_seconds: float, *, warm_up: bool = True) -> None:
        """``limit_seconds`` is what one task may take; ``warm_up`` prepares for what-ifs."""
        self._limit_seconds = limit_seconds
        context = multiprocessing.get_context("spawn")
        self._pools = {
            place: ProcessPool(max_workers=1, context=context) for place in ("front", "background")
        }
        self._waiting = dict.fromkeys(self._pools, 0)
        self._done = dict.fromkeys(self._pools, 0)
        if warm_up:  # the first run in a checkout compiles: each what is asked of it first
            for place, task in (("front", answers.warm_up), ("background", answers.warm_up_all)):
                self._pools[place].schedule(task, timeout=_WARM_UP_SECONDS)

    def close(self) -> None:
        """End both processes, whatever they do."""
        for pool in self._pools.values():
            pool.stop()
            pool.join()

    def status(self) -> dict[str, dict[str, int]]:
        """Tasks of each process: those that wait or run, and those that came to an end."""
        return {"waiting": dict(self._waiting), "done": dict(self._done)}

    async def run(self, place: Place, task: Callable[..., T], *given: object) -> T:
        """Run a task of :mod:`mhcplan.web.answers`; give it up if this coroutine is cancelled.

        Raises:
            Refused: by the task, or it took too long.
            Busy: too many tasks wait.
        """
        if self._waiting[place] >= _MAX_WAITING:
            raise Busy(f"{_MAX_WAITING} what-ifs wait already; try again in a while")
        future: ProcessFuture[T] = self._pools[place].schedule(
            task, args=given, timeout=self._limit_seconds
        )
        result = asyncio.wrap_future(future)
        result.add_done_callback(_read)
        self._waiting[place] += 1
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            self._give_up(future)
            raise
        except TimeoutError:
            raise Refused(
                f"took longer than {self._limit_seconds:g} s: a smaller step, or `mhcplan predict`"
            ) from None
        except ProcessExpired:
            raise Refused("the simulation ended too early: too little memory?") from None
        finally:
            self._waiting[place] -= 1
            self._done[place] += 1

    @staticmethod
    def _give_up(future: ProcessFuture[T]) -> None:
        if future.running():
            asyncio.get_running_loop().call_later(_GRACE_SECONDS, future.cancel)
        else:
            future.cancel()


def _read(result: asyncio.Future[T]) -> None:
    """Take note of an error that nobody waits for any more."""
    if not result.cancelled():
        result.exception()
