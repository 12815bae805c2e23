"""Qwen3 in Hugging Face: Llama's tensors and keys, norms of queries and keys, and heads of 128 features."""

from __future__ import annotations

from dataclasses import replace

from torchladder.models.hf.llama_adapter import LLAMA_ADAPTER

QWEN3_ADAPTER = replace(
    LLAMA_ADAPTER,
    architectures={"qwen3": "Qwen3ForCausalLM"},
    tensor_names={
        **LLAMA_ADAPTER.tensor_names,
        "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
        "layers.*.attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
    },
    defaults={**LLAMA_ADAPTER.defaults, "head_dim": 128, "num_key_value_heads": 32},
    type_defaults={"qwen3": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}},
    fixed_values={key: value for key, value in LLAMA_ADAPTER.fixed_values.items() if key != "use_sliding_window"},
    sliding_window_type="",
    layer_types_type="qwen3",
)
