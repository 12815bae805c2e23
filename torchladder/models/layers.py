"""The layers of a Llama block: RoPE, grouped-query attention, SwiGLU; and the language-model head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchladder.models import loss
from torchladder.models.attention import AttentionFunction
from torchladder.models.llama_config import LlamaConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) in the dtype of its input, like FSDP2 under mixed precision.

    Under autocast the weight is fp32 and the input is not, which PyTorch's fused kernel does not take.
    """

    initial_weight: ClassVar[float] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm whose factor is 1 + weight, in fp32, as in Gemma; weights begin as 0."""

    initial_weight: ClassVar[float] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class JointRMSNorm(RMSNorm):
    """RMSNorm over the features of all heads together, (B, T, H, K), in fp32, as in OLMo 2.

    Its formula is written out, so that ranks that share the heads exchange no more than one number per token.
    """

    def forward(self, x: Tensor) -> Tensor:
        features = x.flatten(2).float()
        norm = features * torch.rsqrt(features.square().mean(dim=-1, keepdim=True) + self.eps)
        return (norm * self.weight).to(x.dtype).unflatten(-1, x.shape[2:])


class RoPE(nn.Module):
    """Rotary position embedding (arXiv 2104.09864) that rotates the first half of a head against the second, in fp32.

    All blocks share one instance. The table is recomputed whenever the module is moved or cast, so it stays fp32 in a
    model of any dtype and is valid after ``to_empty``.

    Args:
        config: the model's config.
        seq_len: tokens in a row; positions are 0 to ``seq_len - 1``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, seq_len: int) -> None:
        super().__init__()
        self.position_offset: int | Tensor = 0
        self.config = config
        for name in ("cos", "sin"):
            table = torch.empty(seq_len, 1, config.head_size // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.set_theta(config.rope_theta)

    def set_theta(self, theta: float) -> None:
        """Recomputes the table in place, so that a schedule of theta recompiles nothing."""
        self.theta = theta
        angles = rope_angles(self.config, theta, len(self.cos), self.cos.device)[:, None]  # (T, 1, K / 2)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Rotates the heads of ``x`` (B, T, H, K); the result has the dtype of ``x``."""
        offset, length = self.position_offset, x.shape[1]
        positions: slice | Tensor
        if isinstance(offset, int):
            positions = slice(offset, offset + length)
        else:
            positions = offset[:, None] + torch.arange(length, device=offset.device)  # (B, T)
        cos, sin = self.cos[positions], self.sin[positions]  # (T, 1, K / 2), or (B, T, 1, K / 2)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoPE:
        super()._apply(fn, recurse)
        self.cos, self.sin = self.cos.float(), self.sin.float()
        self.set_theta(self.theta)
        return self


def rope_angles(config: LlamaConfig, theta: float, seq_len: int, device: torch.device) -> Tensor:
    """Returns the rotation angle of each position and pair of features (T, K / 2), fp32.

    Scaling by frequency: Llama 3.1 (arXiv 2407.21783); by position (``rope_condense_ratio``): arXiv 2306.15595.
    """
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device) / config.head_size
    inv_freq = 1.0 / theta**exponent
    if config.rope_scaling_factor != 1:
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_seq_len * inv_freq / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = inv_freq * (smooth + (1 - smooth) / config.rope_scaling_factor)
    position = torch.arange(seq_len, dtype=torch.float32, device=device)
    if config.rope_restart:
        position = position % config.rope_restart
    return torch.outer(position / config.rope_condense_ratio, inv_freq)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions.

    Args:
        config: the model's config.
        rope: rotary embedding of queries and keys; None for no positions (NoPE).
        attention_fn: the kernel's attention.
        qk_norm: makes the norm of queries, and that of keys, from the number of heads; it is applied to (B, T, H, K)
            before RoPE (arXiv 2302.05442). None for no norm.
        query_scale: factor of the attention logits, besides 1 / sqrt(head_dim).
    """

    def __init__(
        self,
        config: LlamaConfig,
        rope: RoPE | None,
        attention_fn: AttentionFunction,
        qk_norm: Callable[[int], nn.Module] | None = None,
        query_scale: float = 1.0,
    ) -> None:
        super().__init__()
        dim, head_dim = config.dim, config.head_size
        self.head_dim = head_dim
        self.rope = rope
        self.attention_fn = attention_fn
        self.query_scale = query_scale
        self.q_proj = nn.Linear(dim, config.n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, config.kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, config.kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * head_dim, dim, bias=False)
        self.q_norm = None if qk_norm is None else qk_norm(config.n_heads)
        self.k_norm = None if qk_norm is None else qk_norm(config.kv_heads)

    def forward(self, x: Tensor, attn_mask: Any) -> Tensor:
        # -1 infers the number of heads, because under tensor parallelism a rank has only some of them.
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, K)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        if self.query_scale != 1:
            q = q * self.query_scale
        out = self.attention_fn(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask)  # (B, H, T, K)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): ``down_proj(silu(gate_proj(x)) * up_proj(x))``; or another ``activation``."""

    def __init__(self, dim: int, ffn_dim: int, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Head(nn.Module):
    """The language-model head: logits, or the summed loss without materializing them (``torchladder.models.loss``).

    Args:
        config: the model's config; with ``tie_embeddings`` the head has no weight, and takes the embedding's.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.logit_softcap = config.logit_softcap
        self.weight = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.dim))

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        tied_weight: Tensor | None = None,
        z_loss_multiplier: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        if labels is not None and z_loss_multiplier:
            return loss.cross_entropy_with_z_loss(hidden, weight, labels, z_loss_multiplier, self.logit_softcap)
        if labels is not None:
            return loss.cross_entropy(hidden, weight, labels, self.logit_softcap)
        if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
            logits = loss.full_logits(hidden, weight)
        else:
            logits = F.linear(hidden, weight)
        return loss.softcap(logits, self.logit_softcap)

    def per_token_loss(self, hidden: Tensor, labels: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        """Returns the loss of each label (B, T) fp32, without gradients."""
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        return loss.per_token_cross_entropy(hidden, weight, labels, self.logit_softcap)
