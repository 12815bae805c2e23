"""Uniform chunks as shorter rows of plain causal attention: the fastest kernel for the chunk mask."""

from __future__ import annotations

import torch
from torch import Tensor

from torchladder import mask
from torchladder.models.attention import attention_pieces, flash4
from torchladder.models.attention.kernel import UNIFORM_CHUNKS, AttentionKernel, AttentionSetup, register
from torchladder.models.attention.piecewise import piecewise_attention

_fold = piecewise_attention(
    "fold", lambda width, batch, keys, query_offset: attention_pieces.chunk_pieces(batch, keys, int(width))
)


@register("fold")
class FoldKernel(AttentionKernel):
    """Chunks of one width w: ``(B, T)`` folds into ``(B * T / w, w)`` and is plain causal attention there.

    For T = 8 and w = 3, tokens 0 to 5 of each row fold into ``(2, 3)``; tokens 6 and 7 of all rows are one more call,
    ``(B, 2)``.
    """

    masks = UNIFORM_CHUNKS
    attention_sinks = True
    saved_ops = frozenset({"torchladder::fold"})
    auto_priority = 30

    @classmethod
    def auto_reason(cls, setup: AttentionSetup) -> str | None:
        fast = setup.device.type == "cuda" and flash4.unavailable() is None and setup.dtype in flash4.DTYPES
        library = ", by FlashAttention 4" if fast else ""
        masks = " + ".join(setup.masks)
        return f"uniform chunks ({masks}): each chunk is a shorter row of plain causal attention{library}"

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> Tensor:
        return torch.tensor(mask.chunk_width(start))  # stays on the CPU, where the operator reads it

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, sinks: Tensor | None = None) -> Tensor:
        return _fold(q, k, v, attn_mask, sinks)
