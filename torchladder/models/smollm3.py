"""SmolLM 3 (Hugging Face, 2025): Llama whose every fourth layer has no RoPE (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.smollm3_adapter import SMOLLM3_ADAPTER
from torchladder.models.llama import Llama
from torchladder.models.llama_config import LlamaConfig
from torchladder.models.model import register


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(LlamaConfig):
    """The shape of a SmolLM 3 model: ``LlamaConfig`` with other defaults."""

    vocab_size: int = 128256
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    rope_theta: float = 2000000.0
    initialization: Literal["skyladder", "tilde", "megatron", "normal"] = "normal"


def _smollm3(n_layers: int, dim: int, heads: tuple[int, int], ffn_dim: int, **more: Any) -> SmolLM3Config:
    return SmolLM3Config(
        n_layers=n_layers,
        dim=dim,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        ffn_dim=ffn_dim,
        nope_layers=[*range(3, n_layers, 4)],
        **more,
    )


# flavor: layers, dim, (query heads, key-value heads), ffn_dim
FLAVORS = {
    "debug": _smollm3(4, 64, (4, 2), 192, vocab_size=512),
    "3b": _smollm3(36, 2048, (16, 4), 11008, rope_theta=5000000.0),
}


@register("smollm3", flavors=FLAVORS)
class SmolLM3(Llama):
    """SmolLM 3: Llama with ``nope_layers``."""

    hf_adapter: ClassVar[HFAdapter | None] = SMOLLM3_ADAPTER
