"""Files to documents: a text per file, line or row, compressed or not, from any stretch of a file.

Documents keep the order of the file. A stretch holds the documents that begin in it, so the stretches of a file, read
one after the other or by many processes at once, give each document exactly once.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torchladder.data.extras import missing
from torchladder.data.text import compression
from torchladder.registry import ConfigError, unknown

OnError = Literal["error", "skip", "repair"]
"""What a document that cannot be read does: end the work, stay out, or stay out unless it only has bytes that are not
UTF-8, which then are left out of it."""


class Text(NamedTuple):
    """One document of a file.

    Attributes:
        number: its line or row, from 1; of a stretch that begins within a plain file, counted from there. None where
            the file is the document.
        text: its text, never empty.
    """

    number: int | None
    text: str


class Stretch(NamedTuple):
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


class Bad(NamedTuple):
    """Why something is no document.

    Attributes:
        reason: by which it is counted.
        detail: what exactly is wrong.
        repaired: the text without what is wrong, where that leaves any.
    """

    reason: str
    detail: str
    repaired: str = ""


class Reader:
    """Reads documents, and counts those that it leaves out.

    Args:
        text_key: the text's key in a line of a .jsonl, or its column in a table.
        on_error: what a document that cannot be read does.

    Attributes:
        skipped: documents left out or repaired, by reason.
        examples: for each reason the first such document, by file and line.
        size: bytes of files, as stored, that have been read.
    """

    def __init__(self, text_key: str = "text", on_error: OnError = "error") -> None:
        if on_error not in get_args(OnError):
            raise unknown("on_error", on_error, get_args(OnError))
        self.text_key = text_key
        self.on_error = on_error
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.size = 0

    def read(self, stretch: Stretch) -> Iterator[Text]:
        """Yields the documents that begin in a stretch.

        Raises:
            ConfigError: one cannot be read and ``on_error`` is "error", or the file as a whole is damaged.
        """
        for number, found in kind_of(stretch.path).read(self, stretch):
            text = found if isinstance(found, Bad) else _decoded(found)
            if isinstance(text, Bad):
                self._leave_out(text, stretch, number)
                text = text.repaired if self.on_error == "repair" else ""
            if text:
                yield Text(number, text)

    def _leave_out(self, bad: Bad, stretch: Stretch, number: int | None) -> None:
        if self.on_error == "error":
            raise ConfigError(f"{where(stretch, number)}: {bad.detail}; on_error 'skip' leaves such documents out.")
        self.skipped[bad.reason] += 1
        if bad.reason not in self.examples:
            self.examples[bad.reason] = where(stretch, number)

    # --- what each kind of file finds: pairs of a number and a text's bytes, or what is wrong -------------------------

    def whole(self, stretch: Stretch) -> Iterator[tuple[None, bytes]]:
        """Takes a file as one document."""
        content = compression.content(stretch.path)
        self.size += stretch.size
        yield None, content.removeprefix(codecs.BOM_UTF8)

    def lines(self, stretch: Stretch) -> Iterator[tuple[int, bytes | Bad]]:
        """Takes each line of a .jsonl as one document; lines of white space are none."""
        for number, line, size in compression.lines(stretch.path, stretch.begin, stretch.end):
            self.size += size
            if not line.isspace():
                yield number, self._object(line)

    def table(self, stretch: Stretch) -> Iterator[tuple[int, bytes | Bad]]:
        """Takes each row of a .csv as one document; the first row names the columns, fields may hold line ends."""
        # A length that no field reaches; the module knows only one limit, for all readers of the process.
        csv.field_size_limit(sys.maxsize)
        rows = csv.reader(self._csv_lines(stretch), strict=True)
        head = next(rows, [])
        if self.text_key not in head:
            raise ConfigError(f"{stretch.path}:1: text_key: {unknown('column', self.text_key, head)}")
        column = head.index(self.text_key)
        while True:
            number = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, Bad("broken as a row", f"no row of a .csv ({error})")
                continue
            if not row:
                continue
            if len(row) != len(head):
                yield number, Bad("broken as a row", f"{len(row)} fields, the first row has {len(head)}")
            else:
                yield number, row[column].encode("utf-8", errors="surrogateescape")

    def parquet(self, stretch: Stretch) -> Iterator[tuple[int, bytes | Bad]]:
        """Takes each row of a .parquet as one document."""
        arrow, file = _open_parquet(stretch.path)
        if self.text_key not in file.schema_arrow.names:
            raise ConfigError(f"{stretch.path}: text_key: {unknown('column', self.text_key, file.schema_arrow.names)}")
        kind = file.schema_arrow.field(self.text_key).type
        if kind not in (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary()):
            raise ConfigError(f"{stretch.path}: the column {self.text_key!r} holds {kind}, not text.")
        groups = range(stretch.begin, file.num_row_groups if stretch.end is None else stretch.end)
        number = sum(file.metadata.row_group(group).num_rows for group in range(stretch.begin))
        rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        try:
            for batch in file.iter_batches(1024, row_groups=groups, columns=[self.text_key]):
                self.size += stretch.size * batch.num_rows // max(rows, 1)
                # As bytes: arrow promises UTF-8 and does not check it.
                for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                    number += 1
                    yield number, Bad("without text", f"no {self.text_key!r}") if value is None else value
        except (arrow.ArrowException, OSError) as error:
            raise ConfigError(f"{stretch.path} is a damaged .parquet: {error}.") from error

    def _object(self, line: bytes) -> bytes | Bad:
        """Returns the text in a line of a .jsonl."""
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            rest = self._object(line.decode("utf-8-sig", errors="ignore").encode())
            return _not_utf8(error, b"" if isinstance(rest, Bad) else rest)
        except (ValueError, RecursionError) as error:
            return Bad("broken as JSON", f"not JSON ({error}); a .jsonl holds one object a line")
        if not isinstance(record, dict):
            return Bad("broken as JSON", f"holds a {type(record).__name__}; a .jsonl holds one object a line")
        if self.text_key not in record:
            return Bad("without text", f"text_key: {unknown('key', self.text_key, record)}".rstrip("."))
        text = record[self.text_key]
        if not isinstance(text, str):
            return Bad("without text", f"{self.text_key!r} holds a {type(text).__name__}, not a string")
        # JSON can spell half a surrogate pair, which no encoding of text can carry: it fails as UTF-8 later.
        return text.encode("utf-8", errors="surrogatepass")

    def _csv_lines(self, stretch: Stretch) -> Iterator[str]:
        for number, line, size in compression.lines(stretch.path, stretch.begin, stretch.end):
            self.size += size
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")


def where(stretch: Stretch, number: int | None) -> str:
    """Returns the file and line of a document that ``Reader.read`` has numbered within a stretch."""
    if number is None:
        return str(stretch.path)
    if kind_of(stretch.path).read is Reader.lines:
        number += compression.lines_before(stretch.path, stretch.begin)
    return f"{stretch.path}:{number}"


def _decoded(raw: bytes) -> str | Bad:
    try:
        return raw.decode() or Bad("empty", "an empty document")
    except UnicodeDecodeError as error:
        return _not_utf8(error, raw)


def _not_utf8(error: UnicodeDecodeError, raw: bytes) -> Bad:
    return Bad("not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start})", raw.decode(errors="ignore"))


# --- kinds of files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How files of one suffix are read and split."""

    read: Callable[[Reader, Stretch], Iterator[tuple[int | None, Any]]]
    split: Callable[[Path, int, int], list[Stretch]]


