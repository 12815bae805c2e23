"""A mask as a list of pieces, each of which one call of fused attention computes.

Most masks fall apart into *segments*, runs of tokens that see nothing before the run: documents, chunks. A segment that
all of its later tokens see from its beginning is plain causal attention, and segments of one width fold into the batch:
``(B, T)`` becomes ``(B * T / w, w)``. Whatever else there is (a sliding window, a heap of tiny documents) is cut into
blocks of queries, each against the range of keys that ``start`` gives. So the cost follows the attended pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from torchladder.models.attention import fused

SMALLEST = 32
"""Tokens that a run of equal segments needs to be worth a call of its own."""

BLOCK = (64, 256)
"""Queries of a masked block: about as many as they see keys before themselves, within these limits."""


@dataclass(frozen=True)
class Piece:
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


# --- layouts ---------------------------------------------------------------------------------------------------------


def uniform(batch: int, length: int, width: int) -> list[Piece]:
    """Returns the pieces of rows that are cut every ``width`` tokens; the last chunk may be shorter."""
    whole = length // width * width
    pieces = list(_causal(batch, length, (0, whole), width)) if whole else []
    if whole < length:
        pieces += _causal(batch, length, (whole, length), length - whole)
    return pieces


def of(start: Tensor) -> Sequence[Piece]:
    """Returns the pieces of a mask, ``start`` (B, T) int32 on the CPU."""
    return _of(start.numpy().tobytes(), *start.shape)


@lru_cache(maxsize=8)  # every layer of a model asks, forward and backward
def _of(start: bytes, batch: int, length: int) -> Sequence[Piece]:
    rows = np.frombuffer(start, dtype=np.int32).reshape(batch, length)
    biases: dict[bytes, Tensor] = {}
    if (rows == rows[0]).all():
        return tuple(_row(rows[0], slice(0, batch), biases))
    return tuple(piece for b in range(batch) for piece in _row(rows[b], slice(b, b + 1), biases))


def _row(start: np.ndarray, rows: slice, biases: dict[bytes, Tensor]) -> Iterator[Piece]:
    """Yields the pieces of rows that all have this mask."""
    length = len(start)
    first = np.flatnonzero(start == np.arange(length))  # where segments begin
    last = np.append(first[1:], length)
    plain = start[last - 1] == first  # the last token sees the first, so all tokens do
    width = np.where(plain, last - first, 0)
    run = np.flatnonzero(np.diff(width, prepend=-1))  # runs of plain segments of one width, or of other segments
    loose: int | None = None  # where tokens begin that no piece has taken yet
    for i, j in zip(run, np.append(run[1:], len(first)), strict=True):
        a, b = int(first[i]), int(last[j - 1])
        alone = a + int(width[i]) if plain[i] else int(np.searchsorted(start, a, side="right"))
        end = b if plain[i] else alone  # a sliding window begins as plain causal attention
        if end - a >= SMALLEST:
            if loose is not None:
                yield from _masked(start, (loose, a), rows, biases)
            yield from _causal(rows.stop, length, (a, end), alone - a, rows.start)
            loose = end if end < b else None
        elif loose is None:
            loose = a
    if loose is not None:
        yield from _masked(start, (loose, length), rows, biases)


def _causal(stop: int, length: int, tokens: tuple[int, int], width: int, first: int = 0) -> Iterator[Piece]:
    """Yields plain segments of one width in rows ``[first, stop)``."""
    a, b = tokens
    # Several segments of several rows are one view only if they fill the rows: otherwise each row is its own call.
    together = b - a in (width, length)
    for rows in [slice(first, stop)] if together else [slice(row, row + 1) for row in range(first, stop)]:
        yield Piece(rows, slice(a, b), slice(a, b), width)


def _masked(
    start: np.ndarray, tokens: tuple[int, int], rows: slice, biases: dict[bytes, Tensor]
) -> Iterator[Piece]:
    """Yields blocks of queries, each against the keys from the first that one of them sees."""
    a, end = tokens
    while a < end:
        reach = a - int(start[a])
        b = min(end, a + min(max(reach, BLOCK[0]), BLOCK[1]))
        relative = start[a:b] - start[a]
        pattern = relative.tobytes() + reach.to_bytes(4, "little")
        if pattern not in biases:  # under a sliding window most blocks look alike
            biases[pattern] = _bias(relative, reach)
        yield Piece(rows, slice(a, b), slice(a - reach, b), b - a, biases[pattern])
        a = b


def _bias(relative: np.ndarray, reach: int) -> Tensor:
    key = np.arange(reach + len(relative))
    seen = (relative[:, None] <= key) & (key <= reach + np.arange(len(relative))[:, None])
    return torch.zeros(seen.shape).masked_fill_(torch.from_numpy(~seen), -torch.inf)


# --- attention -------------------------------------------------------------------------------------------------------


def operator(name: str, layout: Callable[[Tensor, int, int], Sequence[Piece]]) -> Callable[..., Tensor]:
    """Returns attention over pieces as an operator that the compiler takes as a whole: no mask recompiles anything.

    Args:
        name: of the operator in ``torch.ops.torchladder``; its backward is ``<name>_backward``.
        layout: (form, batch, length) -> pieces, where the form is a tensor on the CPU.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, form: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(q, k, v, layout(form, q.shape[0], q.shape[2]))

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, form: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(grad, (q, k, v), out, lse, layout(form, q.shape[0], q.shape[2]))

    qkv = "Tensor q, Tensor k, Tensor v"
    attend = torch.library.custom_op(
        f"torchladder::{name}", forward, mutates_args=(), schema=f"({qkv}, Tensor form) -> (Tensor, Tensor)"
    )
    attend_backward = torch.library.custom_op(
        f"torchladder::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor grad, {qkv}, Tensor out, Tensor lse, Tensor form) -> (Tensor, Tensor, Tensor)",
    )
    attend.register_fake(lambda q, k, v, form: (_like(q), _lse(q)))
    attend_backward.register_fake(lambda grad, q, k, v, out, lse, form: (_like(q), _like(k), _like(v)))

    def setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, form, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        return (*attend_backward(grad, q, k, v, out, lse, form), None)

    attend.register_autograd(differentiate, setup_context=setup)
    return lambda q, k, v, form: attend(q, k, v, form)[0]


