"""Models here and in transformers: the same logits, bits and text, in both directions."""

import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from torchladder import mask, models
from torchladder.config import SamplesConfig
from torchladder.inference.decoding import generate
from torchladder.models import attention
from torchladder.models.hf import conversion, hf_config, hf_folder, hf_weights
from torchladder.models.hf.adapter import HFMetadata
from torchladder.models.hf.hf_folder import HFFolder
from torchladder.models.rope import rope_angles
from torchladder.registry import ConfigError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

V, T = 96, 48
SHAPE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": "eager", "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
STYLES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama3.2": lambda: transformers.LlamaConfig(
        **SHAPE, head_dim=16, tie_word_embeddings=True, rope_parameters=SCALED
    ),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=list(STYLES))
def reference(request, tmp_path_factory):
    """A small random model of transformers, and the folder with its shards."""
    model = transformers.AutoModelForCausalLM.from_config(STYLES[request.param](), attn_implementation="eager").eval()
    stir(model, seed=1)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="20KB")
    assert (path / hf_folder.INDEX_FILE).is_file()
    return SimpleNamespace(model=model, path=path)


@torch.no_grad()
def stir(model, seed):
    """Fills in random weights that are large enough for each part of a model to affect the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)


def make(path, masks=(), **changed):
    """Returns the model of a folder's config.json with random weights, and its kernel."""
    config = HFFolder(path).config
    section = SimpleNamespace(**{**hf_config.model_section(config), **changed})
    masks = [*masks, "sliding" if hf_config.sliding_window(config) else "causal"]
    kernel = attention.build_kernel("dense", masks, "cpu", training=False)
    return models.build(section, attention_fn=kernel.attention, seq_len=T).eval(), kernel


def start_of(path, positions, masks=()):
    """Returns ``start`` under the window of a folder and the given masks."""
    window = hf_config.sliding_window(HFFolder(path).config) or T
    return mask.compose(mask.sliding(positions, window), *(allow(positions, window) for allow in masks))


@torch.no_grad()
def logits(path, model, kernel, tokens, start):
    return model(tokens, kernel.prepare(start, torch.device("cpu")))


def text(rows=2, length=T):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(2))


PLAIN = torch.arange(T, dtype=torch.int32).repeat(2, 1)
PACKED = torch.cat([torch.arange(n, dtype=torch.int32) for n in (13, 1, 20, 14)]).repeat(2, 1)


@torch.no_grad()
def compare(path, one, kernel, other):
    """Compares logits on plain rows and on rows with several documents."""
    plain = logits(path, one, kernel, text(), start_of(path, PLAIN))
    torch.testing.assert_close(plain, other(text()).logits, atol=1e-5, rtol=1e-5)
    start = start_of(path, PACKED, [mask.document])
    hidden = torch.where(mask.dense(start), 0.0, torch.finfo(torch.float32).min)[:, None]
    packed = logits(path, one, kernel, text(), start)
    torch.testing.assert_close(packed, other(text(), attention_mask=hidden).logits, atol=1e-5, rtol=1e-5)
    assert (packed - plain).abs().max() > 0.1


def test_loaded_weights_have_the_logits_of_transformers(reference):
    model, kernel = make(reference.path, ["document"])
    hf_weights.load_hf_weights(model, reference.path)
    compare(reference.path, model, kernel, reference.model)


