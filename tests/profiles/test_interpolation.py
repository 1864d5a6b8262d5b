"""Which measured shapes vote for a shape, and how much; worked out by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhcplan.profiles.interpolation import Grid, Outside

Point = tuple[int, ...]


def votes(points: list[Point], target: Point) -> dict[Point, float]:
    axes = ["x", "y", "z"][: len(target)]
    return {points[row]: weight for row, weight in Grid(axes, points).neighbours(target)}


def test_two_rows_share_by_logarithmic_distance() -> None:
    assert votes([(1,), (8,), (64,)], (2,)) == pytest.approx({(1,): 2 / 3, (8,): 1 / 3})


def test_equal_votes_are_ordered_by_shape() -> None:
    assert list(votes([(1,), (4,)], (2,))) == list(votes([(4,), (1,)], (2,))) == [(1,), (4,)]


def test_four_corners_share_bilinearly() -> None:
    found = votes([(1, 1), (1, 16), (8, 1), (8, 16), (64, 1)], (2, 2))
    assert found == pytest.approx(
        {(1, 1): 2 / 3 * 3 / 4, (1, 16): 2 / 3 / 4, (8, 1): 1 / 3 * 3 / 4, (8, 16): 1 / 3 / 4}
    )


def test_rows_that_differ_in_fewest_axes_vote_alone() -> None:
    """The nearer two differ in both axes: what they would add is not known to belong to one."""
    near = [(9, 11), (11, 9)]
    assert votes([(10, 1), (10, 100), *near], (10, 10)) == pytest.approx(
        {(10, 1): 0.5, (10, 100): 0.5}
    )


def test_tighter_bracket_counts_more() -> None:
    """A hole in a grid: bracketed by a factor of 4 along x and of 16 along y."""
    found = votes([(1, 4), (4, 4), (2, 1), (2, 16)], (2, 4))
    assert found == pytest.approx({(1, 4): 1 / 3, (4, 4): 1 / 3, (2, 1): 1 / 6, (2, 16): 1 / 6})


def test_beyond_the_edge_the_edge_is_held() -> None:
    assert votes([(1, 1), (8, 1), (1, 4), (8, 4)], (16, 1)) == {(8, 1): 1.0}
    assert votes([(2, 1), (8, 1), (2, 4), (8, 4)], (1, 2)) == pytest.approx(
        {(2, 1): 0.5, (2, 4): 0.5}
    )


def test_diagonal_rows_vote_for_a_shape_between_them() -> None:
    """Widths and heads of models grow together: two of the four corners exist and share."""
    assert votes([(1, 1), (16, 16)], (4, 4)) == pytest.approx({(1, 1): 0.5, (16, 16): 0.5})
    assert votes([(1, 1), (16, 16)], (2, 2)) == pytest.approx({(1, 1): 0.9, (16, 16): 0.1})


def test_rows_on_one_side_only_do_not_bracket() -> None:
    """The corners with x = 16 were not measured, so nearest rows vote, by distance squared."""
    found = votes([(1, 1), (1, 16), (16, 64)], (4, 4))
    assert set(found) == {(1, 1), (1, 16), (16, 64)}
    assert found[1, 1] == pytest.approx(found[1, 16])
    assert found[1, 1] > found[16, 64]


def test_nearest_rows_are_few() -> None:
    points = [(2**i, 2**j) for i in range(4) for j in range(4) if i + j != 6]
    found = votes(points, (8, 8))
    assert len(found) == 4
    assert max(found, key=lambda p: found[p]) in [(8, 4), (4, 8)]


grids = st.lists(st.tuples(*[st.integers(0, 40)] * 3), min_size=1, max_size=25, unique=True)


@given(points=grids, target=st.tuples(*[st.integers(0, 60)] * 3), seed=st.integers(0, 99))
def test_weights_are_shares_and_order_of_rows_is_irrelevant(
    points: list[Point], target: Point, seed: int
) -> None:
    if target in points:
        points = [p for p in points if p != target] or [(61, 61, 61)]
    found = votes(points, target)
    assert sum(found.values()) == pytest.approx(1)
    assert all(weight > 0 for weight in found.values())
    shuffled = random.Random(seed).sample(points, len(points))
    again = votes(shuffled, target)
    assert list(again) == list(found)
    assert again == pytest.approx(found)


def test_outside_says_where_and_how_far() -> None:
    grid = Grid(["x", "q"], [(2, 0), (8, 0), (4, 512)])
    assert grid.outside((8, 512)) == []
    assert grid.outside((16, 0)) == [Outside("x", 16, 2, 8, 2.0)]
    assert grid.outside((1, 1024)) == [
        Outside("x", 1, 2, 8, 2.0),
        Outside("q", 1024, 512, 512, 2.0),
    ]


def test_zero_means_without_and_is_outside_of_sizes() -> None:
    """Sizes are compared with sizes: 0 is no lower end of their range."""
    assert Grid(["q"], [(0,), (512,)]).outside((256,)) == [Outside("q", 256, 512, 512, 2.0)]
    assert Grid(["q"], [(512,)]).outside((0,)) == [Outside("q", 0, 512, 512, 1.0)]
    assert Grid(["q"], [(0,)]).outside((512,)) == [Outside("q", 512, 0, 0, 1.0)]
