"""Makes micro-batches of rows: from any global row (a map-style dataset and its sampler), or from a stream.

The cost of a micro-batch is copying it, above all between processes: a worker sends 4 bytes per token instead of 20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from torchladder.batch_schedule import BatchSchedule
from torchladder.data.dataloader import Batch
from torchladder.data.mixing.source_mix import SourceMix
from torchladder.data.packing.spans import EMPTY_SPANS
from torchladder.data.row_skipping import RowSkipper
from torchladder.data.tokenizer import Tokenizer
from torchladder.data.unlabeled_tokens import PADDING, mark_unlabeled, split_labels
from torchladder.registry import ConfigError, require

Row = TypeVar("Row")
PREVIEW_CHARS = 80
"""Characters of the first row in the report at start-up; a token is seldom shorter than one."""


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a step are divided over data-parallel ranks and micro-batches.

    Attributes:
        seq_len: tokens in a row.
        dp_rank: this data-parallel rank.
        dp_degree: number of data-parallel ranks.
        local_batch_size: rows in a micro-batch.
        batch: rows in every step, over all ranks.

    Raises:
        ConfigError: the sizes do not divide, or a number is out of range.
    """

    seq_len: int
    dp_rank: int
    dp_degree: int
    local_batch_size: int
    batch: BatchSchedule

    def __post_init__(self) -> None:
        sizes = {"global_batch_size": min(self.batch.sizes)}
        for name in ("seq_len", "dp_degree", "local_batch_size"):
            sizes[name] = getattr(self, name)
        for name, value in sizes.items():
            require(value >= 1, f"{name} is {value}; it must be 1 or more.")
        in_range = 0 <= self.dp_rank < self.dp_degree
        require(in_range, f"dp_rank is {self.dp_rank}; it must be from 0 to {self.dp_degree - 1}.")
        for rows in self.batch.sizes:
            require(
                rows % self.rows_at_once == 0,
                f"global_batch_size {rows} is not a multiple of {self.dp_degree} data-parallel ranks "
                f"times local_batch_size {self.local_batch_size}.",
            )

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch over all ranks."""
        return self.dp_degree * self.local_batch_size

    def micro_batches(self, step: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Yields this rank's contiguous share of the rows of a step, one micro-batch at a time."""
        share = len(step) // self.dp_degree
        first = self.dp_rank * share
        for row in range(first, first + share, self.local_batch_size):
            yield step[row : row + self.local_batch_size]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A micro-batch in a fifth of its size: this is what a worker sends.

    It holds NumPy arrays, which are sent through a pipe. Tensors would be sent through shared memory, each with its own
    file and connection, at a third of the rate.

    Attributes:
        tokens: (B, T + 1) int32, the last one only a label; those without a label as in ``unlabeled_tokens``.
        begins: (pieces,) int64, where documents, rows and padding begin among the B * T positions.
        rows: global row of each; empty if the loader does not number rows.
    """

    tokens: np.ndarray
    begins: np.ndarray
    rows: tuple[int, ...] = ()

    def to_batch(self) -> Batch:
        tokens, labels = split_labels(torch.from_numpy(self.tokens))
        positions = np.arange(tokens.numel(), dtype=np.int32)
        positions -= self.begins.astype(np.int32).repeat(np.diff(self.begins, append=len(positions)))
        return Batch(tokens, labels, torch.from_numpy(positions).view(tokens.shape), self.rows)

    def pin_memory(self) -> Batch:
        """Returns the micro-batch in pinned memory; called by the data loader's pinning thread."""
        return self.to_batch().pin_memory()


@dataclass(eq=False)
class RowDataset(Dataset[PackedRows | ConfigError]):
    """Makes micro-batches of global rows: row ``r`` is the same in every process, at any time, in any order.

    Attributes:
        mix: the sources, packed and interleaved.
        row_orders: for each source, row of the source -> row of the packing.
        labels_across_documents: whether the last token of a document predicts the first one of the next.
        num_rows: number of global rows; later ones are padding. None if they never end.
    """

    mix: SourceMix
    row_orders: Sequence[Callable[[int], int]]
    labels_across_documents: bool = True
    num_rows: int | None = None

    def __getitem__(self, rows: list[int]) -> PackedRows | ConfigError:
        """Returns the rows, or why there are none: of an error that is raised, a worker sends the traceback as text."""
        try:
            return self.pack(rows)
        except ConfigError as error:
            return error

    def pack(self, rows: list[int]) -> PackedRows:
        """Returns the rows; raises ``ConfigError`` if a token is outside the vocabulary."""
        seq_len, begins = self.mix.seq_len, []
        tokens = np.empty((len(rows), seq_len + 1), np.int32)
        for b, row in enumerate(rows):
            source, spans = 0, EMPTY_SPANS
            if self.num_rows is None or row < self.num_rows:
                source, index = self.mix.interleave(row)
                spans = self.mix.packings[source](self.row_orders[source](index))
            bounds = np.concatenate([[0], (spans.ends - spans.begins).cumsum()])
            if bounds[-1]:
                tokens[b, : bounds[-1]] = self.mix.corpora[source].read(spans)
            begins.append(b * seq_len + finish_row(tokens[b], bounds, self.labels_across_documents))
        return PackedRows(tokens, np.concatenate(begins), tuple(rows))


