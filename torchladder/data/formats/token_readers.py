"""Tokens on disk by name: what reads a format registers itself and gives documents to slice.

A reader is a registered part. Its parameters are settings of one entry of ``data.sources``; ``path`` names its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from torchladder.data.formats.indexed import IndexedTokens, prefix_of
from torchladder.data.text import sources
from torchladder.registry import ConfigError, Registry


class TokenSlices(Protocol):
    """Tokens back to back, read by slices."""

    def __getitem__(self, places: slice) -> np.ndarray: ...


class Shard(Protocol):
    """Documents of some files.

    Attributes:
        lengths: (documents,) tokens in each document.
        starts: (documents,) int64, where each document begins in ``flat``.
        flat: the tokens; one below 0 is token ``~t`` that nobody is to predict.
        fingerprint: a hash of the content.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def starts(self) -> np.ndarray: ...

    @property
    def flat(self) -> TokenSlices: ...

    @property
    def fingerprint(self) -> str: ...


registry: Registry[Sequence[Shard]] = Registry(
    "token reader",
    runtime_args={
        "files": "the files that the source's path names, without those excluded",
        "eos": "the token that ends a document, None where no tokenizer says so",
        "cache": "folder for what is made once",
    },
)
register = registry.register

SUFFIXES: dict[str, tuple[str, ...]] = {
    "indexed": (".bin", ".idx"),
    "litpkds": (".bin",),
    "parquet": (".parquet",),
}
"""The files that a reader takes; one that is not listed takes all."""


def find(kind: str, path: str | list[str]) -> list[Path]:
    """Returns the files of a source for a reader, each glob in sorted order, a folder searched to the bottom.

    Raises:
        ConfigError: nothing matches, or no match is a file of that kind.
    """
    found: dict[Path, None] = {}
    for pattern in sources.as_list(path):
        inside = [
            file
            for match in sources.matches(pattern)
            for file in (sorted(match.rglob("*")) if match.is_dir() else [match])
            if file.is_file() and file.suffix in SUFFIXES.get(kind, (file.suffix,))
        ]
        if not inside:
            raise ConfigError(f"{pattern!r} names no tokens. Known: {', '.join(SUFFIXES.get(kind, ()))}.")
        found |= dict.fromkeys(inside)
    return list(found)


@register("indexed")
def indexed(files: list[Path]) -> list[IndexedTokens]:
    """Megatron ``.bin``/``.idx`` pairs, each named by either of its files."""
    return [IndexedTokens(prefix) for prefix in dict.fromkeys(map(prefix_of, files))]
