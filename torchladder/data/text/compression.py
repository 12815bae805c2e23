"""Files as bytes, compressed or not: the whole content, or the lines that begin in a part of the file."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchladder.data.extras import import_extra
from torchladder.registry import ConfigError, require

SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
"""Of compressed files, in any case."""
CHUNK_BYTES = 1 << 20
"""Bytes that are decompressed at once; slices of a compressed file are multiples of it."""
MAX_COMPRESSED_SLICES = 8
"""A slice of a compressed file is reached by decompressing everything before it, so there are only a few."""


def inner_suffix(path: Path) -> str:
    """Returns the suffix of a file's content in lower case: ``.jsonl`` of ``a.JSONL.gz``."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def is_compressed(path: Path) -> bool:
    """Returns whether the suffix of a file is that of a compression."""
    return path.suffix.lower() in SUFFIXES


def read_content(path: Path) -> bytes:
    """Returns the whole content of a file, decompressed."""
    return b"".join(data for _, data in _chunks(path)) if is_compressed(path) else path.read_bytes()


def read_lines(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes, int]]:
    """Yields the lines that begin in a part of a file: (number from 1, content, bytes of the file as stored).

    Args:
        path: the file.
        begin: byte of the file as stored. A line of a compressed file begins at the chunk that it begins in, so a part
            is a whole number of chunks.
        end: where the next part begins; None reads to the end.
    """
    if is_compressed(path):
        yield from _compressed_lines(path, begin, end)
        return
    with open(path, "rb") as file:
        at = begin
        if begin:
            file.seek(begin - 1)
            at += len(file.readline()) - 1  # skips the rest of a line that began before; nothing if one begins here
        for number, line in enumerate(file, start=1):
            if end is not None and at >= end:
                return
            yield number, line, len(line)
            at += len(line)


def lines_before(path: Path, begin: int) -> int:
    """Returns how many lines end or begin before ``begin``, which ``read_lines`` from there does not count.

    0 for a compressed file, whose lines are always counted from its beginning.
    """
    if is_compressed(path) or begin == 0:
        return 0
    count, ends_line = 0, True
    with open(path, "rb") as file:
        while begin > 0 and (data := file.read(min(begin, CHUNK_BYTES))):
            count += data.count(b"\n")
            ends_line = data.endswith(b"\n")
            begin -= len(data)
    return count if ends_line else count + 1


def slice_bytes(path: Path, size: int, target: int) -> int:
    """Returns the size of the slices that a file of lines is split into: ``target`` bytes or more."""
    if not is_compressed(path):
        return target
    if path.suffix.lower() in (".bz2", ".xz"):
        return size  # too slow to decompress again for each slice
    target = max(target, -(-size // MAX_COMPRESSED_SLICES))
    return -(-target // CHUNK_BYTES) * CHUNK_BYTES


def _compressed_lines(path: Path, begin: int, end: int | None) -> Iterator[tuple[int, bytes, int]]:
    size = path.stat().st_size
    rest, start, number, taken = b"", 0, 0, begin
    for at, data in _chunks(path):
        if not rest:
            start = at
        whole, newline, rest_of_data = data.rpartition(b"\n")
        if not newline:
            rest += data
            continue
        for line in (rest + whole).split(b"\n"):
            number += 1
            if end is not None and start >= end:
                return
            if start >= begin:
                read = min(at + CHUNK_BYTES, size)
                yield number, line + b"\n", read - taken
                taken = read
            start = at
        rest = rest_of_data
    if rest and start >= begin and (end is None or start < end):
        yield number + 1, rest, size - taken


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields a file's content in order, each chunk with the byte of the file that it was decompressed from.

    Concatenated members, as of ``cat a.gz b.gz``, are one content.
    """
    new, failure = _decompressor(path)
    member = None
    with open(path, "rb") as file:
        for at in range(0, path.stat().st_size, CHUNK_BYTES):
            stored, decompressed = file.read(CHUNK_BYTES), []
            try:
                while stored:
                    member = new() if member is None or member.eof else member
                    decompressed.append(member.decompress(stored))
                    stored = member.unused_data if member.eof else b""
            except failure as error:
                raise ConfigError(
                    f"{path} is not a {path.suffix} file, or is damaged within {CHUNK_BYTES} bytes of byte {at}."
                ) from error
            yield at, b"".join(decompressed)
    require(member is None or member.eof, f"{path} is truncated: its last member is incomplete.")


def _decompressor(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """Returns what makes the decompressor of one member, and what that raises on damage."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if suffix == ".bz2":
        return bz2.BZ2Decompressor, OSError
    if suffix == ".xz":
        return lzma.LZMADecompressor, lzma.LZMAError
    zstandard = import_extra("zstandard", "zstd", f"reading {path}")
    # Any window that zstd --long has: only as much memory as the file needs is allocated.
    new = zstandard.ZstdDecompressor(max_window_size=1 << zstandard.WINDOWLOG_MAX).decompressobj
    return new, zstandard.ZstdError
