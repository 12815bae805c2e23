"""Entries of config.json: read as transformers reads them, or refused with one clear error."""

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.inference.trained_model import TrainedModel
from torchladder.models import attention
from torchladder.models.hf import hf_config, hf_folder
from torchladder.models.layer_types import collapse
from torchladder.registry import ConfigError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

V, T = 96, 24
SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 24, "vocab_size": V, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 500.0,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TABLES = [
    LINEAR,
    LLAMA3,
    {**LINEAR, "rope_theta": 50.0},
    {"rope_type": "default", "rope_theta": 70.0},
    {"type": "yarn"},
]
MISSING = object()
KEYS = [
    *SHAPE, "model_type", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "hidden_act",
    "attention_bias", "use_sliding_window", "partial_rotary_factor", "original_max_position_embeddings",
    "initializer_range", "hidden_activation", "final_logit_softcapping", "attn_logit_softcapping",
    "query_pre_attn_scalar", "sliding_window_pattern", "rope_local_base_freq", "no_rope_layers",
    "no_rope_layer_interval",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from([MISSING, None, "96", "linear", True, False, [], {}, ["full_attention"], 0.5, 1.0, 2.0, -1]),
    st.sampled_from([0, 1, 2, 4, 8, [0, 1]]),
    st.sampled_from(TABLES),
    st.tuples(st.sampled_from(TABLES), st.sampled_from([*LLAMA3, "rope_theta"]), st.sampled_from([None, "4", 2, -1.0]))
    .map(lambda changed: {**changed[0], changed[1]: changed[2]}),
)  # fmt: skip


def from_transformers(folder, tokens):
    """Returns the logits of a model with random weights that it saves in the folder; None if it refuses the config."""
    with contextlib.suppress(Exception):  # of whatever type
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        safetensors.save_file(tensors, folder / "model.safetensors")
        return model(tokens).logits
    return None


def from_folder(folder, tokens):
    trained = TrainedModel.open(folder, seq_len=T)
    kernel = attention.build_kernel("dense", trained.config.attention.masks, "cpu", training=False)
    loaded = trained.load(kernel.attention, T)
    forms = {name: kernel.prepare(start[None], torch.device("cpu")) for name, start in loaded.starts.items()}
    return loaded.model(tokens, collapse(forms))


@settings(max_examples=25)
@given(
    model_type=st.sampled_from(["llama", "mistral", "qwen3", "gemma3_text", "olmo2", "olmo3", "smollm3"]),
    changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3),
)
@torch.no_grad()
def test_a_changed_config_has_the_logits_of_transformers_or_is_refused(tmp_path_factory, model_type, changes):
    folder = tmp_path_factory.mktemp("changed")
    entries = {"model_type": model_type, **SHAPE, "sliding_window": 8, **dict(changes)}
    written = {key: value for key, value in entries.items() if value is not MISSING}
    (folder / "config.json").write_text(json.dumps(written))
    vocab_size = written.get("vocab_size")
    tokens = torch.arange(T)[None] * 7 % (vocab_size if vocab_size in (1, 2, 4, 8) else V)
    expected = from_transformers(folder, tokens)
    try:
        found = from_folder(folder, tokens)
    except ConfigError as error:
        message = str(error)
    else:
        message = str(folder)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert str(folder) in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": None}, "rope_theta = null: must be a number"),
        ({"vocab_size": "96"}, 'vocab_size = "96": must be a valid integer'),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0: must be a valid integer"),
        ({"rope_scaling": "linear"}, 'rope_scaling = "linear": must be a valid object'),
        ({"rope_scaling": {**LINEAR, "factor": "4"}}, 'rope_scaling.factor = "4": must be a valid number'),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0: must be positive"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "Remove one"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}, "rope_parameters": LINEAR},
            "rope_scaling.rope_type",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters.full_attention"),
    ],
)
def test_an_error_names_the_file_the_entry_and_what_is_allowed(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, **change}))
    with pytest.raises(ConfigError) as error:
        TrainedModel.open(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(error.value)


def test_equal_rope_tables_may_be_present_twice():
    table = {**LLAMA3, "rope_theta": 500.0}
    entries = {"model_type": "llama", **SHAPE, "rope_scaling": LLAMA3, "rope_parameters": table}
    section = hf_config.model_section(entries)
    assert (section["rope_scaling_factor"], section["rope_theta"]) == (8.0, 500.0)


def test_a_model_type_that_is_not_a_name_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": {"name": "llama"}}')
    folder = hf_folder.HFFolder(tmp_path)
    with pytest.raises(ConfigError, match="model_type"):
        hf_config.model_section(folder.config, folder.config_file)
