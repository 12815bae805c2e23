"""Attention as a custom operator that the compiler does not trace into: no mask recompiles anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor, Tensor]
]


def attention_operator(name: str, forward: Forward, backward: Backward) -> Callable[..., Tensor]:
    """Returns ``(q, k, v, attn_mask, sinks=None) -> out`` as an operator; ``attn_mask`` is a list of tensors.

    ``sinks`` (H,) are logits of one more key per head, whose value is 0 (arXiv 2309.17453, learned in gpt-oss). The
    kernel need not know them: with the log-sum-exp that includes them, its backward is that of attention with sinks.

    The results of ``forward`` and ``backward`` may have any strides: the operator lays out everything with a head per
    token, (B, T, H, K), like the output of a projection, and copies only what is laid out otherwise.

    Args:
        name: of the operator in ``torch.ops.torchladder``; its backward is ``<name>_backward``.
        forward: ``(q (B, H, T, K), k, v (B, G, S, K), attn_mask) -> out (B, H, T, K), lse (B, H, T)``.
        backward: ``(grad, (q, k, v), out, lse, attn_mask) -> dq, dk, dv``.
    """

    @torch.library.custom_op(f"torchladder::{name}", mutates_args=())
    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: list[Tensor], sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, attn_mask)
        if sinks is not None:
            lse_of_keys, lse = lse, torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
            out = out * (lse_of_keys - lse).exp()[..., None].to(out.dtype)
        return _per_token(out), lse.contiguous()

    @torch.library.custom_op(f"torchladder::{name}_backward", mutates_args=())
    def attention_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attn_mask: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = backward(grad, (q, k, v), out, lse, attn_mask)
        return _per_token(dq), _per_token(dk), _per_token(dv)

    attention.register_fake(lambda q, k, v, attn_mask, sinks: (empty_per_token(q), empty_lse(q)))
    attention_backward.register_fake(
        lambda grad, q, k, v, out, lse, attn_mask: (empty_per_token(q), empty_per_token(k), empty_per_token(v))
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *qkv, attn_mask, sinks = inputs
        ctx.save_for_backward(*qkv, *output, sinks, *attn_mask)

    def differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks, *attn_mask = ctx.saved_tensors
        sinks_grad = None
        if sinks is not None:  # of a softmax, for a key whose value is 0
            probability = (sinks[:, None].to(lse.dtype) - lse).exp()  # (B, H, T)
            sinks_grad = -(probability * (grad * out).sum(-1, dtype=lse.dtype)).sum((0, 2)).to(sinks.dtype)
        return (*attention_backward(grad, q, k, v, out, lse, attn_mask), [None] * len(attn_mask), sinks_grad)

    attention.register_autograd(differentiate, setup_context=setup_context)
    return lambda q, k, v, attn_mask, sinks=None: attention(q, k, v, attn_mask, sinks)[0]


def empty_per_token(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns memory for (B, H, T, K), laid out as (B, T, H, K)."""
    return torch.empty_like(x.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    """Returns memory for the log-sum-exp (B, H, T), in the accumulation type."""
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _per_token(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)
