"""Pipeline schedules: which rank runs which action in which order.

Every schedule is one pure function of the number of ranks P and the number of microbatches M.
Bubbles are given in the times of one chunk, that is of one stage's layers for one microbatch.
"""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from mhcplan.planner.schedules.table import (
    Placement,
    RowWriter,
    Schedule,
    ScheduleError,
    loop_placement,
    two_copy_placement,
    v_placement,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "SCHEDULES",
    "Schedule",
    "ScheduleError",
    "build_schedule",
    "dualpipe",
    "dualpipev",
    "interleaved_1f1b",
    "loop_placement",
    "one_f_one_b",
    "two_copy_placement",
    "v_placement",
    "zb1p",
    "zbv",
]


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B (PipeDream-flush): bubble (P-1)(F+B), at most P live chunks.

    Raises:
        ScheduleError: A number below 1.
    """
    _check_positive(num_ranks, num_microbatches)

    def write_row(rank: int) -> RowWriter:
        row = RowWriter((rank, range(num_microbatches)))
        warm_up = min(num_ranks - 1 - rank, num_microbatches)
        for _ in range(warm_up):
            row.f()
        for _ in range(num_microbatches - warm_up):
            row.f()
            row.b()
        for _ in range(warm_up):
            row.b()
        return row

    return _schedule("1f1b", num_microbatches, loop_placement(num_ranks), write_row)


def interleaved_1f1b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Interleaved 1F1B (arXiv 2104.04473), two stages a rank in loop placement.

    A rank turns to its other stage after each round of microbatches: P of them if M is a multiple
    of P, and a few more, the same in each round, if it is not. Bubble (P-1)(F+B) for M >= P: half
    of 1F1B's, as stages are half as deep.

    Raises:
        ScheduleError: A number below 1, or M that does not split into M // P equal rounds.
    """
    _check_positive(num_ranks, num_microbatches)
    round_size = _round_size(num_ranks, num_microbatches)

    def write_row(rank: int) -> RowWriter:
        row = RowWriter(*((stage, range(num_microbatches)) for stage in (rank, rank + num_ranks)))
        total = 2 * num_microbatches
        warm_up = min(round_size + 2 * (num_ranks - 1 - rank), total)
        for step in range(total + warm_up):
            if step < total:
                row.f(step // round_size % 2)
            if step >= warm_up:
                row.b(1 - (step - warm_up) // round_size % 2)
        return row

    return _schedule("interleaved-1f1b", num_microbatches, loop_placement(num_ranks, 2), write_row)


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB1P, or ZB-H1 (arXiv 2401.10241): 1F1B whose W are put off to fill the cool-down.

    Rank r lags r W behind, so that live chunks and queued W together stay at 1F1B's P. Bubble
    (P-1)(F+I-W), which DeepSeek-V3 writes (P-1)(F+B-2W), for M >= P and W <= F, I.

    Raises:
        ScheduleError: A number below 1.
    """
    _check_positive(num_ranks, num_microbatches)

    def write_row(rank: int) -> RowWriter:
        row = RowWriter((rank, range(num_microbatches)))
        warm_up = min(num_ranks - 1 - rank, num_microbatches)
        for _ in range(warm_up):
            row.f()
        for repeat in range(num_microbatches):
            if repeat < num_microbatches - warm_up:
                row.f()
            row.i()
            if repeat >= rank:
                row.w()
        row.drain()
        return row

    return _schedule("zb1p", num_microbatches, loop_placement(num_ranks), write_row)


def zbv(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V (arXiv 2401.10241, section 6), two stages a rank in V placement.

    With F = I = W and M >= 2P-1 no rank waits between its first and its last action, so that of the
    bubble only the staggered start and end are left, (P-1)F. For fewer microbatches the row of 2P-1
    is written and what does not exist is left out.

    Raises:
        ScheduleError: A number below 1.
    """
    _check_positive(num_ranks, num_microbatches)
    ordered = max(num_microbatches, 2 * num_ranks - 1)

    def write_row(rank: int) -> RowWriter:
        row = _zbv_row(num_ranks, rank, ordered)
        row.actions = [action for action in row.actions if action.microbatch < num_microbatches]
        return row

    return _schedule("zbv", num_microbatches, v_placement(num_ranks), write_row)


def _zbv_row(num_ranks: int, rank: int, num_microbatches: int) -> RowWriter:
    microbatches = range(num_microbatches)
    row = RowWriter((rank, microbatches), (2 * num_ranks - 1 - rank, microbatches))
    # Warm-up: fill the way down, then the way up, then start the way back.
    for _ in range(2 * (num_ranks - rank) - 1):
        row.f(0)
    for _ in range(rank):
        row.f(1)
        row.f(0)
    for _ in range(num_ranks - rank):
        row.f(1)
        row.i(1)
        row.w(1)
    # Steady: the warm-up has run 2P-1-r F of phase 0 and P of phase 1.
    for repeat in range(num_microbatches - num_ranks):
        if repeat < num_microbatches - (2 * num_ranks - 1 - rank):
            row.f(0)
        row.i(0)
        row.w(0)
        row.f(1)
        row.i(1)
        row.w(1)
    # Cool-down: no F is left to fill the waits, the W that are put off do.
    for _ in range(rank):
        row.i(0)
        row.i(1)
    for _ in range(num_ranks - rank):
        row.i(0)
        row.w(0)
    row.drain(1)
    row.drain(0)
    return row


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe (arXiv 2412.19437, section 3.2.1): two copies of the model, opposite directions.

    Bubble (P/2-1)(F&B + B - 3W) with F = I = W, and P+1 live chunks on every rank.

    Raises:
        ScheduleError: P odd, M odd, or M < 2P.
    """
    _check_positive(num_ranks, num_microbatches)
    if num_ranks % 2:
        raise ScheduleError(f"pp={num_ranks} must be even for dualpipe: ranks mirror each other")
    if num_microbatches % 2:
        raise ScheduleError(
            f"microbatches={num_microbatches} must be even for dualpipe: half of them go each way"
        )
    _check_two_per_rank("dualpipe", num_ranks, num_microbatches)
    half = num_microbatches // 2

    def write_row(rank: int) -> RowWriter:
        # Phase 0 is the direction that starts nearer to this rank: direction 0 for the first half
        # of the ranks, 1 for the second, which so run the same program mirrored.
        position = min(rank, num_ranks - 1 - rank)
        near, far = range(half), range(half, num_microbatches)
        if rank >= num_ranks // 2:
            near, far = far, near
        return _dualpipe_row(num_ranks, position, near, far)

    return _schedule("dualpipe", num_microbatches, two_copy_placement(num_ranks), write_row)


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV (deepseek-ai/DualPipe): DualPipe cut in half and folded into a V of one copy.

    With F = I = W the bubble is (P-1)(F&B + B - 3W) in chunks of one of its 2P stages, and 2P+1
    chunks live on every rank. On one rank it is no pipeline but still overlaps F with B.

    Raises:
        ScheduleError: M < 2P.
    """
    _check_positive(num_ranks, num_microbatches)
    _check_two_per_rank("dualpipev", num_ranks, num_microbatches)
    microbatches = range(num_microbatches)

    def write_row(rank: int) -> RowWriter:
        return _dualpipe_row(2 * num_ranks, rank, microbatches, microbatches)

    return _schedule("dualpipev", num_microbatches, v_placement(num_ranks), write_row)


def _dualpipe_row(num_stages: int, position: int, near: range, far: range) -> RowWriter:
    """The eight steps of one rank, after deepseek-ai/DualPipe.

    Args:
        num_stages: Stages S of the model; the two phases meet between S/2-1 and S/2.
        position: Stage of phase 0; phase 1 has its mirror image, S-1-position.
        near: Microbatches of phase 0, which the rank sees early.
        far: Microbatches of phase 1, as many, which come back to it late.
    """
    to_middle = num_stages // 2 - 1 - position
    row = RowWriter((position, near), (num_stages - 1 - position, far))
    # Step 1: F0, until the first microbatch of phase 1 can be here.
    for _ in range(2 * to_middle):
        row.f(0)
    # Step 2: F0 F1
    for _ in range(position + 1):
        row.f(0)
        row.f(1)
    # Step 3: I1 W1 F1, split so that the gradient leaves before W.
    for _ in range(to_middle):
        row.i(1)
        row.w()
        row.f(1)
    # Step 4: F0&B1 F1&B0, the main step.
    for repeat in range(len(near) - num_stages + position + 1):
        if repeat == 0 and to_middle == 0:
            # Apart in the middle, where B1's gradient is still on its way while F0 can run.
            row.f(0)
            row.b(1)
        else:
            row.overlap(0, 1)
        row.overlap(1, 0)
    # Step 5: B1 F1&B0
    for _ in range(to_middle):
        row.b(1)
        row.overlap(1, 0)
    # Step 6: B1 B0, in the second half of which I stands for B: its W waits for steps 7 and 8.
    for count in range(2 * (position + 1)):
        backward = row.b if count <= position else row.i
        backward(1 - count % 2)
    # Step 7: W I0
    for _ in range(to_middle):
        row.w()
        row.i(0)
    # Step 8: W
    for _ in range(position + 1):
        row.w()
    return row


SCHEDULES: MappingProxyType[str, Callable[[int, int], Schedule]] = MappingProxyType(
    {
        "1f1b": one_f_one_b,
        "interleaved-1f1b": interleaved_1f1b,
        "zb1p": zb1p,
        "zbv": zbv,
        "dualpipe": dualpipe,
        "dualpipev": dualpipev,
    }
)
"""Every schedule by the name that plans and the command line use."""


@lru_cache(maxsize=64)
def build_schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds a schedule by name, once.

    Args:
        name: Key of ``SCHEDULES``.
        num_ranks: P, the ranks of one pipeline (``pp`` in a plan).
        num_microbatches: M of one replica, both directions together.

    Raises:
        ScheduleError: An unknown name, or P and M that the schedule cannot run.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"schedule={name!r} must be one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_ranks, num_microbatches)


def _schedule(
    name: str,
    num_microbatches: int,
    placement: Placement,
    write_row: Callable[[int], RowWriter],
) -> Schedule:
    return Schedule(name, num_microbatches, placement, lambda rank: write_row(rank).actions)


def _check_positive(num_ranks: int, num_microbatches: int) -> None:
    for field, value in (("pp", num_ranks), ("microbatches", num_microbatches)):
        if value < 1:
            raise ScheduleError(f"{field}={value} must be at least 1")


def _check_two_per_rank(name: str, num_ranks: int, num_microbatches: int) -> None:
    if num_microbatches < 2 * num_ranks:
        raise ScheduleError(
            f"microbatches={num_microbatches} must be at least {2 * num_ranks} for {name} with "
            f"pp={num_ranks}: two a rank"
        )


def _round_size(num_ranks: int, num_microbatches: int) -> int:
    """Microbatches in each of interleaved 1F1B's max(1, M // P) rounds."""
    num_rounds = max(1, num_microbatches // num_ranks)
    round_size, rest = divmod(num_microbatches, num_rounds)
    if rest:
        below = num_microbatches - rest
        above = min(below + num_rounds, (num_rounds + 1) * num_ranks)
        raise ScheduleError(
            f"microbatches={num_microbatches} must split into {num_rounds} equal rounds for "
            f"interleaved-1f1b with pp={num_ranks}: {below} or {above} do"
        )
    return round_size
