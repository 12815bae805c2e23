"""Qwen3 (arXiv 2505.09388), its dense models: a Llama whose heads are of a size of their own, and normalised.

Queries and keys pass an RMSNorm per head before they are rotated, which bounds attention's logits. The smaller models
use the embedding as the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.qwen3_adapter import QWEN3_ADAPTER
from torchladder.models.llama import Block, Llama
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.model import Attend, register


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """The shape of a Qwen3: a Llama's, with other values where nothing is said."""

    head_dim: int | None = 128
    """Features per head."""

    vocab_size: int = 151936
    """Rows of the embedding and of the head: the tokenizer's tokens, padded or not."""

    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""

    rope_theta: float = 1000000.0
    """Base of the rotations' frequencies."""

    initialization: Literal["skyladder", "tilde", "megatron", "normal"] = "normal"
    """Deviations of the initial weights: SkyLadder's or Tilde's by shape, Megatron's or a plain one by init_std."""


def _shape(n_layers: int, dim: int, heads: tuple[int, int], ffn_dim: int, tied: bool, **more: Any) -> Qwen3Config:
    return Qwen3Config(
        n_layers=n_layers, dim=dim, n_heads=heads[0], n_kv_heads=heads[1], ffn_dim=ffn_dim, tie_embeddings=tied, **more
    )


# flavor: layers, dim, (heads, key-value heads), ffn_dim, tied
FLAVORS = {
    "debug": _shape(2, 64, (4, 2), 192, tied=True, head_dim=32, vocab_size=512),
    "0.6b": _shape(28, 1024, (16, 8), 3072, tied=True),
    "1.7b": _shape(28, 2048, (16, 8), 6144, tied=True),
    "4b": _shape(36, 2560, (32, 8), 9728, tied=True),
    "8b": _shape(36, 4096, (32, 8), 12288, tied=False),
    "14b": _shape(40, 5120, (40, 8), 17408, tied=False),
    "32b": _shape(64, 5120, (64, 8), 25600, tied=False),
}


@register("qwen3", flavors=FLAVORS)
class Qwen3(Llama):
    """A Qwen3: a Llama that norms the queries and keys of each head."""

    hf_adapter: ClassVar[HFAdapter | None] = QWEN3_ADAPTER

    def block(self, attend: Attend) -> Block:
        return Block(self.config, self.rope, attend, qk_norm=self.config.norm_eps)

    def parallel_plan(self) -> dict[str, str]:
        return super().parallel_plan() | {f"layers.*.attention.{name}": "heads" for name in ("q_norm", "k_norm")}
