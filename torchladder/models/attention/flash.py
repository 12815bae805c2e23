"""The FlashAttention packages: version 4 (flash-attn-4) on Hopper and Blackwell, 2 (flash-attn) on other GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchladder import mask
from torchladder.models.attention import flash4
from torchladder.models.attention.kernel import AttentionSetup, register
from torchladder.models.attention.operator import attention_operator
from torchladder.models.attention.varlen import VarlenKernel
from torchladder.registry import ConfigError


@register("flash")
class FlashKernel(VarlenKernel):
    """Documents, chunks and a sliding window, by the package flash-attn-4 or else flash-attn (arXiv 2307.08691)."""

    attention_sinks = True
    saved_ops = frozenset({"torchladder::flash", "flash_attn::_flash_attn_varlen_forward"})
    auto_priority = 25

    def __init__(self) -> None:
        self.version = 4 if (reason := flash4.unavailable()) is None else 2
        if self.version == 2:
            try:
                from flash_attn import flash_attn_varlen_func
            except ImportError as error:
                raise ConfigError(
                    f"kernel 'flash' needs the package flash-attn-4 or flash-attn. FlashAttention 4: {reason}. "
                    "FlashAttention 2: pip install flash-attn. The kernels varlen and flex compute the same "
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
        flash4.check_dtype("flash", setup.dtype)
        if setup.attention_sinks and (reason := flash4.unavailable()) is not None:
            raise ConfigError(f"kernel 'flash' has attention sinks only with FlashAttention 4: {reason}.")

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> Any:
        if self.version == 2:
            return super().prepare(start, device, query_offset)
        return _prepare_segments(start, device)

    def attention(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, sinks: Tensor | None = None
    ) -> Tensor:
        if self.version == 2:
            return super().attention(q, k, v, attn_mask)
        return _flash(q, k, v, attn_mask, sinks)


def _prepare_segments(start: Tensor, device: torch.device) -> list[Tensor]:
    """Returns the mask as two tensors whose shapes do not depend on it, so that they recompile nothing.

    They are ``cu_seqlens`` (B * T + 1,) int32 on the device, filled up with B * T, and (3,) int64 on the CPU: number of
    segments, tokens of the longest, and keys before itself that a query sees (-1 for all).
    """
    segments = mask.varlen(start)
    cu_seqlens = segments.cu_seqlens.new_full((start.numel() + 1,), start.numel())
    cu_seqlens[: len(segments.cu_seqlens)] = segments.cu_seqlens
    left = -1 if segments.window == segments.max_seqlen else segments.window - 1
    sizes = torch.tensor([len(segments.cu_seqlens) - 1, segments.max_seqlen, left])
    return [cu_seqlens.to(device, non_blocking=True), sizes]


def _segments(attn_mask: list[Tensor]) -> dict[str, Any]:
    cu_seqlens, sizes = attn_mask
    count, longest, left = sizes.tolist()
    return flash4.segments(cu_seqlens[: count + 1], longest, None if left < 0 else left)


def _forward(q: Tensor, k: Tensor, v: Tensor, attn_mask: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = flash4.forward(_flat(q), _flat(k), _flat(v), _segments(attn_mask))
    return _unflat(out, q), _unflat(lse.t()[..., None], q)[..., 0]


def _backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, attn_mask: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    flat_lse = lse.transpose(0, 1).flatten(1)  # (H, B * T)
    q, k, v = (_flat(x) for x in qkv)
    dq, dk, dv = flash4.backward(_flat(grad), (q, k, v), _flat(out), flat_lse, _segments(attn_mask))
    return _unflat(dq, qkv[0]), _unflat(dk, qkv[1]), _unflat(dv, qkv[2])


_flash = attention_operator("flash", _forward, _backward)


def _flat(x: Tensor) -> Tensor:
    """Returns (B, H, T, K) as (B * T, H, K): a view of what a projection makes."""
    return x.transpose(1, 2).flatten(0, 1)


def _unflat(flat: Tensor, x: Tensor) -> Tensor:
    """Returns (B * T, H, K) as (B, H, T, K), with B and T of ``x``."""
    return flat.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
