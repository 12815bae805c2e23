"""File formats of text: how each is parsed into documents, and where such a file can be split.

Add a format to ``FORMATS`` at the end of this file. A parser yields each document's bytes or a ``ParseError``, with the
number of its line or row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchladder.data.text import compression, document_parsers
from torchladder.data.text.document_parsers import FileSlice, Parse
from torchladder.registry import require


@dataclass(frozen=True)
class FileFormat:
    """How files of one suffix are parsed and split.

    Attributes:
        parse: yields the documents of a slice.
        split: (file, its bytes, target bytes of a slice) -> slices; None if such a file cannot be split.
        relative_numbers: whether documents are numbered from where their slice begins.
    """

    parse: Parse
    split: Callable[[Path, int, int], list[FileSlice]] | None = None
    relative_numbers: bool = False


def split_file(path: Path, size: int, target: int) -> list[FileSlice]:
    """Splits a file of ``size`` bytes into slices of about ``target`` bytes, as far as its format allows.

    The slices depend only on the file and the target.
    """
    split = format_of(path).split
    return split(path, size, target) if split and size > target else [FileSlice(path, 0, None, size)]


def format_of(path: Path) -> FileFormat:
    """Returns the format of a file; raises ConfigError if its suffix is unknown."""
    require(is_text_file(path), f"{path} is not a {TEXT_FILES}.")
    return FORMATS[compression.inner_suffix(path)]


def is_text_file(path: Path) -> bool:
    """Returns whether the suffix of a file is that of a known format."""
    return compression.inner_suffix(path) in FORMATS


def _split_lines(path: Path, size: int, target: int) -> list[FileSlice]:
    step = compression.slice_bytes(path, size, target)
    return [FileSlice(path, begin, min(begin + step, size), min(step, size - begin)) for begin in range(0, size, step)]


def _split_json(path: Path, size: int, target: int) -> list[FileSlice]:
    return [FileSlice(path, 0, None, size)] if document_parsers.holds_array(path) else _split_lines(path, size, target)


def _split_row_groups(path: Path, size: int, target: int) -> list[FileSlice]:
    if compression.is_compressed(path):  # as a whole
        return [FileSlice(path, 0, None, size)]
    metadata = document_parsers.open_parquet(path)[1].metadata
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    ratio = size / max(sum(sizes), 1)  # stored bytes per uncompressed byte; row groups know only the latter
    slices, begin = [], 0
    for group in range(len(sizes)):
        stored = int(sum(sizes[begin : group + 1]) * ratio)
        if stored >= target or group + 1 == len(sizes):
            slices.append(FileSlice(path, begin, group + 1, stored))
            begin = group + 1
    return slices


FORMATS = {
    ".jsonl": FileFormat(document_parsers.parse_json_lines, _split_lines, relative_numbers=True),
    ".json": FileFormat(document_parsers.parse_json, _split_json, relative_numbers=True),
    ".txt": FileFormat(document_parsers.parse_whole),
    ".md": FileFormat(document_parsers.parse_whole),
    ".py": FileFormat(document_parsers.parse_whole),
    ".parquet": FileFormat(document_parsers.parse_parquet, _split_row_groups),
    ".csv": FileFormat(document_parsers.parse_csv),
}
"""File formats by suffix."""

TEXT_FILES = (
    f"text file. Known: {', '.join(FORMATS)}, each also as {', '.join(compression.SUFFIXES)}; tokens are named as *.bin"
)
"""What a text file is, for errors."""
