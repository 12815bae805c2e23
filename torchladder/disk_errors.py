"""Errors that a user of the file system must solve: a full or read-only disk, a quota, missing permissions.

A command or a run that such an error ends prints one line with the path and the free space.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

DISK_FULL = "the disk is full"

_REASONS = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than the limit on file sizes (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EEXIST: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def find_disk_error(error: BaseException | None) -> OSError | None:
    """Returns the disk error that an error is, or that PyTorch or a library in Rust has replaced, or None."""
    if isinstance(error, OSError):
        return error if error.errno in _REASONS else None
    if failures := getattr(error, "failures", None):  # of DCP's CheckpointException: rank -> (error, traceback)
        return find_disk_error(next(iter(failures.values()))[0])
    if isinstance(error, RuntimeError):
        if found := find_disk_error(error.__cause__ or error.__context__):
            return found
        if "unexpected pos" in str(error):  # PyTorch's zip writer: the last bytes were not written
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    printed = re.search(r"\(os error (\d+)\)", str(error))
    return find_disk_error(OSError(int(printed[1]), os.strerror(int(printed[1])))) if printed else None


def describe_disk_error(error: OSError) -> str:
    """Returns ``"<path>: the disk is full (4,096 bytes free, 1,048,576 bytes written)"``."""
    reason = _REASONS[error.errno or 0]
    if error.filename is None:
        return reason
    path = Path(os.fsdecode(error.filename))
    if error.errno not in _FULL:
        return f"{path}: {reason}"
    return f"{path}: {reason} ({getattr(error, 'space', None) or _space(path)})"


def _space(path: Path) -> str:
    folder = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    free = f"{shutil.disk_usage(folder).free:,} bytes free"
    return f"{free}, {path.stat().st_size:,} bytes written" if path.is_file() else free


@contextmanager
def naming_path(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises a disk error of the body, or the one behind another error, with ``path`` unless it names another."""
    try:
        yield
    except BaseException as error:  # DCP's is no Exception
        disk_error = find_disk_error(error)
        if disk_error is None:
            raise
        if disk_error.filename is None:
            disk_error.filename = os.fspath(path)
            disk_error.space = _space(Path(path))  # type: ignore[attr-defined] # now: a partial file may be deleted
        if disk_error is error:
            raise
        raise disk_error from error


@contextmanager
def tolerating(path: str | os.PathLike[str], warned: set[str] | None = None) -> Iterator[None]:
    """Turns a disk error of the body into a warning, for files that a run can do without.

    Args:
        path: the file, or what to call it.
        warned: what has been warned of already, which is not repeated.
    """
    try:
        with naming_path(path):
            yield
    except OSError as error:
        if find_disk_error(error) is None:
            raise
        if warned is None or str(path) not in warned:
            logger.warning("%s; the run continues without it", describe_disk_error(error))
        if warned is not None:
            warned.add(str(path))
