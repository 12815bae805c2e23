"""OLMo 2 and OLMo 3 in Hugging Face: norms behind attention and feed-forward, and over all queries or keys."""

from __future__ import annotations

from dataclasses import replace

from torchladder.models.hf.hf_layer_types import slides_between_full_layers
from torchladder.models.hf.llama_adapter import LLAMA_ADAPTER

OLMO2_ADAPTER = replace(
    LLAMA_ADAPTER,
    architectures={"olmo2": "Olmo2ForCausalLM"},
    tensor_names={
        **LLAMA_ADAPTER.tensor_names,
        "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
        "layers.*.attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
        "layers.*.attention_norm.weight": "model.layers.*.post_attention_layernorm.weight",
        "layers.*.feed_forward_norm.weight": "model.layers.*.post_feedforward_layernorm.weight",
    },
    defaults={**LLAMA_ADAPTER.defaults, "rms_norm_eps": 1e-5},
    type_defaults={},
    sliding_window_type="",
    layer_types_type="",
)
OLMO3_ADAPTER = replace(
    OLMO2_ADAPTER,
    architectures={"olmo3": "Olmo3ForCausalLM"},
    defaults={**OLMO2_ADAPTER.defaults, "sliding_window": 4096, "sliding_window_pattern": 4},
    fixed_values={**OLMO2_ADAPTER.fixed_values, "sliding_window_pattern": 4},
    layer_types_type="olmo3",
    rope_thetas={"full_attention": 500000.0, "sliding_attention": 500000.0},
    slides=slides_between_full_layers,
)
