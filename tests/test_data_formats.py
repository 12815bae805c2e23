"""Formats of tokens on disk: what they give, what they refuse, and that any of them is a source like another."""

import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder import data
from torchladder.data import SourceConfig
from torchladder.data.corpus import SourceLoader
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.formats.litpkds import HEADER, LitPkdsChunks
from torchladder.data.packing.spans import Spans
from torchladder.data.tokenizer import ByteTokenizer
from torchladder.registry import ConfigError

EOS = ByteTokenizer.eos


def chunk(path: Path, tokens, code=8, dtype="<u2", version=1, magic=b"LITPKDS") -> Path:
    path.write_bytes(HEADER.pack(magic, version, code, len(tokens)) + np.array(tokens, dtype).tobytes())
    return path


def table(path: Path, **columns) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def corpus(path, cache, tokenizer=None, exclude=(), **settings):
    opener = SourceLoader(tokenizer or ByteTokenizer(), cache, 0.0, False, exclude)
    return opener.open(SourceConfig(path=path if isinstance(path, list) else str(path), **settings), "train")


def documents(found):
    whole = ((i, found.lengths[i]) for i in range(len(found.lengths)))
    return [found.read(Spans(*(np.array([value]) for value in (i, 0, length)))).tolist() for i, length in whole]


# --- LITPKDS ---------------------------------------------------------------------------------------------------------


def test_the_header_is_skyladders():
    assert HEADER.pack(b"LITPKDS", 1, 8, 131_088).hex() == "4c4954504b4453" + "0100000000000000" + "08" + (
        "1000020000000000"
    )


def test_chunks_are_documents_that_end_with_eos(tmp_path):
    chunk(tmp_path / "train_cc_0_0000000001.bin", [9, 10, EOS, EOS, 11, 12])
    chunk(tmp_path / "train_cc_0_0000000000.bin", [1, 2, EOS, 3, 4, 5])
    found = corpus(tmp_path / "train_cc_*.bin", tmp_path)
    assert documents(found) == [[1, 2, EOS], [3, 4, 5], [9, 10, EOS], [EOS], [11, 12]]
    assert found.num_tokens == 12


def test_many_chunks_are_opened_as_they_are_read(tmp_path, monkeypatch):
    for number in range(12):
        chunk(tmp_path / f"train_{number:02}.bin", [number] * 3 + [EOS])
    monkeypatch.setattr("torchladder.data.formats.litpkds.MAX_MAPPED_FILES", 2)
    found = corpus(tmp_path / "*.bin", tmp_path)
    assert documents(found) == [[number] * 3 + [EOS] for number in range(12)]


def test_ends_are_searched_once(tmp_path, monkeypatch):
    file = chunk(tmp_path / "a.bin", [1, EOS, 2, 3])
    first = LitPkdsChunks([file], EOS, tmp_path)
    monkeypatch.setattr(LitPkdsChunks, "_write_ends", None)
    assert LitPkdsChunks([file], EOS, tmp_path).lengths.tolist() == first.lengths.tolist() == [2, 2]


def test_the_fingerprint_of_chunks_is_of_their_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        chunk(tmp_path / name / "x.bin", [1, 2, EOS, 3])
    prints = [corpus(tmp_path / name / "x.bin", tmp_path).fingerprint() for name in ("a", "b")]
    assert prints[0] == prints[1]
    chunk(tmp_path / "b" / "x.bin", [1, 2, EOS, 4])
    assert corpus(tmp_path / "b" / "x.bin", tmp_path).fingerprint() != prints[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"LITPKDX"}, "not a LITPKDS chunk"),
        ({"version": 2}, "has version 2"),
        ({"code": 6}, "dtype code 6. Known: 1 .uint8."),
        ({"tokens": [1] * 6, "dtype": "<u1"}, "has 30 bytes, its header needs 36: it is truncated"),
        ({"tokens": []}, "truncated or damaged"),
        ({"code": 4, "dtype": "<i4"}, r"2\.bin holds 6 tokens of int32, but .*1\.bin holds 6 of uint16"),
    ],
)
def test_damaged_chunks_are_refused(tmp_path, changes, message):
    chunk(tmp_path / "1.bin", [1, 2, EOS, 3, 4, 5])
    chunk(tmp_path / "2.bin", **{"tokens": [1, 2, EOS, 3, 4, 5], **changes})
    with pytest.raises(ConfigError, match=message):
        corpus(tmp_path / "*.bin", tmp_path, name="litpkds")


