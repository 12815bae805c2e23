"""Checksums: taken while DCP writes, compared with what can be read back, kept in ``SHA256SUMS``."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

SUMS = "SHA256SUMS"
"""The file of a checkpoint with a line ``<sha256>  <name>`` for each other file."""

BLOCK = 1 << 22
"""Bytes read at once: 4 MiB."""


class ChecksumWriter(FileSystemWriter):
    """DCP's writer, which also takes the SHA-256 of every file while its bytes go out.

    Attributes:
        sums: file name → hexadecimal digest of what was written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=False)  # ``verify`` syncs, once everything is out of Python's buffers
        self.sums: dict[str, str] = {}
        self.fs = _Files(self.sums)


class _Files(FileSystem):
    """DCP's file system, with a digest for each stream that is written."""

    def __init__(self, sums: dict[str, str]) -> None:
        self.sums = sums

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _Stream(io.FileIO(path, "wb")) as stream:
            yield stream
        self.sums[Path(path).name] = stream.digest.hexdigest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Stream(io.BufferedWriter):
    """A file that is written from front to back, and the digest of its bytes."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)


def sha256(path: Path) -> str:
    """Returns the digest of a file, as the disk has it where the page cache can be told to let go of it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def verify(folder: Path, sums: Mapping[str, str]) -> None:
    """Reads files back.

    Raises:
        OSError: one of them cannot be read, or is not what was written.
    """
    for name, digest in sums.items():
        if sha256(folder / name) != digest:
            raise OSError(f"{folder / name} does not hold what was written")


def to_text(sums: Mapping[str, str]) -> str:
    """Returns sums as ``sha256sum`` prints them."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read(folder: Path) -> dict[str, str]:
    """Returns the sums of a checkpoint: name → digest.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is not a list of sums.
    """
    sums = {}
    text = (folder / SUMS).read_text(encoding="utf-8")
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        sums[name] = digest
    if not sums or to_text(sums) != text:
        raise ValueError("it is not a list of checksums")
    return sums


def find_corruption(folder: Path) -> str | None:
    """Returns what is wrong with the files of a checkpoint, None where all are intact."""
    try:
        problems = (file_error(folder, name, digest) for name, digest in read(folder).items())
        return next(filter(None, problems), None)
    except (OSError, ValueError) as error:
        return f"{SUMS}: {getattr(error, 'strerror', None) or error}"


def file_error(folder: Path, name: str, digest: str) -> str | None:
    """Returns what is wrong with a file of a checkpoint, None where it is intact."""
    try:
        return None if sha256(folder / name) == digest else f"{name} is not what was saved (its checksum differs)"
    except OSError as error:
        return f"{name}: {error.strerror}"
