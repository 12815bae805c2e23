"""Llama: sizes, the contract, precision, and its parts against their formulas."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchladder import mask, models
from torchladder.models import attention
from torchladder.models.rope import RoPE, rope_angles
from torchladder.registry import ConfigError

SMALL = models.LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64)


def section(flavor="debug", **overrides):
    return SimpleNamespace(name="llama", flavor=flavor, **overrides)


def make(config=SMALL, seq_len=32, kernel=None, seed=0):
    model = models.Llama(config, kernel.attention if kernel else attention.causal_attention, seq_len)
    model.init_weights(seed)
    return model


def tokens(batch=2, length=32, vocab=64):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))


# --- flavors ---------------------------------------------------------------------------------------------------------

PARAMETERS = {
    "debug": 164_160,
    "small": 6_229_248,
    "120m": 121_129_728,
    "360m": 367_563_776,
    "1b": 1_100_048_384,
    "3b": 2_960_553_600,
    "3.2-3b": 3_016_928_256,
    "code-1b": 1_170_302_976,
    "code-3.2-3b": 3_120_737_280,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "teenytinyllama-160m": 162_417_408,
    "teenytinyllama-460m": 468_239_360,
    "tilde-30b": 30_677_882_880,
}


def test_every_flavor_has_its_published_size():
    assert list(PARAMETERS) == list(models.registry.flavors("llama"))
    for flavor, parameters in PARAMETERS.items():
        with torch.device("meta"):
            model = models.build(section(flavor), attention_fn=attention.causal_attention, seq_len=64)
        assert model.num_parameters() == parameters, flavor
        assert all(parameter.is_meta for parameter in model.parameters())


def test_the_docs_list_every_flavor():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 10]
    listed = {row[0]: row[1:] for row in rows[2:]}
    assert list(listed) == list(PARAMETERS)
    for flavor, (layers, dim, heads, kv_heads, ffn, vocabulary, theta, parameters) in listed.items():
        config = models.resolve(section(flavor))
        shape = (config.n_layers, config.dim, config.n_heads, config.kv_heads, config.ffn_dim, PARAMETERS[flavor])
        assert shape == tuple(int(cell.replace(",", "")) for cell in (layers, dim, heads, kv_heads, ffn, parameters))
        assert (f"{config.vocab_size:,}" in vocabulary, "tied" in vocabulary) == (True, config.tie_embeddings)
        assert float(theta.split(",")[0]) == config.rope_theta


def test_a_section_overrides_its_flavor():
    config = models.resolve(section("1b", rope_theta=1e6, n_layers=2, dim=None))
    assert (config.rope_theta, config.n_layers, config.dim) == (1e6, 2, 2048)
    assert models.resolve(section("debug", dim=128)).head_size == 32  # a head follows the dim that it divides


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (section("7b"), "unknown llama flavor '7b'.*llama2-7b"),
        (SimpleNamespace(name="lama", flavor="1b"), "Did you mean 'llama'"),
        (section(n_heads=3), "does not divide into model.n_heads = 3"),
        (section(n_heads=8, n_kv_heads=3), "not a multiple of model.n_kv_heads = 3"),
        (section(head_dim=7), "model.head_dim = 7: must be even"),
        (section(n_layers=0), "model.n_layers = 0"),
        (section(rope_theta=-1.0), "model.rope_theta"),
        (section(rope_scaling_factor=0.5), "model.rope_scaling_factor"),
        (section(rope_low_freq_factor=5.0), "model.rope_low_freq_factor"),
        (section(rope_restart=-1), "model.rope_restart"),
        (section(initialization="skylader"), "Did you mean 'skyladder'"),
        (section(positional_embedding="alibi"), "unknown model.positional_embedding"),
    ],
)
def test_a_section_that_cannot_be_says_why(given, message):
    with pytest.raises(ConfigError, match=message):
        models.resolve(given)


def test_the_registry_describes_every_setting():
    settings = models.registry.parameters("llama")
    docs = models.registry.docs("llama")
    assert list(settings) == list(docs)
    assert all(docs.values())
    assert settings["flavor"].default == "debug"
    assert settings["dim"].annotation == int | None
    assert all(settings[name].default is None for name in settings if name not in ("flavor", "hf_assets_path"))


def test_a_model_registers_with_its_flavors():
    registry = models.ModelRegistry()
    with pytest.raises(ConfigError, match="at least one flavor"):
        registry.register("nothing")
    registry.register("other", flavors={"only": SMALL})(models.Llama)
    assert registry.build(SimpleNamespace(name="other", flavor="only"), seq_len=8).seq_len == 8


# --- initial weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("initialization", "std", "residual"),
    [
        ("skyladder", math.sqrt(2 / (5 * 256)), 1 / (math.sqrt(256) * 2)),
        ("tilde", math.sqrt(2 / (5 * 256)), 2 / (2 * math.sqrt(256))),
        ("megatron", 0.03, 0.03 / 2),
        ("normal", 0.03, 0.03),
    ],
)
def test_initial_weights_have_their_deviation(initialization, std, residual):
    config = models.LlamaConfig(
        dim=256, n_layers=2, n_heads=4, ffn_dim=512, vocab_size=512, initialization=initialization, init_std=0.03
    )
    for name, parameter in make(config).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = residual if "o_proj" in name or "down_proj" in name else std
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel())


def test_each_parameter_draws_on_its_own():
    model, deeper = make(), make(models.LlamaConfig(**{**vars(SMALL), "n_layers": 3}))
    others = dict(deeper.named_parameters())
    for name, parameter in model.named_parameters():
        if "o_proj" not in name and "down_proj" not in name:  # those two get smaller with depth
            assert torch.equal(parameter, others[name])
    weights = [parameter.flatten()[:8].tolist() for parameter in model.parameters() if parameter.dim() > 1]
    assert len({tuple(weight) for weight in weights}) == len(weights)
    assert not torch.equal(make(seed=1).embedding.weight, model.embedding.weight)


def test_wrappers_do_not_change_the_draw():
    model = make()
    wrapped = models.Llama(SMALL, seq_len=32)
    for name, block in list(wrapped.layers.items()):
        wrapped.layers[name] = torch.nn.Sequential()
        wrapped.layers[name]._checkpoint_wrapped_module = block
    wrapped.init_weights(0)
    assert torch.equal(
        wrapped.layers["1"]._checkpoint_wrapped_module.attention.q_proj.weight,
        model.layers["1"].attention.q_proj.weight,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_from_meta_equals_one_made_in_place(tied):
    config = models.LlamaConfig(**{**vars(SMALL), "tie_embeddings": tied, "rope_scaling_factor": 8.0})
    here = make(config)
    with torch.device("meta"):
        there = models.Llama(config, seq_len=32)
    there.to_empty(device="cpu")
    there.init_weights(0)
    assert [*here.state_dict()] == [*there.state_dict()]
    assert not any("rope" in name for name in here.state_dict())
    assert torch.equal(here(tokens(), None), there(tokens(), None))
    assert torch.equal(here.ropes["full_attention"].cos, there.ropes["full_attention"].cos)


def test_a_tied_head_is_the_embedding():
    config = models.LlamaConfig(**{**vars(SMALL), "tie_embeddings": True})
    model = make(config)
    assert make().num_parameters() - model.num_parameters() == 64 * 32
    loss = model(tokens(), None, tokens())
    loss.backward()
    assert torch.equal(model(tokens(), None), F.linear(hidden_states(model), model.embedding.weight))


def hidden_states(model):
    """The states after the last norm, for which the head's input is watched."""
    seen = []
    hook = model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model(tokens(), None)
    hook.remove()
    return seen[0]


