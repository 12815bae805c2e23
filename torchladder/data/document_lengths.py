"""How much context documents give, from their lengths alone.

The *effective context* of a token is the number of tokens that it sees in its document, itself included: its place in
the document, counted from 1, or the limit of the context if that is less.
"""

from __future__ import annotations

import numpy as np

CONTEXTS = tuple(1 << power for power in range(10, 18))
"""1K, 2K, ..., 128K tokens."""


def long_share(lengths: np.ndarray, limit: int) -> float:
    """Returns the fraction of all tokens that are in documents of more than ``limit`` tokens; 0 without tokens."""
    return float(lengths[lengths > limit].sum() / max(lengths.sum(), 1))


def mean_effective_context(lengths: np.ndarray, limit: int) -> float:
    """Returns the mean effective context of all tokens; 0 without tokens.

    Args:
        lengths: (documents,) tokens in each document.
        limit: tokens that a token can see, itself included.
    """
    lengths = lengths.astype(np.float64)  # exact up to 2**53 pairs of a document
    limited = np.minimum(lengths, limit)
    pairs = limited * (limited + 1) / 2 + (lengths - limited) * limit
    return float(pairs.sum() / max(lengths.sum(), 1))
