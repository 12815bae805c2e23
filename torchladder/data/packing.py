"""Rows out of documents: which spans of which documents make up row ``n`` of one source.

A packing sees lengths, never tokens, and answers for any row without having seen another: it is a pure function of the
lengths, the seed and ``n``. An order gives it the documents of each epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from torchladder.registry import Registry


class Spans(NamedTuple):
    """The content of a row, piece after piece.

    Attributes:
        documents: (pieces,) int64, the document each piece is cut from.
        begins: (pieces,) int64, its first token within the document.
        ends: (pieces,) int64, one past its last token.
    """

    documents: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class Packing(Protocol):
    """Rows of one source.

    Attributes:
        rows: how many rows there are, None when they never end.
        epoch_rows: rows that read every document once.
    """

    @property
    def rows(self) -> int | None: ...

    @property
    def epoch_rows(self) -> Fraction: ...

    def __call__(self, row: int) -> Spans:
        """Returns the spans of row ``row``: ``seq_len + 1`` tokens at most, the last one only a label."""
        ...


registry: Registry[Packing] = Registry(
    "packing",
    facts={
        "lengths": "(documents,) int64 tokens in each document",
        "seq_len": "tokens in a row",
        "order": "epoch -> (documents,) the documents of that epoch",
        "epochs": "how often the documents are read, None without end",
    },
)
register = registry.register


@dataclass(frozen=True)
class Order:
    """The documents of each epoch: as stored, or shuffled by (seed, source, epoch).

    Shuffling sorts random 64-bit keys. NumPy keeps the raw streams of its bit generators and of ``SeedSequence`` the
    same in every release, which it does not promise for ``permutation``: the order outlives an upgrade.
    """

    documents: int
    seed: int
    source: int
    shuffle: bool = True

    def __call__(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.documents)
        keys = np.random.PCG64(np.random.SeedSequence((self.seed, self.source, epoch))).random_raw(self.documents)
        return np.argsort(keys, kind="stable")


class _Epoch(NamedTuple):
    """One pass: its documents and where each begins in the pass, with the end of the last appended."""

    documents: np.ndarray
    bounds: np.ndarray


@register("stream")
@dataclass(frozen=True)
class Stream:
    """All documents in one endless stream, epoch after epoch, cut every ``seq_len`` tokens.

    A row is the next ``seq_len`` tokens and one more, which is only a label here and the first token of the next row.
    So every token is a token of exactly one row per epoch; rows cross the border of epochs, and no tail is dropped.
    With a last epoch, the last row is shorter.
    """

    lengths: np.ndarray
    seq_len: int
    order: Callable[[int], np.ndarray]
    epochs: int | None = None
    _passes: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def epoch_rows(self) -> Fraction:
        return Fraction(self._tokens, self.seq_len)

    @property
    def rows(self) -> int | None:
        if self.epochs is None:
            return None
        # The very first token is no label: n tokens have n - 1, and the last row has at least one.
        return -(-max(self.epochs * self._tokens - 1, 0) // self.seq_len)

    def __call__(self, row: int) -> Spans:
        begin = row * self.seq_len
        end = begin + self.seq_len + 1
        if self.epochs is not None:
            end = min(end, self.epochs * self._tokens)
        pieces = []
        while begin < end:
            epoch, offset = divmod(begin, self._tokens)
            until = min(end - epoch * self._tokens, self._tokens)
            pieces.append(self._cut(self._pass(epoch), offset, until))
            begin += until - offset
        return Spans(*map(np.concatenate, zip(*pieces, strict=True)))

    @cached_property
    def _tokens(self) -> int:
        return int(self.lengths.sum())

    def _cut(self, epoch: _Epoch, begin: int, end: int) -> Spans:
        """Returns the pieces of the tokens ``begin .. end`` of one pass."""
        first = int(np.searchsorted(epoch.bounds, begin, side="right")) - 1
        last = int(np.searchsorted(epoch.bounds, end, side="left"))
        bounds = epoch.bounds[first : last + 1].clip(begin, end)
        starts = epoch.bounds[first:last]
        return Spans(epoch.documents[first:last], bounds[:-1] - starts, bounds[1:] - starts)

    def _pass(self, epoch: int) -> _Epoch:
        """Returns an epoch's order, keeping the two read last: workers stand on either side of a border."""
        if epoch not in self._passes:
            documents = self.order(epoch)
            bounds = np.concatenate([[0], np.cumsum(self.lengths[documents])])
            while len(self._passes) > 1:
                del self._passes[next(iter(self._passes))]
            self._passes[epoch] = _Epoch(documents, bounds)
        return self._passes[epoch]
