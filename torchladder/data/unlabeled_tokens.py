"""Tokens without a label: one array holds the tokens and which of them are predicted.

A token ``t`` that no position predicts (a prompt, the first token of a document, padding) is stored as ``~t``, which is
``-t - 1`` and so below 0::

    tokens   5  7  0  9      stored   ~5  7  ~0  9   =   -6  7  -1  9
    labels   -  7  -  9
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchladder.data.dataloader import IGNORE_INDEX

PADDING = ~0
"""Token 0 without a label."""


def mark_unlabeled(tokens: np.ndarray) -> np.ndarray:
    """Returns tokens of any signed type without their labels; tokens that have none already stay as they are."""
    return np.minimum(tokens, ~tokens)


def split_labels(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the tokens and labels of stored rows, both (B, T) int64; -100 where the next token has no label.

    Args:
        marked: (B, T + 1), any signed type.
    """
    tokens, labels = (part.to(torch.int64, copy=True) for part in (marked[:, :-1], marked[:, 1:]))
    if marked.min() < 0:
        tokens ^= tokens >> 63  # -1 below 0, so ~token becomes token
        labels.masked_fill_(labels < 0, IGNORE_INDEX)
    return tokens, labels
