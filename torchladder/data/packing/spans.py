"""What a packing is: a function from a row's number to the spans of documents that fill it.

A packing sees document lengths, never tokens. It is a pure function of the lengths, the order of the documents and the
row's number, so any row can be computed without the rows before it.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from torchladder.registry import Registry


class Spans(NamedTuple):
    """The documents, or pieces of documents, in a row.

    Attributes:
        documents: (pieces,) int64, the document that each piece is cut from.
        begins: (pieces,) int64, first token of the piece within its document.
        ends: (pieces,) int64, one past its last token.
    """

    documents: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


EMPTY_SPANS = Spans(*(np.empty(0, np.int64) for _ in range(3)))
"""A row of padding only."""


class Packing(Protocol):
    """Rows of one source.

    Attributes:
        num_rows: number of rows; None if the source repeats without end.
        rows_per_epoch: rows that read every document once.
        efficiency: fraction of all positions that hold tokens; the rest is padding.
    """

    @property
    def num_rows(self) -> int | None: ...

    @property
    def rows_per_epoch(self) -> Fraction: ...

    @property
    def efficiency(self) -> float: ...

    def __call__(self, row: int) -> Spans:
        """Returns the spans of a row: at most ``seq_len + 1`` tokens, the last one only a label; past the end none."""
        ...


registry: Registry[Packing] = Registry(
    "packing",
    runtime_args={
        "lengths": "(documents,) int64, tokens in each document",
        "seq_len": "tokens in a row",
        "order": "epoch -> (documents,), the documents in the order of that epoch",
        "epochs": "how often the documents are read, None for no end",
        "cache": "folder for results that are computed once, None to compute them each time",
    },
)
register = registry.register