# --- forward ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_over_labels():
    model = make()
    labels = tokens().roll(-1, 1)
    labels[:, -3:] = -100
    logits = model(tokens(), None)
    assert logits.shape == (2, 32, 64)
    loss = model(tokens(), None, labels)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    reference = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, reference)


def test_a_block_is_its_formula():
    model = make(models.LlamaConfig(**{**vars(SMALL), "n_layers": 1}))
    block, config = model.layers["0"], model.config
    x = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weight

    a = block.attention
    n = norm(x, block.attention_norm.weight)
    q, k, v = ((n @ p.weight.T).view(2, 32, -1, 8) for p in (a.q_proj, a.k_proj, a.v_proj))
    q, k = rotated(q, 10000.0), rotated(k, 10000.0)
    k, v = (torch.stack([x[:, :, h // 2] for h in range(4)], 2) for x in (k, v))  # two query heads share one
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(32, 32, dtype=torch.bool).triu(1), -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    y = x + out @ a.o_proj.weight.T
    f = block.feed_forward
    n = norm(y, block.feed_forward_norm.weight)
    gate = n @ f.gate_proj.weight.T
    y = y + (gate * gate.sigmoid() * (n @ f.up_proj.weight.T)) @ f.down_proj.weight.T
    torch.testing.assert_close(block(x, None), y, atol=1e-5, rtol=1e-4)


def rotated(x, theta):
    """Pairs (j, j + K/2) of a head's features turn by position * theta^(-2j/K)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for position in range(x.shape[1]):
        for j in range(half):
            angle = position * theta ** (-2 * j / x.shape[-1])
            a, b = x[:, position, :, j], x[:, position, :, j + half]
            out[:, position, :, j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, position, :, j + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


@pytest.mark.parametrize("kernel", ["fold", "sdpa", "dense"])
def test_what_a_query_may_not_see_does_not_matter(kernel):
    masks = ["chunk"]
    kernel = attention.build_kernel(kernel, masks, "cpu")
    model = make(kernel=kernel)
    attn_mask = kernel.prepare(mask.chunk(torch.arange(32, dtype=torch.int32).repeat(2, 1), 10), torch.device("cpu"))
    one, other = tokens(), tokens()
    other[:, :10] = 0
    other[:, 25:] = 0
    one, other = model(one, attn_mask), model(other, attn_mask)
    torch.testing.assert_close(one[:, 10:20], other[:, 10:20])
    torch.testing.assert_close(one[:, 20:25], other[:, 20:25])
    assert not torch.allclose(one[:, :10], other[:, :10])


def on_cpu(masks):
    """The kernels that compute the masks on a CPU."""
    for name in attention.registry.names():
        try:
            attention.build_kernel(name, masks, "cpu", training=False)
        except ConfigError:
            continue
        yield name


@torch.no_grad()
@pytest.mark.parametrize("name", on_cpu(["causal", "document"]))
def test_documents_leak_nothing_at_all(name):
    """Another token changes no bit of the logits of another document, and with causal masks those after it."""
    ends = [11, 19, 32]
    positions = torch.cat([torch.arange(end - begin) for begin, end in zip([0, *ends], ends, strict=False)])
    kernel = attention.build_kernel(name, ["causal", "document"], "cpu", training=False)
    model, cpu = make(kernel=kernel), torch.device("cpu")
    row = tokens(batch=1)
    for masks in (["document"], ["causal"]):
        attn_mask = kernel.prepare(mask.from_names(masks, positions[None].int(), 32), cpu)
        before = model(row, attn_mask)[0]
        for place in (0, 10, 11, 15, 18, 19, 31):
            changed = row.clone()
            changed[0, place] = (changed[0, place] + 1) % 64
            leaked = (model(changed, attn_mask)[0] - before).abs().amax(-1)
            begin, end = next((begin, end) for begin, end in zip([0, *ends], ends, strict=False) if place < end)
            assert leaked[:place].sum() == 0.0
            assert leaked[place] > 0.0
            after = leaked[end:]
            assert after.sum() == 0.0 if masks == ["document"] else (after > 0.0).all()
            assert leaked[:begin].sum() == 0.0


def test_without_positions_order_before_a_query_does_not_matter():
    model = make(models.LlamaConfig(**{**vars(SMALL), "positional_embedding": "none", "n_layers": 1}))
    assert not model.ropes
    swapped = tokens().clone()
    swapped[:, [3, 5]] = swapped[:, [5, 3]]
    torch.testing.assert_close(model(tokens(), None)[:, 10], model(swapped, None)[:, 10])


# --- rotary positions ------------------------------------------------------------------------------------------------


def test_rope_follows_its_formula():
    x = torch.randn(1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
    rope = RoPE(replace(SMALL, head_dim=8, rope_theta=500.0), 20, "full_attention")
    torch.testing.assert_close(rope(x), rotated(x, 500.0), atol=1e-5, rtol=1e-4)


def angles(seq_len, **changes):
    config = replace(SMALL, **changes)
    return rope_angles(config, config.rope_theta, seq_len, torch.device("cpu"))[0]


def test_rope_scaling_slows_the_slow_rotations():
    """The figures of the published Llama 3.1 code for base 500,000, head 128, factor 8, 1, 4, 8192."""
    scaled = angles(2, head_dim=128, rope_theta=500000.0, rope_scaling_factor=8.0)[1]
    plain = angles(2, head_dim=128, rope_theta=500000.0)[1]
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    for i in ((wavelength >= 8192 / 4) & (wavelength <= 8192)).nonzero().flatten():
        smooth = (8192 / wavelength[i] - 1.0) / (4.0 - 1.0)
        torch.testing.assert_close(scaled[i], (1 - smooth) * plain[i] / 8 + smooth * plain[i])


def test_positions_can_be_condensed_or_restart():
    plain = angles(12)
    torch.testing.assert_close(angles(12, rope_condense_ratio=4.0), plain / 4)
    torch.testing.assert_close(angles(12, rope_restart=5)[5:10], plain[:5])


def test_the_table_stays_fp32_and_moves_with_the_model():
    model = make().bfloat16()
    assert model.ropes["full_attention"].cos.dtype == torch.float32
    assert torch.equal(model.ropes["full_attention"].cos, make().ropes["full_attention"].cos)
    assert copy.deepcopy(model).ropes["full_attention"] is not model.ropes["full_attention"]
    assert model.layers["1"].attention.rope is model.ropes["full_attention"]


def test_theta_can_change_while_a_model_lives():
    model, other = make(), make(models.LlamaConfig(**{**vars(SMALL), "rope_theta": 5000.0}))
    before = model.ropes["full_attention"].cos
    model.set_rope_theta(other.config.rope_theta)
    assert model.ropes["full_attention"].cos is before
    assert torch.equal(model(tokens(), None), other(tokens(), None))


# --- precision -------------------------------------------------------------------------------------------------------


def test_autocast_computes_in_bfloat16_over_fp32_weights():
    model = make()
    exact = model(tokens(), None, tokens())
    exact.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(), None).dtype == torch.bfloat16
        assert hidden_states(model).dtype == torch.bfloat16  # the residual stream, as under FSDP2
        loss = model(tokens(), None, tokens())
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name


def test_bfloat16_weights_give_an_fp32_loss():
    exact = make()(tokens(), None, tokens())
    loss = make().bfloat16()(tokens(), None, tokens())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_flops_count_every_product_once(tied):
    config = models.LlamaConfig(**{**vars(SMALL), "tie_embeddings": tied})
    model = make(config)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 64 * 32
    assert model.flops(100, 0) == 6 * weights * 100
    assert model.flops(0, 1000) == 12 * 4 * 8 * 1000
    assert model.flops(100, 1000) == model.flops(100, 0) + model.flops(0, 1000)


def test_flops_of_skyladder_1b_are_those_of_the_paper():
    """arXiv 2503.15450, table 8: 11.6e20 at 8K and 25.5e20 at 32K for 100,000 steps of 2^20 tokens."""
    for seq_len, expected in ((8192, 11.6e20), (32768, 25.5e20)):
        with torch.device("meta"):
            model = models.build(section("1b"), seq_len=seq_len)
        # The paper counts the embedding too, and every pair of a row.
        flops_per_token = model.flops(1, 22 * seq_len) + 6 * model.embedding.weight.numel()
        assert 100_000 * 2**20 * flops_per_token == pytest.approx(expected, rel=0.005)


def test_flops_agree_with_what_pytorch_counts():
    model = make(kernel=(kernel := attention.build_kernel("dense", ["causal"], "cpu")))
    attn_mask = kernel.prepare(mask.causal(torch.arange(32, dtype=torch.int32).repeat(2, 1), 32), torch.device("cpu"))
    # Attention as plain products over all T * T pairs, which is what PyTorch can count on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(tokens(), attn_mask).flatten(0, 1), tokens().flatten()).backward()
    assert counter.get_total_flops() == model.flops(2 * 32, 2 * 2 * 32 * 32)


def test_the_parallel_plan_names_every_module_that_has_parameters():
    model = make()
    plan = model.parallel_plan()
    owners = {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()}
    owners = {re.sub(r"^layers\.\d+", "layers.*", owner) for owner in owners}
    gathers = {"layers.*.attention", "layers.*.feed_forward"}
    assert set(plan) == owners | gathers
    assert {path for path, style in plan.items() if style == "gather"} == gathers


def test_layers_are_named_in_order():
    assert list(make().layers) == ["0", "1"]


def test_attention_sinks_take_weight_from_the_keys():
    """Against the softmax with one more column; without them the model has no such parameters."""
    torch.manual_seed(0)
    config = replace(SMALL, attention_sinks=["full_attention"])
    model, plain = models.Llama(config, seq_len=32), models.Llama(SMALL, seq_len=32)
    model.init_weights(0)
    plain.init_weights(0)
    sinks = {name: parameter for name, parameter in model.named_parameters() if "sinks" in name}
    assert {*sinks} == {f"layers.{number}.attention.sinks.weight" for number in range(config.n_layers)}
    assert all(torch.equal(parameter, torch.zeros(config.n_heads)) for parameter in sinks.values())
    assert not any("sinks" in name for name, _ in plain.named_parameters())
    kernel = attention.build_kernel("sdpa", ["causal"], "cpu", attention_sinks=True)
    tokens = torch.randint(config.vocab_size, (1, 9))
    attn_mask = kernel.prepare(torch.zeros(1, 9, dtype=torch.int32), torch.device("cpu"))
    for block in model.layers.values():
        block.attention.attention_fn = kernel.attention
    assert not torch.allclose(model(tokens, attn_mask), plain(tokens, attn_mask))
    with torch.no_grad():
        for parameter in sinks.values():
            parameter.fill_(-1e9)
    torch.testing.assert_close(model(tokens, attn_mask), plain(tokens, attn_mask))
