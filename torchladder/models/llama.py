"""Llama (arXiv 2302.13971): pre-norm blocks of grouped-query attention and SwiGLU, without biases."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchladder.models.attention import AttentionFunction, causal_attention
from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.layers import Attention, FeedForward, Head, RoPE
from torchladder.models.llama_config import FLAVORS, INITIAL_STDS, RESIDUAL_PROJECTIONS, LlamaConfig
from torchladder.models.model import Model, init_normal_, register

# Llama and Mistral in Hugging Face: a Mistral is a Llama with a sliding window. Both sides rotate the first half of a
# head against the second, so no row of a projection is permuted.
LLAMA_ADAPTER = HFAdapter(
    architectures={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    tensor_names={
        "embedding.weight": "model.embed_tokens.weight",
        "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
        "layers.*.attention.q_proj.weight": "model.layers.*.self_attn.q_proj.weight",
        "layers.*.attention.k_proj.weight": "model.layers.*.self_attn.k_proj.weight",
        "layers.*.attention.v_proj.weight": "model.layers.*.self_attn.v_proj.weight",
        "layers.*.attention.o_proj.weight": "model.layers.*.self_attn.o_proj.weight",
        "layers.*.feed_forward_norm.weight": "model.layers.*.post_attention_layernorm.weight",
        "layers.*.feed_forward.gate_proj.weight": "model.layers.*.mlp.gate_proj.weight",
        "layers.*.feed_forward.up_proj.weight": "model.layers.*.mlp.up_proj.weight",
        "layers.*.feed_forward.down_proj.weight": "model.layers.*.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    config_keys={
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn_dim": "intermediate_size",
        "vocab_size": "vocab_size",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "sliding_window": 4096},
    fixed_values={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    },
    rope_scalings={
        "linear": {"rope_condense_ratio": "factor"},
        "llama3": {
            "rope_scaling_factor": "factor",
            "rope_low_freq_factor": "low_freq_factor",
            "rope_high_freq_factor": "high_freq_factor",
            "rope_original_seq_len": "original_max_position_embeddings",
        },
    },
    sliding_window_type="mistral",
)


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
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, rope, attention_fn, qk_norm)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
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
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = Head(config)

    def make_block(self, attention_fn: AttentionFunction) -> Block:
        return Block(self.config, self.rope, attention_fn)

    def forward(self, tokens: Tensor, attn_mask: Any, labels: Tensor | None = None) -> Tensor:
        return self.head(self._hidden_states(tokens, attn_mask), labels, self._tied_weight())

    @torch.no_grad()
    def per_token_loss(self, tokens: Tensor, attn_mask: Any, labels: Tensor) -> Tensor:
        return self.head.per_token_loss(self._hidden_states(tokens, attn_mask), labels, self._tied_weight())

    def _hidden_states(self, tokens: Tensor, attn_mask: Any) -> Tensor:
        """Returns the normalized output of the last block (B, T, d)."""
        x = self.embedding(tokens)
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
        plan = {"embedding": "embedding", "norm": "sequence", "head": "head"}
        for layer, projections in (("attention", attention), ("feed_forward", feed_forward)):
            plan |= {f"layers.*.{layer}_norm": "sequence", f"layers.*.{layer}": "gather"}
            plan |= {f"layers.*.{layer}.{name}": style for name, style in projections.items()}
        return plan

    def heads(self) -> tuple[int, ...]:
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
