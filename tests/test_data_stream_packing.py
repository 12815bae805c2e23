import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.data.packing.shuffle import DocumentOrder
from torchladder.data.packing.spans import registry
from torchladder.data.packing.stream_packing import StreamPacking
from torchladder.registry import ConfigError

documents = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def stream(lengths, seq_len, seed=0, shuffle=True, epochs=None):
    order = DocumentOrder(len(lengths), seed, source=0, shuffle=shuffle)
    return StreamPacking(lengths=np.array(lengths), seq_len=seq_len, order=order, epochs=epochs)


def tokens_of(spans):
    """Each token as (document, place in it)."""
    return [
        (document, place)
        for document, begin, end in zip(*(part.tolist() for part in spans), strict=True)
        for place in range(begin, end)
    ]


def endless(lengths, order):
    """The slow definition: document after document, epoch after epoch."""
    epoch = 0
    while True:
        for document in order(epoch).tolist():
            yield from ((document, place) for place in range(lengths[document]))
        epoch += 1


@given(documents, st.integers(1, 12), st.integers(0, 3), st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_rows_are_cut_from_the_endless_stream(lengths, seq_len, seed, shuffle, data):
    packed = stream(lengths, seq_len, seed, shuffle)
    source = endless(lengths, packed.order)
    reference = [next(source) for _ in range(20 * seq_len + 1)]
    for row in data.draw(st.permutations(range(20))):  # in any order, each is the same
        assert tokens_of(packed(row)) == reference[row * seq_len : (row + 1) * seq_len + 1]


@given(documents, st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_every_token_is_read_once_an_epoch_and_no_tail_is_dropped(lengths, seq_len, epochs):
    packed = stream(lengths, seq_len)
    total = epochs * sum(lengths)
    rows = -(-total // seq_len)
    read = [token for row in range(rows) for token in tokens_of(packed(row))[:seq_len]][:total]
    every = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    for epoch in range(epochs):
        assert sorted(read[epoch * len(every) : (epoch + 1) * len(every)]) == every


@given(documents, st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_with_a_last_epoch_every_token_but_the_first_is_a_label_once(lengths, seq_len, epochs):
    packed = stream(lengths, seq_len, shuffle=False, epochs=epochs)
    source = endless(lengths, packed.order)
    reference = [next(source) for _ in range(epochs * sum(lengths))]
    rows = [tokens_of(packed(row)) for row in range(packed.num_rows)]
    assert [token for row in rows for token in row[1:]] == reference[1:]
    assert all(len(row) >= 2 for row in rows)
    assert stream(lengths, seq_len).num_rows is None


def test_spans_hold_no_more_than_the_row():
    spans = stream([3, 0, 4], 5, shuffle=False)(1)
    assert spans.documents.tolist() == [2, 0, 1, 2]
    assert spans.begins.tolist() == [2, 0, 0, 0]
    assert spans.ends.tolist() == [4, 3, 0, 1]


def test_orders_differ_by_seed_source_and_epoch():
    orders = [
        DocumentOrder(50, seed, source)(epoch).tolist() for seed in (0, 1) for source in (0, 1) for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 8
    assert DocumentOrder(50, 0, 0)(0).tolist() == orders[0]


def test_an_order_never_changes():
    # By value: a change here would change the data of every run that resumes.
    assert DocumentOrder(10, seed=0, source=0)(0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert DocumentOrder(10, seed=7, source=2)(3).tolist() == [5, 1, 8, 4, 6, 3, 7, 9, 2, 0]


def test_unshuffled_is_as_stored():
    assert DocumentOrder(5, 0, 0, shuffle=False)(3).tolist() == [0, 1, 2, 3, 4]


def test_a_far_row_is_found_without_the_rows_before():
    lengths = np.full(1000, 37)
    packed = stream(lengths, 100, seed=3)
    row = 10**9
    epoch, offset = divmod(row * 100, 37_000)
    expected = np.repeat(packed.order(epoch), 37)[offset : offset + 101]
    assert [document for document, _ in tokens_of(packed(row))] == expected.tolist()


def test_unknown_packings_list_the_known():
    with pytest.raises(ConfigError, match="Did you mean 'stream'"):
        registry.get("streem")
