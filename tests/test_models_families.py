"""Gemma 3, OLMo 2, OLMo 3 and SmolLM 3: their sizes, their layers against their formulas, and short trainings."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
import torch.nn.functional as F

from torchladder import models
from torchladder.models import attention
from torchladder.models.layers import JointRMSNorm, ZeroCenteredRMSNorm
from torchladder.registry import ConfigError

PARAMETERS = {
    ("gemma3", "debug"): 403_392,
    ("gemma3", "270m"): 268_098_176,
    ("gemma3", "1b"): 999_885_952,
    ("gemma3", "4b"): 3_880_263_168,
    ("gemma3", "12b"): 11_766_034_176,
    ("gemma3", "27b"): 27_009_346_304,
    ("olmo2", "debug"): 164_352,
    ("olmo2", "1b"): 1_484_916_736,
    ("olmo2", "7b"): 7_298_617_344,
    ("olmo2", "13b"): 13_716_198_400,
    ("olmo2", "32b"): 32_234_279_936,
    ("olmo3", "debug"): 263_104,
    ("olmo3", "7b"): 7_298_011_136,
    ("olmo3", "32b"): 32_233_522_176,
    ("smollm3", "debug"): 229_952,
    ("smollm3", "3b"): 3_075_098_624,
}
FAMILIES = ["gemma3", "olmo2", "olmo3", "smollm3"]
FULL, SLIDING = "full_attention", "sliding_attention"


def build(name, flavor="debug", seed=0, **overrides):
    section = SimpleNamespace(name=name, flavor=flavor, **overrides)
    model = models.build(section, attention_fn=attention.causal_attention, seq_len=16)
    model.init_weights(seed)
    return model


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_flavor_has_its_published_size():
    assert list(PARAMETERS) == [(name, flavor) for name in FAMILIES for flavor in models.registry.flavors(name)]
    for (name, flavor), parameters in PARAMETERS.items():
        section = SimpleNamespace(name=name, flavor=flavor)
        with torch.device("meta"):
            model = models.build(section, attention_fn=attention.causal_attention, seq_len=64)
        assert model.num_parameters() == parameters, (name, flavor)


def test_the_docs_list_every_flavor():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 11]
    listed = {(row[0], row[1]): row[2:] for row in rows[2:]}
    assert list(listed) == list(PARAMETERS)
    for (name, flavor), (*shape, parameters) in listed.items():
        config = models.resolve(SimpleNamespace(name=name, flavor=flavor))
        sizes = [config.n_layers, config.dim, config.n_heads, config.kv_heads, config.head_size, config.ffn_dim]
        found = [int(cell.replace(",", "")) for cell in (*shape, parameters)]
        assert found == [*sizes, config.vocab_size, PARAMETERS[name, flavor]]


@pytest.mark.parametrize("name", FAMILIES)
def test_its_settings_have_meanings_and_defaults(name):
    assert list(models.registry.parameters(name)) == list(models.registry.docs(name))
    assert all(models.registry.docs(name).values())
    models.resolve(SimpleNamespace(name=name, flavor="", dim=64, n_layers=1, n_heads=2, ffn_dim=64))


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_of_a_zero_centered_norm_is_not_rounded(dtype):
    norm = ZeroCenteredRMSNorm(8, eps=1e-6)
    weight = torch.full((8,), 0.001)  # 1.001 is 1 in bfloat16
    norm.weight.data = weight
    x = noise(2, 3, 8).to(dtype)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight.double())
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), expected.to(dtype), atol=1e-6, rtol=1e-6)


def test_a_joint_norm_is_one_over_all_heads():
    norm = JointRMSNorm(12, eps=1e-6)
    norm.weight.data = noise(12, seed=2)
    x = noise(2, 3, 4, 3)
    expected = F.rms_norm(x.reshape(2, 3, 12), (12,), norm.weight, 1e-6).reshape(x.shape)
    torch.testing.assert_close(norm(x), expected)


def test_a_gemma3_block_is_its_formula():
    model = build("gemma3", n_layers=1, layer_types=[FULL], layer_rope_theta={}, query_pre_attn_scalar=5)
    block, config = model.layers["0"], model.config
    for number, parameter in enumerate(block.parameters()):
        parameter.data = 0.3 * noise(*parameter.shape, seed=number)
    x = noise(2, 16, config.dim)

    def norm(x, layer):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + layer.weight)

    own, rope = block.attention, model.ropes[FULL]
    inner = norm(x, block.attention_norm)
    q, k, v = (layer(inner).unflatten(-1, (-1, config.head_size)) for layer in (own.q_proj, own.k_proj, own.v_proj))
    q, k = rope(norm(q, own.q_norm)), rope(norm(k, own.k_norm))
    k, v = (x.repeat_interleave(config.n_heads // config.kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(5)
    scores = scores.masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
    out = own.o_proj(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))
    y = x + norm(out, block.attention_post_norm)
    inner, ffn = norm(y, block.feed_forward_norm), block.feed_forward
    out = ffn.down_proj(F.gelu(ffn.gate_proj(inner), approximate="tanh") * ffn.up_proj(inner))
    torch.testing.assert_close(block(x, None), y + norm(out, block.feed_forward_post_norm), atol=1e-5, rtol=1e-4)


def test_gemma3_scales_embeddings_by_a_factor_of_their_dtype():
    model = build("gemma3", dim=1152)
    tokens = torch.arange(4)[None]
    assert torch.equal(model.embed(tokens), model.embedding(tokens) * torch.tensor(1152**0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embed(tokens), model.embedding(tokens).bfloat16() * 34)


def test_an_olmo2_block_has_its_norms_behind():
    block = build("olmo2").layers["0"]
    x = noise(2, 16, 64)
    y = x + block.attention_norm(block.attention(x, None))
    torch.testing.assert_close(block(x, None), y + block.feed_forward_norm(block.feed_forward(y)))
    assert block.attention.q_norm.weight.shape == (64,)
    assert block.attention.k_norm.weight.shape == (32,)


def test_smollm3_has_no_rope_in_every_fourth_layer():
    assert [block.attention.rope is None for block in build("smollm3").layers.values()] == [False] * 3 + [True]


def test_norms_begin_as_a_factor_of_1():
    norms = [p for p in build("gemma3").parameters() if p.dim() == 1]
    assert len(norms) == 6 * 6 + 1
    assert not any(norm.any() for norm in norms)
    assert all((p == 1).all() for p in build("olmo2").parameters() if p.dim() == 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_count_each_matrix_and_pair_once(name):
    model = build(name)
    config = model.config
    heads = (2 * config.n_heads + 2 * config.kv_heads) * config.head_size
    weights = config.n_layers * config.dim * (heads + 3 * config.ffn_dim) + config.vocab_size * config.dim
    assert model.flops(100, 1000) == 6 * weights * 100 + 12 * config.n_heads * config.head_size * 1000


def test_a_scale_of_attention_that_is_not_positive_is_refused():
    with pytest.raises(ConfigError, match=r"model\.query_pre_attn_scalar = 0: must be 1 or more"):
        build("gemma3", query_pre_attn_scalar=0)


# --- training --------------------------------------------------------------------------------------------------------

WINDOWS = ["--attention.sliding_attention.masks", "document", "sliding", "--attention.sliding_attention.window", "16"]
COMPILED = ["--compile.enable", "--compile.backend", "aot_eager", "--compile.components", "model", "loss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_short_training_learns_and_compiling_changes_nothing(tmp_path, name):
    argv = ["--model.name", name, "--training.steps", "8", "--validation.no_enable", "--training.seq_len", "64"]
    argv += WINDOWS if name in ("gemma3", "olmo3") else []
    for folder, more in (("eager", []), ("compiled", COMPILED)):
        runs.run(tmp_path / folder, *argv, *more)
    eager, compiled = (runs.losses(tmp_path / folder) for folder in ("eager", "compiled"))
    assert eager[8] < eager[1] - 0.05
    assert compiled == pytest.approx(eager, rel=1e-5)
