"""The FlashAttention packages: version 4 (flash-attn-4) on Hopper and Blackwell, 2 (flash-attn) on other GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchladder.models.attention import flash4
from torchladder.models.attention.kernel import AttentionSetup, register
from torchladder.models.attention.varlen import VarlenKernel
from torchladder.registry import ConfigError, require


@register("flash")
class FlashKernel(VarlenKernel):
    """Documents, chunks and a sliding window, by the package flash-attn-4 (arXiv 2307.08691) or else flash-attn."""

    saved_ops = frozenset({"torchladder::flash4", "flash_attn::_flash_attn_varlen_forward"})
    auto_priority = 25

    def __init__(self) -> None:
        self.version = 4 if (reason := flash4.unavailable()) is None else 2
        if self.version == 2:
            try:
                from flash_attn import flash_attn_varlen_func
            except ImportError as error:
                raise ConfigError(
                    f"kernel 'flash' needs the package flash-attn-4 or flash-attn. FlashAttention 4: {reason}. "
                    "FlashAttention 2: pip install 'torchladder[flash]'. The kernels varlen and flex compute the same "
                    "masks without them."
                ) from error
            self._varlen = partial(flash_attn_varlen_func, causal=True)

    @classmethod
    def auto_reason(cls, setup: AttentionSetup) -> str | None:
        if flash4.unavailable() is not None or setup.dtype not in flash4.DTYPES:
            return None
        return f"FlashAttention 4 computes {' + '.join(setup.masks)} as segments under one window, of any lengths"

    @classmethod
    def check(cls, setup: AttentionSetup) -> None:
        require(
            setup.dtype in flash4.DTYPES,
            f"kernel 'flash' computes in bfloat16 or float16, not in {str(setup.dtype)[6:]} "
            "(training.mixed_precision_param).",
        )

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> Any:
        if self.version == 4:
            return flash4.prepare_segments(start, device)
        return super().prepare(start, device, query_offset)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any) -> Tensor:  # type: ignore[override]
        if self.version == 4:
            return flash4.segment_attention(q, k, v, attn_mask)
        return super().attention(q, k, v, attn_mask)
