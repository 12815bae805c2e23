"""Llama (arXiv 2302.13971): pre-norm blocks of grouped-query attention and SwiGLU, without biases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchladder.models.attention import AttentionFunction, causal_attention
from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.llama_adapter import LLAMA_ADAPTER
from torchladder.models.layers import Attention, FeedForward, Head, RMSNorm
from torchladder.models.llama_config import FLAVORS, INITIAL_STDS, RESIDUAL_PROJECTIONS, LlamaConfig
from torchladder.models.model import Model, init_normal_, register
from torchladder.models.rope import RoPE
from torchladder.registry import ConfigError


class Block(nn.Module):
    """A transformer block: attention and feed-forward, each with a pre-norm and a residual connection.

    Args:
        config: the model's config.
        rope: rotary embedding of queries and keys, or None.
        attention_fn: the kernel's attention.
        qk_norm: see ``Attention``.
        sinks: see ``Attention``.
    """

    def __init__(
        self,
        config: LlamaConfig,
        rope: RoPE | None,
        attention_fn: AttentionFunction,
        qk_norm: Callable[[int], nn.Module] | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, rope, attention_fn, qk_norm, sinks)
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
        attention_fn: the kernel's attention, or that of each layer type; causal attention by default.
        seq_len: tokens in the longest row.
    """

    hf_adapter: ClassVar[HFAdapter | None] = LLAMA_ADAPTER
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(
        self,
        config: LlamaConfig,
        attention_fn: AttentionFunction | Mapping[str, AttentionFunction] = causal_attention,
        seq_len: int = 2048,
    ) -> None:
        super().__init__()
        self.config = config
        self.seq_len = seq_len
        types = self.layer_types
        roped = [name for number, name in enumerate(types) if config.has_rope(number)]
        self.ropes = nn.ModuleDict({name: RoPE(config, seq_len, name) for name in dict.fromkeys(roped)})
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict()
        for number, name in enumerate(types):
            own_attention = attention_fn[name] if isinstance(attention_fn, Mapping) else attention_fn
            rope: Any = self.ropes[name] if config.has_rope(number) else None
            self.layers[str(number)] = self.make_block(own_attention, rope, name in config.attention_sinks)
        self.norm: RMSNorm | None = self.norm_class(config.dim, eps=config.norm_eps)
        self.head: Head | None = Head(config)

    @property
    def layer_types(self) -> list[str]:
        return self.config.expanded_layer_types

    def make_block(self, attention_fn: AttentionFunction, rope: RoPE | None, sinks: bool) -> nn.Module:
        return Block(self.config, rope, attention_fn, sinks=sinks)

    def forward(
        self,
        tokens: Tensor,
        attn_mask: Any,
        labels: Tensor | None = None,
        z_loss_multiplier: float = 0.0,
        logits_at: Tensor | None = None,
        label_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        hidden = self._hidden_states(tokens, attn_mask)
        if self.head is None:  # a stage of a pipeline, not the last
            return hidden
        return self.head(hidden, labels, self._tied_weight(), z_loss_multiplier, logits_at, label_weights)

    @torch.no_grad()
    def per_token_loss(self, tokens: Tensor, attn_mask: Any, labels: Tensor) -> Tensor:
        assert self.head is not None
        return self.head.per_token_loss(self._hidden_states(tokens, attn_mask), labels, self._tied_weight())

    def _hidden_states(self, tokens: Tensor, attn_mask: Any) -> Tensor:
        """Returns the normalized output of the last block (B, T, d)."""
        x = tokens if self.embedding is None else self.embed(tokens)
        types = self.layer_types
        mixed = len({*types}) > 1
        for number, block in self.layers.items():
            x = block(x, attn_mask[types[int(number)]] if mixed else attn_mask)
        return x if self.norm is None else self.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the input of the first block (B, T, d)."""
        assert self.embedding is not None
        x: Tensor = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):  # autocast leaves the residual stream in fp32, FSDP2 does not
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def _tied_weight(self) -> Tensor | None:
        if not self.config.tie_embeddings:
            return None
        assert self.embedding is not None
        return self.embedding.weight

    def init_weights(self, seed: int) -> None:
        std, residual_std = INITIAL_STDS[self.config.initialization](self.config)
        for name, parameter in self.named_parameters():
            if name.endswith("sinks.weight"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.constant_(parameter, self.norm_class.initial_weight)
            else:
                init_normal_(parameter, name, seed, residual_std if name.endswith(RESIDUAL_PROJECTIONS) else std)

    def keep_stage(self, layers: Collection[str], first: bool, last: bool) -> None:
        if self.config.tie_embeddings:
            raise ConfigError(
                "model.tie_embeddings: not with pipeline parallelism (parallelism.pipeline_parallel_degree), because "
                "the embedding and the head are on different stages. Set it to false, or use other parallelisms."
            )
        self.layers = nn.ModuleDict({name: self.layers[name] for name in layers})
        if not first:
            self.embedding = None
        if not last:
            self.norm = self.head = None

    def parallel_plan(self) -> dict[str, str]:
        attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
        feed_forward = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        plan = {} if self.embedding is None else {"embedding": "embedding"}
        plan |= {} if self.head is None else {"norm": "sequence", "head": "lm_head"}
        for layer, projections in (("attention", attention), ("feed_forward", feed_forward)):
            plan |= {f"layers.*.{layer}_norm": "sequence", f"layers.*.{layer}": "gather"}
            plan |= {f"layers.*.{layer}.{name}": style for name, style in projections.items()}
        types = self.layer_types
        sinks = [number for number in self.layers if types[int(number)] in self.config.attention_sinks]
        return plan | {f"layers.{number}.attention.sinks": "sinks" for number in sinks}

    def head_counts(self) -> tuple[int, ...]:
        return self.config.n_heads, self.config.kv_heads

    def set_rope_theta(self, theta: float) -> None:
        if not self.ropes:
            super().set_rope_theta(theta)
        for name, rope in self.ropes.items():
            assert isinstance(rope, RoPE)
            if name not in (self.config.layer_rope_theta or {}) and theta != rope.theta:
                rope.set_theta(theta)

    def set_position_offset(self, offset: int | Tensor) -> None:
        for module in self.modules():
            if isinstance(module, RoPE):
                module.position_offset = offset

    def flops(self, tokens: int, pairs: int) -> int:
        # Forward: 2 per weight and token, and per attended pair 2 per feature for the scores and 2 for the values.
        # Backward: twice as many.
        config = self.config
        block_weights = sum(weight.numel() for weight in self.layers.parameters() if weight.dim() > 1)
        matmul_weights = block_weights + config.vocab_size * config.dim
        return 6 * matmul_weights * tokens + 12 * config.n_heads * config.head_size * pairs
