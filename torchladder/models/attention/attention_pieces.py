"""A mask as a list of pieces, each of which one call of fused attention computes.

Most masks consist of *segments*, runs of tokens that see nothing before the run: documents, chunks. A segment whose
tokens all see its beginning is plain causal attention, and neighboring segments of one width fold into the batch:
``(B, T)`` becomes ``(B * T / w, w)``. Everything else (a sliding window, many tiny documents) is cut into blocks of
queries, each against the range of keys that ``start`` allows. So the cost follows the number of attended pairs.

For example, documents of 200, 200, 8, 8 and 96 tokens in one row become three pieces:

    queries   keys      width  bias
    0..399    0..399    200    None          two causal segments, folded to (2, 200)
    400..415  400..415  16     (16, 16)      two documents too short for calls of their own, with an explicit mask
    416..511  416..511  96     None          one causal segment
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MIN_CAUSAL_TOKENS = 32
"""Tokens that a run of equal segments needs to be worth its own call."""

MAX_SEGMENTS = 2**16 - 1
"""Segments per call: the limit of one dimension of a CUDA grid."""

MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS = 64, 256
"""Queries of a masked block: as many as its first query sees keys before itself, within these limits."""


@dataclass(frozen=True)
class AttentionPiece:
    """One call of fused attention.

    Attributes:
        rows: rows of the batch.
        queries: tokens whose output is computed.
        keys: tokens that they may see; equal to ``queries`` if ``bias`` is None.
        width: tokens per segment; causal pieces fold to this width, masked pieces are one segment.
        bias: (queries, keys) fp32, 0 where a query sees a key and -inf elsewhere; None for causal segments.
    """

    rows: slice
    queries: slice
    keys: slice
    width: int
    bias: Tensor | None = None


def chunk_pieces(batch: int, length: int, width: int) -> list[AttentionPiece]:
    """Returns the pieces of rows that are cut every ``width`` tokens; the last chunk may be shorter."""
    whole = length // width * width
    pieces = list(_causal_pieces(slice(0, batch), length, (0, whole), width)) if whole else []
    if whole < length:
        pieces += _causal_pieces(slice(0, batch), length, (whole, length), length - whole)
    return pieces


def mask_pieces(start: Tensor, query_offset: int = 0) -> Sequence[AttentionPiece]:
    """Returns the pieces of a mask, ``start`` (B, T) int32 on the CPU, for the queries from ``query_offset`` on."""
    return _mask_pieces(start.numpy().tobytes(), *start.shape, query_offset)


@lru_cache(maxsize=8)  # every layer of a model asks for the same mask, forward and backward
def _mask_pieces(start: bytes, batch: int, length: int, query_offset: int) -> Sequence[AttentionPiece]:
    rows = np.frombuffer(start, dtype=np.int32).reshape(batch, length)
    biases: dict[bytes, Tensor] = {}
    if (rows == rows[0]).all():
        return tuple(_row_pieces(rows[0], slice(0, batch), biases, query_offset))
    return tuple(piece for b in range(batch) for piece in _row_pieces(rows[b], slice(b, b + 1), biases, query_offset))


def _row_pieces(
    start: np.ndarray, rows: slice, biases: dict[bytes, Tensor], query_offset: int
) -> Iterator[AttentionPiece]:
    """Yields the pieces, from query ``query_offset`` on, of rows that share the mask ``start``."""
    length = len(start)
    first = np.flatnonzero(start == np.arange(length))  # where segments begin
    first = first[first >= query_offset]
    last = np.append(first, length)[1:]
    causal = start[last - 1] == first  # the last token sees the first, so all tokens do
    width = np.where(causal, last - first, 0)
    run = np.flatnonzero(np.diff(width, prepend=-1))  # where runs of causal segments of one width, or of others, begin
    # The first token that is in no piece yet; None if there is none. It is query_offset if the segment it is in began
    # before.
    pending: int | None = None if query_offset in first[:1] else query_offset
    for i, j in zip(run, np.append(run, len(first))[1:], strict=True):
        a, b = int(first[i]), int(last[j - 1])
        # A segment under a sliding window begins as plain causal attention, until the window cuts off its first token.
        causal_end = a + int(width[i]) if causal[i] else int(np.searchsorted(start, a, side="right"))
        end = b if causal[i] else causal_end
        if end - a >= MIN_CAUSAL_TOKENS:
            if pending is not None:
                yield from _masked_pieces(start, (pending, a), rows, biases)
            yield from _causal_pieces(rows, length, (a, end), causal_end - a)
            pending = end if end < b else None
        elif pending is None:
            pending = a
    if pending is not None:
        yield from _masked_pieces(start, (pending, length), rows, biases)


def _causal_pieces(rows: slice, length: int, tokens: tuple[int, int], width: int) -> Iterator[AttentionPiece]:
    """Yields causal segments of one width that fill ``tokens``."""
    a, b = tokens
    # Rows fold into one view only if the segments fill the rows, or there is one per row; else each row is a call.
    rows_per_call = max(MAX_SEGMENTS * width // (b - a), 1) if b - a in (width, length) else 1
    for row in range(rows.start, rows.stop, rows_per_call):
        for first in range(a, b, MAX_SEGMENTS * width):
            queries = slice(first, min(first + MAX_SEGMENTS * width, b))
            yield AttentionPiece(slice(row, min(row + rows_per_call, rows.stop)), queries, queries, width)


def _masked_pieces(
    start: np.ndarray, tokens: tuple[int, int], rows: slice, biases: dict[bytes, Tensor]
) -> Iterator[AttentionPiece]:
    """Yields blocks of queries that fill ``tokens``, each against the keys from the first that one of them sees."""
    a, end = tokens
    while a < end:
        before = a - int(start[a])  # keys before the block that its first query sees; no later query sees more
        b = min(end, a + min(max(before, MIN_BLOCK_TOKENS), MAX_BLOCK_TOKENS))
        relative = start[a:b] - start[a]
        pattern = relative.tobytes() + before.to_bytes(4, "little")
        if pattern not in biases:  # under a sliding window most blocks are alike
            key, query = np.arange(before + b - a), np.arange(b - a)[:, None]
            seen = (relative[:, None] <= key) & (key <= before + query)
            biases[pattern] = torch.zeros(seen.shape).masked_fill_(torch.from_numpy(~seen), -torch.inf)
        yield AttentionPiece(rows, slice(a, b), slice(a - before, b), b - a, biases[pattern])
        a = b
