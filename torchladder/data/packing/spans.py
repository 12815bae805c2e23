"""Rows out of documents: which spans of which documents make up row ``n`` of one source.

A packing sees lengths, never tokens, and answers for any row without having seen another: it is a pure function of the
lengths, the seed and ``n``. An order gives it the documents of each epoch.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from torchladder.registry import Registry


class Spans(NamedTuple):
    """The content of a row, piece after piece.

    Attributes:
        documents: (pieces,) int64, the document each piece is cut from.
        begins: (pieces,) int64, its first token within the document.
        ends: (pieces,) int64, one past its last token.
    """

    documents: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


EMPTY_SPANS = Spans(*(np.empty(0, np.int64) for _ in range(3)))
"""The content of a row that is all padding."""


class Packing(Protocol):
    """Rows of one source.

    Attributes:
        rows: how many rows there are, None when they never end.
        epoch_rows: rows that read every document once.
        efficiency: the share of a row's places that hold tokens.
    """

    @property
    def rows(self) -> int | None: ...

    @property
    def epoch_rows(self) -> Fraction: ...

    @property
    def efficiency(self) -> float: ...

    def __call__(self, row: int) -> Spans:
        """Returns the spans of row ``row``: ``seq_len + 1`` tokens at most, the last only a label; past the end 0."""
        ...


registry: Registry[Packing] = Registry(
    "packing",
    facts={
        "lengths": "(documents,) int64 tokens in each document",
        "seq_len": "tokens in a row",
        "order": "epoch -> (documents,) the documents of that epoch",
        "epochs": "how often the documents are read, None without end",
        "cache": "folder for what is computed once, None to compute it each time",
    },
)
register = registry.register
