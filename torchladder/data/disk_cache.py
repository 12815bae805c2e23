"""The cache folder: what is costly to make is made once, by one process, and is whole whenever it is there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torchladder.registry import ConfigError

DEFAULT = "~/.cache/torchladder"


def cache_path(folder: str = DEFAULT) -> Path:
    """Returns the cache folder of a setting; the default one follows ``XDG_CACHE_HOME`` where that is set."""
    base = os.environ.get("XDG_CACHE_HOME")
    if folder == DEFAULT and base:
        return Path(base) / "torchladder"
    return Path(folder).expanduser()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Returns ``target``, a file or folder that ``build(path)`` makes when it is not there yet.

    Safe for any number of processes at once, ranks included: one builds under an exclusive lock, the others wait and
    find it done. It is built under another name and renamed when complete, so an interrupted build leaves nothing that
    could be taken for a result.

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
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
        if not target.exists():
            partial = target.with_name(f"{target.name}.partial")
            _remove(partial)  # of a build that was killed: whoever holds the lock is alone here
            try:
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


def sha256(path: Path) -> str:
    """Returns the hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
