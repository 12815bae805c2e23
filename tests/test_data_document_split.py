"""Megatron's --split on a source of pairs: the first documents train, the next ones validate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_data_mix import load
from torchladder.data import SourceConfig
from torchladder.data.formats.document_split import split_bounds
from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter
from torchladder.registry import ConfigError


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=3), st.integers(0, 100_000))
def test_parts_follow_each_other_as_in_megatron(numbers, documents):
    train, validation = (split_bounds(",".join(map(str, numbers)), part) for part in ("train", "validation"))
    assert train[0] == 0
    assert train[1] == validation[0]
    assert round(train[1] * documents) == round(numbers[0] / sum(numbers) * documents)
    assert 0 <= validation[1] - sum(numbers[:2]) / sum(numbers) + 1e-9 <= 2e-9


def test_the_loader_trains_and_validates_on_its_part(tmp_path):
    with IndexedWriter(tmp_path / "pair", np.dtype(np.int32)) as writer:
        for document in range(100):
            writer.add(np.full(20, document))
    pair = IndexedTokens(tmp_path / "pair", split_bounds("98,1,1", "validation"))
    assert [pair[0][0], len(pair), pair.num_tokens] == [98, 1, 20]
    assert pair.locate(0).endswith("pair.bin, document 98")
    whole, train = IndexedTokens(tmp_path / "pair"), IndexedTokens(tmp_path / "pair", (0.0, 0.98))
    assert len({whole.fingerprint, train.fingerprint, pair.fingerprint}) == 3
    source = SourceConfig(path=str(tmp_path / "pair.bin"), split="98,1,1")
    train = load(tmp_path, sources=[source])
    assert train.document_lengths()[source.title].size == 98
    held_out = load(tmp_path, sources=[source], split="validation")
    assert set(next(held_out).tokens.unique().tolist()) - {0} == {98}
    explicit = load(tmp_path, sources=[source], validation_sources=[source], split="validation")
    assert explicit.document_lengths()[source.title].size == 1


@pytest.mark.parametrize("split", ["a,b", "0,1", "1,2,3,4", "-1,2", "nan", ","])
def test_splits_that_cannot_be(split):
    with pytest.raises(ConfigError, match="must be the proportions of training, validation and test"):
        split_bounds(split, "train")
