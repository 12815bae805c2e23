"""Documents of one source as tokens, wherever they come from: pairs on disk, or raw text tokenized into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchladder.data import sources
from torchladder.data.base import Tokenizer
from torchladder.data.indexed import Indexed, prefix_of
from torchladder.data.packing import Spans
from torchladder.data.prepare import prepare
from torchladder.registry import ConfigError, unknown

INDEXED = "indexed"
"""The name of a source that is tokens already; every other name is a raw text source of ``sources.registry``."""


@dataclass(frozen=True)
class SourceConfig:
    """One entry of ``data.sources``."""

    name: str = ""
    """What it is: indexed (.bin/.idx), text, python-stdlib, or a plugin's. Empty: told from the path."""
    path: str | list[str] = ""
    """A file, folder or glob, or a list of those. Several .bin files are one source, each glob in sorted order."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl."""

    def kind(self) -> str:
        """Returns the name, told from the path where it is empty.

        Raises:
            ConfigError: nothing has that name, name and path are both empty, or the source takes no such setting.
        """
        if not self.name and not self.path:
            raise ConfigError('a source needs a path, or a name such as "python-stdlib".')
        tokens = all(path.endswith((".bin", ".idx")) for path in sources.as_list(self.path))
        kind = self.name or (INDEXED if tokens else "text")
        if kind != INDEXED and kind not in sources.registry.names():
            raise unknown("data source", kind, [*sources.registry.names(), INDEXED])
        takes = {"path"} if kind == INDEXED else set(sources.registry.parameters(kind))
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name not in {"name", "weight", *takes} and value != setting.default:
                raise ConfigError(f"the source {kind} takes no {setting.name}, but it is set to {value!r}.")
        return kind

    def raw(self) -> sources.Source:
        """Returns the raw documents of a source that is not indexed."""
        parameters = sources.registry.parameters(self.kind())
        return sources.registry.get(self.kind())(**{key: getattr(self, key) for key in parameters})

    def check(self) -> None:
        """Looks for the source's files without reading them.

        Raises:
            ConfigError: as ``kind``, or no file is found.
        """
        if self.kind() == INDEXED:
            _prefixes(self.path)
        else:
            self.raw()

    def label(self) -> str:
        return " ".join(filter(None, (self.name, *sources.as_list(self.path))))


class Corpus:
    """Documents of one or several pairs, one after the other.

    Args:
        label: what errors and the report call it.
        pairs: in order.
        vocab_size: every token is below it; None where no tokenizer says so.

    Attributes:
        lengths: (documents,) int64, tokens in each document.
        tokens: tokens in all documents.
    """

    def __init__(self, label: str, pairs: Sequence[Indexed], vocab_size: int | None = None) -> None:
        self.label = label
        self.pairs = list(pairs)
        self.vocab_size = vocab_size
        self.lengths = np.concatenate([pair.lengths for pair in pairs])
        self.tokens = int(self.lengths.sum())
        self._starts = np.concatenate([pair.starts for pair in pairs])
        self._ends = np.cumsum([len(pair) for pair in pairs])  # documents up to and with each pair

    def read(self, spans: Spans) -> np.ndarray:
        """Returns the tokens of the spans, one after the other, as int64.

        Raises:
            ConfigError: a token is outside the vocabulary.
        """
        starts = self._starts[spans.documents]
        begins, ends = (starts + spans.begins).tolist(), (starts + spans.ends).tolist()
        pairs = np.searchsorted(self._ends, spans.documents, side="right").tolist()
        pieces = [self.pairs[pair].flat[begin:end] for pair, begin, end in zip(pairs, begins, ends, strict=True)]
        tokens = np.concatenate(pieces, dtype=np.int64)
        if self.vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            bad = tokens.max() if tokens.min() >= 0 else tokens.min()
            raise ConfigError(
                f"{self.label} holds token {bad}, the tokenizer's vocabulary has {self.vocab_size}: "
                "it was written with another tokenizer."
            )
        return tokens

    def fingerprint(self) -> str:
        """Returns a hash of the content; what it promises is in ``Indexed.fingerprint``."""
        return hashlib.sha256(" ".join(pair.fingerprint for pair in self.pairs).encode()).hexdigest()


@dataclass(frozen=True)
class Opener:
    """Opens sources as tokens, tokenizing raw text into the cache on first use.

    Attributes:
        tokenizer: None where every source is indexed already.
        cache: the cache folder.
        validation_fraction: share of the documents of raw text that is held out.
        bos: whether raw documents begin with the tokenizer's bos.
    """

    tokenizer: Tokenizer | None
    cache: Path
    validation_fraction: float
    bos: bool

    def open(self, source: SourceConfig, split: Literal["train", "validation"]) -> Corpus:
        """Returns the documents of one split of a source; all of an indexed source are for training.

        Raises:
            ConfigError: a file is missing or damaged, or raw text has no tokenizer.
        """
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else None
        if source.kind() == INDEXED:
            return Corpus(source.label(), [Indexed(prefix) for prefix in _prefixes(source.path)], vocab_size)
        if self.tokenizer is None:
            raise ConfigError(f"the source {source.label()} is raw text: it needs a tokenizer.")
        prepared = prepare(source.raw(), self.tokenizer, self.cache, self.validation_fraction, self.bos)
        return Corpus(source.label(), [Indexed(getattr(prepared, split))], vocab_size)


def training_texts(section: Any) -> Iterator[str]:
    """Yields the raw texts that a ``[data]`` section trains on, without those held out: a tokenizer learns from them.

    Args:
        section: the settings of the loader ``rows``, or of another one whose ``sources`` is a list of ``SourceConfig``.

    Raises:
        ConfigError: no source is raw text.
    """
    raw = [source for source in getattr(section, "sources", []) if source.kind() != INDEXED]
    if not raw:
        raise ConfigError("no source is raw text, so no tokenizer can be trained on it: give tokenizer.path.")
    held = 0.0 if getattr(section, "validation_sources", []) else getattr(section, "validation_fraction", 0.0)
    for source in raw:
        for document in source.raw().documents():
            if not sources.held_out(document.identity, held):
                yield document.text


def _prefixes(path: str | list[str]) -> list[str]:
    """Lists the pairs that paths and globs name by their .bin or .idx, each once."""
    prefixes: dict[str, None] = {}
    for pattern in sources.as_list(path):
        found = [str(match) for match in sources.matches(pattern) if match.suffix in (".bin", ".idx")]
        if not found:
            raise ConfigError(f"{pattern!r} names no tokens. Known: .bin and .idx, as in 'folder/*.bin'.")
        prefixes |= dict.fromkeys(map(prefix_of, found))
    return list(prefixes)
