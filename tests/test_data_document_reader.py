import bz2
import csv
import gzip
import io
import json
import lzma
import sys

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.data.text import compression, document_reader
from torchladder.data.text.document_parsers import FileSlice
from torchladder.data.text.document_reader import DocumentReader
from torchladder.data.text.file_formats import split_file
from torchladder.registry import ConfigError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", "two\nlines\r\n", '"quoted", é 😀', "   ", "\ufeffmark", "last"]
ZSTD = zstandard.ZstdCompressor().compress
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": ZSTD, ".ZSTD": ZSTD, ".xz": lzma.compress}


def jsonl(texts, key="text"):
    return "".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts).encode()


def array(texts, key="text"):
    return json.dumps([{key: text, "other": 1} for text in texts], indent=2).encode()


def table(texts, key="text"):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["other", key], *([i, text] for i, text in enumerate(texts))])
    return out.getvalue().encode()


def columns(texts, key="text", kind=None, group=2):
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({key: pyarrow.array(texts, kind)}), out, row_group_size=group)
    return out.getvalue()


MAKE = {".jsonl": jsonl, ".JSONL": jsonl, ".json": jsonl, ".Json": array, ".csv": table, ".parquet": columns}


def whole(path):
    return FileSlice.whole(path)


def read(path, **settings):
    return [text for _, text in DocumentReader(**settings).read(whole(path))]


def pieces(path, target, **settings):
    reader = DocumentReader(**settings)
    return [
        (document_reader.document_location(file_slice, number), text)
        for file_slice in split_file(path, path.stat().st_size, target)
        for number, text in reader.read(file_slice)
    ]


@pytest.mark.parametrize("outer", COMPRESS)
@pytest.mark.parametrize("suffix", MAKE)
def test_every_kind_gives_its_texts(tmp_path, suffix, outer):
    path = tmp_path / f"x{suffix}{outer}"
    path.write_bytes(COMPRESS[outer](MAKE[suffix](TEXTS)))
    assert read(path) == TEXTS
    path.write_bytes(COMPRESS[outer](MAKE[suffix](TEXTS, "body")))
    assert read(path, text_key="body") == TEXTS
    with pytest.raises(ConfigError, match=r"x\..*text.*Known: .*body"):
        read(path)


