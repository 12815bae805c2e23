"""Scaled dot-product attention as an explicit pair of functions, forward and backward.

A custom operator is opaque to autograd, so it must define its own backward. PyTorch's fused kernels come as such pairs:
this module calls the one that ``torch.nn.functional.scaled_dot_product_attention`` would choose, and the plain
formulas if there is none (on CUDA, for example, no fused kernel takes an explicit mask).

Shapes: q, out (N, H, Q, K); k, v (N, G, S, K), G divides H; ``lse`` (N, H, Q), the log-sum-exp of each query's scores.
``bias`` (Q, S) is 0 where a query sees a key and -inf elsewhere; if it is None, attention is causal and Q = S.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from torchladder.models.attention import flash4

aten = torch.ops.aten

CUDNN_MULTIPLE = 128
"""Only rows of a multiple of this many tokens go to cuDNN: it builds and caches a plan per length, and a curriculum
that grows the window token by token has thousands of lengths."""


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the output and ``lse``."""
    q, k, v = (_contiguous_heads(x) for x in (q, k, v))
    backend, scale = _backend(q, k, v, bias), q.shape[-1] ** -0.5
    if backend == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, bias is None, attn_mask=bias)
    if backend == "flash4":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = flash4.forward(q, k, v, flash4.CAUSAL)
        return out.transpose(1, 2), lse
    if backend == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=scale)
        return out, lse.reshape(q.shape[:-1])
    if backend == "flash":
        padded = (_pad(x) for x in (q, k, v))
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*padded, 0.0, True, scale=scale)
        return out[..., : q.shape[-1]], lse
    return _math_forward(q, k, v, bias)


def backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v for the gradient ``grad`` of the output."""
    grad, q, k, v, out = (_contiguous_heads(x) for x in (grad, *qkv, out))
    backend, scale, length = _backend(q, k, v, bias), q.shape[-1] ** -0.5, q.shape[2]
    if backend == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, bias is None, attn_mask=bias
        )
    if backend == "flash4":
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        dq, dk, dv = flash4.backward(grad, (q, k, v), out, lse, flash4.CAUSAL)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    if backend == "cudnn":
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout seed and offset
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(grad, q, k, v, out, lse.contiguous().reshape(lse.shape + _cudnn_lse_tail(q.device)), unused, unused),
            *(None, None, None, length, length, 0.0, True),
            scale=scale,
        )
    if backend == "flash":
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        padded = (_pad(x) for x in (grad, q, k, v, out))
        grads = aten._scaled_dot_product_flash_attention_backward(
            *(*padded, lse.contiguous(), None, None, length, length, 0.0, True, unused, unused), scale=scale
        )
        return tuple(x[..., : q.shape[-1]] for x in grads)
    return _math_backward(grad, (q, k, v), out, lse, bias)


def _backend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str:
    if bias is not None:
        return "cpu" if q.device.type == "cpu" else "math"
    if flash4.supports(q):
        return "flash4"
    grouped = q.shape[1] != k.shape[1]
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=grouped))
    if choice == SDPBackend.CUDNN_ATTENTION and torch.backends.cuda.flash_sdp_enabled() and not _cudnn_is_faster(q):
        choice = SDPBackend.FLASH_ATTENTION
    if choice == SDPBackend.CUDNN_ATTENTION:
        return "cudnn"
    if choice == SDPBackend.FLASH_ATTENTION:
        return {"cpu": "cpu", "cuda": "flash"}.get(q.device.type, "math")
    return "math"


def _cudnn_is_faster(q: Tensor) -> bool:
    return q.shape[2] % CUDNN_MULTIPLE == 0 and torch.cuda.get_device_capability(q.device) == (9, 0)


@lru_cache
def _cudnn_lse_tail(device: torch.device) -> tuple[int, ...]:
    """Returns the dimensions of cuDNN's lse after (N, H, Q): (1,) or (), depending on the PyTorch version."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    _, lse, *_ = aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, True)
    return tuple(lse.shape[3:])


def _contiguous_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pad(x: Tensor) -> Tensor:
    """Pads heads with zeros to a multiple of 8 features, for FlashAttention on CUDA; the scores do not change."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


# --- math backend ----------------------------------------------------------------------------------------------------


def _scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the scores of one head (N, Q, S), in the accumulation type."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -torch.inf)
    return scores + bias.to(scores)


def _math_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes one head at a time, to bound the memory of the scores."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=dtype)
    group = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        scores = _scores(q[:, h].to(dtype), k[:, h // group].to(dtype), bias)
        lse[:, h] = scores.logsumexp(-1)
        out[:, h] = (scores.softmax(-1) @ v[:, h // group].to(dtype)).to(q.dtype)
    return out, lse


def _math_backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients from the probabilities ``exp(scores - lse)`` (arXiv 2205.14135, algorithm 4)."""
    dtype = lse.dtype
    grads = tuple(torch.zeros_like(x, dtype=dtype) for x in qkv)
    group = qkv[0].shape[1] // qkv[1].shape[1]
    for h in range(qkv[0].shape[1]):
        g = h // group
        q, k, v = qkv[0][:, h].to(dtype), qkv[1][:, g].to(dtype), qkv[2][:, g].to(dtype)
        d_out = grad[:, h].to(dtype)
        p = (_scores(q, k, bias) - lse[:, h, :, None]).exp()
        delta = (d_out * out[:, h].to(dtype)).sum(-1, keepdim=True)
        d_scores = p * (d_out @ v.transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
        grads[0][:, h] = d_scores @ k
        grads[1][:, g] += d_scores.transpose(-1, -2) @ q
        grads[2][:, g] += p.transpose(-1, -2) @ d_out
    dq, dk, dv = (x.to(qkv[0].dtype) for x in grads)
    return dq, dk, dv
