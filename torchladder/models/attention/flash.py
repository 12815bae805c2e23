"""The flash-attn package (arXiv 2307.08691): the masks of ``varlen``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchladder.models.attention.kernel import register
from torchladder.models.attention.varlen import VarlenKernel, VarlenMask, flatten_batch, unflatten_batch
from torchladder.registry import ConfigError


@register("flash")
class FlashKernel(VarlenKernel):
    """Documents, chunks and a sliding window, by the flash-attn package."""

    saved_ops = frozenset({"flash_attn::_flash_attn_varlen_forward"})

    def __init__(self) -> None:
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError as error:
            raise ConfigError(
                "kernel 'flash' needs the flash-attn package: pip install 'torchladder[flash]'. "
                "The kernel varlen computes the same masks without it."
            ) from error
        self._flash: Any = flash_attn_varlen_func

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: VarlenMask) -> Tensor:  # type: ignore[override]
        bounds, longest = attn_mask.cu_seqlens, attn_mask.max_seqlen
        qkv = (flatten_batch(q), flatten_batch(k), flatten_batch(v))
        out = self._flash(*qkv, bounds, bounds, longest, longest, causal=True, window_size=(attn_mask.left, 0))
        return unflatten_batch(out, q)
