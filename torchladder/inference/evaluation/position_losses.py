"""Adds up losses by position or distance, so that tokens with a short and with a long context can be reported apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class LossSum(NamedTuple):
    """The loss of ``tokens`` tokens, summed, in nats."""

    loss: float
    tokens: int

    @property
    def mean(self) -> float | None:
        """Nats per token, None without tokens."""
        return self.loss / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp(mean), infinity if that overflows a float, None without tokens."""
        with np.errstate(over="ignore"):
            return None if self.mean is None else float(np.exp(self.mean))

    def bits_per_byte(self, size: int | None) -> float | None:
        """Returns the bits per byte of a text of ``size`` bytes, None if the size is unknown."""
        return self.loss / math.log(2) / size if size and self.tokens else None


class PositionLosses:
    """Sums of losses by position p in a slice, where the model has read p + 1 tokens; or by distance, the position in
    the document.

    Args:
        size: number of positions.
    """

    def __init__(self, size: int) -> None:
        self._losses = np.zeros(size)
        self._tokens = np.zeros(size, dtype=np.int64)

    def add(self, losses: np.ndarray, tokens: np.ndarray) -> None:
        """Adds the losses (positions,) and the numbers of tokens (positions,), from position 0."""
        self._losses[: len(losses)] += losses
        self._tokens[: len(tokens)] += tokens

    def add_at(self, positions: np.ndarray, losses: np.ndarray) -> None:
        """Adds the losses (n,) of tokens at positions (n,), which may repeat."""
        np.add.at(self._losses, positions, losses)
        np.add.at(self._tokens, positions, 1)

    def total(self, first: int = 0, last: int | None = None) -> LossSum:
        """Returns the sum over the positions from ``first`` to ``last``, inclusive."""
        positions = slice(first, None if last is None else last + 1)
        return LossSum(float(self._losses[positions].sum()), int(self._tokens[positions].sum()))


def position_buckets(size: int) -> list[tuple[int, int]]:
    """Returns the first and last position of each bucket: 0, 1, 2-3, 4-7, ..., up to ``size - 1``."""
    firsts = [0, *(1 << power for power in range((size - 1).bit_length()))]
    return [(first, min(max(2 * first - 1, 0), size - 1)) for first in firsts]