def test_a_chunk_of_a_few_bytes_and_one_without_a_tokenizer(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"LITPKDS123")
    with pytest.raises(ConfigError, match="fewer than the header's 24"):
        corpus(tmp_path / "a.bin", tmp_path)
    chunk(tmp_path / "a.bin", [1, 2])
    with pytest.raises(ConfigError, match="chunks do not store document boundaries"):
        SourceLoader(None, tmp_path, 0.0, False).open(SourceConfig(path=str(tmp_path / "a.bin")), "train")


def test_tokens_below_0_and_beyond_the_vocabulary_name_their_chunk(tmp_path):
    chunk(tmp_path / "0.bin", [1, EOS, 2, EOS], 4, "<i4")
    for token in (-2, 257):
        chunk(tmp_path / "1.bin", [1, EOS, 3, token], 4, "<i4")
        with pytest.raises(ConfigError, match=rf"1\.bin, document 1 holds token {token}: tokens must be 0 or more"):
            corpus(tmp_path / "*.bin", tmp_path / f"cache{token}")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_rows_of_parquet_are_documents(tmp_path):
    rows = [[1, 2, 3], [], [4], [5, 6], [7]]
    found = corpus(table(tmp_path / "a.parquet", input_ids=rows), tmp_path)
    assert documents(found) == rows


def test_several_files_are_one_source_and_are_converted_once(tmp_path, monkeypatch):
    table(tmp_path / "b.parquet", input_ids=[[3, 4]])
    table(tmp_path / "a.parquet", input_ids=[[1, 2]])
    assert documents(corpus(tmp_path / "*.parquet", tmp_path)) == [[1, 2], [3, 4]]
    monkeypatch.setattr("torchladder.data.formats.parquet._documents", None)
    assert documents(corpus(tmp_path / "*.parquet", tmp_path)) == [[1, 2], [3, 4]]


@given(
    st.lists(st.lists(st.sampled_from([5, 6, EOS, ~5, ~EOS]), max_size=12), min_size=1, max_size=5),
    st.sampled_from(["indexed", "parquet"]),
)
@settings(max_examples=60)
def test_documents_end_at_each_eos_of_a_row(tmp_path_factory, rows, kind):
    """Against a slow search; EOS that follow one another are padding."""
    folder = tmp_path_factory.mktemp("rows")
    if kind == "indexed":  # its tokens all have labels
        rows = [[~token if token < 0 else token for token in row] for row in rows]
    if kind == "parquet":
        plain = [[~token if token < 0 else token for token in row] for row in rows]
        labeled = [[int(token >= 0) for token in row] for row in rows]
        file = table(folder / "a.parquet", input_ids=[[0], *plain], attention_mask=[[1], *labeled])
        rows = [[0], *rows]  # arrow needs a value to know the type of empty rows
    else:
        file = folder / "a.bin"
        with IndexedWriter(file, np.dtype(np.int32)) as writer:
            for row in rows:
                writer.add(row)
    expected = []
    for row in rows:
        document = []
        for token, following in zip(row, [*row[1:], None], strict=False):
            document.append(token)
            if token in (EOS, ~EOS) and following not in (EOS, ~EOS, None):
                expected.append(document)
                document = []
        expected.append(document)
    found = corpus(file, folder, documents_by_eos=True)
    assert documents(found) == expected
    assert documents(pickle.loads(pickle.dumps(found))) == expected
    whole = corpus(file, folder)
    assert documents(whole) == rows
    assert whole.fingerprint() != found.fingerprint()
    with pytest.raises(ConfigError, match="documents_by_eos needs a tokenizer"):
        SourceLoader(None, folder, 0.0, False).open(SourceConfig(path=str(file), documents_by_eos=True), "train")


