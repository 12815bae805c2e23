"""Files to documents: a text per file, line or row, compressed or not, from any stretch of a file.

Documents keep the order of the file. A stretch holds the documents that begin in it, so the stretches of a file, read
one after the other or by many processes at once, give each document exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from torchladder.data.text import compression
from torchladder.data.text.file_formats import FileSlice, ParseError, decoded, kind_of
from torchladder.registry import ConfigError, unknown_name

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


class DocumentReader:
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
            raise unknown_name("on_error", on_error, get_args(OnError))
        self.text_key = text_key
        self.on_error = on_error
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.size = 0

    def read(self, stretch: FileSlice) -> Iterator[Text]:
        """Yields the documents that begin in a stretch.

        Raises:
            ConfigError: one cannot be read and ``on_error`` is "error", or the file as a whole is damaged.
        """
        for number, found in kind_of(stretch.path).find(stretch, self.text_key, self._taken):
            text = found if isinstance(found, ParseError) else decoded(found)
            if isinstance(text, ParseError):
                self._leave_out(text, stretch, number)
                text = text.repaired if self.on_error == "repair" else ""
            if text:
                yield Text(number, text)

    def _taken(self, size: int) -> None:
        self.size += size

    def _leave_out(self, bad: ParseError, stretch: FileSlice, number: int | None) -> None:
        if self.on_error == "error":
            raise ConfigError(f"{where(stretch, number)}: {bad.detail}; on_error 'skip' leaves such documents out.")
        self.skipped[bad.reason] += 1
        if bad.reason not in self.examples:
            self.examples[bad.reason] = where(stretch, number)


def where(stretch: FileSlice, number: int | None) -> str:
    """Returns the file and line of a document that ``Reader.read`` has numbered within a stretch."""
    if number is None:
        return str(stretch.path)
    if kind_of(stretch.path).relative:
        number += compression.lines_before(stretch.path, stretch.begin)
    return f"{stretch.path}:{number}"