def test_an_array_is_read_object_by_object(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf\n [{"text": "one"},\n{"text": "a\xffb"}, {"text": 3}, 4, {"text": "half \\ud800"}]')
    with pytest.raises(ConfigError, match=r"x\.json:2: not UTF-8"):
        read(path)
    reader = DocumentReader(on_error="repair")
    assert list(reader.read(whole(path))) == [(1, "one"), (2, "ab"), (5, "half ")]
    assert reader.examples == {
        "not UTF-8": f"{path}:2", "no text": f"{path}:3", "invalid JSON": f"{path}:4"
    }  # fmt: skip
    assert len(split_file(path, path.stat().st_size, 10)) == 1
    path.write_bytes(b'[{"text": "one"}')
    with pytest.raises(ConfigError, match=r"x\.json: not an array in JSON"):
        read(path)
    path.write_bytes(jsonl(TEXTS))
    assert len(split_file(path, path.stat().st_size, 10)) > 10
    assert [text for _, text in pieces(path, 10)] == TEXTS


@pytest.mark.parametrize("outer", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_some_files_are_one_document(tmp_path, suffix, outer):
    path = tmp_path / f"x{suffix}{outer}"
    path.write_bytes(COMPRESS[outer]("\ufeffone\n\ntwo é".encode()))
    assert read(path) == ["one\n\ntwo é"]


@pytest.mark.parametrize("outer", COMPRESS)
def test_the_size_adds_up_to_the_file(tmp_path, outer, monkeypatch):
    monkeypatch.setattr(compression, "CHUNK_BYTES", 50)
    path = tmp_path / f"x.jsonl{outer}"
    path.write_bytes(COMPRESS[outer](jsonl(TEXTS * 20)))
    reader = DocumentReader()
    assert len(list(reader.read(whole(path)))) == 120
    size = path.stat().st_size
    assert size - 50 < reader.size <= size  # the last chunk may hold only the end mark


@given(
    st.lists(st.text(st.sampled_from("ab é\n"), max_size=30), max_size=20),
    st.integers(1, 300),
    st.sampled_from(list(COMPRESS)),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_slices_yield_each_document_once(tmp_path_factory, texts, target, outer, last_line_ends):
    path = tmp_path_factory.mktemp("x") / f"x.jsonl{outer}"
    content = jsonl(texts) if last_line_ends else jsonl(texts).rstrip(b"\n")
    path.write_bytes(COMPRESS[outer](content))
    original, compression.CHUNK_BYTES = compression.CHUNK_BYTES, 16
    try:
        found = pieces(path, target, on_error="skip")
        expected = [(f"{path}:{line}", text) for line, text in enumerate(texts, start=1) if text]
        assert found == expected
    finally:
        compression.CHUNK_BYTES = original


def test_large_files_are_cut_and_small_ones_are_not(tmp_path):
    for suffix in MAKE:
        (tmp_path / f"x{suffix}").write_bytes(MAKE[suffix](TEXTS * 10))
    (tmp_path / "x.txt").write_text("long " * 100)
    count = {path.suffix: len(split_file(path, path.stat().st_size, 100)) for path in tmp_path.iterdir()}
    assert count[".jsonl"] > 10
    assert count[".parquet"] > 10
    assert count[".csv"] == count[".txt"] == 1  # a field may hold line ends, so no byte of a .csv is surely a new row
    assert all(len(split_file(path, path.stat().st_size, 10**6)) == 1 for path in tmp_path.iterdir())


def test_rows_of_parquet_slices_are_counted_from_the_file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(columns(["a", "b", "c", "", "e"]))
    assert pieces(tmp_path / "x.parquet", 1, on_error="skip") == [
        (f"{tmp_path}/x.parquet:{row}", text) for row, text in [(1, "a"), (2, "b"), (3, "c"), (5, "e")]
    ]


def test_a_zst_of_any_window_is_read(tmp_path):
    """Reading what ``zstd --long=31`` wrote takes more memory than the library allows by default, 128 MiB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # a stream does not know its size
    (tmp_path / "x.jsonl.zst").write_bytes(stream.compress(jsonl(TEXTS)) + stream.flush())
    assert read(tmp_path / "x.jsonl.zst") == TEXTS


@pytest.mark.parametrize("outer", [".gz", ".bz2", ".zst"])
def test_files_put_one_behind_the_other_are_one(tmp_path, outer):
    path = tmp_path / f"x.jsonl{outer}"
    path.write_bytes(b"".join(COMPRESS[outer](jsonl([text])) for text in TEXTS))
    assert read(path) == TEXTS


@pytest.mark.parametrize("outer", [".gz", ".bz2", ".zst"])
def test_damage_is_an_error_whatever_on_error_says(tmp_path, outer):
    path = tmp_path / f"x.jsonl{outer}"
    content = COMPRESS[outer](jsonl(TEXTS * 100))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=rf"x\.jsonl\{outer} is (truncated|not a)"):
        read(path, on_error="skip")
    path.write_bytes(b"plain text, not compressed at all\n")
    with pytest.raises(ConfigError, match=rf"x\.jsonl\{outer} is not a \{outer}"):
        read(path, on_error="skip")


def test_a_damaged_parquet_is_an_error(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(columns(TEXTS)[:-20])
    with pytest.raises(ConfigError, match=r"x\.parquet is not a \.parquet file, or is damaged"):
        read(path, on_error="skip")
    path.write_bytes(columns([1, 2]))
    with pytest.raises(ConfigError, match=r"the column 'text' holds int64, not text"):
        read(path, on_error="skip")


def test_a_csv_whose_first_row_is_broken_is_named(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'"te"xt,n\nfine,1\n')
    with pytest.raises(ConfigError, match=r"x\.csv:1: the first row of a \.csv names the columns"):
        read(tmp_path / "x.csv", on_error="skip")


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize("outer", ["", ".gz"])
@pytest.mark.parametrize(
    ("suffix", "content", "line", "reason", "repaired"),
    [
        (".jsonl", GOOD + b"{broken\n" + GOOD, 2, "invalid JSON", []),
        (".jsonl", GOOD + b"\n  \n[1]\n" + GOOD, 4, "invalid JSON", []),
        (".jsonl", GOOD + b"[" * 100_000 + b"\n" + GOOD, 2, "invalid JSON", []),
        (".jsonl", GOOD + b'{"txt": "a"}\n' + GOOD, 2, "no text", []),
        (".jsonl", GOOD + b'{"text": null}\n' + GOOD, 2, "no text", []),
        (".jsonl", GOOD + b'{"text": "a\xffb"}\n' + GOOD, 2, "not UTF-8", ["ab"]),
        (".jsonl", GOOD + b'{"text": "a\\ud800b"}\n' + GOOD, 2, "not UTF-8", ["ab"]),
        (".jsonl", GOOD + b'{"text": ""}\n' + GOOD, 2, "empty", []),
        (".csv", b"text,n\r\nfine,1\r\nshort\r\nfine,2\r\n", 3, "invalid CSV row", []),
        (".csv", b'text,n\nfine,1\n"a\nb",1\n"c"d,2\nfine,2\n', 5, "invalid CSV row", []),
        (".csv", b"text,n\nfine,1\na\xffb,1\nfine,2\n", 3, "not UTF-8", ["ab"]),
        (".csv", b"text,n\nfine,1\n,1\nfine,2\n", 3, "empty", []),
        (".parquet", columns(["fine", None, "fine"]), 2, "no text", []),
        (".parquet", columns([b"fine", b"a\xffb", b"fine"], kind=pyarrow.binary()), 2, "not UTF-8", ["ab"]),
        (".parquet", columns(["fine", "", "fine"]), 2, "empty", []),
    ],
    ids=str,
)
def test_bad_documents(tmp_path, suffix, outer, content, line, reason, repaired):
    path = tmp_path / f"x{suffix}{outer}"
    path.write_bytes(COMPRESS[outer](content))
    with pytest.raises(ConfigError, match=rf"x\{suffix}{outer}:{line}: .*on_error 'skip'"):
        read(path)
    for on_error in ("skip", "repair"):
        reader = DocumentReader(on_error=on_error)
        found = [text for _, text in reader.read(whole(path)) if text != "a\nb"]
        assert found == ["fine", *(repaired if on_error == "repair" else []), "fine"]
        assert reader.skipped == {reason: 1}
        assert reader.examples == {reason: f"{path}:{line}"}


def test_a_quote_that_never_ends_is_not_swallowed(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'text\nfine\n"open\nrest\n')
    with pytest.raises(ConfigError, match=r"x\.csv:3: not a row of a \.csv"):
        read(tmp_path / "x.csv")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"x\.txt: an empty document"):
        read(tmp_path / "x.txt")
    (tmp_path / "x.jsonl").write_bytes(b"")
    assert read(tmp_path / "x.jsonl") == []  # a file of no lines has no documents


def test_a_field_may_be_long(tmp_path):
    (tmp_path / "x.csv").write_bytes(table(["x" * 1_000_000]))
    assert len(read(tmp_path / "x.csv")[0]) == 1_000_000


@pytest.mark.parametrize(
    ("package", "suffix", "extra"), [("pyarrow", ".parquet", "parquet"), ("zstandard", ".txt.zst", "zstd")]
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package, suffix, extra):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"x{suffix}").write_bytes(b"any")
    with pytest.raises(ConfigError, match=rf"x{suffix} needs the package {package}: .*torchladder\[{extra}\]"):
        read(tmp_path / f"x{suffix}")


def test_invalid_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown on_error 'skp'\. Did you mean 'skip'"):
        DocumentReader(on_error="skp")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is not a text file\. Known: \.jsonl"):
        read(tmp_path / "x.png")
