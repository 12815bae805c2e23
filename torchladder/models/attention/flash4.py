"""FlashAttention 4 (the package flash-attn-4) on Hopper and Blackwell GPUs, as a pair of functions.

Its kernels are compiled for dtypes, head sizes and the kind of mask, not for lengths, so no window compiles anything
again. The shapes are the package's: q, out (N, T, H, K), k, v (N, T, G, K), lse (N, H, T) fp32; with ``segments`` they
are flat, (N * T, H, K) and (H, N * T).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchladder.registry import require

TESTED_VERSION = "4.0.0b36"
GPU_GENERATIONS = {9: "Hopper", 10: "Blackwell", 11: "Blackwell"}
"""Major compute capability -> name of the GPUs that FlashAttention 4 is built for."""
DTYPES = (torch.bfloat16, torch.float16)
ARGUMENTS = {
    *("softmax_scale", "causal", "cu_seqlens_q", "max_seqlen_q", "window_size_left", "mask_mod", "aux_tensors"),
    "block_sparse_tensors",
}
HEAD_MULTIPLE = 32
"""Heads are padded with zeros to a multiple of this many features. At other sizes version 4.0.0b36 returns wrong
gradients on Hopper: one kernel accumulates them in rows of a multiple of 16 features, and another reads rows of 32."""
CAUSAL: dict[str, Any] = {"causal": True}
"""The mask of whole rows."""


@lru_cache
def unavailable() -> str | None:
    """Returns why FlashAttention 4 cannot be used on the current GPU, or None if it can."""
    if not torch.cuda.is_available():
        return "no GPU is visible"
    if generation() is None:
        name, (major, _) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return f"it needs a Hopper or Blackwell GPU, and {name} has compute capability {major}.x"
    return missing()


def generation() -> str | None:
    """Returns the generation of the current GPU, or None if FlashAttention 4 is not built for it."""
    return GPU_GENERATIONS.get(torch.cuda.get_device_capability()[0])


@lru_cache
def missing() -> str | None:
    """Returns why the package cannot be used, whatever the GPU, or None if it can."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn-4 is not installed: pip install --pre flash-attn-4"
    try:
        package = _interface()
        functions = package._flash_attn_fwd, package._flash_attn_bwd
        lacking = {name for name in ARGUMENTS for f in functions if name not in inspect.signature(f).parameters}
    except Exception as error:  # it loads compilers and drivers, which fail in many ways
        return f"flash-attn-4 {version} cannot be imported ({type(error).__name__}: {error})"
    if lacking:
        return f"flash-attn-4 {version} has another interface (no {min(lacking)}); tested with {TESTED_VERSION}"
    return None


def supports(q: Tensor) -> bool:
    """Returns whether FlashAttention 4 computes attention of tensors like ``q``."""
    return q.device.type == "cuda" and q.dtype in DTYPES and unavailable() is None


def check_dtype(kernel: str, dtype: torch.dtype) -> None:
    """Raises ``ConfigError`` unless FlashAttention computes in ``dtype``."""
    require(
        dtype in DTYPES,
        f"kernel {kernel!r} computes in bfloat16 or float16, not in {str(dtype)[6:]} (training.mixed_precision_param).",
    )


def segments(cu_seqlens: Tensor, longest: int, left: int | None) -> dict[str, Any]:
    """Returns the mask of segments of the flat batch under one sliding window.

    Args:
        cu_seqlens: (segments + 1,) int32 on the GPU, where each segment begins; ends with the number of tokens.
        longest: tokens of the longest segment.
        left: keys before itself that a query sees; None for all of its segment.
    """
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return CAUSAL | bounds | ({} if left is None else {"window_size_left": left, "window_size_right": 0})


def forward(q: Tensor, k: Tensor, v: Tensor, attn_mask: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the output and ``lse``; ``attn_mask`` is ``CAUSAL``, ``segments`` or other arguments of the package."""
    features = q.shape[-1]
    out, lse, *_ = _interface()._flash_attn_fwd(
        *map(_pad, (q, k, v)), softmax_scale=features**-0.5, return_lse=True, **attn_mask
    )
    return out[..., :features], lse


def backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, attn_mask: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v for the gradient ``grad`` of the output."""
    features = grad.shape[-1]
    padded = map(_pad, (*qkv, out, grad))
    dq, dk, dv, *_ = _interface()._flash_attn_bwd(*padded, lse, softmax_scale=features**-0.5, **attn_mask)
    return dq[..., :features], dk[..., :features], dv[..., :features]


def _pad(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % HEAD_MULTIPLE)) if x.shape[-1] % HEAD_MULTIPLE else x


def _interface() -> Any:
    return importlib.import_module("flash_attn.cute.interface")