def preview_row(batch: Batch, tokenizer: Tokenizer | None) -> str:
    """Returns about a line on how the first row of a batch begins: its text, or its tokens without a tokenizer."""
    ids = batch.tokens[0, :PREVIEW_CHARS].tolist()
    number = f"row {batch.rows[0]:,}" if batch.rows else "the next row"
    if tokenizer is None:
        return f"{number} begins with the tokens {' '.join(map(str, ids[: PREVIEW_CHARS // 4]))}"
    return f"{number} begins with {tokenizer.decode(ids)[:PREVIEW_CHARS]!r}"


def finish_row(tokens: np.ndarray, begins: np.ndarray, labels_across_documents: bool) -> np.ndarray:
    """Adds padding and marks tokens that are not labels, in place; returns where pieces begin, padding included.

    Args:
        tokens: (T + 1,) as in ``PackedRows``.
        begins: (pieces + 1,) where documents begin, from 0, and where the last one ends.
        labels_across_documents: whether the last token of a document predicts the first one of the next.
    """
    used = begins[-1]
    tokens[used:] = PADDING
    if not labels_across_documents:
        firsts = begins[(begins > 0) & (begins < used)]
        tokens[firsts] = mark_unlabeled(tokens[firsts])
    return begins[begins < len(tokens) - 1]  # the last token of a full row is only a label


@dataclass
class RankBatchSampler(Sampler[list[int]]):
    """Yields the global rows of one rank, one micro-batch at a time.

    Attributes:
        layout: how steps are divided over ranks and micro-batches.
        num_rows: number of global rows; the last step is completed with rows past them. None if they never end.
        first_row: first row of the first step.
        skipper: the rows that no step trains on.
        first_step: the first step.
    """

    layout: BatchLayout
    num_rows: int | None = None
    first_row: int = 0
    skipper: RowSkipper = field(default_factory=RowSkipper)
    first_step: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        row, step = self.first_row, self.first_step
        while self.num_rows is None or row < self.num_rows:
            count = self.layout.batch(step)
            for rows in self.layout.micro_batches(self.skipper.take(row, count)):
                yield list(rows)
            row, step = self.skipper.advance(row, count), step + 1


@dataclass
class StreamedRows:
    """Yields one rank's micro-batches of documents that arrive one after the other, packed as by ``stream``.

    The stream is read once: a row is known only after those before it.

    Attributes:
        documents: returns an iterator over (tokens of several documents back to back, length of each).
        layout: how steps are divided over ranks and micro-batches; all steps are as large as the first.
        first_row: rows of the stream to pass over.
        labels_across_documents: whether the last token of a document predicts the first one of the next.
    """

    documents: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    layout: BatchLayout
    first_row: int = 0
    labels_across_documents: bool = True

    def __iter__(self) -> Iterator[PackedRows]:
        seq_len, count = self.layout.seq_len, self.layout.batch(0)
        rows = islice(self.rows(), self.first_row, None)
        while step := list(islice(rows, count)):
            # Completes the last step with padding, so that every rank has as many batches.
            step += [self._row(np.empty(0, np.int32), np.empty(0, np.int64))] * (count - len(step))
            for batch in self.layout.micro_batches(step):
                tokens, begins = zip(*batch, strict=True)
                yield PackedRows(np.stack(tokens), np.concatenate([b * seq_len + row for b, row in enumerate(begins)]))

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields each row: its tokens (T + 1,) int32, padded if it is the last, and where its pieces begin."""
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

    def _row(self, content: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, used = np.empty(self.layout.seq_len + 1, np.int32), len(content)
        tokens[:used] = content
        begins = np.concatenate([[0], starts[starts > 0], [used]])
        return tokens, finish_row(tokens, begins, self.labels_across_documents)
