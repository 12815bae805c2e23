"""Cuts documents into slices: the tokens that a model reads at once, and those that it predicts from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchladder.registry import require

SORTED_SLICES = 1 << 14
"""Slices that are sorted by length together, so that batches have similar lengths and memory stays bounded."""


class SliceBatch(NamedTuple):
    """Slices that are read as one batch.

    Attributes:
        documents: (slices,) int64, the document of each.
        begins: (slices,) int64, its first token within the document.
        ends: (slices,) int64, one past the last token that it reads; the token there is the last that it predicts.
        overlaps: (slices,) int64, leading positions whose next token an earlier slice predicts.
    """

    documents: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    overlaps: np.ndarray


@dataclass(frozen=True)
class EvalSlices:
    """How documents are cut. Each token is predicted once, except for the first of a document.

    A document of 8 tokens with a context of 4 and a stride of 2 has the slices 0-3, 2-5 and 4-6, which predict the
    tokens 1-4, 5-6 and 7: the first two positions of the second and of the third overlap with the slice before.

    Attributes:
        context: tokens in a slice, at most.
        stride: tokens from the beginning of a slice to the beginning of the next.

    Raises:
        ConfigError: the context is below 1, or the stride is not from 1 to the context.
    """

    context: int
    stride: int

    def __post_init__(self) -> None:
        require(self.context >= 1, f"a context of {self.context} tokens: must be 1 or more.")
        require(
            1 <= self.stride <= self.context,
            f"a stride of {self.stride} tokens: must be from 1 to the context ({self.context}); a larger one would "
            "skip tokens.",
        )

    def count_tokens(self, lengths: np.ndarray) -> int:
        """Returns the tokens in all slices of documents with these lengths."""
        labels = _count_labels(lengths)
        counts = self._count_slices(labels)
        return int((labels + (counts - 1).clip(0) * (self.context - self.stride)).sum())

    def batches(self, lengths: np.ndarray, batch_tokens: int) -> Iterator[SliceBatch]:
        """Yields all slices of the documents in batches of similar lengths, the longest slice first.

        Args:
            lengths: (documents,) tokens in each document.
            batch_tokens: maximum of slices times the longest of them; a single slice may be longer.
        """
        labels = _count_labels(lengths)
        counts = self._count_slices(labels)
        ends = counts.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        for first in range(0, total, SORTED_SLICES):
            slices = np.arange(first, min(first + SORTED_SLICES, total))
            documents = np.searchsorted(ends, slices, side="right")
            number = slices - (ends - counts)[documents]  # within the document
            begins = number * self.stride
            stops = np.minimum(begins + self.context, labels[documents])
            found = SliceBatch(documents, begins, stops, np.where(number, self.context - self.stride, 0))
            order = np.argsort(begins - stops, kind="stable")  # longest first
            while len(order):
                rows = max(batch_tokens // int((stops - begins)[order[0]]), 1)
                yield SliceBatch(*(column[order[:rows]] for column in found))
                order = order[rows:]

    def _count_slices(self, labels: np.ndarray) -> np.ndarray:
        """Returns the number of slices of each document."""
        return np.where(labels > 0, 1 - (self.context - labels).clip(max=0) // self.stride, 0)


def _count_labels(lengths: np.ndarray) -> np.ndarray:
    """Returns the tokens of each document that can be predicted: all but the first."""
    return (np.asarray(lengths, dtype=np.int64) - 1).clip(0)
