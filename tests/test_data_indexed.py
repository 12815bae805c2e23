import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.data.formats import indexed
from torchladder.data.formats.indexed import DTYPES, IndexedTokens, IndexedWriter, dtype_for
from torchladder.registry import ConfigError


def write(prefix: Path, documents, dtype=np.uint16) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def index(lengths, indices, dtype_code=8, pointers=None, magic=b"MMIDIDX\x00\x00", version=1, counts=None) -> bytes:
    """An .idx by hand, from the format's description alone."""
    size = {1: 1, 4: 4, 8: 2}.get(dtype_code, 4)
    if pointers is None:
        pointers = [sum(lengths[:i]) * size for i in range(len(lengths))]
    header = magic + struct.pack("<QBQQ", version, dtype_code, *(counts or (len(lengths), len(indices))))
    return (
        header
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(indices)}q", *indices)
    )


@st.composite
def pairs(draw):
    dtype = np.dtype(draw(st.sampled_from(list(DTYPES.values()))))
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return dtype, draw(st.lists(st.lists(st.integers(low, high), max_size=8), max_size=12))


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_documents_come_back(tmp_path_factory, case):
    dtype, documents = case
    read = IndexedTokens(write(tmp_path_factory.mktemp("pair") / "x", documents, dtype))
    assert [read[i].tolist() for i in range(len(read))] == documents
    assert read.lengths.tolist() == [len(document) for document in documents]
    assert read.num_tokens == sum(map(len, documents))
    assert read.dtype == dtype


def test_bytes_on_disk_are_the_format(tmp_path):
    write(tmp_path / "x", [[1, 2, 3], [], [65535]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 65535)
    assert (tmp_path / "x.idx").read_bytes() == index([3, 0, 1], [0, 1, 2, 3])
    assert indexed.HEADER.size == 34


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (10**6, "int32")]
)
def test_dtype_follows_the_vocabulary(vocab_size, dtype):
    assert dtype_for(vocab_size) == np.dtype(dtype)


def test_a_pair_is_found_by_either_name(tmp_path):
    write(tmp_path / "a.b.bin", [[7, 8]])
    for name in ("a.b", "a.b.bin", "a.b.idx"):
        assert IndexedTokens(tmp_path / name)[0].tolist() == [7, 8]


def test_sequences_join_into_documents(tmp_path):
    (tmp_path / "x.bin").write_bytes(np.arange(10, dtype=np.uint16).tobytes())
    (tmp_path / "x.idx").write_bytes(index([2, 3, 1, 4], [0, 2, 2, 3, 4, 4]))
    read = IndexedTokens(tmp_path / "x")
    assert [read[i].tolist() for i in range(len(read))] == [[0, 1, 2, 3, 4], [], [5], [6, 7, 8, 9], []]


def test_merged_index_without_documents_reads_by_sequence(tmp_path):
    (tmp_path / "x.bin").write_bytes(np.arange(5, dtype=np.uint16).tobytes())
    (tmp_path / "x.idx").write_bytes(index([2, 3], [0]))
    read = IndexedTokens(tmp_path / "x")
    assert [read[i].tolist() for i in range(len(read))] == [[0, 1], [2, 3, 4]]


def test_sequence_modes_are_allowed(tmp_path):
    (tmp_path / "x.bin").write_bytes(np.arange(5, dtype=np.uint16).tobytes())
    (tmp_path / "x.idx").write_bytes(index([2, 3], [0, 1, 2]) + bytes(2))
    assert IndexedTokens(tmp_path / "x").lengths.tolist() == [2, 3]


