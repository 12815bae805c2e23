"""Llama, Mistral and Ministral in Hugging Face: a Llama with a sliding window in all layers, or in some.

Both sides rotate the first half of a head against the second, so no row of a projection is permuted.
"""

from __future__ import annotations

from torchladder.models.hf.adapter import HFAdapter

LLAMA_ADAPTER = HFAdapter(
    architectures={
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "ministral": "MinistralForCausalLM",
    },
    tensor_names={
        "embedding.weight": "model.embed_tokens.weight",
        "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
        "layers.*.attention.q_proj.weight": "model.layers.*.self_attn.q_proj.weight",
        "layers.*.attention.k_proj.weight": "model.layers.*.self_attn.k_proj.weight",
        "layers.*.attention.v_proj.weight": "model.layers.*.self_attn.v_proj.weight",
        "layers.*.attention.o_proj.weight": "model.layers.*.self_attn.o_proj.weight",
        "layers.*.feed_forward_norm.weight": "model.layers.*.post_attention_layernorm.weight",
        "layers.*.feed_forward.gate_proj.weight": "model.layers.*.mlp.gate_proj.weight",
        "layers.*.feed_forward.up_proj.weight": "model.layers.*.mlp.up_proj.weight",
        "layers.*.feed_forward.down_proj.weight": "model.layers.*.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    config_keys={
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn_dim": "intermediate_size",
        "vocab_size": "vocab_size",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02},
    type_defaults={key: {"sliding_window": 4096, "num_key_value_heads": 8} for key in ("mistral", "ministral")},
    fixed_values={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "per_layer_config": None,
    },
    sliding_window_type="mistral",
    layer_types_type="ministral",
)
