"""Data sources by name: the place to add a kind of data source.

A text source yields documents, which are tokenized into the cache on first use. A token source returns documents that
are tokens already. Either is a function or a dataclass, and its parameters are the keys of an entry of
``data.sources``: checked in files and on the command line, shown by ``--help``, written to ``config.toml``::

    @sources.register_text("poems")
    def poems(author: str, min_lines: int = 4) -> sources.TextSource: ...

    @sources.register_tokens("my_format", suffixes=(".tok",))
    def my_format(files: list[Path], column: str = "ids") -> list[sources.TokenShard]: ...
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from torchladder.data.file_patterns import match_files
from torchladder.registry import Component, ConfigError, Registry, require


class Document(NamedTuple):
    """One text.

    Attributes:
        identity: name of the document within its source, the same on every machine; the validation split hashes it.
        text: its text, never empty.
        size: bytes of the source that it took, for the progress.
    """

    identity: str
    text: str
    size: int


class TextSource(Protocol):
    """Documents of text in an order that never changes.

    Attributes:
        name: what errors and the report call it.
    """

    @property
    def name(self) -> str: ...

    def documents(self) -> Iterator[Document]:
        """Yields every document, in the same order each time."""
        ...

    def size(self) -> int:
        """Returns the bytes that ``documents`` reads."""
        ...

    def stamp(self) -> str:
        """Returns a hash of what is cheap to know (names, sizes, times); it changes whenever the content does."""
        ...

    def fingerprint(self) -> str:
        """Returns a hash of the content, the same wherever and whenever the files were written."""
        ...


class TokenShard(Protocol):
    """Documents of tokens.

    Attributes:
        lengths: (documents,) tokens in each document.
        offsets: (documents,) int64, where each document begins in ``flat``.
        flat: the tokens back to back, read by slices. If the source is registered with ``unlabeled``, tokens without a
            label are stored as in ``unlabeled_tokens``.
        fingerprint: a hash of the content.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def offsets(self) -> np.ndarray: ...

    @property
    def flat(self) -> Any: ...

    @property
    def fingerprint(self) -> str: ...


class TokenFormat(NamedTuple):
    """How files of a token source are recognized: by suffix (empty: any) and, if that is ambiguous, by content."""

    suffixes: tuple[str, ...]
    recognize: Callable[[Path], bool] | None
    unlabeled: bool


registry: Registry[Any] = Registry(
    "data source",
    runtime_args={
        "files": "the files that the key path names, without excluded ones",
        "eos": "the token that ends a document, None without a tokenizer",
        "cache": "folder for files that are built once",
        "part": "train or validation, for a source that holds out documents",
    },
)
register_text = registry.register
"""``register_text(name)`` decorates what returns a ``TextSource``."""
token_formats: dict[str, TokenFormat] = {}
"""The sources of tokens; all others are text."""


def register_tokens(
    name: str,
    suffixes: tuple[str, ...] = (),
    recognize: Callable[[Path], bool] | None = None,
    unlabeled: bool = False,
) -> Callable[[Component], Component]:
    """Returns a decorator for what returns a sequence of ``TokenShard``.

    The parameters ``files``, ``eos``, ``cache`` and ``part`` are runtime arguments; a source with ``files`` has the key
    ``path``.

    Args:
        name: of the source.
        suffixes: of its files. A folder is searched for them, and a path with one needs no name.
        recognize: whether a file with such a suffix is of this format, if several formats share the suffix.
        unlabeled: whether its tokens may lack a label, as in ``unlabeled_tokens``; otherwise one below 0 is an error.
    """

    def add(component: Component) -> Component:
        registry.register(name)(component)
        token_formats[name] = TokenFormat(suffixes, recognize, unlabeled)
        return component

    return add


def detect_source(paths: Sequence[str]) -> str:
    """Returns the source that reads the paths, by suffix and content; by suffix alone if there is no such file yet."""
    paths = [token_path(path) for path in paths]
    fitting = {
        name: known
        for name, known in token_formats.items()
        if paths and known.suffixes and all(_names_tokens(path, known.suffixes) for path in paths)
    }
    for name, (suffixes, recognize, _) in fitting.items():
        try:
            found = match_files(paths[:1], lambda file: file.is_file(), "file") if recognize else []
        except ConfigError:
            found = []
        first = next((file for file in found if file.suffix.lower() in suffixes), None)
        if first and recognize and recognize(first):
            return name
    return next((name for name, known in fitting.items() if known.recognize is None), "text")


def token_path(path: str) -> str:
    """Returns the token file of a prefix, as ``prepare --output`` has it; every other path is returned as it is."""
    if glob.has_magic(path) or Path(path).expanduser().exists():
        return path
    suffixes = [suffix for known in token_formats.values() for suffix in known.suffixes]
    return next((path + suffix for suffix in suffixes if Path(path + suffix).expanduser().is_file()), path)


def _names_tokens(path: str, suffixes: tuple[str, ...]) -> bool:
    """Returns whether a path ends with a suffix of tokens, or is a folder of such files and their metadata alone."""
    if path.lower().endswith(suffixes):
        return True
    folder = Path(path).expanduser()
    found = {file.suffix.lower() for file in folder.rglob("*") if file.is_file()} if folder.is_dir() else set()
    return bool(found.intersection(suffixes)) and found <= {*suffixes, ".json"}


def check_validation_fraction(fraction: float) -> None:
    """Raises ``ConfigError`` unless the fraction is in [0, 1)."""
    require(0 <= fraction < 1, f"data.validation_fraction = {fraction}: must be 0 or more and below 1.")


def held_out(identity: str, fraction: float) -> bool:
    """Returns whether a document belongs to validation; a larger fraction only adds documents."""
    digest = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
