"""Where checkpoints are kept: the local file system, or an object store behind a URL.

A storage is a DCP file system (``FileSystemBase``: what DCP's reader and writer call) that also knows when a checkpoint
is complete. The scheme of ``checkpoint.folder`` chooses it: a path without a scheme is on the local file system, a
scheme that a plugin has registered belongs to the plugin, and fsspec opens any other URL::

    @storage.register("mycloud")  # checkpoint.folder = "mycloud://bucket/run"
    class MyCloudStorage(storage.CheckpointStorage): ...
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from abc import abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFileSystem
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase

from torchladder.checkpoint.checksums import CHECKSUM_FILE, ChecksumWriter
from torchladder.registry import ConfigError, Registry

READ_CHUNK_BYTES = 1 << 22  # 4 MiB


class CheckpointStorage(FileSystemBase):
    """Storage of checkpoints ``<folder>/step-N``; all paths are whole local paths or URLs.

    A subclass implements DCP's methods, ``list_names`` and ``rm_tree``. The other methods suit an object store, which
    cannot rename a folder: a checkpoint is written in place and is complete once ``SHA256SUMS``, its last file, exists.

    Args:
        url: any path on the storage.
    """

    def __init__(self, url: str) -> None: ...

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str | os.PathLike[str]:
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    @abstractmethod
    def list_names(self, folder: str) -> list[str]:
        """Returns the names in a folder; none if there is no such folder."""

    @abstractmethod
    def rm_tree(self, path: str) -> None:
        """Deletes a folder and its files, if it exists."""

    def read(self, path: str) -> bytes:
        with self.create_stream(path, "rb") as stream:
            return stream.read()

    def write(self, path: str, content: bytes) -> None:
        """Writes a small file, and creates its folder; the file is durable when this returns."""
        self.mkdir(os.path.dirname(path))
        with self.create_stream(path, "wb") as stream:
            stream.write(content)

    def sha256(self, path: str) -> str:
        """Returns the hexadecimal SHA-256 of a file, as read back from the storage."""
        digest = hashlib.sha256()
        with self.create_stream(path, "rb") as stream:
            while chunk := stream.read(READ_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def writer(self, path: str) -> ChecksumWriter:
        """Returns the DCP writer of a checkpoint; its ``checksums`` are known after ``dcp.save``."""
        return ChecksumWriter(self, path)

    def reader(self, path: str) -> FileSystemReader:
        """Returns the DCP reader of a checkpoint."""
        reader = FileSystemReader(path)
        reader.fs, reader.path = self, path  # type: ignore[assignment]
        return reader

    def is_committed(self, path: str) -> bool:
        """Whether the save of this checkpoint has completed."""
        return self.exists(f"{path}/{CHECKSUM_FILE}")

    def steps(self, folder: str) -> list[int]:
        """Returns the steps of all committed checkpoints, in order."""
        matches = (re.fullmatch(r"step-(\d+)", name) for name in self.list_names(folder))
        return sorted(int(match[1]) for match in matches if match and self.is_committed(f"{folder}/{match[0]}"))

    def partial_path(self, path: str) -> str:
        """Returns where the files of a checkpoint are written before ``commit``."""
        return path

    def begin(self, path: str) -> None:
        """Creates the empty partial folder of a checkpoint; deletes the remains of interrupted saves."""
        folder, partial = os.path.dirname(path), self.partial_path(path)
        for name in self.list_names(folder):
            leftover = re.fullmatch(r"step-\d+(\.partial|\.old)?", name) and not self.is_committed(f"{folder}/{name}")
            if leftover:
                with suppress(OSError):
                    self.rm_tree(f"{folder}/{name}")
        self.delete(partial)
        self.mkdir(partial)

    def commit(self, path: str) -> None:
        """Publishes the checkpoint at ``path``; all of its files have been written, ``SHA256SUMS`` last."""

    def delete(self, path: str) -> None:
        """Deletes a checkpoint, ``SHA256SUMS`` first, so that an interrupted deletion does not count as complete."""
        if self.exists(f"{path}/{CHECKSUM_FILE}"):
            self.rm_file(f"{path}/{CHECKSUM_FILE}")
        self.rm_tree(path)


registry: Registry[CheckpointStorage] = Registry("checkpoint storage")
register = registry.register


def get_storage(path: str | Path) -> CheckpointStorage:
    """Returns the storage of a local path or a URL.

    Raises:
        ConfigError: no storage supports the URL, or a URL was given where only local paths are supported.
    """
    if isinstance(path, Path) and re.search(r"(^|/)[a-z][a-z0-9+.-]+:/", str(path)) and not path.exists():
        raise ConfigError(
            f"{path} is a URL: only training reads checkpoints from a URL. Copy the checkpoint to a local folder first."
        )
    scheme, is_url, _ = str(path).partition("://")
    name = "filesystem" if not is_url else scheme if scheme in registry.names() else "fsspec"
    return registry.get(name)(str(path))


@register("filesystem")
class FileSystemStorage(FileSystem, CheckpointStorage):
    """A local or mounted file system: ``step-N.partial`` is synced and read back, then renamed to ``step-N``."""

    def list_names(self, folder: str) -> list[str]:
        return os.listdir(folder) if os.path.isdir(folder) else []

    def rm_tree(self, path: str) -> None:
        if os.path.isdir(path):
            shutil.rmtree(path)

    def write(self, path: str, content: bytes) -> None:
        super().write(path, content)
        _fsync(path)
        _fsync(os.path.dirname(path))

    def sha256(self, path: str) -> str:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # drops the page cache, to read what is on the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return super().sha256(path)

    def is_committed(self, path: str) -> bool:
        return not path.endswith((".partial", ".old"))

    def partial_path(self, path: str) -> str:
        return f"{path}.partial"

    def commit(self, path: str) -> None:
        old = f"{path}.old"
        self.rm_tree(old)
        _fsync(self.partial_path(path))
        if self.exists(path):  # a damaged checkpoint, or one of a run that continued from an earlier step
            os.rename(path, old)
        os.rename(self.partial_path(path), path)
        _fsync(os.path.dirname(path))
        with suppress(OSError):
            self.rm_tree(old)


def _fsync(path: str) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@register("fsspec")
class FsspecStorage(FsspecFileSystem, CheckpointStorage):
    """Any URL that fsspec opens, such as ``s3://`` or ``gs://``.

    Raises:
        ConfigError: the package for this kind of URL is not installed.
    """

    fs: Any

    def __init__(self, url: str) -> None:
        try:
            self.fs, _ = url_to_fs(url, use_listings_cache=False)  # other ranks write, too
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"cannot open {url} with fsspec: {error}. For s3://: pip install s3fs; for gs://: pip install gcsfs."
            ) from error

    def list_names(self, folder: str) -> list[str]:
        try:
            return [os.path.basename(path.rstrip("/")) for path in self.fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []

    def rm_tree(self, path: str) -> None:
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)
