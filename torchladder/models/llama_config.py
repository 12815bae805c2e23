"""Llama: config, initialization and flavors.

| flavor | model | parameters |
|---|---|---|
| `debug` | 2 layers of 64, for tests in seconds | 164,160 |
| `small` | 6 layers of 256, for experiments on a CPU | 6,229,248 |
| `120m`, `360m`, `1b`, `3b`, `3.2-3b` | SkyLadder (arXiv 2503.15450); `1b` has TinyLlama's shape | see docs/models.md |
| `code-1b`, `code-3.2-3b` | SkyLadder's models of code | |
| `llama2-7b`, `llama2-13b`, `llama2-70b` | Llama 2 (arXiv 2307.09288) | |
| `llama3-8b`, `llama3.2-1b`, `llama3.2-3b` | Llama 3 (arXiv 2407.21783) | |
| `mistral-7b` | Mistral 7B v0.1 (arXiv 2310.06825), to use with the mask `sliding` and a window of 4,096 | |
| `teenytinyllama-160m`, `teenytinyllama-460m` | TeenyTinyLlama (arXiv 2401.16640) | |
| `tilde-30b` | TildeOpen 30B | |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torchladder.models.layer_types import expand_layer_types, types_of_config
from torchladder.models.rope import check_rope
from torchladder.registry import require, unknown_name


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama model and its initialization."""

    dim: int
    """Features per token."""

    n_layers: int
    """Transformer blocks."""

    n_heads: int
    """Query heads."""

    n_kv_heads: int | None = None
    """Key-value heads, each shared by n_heads / n_kv_heads query heads; default: n_heads."""

    head_dim: int | None = None
    """Features per head; default: dim / n_heads."""

    ffn_dim: int
    """Hidden features of the feed-forward layer."""

    vocab_size: int = 32000
    """Rows of the embedding and of the head, at least the tokenizer's tokens."""

    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""

    tie_embeddings: bool = False
    """Use the embedding's weight in the head."""

    positional_embedding: Literal["rope", "none"] = "rope"
    """RoPE, or no positions (NoPE)."""

    rope_theta: float = 10000.0
    """Base of the RoPE frequencies."""

    partial_rotary_factor: float = 1.0
    """Fraction of a head's features that RoPE rotates, the first ones."""

    rope_scaling_factor: float = 1.0
    """Context extension over rope_original_seq_len by frequency scaling; 1 disables it."""

    rope_scaling_type: Literal["llama3", "yarn"] = "llama3"
    """How rope_scaling_factor scales frequencies: llama3 (Llama 3.1), or yarn (arXiv 2309.00071)."""

    rope_low_freq_factor: float = 1.0
    """llama3: frequencies with fewer turns in the original context are divided by rope_scaling_factor."""

    rope_high_freq_factor: float = 4.0
    """llama3: frequencies with more turns in the original context are unchanged."""

    rope_beta_slow: float = 1.0
    """yarn: frequencies with fewer turns in the original context are divided by rope_scaling_factor."""

    rope_beta_fast: float = 32.0
    """yarn: frequencies with more turns in the original context are unchanged."""

    rope_truncate: bool = True
    """yarn: round the bounds that follow from rope_beta_slow and rope_beta_fast to whole frequencies."""

    rope_attention_factor: float | None = None
    """yarn: factor of rotated queries and keys; default: 0.1 ln(rope_scaling_factor) + 1."""

    rope_original_seq_len: int = 8192
    """Tokens of the context that rope_scaling_factor extends."""

    rope_condense_ratio: float = 1.0
    """Divisor of positions (position interpolation)."""

    rope_restart: int = 0
    """Positions restart at 0 every rope_restart tokens; 0: never."""

    logit_softcap: float = 0.0
    """Logits become logit_softcap * tanh(logits / logit_softcap), as in Gemma 2; 0: unchanged."""

    attention_sinks: list[str] = field(default_factory=list)
    """Layer types with learned attention sinks: one more logit per head in the softmax, as in gpt-oss."""

    layer_types: list[str] | None = None
    """Type of each layer, or a pattern that repeats: full_attention, sliding_attention, chunked_attention; default:
    full_attention. Types other than full_attention have their masks in [attention.<type>]."""

    layer_rope_theta: dict[str, float] | None = None
    """Base of the RoPE frequencies of a layer type, where it is not rope_theta."""

    rope_scaling_layer_types: list[str] | None = None
    """Layer types whose RoPE rope_scaling_factor and rope_condense_ratio scale; default: all."""

    nope_layer_types: list[str] = field(default_factory=list)
    """Layer types without RoPE (NoPE)."""

    nope_layers: list[int] = field(default_factory=list)
    """Numbers of the layers without RoPE, from 0."""

    initialization: Literal["skyladder", "tilde", "megatron", "normal"] = "skyladder"
    """Standard deviation of initial weights: by shape (skyladder, tilde) or from init_std (megatron, normal)."""

    init_std: float = 0.02
    """Standard deviation of initial weights for initialization = "megatron" and "normal"."""

    def __post_init__(self) -> None:
        for key in ("dim", "n_layers", "n_heads", "kv_heads", "ffn_dim", "vocab_size"):
            require(getattr(self, key) >= 1, f"model.{key} = {getattr(self, key)}: must be 1 or more.")
        require(
            self.head_dim is not None or self.dim % self.n_heads == 0,
            f"model.dim = {self.dim} does not divide into model.n_heads = {self.n_heads}: set model.head_dim.",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_heads = {self.n_heads} is not a multiple of model.n_kv_heads = {self.kv_heads}.",
        )
        require(
            self.head_size >= 2 and self.head_size % 2 == 0,
            f"model.head_dim = {self.head_size}: must be even, because RoPE rotates pairs of features.",
        )
        for key in ("norm_eps", "init_std"):
            require(getattr(self, key) > 0, f"model.{key} = {getattr(self, key)}: must be positive.")
        require(
            0 <= self.logit_softcap < math.inf,
            f"model.logit_softcap = {self.logit_softcap}: must be positive, or 0 to leave logits unchanged.",
        )
        _ = self.expanded_layer_types  # raises
        types = types_of_config(self)
        for name in self.attention_sinks:
            if name not in types:
                raise unknown_name("layer type", name, types, "model.attention_sinks")
        check_rope(self, types)
        if self.initialization not in INITIAL_STDS:
            raise unknown_name("model.initialization", self.initialization, INITIAL_STDS)

    @property
    def expanded_layer_types(self) -> list[str]:
        """The type of each layer."""
        return expand_layer_types(self.layer_types, self.n_layers)

    def has_rope(self, number: int) -> bool:
        """Returns whether a layer has RoPE."""
        is_nope = number in self.nope_layers or self.expanded_layer_types[number] in self.nope_layer_types
        return self.positional_embedding == "rope" and not is_nope

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim


