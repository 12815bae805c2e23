"""Parsers of text: each yields the documents of a file, or of a slice of it, as bytes or as the reason why not.

A slice holds the documents that begin in it, so the slices of a file, together, yield every document exactly once.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torchladder.data.extras import import_extra
from torchladder.data.text import compression
from torchladder.registry import ConfigError, unknown_name


class FileSlice(NamedTuple):
    """A part of a file.

    Attributes:
        path: the file.
        begin: its first byte in the file as stored, or its first row group in a .parquet.
        end: where the next slice begins; None for the end of the file.
        size: approximate bytes of the file as stored.
    """

    path: Path
    begin: int
    end: int | None
    size: int

    @classmethod
    def whole(cls, path: Path) -> FileSlice:
        """Returns the slice that is the whole file."""
        return cls(path, 0, None, path.stat().st_size)


class ParseError(NamedTuple):
    """Why a document cannot be read.

    Attributes:
        reason: short, documents are counted by it.
        detail: what exactly is wrong.
        repaired: the text without the broken bytes; empty if nothing can be repaired.
    """

    reason: str
    detail: str
    repaired: str = ""


Parsed = tuple[int | None, bytes | ParseError]
"""(number, text as stored or error). The number is the line or row from 1, in an uncompressed file counted from where
the slice begins; None if the whole file is one document."""

Parse = Callable[[FileSlice, str, Callable[[int], None]], Iterator[Parsed]]
"""``parse(file_slice, text_key, count_bytes)`` yields the documents of a slice and counts the bytes of the file."""


def parse_whole(file_slice: FileSlice, text_key: str, count_bytes: Callable[[int], None]) -> Iterator[Parsed]:
    """Yields the whole file as one document."""
    content = compression.read_content(file_slice.path)
    count_bytes(file_slice.size)
    yield None, content.removeprefix(codecs.BOM_UTF8)


def parse_json_lines(file_slice: FileSlice, text_key: str, count_bytes: Callable[[int], None]) -> Iterator[Parsed]:
    """Yields each line as one document; blank lines are skipped."""
    for number, line, size in compression.read_lines(file_slice.path, file_slice.begin, file_slice.end):
        count_bytes(size)
        if not line.isspace():
            yield number, _text_of_json(line, text_key)


def parse_json(file_slice: FileSlice, text_key: str, count_bytes: Callable[[int], None]) -> Iterator[Parsed]:
    """Yields each object of an array as one document, numbered from 1; a file that is no array is one of lines."""
    if not holds_array(file_slice.path):
        yield from parse_json_lines(file_slice, text_key, count_bytes)
        return
    content = compression.read_content(file_slice.path)
    count_bytes(file_slice.size)
    try:
        # decode_text finds in each text what is not UTF-8 here.
        records = json.loads(content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        yield None, ParseError("invalid JSON", f"not an array in JSON ({error})")
        return
    for number, record in enumerate(records, start=1):
        yield number, _text_of_record(record, text_key)


def parse_csv(file_slice: FileSlice, text_key: str, count_bytes: Callable[[int], None]) -> Iterator[Parsed]:
    """Yields each row as one document; the first row names the columns, fields may contain line breaks."""

    def lines() -> Iterator[str]:
        for number, line, size in compression.read_lines(file_slice.path, file_slice.begin, file_slice.end):
            count_bytes(size)
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")

    csv.field_size_limit(sys.maxsize)  # no limit; the module has only one for all readers of the process
    rows = csv.reader(lines(), strict=True)
    try:
        head = next(rows, [])
    except csv.Error as error:
        raise ConfigError(f"{file_slice.path}:1: the first row of a .csv names the columns: {error}.") from error
    if text_key not in head:
        raise ConfigError(f"{file_slice.path}:1: text_key: {unknown_name('column', text_key, head)}")
    column = head.index(text_key)
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, ParseError("invalid CSV row", f"not a row of a .csv ({error})")
            continue
        if not row:
            continue
        if len(row) != len(head):
            yield number, ParseError("invalid CSV row", f"{len(row)} fields, the first row has {len(head)}")
        else:
            yield number, row[column].encode("utf-8", errors="surrogateescape")


def parse_parquet(file_slice: FileSlice, text_key: str, count_bytes: Callable[[int], None]) -> Iterator[Parsed]:
    """Yields each row as one document."""
    arrow, file = open_parquet(file_slice.path)
    if text_key not in file.schema_arrow.names:
        raise ConfigError(f"{file_slice.path}: text_key: {unknown_name('column', text_key, file.schema_arrow.names)}")
    kind = file.schema_arrow.field(text_key).type
    if kind not in (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary()):
        raise ConfigError(f"{file_slice.path}: the column {text_key!r} holds {kind}, not text.")
    groups = range(file_slice.begin, file.num_row_groups if file_slice.end is None else file_slice.end)
    number = sum(file.metadata.row_group(group).num_rows for group in range(file_slice.begin))
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    try:
        for batch in file.iter_batches(1024, row_groups=groups, columns=[text_key]):
            count_bytes(file_slice.size * batch.num_rows // max(rows, 1))
            # As bytes, because arrow does not check that strings are UTF-8.
            for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                number += 1
                yield number, ParseError("no text", f"no {text_key!r}") if value is None else value
    except (arrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file_slice.path} is a damaged .parquet: {error}.") from error


def holds_array(path: Path) -> bool:
    """Returns whether a .json is one array, and not lines."""
    lines = (line.removeprefix(codecs.BOM_UTF8) for _, line, _ in compression.read_lines(path))
    return next((line.lstrip()[:1] == b"[" for line in lines if line.strip()), False)


def _text_of_json(line: bytes, text_key: str) -> bytes | ParseError:
    """Returns the text in a line of JSON."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        rest = _text_of_json(line.decode("utf-8-sig", errors="ignore").encode(), text_key)
        return _not_utf8(error, b"" if isinstance(rest, ParseError) else rest)
    except (ValueError, RecursionError) as error:
        return ParseError("invalid JSON", f"not JSON ({error}); each line is one object")
    return _text_of_record(record, text_key)


