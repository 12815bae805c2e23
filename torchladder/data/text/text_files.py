"""The source of text: files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchladder.data.disk_cache import file_sha256, files_key
from torchladder.data.file_patterns import as_list, match_files
from torchladder.data.sources import Document, TextSource, register_text
from torchladder.data.text import file_formats
from torchladder.data.text.document_parsers import FileSlice
from torchladder.data.text.document_reader import DocumentReader, OnError, summarize_skipped
from torchladder.registry import require

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextFiles:
    """Documents read from files, each file identified by a name that does not depend on where the files are.

    Attributes:
        name: what errors and the report call the source.
        files: each file's name within the source and its path, in reading order.
        text_key: the key of the text in a line of a ``.jsonl``, or its column in a table.
        on_error: what to do with a document that cannot be read.
        report: whether to log how many could not.
    """

    name: str
    files: tuple[tuple[str, Path], ...]
    text_key: str = "text"
    on_error: OnError = "error"
    report: bool = True

    def documents(self) -> Iterator[Document]:
        reader, done = DocumentReader(self.text_key, self.on_error), 0
        for name, path in self.files:
            for number, text in reader.read(FileSlice.whole(path)):
                yield Document(name if number is None else f"{name}:{number}", text, reader.size - done)
                done = reader.size
        for line in summarize_skipped(reader.skipped, reader.examples) if self.report else []:
            logger.warning("%s: %s", self.name, line)

    def size(self) -> int:
        return sum(path.stat().st_size for _, path in self.files)

    def stamp(self) -> str:
        names, paths = zip(*self.files, strict=True)
        return files_key(paths, self.text_key, self.on_error, names)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.text_key, self.on_error)).encode())
        for name, path in self.files:
            digest.update(repr((name, file_sha256(path))).encode())
        return digest.hexdigest()


@register_text("text")
def text(path: str | list[str], text_key: str = "text", on_error: OnError = "error") -> TextSource:
    """Text files: each .txt, .py and .md is a document, each line of a .jsonl or .json, each row of a .csv or .parquet.

    All of them may be compressed, as .gz, .zst, .bz2 or .xz. A .json may also be one array of objects.

    Args:
        path: A file, a folder (searched recursively), a glob such as ``notes/**/*.md``, or a list of those.
        text_key: Key of the text in a line of a .jsonl, or its column in a table.
        on_error: What to do with a document that cannot be read: error, skip, or repair (drop what is not UTF-8).

    Raises:
        ConfigError: nothing matches, or no match is a text file.
    """
    patterns = as_list(path)
    given = bool(patterns) and all(patterns)
    require(given, "the source text needs a path: a file, a folder, a glob, or a list of those.")
    files = tuple((name, file) for file, name in match_text_files(patterns).items())
    return TextFiles(", ".join(patterns), files, text_key, on_error)


def match_text_files(patterns: Sequence[str]) -> dict[Path, str]:
    """Returns the text files of patterns, each with its name; raises ConfigError if a pattern has none."""
    return match_files(patterns, file_formats.is_text_file, file_formats.TEXT_FILES)