# --- initialization --------------------------------------------------------------------------------------------------

INITIAL_STDS = {
    "skyladder": lambda c: (math.sqrt(2 / (5 * c.dim)), 1 / (math.sqrt(c.dim) * c.n_layers)),
    "tilde": lambda c: (math.sqrt(2 / (5 * c.dim)), 2 / (c.n_layers * math.sqrt(c.dim))),
    "megatron": lambda c: (c.init_std, c.init_std / math.sqrt(2 * c.n_layers)),
    "normal": lambda c: (c.init_std, c.init_std),
}
"""Config -> standard deviation of all weights except norms, and of those that write to the residual stream.

skyladder and tilde: arXiv 1910.05895; residual projections use GPT-NeoX's wang_init (2 / (L sqrt d)), or half of it.
megatron: arXiv 1909.08053, as GPT-2. normal: the same for all, as Llama in Hugging Face transformers. Norms begin as
a factor of 1.
"""

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
"""Name suffixes of the weights that write to the residual stream."""


# --- flavors ---------------------------------------------------------------------------------------------------------


def _llama(n_layers: int, dim: int, heads: tuple[int, int], ffn_dim: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(n_layers=n_layers, dim=dim, n_heads=heads[0], n_kv_heads=heads[1], ffn_dim=ffn_dim, **more)


_LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "rope_theta": 500000.0, "initialization": "normal"}
_LLAMA_3_2: dict[str, Any] = {**_LLAMA_3, "rope_scaling_factor": 32.0, "tie_embeddings": True}
_NORMAL: dict[str, Any] = {"initialization": "normal"}
_TILDE: dict[str, Any] = {"vocab_size": 131072, "norm_eps": 3e-6, "rope_theta": 200000.0, "initialization": "tilde"}

# flavor: layers, dim, (query heads, key-value heads), ffn_dim
FLAVORS = {
    "debug": _llama(2, 64, (4, 2), 192, vocab_size=512),
    "small": _llama(6, 256, (4, 2), 640, vocab_size=4096),
    "120m": _llama(12, 768, (12, 1), 2048),
    "360m": _llama(18, 1024, (16, 16), 4096),
    "1b": _llama(22, 2048, (32, 4), 5632),
    "3b": _llama(26, 3200, (32, 4), 8640),
    "3.2-3b": _llama(28, 3072, (24, 8), 8192, vocab_size=32256, rope_theta=100000.0),
    "code-1b": _llama(22, 2048, (32, 4), 5632, vocab_size=49152, rope_theta=1000000.0),
    "code-3.2-3b": _llama(28, 3072, (24, 8), 8192, vocab_size=49152, rope_theta=100000.0),
    "llama2-7b": _llama(32, 4096, (32, 32), 11008, **_NORMAL),
    "llama2-13b": _llama(40, 5120, (40, 40), 13824, **_NORMAL),
    "llama2-70b": _llama(80, 8192, (64, 8), 28672, **_NORMAL),
    "llama3-8b": _llama(32, 4096, (32, 8), 14336, **_LLAMA_3),
    "llama3.2-1b": _llama(16, 2048, (32, 8), 8192, **_LLAMA_3_2),
    "llama3.2-3b": _llama(28, 3072, (24, 8), 8192, **_LLAMA_3_2),
    "mistral-7b": _llama(32, 4096, (32, 8), 14336, **_NORMAL),
    "teenytinyllama-160m": _llama(12, 768, (12, 12), 3072, **_NORMAL),
    "teenytinyllama-460m": _llama(24, 1024, (16, 16), 4096, **_NORMAL),
    "tilde-30b": _llama(60, 6144, (48, 8), 21504, **_TILDE),
}
