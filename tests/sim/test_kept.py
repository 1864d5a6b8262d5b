"""What is kept is not made again, and never more of it than the limit."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from mhcplan.sim.kept import Kept


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(0, 20))
@example([9, 8, 9, 3, 9], 19)  # 8 goes for 3, as 9 was asked for since
def test_the_last_used_are_kept_as_far_as_the_limit_allows(asked: list[int], limit: int) -> None:
    """A number stands for a value of that size; the oracle goes back through what was asked."""
    kept: Kept[int] = Kept(limit, int)
    for i, number in enumerate(asked):
        made: list[int] = []
        assert kept.find(number, lambda n=number, made=made: made.append(n) or n) == number
        since = set[int]()  # asked for since this number was, and so used later
        for earlier in reversed(asked[:i]):
            since.add(earlier)
            if earlier == number:
                break
        if number in since and sum(since) <= limit:
            assert not made
        if number > limit or number not in asked[:i]:
            assert made
    kept.forget()
    made = []
    kept.find(1, lambda: made.append(1) or 1)
    assert made
