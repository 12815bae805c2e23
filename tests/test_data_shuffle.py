from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.data.packing.shuffle import RowOrder, feistel_permute


@given(st.integers(1, 2000), st.integers(0, 10**9))
@settings(deadline=None)
def test_permute_is_a_permutation(count, seed):
    assert sorted(feistel_permute(i, count, (seed,)) for i in range(count)) == list(range(count))


def test_neighbours_are_driven_apart():
    count = 10_000
    there = np.array([feistel_permute(i, count, (1, 2)) for i in range(count)])
    # Of a random permutation: neighbours are count / 3 apart on average, one element stays, and orders do not agree.
    assert abs(np.abs(np.diff(there)).mean() - count / 3) < 0.02 * count
    assert (there == np.arange(count)).sum() < 8
    assert abs(np.corrcoef(there, np.arange(count))[0, 1]) < 0.03


def test_each_key_has_its_own_order():
    orders = [[feistel_permute(i, 50, key) for i in range(50)] for key in [(0, 0), (0, 1), (1, 0)]]
    assert len({tuple(order) for order in orders}) == 3


@given(st.integers(2, 2000), st.integers(1, 60), st.integers(0, 5))
@settings(deadline=None)
def test_rows_stay_within_their_epoch(tokens, seq_len, seed):
    rows_per_epoch = Fraction(tokens, seq_len)
    order = RowOrder(rows_per_epoch, seed, 0)

    def epoch(row):
        """The epoch that a row lies in as a whole, or None."""
        number = row // rows_per_epoch
        return number if row + 1 <= (number + 1) * rows_per_epoch else None

    rows = range(int(3 * rows_per_epoch))
    there = [order(row) for row in rows]
    assert sorted(there) == list(rows)
    for row, other in zip(rows, there, strict=True):
        assert epoch(row) == epoch(other)
        assert epoch(row) is not None or row == other
