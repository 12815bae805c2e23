"""The reference kernel: SDPA with a boolean mask, O(T²) memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchladder import mask
from torchladder.models.attention.kernel import AttentionKernel, register


@register("dense")
class DenseKernel(AttentionKernel):
    """Any mask on any device, slowly. All other kernels are tested against it."""

    context_parallel = True
    attention_sinks = True
    saved_ops = frozenset(
        {
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
        }
    )

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> Tensor:
        return mask.dense(start.to(device))[:, None, query_offset:]  # (B, 1, queries, T)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, sinks: Tensor | None = None) -> Tensor:
        return dense_attention(q, k, v, attn_mask, sinks)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Returns the attention output (B, H, T, K) under a boolean mask (B, 1, T, S), with ``sinks`` (H,) or without."""
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * q.shape[-1] ** -0.5
    last = sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
    probabilities = torch.cat([scores.masked_fill(~visible, -torch.inf), last], dim=-1).softmax(-1)
    return (probabilities[..., :-1] @ v.to(dtype)).to(q.dtype)
