"""The flash-attn package (arXiv 2307.08691): the masks of ``varlen``."""

from __future__ import annotations

from functools import partial

from torchladder.models.attention.kernel import register
from torchladder.models.attention.varlen import VarlenKernel
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
        self._varlen = partial(flash_attn_varlen_func, causal=True)
