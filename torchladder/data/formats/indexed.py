"""Tokenized documents on disk: Megatron ``.bin/.idx`` pairs, written atomically and memory-mapped for reading.

``.bin`` holds the tokens of all documents back to back. ``.idx`` holds, little-endian: the magic ``MMIDIDX\\0\\0``,
uint64 version 1, uint8 dtype code, uint64 sequences, uint64 document indices (a 34-byte header); then int32
lengths[sequences], int64 byte pointers[sequences], int64 document indices. Document i consists of the sequences
``indices[i]`` to ``indices[i + 1] - 1``; indices begin with 0 and end with the number of sequences.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from torchladder.data.formats.document_split import split_bounds
from torchladder.data.formats.eos_documents import divide_at_eos
from torchladder.data.sources import TokenShard, register_tokens
from torchladder.disk_errors import naming_path
from torchladder.registry import ConfigError, require

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # 9 + 8 + 1 + 8 + 8 = 34 bytes
# Megatron and GPT-NeoX agree on these; they disagree only on 6 and 7, which are floats.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}

MAX_FULL_HASH_BYTES = 1 << 26
"""Largest ``.bin`` whose fingerprint covers every byte; of larger ones it covers evenly spread samples."""
HASH_SAMPLES, HASH_SAMPLE_BYTES = 256, 1 << 16


def dtype_for(vocab_size: int) -> np.dtype:
    """Returns the token type that Megatron uses for a vocabulary: uint16 below 65500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def prefix_of(path: str | Path) -> str:
    """Returns the path without ``.bin`` or ``.idx``."""
    text = str(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def find_out_of_range(
    tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, low: int, high: int
) -> tuple[int, int] | None:
    """Returns the first token that is not in ``low .. high`` and its document; None if all are.

    Args:
        tokens: (tokens,) of documents that are stored back to back.
        lengths: (documents,) tokens in each.
        low, high: the least and the largest valid token.
    """
    if not len(tokens) or low <= tokens.min() <= tokens.max() <= high:
        return None
    place = int(np.flatnonzero((tokens < low) | (tokens > high))[0])
    return int(tokens[place]), int(np.searchsorted(np.cumsum(lengths), place, side="right"))


class IndexedWriter:
    """Writes documents; the pair appears under its name only when it is complete::

        with IndexedWriter("data/train", dtype_for(tokenizer.vocab_size)) as writer:
            writer.add(ids)

    Args:
        path: the pair's prefix, or either of its files.
        dtype: type of a token on disk.

    Attributes:
        lengths: tokens in each document so far.
        checksums: SHA-256 of ``bin`` and ``idx``, once both are complete.
    """

    def __init__(self, path: str | Path, dtype: np.dtype) -> None:
        if np.dtype(dtype) not in CODES:
            allowed = ", ".join(sorted(str(known) for known in CODES))
            raise ConfigError(f"tokens cannot be stored as {np.dtype(dtype)}. Known: {allowed}.")
        self.prefix = prefix_of(path)
        self.dtype = np.dtype(dtype)
        self.lengths = array("i")
        self.checksums: dict[str, str] = {}
        self._digest = hashlib.sha256()
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(f"{self.prefix}.bin.partial", "wb", buffering=1 << 20)  # noqa: SIM115 - closed by __exit__

    def add(self, tokens: np.ndarray | list[int]) -> None:
        """Appends one document."""
        self.extend(np.asarray(tokens) if len(tokens) else np.empty(0, self.dtype), [len(tokens)])

    def extend(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Appends documents that are stored back to back.

        Args:
            tokens: (tokens,) of all documents.
            lengths: (documents,) tokens in each.

        Raises:
            ConfigError: a token does not fit the dtype.
        """
        low, high = np.iinfo(self.dtype).min, np.iinfo(self.dtype).max
        if invalid := find_out_of_range(tokens, lengths, low, high):
            token, document = invalid
            raise ConfigError(
                f"token {token} of document {len(self.lengths) + document} does not fit {self.dtype} ({low} to {high}) "
                f"in {self.prefix}.bin."
            )
        data = np.ascontiguousarray(tokens, dtype=self.dtype.newbyteorder("<")).data
        with naming_path(self._file.name):
            self._file.write(data)
        self._digest.update(data)
        self.lengths.frombytes(np.asarray(lengths, dtype=np.int32).tobytes())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):  # of a full disk
                self._file.close()
            os.unlink(self._file.name)
            return
        with naming_path(self._file.name):
            _sync(self._file)
        lengths = np.frombuffer(self.lengths, dtype=np.int32) if self.lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        count = len(lengths)
        content: list[Any] = [
            HEADER.pack(MAGIC, 1, CODES[self.dtype], count, count + 1),
            lengths.astype("<i4").data,
            (ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").data,
            np.arange(count + 1, dtype="<i8").data,
        ]
        digest = hashlib.sha256()
        with naming_path(f"{self.prefix}.idx.partial"), open(f"{self.prefix}.idx.partial", "wb") as index:
            for piece in content:
                index.write(piece)
                digest.update(piece)
            _sync(index)
        self.checksums = {"bin": self._digest.hexdigest(), "idx": digest.hexdigest()}
        # The old index is removed first and the new one comes last: an index never accompanies tokens of another pair.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(f"{self.prefix}.bin.partial", f"{self.prefix}.bin")
        os.replace(f"{self.prefix}.idx.partial", f"{self.prefix}.idx")


class IndexedTokens:
    """Reads a memory-mapped pair: opening it reads the index, documents are read on access.

    Args:
        path: the pair's prefix, or either of its files.
        bounds: which of its documents: from ``round(begin * n)`` to before ``round(end * n)`` of n.

    Attributes:
        lengths: (documents,) int64, tokens in each document.
        offsets: (documents,) int64, where each document begins in ``flat``.
        flat: all tokens of the ``.bin``, read-only.

    Raises:
        ConfigError: a file is missing, truncated or of another format, or the index points past the end.
    """

    def __init__(self, path: str | Path, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        self.prefix, self.bounds = prefix_of(path), bounds
        for file in (f"{self.prefix}.bin", f"{self.prefix}.idx"):
            require(os.path.isfile(file), f"{file} is missing: tokens are a pair of .bin and .idx.")
        self.dtype, self.lengths, self.offsets = self._read_index()
        self.flat = map_tokens(f"{self.prefix}.bin", self.dtype)
        end = int((self.offsets + self.lengths).max(initial=0))
        require(
            end <= len(self.flat),
            f"{self.prefix}.idx points past the end of {self.prefix}.bin: it needs {end * self.dtype.itemsize} bytes, "
            f"the file has {os.path.getsize(f'{self.prefix}.bin')}. The .bin is truncated, or not its pair.",
        )
        self._first, until = (round(bound * len(self.lengths)) for bound in bounds)
        self.lengths, self.offsets = self.lengths[self._first : until], self.offsets[self._first : until]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        start = int(self.offsets[document])
        return self.flat[start : start + int(self.lengths[document])]

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedTokens, (self.prefix, self.bounds)  # workers map the files instead of receiving the tokens

    def locate(self, document: int) -> str:
        """Returns where a document is, for errors."""
        return f"{self.prefix}.bin, document {self._first + document}"

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return int(self.lengths.sum())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content, independent of where the files are.

        It covers every byte of the ``.idx`` (documents, lengths, dtype), the size of the ``.bin``, and up to 64 MiB
        every token. Of a larger ``.bin`` it covers 256 evenly spread samples of 64 KiB, including the first and last
        bytes; a change between samples is not detected.
        """
        digest = hashlib.sha256(Path(f"{self.prefix}.idx").read_bytes())
        if self.bounds != (0.0, 1.0):
            digest.update(f"documents {self._first} to {self._first + len(self)}".encode())
        size = os.path.getsize(f"{self.prefix}.bin")
        digest.update(str(size).encode())
        with open(f"{self.prefix}.bin", "rb") as file:
            if size <= MAX_FULL_HASH_BYTES:
                digest.update(file.read())
            else:
                for sample in range(HASH_SAMPLES):
                    file.seek((size - HASH_SAMPLE_BYTES) * sample // (HASH_SAMPLES - 1))
                    digest.update(file.read(HASH_SAMPLE_BYTES))
        return digest.hexdigest()

    def _read_index(self) -> tuple[np.dtype, np.ndarray, np.ndarray]:
        """Returns the token type, and each document's length and first token's index in the ``.bin``."""
        name = f"{self.prefix}.idx"
        raw = np.memmap(name, dtype=np.uint8, mode="r") if os.path.getsize(name) else np.empty(0, np.uint8)
        dtype, sequences, documents = read_header(name, raw[: HEADER.size].tobytes(), HEADER, MAGIC, "a Megatron .idx")
        bounds = list(accumulate([HEADER.size, 4 * sequences, 8 * sequences, 8 * documents]))
        # One mode byte per sequence may follow, in multimodal files.
        complete = len(raw) in (bounds[3], bounds[3] + sequences)
        require(complete, f"{name} has {len(raw)} bytes, its header needs {bounds[3]}: it is truncated or damaged.")
        lengths = np.asarray(raw[bounds[0] : bounds[1]].view("<i4"), dtype=np.int64)
        pointers = raw[bounds[1] : bounds[2]].view("<i8")
        indices = np.asarray(raw[bounds[2] : bounds[3]].view("<i8"))
        valid = lengths.min(initial=0) >= 0 <= pointers.min(initial=0) and not (pointers % dtype.itemsize).any()
        require(valid, f"{name} is damaged: it has a negative length, or a pointer that is negative or within a token.")
        offsets = np.asarray(pointers // dtype.itemsize)
        if len(indices) == 1 and sequences:
            return dtype, lengths, offsets  # merged by GPT-NeoX, which drops the documents: each sequence is one
        # Join the sequences of each document, which must be stored back to back.
        covered = len(indices) > 0 and indices[0] == 0 and indices[-1] == sequences and (np.diff(indices) >= 0).all()
        require(bool(covered), f"{name} is damaged: its document indices do not run from 0 to {sequences}.")
        if len(indices) == sequences + 1 and (np.diff(indices) == 1).all():
            return dtype, lengths, offsets
        inside = np.setdiff1d(np.arange(1, sequences), indices)  # sequences that continue the one before
        adjacent = (offsets[inside] == offsets[inside - 1] + lengths[inside - 1]).all()
        require(adjacent, f"{name} has a document whose sequences are not stored back to back.")
        ends = np.concatenate([[0], np.cumsum(lengths)])
        first = np.append(offsets, 0)[indices[:-1]]  # an empty document at the very end begins nowhere
        return dtype, np.diff(ends[indices]), first


def read_header(file: str | Path, raw: bytes, header: struct.Struct, magic: bytes, kind: str) -> tuple[Any, ...]:
    """Returns the token type and the numbers that follow it in a header of magic, version, dtype code, numbers.

    Raises:
        ConfigError: it is truncated, or of another format, version or type.
    """
    size = header.size
    require(len(raw) == size, f"{file} has {len(raw)} bytes, fewer than the header's {size}: it is truncated.")
    found, version, code, *numbers = header.unpack(raw)
    require(found == magic, f"{file} begins with {found!r}, not {magic!r}: it is not {kind}.")
    require(version == 1, f"{file} has version {version}. Known: 1.")
    known = ", ".join(f"{number} ({np.dtype(dtype)})" for number, dtype in DTYPES.items())
    require(code in DTYPES, f"{file} stores tokens as dtype code {code}. Known: {known}.")
    return np.dtype(DTYPES[code]).newbyteorder("<"), *numbers


def map_tokens(path: str | Path, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """Returns the memory-mapped tokens of a file after ``offset`` bytes, read-only and advised for random access.

    Documents are read in random order, so readahead, up to megabytes for each, would be wasted.
    """
    with open(path, "rb") as file:
        count = (os.fstat(file.fileno()).st_size - offset) // dtype.itemsize
        if count < 1:
            return np.empty(0, dtype)  # nothing to map
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    # A plain array over the map: slicing np.memmap is several times as slow.
    return np.frombuffer(mapped, dtype, count, offset)


@register_tokens("indexed", suffixes=(".bin", ".idx"))
def indexed(
    files: list[Path],
    eos: int | None,
    cache: Path,
    part: Literal["train", "validation"],
    documents_by_eos: bool = False,
    split: str = "",
) -> Sequence[TokenShard]:
    """Megatron ``.bin``/``.idx`` pairs, each named by either of its files.

    Args:
        documents_by_eos: End documents at the tokenizer's eos, too: for rows that were packed elsewhere.
        split: As Megatron's: "9998,1,1" trains on the first 9998 of 10000 documents and validates on the next one.
    """
    shards = [IndexedTokens(prefix, split_bounds(split, part)) for prefix in dict.fromkeys(map(prefix_of, files))]
    return divide_at_eos(shards, eos, cache) if documents_by_eos else shards


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
