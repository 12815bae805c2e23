"""Raw text by name: where documents come from before they are tokens.

A source is a registered part; its parameters are settings of one entry of ``data.sources``. ``python-stdlib`` needs no
download at all: it is the standard library of the running interpreter.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torchladder.data.disk_cache import sha256
from torchladder.data.text import file_formats
from torchladder.data.text.document_reader import DocumentReader, OnError
from torchladder.data.text.file_formats import FileSlice
from torchladder.registry import ConfigError, Registry

logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """One text.

    Attributes:
        identity: what the document is called within its source, the same on every machine; the split hashes it.
        text: its text, never empty.
        size: bytes of the source it took, for the progress.
    """

    identity: str
    text: str
    size: int


class TextSource(Protocol):
    """Documents in an order that never changes.

    Attributes:
        name: what errors and the report call it.
    """

    @property
    def name(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...

    def size(self) -> int:
        """Returns the bytes that ``documents`` reads."""
        ...

    def stamp(self) -> str:
        """Returns what is cheap to know of the content (names, sizes, times): it changes whenever the content does."""
        ...

    def fingerprint(self) -> str:
        """Returns a hash of the content itself, the same wherever and whenever the files were written."""
        ...


registry: Registry[TextSource] = Registry("data source")
register = registry.register


def held_out(identity: str, fraction: float) -> bool:
    """Tells whether a document belongs to validation; a larger fraction only adds documents."""
    digest = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclass(frozen=True)
class TextFiles:
    """Documents read from files, each file known by a name that does not depend on where the files lie.

    Attributes:
        name: what errors and the report call the source.
        files: each file's name within the source and its path, in reading order.
        text_key: the key of the text in a line of a ``.jsonl``, or its column in a table.
        on_error: what a document that cannot be read does.
        report: whether to say how many could not.
    """

    name: str
    files: tuple[tuple[str, Path], ...]
    text_key: str = "text"
    on_error: OnError = "error"
    report: bool = True

    def documents(self) -> Iterator[Document]:
        reader, done = DocumentReader(self.text_key, self.on_error), 0
        for name, path in self.files:
            for number, text in reader.read(FileSlice(path, 0, None, path.stat().st_size)):
                yield Document(name if number is None else f"{name}:{number}", text, reader.size - done)
                done = reader.size
        for line in summary(reader.skipped, reader.examples) if self.report else []:
            logger.warning("%s: %s", self.name, line)

    def size(self) -> int:
        return sum(path.stat().st_size for _, path in self.files)

    def stamp(self) -> str:
        listing = []
        for name, path in self.files:
            stat = path.stat()
            listing.append((name, os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(repr((self.text_key, self.on_error, listing)).encode()).hexdigest()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.text_key, self.on_error)).encode())
        for name, path in self.files:
            digest.update(repr((name, sha256(path))).encode())
        return digest.hexdigest()


@register("python-stdlib")
def python_stdlib() -> TextSource:
    """The running interpreter's standard library, a document per ``.py`` file: about 1,800 documents, 31 MB."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in ("site-packages", "dist-packages", "__pycache__")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = tuple(sorted((path.relative_to(root).as_posix(), path) for path in found))
    if not files:
        raise ConfigError(f"python-stdlib: this interpreter keeps no .py files in {root}.")
    # Some files of its tests are of other encodings, and many mark an empty package.
    return TextFiles("python-stdlib", files, on_error="repair", report=False)


@register("text")
def text(path: str | list[str], text_key: str = "text", on_error: OnError = "error") -> TextSource:
    """Text files: each .txt, .py and .md is a document, each line of a .jsonl, each row of a .csv and .parquet.

    All of them may be compressed, as .gz, .zst or .bz2.

    Args:
        path: a file, a folder (searched to the bottom), a glob such as ``notes/**/*.md``, or a list of those.
        text_key: the key of the text in a line of a .jsonl, or its column in a table.
        on_error: what a document that cannot be read does: error, skip, or repair.

    Raises:
        ConfigError: nothing matches, or no match is of a kind that can be read.
    """
    patterns = as_list(path)
    if not patterns or not all(patterns):
        raise ConfigError("the source text needs a path: a file, a folder, a glob, or a list of those.")
    files = tuple(file for pattern in patterns for file in expand(pattern))
    return TextFiles(", ".join(patterns), files, text_key, on_error)


def as_list(path: str | list[str]) -> list[str]:
    """Returns the paths or globs of a ``path`` setting."""
    return [path] if isinstance(path, str) else list(path)


def matches(pattern: str) -> list[Path]:
    """Returns the files and folders a path or glob names, sorted.

    Raises:
        ConfigError: there are none.
    """
    full = os.path.expanduser(pattern)
    found = [full] if os.path.exists(full) else glob.glob(full, recursive=True)
    if not found:
        raise ConfigError(f"no file matches {pattern!r} (looked from {os.getcwd()}).")
    return [Path(path) for path in sorted(found)]


def expand(pattern: str) -> list[tuple[str, Path]]:
    """Lists the text files of one pattern, each by its path below the part of the pattern that is not a glob.

    Raises:
        ConfigError: there are none.
    """
    found = matches(pattern)
    inside = [child for path in found for child in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = dict.fromkeys(path for path in inside if path.is_file() and file_formats.known(path))
    if not files:
        raise ConfigError(f"{pattern!r} names no text file. Known: {file_formats.names()}; tokens are named as *.bin.")
    root = _root(os.path.expanduser(pattern))
    return [(path.relative_to(root).as_posix(), path) for path in files]


def summary(skipped: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """Returns a line for each reason why documents were left out or repaired."""
    return [f"{count:,} documents {reason}, first {examples[reason]}" for reason, count in sorted(skipped.items())]


def _root(pattern: str) -> Path:
    """Returns the deepest folder that every match of the pattern lies in."""
    if os.path.isdir(pattern):
        return Path(pattern)
    folder = Path(pattern).parent
    while glob.has_magic(str(folder)) and not folder.exists():
        folder = folder.parent
    return folder
