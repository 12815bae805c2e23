"""Rows cut from one endless stream of documents: no token is left out, and nothing is padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from torchladder.data.packing.spans import EMPTY_SPANS, Spans, register


class _Epoch(NamedTuple):
    """One pass: its documents and where each begins in the pass, with the end of the last appended."""

    documents: np.ndarray
    bounds: np.ndarray


@register("stream")
@dataclass(frozen=True)
class StreamPacking:
    """All documents in one endless stream, epoch after epoch, cut every ``seq_len`` tokens.

    A row is the next ``seq_len`` tokens and one more, which is only a label here and the first token of the next row.
    So every token is a token of exactly one row per epoch; rows cross the border of epochs, and no tail is dropped.
    With a last epoch, the last row is shorter.
    """

    lengths: np.ndarray
    seq_len: int
    order: Callable[[int], np.ndarray]
    epochs: int | None = None
    efficiency: float = field(default=1.0, init=False)
    _passes: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def rows(self) -> int | None:
        if self.epochs is None:
            return None
        # The very first token is no label: n tokens have n - 1, and the last row has at least one.
        return -(-max(self.epochs * self._tokens - 1, 0) // self.seq_len)

    @property
    def epoch_rows(self) -> Fraction:
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
            pieces.append(self._cut(self._pass(epoch), offset, until))
            begin += until - offset
        # Most rows lie within one epoch, and then there is nothing to join.
        return pieces[-1] if len(pieces) < 3 else Spans(*map(np.concatenate, zip(*pieces, strict=True)))

    @cached_property
    def _tokens(self) -> int:
        return int(self.lengths.sum())

    def _cut(self, epoch: _Epoch, begin: int, end: int) -> Spans:
        """Returns the pieces of the tokens ``begin .. end`` of one pass."""
        first = int(epoch.bounds.searchsorted(begin, side="right")) - 1
        last = int(epoch.bounds.searchsorted(end, side="left"))
        bounds = epoch.bounds[first : last + 1].copy()
        bounds[0], bounds[-1] = begin, end  # only the outermost documents reach further
        starts = epoch.bounds[first:last]
        return Spans(epoch.documents[first:last], bounds[:-1] - starts, bounds[1:] - starts)

    def _pass(self, epoch: int) -> _Epoch:
        """Returns an epoch's order, keeping the two read last: workers stand on either side of a border."""
        if epoch not in self._passes:
            documents = self.order(epoch)
            bounds = np.zeros(len(documents) + 1, np.int64)
            np.cumsum(self.lengths[documents], out=bounds[1:])
            while len(self._passes) > 1:
                del self._passes[next(iter(self._passes))]
            self._passes[epoch] = _Epoch(documents, bounds)
        return self._passes[epoch]
