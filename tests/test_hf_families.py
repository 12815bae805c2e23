"""Gemma 3, OLMo 2, OLMo 3 and SmolLM 3, here and in transformers: the same logits and bits in both directions."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import runs
import torch

from torchladder import mask, models
from torchladder.commands import convert
from torchladder.config import SamplesConfig
from torchladder.inference.decoding import IncrementalDecoder, generate
from torchladder.inference.trained_model import TrainedModel
from torchladder.models import attention
from torchladder.models.hf import hf_config
from torchladder.models.hf.adapter import HFMetadata
from torchladder.models.hf.hf_folder import HFFolder
from torchladder.registry import ConfigError

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

FULL, SLIDING = "full_attention", "sliding_attention"
CPU = torch.device("cpu")
V, T = 96, 48
SHAPE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
TYPES = [SLIDING, FULL, SLIDING, SLIDING]
YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "attention_factor": 1.2,
    "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 500.0,
}  # fmt: skip
THETAS = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 50.0},
}
GEMMA3 = {**SHAPE, "head_dim": 16, "sliding_window": 8}
OLMO3 = {**SHAPE, "sliding_window": 8}
MODELS = {
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GEMMA3, layer_types=TYPES, rope_parameters=THETAS, query_pre_attn_scalar=5, final_logit_softcapping=3.0
    ),
    "gemma3, every layer slides": lambda: transformers.Gemma3TextConfig(**GEMMA3),  # 4 layers of a pattern of 6
    "gemma3, none slides": lambda: transformers.Gemma3TextConfig(
        **GEMMA3, layer_types=[FULL] * 4, tie_word_embeddings=False
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "olmo3": lambda: transformers.Olmo3Config(
        **OLMO3, rope_parameters={FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 500.0}}
    ),
    "olmo3, another pattern": lambda: transformers.Olmo3Config(**OLMO3, layer_types=TYPES, tie_word_embeddings=True),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE, rope_parameters={**YARN, "rope_theta": 300.0}),
    "smollm3, layers without RoPE slide": lambda: transformers.SmolLM3Config(
        **SHAPE, no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=8, tie_word_embeddings=False
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory):
    """A small random model of transformers in fp32, and its folder."""
    model = transformers.AutoModelForCausalLM.from_config(MODELS[request.param](), attn_implementation="eager").eval()
    stir(model, request.param)
    path = tmp_path_factory.mktemp("reference")
    model.save_pretrained(path)
    return SimpleNamespace(model=model, path=path, name=request.param.split(",")[0])


@torch.no_grad()
def stir(model, name):
    """Fills in random weights that are large enough for each part of a model to affect the logits."""
    generator, offset = torch.Generator().manual_seed(1), 0.0 if "gemma" in name else 1.0
    for key, parameter in model.named_parameters():
        parameter.normal_(std=0.2, generator=generator).add_(offset if "norm" in key else 0.0)


@torch.no_grad()
def logits(trained, tokens, kernel="dense"):
    """Returns the logits of a trained model under its own masks."""
    kernels = {name: attention.build_kernel(kernel, masks, "cpu") for name, masks in trained.config.layer_masks.items()}
    functions = {name: kernel.attention for name, kernel in kernels.items()}
    loaded = trained.load(models.layer_types.collapse(functions), T)
    starts = {name: start.expand(len(tokens), -1) for name, start in loaded.starts.items()}
    forms = {name: kernels[name].prepare(start, CPU) for name, start in starts.items()}
    return loaded.model(tokens, models.layer_types.collapse(forms))


def text(rows=2, length=T):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kernel", ["dense", "sdpa"])
def test_a_folder_has_the_logits_of_transformers(reference, kernel):
    trained = TrainedModel.open(reference.path, seq_len=T)
    assert trained.config.model.name == reference.name
    with torch.no_grad():
        expected = reference.model(text()).logits
    torch.testing.assert_close(logits(trained, text(), kernel), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_document_of_a_row_has_the_logits_of_transformers(reference):
    trained = TrainedModel.open(reference.path, seq_len=T)
    dense = attention.dense.DenseKernel()
    loaded = trained.load(dense.attention, T)
    lengths = [13, 1, 20, 14]
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])[None]
    types = {name: ["document", *masks] for name, masks in trained.config.layer_masks.items()}
    starts = mask.from_types(types, positions, lambda name: loaded_window(trained, name))
    forms = {name: dense.prepare(start, CPU) for name, start in starts.items()}
    found = loaded.model(text(1), models.layer_types.collapse(forms))
    for own, tokens in zip(found.split(lengths, dim=1), text(1).split(lengths, dim=1), strict=True):
        torch.testing.assert_close(own, reference.model(tokens).logits, atol=1e-5, rtol=1e-4)


def loaded_window(trained, name):
    return trained.final_layer_windows.get(name, trained.final_window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_comes_back_bit_for_bit(reference, tmp_path, dtype):
    from_pretrained = partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
    from_pretrained(reference.path, dtype=dtype).save_pretrained(tmp_path / "hf")
    assert convert.run(["from-hf", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]) == 0
    step = tmp_path / "run" / "checkpoint" / "step-0"
    assert convert.run(["to-hf", str(step), "--output", str(tmp_path / "back"), "--tokenizer", "none"]) == 0
    first, back = HFFolder(tmp_path / "hf"), HFFolder(tmp_path / "back")
    assert first.tensors.keys() == back.tensors.keys()
    for name in first.tensors:
        assert back.tensors[name].dtype == dtype
        assert torch.equal(back.read_tensor(name), first.read_tensor(name)), name
    sections = [SimpleNamespace(**hf_config.model_section(folder.config)) for folder in (back, first)]
    assert models.resolve(sections[0]) == models.resolve(sections[1])
    assert hf_config.sliding_window(back.config) == hf_config.sliding_window(first.config)
    again, original = (transformers.AutoConfig.from_pretrained(folder.path).to_dict() for folder in (back, first))
    for key in (back.config.keys() & original.keys()) - {"torch_dtype", "rope_parameters", "max_position_embeddings"}:
        assert again[key] == original[key], key
    loaded = [from_pretrained(folder.path) for folder in (back, first)]
    with torch.no_grad():
        assert torch.equal(loaded[0](text()).logits, loaded[1](text()).logits)


def test_text_that_is_generated_with_a_cache_is_that_of_transformers(reference):
    trained = TrainedModel.open(reference.path, seq_len=T)
    greedy = SamplesConfig(max_new_tokens=30, temperature=0.0)
    prompt = text(1, 7)
    decoder = IncrementalDecoder(trained)
    found = generate(decoder, prompt.tolist(), greedy, T, seed=0)
    expected = reference.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30,
                                        do_sample=False, pad_token_id=0, eos_token_id=-1)  # fmt: skip
    assert found == [expected[0, 7:].tolist()]


def test_the_text_model_of_a_model_with_images_is_read(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**GEMMA3, "layer_types": TYPES}, vision_config=vision, image_token_index=95, mm_tokens_per_image=4
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    stir(model, "gemma3")
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    with torch.no_grad():
        expected = model(text()).logits
    torch.testing.assert_close(logits(TrainedModel.open(tmp_path / "hf"), text()), expected, atol=1e-5, rtol=1e-4)
    assert convert.run(["from-hf", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]) == 0
    step = tmp_path / "run" / "checkpoint" / "step-0"
    assert convert.run(["to-hf", str(step), "--output", str(tmp_path / "back"), "--tokenizer", "none"]) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert type(back) is transformers.Gemma3ForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(back(text()).logits, expected, atol=1e-5, rtol=1e-4)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": 1}))
    with pytest.raises(ConfigError, match=r"config\.json: text_config = 1: must be an object"):
        TrainedModel.open(tmp_path / "hf")


@pytest.mark.parametrize("name", ["gemma3", "olmo3", "smollm3"])
def test_a_run_is_exported_and_is_the_same_in_transformers(tmp_path, name):
    argv = ["--model.name", name, "--attention.masks", "document", "--training.steps", "2", "--training.seq_len", "64",
            "--checkpoint.enable", "--checkpoint.last_save_in_hf", "--checkpoint.export_dtype", "float32",
            "--validation.no_enable", "--curriculum.name", "constant"]  # fmt: skip
    if name != "smollm3":
        argv += ["--attention.sliding_attention.masks", "document", "sliding"]
        argv += ["--attention.sliding_attention.window", "8"]
    runs.run(tmp_path, *argv)
    folder = tmp_path / "checkpoint" / "step-2-hf"
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = logits(TrainedModel.open(tmp_path / "checkpoint" / "step-2"), text())
    with torch.no_grad():
        torch.testing.assert_close(found, other(text()).logits, atol=1e-5, rtol=1e-4)


# --- config.json -----------------------------------------------------------------------------------------------------

OLMO3_YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0,
    "attention_factor": 1.2079441541679836,
}  # fmt: skip
PUBLISHED = {
    ("gemma3", "270m"): {
        "hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 2048, "vocab_size": 262144, "sliding_window": 512, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "_sliding_window_pattern": 6,
        "layer_types": [*[SLIDING] * 5, FULL] * 3,
    },
    ("gemma3", "1b"): {
        "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 6912, "vocab_size": 262144, "sliding_window": 512, "sliding_window_pattern": 6,
        "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "final_logit_softcapping": None,
    },
    ("gemma3", "4b"): {
        "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240, "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    ("gemma3", "12b"): {
        "hidden_size": 3840, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 15360, "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    ("gemma3", "27b"): {
        "hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128, "intermediate_size": 21504, "query_pre_attn_scalar": 168, "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    ("olmo2", "1b"): {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 8192, "vocab_size": 100352, "rms_norm_eps": 1e-6, "rope_theta": 500000,
    },
    ("olmo2", "13b"): {
        "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "intermediate_size": 13824, "vocab_size": 100352, "rms_norm_eps": 1e-6, "rope_theta": 500000,
    },
    ("olmo3", "7b"): {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 100278, "rms_norm_eps": 1e-6, "rope_theta": 500000,
        "rope_scaling": OLMO3_YARN, "sliding_window": 4096,
    },
    ("smollm3", "3b"): {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 11008, "vocab_size": 128256, "rope_theta": 5000000.0, "use_sliding_window": False,
        "sliding_window": None, "no_rope_layer_interval": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_flavors_are_what_the_published_files_say(flavor):
    name, size = flavor
    model_type = next(iter(models.registry.get(name).hf_adapter.architectures))
    read = hf_config.model_section({"model_type": model_type, **PUBLISHED[flavor]})
    hf_config.check_compatible(read, models.registry.flavors(name)[size], size)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: must be null"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true: must be false"),
        ("gemma3", {"hidden_activation": "silu"}, 'hidden_activation = "silu": must be "gelu_pytorch_tanh"'),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0: must be 1 or more"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ("gemma3", {"sliding_window": None}, "sliding_window is null or not used"),
        ("gemma3", {"final_logit_softcapping": -1.0}, "final_logit_softcapping = -1.0: must be positive"),
        ("gemma3", {"model_type": "gemma3"}, "unknown model_type 'gemma3'.*Did you mean 'gemma3_text'"),
        ("olmo2", {"attention_bias": True}, "attention_bias = true: must be false"),
        ("olmo2", {"layer_types": [SLIDING, FULL]}, "all layers must be 'full_attention'"),
        ("olmo3", {"sliding_window_pattern": 2}, "sliding_window_pattern = 2: must be 4"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias = true: must be false"),
        ("smollm3", {"layer_types": [SLIDING, FULL]}, "sliding_window is null or not used"),
    ],
)
def test_an_unsupported_config_is_refused(name, change, message):
    model_type = next(iter(models.registry.get(name).hf_adapter.architectures))
    with pytest.raises(ConfigError, match=message):
        hf_config.model_section({"model_type": model_type, **SHAPE, "num_hidden_layers": 2, **change})


@pytest.mark.parametrize(
    ("name", "change", "window", "message"),
    [
        ("gemma3", {}, None, "gemma3_text needs the mask 'sliding'"),
        ("gemma3", {"layer_types": ["chunked_attention", FULL], "layer_rope_theta": {}}, 8, "no chunked_attention"),
        ("gemma3", {"nope_layers": [0]}, 8, "gemma3_text does not support model.nope_layers"),
        ("olmo2", {"logit_softcap": 3.0}, None, "olmo2 has no final_logit_softcapping"),
        ("olmo2", {}, 8, "olmo2 has no sliding window"),
        ("olmo3", {"attention_sinks": [FULL]}, 8, "olmo3 does not support model.attention_sinks"),
        ("smollm3", {"layer_types": [SLIDING, FULL], "layer_rope_theta": {SLIDING: 9.0}}, 8, "model.layer_rope_theta"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(name, change, window, message):
    config = models.resolve(SimpleNamespace(name=name, flavor="debug", **change))
    with pytest.raises(ConfigError, match=message):
        hf_config.adapter_for(name).to_hf(config, HFMetadata(T, window), torch.float32)
