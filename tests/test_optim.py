"""Optimizers: groups, implementations, settings. Learning rates: the courses as formulas, and no state."""

import itertools
import logging
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchladder import optim
from torchladder.optim import AdamW, LRScheduler, LRSchedulerConfig
from torchladder.registry import ConfigError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8)


def section(name="AdamW", **settings):
    defaults = {key: parameter.default for key, parameter in optim.registry.parameters(name).items()}
    return SimpleNamespace(name=name, **(defaults | settings))


# --- optimizers ------------------------------------------------------------------------------------------------------


def test_vectors_are_not_decayed():
    model = Model()
    decayed, kept = optim.build(section(weight_decay=0.2), model).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model.embedding.weight), id(model.head.weight)}
    assert {id(p) for p in kept["params"]} == {id(model.norm.weight), id(model.norm.bias), id(model.head.bias)}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.2, 0.0)


def test_everything_decays_on_request():
    (group,) = optim.build(section(decay_matrices_only=False), Model()).param_groups
    assert len(group["params"]) == 5
    assert group["weight_decay"] == 0.1


def test_tied_and_frozen_parameters():
    model = Model()
    model.head.weight = model.embedding.weight
    model.norm.requires_grad_(False)
    decayed, kept = optim.build(section(), model).param_groups
    assert len(decayed["params"]) == len(kept["params"]) == 1


def test_settings_arrive():
    made = optim.build(section(lr=3e-3, beta1=0.8, beta2=0.9, eps=1e-6), Model())
    assert isinstance(made, torch.optim.AdamW)
    for group in made.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.9), 1e-6)
    assert type(optim.build(section("Adam"), Model())) is torch.optim.Adam


def step(implementation, name="AdamW"):
    torch.manual_seed(0)
    model = Model()
    optimizer = optim.build(section(name, implementation=implementation, weight_decay=0.5), model)
    for _ in range(3):
        optimizer.zero_grad()
        model.head(model.norm(model.embedding(torch.arange(8)))).square().sum().backward()
        optimizer.step()
    return optimizer, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_implementations_agree(name):
    flags = {"fused": (True, False), "foreach": (False, True), "for-loop": (False, False)}
    _, expected = step("for-loop", name)
    for implementation, (fused, foreach) in flags.items():
        optimizer, weights = step(implementation, name)
        assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (fused, foreach)
        torch.testing.assert_close(weights, expected)


def test_fused_gives_way_only_where_torch_refuses(monkeypatch, caplog):
    def refuse(groups, fused=False, **options):
        if fused:
            raise RuntimeError("no fused kernel for this device\nmore")
        return original(groups, **options)

    original = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", refuse)
    with caplog.at_level(logging.WARNING):
        made = optim.build(section(), Model())
    assert made.defaults["foreach"] is True
    assert (
        "fused is not supported here, using foreach (cpu, torch.float32: no fused kernel for this device)"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"optimizer\.lr = -1\.0"),
        ({"lr": math.inf}, r"optimizer\.lr = inf"),
        ({"beta1": 1.0}, r"optimizer\.beta1 = 1\.0: must be 0 or more and below 1"),
        ({"beta2": -0.1}, r"optimizer\.beta2"),
        ({"eps": -1e-8}, r"optimizer\.eps"),
        ({"weight_decay": math.nan}, r"optimizer\.weight_decay = nan"),
    ],
)
def test_impossible_optimizers(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdamW(**settings)


def test_unknown_optimizer_and_empty_model():
    with pytest.raises(ConfigError, match="Did you mean 'AdamW'"):
        optim.build(SimpleNamespace(name="adamW"), Model())
    with pytest.raises(ConfigError, match="no trainable parameters"):
        optim.build(section(), nn.Identity())


def test_a_plugin_brings_its_own_settings():
    @optim.register("SGD")
    @dataclass(frozen=True)
    class SGD:
        """Plain gradient descent."""

        lr: float = 0.1
        momentum: float = 0.9

        def __call__(self, model):
            return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)

    try:
        assert list(optim.registry.parameters("SGD")) == ["lr", "momentum"]
        made = optim.build(SimpleNamespace(name="SGD", lr=0.5, momentum=0.7), Model())
        assert made.defaults["momentum"] == 0.7
    finally:
        del optim.registry._components["SGD"]


# --- the learning rate -----------------------------------------------------------------------------------------------


def course(steps, **settings):
    config = LRSchedulerConfig(**settings)
    return [config.factor(step, steps) for step in range(steps)]


