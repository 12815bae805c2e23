"""Paths, folders and globs to files: the one rule for what every source, command and validation reads.

Each real file is read once, under the first name that reaches it. Folders are searched recursively and through
symbolic links; hidden files and folders below them are not read. What is passed over is counted and logged.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from torchladder.registry import ConfigError, require

logger = logging.getLogger(__name__)


class MissingFilesError(ConfigError):
    """No file has the name, or matches the glob, of a setting."""


def as_list(path: Any) -> list[Any]:
    """Returns the patterns of a ``path`` setting, which is one or a list of them."""
    return list(path) if isinstance(path, list | tuple) else [path]


def match_paths(pattern: str) -> list[Path]:
    """Returns the files and folders that a path or glob names, sorted; raises ConfigError if there are none."""
    full = os.path.expanduser(pattern)
    found = {full} if os.path.exists(full) else set(_glob(full))
    if not found:
        raise MissingFilesError(f"no file matches {pattern!r} (relative to {os.getcwd()}).")
    return [Path(path) for path in sorted(found)]


def match_files(patterns: Sequence[str], accept: Callable[[Path], bool], kind: str) -> dict[Path, str]:
    """Returns the files that paths, folders and globs name, each real file once; those of each pattern are sorted.

    Args:
        patterns: paths, folders and globs.
        accept: which files to return; the others are passed over if a folder or a glob has found them.
        kind: what these are, for the ConfigError if a pattern has none: ``"text file. Known: .txt"``.

    Returns:
        File -> its name within the folder that its pattern searches.
    """
    files: dict[Path, str] = {}
    passed_over: dict[Path, str] = {}
    taken: set[str] = set()
    real_folder = cache(os.path.realpath)
    for pattern in patterns:
        explicit, root = os.path.isfile(os.path.expanduser(pattern)), root_of(pattern)
        matches = (file for path in match_paths(pattern) for file in _files_of(path, passed_over))
        found = dict.fromkeys(file for file in matches if explicit or not _is_metadata(file))
        accepted = [file for file in found if accept(file)]
        require(bool(accepted), f"{pattern!r} matches no {kind}.")
        passed_over |= {file: file.suffix.lower() or "without suffix" for file in found if not accept(file)}
        for file in accepted:
            real = os.path.join(real_folder(file.parent), file.name)
            real = os.path.realpath(file) if os.path.islink(file) else real
            if real in taken:
                passed_over[file] = "named again"
            else:
                taken.add(real)
                files[file] = file.relative_to(root).as_posix()
    kinds = Counter(passed_over.values())
    if kinds:
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(kinds.items()))
        warn_once(f"{', '.join(patterns)}: {len(files):,} files are read; passed over: {counts}")
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


def _files_of(path: Path, passed_over: dict[Path, str]) -> list[Path]:
    """Returns a file, or the files of a folder, sorted; adds what is hidden, and links that lead nowhere."""
    paths = [path]
    if path.is_dir():
        inside = [Path(folder, name) for folder, inner, names in _walk(str(path), set()) for name in (*inner, *names)]
        paths = [one for one in inside if not _is_hidden(one.name) and not one.is_dir()]
        passed_over |= {one: "hidden" for one in inside if _is_hidden(one.name)}
    passed_over |= {one: "broken links" for one in paths if not one.exists()}
    return sorted(one for one in paths if one.is_file())


def _walk(top: str, seen: set[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields (folder, its folders, its files) as ``os.walk``, but also follows links, and each real folder once.

    Links are followed last: a link that is added renames no file. Hidden folders are listed and not entered.

    Raises:
        ConfigError: a folder cannot be read.
    """
    links = []
    for folder, folders, names in os.walk(top, onerror=_refuse):
        real = os.path.realpath(folder)
        shown = [name for name in folders if not _is_hidden(name)]
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield folder, folders, names
        links += [link for name in shown if os.path.islink(link := os.path.join(folder, name))]
        folders[:] = sorted(shown)
    for link in sorted(links):
        yield from _walk(link, seen)


def _glob(pattern: str) -> Iterator[str]:
    """Yields the matches of a glob; its ``**`` enters each real folder once, where ``glob.glob`` loops over links."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    at = parts.index("**")
    for top in glob.glob("/".join(parts[:at]) or ("/" if at else ".")):
        if at + 1 == len(parts):
            yield top
            continue
        for folder, _, _ in _walk(top, set()):
            yield from _glob(os.path.join(glob.escape(folder), *parts[at + 1 :]))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.endswith(".parts")  # the working folder of an interrupted prepare


def _is_metadata(file: Path) -> bool:
    """Returns whether a file is the ``.json`` beside a ``.bin`` of tokens."""
    return file.suffix == ".json" and file.with_suffix(".bin").exists()


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError(f"{error.filename} cannot be read: {error.strerror}.")


@cache
def warn_once(message: str) -> None:
    """Logs a warning, unless this process has logged it before: files are looked for several times in a run."""
    logger.warning("%s", message)
