"""Qwen3 (arXiv 2505.09388), the dense models: Llama with QK-norm and an explicit head dimension.

Queries and keys pass an RMSNorm per head before RoPE, which bounds the attention logits. The smaller models tie the
head to the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from torchladder.models.attention import AttentionFunction
from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.qwen3_adapter import QWEN3_ADAPTER
from torchladder.models.layers import RMSNorm
from torchladder.models.llama import Block, Llama
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.model import register
from torchladder.models.rope import RoPE


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """The shape of a Qwen3 model: ``LlamaConfig`` with other defaults."""

    head_dim: int | None = 128
    """Features per head."""

    vocab_size: int = 151936
    norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    initialization: Literal["skyladder", "tilde", "megatron", "normal"] = "normal"


def _qwen3(n_layers: int, dim: int, heads: tuple[int, int], ffn_dim: int, tied: bool, **more: Any) -> Qwen3Config:
    return Qwen3Config(
        n_layers=n_layers, dim=dim, n_heads=heads[0], n_kv_heads=heads[1], ffn_dim=ffn_dim, tie_embeddings=tied, **more
    )


# flavor: layers, dim, (query heads, key-value heads), ffn_dim, tied
FLAVORS = {
    "debug": _qwen3(2, 64, (4, 2), 192, tied=True, head_dim=32, vocab_size=512),
    "0.6b": _qwen3(28, 1024, (16, 8), 3072, tied=True),
    "1.7b": _qwen3(28, 2048, (16, 8), 6144, tied=True),
    "4b": _qwen3(36, 2560, (32, 8), 9728, tied=True),
    "8b": _qwen3(36, 4096, (32, 8), 12288, tied=False),
    "14b": _qwen3(40, 5120, (40, 8), 17408, tied=False),
    "32b": _qwen3(64, 5120, (64, 8), 25600, tied=False),
}


@register("qwen3", flavors=FLAVORS)
class Qwen3(Llama):
    """Qwen3: Llama with an RMSNorm of each head's queries and keys."""

    hf_adapter: ClassVar[HFAdapter | None] = QWEN3_ADAPTER

    def make_block(self, attention_fn: AttentionFunction, rope: RoPE | None, sinks: bool) -> nn.Module:
        def qk_norm(heads: int) -> RMSNorm:
            return RMSNorm(self.config.head_size, eps=self.config.norm_eps)

        return Block(self.config, rope, attention_fn, qk_norm, sinks)

    def parallel_plan(self) -> dict[str, str]:
        return super().parallel_plan() | {f"layers.*.attention.{name}": "qk_norm" for name in ("q_norm", "k_norm")}
