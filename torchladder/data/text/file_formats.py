"""Kinds of files: how the documents of each are found, and where such a file can be cut.

A document is found as its bytes and the number of its line or row, or as what is wrong with it. A stretch holds the
documents that begin in it, so the stretches of a file give each document exactly once.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchladder.data.extras import missing
from torchladder.data.text import compression
from torchladder.registry import ConfigError, unknown_name


class FileSlice(NamedTuple):
    """A part of a file.

    Attributes:
        path: the file.
        begin: where it begins: bytes of the file as stored, or row groups of a .parquet.
        end: where the next one begins; None is the end of the file.
        size: bytes of the file as stored, about.
    """

    path: Path
    begin: int
    end: int | None
    size: int


class ParseError(NamedTuple):
    """Why something is no document.

    Attributes:
        reason: by which it is counted.
        detail: what exactly is wrong.
        repaired: the text without what is wrong, where that leaves any.
    """

    reason: str
    detail: str
    repaired: str = ""


Found = tuple[int | None, bytes | ParseError]
"""A document's line or row, and its text as stored or why there is none. Lines and rows count from 1, those of a plain
file from where the stretch begins; None is where the file is the document."""

Find = Callable[[FileSlice, str, Callable[[int], None]], Iterator[Found]]
"""Yields what stands in a stretch where documents should, by the key of the text; tells how many bytes of the file as
stored that has taken."""


# --- finding ---------------------------------------------------------------------------------------------------------


def _whole_file(stretch: FileSlice, text_key: str, taken: Callable[[int], None]) -> Iterator[Found]:
    """Takes a file as one document."""
    content = compression.content(stretch.path)
    taken(stretch.size)
    yield None, content.removeprefix(codecs.BOM_UTF8)


def _jsonl(stretch: FileSlice, text_key: str, taken: Callable[[int], None]) -> Iterator[Found]:
    """Takes each line of a .jsonl as one document; lines of white space are none."""
    for number, line, size in compression.lines(stretch.path, stretch.begin, stretch.end):
        taken(size)
        if not line.isspace():
            yield number, _object(line, text_key)


def _csv(stretch: FileSlice, text_key: str, taken: Callable[[int], None]) -> Iterator[Found]:
    """Takes each row of a .csv as one document; the first row names the columns, fields may hold line ends."""
    # A length that no field reaches; the module knows only one limit, for all readers of the process.
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(_csv_lines(stretch, taken), strict=True)
    try:
        head = next(rows, [])
    except csv.Error as error:
        raise ConfigError(f"{stretch.path}:1: the first row of a .csv names the columns: {error}.") from error
    if text_key not in head:
        raise ConfigError(f"{stretch.path}:1: text_key: {unknown_name('column', text_key, head)}")
    column = head.index(text_key)
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, ParseError("broken as a row", f"no row of a .csv ({error})")
            continue
        if not row:
            continue
        if len(row) != len(head):
            yield number, ParseError("broken as a row", f"{len(row)} fields, the first row has {len(head)}")
        else:
            yield number, row[column].encode("utf-8", errors="surrogateescape")


def _parquet(stretch: FileSlice, text_key: str, taken: Callable[[int], None]) -> Iterator[Found]:
    """Takes each row of a .parquet as one document."""
    arrow, file = _open_parquet(stretch.path)
    if text_key not in file.schema_arrow.names:
        raise ConfigError(f"{stretch.path}: text_key: {unknown_name('column', text_key, file.schema_arrow.names)}")
    kind = file.schema_arrow.field(text_key).type
    if kind not in (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary()):
        raise ConfigError(f"{stretch.path}: the column {text_key!r} holds {kind}, not text.")
    groups = range(stretch.begin, file.num_row_groups if stretch.end is None else stretch.end)
    number = sum(file.metadata.row_group(group).num_rows for group in range(stretch.begin))
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    try:
        for batch in file.iter_batches(1024, row_groups=groups, columns=[text_key]):
            taken(stretch.size * batch.num_rows // max(rows, 1))
            # As bytes: arrow promises UTF-8 and does not check it.
            for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                number += 1
                yield number, ParseError("without text", f"no {text_key!r}") if value is None else value
    except (arrow.ArrowException, OSError) as error:
        raise ConfigError(f"{stretch.path} is a damaged .parquet: {error}.") from error


def _object(line: bytes, text_key: str) -> bytes | ParseError:
    """Returns the text in a line of a .jsonl."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        rest = _object(line.decode("utf-8-sig", errors="ignore").encode(), text_key)
        return _not_utf8(error, b"" if isinstance(rest, ParseError) else rest)
    except (ValueError, RecursionError) as error:
        return ParseError("broken as JSON", f"not JSON ({error}); a .jsonl holds one object a line")
    if not isinstance(record, dict):
        return ParseError("broken as JSON", f"holds a {type(record).__name__}; a .jsonl holds one object a line")
    if text_key not in record:
        return ParseError("without text", f"text_key: {unknown_name('key', text_key, record)}".rstrip("."))
    text = record[text_key]
    if not isinstance(text, str):
        return ParseError("without text", f"{text_key!r} holds a {type(text).__name__}, not a string")
    # JSON can spell half a surrogate pair, which no encoding of text can carry: it fails as UTF-8 later.
    return text.encode("utf-8", errors="surrogatepass")


