"""Attention over the pieces of a mask, as an operator that the compiler takes as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchladder.models.attention import fused_sdpa
from torchladder.models.attention.attention_pieces import AttentionPiece

Tokens = tuple[int, int]


def operator(name: str, layout: Callable[[Tensor, int, Tokens], Sequence[AttentionPiece]]) -> Callable[..., Tensor]:
    """Returns attention over pieces as an operator that the compiler takes as a whole: no mask recompiles anything.

    Args:
        name: of the operator in ``torch.ops.torchladder``; its backward is ``<name>_backward``.
        layout: (form, batch, (queries, keys)) -> pieces, where the form is a tensor on the CPU. Queries are the last
            of the keys; pieces name them by the place of their own key.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, form: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(q, k, v, layout(form, q.shape[0], (q.shape[2], k.shape[2])))

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, form: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(grad, (q, k, v), out, lse, layout(form, q.shape[0], (q.shape[2], k.shape[2])))

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


def _forward(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[AttentionPiece]) -> tuple[Tensor, Tensor]:
    out, lse = _like(q), _lse(q)
    for piece in pieces:
        queries = _queries(piece, q, k)
        qkv = (_cut(q, piece, queries), _cut(k, piece, piece.keys), _cut(v, piece, piece.keys))
        some, its_lse = fused_sdpa.forward(*qkv, _on(piece.bias, q))
        _place(out, piece, some, queries)
        _place(lse[..., None], piece, its_lse[..., None], queries)
    return out, lse


def _backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, pieces: Sequence[AttentionPiece]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    # Blocks that see keys before themselves share keys: their gradients add up, in the type that sums are kept in.
    # Where queries are not all there are, keys before them may be seen by none.
    shared = any(piece.bias is not None for piece in pieces) or q.shape[2] < k.shape[2]
    exact = lse.dtype if shared else q.dtype
    grads = _like(q), _like(k, exact), _like(v, exact)
    if shared:
        grads[1].zero_()
        grads[2].zero_()
    for piece in pieces:
        queries = _queries(piece, q, k)
        cuts = (_cut(q, piece, queries), _cut(k, piece, piece.keys), _cut(v, piece, piece.keys))
        its_grad, its_out, its_lse = (_cut(x, piece, queries) for x in (grad, out, lse[..., None]))
        some = fused_sdpa.backward(its_grad, cuts, its_out, its_lse[..., 0], _on(piece.bias, q))
        _place(grads[0], piece, some[0], queries)
        for whole, part in zip(grads[1:], some[1:], strict=True):
            _place(whole, piece, part, piece.keys, add=shared)
    return grads[0], grads[1].to(q.dtype), grads[2].to(q.dtype)


def _queries(piece: AttentionPiece, q: Tensor, k: Tensor) -> slice:
    """Returns where the queries of a piece are among those that there are."""
    before = k.shape[2] - q.shape[2]
    return slice(piece.queries.start - before, piece.queries.stop - before)


def _cut(x: Tensor, piece: AttentionPiece, tokens: slice) -> Tensor:
    """Returns a piece of (B, H, T, K), its segments folded into the batch; a view where that can be one."""
    part = x.transpose(1, 2)[piece.rows, tokens]  # (b, t, H, K)
    width = tokens.stop - tokens.start if piece.bias is not None else piece.width
    return part.reshape(-1, width, *part.shape[2:]).transpose(1, 2)


def _place(x: Tensor, piece: AttentionPiece, part: Tensor, tokens: slice, add: bool = False) -> None:
    """Writes, or adds, a piece to where ``_cut`` would take it from."""
    to = x.transpose(1, 2)[piece.rows, tokens]
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
