import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.data.mixing.interleave import WeightedInterleave
from torchladder.registry import ConfigError

weights = st.one_of(st.integers(1, 9), st.floats(0.05, 5), st.sampled_from([0.1, 0.7, 1e-2, 12_040_045.571]))


@given(st.lists(weights, min_size=1, max_size=8), st.one_of(st.just(0), st.integers(0, 10**12)), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_count_is_within_one_row_of_its_share(weights, first, small_blocks):
    weights = [weight for weight in weights if weight > max(weights) / 300]
    mixture = WeightedInterleave(weights)
    if small_blocks:  # many borders, at the least length the proof allows
        mixture._block_rows = 2 * mixture._settle_rows
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    whole = sum(parts)
    counts = dict.fromkeys(range(len(parts)), 0) if first == 0 else {}
    for row in range(first, first + min(1200, 5 * mixture._block_rows)):
        source, index = mixture(row)
        assert index == counts.get(source, index)  # no row of a source is lost or repeated
        counts[source] = index + 1
        assert all(abs(count * whole - (row + 1) * parts[i]) < whole for i, count in counts.items())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_whole_numbers_of_rows_come_out_exactly(counts):
    mixture = WeightedInterleave(counts)
    drawn = [mixture(row) for row in range(sum(counts))]
    assert sorted(drawn) == [(i, index) for i, count in enumerate(counts) for index in range(count)]


def test_any_row_is_the_same_however_it_is_reached():
    through = WeightedInterleave([0.5, 0.3, 0.15, 0.05])
    rows = [through(row) for row in range(40_000)]  # over two borders
    for row in (39_999, 16_384, 16_383, 0, 32_768):
        assert WeightedInterleave([0.5, 0.3, 0.15, 0.05])(row) == rows[row]


def test_an_interleave_never_changes():
    # By value: a change here would change the data of every run that resumes.
    assert [WeightedInterleave([0.5, 0.3, 0.2])(row)[0] for row in range(12)] == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]


def test_row_ten_million_is_reached_without_those_before_it():
    mixture = WeightedInterleave([12_040_045_571, 5_157_493, 777_777_777, 31.5e7])
    mixture(10_000_000)
    assert set(mixture._blocks) == {10_000_000 // mixture._block_rows}


def test_units_do_not_matter():
    for weights in ([1, 3], [0.1, 0.3]):
        assert WeightedInterleave(weights).proportions == [Fraction(1, 4), Fraction(3, 4)]


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [1, float("nan")], [float("inf")], [1, 1e-9]])
def test_invalid_weights(weights):
    with pytest.raises(ConfigError, match="weights are"):
        WeightedInterleave(weights)
