"""SmolLM 3 in Hugging Face: Llama's tensors, and ``no_rope_layers``, which has a 0 for each layer without RoPE."""

from __future__ import annotations

from dataclasses import replace

from torchladder.models.hf.hf_layer_types import slides_without_rope
from torchladder.models.hf.llama_adapter import LLAMA_ADAPTER

SMOLLM3_ADAPTER = replace(
    LLAMA_ADAPTER,
    architectures={"smollm3": "SmolLM3ForCausalLM"},
    defaults={
        **LLAMA_ADAPTER.defaults,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
    },
    type_defaults={},
    fixed_values={key: value for key, value in LLAMA_ADAPTER.fixed_values.items() if key != "use_sliding_window"},
    has_nope_layers=True,
    rope_thetas={"full_attention": 2000000.0},
    sliding_window_type="",
    layer_types_type="smollm3",
    slides=slides_without_rope,
)
