"""Losses, added up by position: the loss of all tokens, and of those with little or much before them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Total(NamedTuple):
    """The losses of some tokens.

    Attributes:
        loss: their sum in nats.
        tokens: how many there are.
    """

    loss: float
    tokens: int

    @property
    def mean(self) -> float | None:
        """Nats per token; None of no tokens."""
        return self.loss / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """e to the power of the mean; None of no tokens."""
        return None if self.mean is None else exp(self.mean)

    def bits_per_byte(self, size: int | None) -> float | None:
        """Returns the sum in bits over the bytes of the text; None where nobody knows of any."""
        return self.loss / math.log(2) / size if size and self.tokens else None


class Scores:
    """Losses by position: the place in its window at which a model has read the last token before the predicted one.

    Args:
        context: positions there are.
    """

    def __init__(self, context: int) -> None:
        self._losses = np.zeros(context)
        self._tokens = np.zeros(context, dtype=np.int64)

    def add(self, losses: np.ndarray, tokens: np.ndarray) -> None:
        """Adds sums of losses and numbers of tokens (positions,), from position 0."""
        self._losses[: len(losses)] += losses
        self._tokens[: len(tokens)] += tokens

    def total(self, first: int = 0, last: int | None = None) -> Total:
        """Returns the losses of the positions from first to last."""
        some = slice(first, None if last is None else last + 1)
        return Total(float(self._losses[some].sum()), int(self._tokens[some].sum()))


def buckets(context: int) -> list[tuple[int, int]]:
    """Returns the first and the last position of each bucket: 0, 1, 2-3, 4-7, and so on to the end of the context."""
    firsts = [0, *(1 << power for power in range((context - 1).bit_length()))]
    return [(first, min(max(2 * first - 1, 0), context - 1)) for first in firsts]


def exp(x: float) -> float:
    """Returns e to the power of x, infinity where that is too large for a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
