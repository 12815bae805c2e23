"""PyTorch's variable-length attention (``torch.nn.attention.varlen``): segments under one window, on flat rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from torchladder import mask
from torchladder.models.attention.kernel import AttentionKernel, register

SUPPORTS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether this version's varlen_attn takes fewer key-value heads than query heads (PyTorch 2.12 and later)."""


@register("varlen")
class VarlenKernel(AttentionKernel):
    """Documents, chunks and a sliding window, by ``torch.nn.attention.varlen``."""

    masks = frozenset({"causal", "document", "chunk", "sliding"})
    devices = frozenset({"cuda"})
    saved_ops = frozenset({"torch_attn::_varlen_attn"})

    def __init__(self) -> None:
        self._varlen: Any = _varlen_attn

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> tuple[Tensor, int, int]:
        """Returns ``cu_seqlens``, ``max_seqlen``, and the number of keys before itself that a query may see.

        The latter is -1 for all keys of a segment.
        """
        segments = mask.varlen(start)
        left = -1 if segments.window == segments.max_seqlen else segments.window - 1
        return segments.cu_seqlens.to(device, non_blocking=True), segments.max_seqlen, left

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: tuple[Tensor, int, int]) -> Tensor:  # type: ignore[override]
        bounds, longest, left = attn_mask
        qkv = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, H, K)
        out = self._varlen(*qkv, bounds, bounds, longest, longest, window_size=(left, 0))
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, window_size: tuple[int, int]) -> Any:
    gqa: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if SUPPORTS_GQA:
            gqa = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, *bounds, window_size=window_size, **gqa)