GOOD = ([2, 3], [0, 1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "fewer than the header's 34"),
        (index(*GOOD)[:20], "fewer than the header's 34"),
        (index(*GOOD)[:-1], "truncated"),
        (index(*GOOD) + b"x", "truncated or damaged"),
        (index(*GOOD, magic=b"TNTIDX\x00\x00\x00"), "not a Megatron .idx"),
        (index(*GOOD, version=2), "version 2. Known: 1"),
        (index(*GOOD, dtype_code=6), "dtype code 6. Known: 1"),
        (index(*GOOD, dtype_code=7), "dtype code 7"),
        (index(*GOOD, counts=(2**63, 3)), "truncated or damaged"),
        (index([2, 4], [0, 1, 2]), "points past the end"),
        (index(*GOOD, pointers=[0, 6]), "points past the end"),
        (index(*GOOD, pointers=[0, 3]), "a pointer that is negative or within a token"),
        (index([2, -3], [0, 1, 2]), "has a negative length"),
        (index([2, 3], [0, 1, 3]), "do not run from 0 to 2"),
        (index([2, 3], [0, 2, 1, 2]), "do not run from 0 to 2"),
        (index([2, 3], [1, 2]), "do not run from 0 to 2"),
        (index([2, 2], [0, 2], pointers=[0, 6]), "back to back"),
    ],
)
def test_damaged_index_is_an_error(tmp_path, content, message):
    (tmp_path / "x.bin").write_bytes(np.arange(5, dtype=np.uint16).tobytes())
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        IndexedTokens(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


@pytest.mark.parametrize("size", [0, 1, 9])
def test_truncated_tokens_are_an_error(tmp_path, size):
    write(tmp_path / "x", [[1, 2], [3, 4, 5]])
    os.truncate(tmp_path / "x.bin", size)
    with pytest.raises(ConfigError, match=f"needs 10 bytes, the file has {size}"):
        IndexedTokens(tmp_path / "x")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_pair_is_an_error(tmp_path, suffix):
    write(tmp_path / "x", [[1]])
    (tmp_path / f"x{suffix}").unlink()
    with pytest.raises(ConfigError, match=f"x\\{suffix} is missing"):
        IndexedTokens(tmp_path / "x")


@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, 65536), (np.uint16, -1), (np.int32, 2**31), (np.uint8, 256)])
def test_token_outside_the_dtype_is_an_error_and_leaves_nothing(tmp_path, dtype, token):
    with pytest.raises(ConfigError, match=f"token {token} of document 1 does not fit"):
        write(tmp_path / "x", [[1], [2, token, 3]], dtype)
    assert list(tmp_path.iterdir()) == []


def test_float_tokens_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="Known: int16"):
        IndexedWriter(tmp_path / "x", np.dtype(np.float32))


def test_an_interrupted_writer_leaves_the_old_pair(tmp_path):
    write(tmp_path / "x", [[1, 2]])
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "x", ([1 // (2 - i)] * 1000 for i in range(3)))
    assert IndexedTokens(tmp_path / "x")[0].tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_nothing_appears_before_it_is_complete(tmp_path):
    with IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as writer:
        writer.add([1, 2])
        assert not (tmp_path / "x.bin").exists()
        assert not (tmp_path / "x.idx").exists()
    assert IndexedTokens(tmp_path / "x").num_tokens == 2


def test_fingerprint_is_of_the_content(tmp_path):
    first = IndexedTokens(write(tmp_path / "a", [[1, 2], [3]])).fingerprint
    assert IndexedTokens(write(tmp_path / "elsewhere" / "b", [[1, 2], [3]])).fingerprint == first
    others = [[[1, 2], [4]], [[1], [2, 3]], [[1, 2], [3], []]]
    different = [IndexedTokens(write(tmp_path / f"c{i}", other)).fingerprint for i, other in enumerate(others)]
    different.append(IndexedTokens(write(tmp_path / "d", [[1, 2], [3]], np.int32)).fingerprint)
    assert len({first, *different}) == 5


def test_fingerprint_of_a_large_file_sees_size_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "MAX_FULL_HASH_BYTES", 1000)
    monkeypatch.setattr(indexed, "HASH_SAMPLE_BYTES", 4)
    tokens = np.zeros(5000, np.uint16)
    seen = set()
    for change in ([], [0], [4999]):
        tokens[:] = 0
        tokens[change] = 1
        seen.add(IndexedTokens(write(tmp_path / "x", [tokens])).fingerprint)
    assert len(seen) == 3


def test_workers_open_the_files_themselves(tmp_path):
    read = IndexedTokens(write(tmp_path / "x", [np.arange(60000, dtype=np.uint16)]))
    sent = pickle.dumps(read)
    assert len(sent) < 500
    assert pickle.loads(sent)[0].tolist() == read[0].tolist()


def test_documents_are_read_only(tmp_path):
    read = IndexedTokens(write(tmp_path / "x", [[1, 2]]))
    with pytest.raises(ValueError, match="read-only"):
        read[0][0] = 5
