"""OLMo 2 (arXiv 2501.00656) and OLMo 3 (arXiv 2512.13961): Llama with norms behind attention and feed-forward.

A norm of the output of each, before it is added to the residual stream, replaces the norm of its input. Queries and
keys pass an RMSNorm over all heads together. OLMo 3 has three sliding layers to one full layer, with a window of 4,096.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from torchladder.models.attention import AttentionFunction
from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.olmo_adapter import OLMO2_ADAPTER, OLMO3_ADAPTER
from torchladder.models.layer_types import sliding_pattern
from torchladder.models.layers import JointRMSNorm
from torchladder.models.llama import Block, Llama
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.model import register
from torchladder.models.rope import RoPE


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(LlamaConfig):
    """The shape of an OLMo 2 model: ``LlamaConfig`` with other defaults."""

    vocab_size: int = 100352
    norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    initialization: Literal["skyladder", "tilde", "megatron", "normal"] = "normal"


@dataclass(frozen=True, kw_only=True)
class Olmo3Config(Olmo2Config):
    """The shape of an OLMo 3 model: ``LlamaConfig`` with other defaults."""

    vocab_size: int = 100278


def _olmo2(n_layers: int, dim: int, heads: tuple[int, int], ffn_dim: int, **more: Any) -> Olmo2Config:
    return Olmo2Config(n_layers=n_layers, dim=dim, n_heads=heads[0], n_kv_heads=heads[1], ffn_dim=ffn_dim, **more)


def _olmo3(n_layers: int, dim: int, heads: tuple[int, int], ffn_dim: int, **more: Any) -> Olmo3Config:
    types = sliding_pattern(n_layers, 4)
    return Olmo3Config(
        n_layers=n_layers, dim=dim, n_heads=heads[0], n_kv_heads=heads[1], ffn_dim=ffn_dim, layer_types=types, **more
    )


_YARN: dict[str, Any] = {
    "rope_scaling_type": "yarn",
    "rope_scaling_factor": 8.0,
    "rope_original_seq_len": 8192,
    "rope_attention_factor": 1.2079441541679836,
    "rope_scaling_layer_types": ["full_attention"],
}

# flavor: layers, dim, (query heads, key-value heads), ffn_dim
OLMO2_FLAVORS = {
    "debug": _olmo2(2, 64, (4, 2), 192, vocab_size=512),
    "1b": _olmo2(16, 2048, (16, 16), 8192),
    "7b": _olmo2(32, 4096, (32, 32), 11008),
    "13b": _olmo2(40, 5120, (40, 40), 13824),
    "32b": _olmo2(64, 5120, (40, 8), 27648),
}
OLMO3_FLAVORS = {
    "debug": _olmo3(4, 64, (4, 2), 192, vocab_size=512),
    "7b": _olmo3(32, 4096, (32, 32), 11008, **_YARN),
    "32b": _olmo3(64, 5120, (40, 8), 27648, **_YARN),
}


class Olmo2Block(Block):
    """A transformer block whose norms are those of the outputs of attention and feed-forward."""

    def forward(self, x: Tensor, attn_mask: Any) -> Tensor:
        x = x + self.attention_norm(self.attention(x, attn_mask))
        return x + self.feed_forward_norm(self.feed_forward(x))


@register("olmo2", flavors=OLMO2_FLAVORS)
class Olmo2(Llama):
    """OLMo 2."""

    hf_adapter: ClassVar[HFAdapter | None] = OLMO2_ADAPTER

    def make_block(self, attention_fn: AttentionFunction, rope: RoPE | None, sinks: bool) -> nn.Module:
        def qk_norm(heads: int) -> JointRMSNorm:
            return JointRMSNorm(heads * self.config.head_size, eps=self.config.norm_eps)

        return Olmo2Block(self.config, rope, attention_fn, qk_norm, sinks)

    def parallel_plan(self) -> dict[str, str]:
        return super().parallel_plan() | {
            f"layers.*.attention.{name}": "joint_qk_norm" for name in ("q_norm", "k_norm")
        }


@register("olmo3", flavors=OLMO3_FLAVORS)
class Olmo3(Olmo2):
    """OLMo 3: OLMo 2 with sliding layers."""

    hf_adapter: ClassVar[HFAdapter | None] = OLMO3_ADAPTER