def test_labels_and_attention_masks_silence_tokens(tmp_path):
    columns = {
        "input_ids": [[1, 2, 3, 0], [4, 5, 6, 7]],
        "labels": [[1, 2, 3, -100], [-100, -100, 6, 7]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
    }
    found = corpus(table(tmp_path / "a.parquet", **columns), tmp_path)
    assert documents(found) == [[~1, 2, 3, ~0], [~4, ~5, 6, 7]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_id": [[1]]}, "unknown column 'input_ids' in .*a.parquet. Did you mean 'input_id'"),
        ({"input_ids": ["text"]}, "input_ids holds string, not lists of integers"),
        ({"input_ids": [[1], None]}, "a row, or a number in it, is missing"),
        ({"input_ids": [[1], [None, 2]]}, "a row, or a number in it, is missing"),
        ({"input_ids": [[0.5]]}, "not lists of integers"),
        ({"input_ids": [[1, -2]]}, "row 0 holds token -2"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "row 0 has 2 input_ids and 1 labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 3]]}, "neither its tokens nor -100"),
        ({"input_ids": [[1], [2, 300]]}, r"a.parquet, row 1 holds token 300: tokens must be 0 or more and below 257"),
    ],
)
def test_parquet_that_cannot_be(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=message):
        documents(corpus(table(tmp_path / "a.parquet", **columns), tmp_path, name="parquet"))


def test_damaged_parquet_is_refused(tmp_path):
    file = table(tmp_path / "a.parquet", input_ids=[[1, 2]])
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(ConfigError, match="damaged"):
        corpus(file, tmp_path)


def test_parquet_names_its_extra(tmp_path, monkeypatch):
    file = table(tmp_path / "a.parquet", input_ids=[[1, 2]])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install pyarrow, of the extra torchladder\[parquet\]"):
        corpus(file, tmp_path, name="parquet")


# --- rows of files that other systems write, by writers of their own layouts -----------------------------------------


def skyladder(folder, documents):
    """TinyLlama's PackedDatasetBuilder: one stream with eos, cut into files of equal size, the rest dropped."""
    stream = [token for document in documents for token in (*document, EOS)]
    for number in range(len(stream) // 24):
        content = struct.pack("<24H", *stream[24 * number : 24 * (number + 1)])
        head = b"LITPKDS" + (1).to_bytes(8, "little") + bytes([8]) + (24).to_bytes(8, "little")
        (folder / f"train_cc_0_{number:010}.bin").write_bytes(head + content)
    return folder / "train_cc_*.bin", stream[: len(stream) // 24 * 24]


def megatron(folder, documents, indices=None, code=8, letter="H"):
    """Megatron-LM's IndexedDatasetBuilder with --append-eod: a sequence and a document for each text."""
    ended, size = [[*document, EOS] for document in documents], struct.calcsize(letter)
    stream, lengths = [token for one in ended for token in one], [len(one) for one in ended]
    pointers = [sum(lengths[:i]) * size for i in range(len(lengths))]
    indices = list(range(len(lengths) + 1)) if indices is None else indices
    (folder / "x.bin").write_bytes(struct.pack(f"<{len(stream)}{letter}", *stream))
    counts = struct.pack("<QBQQ", 1, code, len(lengths), len(indices))
    numbers = [(lengths, "i"), (pointers, "q"), (indices, "q")]
    body = b"".join(struct.pack(f"<{len(values)}{kind}", *values) for values, kind in numbers)
    (folder / "x.idx").write_bytes(b"MMIDIDX\0\0" + counts + body)
    return folder / "x.bin", stream


def neox(folder, documents):
    """GPT-NeoX's merge_datasets.py: int32, and document indices [0], which it does not extend."""
    return megatron(folder, documents, indices=[0], code=4, letter="i")


def rows_of(path, cache, seq_len, count, packing="stream"):
    settings = {key: parameter.default for key, parameter in data.registry.parameters("rows").items()}
    settings |= {"sources": [SourceConfig(path=str(path))], "validation_sources": [], "exclude": [], "domains": {}}
    settings |= {"languages": {}, "skip_rows": [], "shuffle": False, "cache_folder": str(cache), "packing": packing}
    facts = dict(seq_len=seq_len, split="train", tokenizer=ByteTokenizer(), dp_rank=0, dp_degree=1, steps=None)
    facts |= dict(local_batch_size=1, global_batch_size=1, weight_changes={}, vocab_size=257)
    loader = data.registry.build(SimpleNamespace(name="rows", **settings), **facts)
    batches = [next(loader) for _ in range(count)]
    return [(batch.tokens[0].tolist(), batch.labels[0].tolist()) for batch in batches]


@pytest.mark.parametrize("write", [skyladder, megatron, neox])
def test_rows_are_the_stream_of_another_system(tmp_path, write):
    path, stream = write(tmp_path, [[i] * (3 + i % 5) for i in range(40)])
    rows = rows_of(path, tmp_path / "cache", 16, (len(stream) - 1) // 16)
    assert len(rows) > 10
    for number, row in enumerate(rows):
        begin = 16 * number
        assert row == (stream[begin : begin + 16], stream[begin + 1 : begin + 17])


def test_rows_are_those_of_mathcoder2(tmp_path):
    """Its group_text.py pads input_ids to max_len with eos, and labels with -100; transformers shifts the labels."""
    rows = [([1, 2, 3, EOS, 4, 5, 6, EOS], 8), ([7, 8, EOS, 9, EOS, EOS, EOS, EOS], 5)]
    ids = [tokens for tokens, _ in rows]
    labels = [tokens[:used] + [-100] * (8 - used) for tokens, used in rows]
    file = table(tmp_path / "grouped.parquet", input_ids=ids, labels=labels)
    expected = [(tokens, [*label[1:], -100]) for tokens, label in zip(ids, labels, strict=True)]
    assert rows_of(file, tmp_path / "cache", 8, 2, "pad") == expected


def test_rows_are_those_of_teenytinyllama(tmp_path):
    """Its tokenize-dataset.py writes blocks of block_size, an attention_mask of ones, and labels equal to input_ids."""
    ids = [[1, 2, 3, 4, 5], [6, EOS, 7, 8, 9], [10, 11, 12, EOS, 13]]
    file = table(tmp_path / "train.parquet", input_ids=ids, attention_mask=[[1] * 5] * 3, labels=ids)
    assert rows_of(file, tmp_path / "cache", 5, 3, "pad") == [(tokens, [*tokens[1:], -100]) for tokens in ids]


# --- what a path names -----------------------------------------------------------------------------------------------


def test_the_kind_is_told_from_the_files(tmp_path):
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        writer.add([1, 2])
    kinds = {
        chunk(tmp_path / "chunk.bin", [1, 2]): "litpkds",
        tmp_path / "pair.bin": "indexed",
        tmp_path / "pair.idx": "indexed",
        tmp_path / "absent.bin": "indexed",
        table(tmp_path / "tokens.parquet", input_ids=[[1]]): "parquet",
        table(tmp_path / "texts.parquet", text=["a"]): "text",
        tmp_path / "notes.txt": "text",
    }
    assert {path: SourceConfig(path=str(path)).kind for path in kinds} == kinds
    assert SourceConfig(path=str(tmp_path / "chunk.bin"), name="indexed").kind == "indexed"


def test_files_are_excluded_by_path_name_or_stem(tmp_path):
    for name in "abcd":
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            writer.add([ord(name), 1])
    everything = str(tmp_path / "*.bin")
    for pattern in ("b", "b.bin", f"{tmp_path}/b.bin", "[b]"):
        found = corpus(everything, tmp_path, exclude=[pattern])
        assert [document[0] for document in documents(found)] == [97, 99, 100]
        assert SourceConfig(path=everything).check([pattern, "zzz"]) == {pattern}
    with pytest.raises(ConfigError, match="leaves no file of the source"):
        corpus(everything, tmp_path, exclude=["?.bin"])


def test_a_folder_is_searched_to_the_bottom(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    chunk(tmp_path / "x" / "y" / "b.bin", [3, EOS])
    chunk(tmp_path / "x" / "a.bin", [1, EOS])
    assert documents(corpus(tmp_path / "x", tmp_path / "cache", name="litpkds")) == [[1, EOS], [3, EOS]]
    with pytest.raises(ConfigError, match=r"matches no token file. Known: .parquet"):
        corpus(tmp_path / "x", tmp_path, name="parquet")


def test_struct_sizes():
    assert (HEADER.size, struct.calcsize("<7sQBQ")) == (24, 24)
