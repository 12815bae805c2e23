"""Documents of one source as tokens, wherever they come from: tokens on disk, or raw text tokenized into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchladder.data.dataloader import Tokenizer
from torchladder.data.disk_cache import DEFAULT, cache_path
from torchladder.data.formats import litpkds, parquet, token_readers
from torchladder.data.formats.indexed import IndexedTokens
from torchladder.data.formats.token_readers import Shard
from torchladder.data.packing.spans import Spans
from torchladder.data.prepare.cached_tokens import tokenize_cached
from torchladder.data.text import sources
from torchladder.data.text.document_reader import OnError
from torchladder.data.tokenizer import registry as tokenizers
from torchladder.registry import ConfigError, unknown_name

MAX_TOKEN = 1 << 31
"""Tokens are below it: rows hold 32 bits of each."""
COMMON_KEYS = {"name", "label", "weight", "language", "domain", "repeat"}
"""Settings that every source takes."""


@dataclass(frozen=True)
class SourceConfig:
    """One entry of ``data.sources``."""

    name: str = ""
    """What it is: indexed, litpkds, parquet (tokens), text, python-stdlib, or a plugin's. Empty: told from the path."""
    path: str | list[str] = ""
    """A file, folder or glob, or a list of those. All files are one source, each glob in sorted order."""
    label: str = ""
    """What reports and tables of weights call the source; empty: its name and path."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources."""
    language: str = ""
    """Its language, where data.domains, data.languages or data.temperature decide the shares."""
    domain: str = ""
    """Its domain, where data.domains decides the shares."""
    repeat: bool | None = None
    """Begin the source anew when it has been read; left out: as data.repeat says."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl, or its column in a table."""
    on_error: OnError = "error"
    """What a document of raw text that cannot be read does: error, skip, or repair (leave out what is not UTF-8)."""

    @property
    def title(self) -> str:
        """What reports and tables of weights call the source."""
        return self.label or " ".join(filter(None, (self.name, *sources.as_list(self.path))))

    @property
    def is_tokens(self) -> bool:
        """Whether the source is tokens already, and not raw text."""
        return self.kind() in token_readers.registry.names()

    def kind(self) -> str:
        """Returns the name, told from the path and the files where it is empty.

        Raises:
            ConfigError: nothing has that name, name and path are both empty, or the source takes no such setting.
        """
        if not self.name and not self.path:
            raise ConfigError('a source needs a path, or a name such as "python-stdlib".')
        kind = self.name or _told_from(sources.as_list(self.path))
        if kind in token_readers.registry.names():
            takes = {"path", *token_readers.registry.parameters(kind)}
        elif kind in sources.registry.names():
            takes = set(sources.registry.parameters(kind))
        else:
            raise unknown_name("data source", kind, [*sources.registry.names(), *token_readers.registry.names()])
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name not in COMMON_KEYS | takes and value != setting.default:
                raise ConfigError(f"the source {kind} takes no {setting.name}, but it is set to {value!r}.")
        return kind

    def files(self, exclude: Iterable[str] = ()) -> list[Path]:
        """Returns the files of a source of tokens, without those that a pattern names.

        Raises:
            ConfigError: no file is found, or all are excluded.
        """
        found = token_readers.find(self.kind(), self.path)
        kept = [file for file in found if not any(names(pattern, file) for pattern in exclude)]
        if not kept:
            raise ConfigError(f"data.exclude leaves no file of the source {self.title}.")
        return kept

    def raw(self) -> sources.TextSource:
        """Returns the documents of a source that is not tokens yet."""
        parameters = sources.registry.parameters(self.kind())
        return sources.registry.get(self.kind())(**{key: getattr(self, key) for key in parameters})

    def check(self, exclude: Iterable[str] = ()) -> set[str]:
        """Looks for the source's files without reading them; returns the patterns of ``exclude`` that name one.

        Raises:
            ConfigError: as ``kind`` and ``files``.
        """
        if not self.is_tokens:
            self.raw()
            return set()
        self.files(exclude)
        found = token_readers.find(self.kind(), self.path)
        return {pattern for pattern in exclude if any(names(pattern, file) for file in found)}


def names(pattern: str, file: Path) -> bool:
    """Tells whether a pattern names a file: by its path, its name, or its name without the suffix."""
    return any(fnmatch(name, pattern) for name in (str(file), file.name, file.stem))


def _told_from(paths: list[str]) -> str:
    """Returns the kind of source that lies at those paths; of files that are not there, what their names promise."""
    if all(path.endswith((".bin", ".idx")) for path in paths):
        return "litpkds" if any(map(litpkds.is_chunk, _first(paths, ".bin"))) else "indexed"
    if all(path.endswith(".parquet") for path in paths) and any(map(parquet.holds_tokens, _first(paths, ".parquet"))):
        return "parquet"
    return "text"


def _first(paths: list[str], suffix: str) -> list[Path]:
    """Returns the first file with that suffix, in a list that is empty where there is none."""
    try:
        found = sources.matches(paths[0])
    except ConfigError:
        return []
    return [file for file in found if file.is_file() and file.suffix == suffix][:1]


