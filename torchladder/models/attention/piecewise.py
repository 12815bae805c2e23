"""Attention over the pieces of a mask, as a custom operator that the compiler does not trace into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchladder.models.attention import fused_sdpa
from torchladder.models.attention.attention_pieces import AttentionPiece


def piecewise_attention(
    name: str, layout: Callable[[Tensor, int, int, int], Sequence[AttentionPiece]]
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Returns attention over pieces, ``(q, k, v, attn_mask) -> out``, as an operator: no mask recompiles anything.

    Args:
        name: of the operator in ``torch.ops.torchladder``; its backward is ``<name>_backward``.
        layout: ``(attn_mask, batch, number of keys, position of the first query) -> pieces``; ``attn_mask`` is a tensor
            on the CPU.
    """

    @torch.library.custom_op(f"torchladder::{name}", mutates_args=())
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(q, k, v, layout(attn_mask, q.shape[0], k.shape[2], k.shape[2] - q.shape[2]))

    @torch.library.custom_op(f"torchladder::{name}_backward", mutates_args=())
    def attention_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attn_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        pieces = layout(attn_mask, q.shape[0], k.shape[2], k.shape[2] - q.shape[2])
        return _backward(grad, (q, k, v), out, lse, pieces)

    attention.register_fake(lambda q, k, v, attn_mask: (_empty_like(q), _empty_lse(q)))
    attention_backward.register_fake(
        lambda grad, q, k, v, out, lse, attn_mask: (_empty_like(q), _empty_like(k), _empty_like(v))
    )

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, attn_mask, out, lse = ctx.saved_tensors
        return (*attention_backward(grad, q, k, v, out, lse, attn_mask), None)

    attention.register_autograd(differentiate, setup_context=setup_context)
    return lambda q, k, v, attn_mask: attention(q, k, v, attn_mask)[0]


def _forward(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[AttentionPiece]) -> tuple[Tensor, Tensor]:
    out, lse = _empty_like(q), _empty_lse(q)
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
    # Masked blocks may share keys, whose gradients are then accumulated, in the accumulation type. If queries are only
    # the last positions, no piece may write the gradient of some keys before them.
    accumulate = any(piece.bias is not None for piece in pieces) or q.shape[2] < k.shape[2]
    dtype = lse.dtype if accumulate else q.dtype
    grads = _empty_like(q), _empty_like(k, dtype), _empty_like(v, dtype)
    if accumulate:
        grads[1].zero_()
        grads[2].zero_()
    for piece in pieces:
        queries = _query_slice(piece, q, k)
        piece_qkv = (_gather(q, piece, queries), _gather(k, piece, piece.keys), _gather(v, piece, piece.keys))
        piece_grad, piece_out, piece_lse = (_gather(x, piece, queries) for x in (grad, out, lse[..., None]))
        bias = _bias_like(piece.bias, q)
        piece_grads = fused_sdpa.backward(piece_grad, piece_qkv, piece_out, piece_lse[..., 0], bias)
        _scatter(grads[0], piece, piece_grads[0], queries)
        for whole, part in zip(grads[1:], piece_grads[1:], strict=True):
            _scatter(whole, piece, part, piece.keys, add=accumulate)
    return grads[0], grads[1].to(q.dtype), grads[2].to(q.dtype)


def _query_slice(piece: AttentionPiece, q: Tensor, k: Tensor) -> slice:
    """Returns the queries of a piece as indices into ``q``, whose first query is at position S - T."""
    offset = k.shape[2] - q.shape[2]
    return slice(piece.queries.start - offset, piece.queries.stop - offset)


def _gather(x: Tensor, piece: AttentionPiece, tokens: slice) -> Tensor:
    """Returns a piece of (B, H, T, K) with its segments folded into the batch; a view if possible."""
    part = x.transpose(1, 2)[piece.rows, tokens]  # (b, t, H, K)
    width = tokens.stop - tokens.start if piece.bias is not None else piece.width
    return part.reshape(-1, width, *part.shape[2:]).transpose(1, 2)


def _scatter(x: Tensor, piece: AttentionPiece, part: Tensor, tokens: slice, add: bool = False) -> None:
    """Writes or adds a piece to where ``_gather`` takes it from."""
    target = x.transpose(1, 2)[piece.rows, tokens]
    part = part.transpose(1, 2).reshape(target.shape)
    if add:
        target += part
    else:
        target.copy_(part)


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns memory for (B, H, T, K), laid out as (B, T, H, K) like the output of a projection."""
    return torch.empty_like(x.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _empty_lse(q: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=dtype).transpose(1, 2)


def _bias_like(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(q.device, torch.promote_types(q.dtype, torch.float32))
