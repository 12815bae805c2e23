"""Paths, folders and globs to files."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from torchladder.registry import ConfigError, require


class MissingFilesError(ConfigError):
    """No file has the name, or matches the glob, of a setting."""


def as_list(path: Any) -> list[Any]:
    """Returns the patterns of a ``path`` setting, which is one or a list of them."""
    return list(path) if isinstance(path, list | tuple) else [path]


def match_paths(pattern: str) -> list[Path]:
    """Returns the files and folders that a path or glob names, sorted; raises ConfigError if there are none."""
    full = os.path.expanduser(pattern)
    found = [full] if os.path.exists(full) else glob.glob(full, recursive=True)
    if not found:
        raise MissingFilesError(f"no file matches {pattern!r} (relative to {os.getcwd()}).")
    return [Path(path) for path in sorted(found)]


def match_files(pattern: str, accept: Callable[[Path], bool], kind: str) -> list[Path]:
    """Returns the files that a path or glob names, each once; folders are searched recursively, in sorted order.

    Args:
        pattern: a path or a glob.
        accept: which files to return.
        kind: what these are, for the ConfigError if there are none: ``"text file. Known: .txt"``.
    """
    paths = chain(*(sorted(path.rglob("*")) if path.is_dir() else [path] for path in match_paths(pattern)))
    files = list(dict.fromkeys(path for path in paths if path.is_file() and accept(path)))
    require(bool(files), f"{pattern!r} matches no {kind}.")
    return files


def root_of(pattern: str) -> Path:
    """Returns the deepest folder that contains every match of a pattern."""
    full = Path(pattern).expanduser()
    if full.is_dir():
        return full
    folder = full.parent
    while glob.has_magic(str(folder)) and not folder.exists():
        folder = folder.parent
    return folder
