"""Counts in proportion: by hand, within bounds, and always exact."""

import random
from fractions import Fraction

import pytest

from dist_compress.pruning.distribution import in_proportion


@pytest.mark.parametrize(
    ("weights", "least", "most", "total", "counts"),
    [
        ([1, 2, 3], [0, 0, 0], [9, 9, 9], 6, [1, 2, 3]),
        ([1, 2, 3], [0, 0, 0], [9, 9, 2], 6, [1, 3, 2]),  # 4/3 and 8/3 of what is left
        ([1, 1, 1], [0, 0, 0], [9, 9, 9], 5, [2, 2, 1]),  # ties: the earlier one
        ([1, 1, 8], [2, 0, 0], [9, 9, 9], 9, [2, 1, 6]),  # 2, 7/9, 56/9
        ([5, 1], [0, 0], [3, 4], 7, [3, 4]),
        ([5, 1], [2, 1], [3, 4], 3, [2, 1]),
    ],
)
def test_by_hand(weights, least, most, total, counts):
    assert in_proportion([Fraction(w) for w in weights], least, most, total) == counts


def test_the_total_and_the_bounds_hold():
    draw = random.Random(0)
    for _ in range(300):
        n = draw.randint(1, 6)
        weights = [Fraction(draw.randint(1, 50), draw.randint(1, 9)) for _ in range(n)]
        least = [draw.randint(0, 5) for _ in range(n)]
        most = [a + draw.randint(0, 9) for a in least]
        total = draw.randint(sum(least), sum(most))
        counts = in_proportion(weights, least, most, total)
        assert sum(counts) == total and all(a <= c <= b for a, c, b in zip(least, counts, most, strict=True))
        inside = [c / w for c, w, a, b in zip(counts, weights, least, most, strict=True) if a < c < b]
        slack = max((1 / w for w in weights), default=0)
        assert not inside or max(inside) - min(inside) <= 2 * slack  # one scale, up to rounding