def _forward(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    out, lse = _like(q), _lse(q)
    for piece in pieces:
        qkv = (_cut(q, piece), _cut(k, piece, piece.keys), _cut(v, piece, piece.keys))
        some, its_lse = fused.forward(*qkv, _on(piece.bias, q))
        _place(out, piece, some)
        _place(lse[..., None], piece, its_lse[..., None])
    return out, lse


def _backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, pieces: Sequence[Piece]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    # Blocks that see keys before themselves share keys: their gradients add up, in the type that sums are kept in.
    shared = any(piece.bias is not None for piece in pieces)
    exact = lse.dtype if shared else q.dtype
    grads = _like(q), _like(k, exact), _like(v, exact)
    if shared:
        grads[1].zero_()
        grads[2].zero_()
    for piece in pieces:
        cuts = (_cut(q, piece), _cut(k, piece, piece.keys), _cut(v, piece, piece.keys))
        its_lse = _cut(lse[..., None], piece)[..., 0]
        some = fused.backward(_cut(grad, piece), cuts, _cut(out, piece), its_lse, _on(piece.bias, q))
        _place(grads[0], piece, some[0])
        for whole, part in zip(grads[1:], some[1:], strict=True):
            _place(whole, piece, part, piece.keys, add=shared)
    return grads[0], grads[1].to(q.dtype), grads[2].to(q.dtype)


def _cut(x: Tensor, piece: Piece, tokens: slice | None = None) -> Tensor:
    """Returns a piece of (B, H, T, K), its segments folded into the batch; a view where that can be one."""
    tokens = tokens or piece.queries
    part = x.transpose(1, 2)[piece.rows, tokens]  # (b, t, H, K)
    width = tokens.stop - tokens.start if piece.bias is not None else piece.width
    return part.reshape(-1, width, *part.shape[2:]).transpose(1, 2)


def _place(x: Tensor, piece: Piece, part: Tensor, tokens: slice | None = None, add: bool = False) -> None:
    """Writes, or adds, a piece to where ``_cut`` would take it from."""
    to = x.transpose(1, 2)[piece.rows, tokens or piece.queries]
    part = part.transpose(1, 2).reshape(to.shape)
    if add:
        to += part
    else:
        to.copy_(part)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for (B, H, T, K) laid out as (B, T, H, K), as projections make and take it."""
    return torch.empty_like(x.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _lse(q: Tensor) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=exact).transpose(1, 2)


def _on(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(q.device, torch.promote_types(q.dtype, torch.float32))
