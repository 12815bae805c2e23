"""RoPE: scalings against transformers, partial rotation, layers without it; all by layer type."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from torchladder import models
from torchladder.models import LlamaConfig
from torchladder.models.rope import RoPE, rope_angles
from torchladder.registry import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
SHAPE = LlamaConfig(dim=32, n_layers=4, n_heads=4, ffn_dim=48, vocab_size=30, rope_original_seq_len=64)
CPU = torch.device("cpu")


@given(
    theta=st.floats(100.0, 1e7),
    head_dim=st.sampled_from([8, 64, 128]),
    factor=st.floats(1.01, 64.0),
    original=st.integers(16, 10_000),
    beta_slow=st.floats(0.5, 2.0),
    beta_fast=st.floats(4.0, 64.0),
    attention_factor=st.none() | st.floats(0.5, 2.0),
    truncate=st.booleans(),
)
def test_yarn_has_the_frequencies_of_transformers(theta, head_dim, factor, original, **more):
    config = replace(
        SHAPE, head_dim=head_dim, rope_theta=theta, rope_scaling_type="yarn", rope_scaling_factor=factor,
        rope_original_seq_len=original, **{f"rope_{key}": value for key, value in more.items()},
    )  # fmt: skip
    table = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    theirs = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=table | more, max_position_embeddings=original)
    frequencies, expected = ROPE_INIT_FUNCTIONS["yarn"](theirs, CPU)
    angles, found = rope_angles(config, theta, 2, CPU)
    torch.testing.assert_close(angles[1], frequencies, rtol=1e-5, atol=0)
    assert found == pytest.approx(expected)


def test_partial_rotation_leaves_the_last_features_as_they_are():
    config = replace(SHAPE, partial_rotary_factor=0.5)
    x = torch.randn(2, 7, 4, 8)
    rotated = RoPE(config, 7, FULL)(x)
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    # The features that rotate are those of a head of half the size.
    assert torch.equal(rotated[..., :4], RoPE(replace(SHAPE, head_dim=4), 7, FULL)(x[..., :4]))
    assert not torch.equal(rotated[:, 1:, :, :4], x[:, 1:, :, :4])


def test_yarn_scales_queries_and_keys():
    config = replace(SHAPE, rope_scaling_type="yarn", rope_scaling_factor=4.0, rope_attention_factor=3.0)
    x = torch.randn(2, 7, 4, 8)
    torch.testing.assert_close(RoPE(config, 7, FULL)(x).norm(dim=-1), 3 * x.norm(dim=-1))


def test_layer_types_share_or_own_theta_scaling_and_rope():
    config = replace(
        SHAPE, layer_types=[SLIDING, FULL], rope_scaling_factor=4.0, rope_condense_ratio=2.0,
        layer_rope_theta={SLIDING: 50.0}, rope_scaling_layer_types=[FULL], nope_layers=[3],
    )  # fmt: skip
    model = models.Llama(config, seq_len=16)
    ropes = [block.attention.rope for block in model.layers.values()]
    assert ropes[0] is ropes[2] is model.ropes[SLIDING]
    assert ropes[1] is model.ropes[FULL]
    assert ropes[3] is None
    plain = replace(SHAPE, rope_theta=50.0)
    assert torch.equal(ropes[0].cos, RoPE(plain, 16, FULL).cos)
    scaled = replace(SHAPE, rope_scaling_factor=4.0, rope_condense_ratio=2.0)
    assert torch.equal(ropes[1].cos, RoPE(scaled, 16, FULL).cos)
    model.set_rope_theta(77.0)  # of the types without a theta of their own
    assert (model.ropes[SLIDING].theta, model.ropes[FULL].theta) == (50.0, 77.0)


def test_a_layer_without_rope_does_not_know_positions():
    config = replace(SHAPE, layer_types=[SLIDING, FULL], nope_layer_types=[FULL], n_layers=2)
    attention = models.Llama(config, seq_len=16).layers["1"].attention
    assert attention.rope is None
    model = models.Llama(replace(SHAPE, n_layers=1, nope_layers=[0]), seq_len=16)
    model.init_weights(0)
    tokens = torch.randint(30, (1, 9))
    from_the_start = model(tokens, torch.zeros(1, 9, dtype=torch.int32))[:, -1]
    order = torch.tensor([3, 1, 0, 2, 7, 5, 4, 6, 8])
    torch.testing.assert_close(model(tokens[:, order], torch.zeros(1, 9, dtype=torch.int32))[:, -1], from_the_start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling_type": "ntk"}, "unknown model.rope_scaling_type 'ntk'"),
        (
            {"rope_beta_slow": 40.0},
            "model.rope_beta_slow = 40.0 must be positive and below model.rope_beta_fast = 32.0",
        ),
        ({"rope_attention_factor": 0.0}, "model.rope_attention_factor = 0.0: must be positive"),
        ({"partial_rotary_factor": 0.4}, "model.partial_rotary_factor = 0.4: must rotate an even number of a head's 8"),
        ({"partial_rotary_factor": 1.5}, "model.partial_rotary_factor = 1.5"),
        ({"partial_rotary_factor": 0.3}, "model.partial_rotary_factor = 0.3"),
        (
            {"rope_scaling_type": "yarn"},
            "model.rope_scaling_type = 'yarn' scales nothing: set model.rope_scaling_factor",
        ),
        (
            {"layer_types": [FULL, SLIDING], "rope_scaling_layer_types": [FULL]},
            "model.rope_scaling_layer_types scales nothing",
        ),
        ({"nope_layers": [4]}, "model.nope_layers has 4: layers are numbered from 0 to 3"),
        ({"nope_layers": [0], "positional_embedding": "none"}, "model.nope_layers: the model has no RoPE, remove it"),
        ({"nope_layer_types": [FULL]}, "model.nope_layer_types has full_attention, but all layers are of one type"),
        (
            {"layer_types": [FULL, SLIDING], "rope_scaling_layer_types": ["full"], "rope_condense_ratio": 2.0},
            "unknown layer type 'full' in model.rope_scaling_layer_types",
        ),
        ({"attention_sinks": ["sliding_attention"]}, "unknown layer type 'sliding_attention' in model.attention_sinks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(SHAPE, **change)