def test_warmup_begins_above_zero_and_ends_at_the_peak():
    assert course(8, warmup_steps=4, decay_type="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert course(3, warmup_steps=0, decay_type="constant") == [1, 1, 1]
    assert course(3, warmup_steps=1, decay_type="constant") == [1, 1, 1]


def test_decay_after_warmup():
    assert course(6, warmup_steps=2, decay_type="linear") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


def test_plateau_then_decay():
    factors = course(100, warmup_steps=10, decay_ratio=0.2, decay_type="linear", min_lr_factor=0.1)
    assert factors[9:81] == [1] * 72
    assert factors[80:] == pytest.approx([1 - 0.9 * x / 20 for x in range(20)])


def test_cosine_of_skyladder():
    config = LRSchedulerConfig(warmup_steps=2000, decay_type="cosine", min_lr_factor=0.1)
    assert 4e-4 * config.factor(51_000, 100_000) == pytest.approx((4e-4 + 4e-5) / 2)
    assert 4e-4 * config.factor(100_000, 100_000) == pytest.approx(4e-5)


def test_one_minus_sqrt_cooldown():
    # A = 1.6e-4 falls to B = 8e-6 between steps 339,086 and 423,858.
    begin, end, peak, least = 339_086, 423_858, 1.6e-4, 8e-6
    config = LRSchedulerConfig(
        warmup_steps=0, decay_ratio=(end - begin) / end, decay_type="sqrt", min_lr_factor=least / peak
    )
    for step in (0, begin, begin + 1, 380_000, end - 1, end):
        progress = max(step - begin, 0) / (end - begin)
        assert peak * config.factor(step, end) == pytest.approx(peak - (peak - least) * math.sqrt(progress))


def test_exponential_falls_by_one_factor():
    factors = course(10, warmup_steps=0, decay_type="exponential", min_lr_factor=0.01)
    assert [later / one for one, later in itertools.pairwise(factors)] == pytest.approx([0.01**0.1] * 9)


@given(
    st.integers(1, 500),
    st.integers(0, 600),
    st.none() | st.integers(1, 1000),
    st.none() | st.floats(0, 1),
    st.sampled_from(["constant", "linear", "cosine", "exponential", "sqrt"]),
    st.floats(0.001, 1),
)
def test_every_course_is_sane(steps, warmup_steps, total_steps, decay_ratio, decay_type, min_lr_factor):
    factors = course(
        steps,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        decay_ratio=decay_ratio,
        decay_type=decay_type,
        min_lr_factor=min_lr_factor,
    )
    assert all(0 < factor <= 1 for factor in factors)
    climb, fall = factors[:warmup_steps], factors[warmup_steps:]
    assert fall == sorted(fall, reverse=True)
    assert all(factor >= min_lr_factor * (1 - 1e-12) for factor in fall)
    assert all(factor <= (s + 1) / warmup_steps for s, factor in enumerate(climb))


def test_no_step_is_taken_at_zero():
    for decay_type in ("linear", "cosine", "sqrt"):
        assert course(100, warmup_steps=10, decay_type=decay_type)[-1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"total_steps": 0}, "total_steps = 0"),
        ({"decay_ratio": 1.1}, r"decay_ratio = 1\.1: must be 0 or more and at most 1"),
        ({"min_lr_factor": -0.1}, "min_lr_factor"),
        ({"decay_type": "exponential"}, "never reaches 0"),
        ({"decay_type": "cosin"}, "unknown decay type 'cosin'. Did you mean 'cosine'"),
    ],
)
def test_impossible_courses(settings, message):
    with pytest.raises(ConfigError, match=message):
        LRSchedulerConfig(**settings)


def test_a_plugin_adds_a_decay_type():
    @optim.decays.register("cliff")
    def cliff(progress, min_lr_factor):
        return 1.0 if progress < 0.5 else min_lr_factor

    try:
        assert course(4, warmup_steps=0, decay_type="cliff", min_lr_factor=0.5) == [1, 1, 0.5, 0.5]
    finally:
        del optim.decays._components["cliff"]


def test_the_scheduler_sets_every_group_and_keeps_no_step():
    optimizer = optim.build(section(lr=2.0), Model())
    optimizer.param_groups[1]["lr"] = 4.0
    scheduler = LRScheduler(optimizer)
    for factor in (0.5, 1.0, 0.25, 0.5):
        assert scheduler.set_factor(factor) == 2.0 * factor
        assert [group["lr"] for group in optimizer.param_groups] == [2.0 * factor, 4.0 * factor]


def test_a_loaded_optimizer_does_not_change_the_peak():
    old, new = (optim.build(section(lr=lr), Model()) for lr in (1.0, 3.0))
    scheduler = LRScheduler(new)
    new.load_state_dict(old.state_dict())
    assert scheduler.set_factor(1.0) == 3.0
