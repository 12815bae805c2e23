"""Files as bytes, whichever way they are compressed: whole, or the lines that begin in a part of them."""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchladder.data.extras import missing
from torchladder.registry import ConfigError

CHUNK = 1 << 20
"""Bytes that are decompressed at once: the grid on which compressed files are cut."""
PIECES = 8
"""Parts that a compressed file is cut into at most: each is reached by decompressing the file from its beginning."""


def inner_suffix(path: Path) -> str:
    """Returns the suffix of a file's content: ``.jsonl`` of ``a.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix in SUFFIXES else path.suffix


def content(path: Path) -> bytes:
    """Returns the whole content of a file, decompressed."""
    return b"".join(data for _, data in _chunks(path)) if path.suffix in SUFFIXES else path.read_bytes()


def lines(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes, int]]:
    """Yields the lines that begin in a part of a file: number from 1, content, and bytes of the file it took.

    Args:
        path: the file.
        begin: bytes of the file as stored. Within a compressed file this means the chunk that a line begins in, so
            the part is a whole number of chunks.
        end: where the next part begins; None reads to the end.
    """
    if path.suffix in SUFFIXES:
        return _compressed_lines(path, begin, end)
    return _plain_lines(path, begin, end)


def lines_before(path: Path, begin: int) -> int:
    """Returns how many lines ``lines`` does not count when it begins there; of a compressed file it counts all."""
    if path.suffix in SUFFIXES or begin == 0:
        return 0
    count, ends_line = 0, True
    with open(path, "rb") as file:
        while begin > 0 and (data := file.read(min(begin, CHUNK))):
            count += data.count(b"\n")
            ends_line = data.endswith(b"\n")
            begin -= len(data)
    return count if ends_line else count + 1


def step(path: Path, size: int, target: int) -> int:
    """Returns the size of the parts that a file of lines is cut into, ``target`` bytes or more."""
    if path.suffix not in SUFFIXES:
        return target
    if path.suffix == ".bz2":
        return size  # decompresses too slowly to begin anew for each part
    target = max(target, -(-size // PIECES))
    return -(-target // CHUNK) * CHUNK


def _plain_lines(path: Path, begin: int, end: int | None) -> Iterator[tuple[int, bytes, int]]:
    with open(path, "rb") as file:
        at = begin
        if begin:
            file.seek(begin - 1)
            at += len(file.readline()) - 1  # the rest of a line that began before; nothing where one begins right here
        for number, line in enumerate(file, start=1):
            if end is not None and at >= end:
                return
            yield number, line, len(line)
            at += len(line)


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
                read = min(at + CHUNK, size)
                yield number, line + b"\n", read - taken
                taken = read
            start = at
        rest = rest_of_data
    if rest and start >= begin and (end is None or start < end):
        yield number + 1, rest, size - taken


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields a file's content in order, each chunk with the place in the file that it was decompressed from.

    Members that follow each other in one file, as ``cat a.gz b.gz`` makes them, are one content.

    Raises:
        ConfigError: the file is damaged or cut short.
    """
    new, failure = SUFFIXES[path.suffix](path)
    member = None
    with open(path, "rb") as file:
        for at in range(0, path.stat().st_size, CHUNK):
            stored, decompressed = file.read(CHUNK), []
            try:
                while stored:
                    member = new() if member is None or member.eof else member
                    decompressed.append(member.decompress(stored))
                    stored = member.unused_data if member.eof else b""
            except failure as error:
                raise ConfigError(f"{path} is no {path.suffix}, or damaged within {CHUNK} bytes of {at}.") from error
            yield at, b"".join(decompressed)
    if member is not None and not member.eof:
        raise ConfigError(f"{path} is cut short: its last part does not end.")


Members = tuple[Callable[[], Any], type[Exception]]
"""What makes a decompressor of one member, and what it raises on damage."""


def _gz(path: Path) -> Members:
    return lambda: zlib.decompressobj(wbits=31), zlib.error


def _bz2(path: Path) -> Members:
    return bz2.BZ2Decompressor, OSError


def _zst(path: Path) -> Members:
    try:
        import zstandard
    except ImportError:
        raise missing("zstandard", "zstd", f"reading {path}") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


SUFFIXES: dict[str, Callable[[Path], Members]] = {".gz": _gz, ".zst": _zst, ".bz2": _bz2}
"""Compressed files by suffix."""