class Corpus:
    """Documents of one or several shards, one after the other.

    Args:
        label: what errors and the report call it.
        shards: in order.
        vocab_size: every token is below it; None where no tokenizer says so.

    Attributes:
        lengths: (documents,) tokens in each document.
        tokens: tokens in all documents.
    """

    def __init__(self, label: str, shards: Sequence[Shard], vocab_size: int | None = None) -> None:
        self.label = label
        self.shards = list(shards)
        self.vocab_size = vocab_size
        self.lengths = _joined([shard.lengths for shard in shards])
        self.tokens = int(self.lengths.sum())
        self._starts = _joined([shard.starts for shard in shards])
        self._ends = np.cumsum([len(shard.lengths) for shard in shards])  # documents up to and with each shard

    def read(self, spans: Spans) -> np.ndarray:
        """Returns the tokens of the spans, one after the other, as stored: one that nobody is to predict is ``~token``.

        Raises:
            ConfigError: a token is outside the vocabulary.
        """
        starts = self._starts[spans.documents]
        begins, ends = (starts + spans.begins).tolist(), (starts + spans.ends).tolist()
        if len(self.shards) == 1:
            flat = self.shards[0].flat
            pieces = [flat[begin:end] for begin, end in zip(begins, ends, strict=True)]
        else:
            shards = np.searchsorted(self._ends, spans.documents, side="right").tolist()
            pieces = [self.shards[i].flat[begin:end] for i, begin, end in zip(shards, begins, ends, strict=True)]
        tokens = np.concatenate(pieces)
        bound = MAX_TOKEN if self.vocab_size is None else self.vocab_size
        if len(tokens) and (self.vocab_size is not None or tokens.itemsize > 4):
            least, most = int(tokens.min()), int(tokens.max())
            if not -bound <= least <= most < bound:
                raise ConfigError(
                    f"{self.label} holds token {most if most >= bound else ~least}, the tokenizer's vocabulary has "
                    f"{self.vocab_size or 'fewer'}: it was written with another tokenizer."
                )
        return tokens

    def fingerprint(self) -> str:
        """Returns a hash of the content; what it promises is in ``Indexed.fingerprint``."""
        return hashlib.sha256(" ".join(shard.fingerprint for shard in self.shards).encode()).hexdigest()


@dataclass(frozen=True)
class SourceLoader:
    """Opens sources as tokens, tokenizing raw text into the cache on first use.

    Attributes:
        tokenizer: None where every source is tokens already.
        cache: the cache folder.
        validation_fraction: share of the documents of raw text that is held out.
        bos: whether raw documents begin with the tokenizer's bos.
        exclude: patterns of the files of tokens to leave out.
    """

    tokenizer: Tokenizer | None
    cache: Path
    validation_fraction: float
    bos: bool
    exclude: Sequence[str] = ()

    def open(self, source: SourceConfig, split: Literal["train", "validation"]) -> Corpus:
        """Returns the documents of one split of a source; all of a source of tokens are for training.

        Raises:
            ConfigError: a file is missing or damaged, or raw text has no tokenizer.
        """
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else None
        if source.is_tokens:
            eos = self.tokenizer.eos if self.tokenizer else None
            section = replace(source, name=source.kind())
            files = source.files(self.exclude)
            shards = token_readers.registry.build(section, files=files, eos=eos, cache=self.cache)
            return Corpus(source.title, shards, vocab_size)
        if self.tokenizer is None:
            raise ConfigError(f"the source {source.title} is raw text: it needs a tokenizer.")
        prepared = tokenize_cached(source.raw(), self.tokenizer, self.cache, self.validation_fraction, self.bos)
        return Corpus(source.title, [IndexedTokens(getattr(prepared, split))], vocab_size)


def training_texts(section: Any) -> Iterator[str]:
    """Yields the raw texts that a ``[data]`` section trains on, without those held out: a tokenizer learns from them.

    Args:
        section: the settings of the loader ``rows``, or of another one whose ``sources`` is a list of ``SourceConfig``.

    Raises:
        ConfigError: no source is raw text.
    """
    excluded = getattr(section, "exclude", [])
    chosen = [source for source in getattr(section, "sources", []) if source.title not in excluded]
    raw = [source for source in chosen if not source.is_tokens]
    if not raw:
        raise ConfigError("no source is raw text, so no tokenizer can be trained on it: give tokenizer.path.")
    held = 0.0 if getattr(section, "validation_sources", []) else getattr(section, "validation_fraction", 0.0)
    for source in raw:
        for document in source.raw().documents():
            if not sources.held_out(document.identity, held):
                yield document.text


def build_tokenizer(section: Any, data: Any) -> Tokenizer | None:
    """Returns the tokenizer of a run, trained on the run's own texts if it has no file; None for ``name = "none"``.

    Args:
        section: the settings ``[tokenizer]``.
        data: the settings ``[data]``.
    """
    return tokenizers.build(
        section,
        texts=lambda: training_texts(data),
        cache=cache_path(getattr(data, "cache_folder", DEFAULT)),
    )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
