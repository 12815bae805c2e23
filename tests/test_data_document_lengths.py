"""Effective context from document lengths alone, against every token of every document, and against masks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchladder import mask
from torchladder.data import document_lengths

lengths = st.lists(st.integers(0, 40), max_size=12)


@given(lengths, st.integers(1, 50))
def test_the_means_are_those_of_all_tokens(documents, limit):
    seen = [min(place + 1, limit) for length in documents for place in range(length)]
    owners = [length for length in documents for _ in range(length)]
    array = np.array(documents, dtype=np.int32)
    assert document_lengths.mean_effective_context(array, limit) == pytest.approx(np.mean(seen or [0]))
    assert document_lengths.long_share(array, limit) == pytest.approx(np.mean([x > limit for x in owners] or [0]))


@given(lengths.filter(any), st.integers(1, 50))
def test_it_is_what_the_masks_attend_to(documents, limit):
    positions = torch.tensor([[place for length in documents for place in range(length)]], dtype=torch.int32)
    pairs = mask.pairs(mask.from_names(["document", "sliding"], positions, limit))
    mean = document_lengths.mean_effective_context(np.array(documents), limit)
    assert mean == pytest.approx(pairs / positions.numel())


def test_long_documents_do_not_overflow():
    huge = np.array([1 << 31, 1 << 33], dtype=np.int64)
    assert document_lengths.mean_effective_context(huge, 1 << 20) == pytest.approx(1 << 20, rel=1e-3)
    assert document_lengths.long_share(np.full(5, 2**31 - 1, dtype=np.int32), 1024) == 1.0
