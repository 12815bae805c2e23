"""Makes micro-batches of global rows: a map-style dataset of rows, and the sampler of one rank's share of them.

The cost of a micro-batch is copying it, above all between processes: a worker sends 4 bytes per token instead of 20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from torchladder.data.dataloader import Batch
from torchladder.data.mixing.source_mix import SourceMix
from torchladder.data.packing.spans import EMPTY_SPANS
from torchladder.data.row_skipping import RowSkipper
from torchladder.data.unlabeled_tokens import PADDING, mark_unlabeled, split_labels
from torchladder.registry import ConfigError

Row = TypeVar("Row")


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a step are divided over data-parallel ranks and micro-batches.

    Attributes:
        seq_len: tokens in a row.
        dp_rank: this data-parallel rank.
        dp_degree: number of data-parallel ranks.
        local_batch_size: rows in a micro-batch.
        global_batch_size: rows in a step, over all ranks.

    Raises:
        ConfigError: the sizes do not divide, or a number is out of range.
    """

    seq_len: int
    dp_rank: int
    dp_degree: int
    local_batch_size: int
    global_batch_size: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "dp_rank" and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more.")
        if not 0 <= self.dp_rank < self.dp_degree:
            raise ConfigError(f"dp_rank is {self.dp_rank}; it must be from 0 to {self.dp_degree - 1}.")
        if self.global_batch_size % (self.dp_degree * self.local_batch_size):
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of {self.dp_degree} data-parallel ranks "
                f"times local_batch_size {self.local_batch_size}."
            )

    @property
    def rows_per_rank(self) -> int:
        """Rows of each rank in a step."""
        return self.global_batch_size // self.dp_degree

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of each rank in a step."""
        return self.rows_per_rank // self.local_batch_size

    def micro_batches(self, step: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Yields this rank's contiguous share of the rows of a step, one micro-batch at a time."""
        first = self.dp_rank * self.rows_per_rank
        for row in range(first, first + self.rows_per_rank, self.local_batch_size):
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
        """Returns the micro-batch."""
        tokens, labels = split_labels(torch.from_numpy(self.tokens))
        positions = np.arange(tokens.numel(), dtype=np.int32)
        positions -= self.begins.astype(np.int32).repeat(np.diff(self.begins, append=len(positions)))
        return Batch(tokens, labels, torch.from_numpy(positions).view(tokens.shape), self.rows)

    def pin_memory(self) -> Batch:
        """Returns the micro-batch in pinned memory; called by the data loader's pinning thread."""
        return self.to_batch().pin_memory()


@dataclass(eq=False)
class RowDataset(Dataset[PackedRows]):
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

    def __getitem__(self, rows: list[int]) -> PackedRows:
        seq_len = self.mix.seq_len
        tokens = np.empty((len(rows), seq_len + 1), np.int32)
        begins = [b * seq_len + self._fill_row(row, tokens[b]) for b, row in enumerate(rows)]
        return PackedRows(tokens, np.concatenate(begins), tuple(rows))

    def _fill_row(self, row: int, tokens: np.ndarray) -> np.ndarray:
        """Writes the tokens of a row (T + 1,); returns where its pieces begin."""
        source, spans = 0, EMPTY_SPANS
        if self.num_rows is None or row < self.num_rows:
            source, index = self.mix.interleave(row)
            spans = self.mix.packings[source](self.row_orders[source](index))
        begins = np.concatenate([[0], (spans.ends - spans.begins).cumsum()])
        used = int(begins[-1])
        if used:
            tokens[:used] = self.mix.corpora[source].read(spans)
        return finish_row(tokens, begins, self.labels_across_documents)


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
    """

    layout: BatchLayout
    num_rows: int | None = None
    first_row: int = 0
    skipper: RowSkipper = field(default_factory=RowSkipper)

    def __iter__(self) -> Iterator[list[int]]:
        row, count = self.first_row, self.layout.global_batch_size
        while self.num_rows is None or row < self.num_rows:
            for rows in self.layout.micro_batches(self.skipper.take(row, count)):
                yield list(rows)
            row = self.skipper.advance(row, count)
