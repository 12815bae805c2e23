"""Packings of whole documents: what they promise, against slow definitions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.data.packing import bin_packing
from torchladder.data.packing.bin_packing import BestFitPacking, PadPacking, best_fit_decreasing
from torchladder.data.packing.shuffle import DocumentOrder

documents = st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any)
both = pytest.mark.parametrize("kind", [PadPacking, BestFitPacking])


def pack(kind, lengths, seq_len, seed=0, shuffle=True, epochs=None, cache=None):
    order = DocumentOrder(len(lengths), seed, source=0, shuffle=shuffle)
    return kind(lengths=np.array(lengths), seq_len=seq_len, order=order, epochs=epochs, cache=cache)


def pieces_of(spans):
    return list(zip(*(part.tolist() for part in spans), strict=True))


def tokens_of(spans, seq_len):
    """Each token that a row trains on, as (document, place in it)."""
    return [(d, place) for d, begin, end in pieces_of(spans) for place in range(begin, end)][:seq_len]


@both
@given(lengths=documents, seq_len=st.integers(1, 12), shuffle=st.booleans(), data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_token_is_read_once_an_epoch(kind, lengths, seq_len, shuffle, data):
    packed = pack(kind, lengths, seq_len, shuffle=shuffle)
    count = int(packed.rows_per_epoch)
    every = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    epoch = data.draw(st.integers(0, 4))
    rows = data.draw(st.permutations(range(epoch * count, (epoch + 1) * count)))
    assert sorted(token for row in rows for token in tokens_of(packed(row), seq_len)) == every
    assert packed.efficiency == pytest.approx(len(every) / (count * seq_len))


@both
@given(lengths=documents, seq_len=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_only_documents_longer_than_a_row_are_cut(kind, lengths, seq_len):
    packed = pack(kind, lengths, seq_len)
    for row in range(int(packed.rows_per_epoch)):
        pieces = pieces_of(packed(row))
        assert 0 < sum(end - begin for _, begin, end in pieces) <= seq_len + 1
        for document, begin, end in pieces:
            assert begin % seq_len == 0
            assert end == lengths[document] or (end - begin == seq_len + 1 and len(pieces) == 1)


def next_fit(lengths, room):
    rows, left, used = [], 0, -1
    for length in lengths:
        if length > left:
            used, left = used + 1, room
        rows.append(used)
        left -= length
    return rows


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(9, 15))
@settings(max_examples=100, deadline=None)
def test_pad_is_next_fit(lengths, room):
    assert pack(PadPacking, lengths, room).assign_rows(np.array(lengths)).tolist() == next_fit(lengths, room)


def best_fit(lengths, room):
    """Room left in each bin after the textbook's best-fit decreasing."""
    left = []
    for length in sorted(lengths, reverse=True):
        fitting = [room_left for room_left in left if room_left >= length]
        if fitting:
            left.remove(min(fitting))
            left.append(min(fitting) - length)
        else:
            left.append(room - length)
    return sorted(left)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 30))
@settings(max_examples=100, deadline=None)
def test_best_fit_is_best_fit_decreasing(lengths, room):
    chosen = best_fit_decreasing(np.array(lengths), room)
    used = np.bincount(chosen, weights=lengths)
    assert sorted((room - used).astype(int).tolist()) == best_fit(lengths, room)


def test_each_horizon_is_packed_separately(monkeypatch):
    monkeypatch.setattr(bin_packing, "BEST_FIT_HORIZON_PIECES", 4)
    lengths = [5, 4, 3, 2, 5, 4, 3, 2, 5]
    assert pack(BestFitPacking, lengths, 7, shuffle=False).assign_rows(np.array(lengths)).tolist() == [
        0,
        1,
        1,
        0,
        2,
        3,
        3,
        2,
        4,
    ]


def test_best_fit_fills_rows_that_pad_leaves_empty():
    lengths = np.random.default_rng(0).lognormal(6, 1, 20_000).astype(int) + 1
    assert pack(BestFitPacking, lengths, 4096).efficiency > 0.999
    assert pack(PadPacking, lengths, 4096).efficiency < 0.95


@both
def test_epochs_are_made_of_the_same_rows(kind):
    packed = pack(kind, list(range(1, 60)), 64)
    count = int(packed.rows_per_epoch)
    assert [pieces_of(packed(row)) for row in range(count)] == [pieces_of(packed(row + count)) for row in range(count)]


@both
def test_a_last_epoch_ends(kind):
    packed = pack(kind, [3, 4, 9], 5, epochs=2)
    assert packed.num_rows == 2 * packed.rows_per_epoch
    assert pieces_of(packed(packed.num_rows)) == []
    assert pack(kind, [3, 4, 9], 5).num_rows is None


def test_a_long_document_is_cut_and_its_tail_kept():
    packed = pack(PadPacking, [2, 12, 3], 5, shuffle=False)
    assert [pieces_of(packed(row)) for row in range(4)] == [
        [(0, 0, 2)],
        [(1, 0, 6)],  # five tokens, and the sixth as the last label
        [(1, 5, 11)],
        [(1, 10, 12), (2, 0, 3)],
    ]


@both
def test_the_cache_holds_what_is_computed(kind, tmp_path):
    lengths = np.random.default_rng(1).integers(0, 50, 300)
    fresh, first, second = (pack(kind, lengths, 32, cache=cache) for cache in (None, tmp_path, tmp_path))
    for row in (0, 7, 1000):
        assert pieces_of(fresh(row)) == pieces_of(first(row)) == pieces_of(second(row))
    assert len([path for path in (tmp_path / "packings").iterdir() if path.is_dir()]) == 1
    pack(kind, lengths, 32, seed=1, cache=tmp_path)(0)
    pack(kind, lengths, 33, cache=tmp_path)(0)
    assert len([path for path in (tmp_path / "packings").iterdir() if path.is_dir()]) == 3


def test_a_packing_never_changes():
    # By value: a change here would change the data of every run that resumes.
    packed = pack(BestFitPacking, [7, 3, 12, 1, 5, 4, 2], 8, seed=3)
    assert packed.rows_per_epoch == Fraction(5)
    assert [pieces_of(packed(row)) for row in range(5)] == GOLDEN


GOLDEN = [
    [(0, 0, 7), (3, 0, 1)],
    [(4, 0, 5), (1, 0, 3)],
    [(5, 0, 4), (2, 8, 12)],
    [(6, 0, 2)],
    [(2, 0, 9)],
]
