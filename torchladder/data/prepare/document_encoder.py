"""Texts to the tokens of documents: the one way that every command and every run goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from torchladder.data.dataloader import Tokenizer
from torchladder.registry import ConfigError

BATCH_CHARS = 1 << 22
"""Characters that are tokenized at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class DocumentEncoder:
    """How a text becomes a document's tokens: encoded, with the tokens that begin and end it.

    Attributes:
        tokenizer: gives the ids.
        bos: whether a document begins with the tokenizer's bos.
        eos: whether a document ends with the tokenizer's eos.
        threads: cores to use.

    Raises:
        ConfigError: the tokenizer has no bos.
    """

    tokenizer: Tokenizer
    bos: bool = False
    eos: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        if self.bos and self.tokenizer.bos is None:
            raise ConfigError("bos is on, but the tokenizer has no bos token: leave bos off.")

    @property
    def ends(self) -> dict[str, int | None]:
        """The ids that begin and end each document, None where none does."""
        return {"bos": self.tokenizer.bos if self.bos else None, "eos": self.tokenizer.eos if self.eos else None}

    def __call__(self, texts: list[str], name: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of all texts back to back (tokens,), and how many each has (documents,).

        Args:
            texts: one document each.
            name: says where the n-th of them comes from.

        Raises:
            ConfigError: a token is outside the vocabulary.
        """
        encoded = self.tokenizer.encode_batch(texts, self.threads)
        first, last = ([np.array([end])] if end is not None else [] for end in self.ends.values())
        pieces = [piece for ids in encoded for piece in (*first, ids, *last)]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + len(first) + len(last)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            place = int(np.flatnonzero((tokens < 0) | (tokens >= self.tokenizer.vocab_size))[0])
            document = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise ConfigError(
                f"{name(document)}: the tokenizer gives token {tokens[place]}, "
                f"its vocabulary has {self.tokenizer.vocab_size}."
            )
        return tokens, lengths


def batch_by_chars(documents: Iterable[T], text: Callable[[T], str]) -> Iterator[list[T]]:
    """Yields the documents in lists of about ``BATCH`` characters."""
    batch: list[Any] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(text(document))
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
