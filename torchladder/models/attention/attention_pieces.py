"""A mask as a list of pieces, each of which one call of fused attention computes.

Most masks fall apart into *segments*, runs of tokens that see nothing before the run: documents, chunks. A segment that
all of its later tokens see from its beginning is plain causal attention, and segments of one width fold into the batch:
``(B, T)`` becomes ``(B * T / w, w)``. Whatever else there is (a sliding window, a heap of tiny documents) is cut into
blocks of queries, each against the range of keys that ``start`` gives. So the cost follows the attended pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MIN_RUN = 32
"""Tokens that a run of equal segments needs to be worth a call of its own."""

MAX_SEGMENTS = 2**16 - 1
"""Segments of one call: no more fit into one dimension of a CUDA grid."""

BLOCK = (64, 256)
"""Queries of a masked block: about as many as they see keys before themselves, within these limits."""


@dataclass(frozen=True)
class AttentionPiece:
    """What one call computes.

    Attributes:
        rows: rows of the batch.
        queries: tokens whose output this is.
        keys: tokens that they may see; equal to ``queries`` where ``bias`` is None.
        width: tokens per segment; causal pieces fold to it, others are one segment.
        bias: (queries, keys) fp32, 0 where a query sees a key and -inf elsewhere; None for causal segments.
    """

    rows: slice
    queries: slice
    keys: slice
    width: int
    bias: Tensor | None = None


def uniform(batch: int, length: int, width: int) -> list[AttentionPiece]:
    """Returns the pieces of rows that are cut every ``width`` tokens; the last chunk may be shorter."""
    whole = length // width * width
    pieces = list(_causal(slice(0, batch), length, (0, whole), width)) if whole else []
    if whole < length:
        pieces += _causal(slice(0, batch), length, (whole, length), length - whole)
    return pieces


def of(start: Tensor, begin: int = 0) -> Sequence[AttentionPiece]:
    """Returns the pieces of a mask, ``start`` (B, T) int32 on the CPU, that hold the queries from ``begin`` on."""
    return _of(start.numpy().tobytes(), *start.shape, begin)


@lru_cache(maxsize=8)  # every layer of a model asks, forward and backward
def _of(start: bytes, batch: int, length: int, begin: int) -> Sequence[AttentionPiece]:
    rows = np.frombuffer(start, dtype=np.int32).reshape(batch, length)
    biases: dict[bytes, Tensor] = {}
    if (rows == rows[0]).all():
        return tuple(_row(rows[0], slice(0, batch), biases, begin))
    return tuple(piece for b in range(batch) for piece in _row(rows[b], slice(b, b + 1), biases, begin))


def _row(start: np.ndarray, rows: slice, biases: dict[bytes, Tensor], begin: int) -> Iterator[AttentionPiece]:
    """Yields the pieces, from query ``begin`` on, of rows that all have this mask."""
    length = len(start)
    first = np.flatnonzero(start == np.arange(length))  # where segments begin
    first = first[first >= begin]
    last = np.append(first, length)[1:]
    plain = start[last - 1] == first  # the last token sees the first, so all tokens do
    width = np.where(plain, last - first, 0)
    run = np.flatnonzero(np.diff(width, prepend=-1))  # runs of plain segments of one width, or of other segments
    # Where tokens begin that no piece has taken yet: at once if the first of them see keys before ``begin``.
    loose: int | None = None if begin in first[:1] else begin
    for i, j in zip(run, np.append(run, len(first))[1:], strict=True):
        a, b = int(first[i]), int(last[j - 1])
        alone = a + int(width[i]) if plain[i] else int(np.searchsorted(start, a, side="right"))
        end = b if plain[i] else alone  # a sliding window begins as plain causal attention
        if end - a >= MIN_RUN:
            if loose is not None:
                yield from _masked(start, (loose, a), rows, biases)
            yield from _causal(rows, length, (a, end), alone - a)
            loose = end if end < b else None
        elif loose is None:
            loose = a
    if loose is not None:
        yield from _masked(start, (loose, length), rows, biases)


def _causal(rows: slice, length: int, tokens: tuple[int, int], width: int) -> Iterator[AttentionPiece]:
    """Yields plain segments of one width."""
    a, b = tokens
    # Several segments of several rows are one view only if they fill the rows: otherwise each row is its own call.
    together = max(MAX_SEGMENTS * width // (b - a), 1) if b - a in (width, length) else 1
    for row in range(rows.start, rows.stop, together):
        for first in range(a, b, MAX_SEGMENTS * width):
            some = slice(first, min(first + MAX_SEGMENTS * width, b))
            yield AttentionPiece(slice(row, min(row + together, rows.stop)), some, some, width)


def _masked(
    start: np.ndarray, tokens: tuple[int, int], rows: slice, biases: dict[bytes, Tensor]
) -> Iterator[AttentionPiece]:
    """Yields blocks of queries, each against the keys from the first that one of them sees."""
    a, end = tokens
    while a < end:
        reach = a - int(start[a])
        b = min(end, a + min(max(reach, BLOCK[0]), BLOCK[1]))
        relative = start[a:b] - start[a]
        pattern = relative.tobytes() + reach.to_bytes(4, "little")
        if pattern not in biases:  # under a sliding window most blocks look alike
            biases[pattern] = _bias(relative, reach)
        yield AttentionPiece(rows, slice(a, b), slice(a - reach, b), b - a, biases[pattern])
        a = b


def _bias(relative: np.ndarray, reach: int) -> Tensor:
    key = np.arange(reach + len(relative))
    seen = (relative[:, None] <= key) & (key <= reach + np.arange(len(relative))[:, None])
    return torch.zeros(seen.shape).masked_fill_(torch.from_numpy(~seen), -torch.inf)
