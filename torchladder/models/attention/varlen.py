"""PyTorch's variable-length attention (``torch.nn.attention.varlen``): segments under one window, on flat rows."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from torchladder import mask
from torchladder.models.attention.kernel import AttentionKernel, register

SUPPORTS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether this version's varlen_attn takes fewer key-value heads than query heads (PyTorch 2.12 and later)."""


@dataclass(frozen=True)
class VarlenMask:
    """The arguments of a varlen kernel.

    Attributes:
        cu_seqlens: (segments + 1,) int32 on the device, where each segment begins in the flattened batch.
        max_seqlen: tokens in the longest segment.
        left: number of keys before itself that a query may see; -1 for all of its segment.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    left: int


@register("varlen")
class VarlenKernel(AttentionKernel):
    """Documents, chunks and a sliding window, by ``torch.nn.attention.varlen``."""

    masks = frozenset({"causal", "document", "chunk", "sliding"})
    devices = frozenset({"cuda"})
    saved_ops = frozenset({"torch_attn::_varlen_attn"})

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> VarlenMask:
        segments = mask.varlen(start)
        left = -1 if segments.window >= segments.max_seqlen else segments.window - 1
        return VarlenMask(segments.cu_seqlens.to(device, non_blocking=True), segments.max_seqlen, left)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: VarlenMask) -> Tensor:
        gqa: dict[str, Any] = {}
        if q.shape[1] != k.shape[1]:
            if SUPPORTS_GQA:
                gqa = {"enable_gqa": True}
            else:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        bounds, longest = attn_mask.cu_seqlens, attn_mask.max_seqlen
        qkv = (flatten_batch(q), flatten_batch(k), flatten_batch(v))
        out: Any = varlen_attn(*qkv, bounds, bounds, longest, longest, window_size=(attn_mask.left, 0), **gqa)
        return unflatten_batch(out, q)


def flatten_batch(x: Tensor) -> Tensor:
    """Returns (B, H, T, K) as (B * T, H, K)."""
    return x.transpose(1, 2).flatten(0, 1)


def unflatten_batch(out: Tensor, q: Tensor) -> Tensor:
    """Returns (B * T, H, K) in the shape of q, (B, H, T, K)."""
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
