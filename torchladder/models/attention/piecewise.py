"""Attention over the pieces of a mask, one call of fused attention per piece, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchladder.models.attention import fused_sdpa
from torchladder.models.attention.attention_pieces import AttentionPiece
from torchladder.models.attention.operator import attention_operator, empty_lse, empty_per_token


def piecewise_attention(
    name: str, layout: Callable[[Tensor, int, int, int], Sequence[AttentionPiece]]
) -> Callable[..., Tensor]:
    """Returns attention over pieces, ``(q, k, v, attn_mask, sinks=None) -> out``: no mask recompiles anything.

    Args:
        name: of the operator in ``torch.ops.torchladder``; its backward is ``<name>_backward``.
        layout: ``(attn_mask, batch, number of keys, position of the first query) -> pieces``; ``attn_mask`` is a tensor
            on the CPU.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, attn_mask: list[Tensor]) -> tuple[Tensor, Tensor]:
        return _forward(q, k, v, layout(attn_mask[0], q.shape[0], k.shape[2], k.shape[2] - q.shape[2]))

    def backward(
        grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, attn_mask: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, _ = qkv
        return _backward(grad, qkv, out, lse, layout(attn_mask[0], q.shape[0], k.shape[2], k.shape[2] - q.shape[2]))

    operator = attention_operator(name, forward, backward)
    return lambda q, k, v, attn_mask, sinks=None: operator(q, k, v, [attn_mask], sinks)


def _forward(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[AttentionPiece]) -> tuple[Tensor, Tensor]:
    if _is_whole(pieces, q, k):
        q_part, k_part, v_part = (_gather(x, pieces[0], pieces[0].keys) for x in (q, k, v))
        out, lse = fused_sdpa.forward(q_part, k_part, v_part, None)
        return _unfold(out, q), _unfold(lse[..., None], q)[..., 0]
    out, lse = empty_per_token(q), empty_lse(q)
    for piece in pieces:
        queries = _query_slice(piece, q, k)
        qkv = (_gather(q, piece, queries), _gather(k, piece, piece.keys), _gather(v, piece, piece.keys))
        piece_out, piece_lse = fused_sdpa.forward(*qkv, _bias_like(piece.bias, q))
        _scatter(out, piece, piece_out, queries)
        _scatter(lse[..., None], piece, piece_lse[..., None], queries)
    return out, lse


def _backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, pieces: Sequence[AttentionPiece]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    if _is_whole(pieces, q, k):
        grad, q, k, v, out, lse = (_gather(x, pieces[0], pieces[0].keys) for x in (grad, *qkv, out, lse[..., None]))
        grads = fused_sdpa.backward(grad, (q, k, v), out, lse[..., 0], None)
        dq, dk, dv = (_unfold(part, x) for part, x in zip(grads, qkv, strict=True))
        return dq, dk, dv
    # Masked blocks may share keys, whose gradients are then accumulated, in the accumulation type. If queries are only
    # the last positions, no piece may write the gradient of some keys before them.
    accumulate = any(piece.bias is not None for piece in pieces) or q.shape[2] < k.shape[2]
    dtype = lse.dtype if accumulate else q.dtype
    dq, dk, dv = empty_per_token(q), empty_per_token(k, dtype), empty_per_token(v, dtype)
    if accumulate:
        dk.zero_()
        dv.zero_()
    for piece in pieces:
        queries = _query_slice(piece, q, k)
        piece_qkv = (_gather(q, piece, queries), _gather(k, piece, piece.keys), _gather(v, piece, piece.keys))
        piece_grad, piece_out, piece_lse = (_gather(x, piece, queries) for x in (grad, out, lse[..., None]))
        bias = _bias_like(piece.bias, q)
        piece_grads = fused_sdpa.backward(piece_grad, piece_qkv, piece_out, piece_lse[..., 0], bias)
        _scatter(dq, piece, piece_grads[0], queries)
        _scatter(dk, piece, piece_grads[1], piece.keys, add=accumulate)
        _scatter(dv, piece, piece_grads[2], piece.keys, add=accumulate)
    return dq, dk.to(q.dtype), dv.to(q.dtype)


def _is_whole(pieces: Sequence[AttentionPiece], q: Tensor, k: Tensor) -> bool:
    """Returns whether one causal call computes everything, and its results need no copy."""
    return len(pieces) == 1 and pieces[0].bias is None and q.shape[2] == k.shape[2]


def _query_slice(piece: AttentionPiece, q: Tensor, k: Tensor) -> slice:
    """Returns the queries of a piece as indices into ``q``, whose first query is at position S - T."""
    offset = k.shape[2] - q.shape[2]
    return slice(piece.queries.start - offset, piece.queries.stop - offset)


def _gather(x: Tensor, piece: AttentionPiece, tokens: slice) -> Tensor:
    """Returns a piece of (B, H, T, K) with its segments folded into the batch; a view if possible."""
    part = x.transpose(1, 2)[piece.rows, tokens]  # (b, t, H, K)
    width = tokens.stop - tokens.start if piece.bias is not None else piece.width
    return part.reshape(-1, width, *part.shape[2:]).transpose(1, 2)


def _unfold(part: Tensor, x: Tensor) -> Tensor:
    """Returns the result (N, H, w, K) of segments that fill ``x`` (B, H, T, K) in its shape; a view if possible."""
    batch, _, length, _ = x.shape
    return part.transpose(1, 2).reshape(batch, length, part.shape[1], part.shape[3]).transpose(1, 2)


def _scatter(x: Tensor, piece: AttentionPiece, part: Tensor, tokens: slice, add: bool = False) -> None:
    """Writes or adds a piece to where ``_gather`` takes it from."""
    target = x.transpose(1, 2)[piece.rows, tokens]
    part = part.transpose(1, 2).reshape(target.shape)
    if add:
        target += part
    else:
        target.copy_(part)


def _bias_like(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(q.device, torch.promote_types(q.dtype, torch.float32))
