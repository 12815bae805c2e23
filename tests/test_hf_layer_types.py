"""Models with sliding and full layers, here and in transformers: the same logits in both directions."""

import json

import pytest
import runs
import torch

from torchladder import config, mask, models
from torchladder.commands import convert
from torchladder.inference.trained_model import TrainedModel
from torchladder.models import attention
from torchladder.models.hf import hf_config, hf_layer_types
from torchladder.registry import ConfigError

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

FULL, SLIDING = "full_attention", "sliding_attention"
V, T = 96, 48
SHAPE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": "eager", "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False, "sliding_window": 8,
}  # fmt: skip
TYPES = [SLIDING, FULL, SLIDING, SLIDING]
MODELS = {
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16, use_sliding_window=True, layer_types=TYPES),
    "qwen3 from layer 3 on": lambda: transformers.Qwen3Config(
        **SHAPE, head_dim=16, use_sliding_window=True, max_window_layers=3
    ),
    "qwen3, all slide": lambda: transformers.Qwen3Config(
        **SHAPE, head_dim=16, use_sliding_window=True, max_window_layers=0
    ),
    "ministral": lambda: transformers.MinistralConfig(**SHAPE, head_dim=8, layer_types=TYPES),
    "ministral, all slide": lambda: transformers.MinistralConfig(**SHAPE, head_dim=8),
}
CPU = torch.device("cpu")


@torch.no_grad()
def stir(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)


@torch.no_grad()
def logits(trained, tokens):
    """Returns the logits of a trained model under its own masks, by the reference kernel."""
    loaded = trained.load(attention.dense.DenseKernel.attention, T)
    forms = {name: attention.dense.DenseKernel().prepare(start[None], CPU) for name, start in loaded.starts.items()}
    return loaded.model(tokens, models.layer_types.collapse(forms))


def text():
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seq_len", [T, 6])  # rows longer and shorter than the window
def test_a_folder_has_the_logits_of_transformers_and_comes_back(tmp_path, name, seq_len):
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").eval()
    stir(model)
    model.save_pretrained(tmp_path / "hf")
    trained = TrainedModel.open(tmp_path / "hf", seq_len=seq_len)
    tokens = text()
    if seq_len == T or "all" not in name:
        torch.testing.assert_close(logits(trained, tokens), model(tokens).logits, atol=1e-5, rtol=1e-4)
    assert convert.run(["from-hf", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]) == 0
    step = tmp_path / "run" / "checkpoint" / "step-0"
    torch.testing.assert_close(logits(TrainedModel.open(step), tokens), model(tokens).logits, atol=1e-5, rtol=1e-4)
    assert convert.run(["to-hf", str(step), "--output", str(tmp_path / "back"), "--tokenizer", "none"]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_run_with_types_is_exported_and_is_the_same_in_transformers(tmp_path):
    argv = ["--model.n_layers", "4", "--model.layer_types", SLIDING, FULL, "--attention.masks", "chunk",
            "--attention.sliding_attention.masks", "sliding", "--attention.sliding_attention.window", "16",
            "--training.steps", "2", "--checkpoint.enable", "--checkpoint.last_save_in_hf", "--training.seq_len", "64",
            "--validation.no_enable", "--checkpoint.export_dtype", "float32"]  # fmt: skip
    runs.run(tmp_path, *argv)
    folder = tmp_path / "checkpoint" / "step-2-hf"
    written = json.loads((folder / "config.json").read_text())
    assert (written["model_type"], written["sliding_window"]) == ("ministral", 16)
    assert written["layer_types"] == [SLIDING, FULL, SLIDING, FULL]
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = logits(TrainedModel.open(tmp_path / "checkpoint" / "step-2"), text())
    torch.testing.assert_close(found, other(text()).logits, atol=1e-5, rtol=1e-4)


def test_a_folder_sets_the_types_of_a_run_and_its_command_line_the_window(tmp_path):
    entries = {"model_type": "qwen3", **SHAPE, "use_sliding_window": True, "layer_types": TYPES}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    argv = ["--model.hf_assets_path", str(tmp_path), "--tokenizer.name", "bytes"]
    found = config.load(argv)
    assert (found.layer_masks, found.attention.sliding_attention.window) == (
        {FULL: ["causal"], SLIDING: ["sliding"]},
        8,
    )
    found = config.load([*argv, "--attention.sliding_attention.window", "4", "--attention.masks", "document"])
    assert (found.layer_masks[FULL], found.attention.sliding_attention.window) == (["document"], 4)
    (tmp_path / "run.toml").write_text(
        '[attention.sliding_attention]\nmasks = ["document", "sliding"]\ncurriculum = { name = "linear" }\n'
    )
    found = config.load(["--job.config_file", str(tmp_path / "run.toml"), *argv])
    assert found.attention.sliding_attention.curriculum == {"name": "linear"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": [SLIDING, FULL]}, "layer_types has 2 layers, and num_hidden_layers = 4"),
        ({"use_sliding_window": False}, "sliding_window is null or not used"),
        ({"sliding_window": None}, "sliding_window is null or not used"),
        ({"layer_types": [FULL, "linear_attention", FULL, FULL]}, "layer_types has 'linear_attention': must be"),
        ({"layer_types": "sliding_attention"}, "layer_types"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"max_window_layers": "3"}, 'max_window_layers = "3"'),
    ],
)
def test_types_that_are_not_supported_are_refused(change, message):
    entries = {"model_type": "qwen3", **SHAPE, "use_sliding_window": True, "layer_types": TYPES, **change}
    with pytest.raises(ConfigError, match=message):
        hf_config.model_section(entries)


def test_the_window_of_layers_counts_the_query():
    types, window = hf_layer_types.read_layer_types({**SHAPE, "layer_types": TYPES})
    assert (types, window) == (TYPES, 8)
    assert mask.sliding(torch.arange(10, dtype=torch.int32)[None], 8)[0, -1] == 2
