"""Packs documents that arrive one after the other, once: a row is known only after those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from torchladder.data.packed_rows import BatchLayout, PackedRows, finish_row

StreamedRow = tuple[np.ndarray, np.ndarray]
"""A row's tokens (T + 1,) int32 as in ``PackedRows``, and where its pieces begin (pieces,) int64."""


@dataclass
class StreamedRows:
    """Yields one rank's micro-batches of a stream of documents, packed as by the packing ``stream``.

    Attributes:
        documents: returns an iterator over (tokens of several documents back to back, length of each).
        layout: how steps are divided over ranks and micro-batches.
        first_row: rows of the stream to pass over.
        labels_across_documents: whether the last token of a document predicts the first one of the next.
    """

    documents: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    layout: BatchLayout
    first_row: int = 0
    labels_across_documents: bool = True

    def __iter__(self) -> Iterator[PackedRows]:
        seq_len, count = self.layout.seq_len, self.layout.global_batch_size
        rows = islice(self.rows(), self.first_row, None)
        while step := list(islice(rows, count)):
            # Completes the last step with padding, so that every rank has as many batches.
            step += [self._row(np.empty(0, np.int32), np.empty(0, np.int64))] * (count - len(step))
            for batch in self.layout.micro_batches(step):
                tokens, begins = zip(*batch, strict=True)
                yield PackedRows(np.stack(tokens), np.concatenate([b * seq_len + row for b, row in enumerate(begins)]))

    def rows(self) -> Iterator[StreamedRow]:
        """Yields the rows of all documents, the last one padded."""
        seq_len = self.layout.seq_len
        pending, starts = np.empty(0, np.int32), np.empty(0, np.int64)  # tokens without a row yet; their documents
        for tokens, lengths in self.documents():
            starts = np.concatenate([starts, len(pending) + lengths.cumsum() - lengths])
            pending = np.concatenate([pending, tokens.astype(np.int32)])
            cut = max(len(pending) - 1, 0) // seq_len * seq_len
            for begin in range(0, cut, seq_len):
                end = begin + seq_len + 1
                inside = starts[starts.searchsorted(begin) : starts.searchsorted(end)]
                yield self._row(pending[begin:end], inside - begin)
            pending, starts = pending[cut:], starts[starts >= cut] - cut
        if len(pending) > 1:  # a single token was the last label of the row before
            yield self._row(pending, starts)

    def _row(self, content: np.ndarray, starts: np.ndarray) -> StreamedRow:
        tokens, used = np.empty(self.layout.seq_len + 1, np.int32), len(content)
        tokens[:used] = content
        begins = np.concatenate([[0], starts[starts > 0], [used]])
        return tokens, finish_row(tokens, begins, self.labels_across_documents)