def _csv_lines(stretch: FileSlice, taken: Callable[[int], None]) -> Iterator[str]:
    for number, line, size in compression.lines(stretch.path, stretch.begin, stretch.end):
        taken(size)
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")


def decoded(raw: bytes) -> str | ParseError:
    """Returns a text from its bytes as stored."""
    try:
        return raw.decode() or ParseError("empty", "an empty document")
    except UnicodeDecodeError as error:
        return _not_utf8(error, raw)


def _not_utf8(error: UnicodeDecodeError, raw: bytes) -> ParseError:
    return ParseError("not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start})", raw.decode(errors="ignore"))


# --- cutting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileFormat:
    """How files of one suffix are read and split.

    Attributes:
        find: yields the documents of a stretch.
        split: (file, bytes, bytes that a stretch should have) -> stretches.
        relative: whether documents are numbered from where their stretch begins.
    """

    find: Find
    split: Callable[[Path, int, int], list[FileSlice]]
    relative: bool = False


def split(path: Path, size: int, target: int) -> list[FileSlice]:
    """Cuts a file of ``size`` bytes into stretches of about ``target`` bytes, as far as its kind allows.

    The cuts depend on the file and the target alone.
    """
    return kind_of(path).split(path, size, target) if size > target else [FileSlice(path, 0, None, size)]


def kind_of(path: Path) -> FileFormat:
    """Returns how a file is read.

    Raises:
        ConfigError: files of that suffix are not known.
    """
    suffix = compression.inner_suffix(path)
    if suffix not in KINDS:
        raise ConfigError(f"{path} is of no known kind. Known: {names()}.")
    return KINDS[suffix]


def known(path: Path) -> bool:
    """Tells whether documents can be read from files of this name."""
    return compression.inner_suffix(path) in KINDS


def names() -> str:
    """Names the kinds of files, for errors."""
    return f"{', '.join(KINDS)}, and each of them as {', '.join(compression.SUFFIXES)}"


def _whole(path: Path, size: int, target: int) -> list[FileSlice]:
    return [FileSlice(path, 0, None, size)]


def _lines(path: Path, size: int, target: int) -> list[FileSlice]:
    step = compression.step(path, size, target)
    return [FileSlice(path, begin, min(begin + step, size), min(step, size - begin)) for begin in range(0, size, step)]


def _row_groups(path: Path, size: int, target: int) -> list[FileSlice]:
    if path.suffix != ".parquet":
        return _whole(path, size, target)
    metadata = _open_parquet(path)[1].metadata
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    share = size / max(sum(sizes), 1)  # of the file as stored; the groups tell their size uncompressed
    stretches, begin = [], 0
    for group in range(len(sizes)):
        stored = int(sum(sizes[begin : group + 1]) * share)
        if stored >= target or group + 1 == len(sizes):
            stretches.append(FileSlice(path, begin, group + 1, stored))
            begin = group + 1
    return stretches


def _open_parquet(path: Path) -> tuple[Any, Any]:
    """Returns pyarrow and an open .parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing("pyarrow", "parquet", f"reading {path}") from None
    try:
        source = path if path.suffix == ".parquet" else io.BytesIO(compression.content(path))
        return pyarrow, pyarrow.parquet.ParquetFile(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is no .parquet, or a damaged one: {error}.") from error


KINDS = {
    ".jsonl": FileFormat(_jsonl, _lines, relative=True),
    ".txt": FileFormat(_whole_file, _whole),
    ".md": FileFormat(_whole_file, _whole),
    ".py": FileFormat(_whole_file, _whole),
    ".parquet": FileFormat(_parquet, _row_groups),
    ".csv": FileFormat(_csv, _whole),
}
"""Kinds of files by suffix."""
