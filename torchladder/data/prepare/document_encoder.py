"""Encodes texts as documents. Every command and every run tokenizes through this class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from torchladder.data.formats.indexed import find_out_of_range
from torchladder.data.prepare.text_counts import MAX_EXAMPLES, TextCounts, find_unknown_words
from torchladder.data.tokenizer import Tokenizer
from torchladder.registry import ConfigError

BATCH_CHARS = 1 << 22
"""Characters that are tokenized at once."""

T = TypeVar("T")


class EncodedDocuments(NamedTuple):
    """Documents as tokens.

    Attributes:
        tokens: (tokens,) of all documents back to back.
        lengths: (documents,) tokens in each.
        counts: of their texts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: TextCounts


@dataclass(frozen=True)
class DocumentEncoder:
    """Tokenizes texts and adds the tokens that begin and end a document.

    Attributes:
        tokenizer: the tokenizer.
        bos: whether a document begins with the tokenizer's bos token.
        eos: whether a document ends with the tokenizer's eos token.
        threads: CPU threads to tokenize with.

    Raises:
        ConfigError: ``bos`` is set, but the tokenizer has no bos token.
    """

    tokenizer: Tokenizer
    bos: bool = False
    eos: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        if self.bos and self.tokenizer.bos is None:
            raise ConfigError("bos is set, but the tokenizer has no bos token: unset bos.")

    @property
    def special_ids(self) -> dict[str, int | None]:
        """The ids ``bos`` and ``eos`` that are added to each document; None where none is."""
        return {"bos": self.tokenizer.bos if self.bos else None, "eos": self.tokenizer.eos if self.eos else None}

    def __call__(self, texts: list[str], location: Callable[[int], str]) -> EncodedDocuments:
        """Returns texts as documents.

        Args:
            texts: one document each.
            location: returns where text ``n`` comes from, for the error message.

        Raises:
            ConfigError: a text cannot be encoded, or a token is outside the vocabulary.
        """
        encoded = self.tokenizer.encode_batch(texts, self.threads)
        bos, eos = ([np.array([token])] if token is not None else [] for token in self.special_ids.values())
        pieces = [piece for ids in encoded for piece in (*bos, ids, *eos)]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + len(bos) + len(eos)
        size = self.tokenizer.vocab_size
        if invalid := find_out_of_range(tokens, lengths, 0, size - 1):
            token, document = invalid
            raise ConfigError(
                f"{location(document)}: the tokenizer returns token {token}, but its vocabulary has {size} tokens."
            )
        ends = [end for end in self.special_ids.values() if end is not None]
        return EncodedDocuments(tokens, lengths, self._count(texts, encoded, tokens, ends))

    def _count(self, texts: list[str], encoded: list[np.ndarray], tokens: np.ndarray, ends: list[int]) -> TextCounts:
        """Counts the tokens of the texts; ``tokens`` has those of ``ends``, too, once per document."""
        unk = self.tokenizer.unk
        unknown = 0 if unk is None else int(np.count_nonzero(tokens == unk)) - ends.count(unk) * len(texts)
        dropped = [len(self.tokenizer.dropped(text)) for text in texts]
        words: dict[str, None] = {}
        if unknown or any(dropped):
            for text, ids, characters in zip(texts, encoded, dropped, strict=True):
                if characters or (unk is not None and (ids == unk).any()):
                    words |= dict.fromkeys(find_unknown_words(self.tokenizer, text))
                if len(words) >= MAX_EXAMPLES:
                    break
        return TextCounts(
            text_bytes=sum(len(text.encode("utf-8", "replace")) for text in texts),
            text_tokens=len(tokens) - len(ends) * len(texts),
            unknown_tokens=unknown,
            dropped_characters=sum(dropped),
            unknown_words=list(words)[:MAX_EXAMPLES],
        )


def batch_by_chars(documents: Iterable[T], text: Callable[[T], str]) -> Iterator[list[T]]:
    """Yields lists of documents with about ``BATCH_CHARS`` characters each; ``text`` returns a document's text."""
    batch: list[T] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(text(document))
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
