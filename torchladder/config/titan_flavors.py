"""Models of torchtitan v0.2.2, and the section ``[model]`` of the same shape."""

from __future__ import annotations

from typing import Any

_LLAMA3 = {"rope_scaling_factor": 8.0, "rope_theta": 500000.0, "initialization": "megatron"}

FLAVORS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "llama3": (
        "llama",
        {
            "debugmodel": {
                **{"flavor": "", "n_layers": 6, "dim": 256, "n_heads": 16, "ffn_dim": 768, "vocab_size": 2048},
                **_LLAMA3,
            },
            "8B": {"flavor": "llama3-8b", **_LLAMA3},
            "70B": {"flavor": "llama2-70b", "vocab_size": 128256, **_LLAMA3},
            "405B": {
                **{"flavor": "", "n_layers": 126, "dim": 16384, "n_heads": 128, "n_kv_heads": 8, "ffn_dim": 53248},
                **{"vocab_size": 128256, **_LLAMA3},
            },
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "debugmodel": {
                **{"flavor": "", "n_layers": 8, "dim": 256, "n_heads": 16, "n_kv_heads": 8, "ffn_dim": 3072},
                **{"vocab_size": 2048, "tie_embeddings": True, "initialization": "megatron"},
            },
            **{
                size: {"flavor": size.lower(), "initialization": "megatron"}
                for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
            },
        },
    ),
}
"""torchtitan's model -> the model here, and flavor -> the section ``[model]`` of the same shape."""

DOCUMENT_MASK_SUFFIXES = ("_flex_attn", "_varlen_attn", "_flex", "_varlen")
"""Endings of llama3's flavors whose queries attend to their own document only."""

LAYERS = {
    **{"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"},
    **{"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "output": "head"},
}
"""Name of a linear layer in torchtitan -> here."""


def find_flavor(name: str, flavor: str) -> tuple[dict[str, Any], list[str]] | None:
    """Returns the section ``[model]`` and the masks of a model of torchtitan; None if none here has its shape."""
    model, flavors = FLAVORS.get(name, ("", {}))
    base = next((flavor.removesuffix(end) for end in DOCUMENT_MASK_SUFFIXES if flavor.endswith(end)), flavor)
    if base not in flavors or (base != flavor and name != "llama3"):
        return None
    return {"name": model, **flavors[base]}, ["causal"] if base == flavor else ["causal", "document"]
