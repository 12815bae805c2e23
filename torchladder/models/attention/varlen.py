"""Segments under one window, on flat (B·T) rows: PyTorch's own varlen kernel and the flash-attn package's."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from torchladder import mask
from torchladder.models.attention.kernel import SEGMENTS, AttentionKernel, register
from torchladder.registry import ConfigError

GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether this PyTorch's varlen_attn takes fewer key-value heads than query heads (2.12 and later)."""


@dataclass(frozen=True)
class VarlenMask:
    """The form that varlen kernels eat.

    Attributes:
        cu_seqlens: (segments + 1,) int32 on the device, where each segment begins in the flat batch.
        max_seqlen: tokens in the longest segment.
        left: keys a query may see before itself, or -1 where nothing narrows a segment.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    left: int


class SegmentKernel(AttentionKernel):
    """What varlen kernels have in common."""

    expresses = SEGMENTS

    def check(self, device: torch.device, training: bool) -> None:
        if device.type != "cuda":
            raise ConfigError(f"kernel {self.name!r} needs CUDA, not {device.type}. Use sdpa, fold or auto.")

    def derive(self, start: Tensor, device: torch.device, first: int = 0) -> VarlenMask:
        form = mask.varlen(start)
        left = -1 if form.window >= form.max_seqlen else form.window - 1
        return VarlenMask(form.cu_seqlens.to(device, non_blocking=True), form.max_seqlen, left)


@register("varlen")
class VarlenKernel(SegmentKernel):
    """Documents, chunks and a sliding window, by ``torch.nn.attention.varlen``."""

    name = "varlen"

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, form: VarlenMask) -> Tensor:
        grouped: dict[str, Any] = {}
        if q.shape[1] != k.shape[1]:
            if GROUPED:
                grouped = {"enable_gqa": True}
            else:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        bounds, longest = form.cu_seqlens, form.max_seqlen
        flat = (_flat(q), _flat(k), _flat(v))
        out: Any = varlen_attn(*flat, bounds, bounds, longest, longest, window_size=(form.left, 0), **grouped)
        return _unflat(out, q)


@register("flash")
class FlashKernel(SegmentKernel):
    """As varlen, by the flash-attn package (arXiv 2307.08691)."""

    name = "flash"

    def __init__(self, masks: list[str], device: torch.device, training: bool) -> None:
        super().__init__(masks, device, training)
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError as error:
            raise ConfigError(
                "kernel 'flash' needs the flash-attn package: pip install 'torchladder[flash]'. "
                "The kernel varlen expresses the same masks without it."
            ) from error
        self._flash: Any = flash_attn_varlen_func

    def attend(self, q: Tensor, k: Tensor, v: Tensor, form: VarlenMask) -> Tensor:  # type: ignore[override]
        bounds, longest = form.cu_seqlens, form.max_seqlen
        flat = (_flat(q), _flat(k), _flat(v))
        out = self._flash(*flat, bounds, bounds, longest, longest, causal=True, window_size=(form.left, 0))
        return _unflat(out, q)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # (B * T, H, K)


def _unflat(out: Tensor, q: Tensor) -> Tensor:
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)  # (B, H, T, K)
