"""Our models and those of transformers: the same logits, the same bits, the same text, in both directions."""

from types import SimpleNamespace

import pytest
import torch

from torchladder import mask, models
from torchladder.generate import SamplesConfig, generate
from torchladder.models import attention
from torchladder.models.interchange import conversion, folder, settings, weights
from torchladder.models.interchange.folder import Folder
from torchladder.models.interchange.settings import Facts

transformers = pytest.importorskip("transformers")

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
def theirs(request, tmp_path_factory):
    """A small random model of theirs, in several shards, and the folder that it is in."""
    model = transformers.AutoModelForCausalLM.from_config(STYLES[request.param](), attn_implementation="eager").eval()
    stir(model, seed=1)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="20KB")
    assert (path / folder.INDEX).is_file()
    return SimpleNamespace(model=model, path=path)


@torch.no_grad()
def stir(model, seed):
    """Draws weights so large that every part of a model has its say in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)


def make(path, masks=(), **changed):
    """Returns our model of a folder's config.json, without its weights, and what turns ``start`` into a form."""
    config = Folder(path).config
    section = SimpleNamespace(**{**settings.read(config), **changed})
    masks = [*masks, "sliding" if settings.window_of(config) else "causal"]
    kernel = attention.kernel("dense", masks, "cpu", training=False)
    return models.build(section, attend=kernel.attend, seq_len=T).eval(), kernel


def begins(path, positions, masks=()):
    """Returns ``start`` under a folder's own window, and the given masks."""
    window = settings.window_of(Folder(path).config) or T
    return mask.compose(mask.sliding(positions, window), *(allow(positions, window) for allow in masks))


@torch.no_grad()
def logits(path, model, kernel, tokens, start):
    return model(tokens, kernel.derive(start, torch.device("cpu")))


def text(rows=2, length=T):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(2))


PLAIN = torch.arange(T, dtype=torch.int32).repeat(2, 1)
PACKED = torch.cat([torch.arange(n, dtype=torch.int32) for n in (13, 1, 20, 14)]).repeat(2, 1)


@torch.no_grad()
def compare(path, one, kernel, other):
    """The logits of our model and theirs, on plain rows and on rows of several documents."""
    plain = logits(path, one, kernel, text(), begins(path, PLAIN))
    torch.testing.assert_close(plain, other(text()).logits, atol=1e-5, rtol=1e-5)
    start = begins(path, PACKED, [mask.document])
    hidden = torch.where(mask.dense(start), 0.0, torch.finfo(torch.float32).min)[:, None]
    packed = logits(path, one, kernel, text(), start)
    torch.testing.assert_close(packed, other(text(), attention_mask=hidden).logits, atol=1e-5, rtol=1e-5)
    assert (packed - plain).abs().max() > 0.1


def test_their_weights_give_their_logits_here(theirs):
    model, kernel = make(theirs.path, ["document"])
    weights.load(model, theirs.path)
    compare(theirs.path, model, kernel, theirs.model)


def test_our_weights_give_our_logits_there_and_the_same_text(theirs, tmp_path):
    model, kernel = make(theirs.path, ["document"])
    stir(model, seed=3)
    window = settings.window_of(Folder(theirs.path).config)
    weights.save(model, tmp_path, Facts(T, window), torch.float32, first=True)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(other) is type(theirs.model)
    compare(theirs.path, model, kernel, other)

    def forward(tokens):
        positions = torch.arange(tokens.shape[1], dtype=torch.int32)[None]
        return logits(theirs.path, model, kernel, tokens, begins(theirs.path, positions))

    greedy = SamplesConfig(max_new_tokens=30, temperature=0.0)
    mine = generate(forward, [5, 6, 7], greedy, T, torch.Generator())
    prompt = torch.tensor([[5, 6, 7]])
    found = other.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert found[0, 3:].tolist() == mine
    assert len(set(mine)) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_for_bit(theirs, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    source = tmp_path / "source"
    theirs.model.to(dtype).save_pretrained(source, max_shard_size="20KB")
    theirs.model.float()
    conversion.to_checkpoint(Folder(source), tmp_path / "step-0")
    fields = settings.read(Folder(source).config)
    config = models.resolve(SimpleNamespace(**fields))
    (tmp_path / "back").mkdir()
    facts = Facts(64, settings.window_of(Folder(source).config))
    conversion.from_checkpoint(tmp_path / "step-0", tmp_path / "back", (fields["name"], config), facts)
    first, back = Folder(source), Folder(tmp_path / "back")
    assert first.tensors.keys() == back.tensors.keys()
    assert len({kept.file for kept in back.tensors.values()}) > 1
    for name, kept in first.tensors.items():
        assert back.tensors[name].dtype == kept.dtype == dtype
        assert torch.equal(back.read(name), first.read(name)), name
    assert settings.read(back.config) == fields
    known = settings.KEYS.values()
    assert {key: back.config[key] for key in known} == {key: first.config.get(key, back.config[key]) for key in known}
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=dtype)
    for (name, one), other in zip(reloaded.named_parameters(), theirs.model.to(dtype).parameters(), strict=True):
        assert torch.equal(one, other), name
    theirs.model.float()
