"""Documents of one source as tokens: read from disk, or text that is tokenized into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchladder.data import sources
from torchladder.data.disk_cache import DEFAULT_FOLDER, cache_path
from torchladder.data.formats.indexed import IndexedTokens
from torchladder.data.packing.spans import Spans
from torchladder.data.prepare.cached_tokens import tokenize_cached
from torchladder.data.source_config import SourceConfig
from torchladder.data.sources import TokenShard, held_out
from torchladder.data.tokenizer import Tokenizer
from torchladder.data.tokenizer import registry as tokenizers
from torchladder.registry import ConfigError, require

MAX_VOCAB_SIZE = 1 << 31
"""Rows store a token in 32 bits."""


class Corpus:
    """Documents of one or several shards, one after the other.

    Args:
        label: what errors and the report call it.
        shards: in order.
        vocab_size: every token is below it; None without a tokenizer.

    Attributes:
        lengths: (documents,) tokens in each document.
        num_tokens: tokens in all documents.
    """

    def __init__(self, label: str, shards: Sequence[TokenShard], vocab_size: int | None = None) -> None:
        self.label = label
        self.shards = list(shards)
        self.vocab_size = vocab_size
        self.lengths = _concatenate([shard.lengths for shard in shards])
        self.num_tokens = int(self.lengths.sum())
        self._offsets = _concatenate([shard.offsets for shard in shards])
        self._ends = np.cumsum([len(shard.lengths) for shard in shards])  # documents up to and including each shard

    def read(self, spans: Spans) -> np.ndarray:
        """Returns the tokens of the spans back to back, those without a label as in ``unlabeled_tokens``.

        Raises:
            ConfigError: a token is outside the vocabulary.
        """
        offsets = self._offsets[spans.documents]
        begins, ends = (offsets + spans.begins).tolist(), (offsets + spans.ends).tolist()
        if len(self.shards) == 1:
            flat = self.shards[0].flat
            pieces = [flat[begin:end] for begin, end in zip(begins, ends, strict=True)]
        else:
            shards = np.searchsorted(self._ends, spans.documents, side="right").tolist()
            pieces = [self.shards[i].flat[begin:end] for i, begin, end in zip(shards, begins, ends, strict=True)]
        tokens = np.concatenate(pieces)
        bound = MAX_VOCAB_SIZE if self.vocab_size is None else self.vocab_size
        if len(tokens) and (self.vocab_size is not None or tokens.itemsize > 4):
            least, most = int(tokens.min()), int(tokens.max())
            written = ", the tokenizer's vocab_size: the source was written with another tokenizer"
            why = written if self.vocab_size else ""
            require(
                -bound <= least <= most < bound,
                f"{self.label} holds token {most if most >= bound else ~least}: tokens must be below {bound:,}{why}.",
            )
        return tokens

    def fingerprint(self) -> str:
        """Returns a hash of the content; ``IndexedTokens.fingerprint`` says what it covers."""
        return hashlib.sha256(" ".join(shard.fingerprint for shard in self.shards).encode()).hexdigest()


@dataclass(frozen=True)
class SourceLoader:
    """Opens sources as tokens; text is tokenized into the cache on first use.

    Attributes:
        tokenizer: None if every source is tokens already.
        cache: the cache folder.
        validation_fraction: share of the documents of text that is held out.
        bos: whether documents of text begin with the tokenizer's bos.
        exclude: patterns of files of tokens to leave out.
    """

    tokenizer: Tokenizer | None
    cache: Path
    validation_fraction: float
    bos: bool
    exclude: Sequence[str] = ()

    def open(self, source: SourceConfig, split: Literal["train", "validation"]) -> Corpus:
        """Returns the documents of one split of a source; all documents of a source of tokens are for training."""
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else None
        if source.is_tokens:
            eos = self.tokenizer.eos if self.tokenizer else None
            section = replace(source, name=source.kind)
            shards = sources.registry.build(section, files=source.files(self.exclude), eos=eos, cache=self.cache)
            return Corpus(source.title, shards, vocab_size)
        if self.tokenizer is None:
            raise ConfigError(f"the source {source.title} is raw text: it needs a tokenizer.")
        folder = tokenize_cached(source.text_source(), self.tokenizer, self.cache, self.validation_fraction, self.bos)
        return Corpus(source.title, [IndexedTokens(folder / split)], vocab_size)


def training_texts(section: Any) -> Iterator[str]:
    """Yields the texts that a ``[data]`` section trains on, except held-out ones; a tokenizer is trained on them.

    Args:
        section: the settings of the loader ``rows``, or of another one whose ``sources`` is a list of ``SourceConfig``.

    Raises:
        ConfigError: no source is text.
    """
    excluded = getattr(section, "exclude", [])
    chosen = [source for source in getattr(section, "sources", []) if source.title not in excluded]
    of_text = [source for source in chosen if not source.is_tokens]
    require(
        bool(of_text),
        'no source is raw text, so no tokenizer can be trained on it: set tokenizer.path, or tokenizer.name = "none" '
        "to train on the tokens without one.",
    )
    fraction = 0.0 if getattr(section, "validation_sources", []) else getattr(section, "validation_fraction", 0.0)
    for source in of_text:
        for document in source.text_source().documents():
            if not held_out(document.identity, fraction):
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
        cache=cache_path(getattr(data, "cache_folder", DEFAULT_FOLDER)),
    )


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