def test_saved_weights_have_the_same_logits_and_text_in_transformers(reference, tmp_path):
    model, kernel = make(reference.path, ["document"])
    stir(model, seed=3)
    window = hf_config.sliding_window(HFFolder(reference.path).config)
    hf_weights.save_hf_weights(model, tmp_path, HFMetadata(T, window), torch.float32, is_writer=True)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(other) is type(reference.model)
    compare(reference.path, model, kernel, other)

    def next_logits(rows):
        tokens = torch.tensor(rows)
        positions = torch.arange(tokens.shape[1], dtype=torch.int32)[None]
        return logits(reference.path, model, kernel, tokens, start_of(reference.path, positions))[:, -1]

    greedy = SamplesConfig(max_new_tokens=30, temperature=0.0)
    (new,) = generate(next_logits, [[5, 6, 7]], greedy, T, seed=0)
    prompt = torch.tensor([[5, 6, 7]])
    found = other.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert found[0, 3:].tolist() == new
    assert len(set(new)) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_there_and_back_is_bit_for_bit(reference, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(hf_folder, "MAX_SHARD_BYTES", 20_000)
    source = tmp_path / "source"
    reference.model.to(dtype).save_pretrained(source, max_shard_size="20KB")
    reference.model.float()
    conversion.hf_to_checkpoint(HFFolder(source), tmp_path / "step-0")
    fields = hf_config.model_section(HFFolder(source).config)
    config = models.resolve(SimpleNamespace(**fields))
    (tmp_path / "back").mkdir()
    metadata = HFMetadata(64, hf_config.sliding_window(HFFolder(source).config))
    conversion.checkpoint_to_hf(tmp_path / "step-0", tmp_path / "back", (fields["name"], config), metadata)
    first, back = HFFolder(source), HFFolder(tmp_path / "back")
    assert first.tensors.keys() == back.tensors.keys()
    assert len({kept.file for kept in back.tensors.values()}) > 1
    for name, kept in first.tensors.items():
        assert back.tensors[name].dtype == kept.dtype == dtype
        assert torch.equal(back.read_tensor(name), first.read_tensor(name)), name
    assert hf_config.model_section(back.config) == fields
    known = hf_config.adapter_for(fields["name"]).config_keys.values()
    assert {key: back.config[key] for key in known} == {key: first.config.get(key, back.config[key]) for key in known}
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=dtype)
    for (name, one), other in zip(reloaded.named_parameters(), reference.model.to(dtype).parameters(), strict=True):
        assert torch.equal(one, other), name
    reference.model.float()


# --- more rows --------------------------------------------------------------------------------------------------------


def test_additional_rows_of_the_vocabulary_are_the_mean_of_the_others(reference, tmp_path):
    model, _ = make(reference.path, vocab_size=V + 7)
    hf_weights.load_hf_weights(model, reference.path)
    conversion.hf_to_checkpoint(HFFolder(reference.path), tmp_path, V + 7)
    for name, parameter in model.state_dict().items():
        kept = torch.zeros_like(parameter)
        dcp.load({f"model.{name}": kept}, checkpoint_id=tmp_path, no_dist=True)
        assert torch.equal(kept, parameter)
        if name in ("embedding.weight", "head.weight"):
            assert torch.equal(parameter[:V], HFFolder(reference.path).read_tensor(model.hf_adapter.hf_name(name)))
            assert (parameter[V:] == parameter[:V].mean(dim=0)).all()
    with pytest.raises(ConfigError, match=r"vocabulary of 90 is too small .* at least 96"):
        conversion.hf_to_checkpoint(HFFolder(reference.path), tmp_path / "fewer", 90)


# --- config.json -----------------------------------------------------------------------------------------------------

JSON = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "vocab_size": V, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_older_config_files_have_the_same_meaning():
    older = {**JSON, "rope_theta": 5000.0, "rope_scaling": {**SCALED, "rope_type": None, "type": "llama3"}}
    older["rope_scaling"].pop("rope_type")
    older["rope_scaling"].pop("rope_theta")
    newer = {**JSON, "rope_parameters": SCALED}
    assert hf_config.model_section(older) == hf_config.model_section(newer)
    read = hf_config.model_section(JSON)
    assert (read["n_kv_heads"], read["head_dim"], read["rope_theta"], read["tie_embeddings"]) == (4, 8, 1e4, False)


