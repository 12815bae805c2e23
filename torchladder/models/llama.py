"""Llama (arXiv 2302.13971): pre-norm blocks of grouped-query attention and SwiGLU, without biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchladder.models.attention import causal
from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.llama_adapter import LLAMA_ADAPTER
from torchladder.models.layers import Attention, FeedForward, Head, RoPE
from torchladder.models.llama_config import FLAVORS, INITIALIZATIONS, RESIDUAL, LlamaConfig
from torchladder.models.model import Attend, Model, init_normal_, register


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and each added to what came in.

    Args:
        config: the shape.
        rope: the rotation of queries and keys, or None.
        attend: the kernel's attention.
        qk_norm: as ``Attention`` takes it.
    """

    def __init__(self, config: LlamaConfig, rope: RoPE | None, attend: Attend, qk_norm: float | None = None) -> None:
        super().__init__()
        heads = (config.n_heads, config.kv_heads)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, heads, config.head_size, rope, attend, qk_norm)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, attention_mask: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attention_mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


@register("llama", flavors=FLAVORS)
class Llama(Model):
    """A Llama.

    Args:
        config: its shape.
        attend: the kernel's attention; full causal attention where none is given.
        seq_len: tokens in the longest row.
    """

    hf_adapter: ClassVar[HFAdapter | None] = LLAMA_ADAPTER

    def __init__(self, config: LlamaConfig, attend: Attend = causal, seq_len: int = 2048) -> None:
        super().__init__()
        self.config = config
        self.seq_len = seq_len
        rope = config.positional_embedding == "rope"
        self.rope = RoPE(config.head_size, seq_len, config.rotation) if rope else None
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): self.block(attend) for i in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = Head(config.dim, config.vocab_size, config.tie_embeddings)

    def block(self, attend: Attend) -> Block:
        """Returns one of the blocks."""
        return Block(self.config, self.rope, attend)

    def forward(self, tokens: Tensor, attention_mask: Any, labels: Tensor | None = None) -> Tensor:
        return self.head(self._states(tokens, attention_mask), labels, self._tied())

    @torch.no_grad()
    def losses(self, tokens: Tensor, attention_mask: Any, labels: Tensor) -> Tensor:
        return self.head.losses(self._states(tokens, attention_mask), labels, self._tied())

    def _states(self, tokens: Tensor, attention_mask: Any) -> Tensor:
        """Returns what the head takes (B, T, d)."""
        x = self.embedding(tokens)
        for block in self.layers.values():
            x = block(x, attention_mask)
        return self.norm(x)

    def _tied(self) -> Tensor | None:
        return self.embedding.weight if self.config.tie_embeddings else None

    def init_weights(self, seed: int) -> None:
        std, residual_std = INITIALIZATIONS[self.config.initialization](self.config)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                init_normal_(parameter, name, seed, residual_std if name.endswith(RESIDUAL) else std)

    def parallel_plan(self) -> dict[str, str]:
        attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
        feed_forward = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        plan = {"embedding": "embedding", "norm": "sequence", "head": "head"}
        for layer, parts in (("attention", attention), ("feed_forward", feed_forward)):
            plan |= {f"layers.*.{layer}_norm": "sequence", f"layers.*.{layer}": "gather"}
            plan |= {f"layers.*.{layer}.{name}": style for name, style in parts.items()}
        return plan

    def heads(self) -> tuple[int, ...]:
        return self.config.n_heads, self.config.kv_heads

    def set_rope_theta(self, theta: float) -> None:
        if self.rope is None:
            super().set_rope_theta(theta)
        elif theta != self.rope.rotation.theta:
            self.rope.set_rope_theta(replace(self.rope.rotation, theta=theta))

    def set_position_offset(self, first: int | Tensor) -> None:
        if self.rope is not None:
            self.rope.set_position_offset(first)

    def flops(self, tokens: int, pairs: int) -> int:
        # Forward takes 2 operations per weight and token, and per pair 2 per feature in the scores and 2 in the values.
        # Backward takes twice as many of both.
        return 6 * self._matmul_parameters() * tokens + 12 * self._attention_features() * pairs

    def palm_flops(self, tokens: int) -> int:
        return (6 * self.num_parameters() + 12 * self._attention_features() * self.seq_len) * tokens

    def _matmul_parameters(self) -> int:
        in_blocks = sum(weight.numel() for weight in self.layers.parameters() if weight.dim() > 1)
        return in_blocks + self.config.vocab_size * self.config.dim

    def _attention_features(self) -> int:
        return self.config.n_layers * self.config.n_heads * self.config.head_size
