"""SHA-256 checksums of a checkpoint's files, computed while DCP writes them and kept in ``SHA256SUMS``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase

from torchladder.disk_errors import naming_path

CHECKSUM_FILE = "SHA256SUMS"
"""One line ``<sha256>  <name>`` for each other file of the checkpoint, in the format of ``sha256sum``."""


class ChecksumWriter(FileSystemWriter):
    """DCP's writer on any DCP file system; hashes every file while it is written.

    Attributes:
        checksums: file name -> hexadecimal SHA-256 of the bytes that were written.
    """

    def __init__(self, fs: FileSystemBase, path: str) -> None:
        super().__init__(path, sync_files=False)  # verifying the checksums syncs, once Python's buffers are flushed
        self.checksums: dict[str, str] = {}
        self.fs: Any = _ChecksumFileSystem(fs, self.checksums)
        self.path = path


class _ChecksumFileSystem:
    """A DCP file system whose output streams are hashed."""

    def __init__(self, fs: FileSystemBase, checksums: dict[str, str]) -> None:
        self._fs = fs
        self._checksums = checksums

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with naming_path(path), self._fs.create_stream(path, mode) as stream:
            hashed = ChecksumStream(stream)
            yield hashed
        self._checksums[os.path.basename(path)] = hashed.digest.hexdigest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._fs.rename(path, new_path)
        self._checksums[os.path.basename(new_path)] = self._checksums.pop(os.path.basename(path))


class ChecksumStream:
    """An output stream, written from front to back, and the digest of its bytes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._stream.write(data)


def format_checksums(checksums: Mapping[str, str]) -> str:
    """Returns the content of ``SHA256SUMS``."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(checksums.items()))


def parse_checksums(text: str) -> dict[str, str]:
    """Returns file name -> digest.

    Raises:
        ValueError: the text is not a list of checksums.
    """
    checksums = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        checksums[name] = digest
    if not checksums or format_checksums(checksums) != text:
        raise ValueError(f"{CHECKSUM_FILE} is not a list of checksums")
    return checksums
