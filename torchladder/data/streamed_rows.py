"""Micro-batches out of documents that come one after the other, once: a row is known when those before it are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from torchladder.data.packed_rows import PackedRows, finish_row


class StreamedRow(NamedTuple):
    """One row.

    Attributes:
        tokens: (T + 1,) int32 as in ``Content``.
        begins: (pieces,) int64, where its pieces begin.
    """

    tokens: np.ndarray
    begins: np.ndarray


@dataclass
class StreamedRows:
    """Documents packed as by ``stream``: one after the other, cut at row ends, no token left out.

    Attributes:
        documents: gives the tokens of some documents back to back, and how many each has, again and again.
        seq_len: tokens in a row.
        local: rows in a micro-batch.
        share: rows of this rank in a step.
        part: which share of every step is this rank's, and of how many; (0, 1) where all rows are its own.
        first: rows to pass over.
        across: whether the last token of a document predicts the first one of the next.
    """

    documents: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    seq_len: int
    local: int
    share: int
    part: tuple[int, int] = (0, 1)
    first: int = 0
    across: bool = True

    def __iter__(self) -> Iterator[PackedRows]:
        rows = islice(self.rows(), self.first, None)
        number, count = self.part
        while step := list(islice(rows, self.share * count)):
            # The last step is completed, so that every rank has equally many batches.
            step += [self._row(step[0].tokens[:0], np.empty(0, np.int64))] * (self.share * count - len(step))
            mine = step[number * self.share : (number + 1) * self.share]
            for at in range(0, self.share, self.local):
                tokens, begins = zip(*mine[at : at + self.local], strict=True)
                places = [b * self.seq_len + inside for b, inside in enumerate(begins)]
                yield PackedRows(np.stack(tokens), np.concatenate(places))

    def rows(self) -> Iterator[StreamedRow]:
        """Yields the rows of all documents, the last one padded."""
        content, starts = np.empty(0, np.int32), np.empty(0, np.int64)
        for tokens, lengths in self.documents():
            starts = np.concatenate([starts, len(content) + lengths.cumsum() - lengths])
            content = np.concatenate([content, tokens.astype(np.int32)])
            cut = max(len(content) - 1, 0) // self.seq_len * self.seq_len
            for begin in range(0, cut, self.seq_len):
                end = begin + self.seq_len + 1
                inside = starts[starts.searchsorted(begin) : starts.searchsorted(end)]
                yield self._row(content[begin:end], inside - begin)
            content, starts = content[cut:], starts[starts >= cut] - cut
        if len(content) > 1:  # one token alone was a label already
            yield self._row(content, starts)

    def _row(self, content: np.ndarray, starts: np.ndarray) -> StreamedRow:
        tokens, used = np.empty(self.seq_len + 1, np.int32), len(content)
        tokens[:used] = content
        begins = np.concatenate([[0], starts[starts > 0], [used]])
        return StreamedRow(tokens, finish_row(tokens, begins, self.across))
