"""Worker processes: limits, what is given up, and that they come back."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time

import pytest

from mhcplan.web.whatif import Refused
from mhcplan.web.workers import Busy, Workers


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out


def test_tasks_are_limited_given_up_and_survived() -> None:
    asyncio.run(_try_everything())


async def _try_everything() -> None:
    workers = Workers(limit_seconds=200, warm_up=False)
    try:
        assert await workers.run("background", math.sqrt, 4) == 2

        with pytest.raises(Refused, match="too early"):
            await workers.run("background", _end)
        assert await workers.run("background", math.sqrt, 4) == 2  # in a new process

        begin = time.monotonic()
        given_up = asyncio.ensure_future(workers.run("background", time.sleep, 1000))
        await asyncio.sleep(0.2)
        queue = [
            asyncio.ensure_future(workers.run("background", time.sleep, 1000)) for _ in range(15)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="wait already"):
            await workers.run("background", math.sqrt, 4)
        for task in (given_up, *queue):
            task.cancel()
        await asyncio.gather(given_up, *queue, return_exceptions=True)
        assert workers.status()["waiting"]["background"] == 0
        assert await workers.run("background", math.sqrt, 9) == 3  # nothing sleeps before it
        assert time.monotonic() - begin < 200
    finally:
        workers.close()


def test_a_task_beyond_the_limit_is_refused() -> None:
    async def sleep() -> None:
        workers = Workers(limit_seconds=0.2, warm_up=False)
        try:
            await workers.run("background", time.sleep, 1000)
        finally:
            workers.close()

    with pytest.raises(Refused, match=r"longer than 0\.2 s"):
        asyncio.run(sleep())
