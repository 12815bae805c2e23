"""The reference: the mask written out, T² of memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchladder import mask
from torchladder.models.attention.kernel import AttentionKernel, register


@register("dense")
class DenseKernel(AttentionKernel):
    """Any mask, on any device, slowly: what every other kernel is tested against."""

    name = "dense"

    def check_context_parallel(self, tokens: int) -> None:
        """Any stretch of a row will do."""

    def derive(self, start: Tensor, device: torch.device, first: int = 0) -> Tensor:
        return mask.dense(start.to(device))[:, None, first:]  # (B, 1, queries, T)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, form: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=form, enable_gqa=q.shape[1] != k.shape[1])
