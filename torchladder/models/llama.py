"""Llama (arXiv 2302.13971): pre-norm blocks of grouped-query attention and SwiGLU, without biases."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchladder.models.attention import AttentionFunction, causal_attention
from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.llama_adapter import LLAMA_ADAPTER
from torchladder.models.layers import Attention, FeedForward, Head, RMSNorm, RoPE
from torchladder.models.llama_config import FLAVORS, INITIAL_STDS, RESIDUAL_PROJECTIONS, LlamaConfig
from torchladder.models.model import Model, init_normal_, register


class Block(nn.Module):
    """A transformer block: attention and feed-forward, each with a pre-norm and a residual connection.

    Args:
        config: the model's config.
        rope: rotary embedding of queries and keys, or None.
        attention_fn: the kernel's attention.
        qk_norm: see ``Attention``.
    """

    def __init__(
        self, config: LlamaConfig, rope: RoPE | None, attention_fn: AttentionFunction, qk_norm: float | None = None
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, rope, attention_fn, qk_norm)
        self.feed_forward_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, attn_mask: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attn_mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


@register("llama", flavors=FLAVORS)
class Llama(Model):
    """Llama.

    Args:
        config: the shape.
        attention_fn: the kernel's attention; causal attention by default.
        seq_len: tokens in the longest row.
    """

    hf_adapter: ClassVar[HFAdapter | None] = LLAMA_ADAPTER

    def __init__(
        self, config: LlamaConfig, attention_fn: AttentionFunction = causal_attention, seq_len: int = 2048
    ) -> None:
        super().__init__()
        self.config = config
        self.seq_len = seq_len
        self.rope = RoPE(config, seq_len) if config.positional_embedding == "rope" else None
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): self.make_block(attention_fn) for i in range(config.n_layers)})
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = Head(config)

    def make_block(self, attention_fn: AttentionFunction) -> Block:
        return Block(self.config, self.rope, attention_fn)

    def forward(
        self,
        tokens: Tensor,
        attn_mask: Any,
        labels: Tensor | None = None,
        z_loss_multiplier: float = 0.0,
        logits_at: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self._hidden_states(tokens, attn_mask)
        return self.head(hidden, labels, self._tied_weight(), z_loss_multiplier, logits_at)

    @torch.no_grad()
    def per_token_loss(self, tokens: Tensor, attn_mask: Any, labels: Tensor) -> Tensor:
        return self.head.per_token_loss(self._hidden_states(tokens, attn_mask), labels, self._tied_weight())

    def _hidden_states(self, tokens: Tensor, attn_mask: Any) -> Tensor:
        """Returns the normalized output of the last block (B, T, d)."""
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):  # autocast leaves the residual stream in fp32, FSDP2 does not
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.layers.values():
            x = block(x, attn_mask)
        return self.norm(x)

    def _tied_weight(self) -> Tensor | None:
        return self.embedding.weight if self.config.tie_embeddings else None

    def init_weights(self, seed: int) -> None:
        std, residual_std = INITIAL_STDS[self.config.initialization](self.config)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                init_normal_(parameter, name, seed, residual_std if name.endswith(RESIDUAL_PROJECTIONS) else std)

    def parallel_plan(self) -> dict[str, str]:
        attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
        feed_forward = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        plan = {"embedding": "embedding", "norm": "sequence", "head": "lm_head"}
        for layer, projections in (("attention", attention), ("feed_forward", feed_forward)):
            plan |= {f"layers.*.{layer}_norm": "sequence", f"layers.*.{layer}": "gather"}
            plan |= {f"layers.*.{layer}.{name}": style for name, style in projections.items()}
        return plan

    def head_counts(self) -> tuple[int, ...]:
        return self.config.n_heads, self.config.kv_heads

    def set_rope_theta(self, theta: float) -> None:
        if self.rope is None:
            super().set_rope_theta(theta)
        elif theta != self.rope.theta:
            self.rope.set_theta(theta)

    def set_position_offset(self, offset: int | Tensor) -> None:
        if self.rope is not None:
            self.rope.position_offset = offset

    def flops(self, tokens: int, pairs: int) -> int:
        # Forward: 2 per weight and token, and per attended pair 2 per feature for the scores and 2 for the values.
        # Backward: twice as many.
        config = self.config
        block_weights = sum(weight.numel() for weight in self.layers.parameters() if weight.dim() > 1)
        matmul_weights = block_weights + config.vocab_size * config.dim
        return 6 * matmul_weights * tokens + 12 * config.n_layers * config.n_heads * config.head_size * pairs
