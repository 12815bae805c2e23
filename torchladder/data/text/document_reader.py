"""Files to documents: one text per file, line or row, compressed or not, in the order of the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from torchladder.data.text import compression
from torchladder.data.text.document_parsers import FileSlice, ParseError, decode_text
from torchladder.data.text.file_formats import format_of
from torchladder.registry import ConfigError, unknown_name

OnError = Literal["error", "skip", "repair"]
"""What to do with a document that cannot be read: raise, skip it, or drop the bytes that are not UTF-8 (and skip it if
that does not help)."""


class DocumentReader:
    """Reads documents, and counts those that it skips or repairs.

    Args:
        text_key: the text's key in a line of a .jsonl, or its column in a table.
        on_error: what to do with a document that cannot be read.

    Attributes:
        skipped: documents skipped or repaired, by reason.
        examples: for each reason the first such document, by file and line.
        size: bytes of files, as stored, that have been read.
    """

    def __init__(self, text_key: str = "text", on_error: OnError = "error") -> None:
        if on_error not in get_args(OnError):
            raise unknown_name("on_error", on_error, get_args(OnError))
        self.text_key = text_key
        self.on_error = on_error
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.size = 0

    def read(self, file_slice: FileSlice) -> Iterator[tuple[int | None, str]]:
        """Yields the number and the text of each document that begins in a slice; no text is empty.

        The number is the line or row, from 1; in a slice of an uncompressed file, counted from where the slice begins.
        None if the file is the document.

        Raises:
            ConfigError: one cannot be read and ``on_error`` is "error", or the file as a whole is damaged.
        """

        def count_bytes(size: int) -> None:
            self.size += size

        for number, found in format_of(file_slice.path).parse(file_slice, self.text_key, count_bytes):
            text = found if isinstance(found, ParseError) else decode_text(found)
            if isinstance(text, ParseError):
                if self.on_error == "error":
                    place = document_location(file_slice, number)
                    raise ConfigError(f"{place}: {text.detail}; on_error 'skip' skips such documents.")
                if text.reason not in self.examples:
                    self.examples[text.reason] = document_location(file_slice, number)
                self.skipped[text.reason] += 1
                text = text.repaired if self.on_error == "repair" else ""
            if text:
                yield number, text


def document_location(file_slice: FileSlice, number: int | None) -> str:
    """Returns the file and line of a document that ``DocumentReader.read`` has numbered within a slice."""
    if number is None:
        return str(file_slice.path)
    return f"{file_slice.path}:{number + numbers_before(file_slice)}"


def numbers_before(file_slice: FileSlice) -> int:
    """Returns what to add to the numbers of documents in a slice to get those in the file."""
    relative = format_of(file_slice.path).relative_numbers
    return compression.lines_before(file_slice.path, file_slice.begin) if relative else 0


def summarize_skipped(skipped: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """Returns a line for each reason why documents were skipped or repaired."""
    return [f"{count:,} documents: {reason} (first: {examples[reason]})" for reason, count in sorted(skipped.items())]
