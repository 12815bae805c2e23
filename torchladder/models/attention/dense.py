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
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=q.shape[1] != k.shape[1])
