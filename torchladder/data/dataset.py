"""Global rows: a map-style dataset that makes any of them, and the sampler that tells a rank which are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from torchladder.data.base import IGNORED, Batch
from torchladder.data.corpus import Corpus
from torchladder.data.packing.base import NOTHING, Packing
from torchladder.data.skipping import Skipping


@dataclass(eq=False)
class Rows(Dataset[Batch]):
    """Makes batches of global rows. Row ``r`` is the same whoever asks for it, whenever, in any order.

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

    def __getitem__(self, rows: list[int]) -> Batch:
        shape = (len(rows), self.seq_len)
        tokens, labels, positions = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int32)
        for b, row in enumerate(rows):
            self._fill(row, tokens[b], labels[b], positions[b])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(positions), tuple(rows))

    def _fill(self, row: int, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> None:
        """Writes one row; what is padding is a piece of its own, without labels."""
        source, spans = 0, NOTHING
        if self.count is None or row < self.count:
            source, index = self.mixture(row)
            spans = self.packings[source](self.orders[source](index))
        lengths = spans.ends - spans.begins
        ends = lengths.cumsum()
        content = self.corpora[source].read(spans) if len(lengths) else lengths
        used, told = min(len(content), self.seq_len), max(len(content) - 1, 0)

        tokens[:used], tokens[used:] = content[:used], 0
        labels[:told], labels[told:] = content[1:], IGNORED
        if not self.across:
            labels[ends[(ends > 0) & (ends < len(content))] - 1] = IGNORED
        if content.dtype.kind == "i" and len(content) and content.min() < 0:  # a token that nobody is to predict
            np.copyto(tokens, ~tokens, where=tokens < 0)
            labels[:told][content[1:] < 0] = IGNORED

        # Each token's distance from the start of its piece; the last token of a full row is only a label.
        starts = (ends - lengths).astype(np.int32).repeat(lengths)
        np.subtract(self._places[:used], starts[:used], out=positions[:used])
        positions[used:] = self._places[: self.seq_len - used]

    @cached_property
    def _places(self) -> np.ndarray:
        return np.arange(self.seq_len, dtype=np.int32)


@dataclass
class RankRows(Sampler[list[int]]):
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
    skipping: Skipping = field(default_factory=Skipping)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.degree
        start = self.first
        while self.count is None or start < self.count:
            rows = self.skipping.take(start, self.batch)
            mine = rows[self.rank * share : (self.rank + 1) * share]
            for first in range(0, share, self.local):
                yield mine[first : first + self.local]
            start = self.skipping.after(start, self.batch)
