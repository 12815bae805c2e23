"""``pad`` and ``best_fit``: rows of whole documents, padded at the end.

Both cut a document longer than a row into full rows and a tail, then assign pieces to rows by their lengths alone.
Which pieces share a row is computed once per source, for all epochs, and cached, so any row of any epoch is found at
once.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torchladder.data.disk_cache import build_once
from torchladder.data.packing.shuffle import DocumentOrder
from torchladder.data.packing.spans import EMPTY_SPANS, Spans, register

BEST_FIT_HORIZON_PIECES = 1 << 20
"""``best_fit`` packs this many pieces together, then the next ones separately."""
PACKING_VERSION = 1
"""Increment when the same lengths produce other rows."""


class EpochRows(NamedTuple):
    """The pieces of an epoch, row after row.

    Attributes:
        documents: (pieces,) int32, the document of each piece.
        begins: (pieces,) int64, the first token of each piece within its document.
        bounds: (rows + 1,) int64, the first piece of each row, and the number of pieces.
    """

    documents: np.ndarray
    begins: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True)
class BinPacking:
    """Rows of pieces no longer than a row, padded at the end; a subclass decides which pieces share a row."""

    lengths: np.ndarray
    seq_len: int
    order: DocumentOrder
    epochs: int | None = None
    cache: Path | None = None

    @property
    def num_rows(self) -> int | None:
        return None if self.epochs is None else self.epochs * self._num_epoch_rows

    @property
    def rows_per_epoch(self) -> Fraction:
        return Fraction(self._num_epoch_rows)

    @property
    def efficiency(self) -> float:
        return int(self.lengths.sum()) / (self._num_epoch_rows * self.seq_len)

    def __call__(self, row: int) -> Spans:
        epoch, number = divmod(row, self._num_epoch_rows)
        if self.epochs is not None and epoch >= self.epochs:
            return EMPTY_SPANS
        pieces = slice(*self._rows.bounds[number : number + 2].tolist())
        documents, begins = self._rows.documents[pieces].astype(np.int64), np.asarray(self._rows.begins[pieces])
        # The last label of a full row is the first token of the document's next piece.
        return Spans(documents, begins, np.minimum(self.lengths[documents], begins + self.seq_len + (len(begins) == 1)))

    @abstractmethod
    def assign_rows(self, lengths: np.ndarray) -> np.ndarray:
        """Returns the row of each piece, (pieces,) int64; rows are numbered from 0 without gaps.

        Args:
            lengths: (pieces,) int64, 1 to ``seq_len`` tokens each, in the order of the documents.
        """

    @property
    def _num_epoch_rows(self) -> int:
        return len(self._rows.bounds) - 1

    @cached_property
    def _rows(self) -> EpochRows:
        if self.cache is None:
            return self._pack()
        settings = (PACKING_VERSION, type(self).__name__, self.seq_len, self.order, self.lengths.dtype.str)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(np.ascontiguousarray(self.lengths).data)

        def build(folder: Path) -> None:
            folder.mkdir()
            for name, values in self._pack()._asdict().items():
                np.save(folder / f"{name}.npy", values)

        folder = build_once(self.cache / "packings" / digest.hexdigest()[:32], build)
        return EpochRows(*(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in EpochRows._fields))

    def _pack(self) -> EpochRows:
        order = self.order(0)
        lengths = self.lengths[order]
        num_pieces = -(-lengths // self.seq_len)  # of each document; 0 of an empty one
        documents = np.repeat(order.astype(np.int32), num_pieces)
        first = np.cumsum(num_pieces) - num_pieces
        begins = (np.arange(len(documents)) - np.repeat(first, num_pieces)) * self.seq_len
        row = self.assign_rows(np.minimum(np.repeat(lengths, num_pieces) - begins, self.seq_len))
        # Sort rows by their first piece, and the pieces of a row by the order of the documents.
        _, firsts = np.unique(row, return_index=True)
        row = np.argsort(np.argsort(firsts, kind="stable"), kind="stable")[row]
        by_row = np.argsort(row, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(row))])
        return EpochRows(documents[by_row], begins[by_row], bounds)


@register("pad")
class PadPacking(BinPacking):
    """Keeps the order of the documents: as many whole ones as fit in a row, then padding (next fit)."""

    def assign_rows(self, lengths: np.ndarray) -> np.ndarray:
        ends = np.concatenate([[0], np.cumsum(lengths)])
        # If a row begins at piece i, the next one begins at next_begin[i]. Piece 0 leads to all rows.
        next_begin = (np.searchsorted(ends, ends[:-1] + self.seq_len, side="right") - 1).tolist()
        begins_row, piece = np.zeros(len(lengths), np.int64), 0
        while piece < len(lengths):
            begins_row[piece] = 1
            piece = next_begin[piece]
        return np.cumsum(begins_row) - 1


@register("best_fit")
class BestFitPacking(BinPacking):
    """Groups documents that fill rows: the longest first, each into the fullest row with enough space.

    Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), within
    ``BEST_FIT_HORIZON_PIECES`` pieces at a time.
    """

    def assign_rows(self, lengths: np.ndarray) -> np.ndarray:
        row, used = np.empty(len(lengths), np.int64), 0
        for begin in range(0, len(lengths), BEST_FIT_HORIZON_PIECES):
            horizon = slice(begin, begin + BEST_FIT_HORIZON_PIECES)
            row[horizon] = best_fit_decreasing(lengths[horizon], self.seq_len) + used
            used = int(row[horizon].max()) + 1
        return row


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the bin of each piece, (pieces,) int64; bins are numbered from 0 without gaps.

    Best-fit decreasing puts one piece at a time, the longest first, into the bin with the least space that still has
    room for it. In Python that is slow for millions of pieces, but there are only as many distinct lengths as tokens in
    a row. So bins are grouped by the space left in them, and all pieces of one length are placed together: a bin that
    receives a piece has even less space than the others, hence receives the next ones too, until it has no room.

    Example, capacity 10 and lengths 6 6 3 3 3 2:

    ========  ====================================================  =================
    length    placed in                                             space left in bins
    ========  ====================================================  =================
    6 (two)   two new bins, one piece each                          4 4
    3 (three) the bins with space 4, one piece each; then a new one  1 1 7
    2 (one)   the bin with space 7                                  1 1 5
    ========  ====================================================  =================

    Args:
        lengths: (pieces,) from 1 to ``capacity``.
        capacity: size of a bin.
    """
    bins = np.empty(len(lengths), np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # space left -> bins
    has_bins = np.zeros(capacity + 1, bool)  # whether open_bins has an entry for a space
    count = 0
    by_length = np.argsort(-lengths, kind="stable")
    values, firsts = np.unique(-lengths[by_length], return_index=True)
    for length, pieces in zip((-values).tolist(), np.split(by_length, firsts[1:]), strict=True):
        while len(pieces):
            space = length + int(has_bins[length:].argmax())  # the least that is enough
            if has_bins[space]:
                candidates = np.concatenate(open_bins.pop(space))
                has_bins[space] = False
            else:
                space = capacity
                candidates = np.arange(count, count - (-len(pieces) // (capacity // length)))
                count += len(candidates)
            per_bin = space // length
            chosen = np.repeat(candidates[: -(-len(pieces) // per_bin)], per_bin)[: len(pieces)]
            bins[pieces[: len(chosen)]] = chosen
            pieces = pieces[len(chosen) :]
            full, rest = divmod(len(chosen), per_bin)
            for left, group in (
                (space - per_bin * length, candidates[:full]),
                (space - rest * length, candidates[full : full + 1]),  # received the last few pieces
                (space, candidates[full + 1 :]),
            ):
                if left and len(group):
                    open_bins.setdefault(left, []).append(group)
                    has_bins[left] = True
    return bins
