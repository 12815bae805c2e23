"""The cache folder: expensive files are built once, by one process, and appear only when they are complete."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock

from torchladder.disk_errors import naming_path
from torchladder.registry import ConfigError

DEFAULT_FOLDER = "~/.cache/torchladder"


def cache_path(folder: str = DEFAULT_FOLDER) -> Path:
    """Returns the cache folder of a setting; the default follows ``XDG_CACHE_HOME`` if that is set."""
    base = os.environ.get("XDG_CACHE_HOME")
    if folder == DEFAULT_FOLDER and base:
        return Path(base) / "torchladder"
    return Path(folder).expanduser()


def build_once(target: Path, build: Callable[[Path], object]) -> Path:
    """Returns ``target``, a file or folder that ``build(path)`` creates if it does not exist.

    Safe for any number of concurrent processes, including ranks: one builds under an exclusive lock, the others wait
    for it. The target is built under another name and renamed when complete, so it is never partial.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{target}.lock", "w")  # noqa: SIM115 - entered on the next line, outside of this except
    except OSError as error:
        raise ConfigError(f"the cache folder {target.parent} cannot be written: {error}.") from error
    with lock:
        filelock.lock_descriptor(lock.fileno())  # released when the file closes, even if the process dies
        if not target.exists():
            partial = target.with_name(f"{target.name}.partial")
            _remove(partial)  # left by a killed build; under the lock no other process uses it
            try:
                with naming_path(target.parent):
                    build(partial)
                os.replace(partial, target)
            finally:
                _remove(partial)
    return target


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files_key(files: Iterable[Path], *settings: object) -> str:
    """Returns a cache key of settings and of the paths, sizes and modification times of files."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((*settings, stats)).encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    """Returns the hash of a file's content; ``hashlib.file_digest`` needs Python 3.11."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
