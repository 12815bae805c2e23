"""Global rows: a map-style dataset that makes any of them, and the sampler that tells a rank which are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from torchladder.data.base import IGNORED, Batch
from torchladder.data.corpus import Corpus
from torchladder.data.mixture import Mixture
from torchladder.data.packing import Spans


class Rows(Dataset[Batch]):
    """Makes batches of global rows. Row ``r`` is the same whoever asks for it, whenever, in any order.

    Args:
        corpora: tokens of each source.
        packings: rows of each source, in the order in which they are read.
        mixture: which source a global row comes from.
        seq_len: tokens in a row.
        count: global rows there are; rows from there on are padding. None without end.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        packings: Sequence[Callable[[int], Spans]],
        mixture: Mixture,
        seq_len: int,
        count: int | None = None,
    ) -> None:
        self.corpora = corpora
        self.packings = packings
        self.mixture = mixture
        self.seq_len = seq_len
        self.count = count

    def __getitem__(self, rows: list[int]) -> Batch:
        shape = (len(rows), self.seq_len)
        tokens = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        positions = np.empty(shape, np.int32)
        for b, row in enumerate(rows):
            self._fill(row, tokens[b], labels[b], positions[b])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(positions))

    def _fill(self, row: int, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> None:
        """Writes one row over padding; what stays padding is a piece of its own, without labels."""
        starts, used = np.zeros(1, np.int64), 0
        if self.count is None or row < self.count:
            source, index = self.mixture(row)
            spans = self.packings[source](index)
            content = self.corpora[source].read(spans)
            used = min(len(content), self.seq_len)
            tokens[:used] = content[: self.seq_len]
            labels[: len(content) - 1] = content[1:]
            starts = np.concatenate([[0], np.cumsum(spans.ends - spans.begins)])
        # Each token's distance from the start of its piece; the last token of a full row is only a label.
        starts = np.append(starts[starts < used], [used, self.seq_len] if used < self.seq_len else self.seq_len)
        positions[:] = np.arange(self.seq_len) - np.repeat(starts[:-1], np.diff(starts))


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
    """

    rank: int
    degree: int
    local: int
    batch: int
    count: int | None = None
    first: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.degree
        start = self.first
        while self.count is None or start < self.count:
            mine = start + self.rank * share
            for row in range(mine, mine + share, self.local):
                yield list(range(row, row + self.local))
            start += self.batch
