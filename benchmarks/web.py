"""How fast the what-if page's server answers: from the command to the first answer, then a change.

    python benchmarks/web.py

Starts ``mhcplan web`` in a process of its own and asks as the page does: every figure is the
server's own time for a new what-if, from the request to its whole answer with figures and tables
(the last line: one that it has at hand). Frames and opening times of the timeline are printed by
``pytest tests/web/test_browser.py -k large``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from statistics import median

import httpx

BASE = "model=mhc-27b"  # PP8, M64, DualPipe
TIMED = re.compile(r"dur=([\d.]+)")
CHANGES = {
    "n": ("n", (1, 2, 4, 8, 16)),
    "recompute block": ("recompute_block", ("none", 1, 2, 3, 4, 5, 6)),
    "schedule": ("schedule", ("1f1b", "zb1p", "zbv", "dualpipe", "dualpipev")),
    "microbatches": ("microbatches", (48, 52, 56, 60, 68, 72, 76)),
    "pipeline ranks": ("pp", (2, 4, 6, 10, 12)),
}
ROUNDS = 3  # of each change; more values than predictions are kept, so that none is at hand


def main() -> None:
    """Start, ask, print a table."""
    begin = time.perf_counter()
    code = "from mhcplan.planner.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "web", "--no-open", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"http://[^/]+", process.stderr.readline())
            assert found is not None
            with httpx.Client(base_url=found[0], timeout=300) as client:
                print(f"listening after      {time.perf_counter() - begin:7.2f} s")
                ask(client, BASE)
                print(f"first answer after   {time.perf_counter() - begin:7.2f} s")
                measure(client)
        finally:
            process.send_signal(signal.SIGINT)
    print(f"load of the machine  {os.getloadavg()[0]:7.2f} on {os.cpu_count()} cores")


def measure(client: httpx.Client) -> None:
    """Print least and median of every kind of change, the first round left out as warm-up."""
    print(f"{'change of':<20} {'least':>8} {'median':>8} ms")
    for name, (field, values) in CHANGES.items():
        queries = [f"{BASE}&{field}={value}" for value in values] * (1 + ROUNDS)
        times = sorted([ask(client, query) for query in queries][len(values) :])
        print(f"{name:<20} {times[0]:8.0f} {median(times):8.0f}")
    again = [ask(client, BASE) for _ in range(ROUNDS + 1)][1:]
    print(f"{'nothing':<20} {min(again):8.0f} {median(again):8.0f}")


def ask(client: httpx.Client, query: str) -> float:
    """The server's milliseconds for an answer."""
    response = client.get(f"/api/answer?{query}")
    response.raise_for_status()
    told = TIMED.search(response.headers["server-timing"])
    assert told is not None
    return float(told[1])


if __name__ == "__main__":
    main()
