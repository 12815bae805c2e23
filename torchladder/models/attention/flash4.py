"""FlashAttention 4 (the package flash-attn-4) on Hopper and Blackwell GPUs, as a pair of functions and as an operator.

Its kernels are compiled for dtypes, head sizes and the kind of mask, not for lengths: whatever the window, nothing is
compiled again. Shapes in this module are the package's: q, out (N, T, H, K), k, v (N, T, G, K), lse (N, H, T) fp32;
with ``Segments`` they are flat, (N * T, H, K) and (H, N * T).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchladder import mask
from torchladder.models.attention.operator import attention_operator

TESTED_VERSION = "4.0.0b36"
GPU_GENERATIONS = {9: "Hopper", 10: "Blackwell", 11: "Blackwell"}
"""Major compute capability -> name of the GPUs that FlashAttention 4 is built for."""
DTYPES = (torch.bfloat16, torch.float16)
FORWARD_ARGUMENTS = {"cu_seqlens_q", "max_seqlen_q", "causal", "window_size_left", "window_size_right", "return_lse"}
BACKWARD_ARGUMENTS = FORWARD_ARGUMENTS - {"return_lse"} | {"out", "dout", "lse"}


@dataclass(frozen=True)
class Segments:
    """Segments of the flat batch, each with causal attention of its own, under one sliding window.

    Attributes:
        cu_seqlens: (segments + 1,) int32 on the GPU, where each segment begins.
        longest: tokens of the longest segment.
        left: keys before itself that a query sees; None for all of its segment.
    """

    cu_seqlens: Tensor
    longest: int
    left: int | None


@lru_cache
def unavailable() -> str | None:
    """Returns why FlashAttention 4 cannot be used on the current GPU, or None if it can."""
    if not torch.cuda.is_available():
        return "no GPU is visible"
    if (major := torch.cuda.get_device_capability()[0]) not in GPU_GENERATIONS:
        return (
            f"it needs a Hopper or Blackwell GPU, and {torch.cuda.get_device_name()} has compute capability {major}.x"
        )
    return missing()


@lru_cache
def missing() -> str | None:
    """Returns why the package cannot be used, whatever the GPU, or None if it can."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn-4 is not installed: pip install --pre 'torchladder[fa4]'"
    try:
        interface = _interface()
        lacking = FORWARD_ARGUMENTS - set(inspect.signature(interface._flash_attn_fwd).parameters)
        lacking |= BACKWARD_ARGUMENTS - set(inspect.signature(interface._flash_attn_bwd).parameters)
    except Exception as error:  # it loads compilers and drivers, which fail in many ways
        return f"flash-attn-4 {version} cannot be imported ({type(error).__name__}: {error})"
    if lacking:
        return f"flash-attn-4 {version} has another interface (no {min(lacking)}); tested with {TESTED_VERSION}"
    return None


def supports(q: Tensor) -> bool:
    """Returns whether FlashAttention 4 computes attention of tensors like ``q``."""
    return q.device.type == "cuda" and q.dtype in DTYPES and q.shape[-1] % 8 == 0 and unavailable() is None


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    """Returns the output and ``lse``."""
    out, lse, *_ = _interface()._flash_attn_fwd(q, k, v, return_lse=True, **_mask_arguments(segments))
    return out, lse


def backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, segments: Segments | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v for the gradient ``grad`` of the output."""
    return _interface()._flash_attn_bwd(*qkv, out, grad, lse, **_mask_arguments(segments))[:3]


def _interface() -> Any:
    return importlib.import_module("flash_attn.cute.interface")


def _mask_arguments(segments: Segments | None) -> dict[str, Any]:
    if segments is None:
        return {"causal": True}
    arguments = {"cu_seqlens_q": segments.cu_seqlens, "cu_seqlens_k": segments.cu_seqlens}
    longest = {"max_seqlen_q": segments.longest, "max_seqlen_k": segments.longest}
    window = {} if segments.left is None else {"window_size_left": segments.left, "window_size_right": 0}
    return {"causal": True, **arguments, **longest, **window}


# --- segments as an operator -----------------------------------------------------------------------------------------


def prepare_segments(start: Tensor, device: torch.device) -> list[Tensor]:
    """Returns the mask as the two tensors that ``segment_attention`` takes, whose shapes do not depend on the mask.

    They are ``cu_seqlens`` (B * T + 1,) int32 on the device, filled up with B * T, and (3,) int64 on the CPU: the number
    of segments, the tokens of the longest, and the keys before itself that a query sees (-1 for all).
    """
    segments = mask.varlen(start)
    cu_seqlens = segments.cu_seqlens.new_full((start.numel() + 1,), start.numel())
    cu_seqlens[: len(segments.cu_seqlens)] = segments.cu_seqlens
    left = -1 if segments.window == segments.max_seqlen else segments.window - 1
    sizes = torch.tensor([len(segments.cu_seqlens) - 1, segments.max_seqlen, left])
    return [cu_seqlens.to(device, non_blocking=True), sizes]


def _segments(attn_mask: list[Tensor]) -> Segments:
    cu_seqlens, sizes = attn_mask
    count, longest, left = sizes.tolist()
    return Segments(cu_seqlens[: count + 1], longest, None if left < 0 else left)


def _flat(x: Tensor) -> Tensor:
    """Returns (B, H, T, K) as (B * T, H, K); a view of what a projection makes."""
    return x.transpose(1, 2).flatten(0, 1)


def _segments_forward(q: Tensor, k: Tensor, v: Tensor, attn_mask: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = forward(_flat(q), _flat(k), _flat(v), _segments(attn_mask))
    batch, _, length, _ = q.shape
    return out.unflatten(0, (batch, length)).transpose(1, 2), lse.unflatten(1, (batch, length)).transpose(0, 1)


def _segments_backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, attn_mask: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    flat_lse = lse.transpose(0, 1).flatten(1)  # (H, B * T)
    grads = backward(_flat(grad), (_flat(q), _flat(k), _flat(v)), _flat(out), flat_lse, _segments(attn_mask))
    dq, dk, dv = (x.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2) for x in grads)
    return dq, dk, dv


segment_attention = attention_operator("flash4", _segments_forward, _segments_backward)
"""``(q (B, H, T, K), k, v (B, G, T, K), prepare_segments(...)) -> (B, H, T, K)``."""
