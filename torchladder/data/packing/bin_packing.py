"""Rows of whole documents: ``pad`` keeps their order, ``best_fit`` chooses neighbours that fill a row.

Both cut documents longer than a row into full rows and a tail, group what is no longer than a row, and never look at
tokens. Which pieces share a row is settled once per source, for all epochs, and kept in the cache; so every row is
found at once, in whichever epoch it lies.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torchladder.data.disk_cache import build_once
from torchladder.data.packing.shuffle import DocumentOrder
from torchladder.data.packing.spans import EMPTY_SPANS, Spans, register

BEST_FIT_HORIZON = 1 << 20
"""Pieces among which ``best_fit`` looks for neighbours; the next ones are packed on their own."""
FORMAT = 1
"""Raised when the same lengths would give other rows."""


class EpochRows(NamedTuple):
    """The rows of one epoch.

    Attributes:
        documents: (pieces,) int32, the document of each piece, row after row.
        begins: (pieces,) int64, the first token of each piece within its document.
        bounds: (rows + 1,) int64, where the pieces of each row begin, with their number at the end.
    """

    documents: np.ndarray
    begins: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True)
class BinPacking:
    """Rows of pieces that are no longer than a row, padded at the end; a subclass says which pieces share one."""

    lengths: np.ndarray
    seq_len: int
    order: DocumentOrder
    epochs: int | None = None
    cache: Path | None = None

    @property
    def rows(self) -> int | None:
        return None if self.epochs is None else self.epochs * self._count

    @property
    def epoch_rows(self) -> Fraction:
        return Fraction(self._count)

    @property
    def efficiency(self) -> float:
        return int(self.lengths.sum()) / (self._count * self.seq_len)

    def __call__(self, row: int) -> Spans:
        epoch, number = divmod(row, self._count)
        if self.epochs is not None and epoch >= self.epochs:
            return EMPTY_SPANS
        mine = slice(*self._rows.bounds[number : number + 2].tolist())
        documents, begins = self._rows.documents[mine].astype(np.int64), np.asarray(self._rows.begins[mine])
        # A document that goes on in another row lends its next token as the last label.
        return Spans(documents, begins, np.minimum(self.lengths[documents], begins + self.seq_len + (len(begins) == 1)))

    @abstractmethod
    def group(self, lengths: np.ndarray) -> np.ndarray:
        """Returns the row of each piece (pieces,) int64, rows counted from 0 without gaps.

        Args:
            lengths: (pieces,) int64 tokens in each piece, from 1 to ``seq_len``, in the order of the documents.
        """

    @property
    def _count(self) -> int:
        return len(self._rows.bounds) - 1

    @cached_property
    def _rows(self) -> EpochRows:
        if self.cache is None:
            return self._pack()
        facts = (FORMAT, type(self).__name__, self.seq_len, self.order, self.lengths.dtype.str)
        digest = hashlib.sha256(repr(facts).encode())
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
        pieces = -(-lengths // self.seq_len)  # of each document; none of an empty one
        documents = np.repeat(order.astype(np.int32), pieces)
        first = np.cumsum(pieces) - pieces
        begins = (np.arange(len(documents)) - np.repeat(first, pieces)) * self.seq_len
        row = self.group(np.minimum(np.repeat(lengths, pieces) - begins, self.seq_len))
        # Rows in the order of their first pieces, and the pieces of a row in the order of the documents.
        _, firsts = np.unique(row, return_index=True)
        row = np.argsort(np.argsort(firsts, kind="stable"), kind="stable")[row]
        by_row = np.argsort(row, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(row))])
        return EpochRows(documents[by_row], begins[by_row], bounds)


@register("pad")
class PadPacking(BinPacking):
    """Documents in their order, as many whole ones as fit a row; the rest of the row is padding (next fit)."""

    def group(self, lengths: np.ndarray) -> np.ndarray:
        ends = np.concatenate([[0], np.cumsum(lengths)])
        # Where the next row begins if one begins at this piece; the chain of these from piece 0 are the rows.
        follows = (np.searchsorted(ends, ends[:-1] + self.seq_len, side="right") - 1).tolist()
        starts, piece = np.zeros(len(lengths), np.int64), 0
        while piece < len(lengths):
            starts[piece] = 1
            piece = follows[piece]
        return np.cumsum(starts) - 1


@register("best_fit")
class BestFitPacking(BinPacking):
    """Documents grouped to fill rows: the longest first, each into the fullest row that has room for it.

    Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), within windows of
    2 ** 20 documents. Documents of one length are placed together, so the work grows with the lengths that occur.
    """

    def group(self, lengths: np.ndarray) -> np.ndarray:
        row, used = np.empty(len(lengths), np.int64), 0
        for begin in range(0, len(lengths), BEST_FIT_HORIZON):
            part = best_fit_decreasing(lengths[begin : begin + BEST_FIT_HORIZON], self.seq_len)
            row[begin : begin + BEST_FIT_HORIZON] = part + used
            used += int(part.max()) + 1
        return row


def best_fit_decreasing(lengths: np.ndarray, room: int) -> np.ndarray:
    """Returns the bin of each piece (pieces,) int64, bins counted from 0 without gaps.

    Args:
        lengths: (pieces,) from 1 to ``room``.
        room: what a bin holds.
    """
    bins = np.empty(len(lengths), np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # by the room left
    some = np.zeros(room + 1, bool)  # whether there are open bins with that much room
    count = 0
    for length, pieces in _by_length(lengths):
        while len(pieces):
            left = length + int(some[length:].argmax())
            if some[left]:
                candidates = np.concatenate(open_bins.pop(left))
                some[left] = False
            else:
                left = room
                candidates = np.arange(count, count - (-len(pieces) // (room // length)))
                count += len(candidates)
            # The bins with the least room come first, and each stays first until it has no room for another piece.
            each = left // length
            chosen = np.repeat(candidates[: -(-len(pieces) // each)], each)[: len(pieces)]
            bins[pieces[: len(chosen)]] = chosen
            pieces = pieces[len(chosen) :]
            full, rest = divmod(len(chosen), each)
            groups = [(left - each * length, candidates[:full]), (left - rest * length, candidates[full : full + 1])]
            groups = groups if rest else groups[:1]
            groups.append((left, candidates[full + bool(rest) :]))
            for remaining, group in groups:
                if remaining and len(group):
                    open_bins.setdefault(remaining, []).append(group)
                    some[remaining] = True
    return bins


def _by_length(lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each length, the longest first, with the places where it occurs."""
    by_length = np.argsort(-lengths, kind="stable")
    values, firsts = np.unique(-lengths[by_length], return_index=True)
    for value, places in zip(values.tolist(), np.split(by_length, firsts[1:]), strict=True):
        yield -value, places
