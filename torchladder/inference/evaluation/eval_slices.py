"""Documents to windows: what a model reads at once, and which tokens it is asked for there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchladder.registry import ConfigError

BUFFER = 1 << 14
"""Windows that are sorted by length: neighbours of like length make a batch, and the plan stays small."""


class SliceBatch(NamedTuple):
    """Windows that are read side by side.

    Attributes:
        documents: (windows,) int64, the document of each.
        begins: (windows,) int64, the first token that it reads within its document.
        ends: (windows,) int64, one past the last token that it reads: the token there is the last to be predicted.
        seen: (windows,) int64, at how many of its places an earlier window has predicted the next token.
    """

    documents: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    seen: np.ndarray


@dataclass(frozen=True)
class EvalSlices:
    """How documents are cut: every token but a document's first is predicted once.

    Attributes:
        context: tokens that a window reads at most.
        stride: tokens from the beginning of a window to that of the next one in the document.

    Raises:
        ConfigError: they cannot be.
    """

    context: int
    stride: int

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"a context of {self.context} tokens: it is 1 at least.")
        if not 1 <= self.stride <= self.context:
            raise ConfigError(
                f"a stride of {self.stride} tokens: it is from 1 to the context ({self.context}), "
                "so that no token is left out."
            )

    def tokens(self, lengths: np.ndarray) -> int:
        """Returns how many tokens all windows of documents of those lengths read."""
        labels = _labels(lengths)
        counts = self._counts(labels)
        return int((labels + (counts - 1).clip(0) * (self.context - self.stride)).sum())

    def batches(self, lengths: np.ndarray, budget: int) -> Iterator[SliceBatch]:
        """Yields all windows of documents, each with others of about its length.

        Args:
            lengths: (documents,) tokens in each document.
            budget: places in a batch, the longest window times the windows; one window may be longer.
        """
        labels = _labels(lengths)
        counts = self._counts(labels)
        ends = counts.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        for first in range(0, total, BUFFER):
            window = np.arange(first, min(first + BUFFER, total))
            document = np.searchsorted(ends, window, side="right")
            number = window - (ends - counts)[document]
            begin = number * self.stride
            end = np.minimum(begin + self.context, labels[document])
            found = SliceBatch(document, begin, end, np.where(number, self.context - self.stride, 0))
            order = np.argsort(begin - end, kind="stable")  # longest first
            at = 0
            while at < len(order):
                longest = int((end - begin)[order[at]])
                some = order[at : at + max(budget // longest, 1)]
                yield SliceBatch(*(part[some] for part in found))
                at += len(some)

    def _counts(self, labels: np.ndarray) -> np.ndarray:
        """Returns how many windows each document has."""
        return np.where(labels > 0, 1 - (self.context - labels).clip(max=0) // self.stride, 0)


def _labels(lengths: np.ndarray) -> np.ndarray:
    """Returns how many tokens of each document can be predicted: all but the first."""
    return (np.asarray(lengths, dtype=np.int64) - 1).clip(0)
