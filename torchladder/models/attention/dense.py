"""The reference: the mask written out, T² of memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchladder import mask
from torchladder.models.attention.kernel import Kernel, register


@register("dense")
class Dense(Kernel):
    """Any mask, on any device, slowly: what every other kernel is tested against."""

    name = "dense"

    def derive(self, start: Tensor, device: torch.device) -> Tensor:
        return mask.dense(start.to(device))[:, None]  # (B, 1, T, T)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, form: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=form, enable_gqa=q.shape[1] != k.shape[1])
