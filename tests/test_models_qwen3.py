"""Qwen3: sizes, its norms against their formula, and the contract that it shares with every model."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from torchladder import models
from torchladder.models import attention
from torchladder.registry import ConfigError

SMALL = models.Qwen3Config(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, vocab_size=64, tie_embeddings=True
)
PARAMETERS = {
    "debug": 156_096,
    "0.6b": 596_049_920,
    "1.7b": 1_720_574_976,
    "4b": 4_022_468_096,
    "8b": 8_190_735_360,
    "14b": 14_768_307_200,
    "32b": 32_762_123_264,
}


def section(flavor="debug", **overrides):
    return SimpleNamespace(name="qwen3", flavor=flavor, **overrides)


def make(config=SMALL):
    model = models.Qwen3(config, attention.causal_attention, 16)
    model.init_weights(0)
    return model


def tokens():
    return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def test_every_flavor_has_its_published_size():
    assert list(PARAMETERS) == list(models.registry.flavors("qwen3"))
    for flavor, parameters in PARAMETERS.items():
        with torch.device("meta"):
            model = models.build(section(flavor), attention_fn=attention.causal_attention, seq_len=64)
        assert model.num_parameters() == parameters, flavor


def test_the_docs_list_every_flavor():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 9]
    listed = {row[0]: row[1:] for row in rows[2:]}
    assert list(listed) == list(PARAMETERS)
    for flavor, (*shape, tied, parameters) in listed.items():
        config = models.resolve(section(flavor))
        found = [config.n_layers, config.dim, config.n_heads, config.kv_heads, config.ffn_dim, PARAMETERS[flavor]]
        assert [int(cell.replace(",", "")) for cell in (*shape, parameters)] == found
        assert (tied == "tied") == config.tie_embeddings


def test_queries_and_keys_are_normalised_per_head_before_they_turn():
    model = make()
    layer = model.layers["0"].attention
    with torch.no_grad():
        layer.q_norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
        layer.k_norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + SMALL.norm_eps).rsqrt() * weight

    q, k, v = (F.linear(x, p.weight).view(2, 16, -1, 16) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    rope = model.ropes["full_attention"]
    q, k = rope(norm(q, layer.q_norm.weight)), rope(norm(k, layer.k_norm.weight))
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(16)
    scores = scores.masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
    expected = F.linear(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2), layer.o_proj.weight)
    torch.testing.assert_close(layer(x, None), expected, atol=1e-6, rtol=1e-5)


def test_the_contract_is_kept():
    model = make()
    assert list(model.layers) == ["0", "1"]
    weights = 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48) + 64 * 32
    assert model.flops(100, 1000) == 6 * weights * 100 + 12 * 4 * 16 * 1000
    assert {path for path, style in model.parallel_plan().items() if style == "qk_norm"} == {
        "layers.*.attention.q_norm",
        "layers.*.attention.k_norm",
    }
    loss = model(tokens(), None, tokens())
    torch.testing.assert_close(
        loss, F.cross_entropy(model(tokens(), None).flatten(0, 1), tokens().flatten(), reduction="sum")
    )
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    before = model(tokens(), None)
    model.set_rope_theta(5000.0)
    assert not torch.allclose(model(tokens(), None), before)


def test_its_settings_have_meanings_and_defaults_of_its_own():
    assert list(models.registry.parameters("qwen3")) == list(models.registry.docs("qwen3"))
    assert all(models.registry.docs("qwen3").values())
    config = models.resolve(section("", dim=64, n_layers=1, n_heads=2, ffn_dim=64))
    assert (config.head_size, config.rope_theta, config.norm_eps, config.vocab_size) == (128, 1e6, 1e-6, 151936)
    with pytest.raises(ConfigError, match=r"model\.ffn_dim is required"):
        models.resolve(section("", dim=64, n_layers=1, n_heads=2))