def test_linear_scaling_is_a_condensed_position():
    read = hf_config.model_section({**JSON, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert read["rope_condense_ratio"] == 4.0
    config = models.resolve(SimpleNamespace(**read))
    again = hf_config.adapter_for("llama").to_hf(config, HFMetadata(T), torch.float32)
    assert again["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**again))
    with torch.device("meta"):
        condensed = models.build(SimpleNamespace(**read), seq_len=8)
    frequencies = rope_angles(condensed.config, condensed.config.rope_theta, 2, torch.device("cpu"))[0][1]
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies)


LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("name", "flavor", "published"),
    [
        ("llama", "llama3-8b", ("llama", 4096, 32, 32, 8, 14336, 128256, 1e-5, 500000.0, False, None)),
        (
            *("llama", "llama3.2-1b"),
            ("llama", 2048, 16, 32, 8, 8192, 128256, 1e-5, 500000.0, True,
             {**LLAMA_3, "factor": 32.0, "original_max_position_embeddings": 8192}),
        ),
        ("llama", "mistral-7b", ("mistral", 4096, 32, 32, 8, 14336, 32000, 1e-5, 10000.0, False, None)),
        ("qwen3", "0.6b", ("qwen3", 1024, 28, 16, 8, 3072, 151936, 1e-6, 1000000, True, None)),
        ("qwen3", "32b", ("qwen3", 5120, 64, 64, 8, 25600, 151936, 1e-6, 1000000, False, None)),
    ],
)  # fmt: skip
def test_flavors_are_what_the_published_files_say(name, flavor, published):
    keys = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    keys += ["intermediate_size", "vocab_size", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "rope_scaling"]
    read = hf_config.model_section(dict(zip(keys, published, strict=True)))
    hf_config.check_compatible(read, models.registry.flavors(name)[flavor], flavor)


@given(
    kind=st.sampled_from([models.LlamaConfig, models.Qwen3Config]),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 64)),
    tied=st.booleans(),
    theta=st.floats(1.0, 1e8),
    rope=st.sampled_from([{}, {"rope_condense_ratio": 4.0}, {"rope_scaling_factor": 8.0, "rope_original_seq_len": 99}]),
    window=st.sampled_from([None, 16]),
)
def test_a_written_config_is_read_back_unchanged(kind, heads, tied, theta, rope, window):
    groups, each, half = heads
    name = "llama" if kind is models.LlamaConfig else "qwen3"
    window = window if name == "llama" else None
    config = kind(
        dim=24, n_layers=3, n_heads=groups * each, n_kv_heads=groups, head_dim=2 * half, ffn_dim=7, vocab_size=11,
        tie_embeddings=tied, rope_theta=theta, initialization="normal", **rope,
    )  # fmt: skip
    written = json.loads(json.dumps(hf_config.adapter_for(name).to_hf(config, HFMetadata(64, window), torch.bfloat16)))
    assert models.resolve(SimpleNamespace(**hf_config.model_section(written))) == config
    assert hf_config.sliding_window(written) == window


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), limit=st.integers(1, 100))
def test_shards_hold_each_tensor_once_in_order(sizes, limit):
    stored = {str(number): size for number, size in enumerate(sizes)}
    shards = list(hf_folder.split_into_shards(stored, limit))
    assert [name for shard in shards for name in shard] == list(stored)
    assert all(len(shard) == 1 or sum(stored[name] for name in shard) <= limit for shard in shards)
    for shard, following in pairwise(shards):
        assert sum(stored[name] for name in [*shard, following[0]]) > limit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "of type linear lacks factor"),
        ({"model_type": "lama"}, "unknown model_type 'lama'.*Did you mean 'llama'"),
        ({"hidden_size": None}, "hidden_size = null: must be a valid integer"),
        ({"attention_bias": True}, "attention_bias = true: must be false"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu": must be "silu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of type yarn lacks original_max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "unknown rope_scaling.rope_type 'dynamic'"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "'sliding_attention'; all layers must be 'full_attention'",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"]},
            "'full_attention'; all layers must be 'sliding_attention'",
        ),
    ],
)
def test_an_unsupported_config_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        hf_config.model_section({**JSON, **change})