def _text_of_record(record: Any, text_key: str) -> bytes | ParseError:
    if not isinstance(record, dict):
        return ParseError("invalid JSON", f"holds a {type(record).__name__}, where each line is one object")
    if text_key not in record:
        return ParseError("no text", f"text_key: {unknown_name('key', text_key, record)}".rstrip("."))
    text = record[text_key]
    if not isinstance(text, str):
        return ParseError("no text", f"{text_key!r} holds a {type(text).__name__}, not a string")
    # JSON can spell half of a surrogate pair, which UTF-8 cannot encode: decode_text rejects it later.
    return text.encode("utf-8", errors="surrogatepass")


def decode_text(raw: bytes) -> str | ParseError:
    """Returns a text from its bytes as stored."""
    try:
        return raw.decode() or ParseError("empty", "an empty document")
    except UnicodeDecodeError as error:
        return _not_utf8(error, raw)


def _not_utf8(error: UnicodeDecodeError, raw: bytes) -> ParseError:
    return ParseError("not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start})", raw.decode(errors="ignore"))


def open_parquet(path: Path) -> tuple[Any, Any]:
    """Returns the package ``pyarrow`` and an open ``ParquetFile``, decompressed if its suffix is that of a compression.

    Raises:
        ConfigError: pyarrow is not installed, or the file is damaged.
    """
    pyarrow = import_extra("pyarrow.parquet", "parquet", f"reading {path}")
    try:
        source = io.BytesIO(compression.read_content(path)) if compression.is_compressed(path) else path
        return pyarrow, pyarrow.parquet.ParquetFile(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is not a .parquet file, or is damaged: {error}.") from error
