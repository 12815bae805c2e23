"""``stream``: concatenates all documents and cuts rows every ``seq_len`` tokens; no token is dropped, none padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np

from torchladder.data.packing.spans import EMPTY_SPANS, Spans, register


@register("stream")
@dataclass(frozen=True)
class StreamPacking:
    """Concatenates all documents, epoch after epoch, and cuts the stream every ``seq_len`` tokens.

    A row is the next ``seq_len`` tokens and one more, which is only a label here and the first token of the next row.
    So every token is an input of exactly one row per epoch. Rows cross epoch boundaries, and no tail is dropped;
    if there is a last epoch, its last row is shorter.
    """

    lengths: np.ndarray
    seq_len: int
    order: Callable[[int], np.ndarray]
    epochs: int | None = None
    efficiency: float = field(default=1.0, init=False)
    _epochs: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_rows(self) -> int | None:
        if self.epochs is None:
            return None
        # The very first token is no label: n tokens have n - 1 labels, and the last row has at least one.
        return -(-max(self.epochs * self._tokens - 1, 0) // self.seq_len)

    @property
    def rows_per_epoch(self) -> Fraction:
        return Fraction(self._tokens, self.seq_len)

    def __call__(self, row: int) -> Spans:
        begin = row * self.seq_len
        end = begin + self.seq_len + 1
        if self.epochs is not None:
            end = min(end, self.epochs * self._tokens)
        pieces = [EMPTY_SPANS]
        while begin < end:
            epoch, offset = divmod(begin, self._tokens)
            until = min(end - epoch * self._tokens, self._tokens)
            pieces.append(self._cut(epoch, offset, until))
            begin += until - offset
        # Most rows lie within one epoch: nothing to concatenate.
        return pieces[-1] if len(pieces) < 3 else Spans(*map(np.concatenate, zip(*pieces, strict=True)))

    @cached_property
    def _tokens(self) -> int:
        return int(self.lengths.sum())

    def _cut(self, epoch: int, begin: int, end: int) -> Spans:
        """Returns the spans of the tokens ``begin .. end`` of one epoch."""
        documents, bounds = self._epoch(epoch)
        first, last = int(bounds.searchsorted(begin, side="right")) - 1, int(bounds.searchsorted(end, side="left"))
        starts = bounds[first:last]
        cuts = bounds[first : last + 1].copy()
        cuts[0], cuts[-1] = begin, end  # only the first and the last document can be cut
        return Spans(documents[first:last], cuts[:-1] - starts, cuts[1:] - starts)

    def _epoch(self, number: int) -> tuple[np.ndarray, ...]:
        """Returns an epoch's documents in order, and their bounds in its tokens: (documents + 1,), from 0.

        Keeps the last two epochs, since workers read on both sides of a boundary.
        """
        if number not in self._epochs:
            documents = self.order(number)
            bounds = np.zeros(len(documents) + 1, np.int64)
            np.cumsum(self.lengths[documents], out=bounds[1:])
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[number] = documents, bounds
        return self._epochs[number]
