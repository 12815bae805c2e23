"""Gemma 3 in Hugging Face, the text models (``gemma3_text``): four norms in a block, and its own names in config.json.

Both sides store weights of norms without the 1 that is added to them.
"""

from __future__ import annotations

from dataclasses import replace

from torchladder.models.hf.hf_layer_types import slides_between_full_layers
from torchladder.models.hf.llama_adapter import LLAMA_ADAPTER

GEMMA3_ADAPTER = replace(
    LLAMA_ADAPTER,
    architectures={"gemma3_text": "Gemma3ForCausalLM"},
    tensor_names={
        **LLAMA_ADAPTER.tensor_names,
        "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
        "layers.*.attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
        "layers.*.attention_post_norm.weight": "model.layers.*.post_attention_layernorm.weight",
        "layers.*.feed_forward_norm.weight": "model.layers.*.pre_feedforward_layernorm.weight",
        "layers.*.feed_forward_post_norm.weight": "model.layers.*.post_feedforward_layernorm.weight",
    },
    config_keys={
        **LLAMA_ADAPTER.config_keys,
        "query_pre_attn_scalar": "query_pre_attn_scalar",
        "logit_softcap": "final_logit_softcapping",
    },
    # config.json of the models with images leaves out what is a default of transformers.
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    null_values={"final_logit_softcapping": 0.0},
    type_defaults={},
    fixed_values={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "quantization_config": None,
        "per_layer_config": None,
    },
    sliding_window_type="",
    layer_types_type="gemma3_text",
    rope_thetas={"full_attention": 1000000.0, "sliding_attention": 10000.0},
    slides=slides_between_full_layers,
)
