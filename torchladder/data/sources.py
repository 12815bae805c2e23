"""Raw text by name: where documents come from before they are tokens.

A source is a registered part; its parameters are settings of one entry of ``data.sources``. ``python-stdlib`` needs no
download at all: it is the standard library of the running interpreter.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torchladder.registry import ConfigError, Registry, unknown

WHOLE_FILES = (".txt", ".py", ".md")
"""Files that are one document each; a ``.jsonl`` is one document a line."""
ALLOWED = (*WHOLE_FILES, ".jsonl")


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


class Source(Protocol):
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


registry: Registry[Source] = Registry("data source")
register = registry.register


def held_out(identity: str, fraction: float) -> bool:
    """Tells whether a document belongs to validation; a larger fraction only adds documents."""
    digest = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclass(frozen=True)
class Files:
    """Documents read from files, each file known by a name that does not depend on where the files lie.

    Attributes:
        name: what errors and the report call the source.
        files: each file's name within the source and its path, in reading order.
        text_key: the key of the text in a line of a ``.jsonl``.
    """

    name: str
    files: tuple[tuple[str, Path], ...]
    text_key: str = "text"

    def documents(self) -> Iterator[Document]:
        for name, path in self.files:
            if path.suffix == ".jsonl":
                yield from self._lines(name, path)
            else:
                raw = path.read_bytes()
                text = raw.decode("utf-8-sig", errors="ignore")
                if text:
                    yield Document(name, text, len(raw))

    def size(self) -> int:
        return sum(path.stat().st_size for _, path in self.files)

    def stamp(self) -> str:
        listing = []
        for name, path in self.files:
            stat = path.stat()
            listing.append((name, os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(repr((self.text_key, listing)).encode()).hexdigest()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.text_key.encode())
        for name, path in self.files:
            digest.update(repr((name, _hash(path))).encode())
        return digest.hexdigest()

    def _lines(self, name: str, path: Path) -> Iterator[Document]:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.isspace():
                    continue
                text = self._text(raw.decode("utf-8-sig", errors="ignore"), f"{path}:{number}")
                if text:
                    yield Document(f"{name}:{number}", text, len(raw))

    def _text(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is not JSON ({error}); a .jsonl holds one object a line.") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{where} holds a {type(record).__name__}; a .jsonl holds one object a line.")
        if self.text_key not in record:
            raise ConfigError(f"{where}: text_key: {unknown('key', self.text_key, record)}")
        text = record[self.text_key]
        if not isinstance(text, str):
            raise ConfigError(f"{where}: {self.text_key!r} holds a {type(text).__name__}, not a string.")
        # JSON can spell half a surrogate pair, which no encoding of text can carry.
        return text.encode("utf-8", errors="ignore").decode()


@register("python-stdlib")
def python_stdlib() -> Source:
    """The running interpreter's standard library, a document per ``.py`` file: about 1,800 documents, 31 MB."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in ("site-packages", "dist-packages", "__pycache__")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = tuple(sorted((path.relative_to(root).as_posix(), path) for path in found))
    if not files:
        raise ConfigError(f"python-stdlib: this interpreter keeps no .py files in {root}.")
    return Files("python-stdlib", files)


@register("text")
def text(path: str | list[str], text_key: str = "text") -> Source:
    """Text files: each .txt, .py and .md is one document, each line of a .jsonl is one.

    Args:
        path: a file, a folder (searched to the bottom), a glob such as ``notes/**/*.md``, or a list of those.
        text_key: the key of the text in a line of a .jsonl.

    Raises:
        ConfigError: nothing matches, or a file is of another kind.
    """
    patterns = as_list(path)
    if not patterns or not all(patterns):
        raise ConfigError("the source text needs a path: a file, a folder, a glob, or a list of those.")
    files = tuple(file for pattern in patterns for file in _expand(pattern))
    return Files(", ".join(patterns), files, text_key)


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


def _expand(pattern: str) -> list[tuple[str, Path]]:
    """Lists the text files of one pattern, each by its path below the part of the pattern that is not a glob."""
    found = matches(pattern)
    inside = [child for path in found for child in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = dict.fromkeys(path for path in inside if path.is_file() and path.suffix in ALLOWED)
    if not files:
        kinds = ", ".join(ALLOWED)
        raise ConfigError(f"{pattern!r} names no text file. Known: {kinds}; tokens on disk are named as *.bin.")
    root = _root(os.path.expanduser(pattern))
    return [(path.relative_to(root).as_posix(), path) for path in files]


def _root(pattern: str) -> Path:
    """Returns the deepest folder that every match of the pattern lies in."""
    if os.path.isdir(pattern):
        return Path(pattern)
    folder = Path(pattern).parent
    while glob.has_magic(str(folder)) and not folder.exists():
        folder = folder.parent
    return folder


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
