"""The layers of a Llama block: grouped-query attention, SwiGLU; and the language-model head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchladder.models import loss
from torchladder.models.attention import AttentionFunction
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.rope import RoPE


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
        mean_square = features.square().mean(dim=-1, keepdim=True)
        norm = features * torch.rsqrt(mean_square + cast(float, self.eps))
        return (norm * self.weight).to(x.dtype).unflatten(-1, x.shape[2:])


class AttentionSinks(nn.Module):
    """Learned attention sinks: for each query head the logit of one more key, whose value is 0 (gpt-oss)."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads))

    def forward(self) -> Tensor:
        """Returns the logits (H,) of this rank's heads."""
        return self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions.

    Args:
        config: the model's config.
        rope: rotary embedding of queries and keys; None for no positions (NoPE).
        attention_fn: the kernel's attention.
        qk_norm: makes the norm of queries, and that of keys, from the number of heads; it is applied to (B, T, H, K)
            before RoPE (arXiv 2302.05442). None for no norm.
        sinks: whether the layer has attention sinks.
        query_scale: factor of the attention logits, besides 1 / sqrt(head_dim).
    """

    def __init__(
        self,
        config: LlamaConfig,
        rope: RoPE | None,
        attention_fn: AttentionFunction,
        qk_norm: Callable[[int], nn.Module] | None = None,
        sinks: bool = False,
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
        self.sinks = AttentionSinks(config.n_heads) if sinks else None

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
        arguments = (attn_mask,) if self.sinks is None else (attn_mask, self.sinks())
        out = self.attention_fn(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *arguments)  # (B, H, T, K)
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
        logits_at: Tensor | None = None,
        label_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        if labels is not None and label_weights is not None:
            terms = z_loss_multiplier, self.logit_softcap
            return loss.weighted_cross_entropy(hidden, weight, labels, label_weights, *terms)
        if labels is not None and z_loss_multiplier:
            return loss.cross_entropy_with_z_loss(hidden, weight, labels, z_loss_multiplier, self.logit_softcap)
        if labels is not None:
            return loss.cross_entropy(hidden, weight, labels, self.logit_softcap)
        if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
            logits = loss.full_logits(hidden, weight, logits_at)
        else:
            logits = F.linear(loss.take_tokens(hidden, logits_at), weight)
        return loss.softcap(logits, self.logit_softcap)

    def per_token_loss(self, hidden: Tensor, labels: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        """Returns the loss of each label (B, T) fp32, without gradients."""
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        return loss.per_token_cross_entropy(hidden, weight, labels, self.logit_softcap)
