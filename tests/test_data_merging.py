import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter
from torchladder.data.prepare import merging, metadata
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.registry import ConfigError


def write(prefix, documents, dtype=np.uint16, **about):
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)
    if about:
        tokens = sum(map(len, documents))
        known = DatasetMetadata(
            documents=len(documents), tokens=tokens, dtype="uint16", checksums=writer.checksums, **about
        )
        metadata.write_metadata(prefix, known)
    return str(prefix)


def read(prefix):
    pair = IndexedTokens(prefix)
    return [pair[i].tolist() for i in range(len(pair))]


@given(
    st.lists(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=5), min_size=1, max_size=4), st.integers(1, 9)
)
@settings(max_examples=40, deadline=None)
def test_documents_follow_each_other(tmp_path_factory, pairs, at_once):
    folder = tmp_path_factory.mktemp("pairs")
    names = [write(folder / str(number), documents) for number, documents in enumerate(pairs)]
    original, merging.COPY_TOKENS = merging.COPY_TOKENS, at_once
    try:
        merging.merge_datasets(str(folder / "whole"), names)
    finally:
        merging.COPY_TOKENS = original
    expected = [document for documents in pairs for document in documents]
    assert read(folder / "whole") == expected
    write(folder / "direct", expected)
    for suffix in ("bin", "idx"):
        assert (folder / f"whole.{suffix}").read_bytes() == (folder / f"direct.{suffix}").read_bytes()
    assert metadata.read_metadata(folder / "whole").documents == len(expected)


def test_documents_of_several_sequences_that_lie_anywhere(tmp_path):
    pair = IndexedTokens(write(tmp_path / "x", [[1, 2], [3], [4, 5]]))
    pair.lengths, pair.offsets = np.array([2, 1]), np.array([3, 0])
    merging.write_merged(str(tmp_path / "y"), [pair], DatasetMetadata(dtype="uint16"))
    assert read(tmp_path / "y") == [[4, 5], [1]]


def test_metadata_is_joined(tmp_path):
    tokenizer = {"name": "a", "fingerprint": "f", "vocab_size": 9, "bos": None, "eos": 1}
    a = write(tmp_path / "a", [[1]], tokenizer=tokenizer, sources=[{"path": "x", "bytes": 1}], skipped={"empty": 2})
    b = write(tmp_path / "b", [[2], [3]], tokenizer={**tokenizer, "name": "b"}, sources=[{"path": "y", "bytes": 2}])
    whole = merging.merge_datasets(str(tmp_path / "whole"), [a, b])
    assert whole == metadata.read_metadata(tmp_path / "whole")
    assert (whole.documents, whole.tokens, whole.skipped) == (3, 3, {"empty": 2})
    assert [source["path"] for source in whole.sources] == ["x", "y"]
    assert metadata.find_corrupt_file(tmp_path / "whole", whole.checksums) is None
    c = write(tmp_path / "c", [[2]], tokenizer={**tokenizer, "eos": None})
    with pytest.raises(ConfigError, match="different tokenizers or bos/eos"):
        merging.merge_datasets(str(tmp_path / "other"), [a, c])
    assert not (tmp_path / "other.bin").exists()


def test_what_cannot_be_merged(tmp_path):
    a, b = write(tmp_path / "a", [[1]]), write(tmp_path / "b", [[1]], np.int32)
    with pytest.raises(ConfigError, match="b stores tokens as int32, the datasets before it as uint16"):
        merging.merge_datasets(str(tmp_path / "whole"), [a, b])
    with pytest.raises(ConfigError, match="name each input once"):
        merging.merge_datasets(str(tmp_path / "whole"), [a, f"{a}.bin"])
    with pytest.raises(ConfigError, match="name each input once"):
        merging.merge_datasets(a, [a])
    with pytest.raises(ConfigError, match=r"none\.bin is missing"):
        merging.merge_datasets(str(tmp_path / "whole"), [a, str(tmp_path / "none")])
    assert not (tmp_path / "whole.bin").exists()
    write(tmp_path / "there", [[9]])
    with pytest.raises(ConfigError, match=r"there\.bin already exists"):
        merging.merge_datasets(str(tmp_path / "there"), [a])
    merging.merge_datasets(str(tmp_path / "there"), [a], overwrite=True)
    assert read(tmp_path / "there") == [[1]]


def test_damage_is_found(tmp_path):
    a = write(tmp_path / "a", [[1, 2]], sources=[{"path": "x", "bytes": 1}])
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.bin is damaged"):
        merging.merge_datasets(str(tmp_path / "whole"), [a])
    (tmp_path / "a.json").write_text(json.dumps({"documents": 1}))
    with pytest.raises(ConfigError, match=r"a\.json is not the metadata"):
        merging.merge_datasets(str(tmp_path / "whole"), [a])
