"""SDPA over the pieces of a mask: any mask on any device, and the kernel to train with on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from torchladder.models.attention import attention_pieces
from torchladder.models.attention.kernel import UNIFORM_CHUNKS, AttentionKernel, AttentionSetup, register
from torchladder.models.attention.piecewise import piecewise_attention

_sdpa = piecewise_attention(
    "sdpa", lambda start, batch, keys, query_offset: attention_pieces.mask_pieces(start, query_offset)
)


@register("sdpa")
class SdpaKernel(AttentionKernel):
    """Any mask: plain causal attention for whole segments, masked blocks of queries for the rest."""

    context_parallel = True
    attention_sinks = True
    saved_ops = frozenset({"torchladder::sdpa"})
    auto_priority = 10

    @classmethod
    def auto_reason(cls, setup: AttentionSetup) -> str | None:
        masks = " + ".join(setup.masks)
        if setup.tokens_per_rank is not None and UNIFORM_CHUNKS.issuperset(setup.masks):
            return f"supports context parallelism, and computes each whole chunk of {masks} as plain causal attention"
        return f"computes any mask ({masks}) and trains on {setup.device.type}, where flex cannot"

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> Tensor:
        return start.cpu().to(torch.int32)  # the operator reads it to lay out its pieces

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, sinks: Tensor | None = None) -> Tensor:
        return _sdpa(q, k, v, attn_mask, sinks)
