"""Gemma 3 (arXiv 2503.19786), the text models: five sliding layers to one full layer, and a norm on both sides of each.

Beside QK-norm it differs from Llama in a GELU, in norms whose factor is 1 + weight, and in an embedding that is scaled
by sqrt(dim). Sliding layers have a window of 512 tokens (`270m`, `1b`) or 1,024, and a RoPE of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchladder.models.attention import AttentionFunction
from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.gemma3_adapter import GEMMA3_ADAPTER
from torchladder.models.layer_types import sliding_pattern
from torchladder.models.layers import Attention, FeedForward, RMSNorm, ZeroCenteredRMSNorm
from torchladder.models.llama import Llama
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.model import register
from torchladder.models.rope import RoPE
from torchladder.registry import require


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(LlamaConfig):
    """The shape of a Gemma 3 model: ``LlamaConfig`` with other defaults, and the scale of attention."""

    query_pre_attn_scalar: int = 256
    """Attention logits are divided by the square root of this."""

    head_dim: int | None = 256
    """Features per head."""

    vocab_size: int = 262208
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    rope_theta: float = 1000000.0
    initialization: Literal["skyladder", "tilde", "megatron", "normal"] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        scalar = self.query_pre_attn_scalar
        require(scalar >= 1, f"model.query_pre_attn_scalar = {scalar}: must be 1 or more.")


def _gemma3(n_layers: int, dim: int, heads: tuple[int, int], ffn_dim: int, **more: Any) -> Gemma3Config:
    return Gemma3Config(
        n_layers=n_layers,
        dim=dim,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        ffn_dim=ffn_dim,
        layer_types=sliding_pattern(n_layers, 6),
        layer_rope_theta={"sliding_attention": 10000.0},
        **more,
    )


_SMALL: dict[str, Any] = {"vocab_size": 262144}
_LONG: dict[str, Any] = {"rope_condense_ratio": 8.0, "rope_scaling_layer_types": ["full_attention"]}
_DEBUG: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "vocab_size": 512}

# flavor: layers, dim, (query heads, key-value heads), ffn_dim
FLAVORS = {
    "debug": _gemma3(6, 64, (4, 2), 192, **_DEBUG),
    "270m": _gemma3(18, 640, (4, 1), 2048, **_SMALL),
    "1b": _gemma3(26, 1152, (4, 1), 6912, **_SMALL),
    "4b": _gemma3(34, 2560, (8, 4), 10240, **_LONG),
    "12b": _gemma3(48, 3840, (16, 8), 15360, **_LONG),
    "27b": _gemma3(62, 5376, (32, 16), 21504, head_dim=128, query_pre_attn_scalar=168, **_LONG),
}


class Gemma3Block(nn.Module):
    """A transformer block with a norm before and after attention, and before and after the feed-forward layer.

    Args:
        config: the model's config.
        rope: rotary embedding of queries and keys, or None.
        attention_fn: the kernel's attention.
        sinks: see ``Attention``.
    """

    def __init__(self, config: Gemma3Config, rope: RoPE | None, attention_fn: AttentionFunction, sinks: bool) -> None:
        super().__init__()
        norm = partial(ZeroCenteredRMSNorm, eps=config.norm_eps)
        self.attention_norm = norm(config.dim)
        self.attention = Attention(
            config,
            rope,
            attention_fn,
            qk_norm=lambda _: norm(config.head_size),
            sinks=sinks,
            query_scale=(config.head_size / config.query_pre_attn_scalar) ** 0.5,
        )
        self.attention_post_norm = norm(config.dim)
        self.feed_forward_norm = norm(config.dim)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, partial(F.gelu, approximate="tanh"))
        self.feed_forward_post_norm = norm(config.dim)

    def forward(self, x: Tensor, attn_mask: Any) -> Tensor:
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), attn_mask))
        return x + self.feed_forward_post_norm(self.feed_forward(self.feed_forward_norm(x)))


@register("gemma3", flavors=FLAVORS)
class Gemma3(Llama):
    """Gemma 3."""

    hf_adapter: ClassVar[HFAdapter | None] = GEMMA3_ADAPTER
    norm_class: ClassVar[type[RMSNorm]] = ZeroCenteredRMSNorm

    def make_block(self, attention_fn: AttentionFunction, rope: RoPE | None, sinks: bool) -> nn.Module:
        return Gemma3Block(self.config, rope, attention_fn, sinks)

    def embed(self, tokens: Tensor) -> Tensor:
        x = super().embed(tokens)
        # The factor is rounded like the embedding, as in Hugging Face transformers: sqrt(1152) is 34 in bfloat16.
        return x * torch.tensor(self.config.dim**0.5, dtype=x.dtype, device="cpu").item()

    def parallel_plan(self) -> dict[str, str]:
        plan = super().parallel_plan() | {f"layers.*.attention.{name}": "qk_norm" for name in ("q_norm", "k_norm")}
        return plan | {f"layers.*.{layer}_post_norm": "sequence" for layer in ("attention", "feed_forward")}