def split(path: Path, size: int, target: int) -> list[Stretch]:
    """Cuts a file of ``size`` bytes into stretches of about ``target`` bytes, as far as its kind allows.

    The cuts depend on the file and the target alone.
    """
    return kind_of(path).split(path, size, target) if size > target else [Stretch(path, 0, None, size)]


def kind_of(path: Path) -> Kind:
    """Returns how a file is read.

    Raises:
        ConfigError: files of that suffix are not known.
    """
    suffix = compression.inner_suffix(path)
    if suffix not in KINDS:
        raise ConfigError(f"{path} is of no known kind. Known: {kinds()}.")
    return KINDS[suffix]


def known(path: Path) -> bool:
    """Tells whether documents can be read from files of this name."""
    return compression.inner_suffix(path) in KINDS


def kinds() -> str:
    """Names the kinds of files, for errors."""
    return f"{', '.join(KINDS)}, and each of them as {', '.join(compression.SUFFIXES)}"


def _whole(path: Path, size: int, target: int) -> list[Stretch]:
    return [Stretch(path, 0, None, size)]


def _lines(path: Path, size: int, target: int) -> list[Stretch]:
    step = compression.step(path, size, target)
    return [Stretch(path, begin, min(begin + step, size), min(step, size - begin)) for begin in range(0, size, step)]


def _row_groups(path: Path, size: int, target: int) -> list[Stretch]:
    if path.suffix != ".parquet":
        return _whole(path, size, target)
    metadata = _open_parquet(path)[1].metadata
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    share = size / max(sum(sizes), 1)  # of the file as stored; the groups tell their size uncompressed
    stretches, begin = [], 0
    for group in range(len(sizes)):
        stored = int(sum(sizes[begin : group + 1]) * share)
        if stored >= target or group + 1 == len(sizes):
            stretches.append(Stretch(path, begin, group + 1, stored))
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
    ".jsonl": Kind(Reader.lines, _lines),
    ".txt": Kind(Reader.whole, _whole),
    ".md": Kind(Reader.whole, _whole),
    ".py": Kind(Reader.whole, _whole),
    ".parquet": Kind(Reader.parquet, _row_groups),
    ".csv": Kind(Reader.table, _whole),
}
"""Kinds of files by suffix."""
