"""Encodes texts as documents. Every command and every run tokenizes through this class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from torchladder.data.formats.indexed import find_out_of_range
from torchladder.data.tokenizer import Tokenizer
from torchladder.registry import ConfigError

BATCH_CHARS = 1 << 22
"""Characters that are tokenized at once."""

T = TypeVar("T")


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

    def __call__(self, texts: list[str], location: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of all texts back to back (tokens,), and the length of each document (documents,).

        Args:
            texts: one document each.
            location: returns where text ``n`` comes from, for the error message.

        Raises:
            ConfigError: a token is outside the vocabulary.
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
        return tokens, lengths


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
