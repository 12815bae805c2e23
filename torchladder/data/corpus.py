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
from torchladder.data.formats.indexed import IndexedTokens, find_out_of_range
from torchladder.data.packing.spans import Spans
from torchladder.data.prepare.cached_tokens import tokenize_cached
from torchladder.data.prepare.text_counts import MAX_UNKNOWN_FRACTION
from torchladder.data.source_config import SourceConfig
from torchladder.data.source_tokenizer import ReaderVocabulary, check_source_tokenizer
from torchladder.data.sources import TokenShard, held_out
from torchladder.data.tokenizer import Tokenizer
from torchladder.data.tokenizer import registry as tokenizers
from torchladder.registry import ConfigError, require

MAX_VOCAB_SIZE = 1 << 31
"""Rows store a token in 32 bits."""
MAX_CHECKED_TOKENS, CHECKED_DOCUMENTS = 1 << 22, 256
"""Tokens of a source that are checked when it is opened; of a larger one as many, in evenly spread documents."""


class Corpus:
    """Documents of one or several shards, one after the other.

    Args:
        label: what errors and the report call it.
        shards: in order.
        vocab_size: every token is below it.
        vocab_of: what has this vocab_size, for errors.
        unlabeled: whether tokens may lack a label; otherwise none is below 0.
        tokenizer_known: whether the tokens are known to be the run's tokenizer's.

    Attributes:
        lengths: (documents,) tokens in each document.
        num_tokens: tokens in all documents.
    """

    def __init__(
        self,
        label: str,
        shards: Sequence[TokenShard],
        vocab_size: int = MAX_VOCAB_SIZE,
        vocab_of: str = "",
        unlabeled: bool = True,
        tokenizer_known: bool = False,
    ) -> None:
        self.label = label
        self.shards = list(shards)
        self.vocab_size, self.vocab_of, self.unlabeled = vocab_size, vocab_of, unlabeled
        self.tokenizer_known = tokenizer_known
        self.lengths = _concatenate([shard.lengths for shard in shards])
        self.num_tokens = int(self.lengths.sum())
        self._offsets = _concatenate([shard.offsets for shard in shards])
        self._ends = np.cumsum([len(shard.lengths) for shard in shards])  # documents up to and including each shard

    def read(self, spans: Spans) -> np.ndarray:
        """Returns the tokens of the spans back to back, those without a label as in ``unlabeled_tokens``.

        Raises:
            ConfigError: a token is outside the vocabulary; names its file and document.
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
        least = -self.vocab_size if self.unlabeled else 0
        if invalid := find_out_of_range(tokens, spans.ends - spans.begins, least, self.vocab_size - 1):
            token, piece = invalid
            place = self._locate(int(spans.documents[piece]))
            token = ~token if self.unlabeled and token < 0 else token
            why = f", {self.vocab_of}" if self.vocab_of else ""
            raise ConfigError(
                f"{place} holds token {token}: tokens must be 0 or more and below {self.vocab_size:,}{why}."
            )
        return tokens

    def check_tokens(self) -> None:
        """Reads a small corpus whole and a few documents of a large one; raises as ``read`` does."""
        count, ends = len(self.lengths), self.lengths
        documents = np.arange(count)
        if self.num_tokens > MAX_CHECKED_TOKENS:
            documents = documents[:: -(-count // CHECKED_DOCUMENTS)]
            ends = np.minimum(ends[documents], MAX_CHECKED_TOKENS // CHECKED_DOCUMENTS)
        if count:
            self.read(Spans(documents, np.zeros_like(ends), ends))

    def fingerprint(self) -> str:
        """Returns a hash of the content; ``IndexedTokens.fingerprint`` says what it covers."""
        return hashlib.sha256(" ".join(shard.fingerprint for shard in self.shards).encode()).hexdigest()

    def _locate(self, document: int) -> str:
        """Returns the file and the number of a document, both counted from 0."""
        number = int(np.searchsorted(self._ends, document, side="right"))
        shard, inside = self.shards[number], document - int(self._ends[number - 1] if number else 0)
        locate = getattr(shard, "locate", None)  # a shard of a plugin may not say where its documents are
        return locate(inside) if locate else f"{self.label}, document {document}"


@dataclass(frozen=True)
class SourceLoader:
    """Opens sources as tokens; text is tokenized into the cache on first use.

    Attributes:
        tokenizer: None if every source is tokens already.
        cache: the cache folder.
        validation_fraction: share of the documents of text that is held out.
        bos: whether documents of text begin with the tokenizer's bos.
        exclude: patterns of files of tokens to leave out.
        vocab_size: of the model; None if it is unknown.
        tokenizer_fingerprint: of the model's tokenizer, if ``tokenizer`` is None because it cannot be built.
        check_tokenizer: refuse tokens that another tokenizer has written; otherwise warn.
        max_unknown_fraction: of the tokens of a text; more is an error.
    """

    tokenizer: Tokenizer | None
    cache: Path
    validation_fraction: float
    bos: bool
    exclude: Sequence[str] = ()
    vocab_size: int | None = None
    tokenizer_fingerprint: str | None = None
    check_tokenizer: bool = True
    max_unknown_fraction: float = MAX_UNKNOWN_FRACTION

    def open(self, source: SourceConfig, split: Literal["train", "validation"]) -> Corpus:
        """Returns the documents of one split of a source; one of tokens needs ``split`` for others than training.

        Raises:
            ConfigError: it cannot be read, has tokens outside the vocabulary, or does not fit the tokenizer.
        """
        if source.is_tokens:
            eos = self.tokenizer.eos if self.tokenizer else None
            section = replace(source, name=source.kind)
            files = source.files(self.exclude)
            shards = sources.registry.build(section, files=files, eos=eos, cache=self.cache, part=split)
            reader = ReaderVocabulary(self.tokenizer, self.vocab_size, self.tokenizer_fingerprint)
            known = check_source_tokenizer(shards, reader, accept=not self.check_tokenizer)
            vocab_size, vocab_of = MAX_VOCAB_SIZE, ""
            if self.tokenizer:
                vocab_size = self.tokenizer.vocab_size
                vocab_of = "the tokenizer's vocab_size: the source was written with another tokenizer"
            elif self.vocab_size is not None:
                vocab_size, vocab_of = self.vocab_size, "the model's vocab_size"
            unlabeled = sources.token_formats[source.kind].unlabeled
            corpus = Corpus(source.title, shards, vocab_size, vocab_of, unlabeled, known)
            corpus.check_tokens()
            return corpus
        if self.tokenizer is None:
            raise ConfigError(f"the source {source.title} is raw text: it needs a tokenizer.")
        settings = self.validation_fraction, self.bos, self.max_unknown_fraction
        folder = tokenize_cached(source.text_source(), self.tokenizer, self.cache, *settings)
        return Corpus(source.title, [IndexedTokens(folder / split)], self.tokenizer.vocab_size, tokenizer_known=True)


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
