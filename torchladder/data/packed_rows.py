"""Global rows: a map-style dataset that makes any of them, and the sampler that tells a rank which are its own.

Copying is what a micro-batch costs, most of all between processes: a worker sends 4 bytes a token, not 20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from torchladder.data.corpus import Corpus
from torchladder.data.dataloader import IGNORE_INDEX, Batch
from torchladder.data.packing.spans import EMPTY_SPANS, Packing
from torchladder.data.row_skipping import RowSkipper
from torchladder.registry import ConfigError


@dataclass(frozen=True, eq=False)
class PackedRows:
    """What a micro-batch follows from, in a fifth of its bytes: this is what a worker sends.

    It holds arrays, which go through a pipe. Tensors would go through shared memory, each with a file and a connection
    of its own, at a third of the rate.

    Attributes:
        tokens: (B, T + 1) int32, the last one only a label. One that nobody is to predict is ``~token``, padding ~0.
        begins: (pieces,) int64, where documents, rows and padding begin among the B * T places.
        rows: the global row of each; empty where the loader numbers none.
    """

    tokens: np.ndarray
    begins: np.ndarray
    rows: tuple[int, ...] = ()

    def batch(self) -> Batch:
        """Returns the micro-batch."""
        content = torch.from_numpy(self.tokens)
        tokens, labels = content[:, :-1].long(), content[:, 1:].long()
        if self.tokens.min() < 0:
            tokens ^= tokens >> 63  # ~ of what is below 0
            labels.masked_fill_(labels < 0, IGNORE_INDEX)
        places = np.arange(tokens.numel(), dtype=np.int32)
        places -= self.begins.astype(np.int32).repeat(np.diff(self.begins, append=len(places)))
        return Batch(tokens, labels, torch.from_numpy(places).view(tokens.shape), self.rows)

    def pin_memory(self) -> Batch:
        """Returns the micro-batch in pinned memory; the thread that pins it calls this."""
        return self.batch().pin_memory()


@dataclass(eq=False)
class RowDataset(Dataset[PackedRows]):
    """Makes micro-batches of global rows. Row ``r`` is the same whoever asks for it, whenever, in any order.

    Attributes:
        corpora: tokens of each source.
        packings: rows of each source.
        orders: for each source, which row of the packing stands at a row.
        mixture: which source a global row comes from, and which of its rows it is.
        seq_len: tokens in a row.
        across: whether the last token of a document predicts the first one of the next.
        count: global rows there are; rows from there on are padding. None without end.
    """

    corpora: Sequence[Corpus]
    packings: Sequence[Packing]
    orders: Sequence[Callable[[int], int]]
    mixture: Callable[[int], tuple[int, int]]
    seq_len: int
    across: bool = True
    count: int | None = None

    def __getitem__(self, rows: list[int]) -> PackedRows:
        tokens = np.empty((len(rows), self.seq_len + 1), np.int32)
        begins = [b * self.seq_len + self._fill(row, tokens[b]) for b, row in enumerate(rows)]
        return PackedRows(tokens, np.concatenate(begins), tuple(rows))

    def _fill(self, row: int, tokens: np.ndarray) -> np.ndarray:
        """Writes one row (T + 1,), returns where its pieces begin."""
        source, spans = 0, EMPTY_SPANS
        if self.count is None or row < self.count:
            source, index = self.mixture(row)
            spans = self.packings[source](self.orders[source](index))
        begins = np.concatenate([[0], (spans.ends - spans.begins).cumsum()])
        used = int(begins[-1])
        if used:
            tokens[:used] = self.corpora[source].read(spans)
        return finish_row(tokens, begins, self.across)


def finish_row(tokens: np.ndarray, begins: np.ndarray, across: bool) -> np.ndarray:
    """Completes a row in place; returns where its pieces begin, padding among them.

    Args:
        tokens: (T + 1,) as in ``Content``.
        begins: (pieces + 1,) where documents begin, from 0, and behind them where they end.
        across: whether the last token of a document predicts the first one of the next.
    """
    used = begins[-1]
    tokens[used:] = ~0
    if not across:
        firsts = begins[(begins > 0) & (begins < used)]
        tokens[firsts] = np.minimum(tokens[firsts], ~tokens[firsts])
    return begins[begins < len(tokens) - 1]  # the last token of a full row is only a label


@dataclass
class RankBatchSampler(Sampler[list[int]]):
    """Yields one rank's rows, a micro-batch at a time: of every global batch its contiguous share.

    Attributes:
        rank: data-parallel rank.
        degree: number of ranks.
        local: rows in a micro-batch.
        batch: rows in a global batch.
        count: rows there are; the last global batch is completed with rows past them. None without end.
        first: first row of the first global batch.
        skipping: the rows that no batch has.
    """

    rank: int
    degree: int
    local: int
    batch: int
    count: int | None = None
    first: int = 0
    skipping: RowSkipper = field(default_factory=RowSkipper)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.degree
        start = self.first
        while self.count is None or start < self.count:
            rows = self.skipping.take(start, self.batch)
            mine = rows[self.rank * share : (self.rank + 1) * share]
            for first in range(0, share, self.local):
                yield mine[first : first + self.local]
            start = self.skipping.after(start, self.batch)


def check_division(seq_len: int, rank: int, degree: int, local: int, batch: int) -> None:
    """Checks how rows are divided over ranks and micro-batches.

    Raises:
        ConfigError: they do not divide, or a number is too small.
    """
    named = {"seq_len": seq_len, "dp_degree": degree, "local_batch_size": local, "global_batch_size": batch}
    for name, value in named.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it is 1 at least.")
    if not 0 <= rank < degree:
        raise ConfigError(f"dp_rank is {rank}; it is from 0 to {degree - 1}.")
    if batch % (degree * local):
        raise ConfigError(
            f"global_batch_size {batch} is not a multiple of {degree} data-parallel ranks "
            f"times local_batch_size {local}."
        )
