"""Chunks of TinyLlama and SkyLadder (``LITPKDS``): a 24-byte header, then one stream of tokens cut into equal files.

The header holds, little-endian: the magic ``LITPKDS``, uint64 version 1, uint8 dtype code, uint64 tokens in the file.
A chunk does not store documents. They end with the tokenizer's eos, so the tokens are searched for it once and the ends
are cached; a document that continues in another chunk counts as two. Rows of any length can then be packed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from torchladder.data.disk_cache import build_once, files_key
from torchladder.data.formats.indexed import map_tokens, read_header
from torchladder.data.sources import register_tokens
from torchladder.registry import ConfigError, require

MAGIC = b"LITPKDS"
HEADER = struct.Struct("<7sQBQ")  # 7 + 8 + 1 + 8 = 24 bytes
MAX_MAPPED_FILES = 256
"""Files that are open at once; a corpus may have more than a process may open."""
HASH_BYTES = 1 << 16
"""Bytes of each file that a fingerprint covers, half of them at its end."""


class LitPkdsChunks:
    """Reads chunk files as one long stream; a file is mapped when a document in it is read.

    Args:
        files: in order, all of the same dtype and size.
        eos: the token that ends a document.
        cache: the cache folder.

    Attributes:
        lengths: (documents,) int64, tokens in each document.
        offsets: (documents,) int64, index of its first token in the stream of all files.

    Raises:
        ConfigError: a file is damaged, of another format, or differs from the first one in dtype or size.
    """

    def __init__(self, files: Sequence[Path], eos: int, cache: Path) -> None:
        self.files = list(files)
        self.eos = eos
        self.cache = cache
        self.dtype, self.chunk = _header(self.files[0])
        for file in self.files:
            dtype, chunk = _header(file)
            require(
                (dtype, chunk) == (self.dtype, self.chunk),
                f"{file} holds {chunk} tokens of {dtype}, but {self.files[0]} holds {self.chunk} of {self.dtype}: "
                "list chunks of different runs as different sources.",
            )
        self._map = lru_cache(MAX_MAPPED_FILES)(lambda i: map_tokens(self.files[i], self.dtype, HEADER.size))
        saved = build_once(cache / "chunks" / f"{files_key(self.files, eos)}.npy", self._write_ends)
        ends = np.load(saved, mmap_mode="r")
        self.offsets = np.concatenate([[0], ends[:-1]])
        self.lengths = ends - self.offsets

    @property
    def flat(self) -> LitPkdsChunks:
        return self

    def __getitem__(self, places: slice) -> np.ndarray:
        """Returns tokens of one document, which lie within one file."""
        file, begin = divmod(places.start, self.chunk)
        return self._map(file)[begin : begin + places.stop - places.start]

    def locate(self, document: int) -> str:
        """Returns where a document is, for errors; those of a chunk are counted from 0, too."""
        file = int(self.offsets[document]) // self.chunk
        first = int(np.searchsorted(self.offsets, file * self.chunk))
        return f"{self.files[file]}, document {document - first}"

    def __reduce__(self) -> tuple[type[LitPkdsChunks], tuple[list[Path], int, Path]]:
        return LitPkdsChunks, (self.files, self.eos, self.cache)  # workers map the files themselves

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the headers, the first and last 32 KiB of every file, and where documents end."""
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths).data)
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(file.read(HASH_BYTES // 2))
                file.seek(max(os.path.getsize(path) - HASH_BYTES // 2, 0))
                digest.update(file.read())
        return digest.hexdigest()

    def _write_ends(self, target: Path) -> None:
        ends = []
        for number, file in enumerate(self.files):
            inside = np.flatnonzero(np.fromfile(file, self.dtype, offset=HEADER.size) == self.eos) + 1
            if not len(inside) or inside[-1] != self.chunk:
                inside = np.append(inside, self.chunk)
            ends.append(inside + number * self.chunk)
        with open(target, "wb") as saved:
            np.save(saved, np.concatenate(ends))


def is_chunk(file: Path) -> bool:
    """Returns whether a file begins with the magic of a chunk."""
    with open(file, "rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


@register_tokens("litpkds", suffixes=(".bin",), recognize=is_chunk)
def litpkds(files: list[Path], eos: int | None, cache: Path) -> list[LitPkdsChunks]:
    """Chunks of TinyLlama and SkyLadder (``LITPKDS``); documents end with the tokenizer's eos.

    Raises:
        ConfigError: as ``LitPkdsChunks``, or there is no tokenizer.
    """
    if eos is None:
        raise ConfigError(
            f"{files[0]}: LITPKDS chunks do not store document boundaries: set [tokenizer], whose eos token marks them."
        )
    return [LitPkdsChunks(files, eos, cache)]


def _header(file: Path) -> tuple[np.dtype, int]:
    """Returns the dtype and the number of tokens of a chunk file."""
    with open(file, "rb") as opened:
        dtype, tokens = read_header(file, opened.read(HEADER.size), HEADER, MAGIC, "a LITPKDS chunk")
    size, needed = os.path.getsize(file), HEADER.size + tokens * dtype.itemsize
    valid = size == needed and tokens > 0
    require(valid, f"{file} has {size} bytes, its header needs {needed}: it is truncated or damaged.")
    return dtype, tokens