@pytest.mark.parametrize(
    ("name", "change", "window"),
    [
        ("llama", {"positional_embedding": "none"}, None),
        ("llama", {"rope_restart": 8}, None),
        ("llama", {"rope_condense_ratio": 2.0, "rope_scaling_factor": 2.0}, None),
        ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, 16),
        ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, None),
        (
            "llama",
            {"layer_types": ["sliding_attention", "full_attention"], "layer_rope_theta": {"sliding_attention": 50.0}},
            16,
        ),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(name, change, window):
    config = models.resolve(SimpleNamespace(name=name, flavor="debug", **change))
    with pytest.raises(ConfigError, match="Hugging Face"):
        hf_config.adapter_for(name).to_hf(config, HFMetadata(T, window), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 1}, "model.n_layers = 2, the settings have 1"),
        ({"rope_theta": 1e5}, r"\[\[phases"),
        ({"vocab_size": V - 1}, "model.vocab_size = 96, the settings have 95"),
        ({"name": "qwen3"}, "describes a llama"),
    ],
)
def test_a_folder_of_another_model_is_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(JSON))
    with pytest.raises(ConfigError, match=message):
        hf_weights.load_hf_weights(make(tmp_path, **change)[0], tmp_path)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(JSON))
    model, _ = make(tmp_path)
    with pytest.raises(ConfigError, match=r"has no weights: neither model\.safetensors nor pytorch_model.bin"):
        hf_weights.load_hf_weights(model, tmp_path)
    hf_weights.save_hf_weights(model, tmp_path, HFMetadata(T), torch.float32, is_writer=True)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(file)
    for name, changed, message in (
        ("lm_head.weight", None, "1 tensors are missing, such as lm_head.weight"),
        ("lm_head.bias", torch.zeros(V), "1 unexpected tensors, such as lm_head.bias"),
        ("model.norm.weight", torch.zeros(31), r"model.norm.weight has shape \[31\], the model's is \[32\]"),
        ("lm_head.weight", torch.zeros(V - 1, 32), r"has shape \[95, 32\]"),
    ):
        other = {key: tensor for key, tensor in {**tensors, name: changed}.items() if tensor is not None}
        safetensors.save_file(other, file)
        with pytest.raises(ConfigError, match=message):
            hf_weights.load_hf_weights(model, tmp_path)
    safetensors.save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, file)
    hf_weights.load_hf_weights(model, tmp_path)


def test_damaged_files_are_named(reference, tmp_path):
    for file in reference.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=rf"{second.name} is damaged"):
        hf_weights.load_hf_weights(make(tmp_path)[0], tmp_path)
    (tmp_path / hf_folder.INDEX_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        hf_weights.load_hf_weights(make(tmp_path)[0], tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a Hugging Face folder"):
        HFFolder(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_pickled_weights_are_read(reference, tmp_path, zipped, sharded):
    tensors = reference.model.state_dict()
    if reference.model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    names = [*tensors]
    groups = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, group in (groups if sharded else {"pytorch_model.bin": names}).items():
        content = {name: tensors[name] for name in group}
        torch.save(content, tmp_path / file, _use_new_zipfile_serialization=zipped)
    index = {"weight_map": {name: file for file, group in groups.items() for name in group}}
    if sharded:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copyfile(reference.path / "config.json", tmp_path / "config.json")
    model, _ = make(tmp_path, vocab_size=V + 1)
    hf_weights.load_hf_weights(model, tmp_path)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter[:V], tensors[model.hf_adapter.hf_name(name)][:V])
    conversion.hf_to_checkpoint(HFFolder(tmp_path), tmp_path / "step-0")


def test_pickled_weights_that_run_code_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(JSON))
    for content, message in (
        ({"a": SimpleNamespace()}, "is damaged or holds more than tensors"),
        ([torch.zeros(1)], "not hold tensors by name"),
    ):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ConfigError, match=message):
            hf_weights.load_hf_weights(make(tmp_path)[0], tmp_path)


def test_other_safetensors_files_in_a_folder_are_not_read(reference, tmp_path):
    shutil.copytree(reference.path, tmp_path, dirs_exist_ok=True)
    weights = {name: HFFolder(tmp_path).read_tensor(name) for name in HFFolder(tmp_path).tensors}
    for other in ("a-older.safetensors", "z-older.safetensors"):
        safetensors.save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, tmp_path / other)
    model, _ = make(tmp_path)
    hf_weights.load_hf_weights(model, tmp_path)
    assert all(torch.equal(it, weights[model.hf_adapter.hf_name(name)]) for name, it in model.state_dict().items())
